// What a layer does to each token by itself: norms, SiLU, rotation, storing KV. One pass over memory each.
//
// Everything is computed in fp32 and rounded once, when it is stored.
#pragma once

#include <cmath>

#include "simd.h"

namespace celeriac {

// Waking a thread costs about what this many elements cost.
constexpr int64_t kElementsPerThread = 32768;

inline int threads_for(int64_t elements, int64_t limit) {
  int64_t wanted = 1 + elements / kElementsPerThread;
  return static_cast<int>(wanted < limit ? wanted : limit);
}

// x <- (x + delta) rounded
template <typename T>
inline void add_row(int64_t size, T* x, const T* delta) {
  const int64_t whole = size - size % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(x + i, load(x + i) + load(delta + i));
  for (int64_t i = whole; i < size; i++) store(x + i, to_float(x[i]) + to_float(delta[i]));
}

// x <- (x + delta) rounded, if there is a delta; out <- weight * x / rms(x).
template <typename T>
inline void norm_row(int64_t size, T* x, const T* delta, const T* weight, float eps, T* out) {
  const int64_t whole = size - size % kLanes;
  Vec squares = {};
  float rest = 0;
  for (int64_t i = 0; i < whole; i += kLanes) {
    if (delta) store(x + i, load(x + i) + load(delta + i));
    Vec v = load(x + i);
    squares += v * v;
  }
  for (int64_t i = whole; i < size; i++) {
    if (delta) store(x + i, to_float(x[i]) + to_float(delta[i]));
    rest += to_float(x[i]) * to_float(x[i]);
  }
  const float scale = 1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
  for (int64_t i = whole; i < size; i++) store(out + i, to_float(x[i]) * scale * to_float(weight[i]));
}

// `num_heads` rows of `size` side by side in each of `num_tokens` rows that are `stride` elements apart.
template <typename T>
void norm(int64_t num_tokens, int64_t num_heads, int64_t size, T* x, int64_t x_stride, const T* delta,
          const T* weight, float eps, T* out, int64_t out_stride, int64_t num_threads) {
  const int threads = threads_for(num_tokens * num_heads * size, num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < num_tokens; t++)
    for (int64_t h = 0; h < num_heads; h++)
      norm_row(size, x + t * x_stride + h * size, delta ? delta + t * size : nullptr, weight, eps,
               out + t * out_stride + h * size);
}

// to[i] = silu(gate[i]) * up[i]
template <typename T>
inline void silu_mul_row(int64_t size, const T* gate, const T* up, T* to) {
  const int64_t whole = size - size % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Vec g = load(gate + i);
    store(to + i, g / (1.0f + exp(-g)) * load(up + i));
  }
  for (int64_t i = whole; i < size; i++) {
    float g = to_float(gate[i]);
    store(to + i, g / (1.0f + std::exp(-g)) * to_float(up[i]));
  }
}

template <typename T>
void silu_mul(int64_t num_tokens, int64_t size, const T* gate_up, T* out, int64_t num_threads) {
  const int threads = threads_for(num_tokens * size, num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < num_tokens; t++)
    silu_mul_row(size, gate_up + t * 2 * size, gate_up + (t * 2 + 1) * size, out + t * size);
}

// Turn each head of x in place by the angles of its token; pairs are (i, i + size / 2). cos, sin: [size].
template <typename T>
inline void rotate_token(int64_t num_heads, int64_t size, T* x, const T* cos, const T* sin) {
  const int64_t half = size / 2, whole = half - half % kLanes;
  for (int64_t h = 0; h < num_heads; h++) {
    T *low = x + h * size, *high = low + half;
    for (int64_t i = 0; i < whole; i += kLanes) {
      Vec a = load(low + i), b = load(high + i);
      store(low + i, a * load(cos + i) - b * load(sin + i));
      store(high + i, b * load(cos + half + i) + a * load(sin + half + i));
    }
    for (int64_t i = whole; i < half; i++) {
      float a = to_float(low[i]), b = to_float(high[i]);
      store(low + i, a * to_float(cos[i]) - b * to_float(sin[i]));
      store(high + i, b * to_float(cos[half + i]) + a * to_float(sin[half + i]));
    }
  }
}

template <typename T>
void rotate(int64_t num_tokens, int64_t num_heads, int64_t size, T* x, int64_t x_stride, const T* cos, const T* sin,
            int64_t num_threads) {
  const int threads = threads_for(num_tokens * num_heads * size, num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < num_tokens; t++)
    rotate_token(num_heads, size, x + t * x_stride, cos + t * size, sin + t * size);
}

}  // namespace celeriac
