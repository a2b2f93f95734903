// A run of decoder layers in one call: where steps are small, calling the parts one by one costs more than computing.
//
//   embed -> L x ( norm -> qkv -> (q/k norm) -> rotate, write KV -> attend -> o
//                  add, norm -> gate_up -> SiLU * up -> down, add )
//
// All threads go through the parts together, with a barrier after each. The parts are those that are also called one
// by one, so the results are the same, bit for bit.
#pragma once

#include "any_linear.h"
#include "attention.h"
#include "kv_fetch.h"

namespace celeriac {

// Weights of a layer. Filled by engines/models/native_stack.py, field by field, as is `Stack`.
struct Layer {
  const void *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm: null where there are none
  Weight qkv, o, gate_up, down;
};

struct Stack {
  const Layer* layers;
  int64_t num_layers, hidden_size, head_dim, vocab_size, num_positions;
  float eps;
  const void *embed, *cos, *sin;  // [vocab_size, hidden_size]; [num_positions, head_dim]
  // Room for one step, rows `_stride` elements apart. `delta`: what the last layer adds, not added yet.
  void *normed, *qkv, *attended, *gate_up, *inner, *delta;
  int64_t normed_stride, attended_stride, inner_stride;
};

template <typename T>
struct StackRun {
  const Stack& stack;
  const Step& step;
  const int64_t *ids, *positions;  // [num_tokens]
  T* hidden;                       // [num_tokens, hidden_size]
  Team team;
  T* normed = static_cast<T*>(stack.normed);
  T* qkv = static_cast<T*>(stack.qkv);
  T* attended = static_cast<T*>(stack.attended);
  T* gate_up = static_cast<T*>(stack.gate_up);
  T* inner = static_cast<T*>(stack.inner);
  T* delta = static_cast<T*>(stack.delta);

  void embed() const {
    const int64_t size = stack.hidden_size;
    for (auto [t, end] = team.share(step.num_tokens); t < end; t++)
      std::memcpy(hidden + t * size, static_cast<const T*>(stack.embed) + ids[t] * size, sizeof(T) * size);
  }

  void add_delta() const {
    for (auto [t, end] = team.share(step.num_tokens); t < end; t++)
      add_row(stack.hidden_size, hidden + t * stack.hidden_size, delta + t * stack.hidden_size);
  }

  void norm(const void* weight, bool adds) const {
    const int64_t size = stack.hidden_size;
    for (auto [t, end] = team.share(step.num_tokens); t < end; t++)
      norm_row(size, hidden + t * size, adds ? delta + t * size : nullptr, static_cast<const T*>(weight), stack.eps,
               normed + t * stack.normed_stride);
  }

  // From the products of qkv to what attention reads.
  void place_heads(int64_t index, const Layer& layer) const {
    const int64_t size = stack.head_dim, turned = step.num_heads + step.num_kv_heads;
    const T *cos = static_cast<const T*>(stack.cos), *sin = static_cast<const T*>(stack.sin);
    for (auto [t, end] = team.share(step.num_tokens); t < end; t++) {
      T* heads = qkv + t * layer.qkv.num_out;
      if (layer.q_norm)
        for (int64_t h = 0; h < turned; h++)
          norm_row<T>(size, heads + h * size, nullptr,
                      static_cast<const T*>(h < step.num_heads ? layer.q_norm : layer.k_norm), stack.eps,
                      heads + h * size);
      rotate_token(turned, size, heads, cos + positions[t] * size, sin + positions[t] * size);
      write_kv_token(step, index, size, t, heads + step.num_heads * size, heads + turned * size);
    }
  }

  // SiLU(gate) * up for outputs [lo, hi) of all tokens in [first, last).
  void silu_mul(Share tokens, Share outputs) const {
    const int64_t size = stack.layers[0].down.num_in;
    for (auto [t, end] = tokens; t < end; t++) {
      const T* gate = gate_up + t * 2 * size;
      silu_mul_row(outputs.end - outputs.begin, gate + outputs.begin, gate + size + outputs.begin,
                   inner + t * stack.inner_stride + outputs.begin);
    }
  }

  // A thread that makes outputs of gate makes those of up that belong to them, too, where panels do not hold both.
  void feed_forward(const Layer& layer) {
    const int64_t rows = step.num_tokens, size = layer.down.num_in;
    const auto multiply = [&](Share panels) {
      linear(panels, rows, layer.gate_up, normed, stack.normed_stride, gate_up, layer.gate_up.num_out);
    };
    if (size % kColumns == 0) {
      const Share gate = team.share(size / kColumns);
      multiply(gate), multiply({gate.begin + size / kColumns, gate.end + size / kColumns});
      silu_mul({0, rows}, {gate.begin * kColumns, gate.end * kColumns});
    } else {
      multiply(panels_of(layer.gate_up));
      team.barrier();
      silu_mul(team.share(rows), {0, size});
    }
    meet(layer.down);
    linear(panels_of(layer.down), rows, layer.down, inner, stack.inner_stride, delta, stack.hidden_size);
  }

  Share panels_of(const Weight& weight) const { return team.share(num_panels(weight.num_out)); }

  // A barrier before a linear, or one part before it.
  void meet(const Weight& weight) {
    will_read<T>(team, weight, panels_of(weight));
    team.barrier();
  }

  // `next`: what will be read after this layer, or null.
  void layer(int64_t index, const Weight* next) {
    const Layer& layer = stack.layers[index];
    const int64_t rows = step.num_tokens;
    norm(layer.input_norm, index > 0);
    team.barrier();
    KvFetch<T> fetch(team, step, index, stack.head_dim, panels_of(layer.qkv));
    linear(panels_of(layer.qkv), rows, layer.qkv, normed, stack.normed_stride, qkv, layer.qkv.num_out, &fetch);
    meet(layer.o);
    place_heads(index, layer);
    team.barrier();
    attend_heads(team, stack.head_dim, step, index, qkv, layer.qkv.num_out, attended, stack.attended_stride);
    team.barrier();
    linear(panels_of(layer.o), rows, layer.o, attended, stack.attended_stride, delta, stack.hidden_size);
    meet(layer.gate_up);
    norm(layer.post_norm, true);
    team.barrier();
    feed_forward(layer);
    if (next)
      meet(*next);
    else
      team.barrier();
  }
};

// Layers [lo, hi) of a step; `ids` become hidden states before the first, and all is added up after the last. False:
// an id or a position that there is not, and nothing was computed.
template <typename T>
bool run_layers(const Stack& stack, const Step& step, int64_t lo, int64_t hi, const int64_t* ids,
                const int64_t* positions, T* hidden) {
  for (int64_t t = 0; t < step.num_tokens; t++)
    if (ids[t] < 0 || ids[t] >= stack.vocab_size || positions[t] < 0 || positions[t] >= stack.num_positions)
      return false;
  Crew crew;
#pragma omp parallel num_threads(step.num_threads) if (step.num_threads > 1)
  {
    StackRun<T> run{stack, step, ids, positions, hidden, Team(crew)};
    if (lo == 0) run.embed();
    for (int64_t index = lo; index < hi; index++)
      run.layer(index, index + 1 < hi ? &stack.layers[index + 1].qkv : nullptr);
    if (hi == stack.num_layers) run.add_delta();
  }
  return true;
}

}  // namespace celeriac
