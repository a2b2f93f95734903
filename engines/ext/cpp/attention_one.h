// One query, some heads of one KV head: the arithmetic of attention_tile.h with nothing packed into memory.
//
// Bound by reading KV, so every key and value is read once for all these heads: keys are transposed and values zipped
// in registers on their way. The order of every sum is that of `attend_keys`.
#pragma once

#include "attention_tile.h"

namespace celeriac {

constexpr int kMostHeads = 8;

// out[h, :] += weights[h, :] * values for `Vecs` vectors of columns. The sums are copied to locals, else they would live
// in memory. `next`: keys to bring closer.
template <typename T, int D, int Heads, int Vecs>
inline void add_values(const T* const* keys, int64_t offset, int count,
                       const typename Multiply<T>::Element (*weights)[kTile / Multiply<T>::kPair],
                       const T* const* next, float* out) {
  using Mul = Multiply<T>;
  Vec local[Heads][Vecs];
  for (int h = 0; h < Heads; h++)
    for (int i = 0; i < Vecs; i++) local[h][i] = load(out + h * D + i * kLanes);
  for (int t = 0; t < count; t += Mul::kPair) {
    Vec spread[Vecs];
    if (next)
      for (int i = 0; i < Mul::kPair; i++) prefetch<T, D>(next[t + i]);
    Mul::template spread_values<Vecs>(keys[t] + offset, keys[t + Mul::kPair - 1] + offset, spread);
#pragma GCC unroll 8
    for (int h = 0; h < Heads; h++)
#pragma GCC unroll 4
      for (int i = 0; i < Vecs; i++) Mul::add(local[h][i], weights[h][t / Mul::kPair], spread[i]);
  }
  for (int h = 0; h < Heads; h++)
    for (int i = 0; i < Vecs; i++) store(out + h * D + i * kLanes, local[h][i]);
}

// scores[h, :kLanes] = q[h] . keys
template <typename T, int D, int Heads>
inline void score_keys(const T* const* keys, const typename Multiply<T>::Element* q, float (*scores)[kTile]) {
  using Mul = Multiply<T>;
  constexpr int kDepth = D / Mul::kPair;
  Vec acc[Heads] = {};
  for (int i = 0; i < kDepth; i += kLanes) {
    Vec words[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; j++) words[j] = Mul::words(keys[j] + i * Mul::kPair);
    transpose(words);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; j++)
#pragma GCC unroll 8
      for (int h = 0; h < Heads; h++) Mul::add(acc[h], q[h * kDepth + i + j], words[j]);
  }
  for (int h = 0; h < Heads; h++) store(scores[h], acc[h]);
}

// As `attend_keys` for the query at position hi - 1, or beyond it: all keys are visible.
template <typename T, int D, int Heads>
void attend_one(const Pages<T, D>& pages, const typename Multiply<T>::Element* q, int64_t lo, int64_t hi, float scale,
                float* out, float* highest, float* total) {
  using Mul = Multiply<T>;
  constexpr int kVecs = D / kLanes, kBlock = Heads > 4 ? 2 : 4;
  const T* buffers[2][kTile];  // keys of this tile and of the next
  const T **keys = buffers[0], **next = buffers[1];
  float scores[Heads][kTile] = {};
  typename Mul::Element weights[Heads][kTile / Mul::kPair];
  std::fill(highest, highest + Heads, -INFINITY);
  std::fill(total, total + Heads, 0.0f);
  std::fill(out, out + Heads * D, 0.0f);
  locate_tile(pages, lo, hi, keys);
  for (int t = 0; t < kTile; t++) prefetch<T, D>(keys[t]);
  for (; lo < hi; lo += kTile) {
    const int count = static_cast<int>(hi - lo < kTile ? hi - lo : kTile);
    const bool is_last = lo + kTile >= hi;
    if (!is_last) locate_tile(pages, lo + kTile, hi, next);
    for (int t = 0; t < count; t += kLanes) {
      for (int i = 0; i < kLanes; i++) prefetch<T, D>(keys[t + i] + pages.value_offset);
      score_keys<T, D, Heads>(keys + t, q, reinterpret_cast<float (*)[kTile]>(&scores[0][t]));
    }
    for (int h = 0; h < Heads; h++) {
      soften<D>(scores[h], count, scale, out + h * D, highest + h, total + h);
      Mul::pack_row(scores[h], weights[h], kTile);
    }
    for (int i = 0; i + kBlock <= kVecs; i += kBlock)
      add_values<T, D, Heads, kBlock>(keys, pages.value_offset + i * kLanes, count, weights,
                                      is_last || i ? nullptr : next, out + i * kLanes);
    if constexpr (kVecs % kBlock)
      add_values<T, D, Heads, kVecs % kBlock>(keys, pages.value_offset + kVecs / kBlock * kBlock * kLanes, count,
                                              weights, is_last || kVecs > kBlock ? nullptr : next,
                                              out + kVecs / kBlock * kBlock * kLanes);
    std::swap(keys, next);
  }
}

// The same for any number of heads up to kMostHeads.
template <typename T, int D, int Heads = kMostHeads>
void attend_some(int64_t heads, const Pages<T, D>& pages, const typename Multiply<T>::Element* q, int64_t lo,
                 int64_t hi, float scale, float* out, float* highest, float* total) {
  if (heads == Heads)
    attend_one<T, D, Heads>(pages, q, lo, hi, scale, out, highest, total);
  else if constexpr (Heads > 1)
    attend_some<T, D, Heads - 1>(heads, pages, q, lo, hi, scale, out, highest, total);
}

}  // namespace celeriac
