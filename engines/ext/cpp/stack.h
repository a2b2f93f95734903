// A run of decoder layers in one call: where steps are small, calling the parts one by one costs more than computing.
//
//   norm -> qkv -> (q/k norm) -> rotate, write KV -> attend -> o -> add, norm -> gate_up -> SiLU * up -> down
//
// All threads go through the parts together, with a barrier after each. The parts are those that are also called one
// by one, so the results are the same, bit for bit.
#pragma once

#include "any_linear.h"
#include "attention.h"

namespace celeriac {

// Weights of a layer. Filled by engines/models/native_stack.py, field by field, as is `Stack`.
struct Layer {
  const void *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm, k_norm: null where there are none
  Weight qkv, o, gate_up, down;
};

struct Stack {
  const Layer* layers;
  int64_t hidden_size, head_dim;
  float eps;
  // Room for one step, rows `_stride` elements apart. `delta`: what the last layer adds, not added yet.
  void *normed, *qkv, *attended, *gate_up, *inner, *delta;
  int64_t normed_stride, attended_stride, inner_stride;
};

template <typename T>
struct StackRun {
  const Stack& stack;
  const Step& step;
  T* hidden;        // [num_tokens, hidden_size]
  const T *cos, *sin;  // [num_tokens, head_dim]
  T* normed = static_cast<T*>(stack.normed);
  T* qkv = static_cast<T*>(stack.qkv);
  T* attended = static_cast<T*>(stack.attended);
  T* gate_up = static_cast<T*>(stack.gate_up);
  T* inner = static_cast<T*>(stack.inner);
  T* delta = static_cast<T*>(stack.delta);

  void norm(const void* weight, bool adds) const {
    const int64_t size = stack.hidden_size;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.num_tokens; t++)
      norm_row(size, hidden + t * size, adds ? delta + t * size : nullptr, static_cast<const T*>(weight), stack.eps,
               normed + t * stack.normed_stride);
  }

  // From the products of qkv to what attention reads.
  void place_heads(int64_t index, const Layer& layer) const {
    const int64_t size = stack.head_dim, turned = step.num_heads + step.num_kv_heads;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.num_tokens; t++) {
      T* heads = qkv + t * layer.qkv.num_out;
      if (layer.q_norm)
        for (int64_t h = 0; h < turned; h++)
          norm_row<T>(size, heads + h * size, nullptr,
                      static_cast<const T*>(h < step.num_heads ? layer.q_norm : layer.k_norm), stack.eps,
                      heads + h * size);
      rotate_token(turned, size, heads, cos + t * size, sin + t * size);
      write_kv_token(step, index, size, t, heads + step.num_heads * size, heads + turned * size);
    }
  }

  void silu_mul() const {
    const int64_t size = stack.layers[0].down.num_in;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.num_tokens; t++)
      silu_mul_token(size, gate_up + t * 2 * size, inner + t * stack.inner_stride);
  }

  // Called by all threads of a team.
  void layer(int64_t index) const {
    const Layer& layer = stack.layers[index];
    const int64_t rows = step.num_tokens;
    norm(layer.input_norm, index > 0);
    linear(rows, layer.qkv, normed, stack.normed_stride, qkv, layer.qkv.num_out);
    place_heads(index, layer);
    attend_heads(stack.head_dim, step, index, qkv, layer.qkv.num_out, attended, stack.attended_stride);
    linear(rows, layer.o, attended, stack.attended_stride, delta, stack.hidden_size);
    norm(layer.post_norm, true);
    linear(rows, layer.gate_up, normed, stack.normed_stride, gate_up, layer.gate_up.num_out);
    silu_mul();
    linear(rows, layer.down, inner, stack.inner_stride, delta, stack.hidden_size);
  }
};

// Layers [lo, hi) of a step.
template <typename T>
void run_layers(const Stack& stack, const Step& step, int64_t lo, int64_t hi, T* hidden, const T* cos, const T* sin) {
  const StackRun<T> run{stack, step, hidden, cos, sin};
#pragma omp parallel num_threads(step.num_threads) if (step.num_threads > 1)
  for (int64_t index = lo; index < hi; index++) run.layer(index);
}

}  // namespace celeriac
