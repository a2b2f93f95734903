// Attention of rows with one query: bound by reading KV, so every key and value is read once for all its query heads.
//
// A row is cut into splits at fixed positions and these are merged in order, so the result depends on the sequence
// alone: not on the batch, not on the number of threads. After Flash-Decoding (Dao et al., 2023).
#pragma once

#include "paged.h"

namespace celeriac {

constexpr int64_t kSplit = 512;  // tokens, also in native_backend.py
constexpr int kTile = 64;        // tokens between two corrections of the running maximum

// Lanes whose sum is q . k.
template <typename T, int D>
struct Dot {
  static Vec of(const T* q, const T* k) {
    Vec acc = {};
    for (int i = 0; i < D; i += kLanes) acc += load(q + i) * load(k + i);
    return acc;
  }
};

#if defined(__AVX512BF16__)
template <int D>
  requires(D % 32 == 0)
struct Dot<bf16, D> {
  static Vec of(const bf16* q, const bf16* k) {
    __m512 acc = _mm512_setzero_ps();
    for (int i = 0; i < D; i += 32)
      acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(q + i), (__m512bh)_mm512_loadu_si512(k + i));
    return (Vec)acc;
  }
};
#endif

// Into the second-level cache: prefetches into the first run out of slots for misses, and were a third slower.
template <typename T, int D>
inline void prefetch(const T* row) {
  for (size_t byte = 0; byte < sizeof(T) * D; byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// acc[h] += weights[h, t] * value t; meanwhile the keys of the next tile come closer. The sums are copied to locals,
// else they would live in memory.
template <typename T, int D, int Heads>
inline void add_values(const T* const* keys, int64_t value_offset, int count, const float (*weights)[kTile],
                       const T* const* next, Vec (*acc)[D / kLanes]) {
  constexpr int kVecs = D / kLanes;
  Vec local[Heads][kVecs];
  for (int h = 0; h < Heads; h++)
    for (int i = 0; i < kVecs; i++) local[h][i] = acc[h][i];
  for (int t = 0; t < count; t++) {
    const T* value = keys[t] + value_offset;
    if (next) prefetch<T, D>(next[t]);
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; i++) {
      const Vec v = load(value + i * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < Heads; h++) local[h][i] += weights[h][t] * v;
    }
  }
  for (int h = 0; h < Heads; h++)
    for (int i = 0; i < kVecs; i++) acc[h][i] = local[h][i];
}

// Keys of the tile that begins at `lo`; the last one again where it is not full, since whole vectors are computed.
template <typename T, int D>
inline void locate_tile(const Pages<T, D>& pages, int64_t lo, int64_t hi, const T** keys) {
  const int count = static_cast<int>(hi - lo < kTile ? hi - lo : kTile);
  pages.locate(lo, lo + count, keys);
  for (int t = count; t < kTile; t++) keys[t] = keys[count - 1];
}

// `Heads` query heads of one KV head over positions [lo, hi). out: per head D sums, the maximum, the normaliser.
template <typename T, int D, int Heads>
void attend_split(const Pages<T, D>& pages, const T* q, int64_t lo, int64_t hi, float scale, float* out,
                  int64_t out_stride) {
  constexpr int kVecs = D / kLanes;
  const T* buffers[2][kTile];  // keys of this tile and of the next
  const T **keys = buffers[0], **next = buffers[1];
  float scores[Heads][kTile];
  float highest[Heads], total[Heads];
  Vec acc[Heads][kVecs] = {};
  for (int h = 0; h < Heads; h++) highest[h] = -INFINITY, total[h] = 0;
  locate_tile(pages, lo, hi, keys);
  for (int t = 0; t < kTile; t++) prefetch<T, D>(keys[t]);
  for (int64_t tile = lo; tile < hi; tile += kTile) {
    const int count = static_cast<int>(hi - tile < kTile ? hi - tile : kTile);
    const bool is_last = tile + kTile >= hi;
    if (!is_last) locate_tile(pages, tile + kTile, hi, next);
    for (int t = 0; t < count; t += kLanes) {
      for (int i = 0; i < kLanes; i++) prefetch<T, D>(keys[t + i] + pages.value_offset);
      for (int h = 0; h < Heads; h++) {
        Vec dots[kLanes];
        for (int i = 0; i < kLanes; i++) dots[i] = Dot<T, D>::of(q + h * D, keys[t + i]);
        sums(dots);
        store(scores[h] + t, dots[0] * scale);
      }
    }
    for (int h = 0; h < Heads; h++) {
      for (int t = count; t < kTile; t++) scores[h][t] = -INFINITY;
      Vec most = load(scores[h]);
      for (int t = kLanes; t < kTile; t += kLanes) most = max(most, load(scores[h] + t));
      const float before = highest[h], now = max(most);
      highest[h] = now > before ? now : before;
      Vec added = {};
      for (int t = 0; t < kTile; t += kLanes) {
        Vec s = load(scores[h] + t);
        Vec p = s == -INFINITY ? Vec{} : exp(s - highest[h]);
        added += p;
        store(scores[h] + t, p);
      }
      const float kept = before == -INFINITY ? 0.0f : exp(splat(before - highest[h]))[0];
      total[h] = total[h] * kept + sum(added);
      for (int i = 0; i < kVecs; i++) acc[h][i] *= kept;
    }
    add_values<T, D, Heads>(keys, pages.value_offset, count, scores, is_last ? nullptr : next, acc);
    std::swap(keys, next);
  }
  for (int h = 0; h < Heads; h++) {
    for (int i = 0; i < kVecs; i++) store(out + h * out_stride + i * kLanes, acc[h][i]);
    out[h * out_stride + D] = highest[h];
    out[h * out_stride + D + 1] = total[h];
  }
}

template <typename T, int D>
void attend_decode_task(const Step& step, int64_t layer, const T* q, int64_t q_stride, int64_t row, int64_t split,
                        int64_t kv_head) {
  const int64_t group = step.num_heads / step.num_kv_heads, width = D + 2;
  const int64_t lo = split * kSplit, context = step.starts[row] + 1;
  const int64_t hi = lo + kSplit < context ? lo + kSplit : context;
  const Pages<T, D> pages(step, row, layer, kv_head);
  const T* query = q + step.token_at[row] * q_stride + kv_head * group * D;
  float* out = step.partials + ((step.partial_at[row] + split) * step.num_heads + kv_head * group) * width;
  for (int64_t h = 0; h < group;) {
    const int64_t left = group - h;
    const T* from = query + h * D;
    float* to = out + h * width;
    if (left >= 4) attend_split<T, D, 4>(pages, from, lo, hi, step.scale, to, width), h += 4;
    else if (left == 3) attend_split<T, D, 3>(pages, from, lo, hi, step.scale, to, width), h += 3;
    else if (left == 2) attend_split<T, D, 2>(pages, from, lo, hi, step.scale, to, width), h += 2;
    else attend_split<T, D, 1>(pages, from, lo, hi, step.scale, to, width), h += 1;
  }
}

template <typename T, int D>
void merge_splits(const Step& step, T* out, int64_t row, int64_t head) {
  const int64_t num_splits = (step.starts[row] + kSplit) / kSplit, width = D + 2, next = step.num_heads * width;
  const float* part = step.partials + (step.partial_at[row] * step.num_heads + head) * width;
  float highest = part[D];
  for (int64_t s = 1; s < num_splits; s++) highest = part[s * next + D] > highest ? part[s * next + D] : highest;
  float total = 0;
  Vec acc[D / kLanes] = {};
  for (int64_t s = 0; s < num_splits; s++) {
    const float weight = exp(splat(part[s * next + D] - highest))[0];
    total += weight * part[s * next + D + 1];
    for (int i = 0; i < D / kLanes; i++) acc[i] += weight * load(part + s * next + i * kLanes);
  }
  T* to = out + (step.token_at[row] * step.num_heads + head) * D;
  for (int i = 0; i < D / kLanes; i++) store(to + i * kLanes, acc[i] / total);
}

template <typename T, int D>
void attend_decode(const Step& step, int64_t layer, const T* q, int64_t q_stride, T* out) {
  const int64_t num_tasks = step.num_decode * step.num_kv_heads, num_merges = step.num_merge * step.num_heads;
  const int threads = static_cast<int>(num_tasks < step.num_threads ? num_tasks : step.num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_tasks; task++) {
      const int64_t i = task / step.num_kv_heads;
      attend_decode_task<T, D>(step, layer, q, q_stride, step.decode_row[i], step.decode_split[i],
                               task % step.num_kv_heads);
    }
#pragma omp for
    for (int64_t i = 0; i < num_merges; i++)
      merge_splits<T, D>(step, out, step.merge_row[i / step.num_heads], i % step.num_heads);
  }
}

}  // namespace celeriac
