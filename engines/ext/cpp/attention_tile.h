// The arithmetic of attention: some queries of one KV head against some keys. All orders of addition are fixed here.
//
//   queries: row = position * group + head          keys packed [head_dim, 64], values [64, head_dim]
//
// Key tiles begin at multiples of 64 and splits at multiples of 512, and every sum is one chain in the order of the
// depth or of the keys. So what a query gets depends on its sequence alone: not on how many queries there are, nor on
// the chunk it comes in. After FlashAttention-2 (Dao, 2023) and Flash-Decoding (Dao et al., 2023). bfloat16 is
// multiplied in pairs where the CPU does so, summed in fp32.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "paged.h"

namespace celeriac {

constexpr int64_t kQueryRows = 96;  // also in native_backend.py
constexpr int64_t kSplit = 512;     // tokens, also in native_backend.py
constexpr int kTile = 64;           // tokens between two corrections of the running maximum

// Elements one by one, in fp32.
template <typename T>
struct Multiply {
  using Element = float;
  static constexpr int kPair = 1;
  static void add(Vec& acc, float a, Vec b) { acc += a * b; }
  static float pack(const T* x) { return to_float(*x); }
  static Vec words(const T* x) { return load(x); }
  static void pack_row(const float* p, Element* to, int count) { std::memcpy(to, p, sizeof(float) * count); }
  template <int Vecs>
  static void spread_values(const T* value, const T*, Vec* to) {
    for (int i = 0; i < Vecs; i++) to[i] = load(value + i * kLanes);
  }
};

#if defined(__AVX512BF16__)
// Two neighbours along the depth at a time.
template <>
struct Multiply<bf16> {
  using Element = uint32_t;
  static constexpr int kPair = 2;
  static void add(Vec& acc, uint32_t a, Vec b) {
    acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
  static uint32_t pack(const bf16* x) { return x[0].bits | static_cast<uint32_t>(x[1].bits) << 16; }
  static Vec words(const bf16* x) { return load_words(x); }
  static void pack_row(const float* p, Element* to, int count) {
    for (int i = 0; i < count; i += kLanes) store(reinterpret_cast<bf16*>(to) + i, load(p + i));
  }
  // Columns of two neighbouring values side by side; `second` may be missing.
  template <int Vecs>
  static void spread_values(const bf16* first, const bf16* second, Vec* to) {
    constexpr std::make_integer_sequence<int, 2 * kLanes> lanes;
    for (int i = 0; i + 1 < Vecs; i += 2) {
      const VecS low = (VecS)load_words(first + i * kLanes);
      const VecS high = second ? (VecS)load_words(second + i * kLanes) : VecS{};
      to[i] = (Vec)zip<false>(low, high, lanes);
      to[i + 1] = (Vec)zip<true>(low, high, lanes);
    }
    if constexpr (Vecs % 2)
      for (int lane = 0; lane < kLanes; lane++) {
        const int column = (Vecs - 1) * kLanes + lane;
        reinterpret_cast<VecU*>(to)[Vecs - 1][lane] =
            first[column].bits | (second ? static_cast<uint32_t>(second[column].bits) << 16 : 0);
      }
  }
  template <bool Second, int... I>
  static VecS zip(VecS low, VecS high, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(low, high, ((Second ? kLanes : 0) + I / 2 + I % 2 * 2 * kLanes)...);
  }
};
#endif

// c[r, :] = (adds ? c[r, :] : 0) + a[r, :] * b for MR rows and NV vectors of columns.
template <typename Mul, int MR, int NV>
inline void panel(int depth, const typename Mul::Element* a, int64_t lda, const typename Mul::Element* b, int64_t ldb,
                  float* c, int64_t ldc, bool adds) {
  Vec acc[MR][NV];
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < NV; j++) acc[r][j] = adds ? load(c + r * ldc + j * kLanes) : Vec{};
  for (int k = 0; k < depth; k++)
    for (int r = 0; r < MR; r++)
      for (int j = 0; j < NV; j++) Mul::add(acc[r][j], a[r * lda + k], load_words(b + k * ldb + j * kLanes));
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < NV; j++) store(c + r * ldc + j * kLanes, acc[r][j]);
}

template <typename Mul, int NV, int MR = kVectorRegisters == 32 ? 6 : 4>
inline void rows_of_panels(int64_t rows, int depth, const typename Mul::Element* a, int64_t lda,
                           const typename Mul::Element* b, int64_t ldb, float* c, int64_t ldc, bool adds) {
  int64_t r = 0;
  for (; r + MR <= rows; r += MR) panel<Mul, MR, NV>(depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, adds);
  if constexpr (MR > 1)
    if (r < rows) rows_of_panels<Mul, NV, MR - 1>(rows - r, depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, adds);
}

// c[rows, columns] = (adds ? c : 0) + a[rows, depth] * b[depth, columns]
template <typename Mul, int Columns>
void multiply(int64_t rows, int depth, const typename Mul::Element* a, int64_t lda, const typename Mul::Element* b,
              float* c, bool adds) {
  constexpr int kVecs = kVectorRegisters == 32 ? 4 : 2;
  constexpr int kWide = Columns / (kVecs * kLanes) * (kVecs * kLanes);
  for (int j = 0; j < kWide; j += kVecs * kLanes)
    rows_of_panels<Mul, kVecs>(rows, depth, a, lda, b + j, Columns, c + j, Columns, adds);
  for (int j = kWide; j < Columns; j += kLanes)
    rows_of_panels<Mul, 1>(rows, depth, a, lda, b + j, Columns, c + j, Columns, adds);
}

// Into the second-level cache: prefetches into the first run out of slots for misses, and were a third slower.
template <typename T, int D>
inline void prefetch(const T* row) {
  for (size_t byte = 0; byte < sizeof(T) * D; byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 2);
}

// A thread's room. `out`, `highest` and `total` are what `attend_keys` found for each row.
template <typename T, int D>
struct Scratch {
  using Mul = Multiply<T>;
  using Element = typename Mul::Element;
  static constexpr int kDepth = D / Mul::kPair, kKeys = kTile / Mul::kPair;
  std::vector<Element> q, keys, values, weights;
  std::vector<float> scores, out, highest, total, merged, merged_highest, merged_total;

  explicit Scratch(int64_t rows)
      : q(rows * kDepth), keys(kDepth * kTile), values(kKeys * D), weights(rows * kKeys), scores(rows * kTile),
        out(rows * D), highest(rows), total(rows), merged(rows * D), merged_highest(rows), merged_total(rows) {}

  void pack_query(int64_t row, const T* from) {
    for (int i = 0; i < kDepth; i++) q[row * kDepth + i] = Mul::pack(from + i * Mul::kPair);
  }

  // Slots beyond `count` hold nothing of this row: zeros, whatever bits are there. Meanwhile the keys of the next
  // tile come closer, a few at a time: a burst of prefetches would stop everything behind it.
  void pack_tile(const T* const* found, int count, int64_t value_offset, const T* const* next) {
    constexpr int kWhole = kDepth / kLanes * kLanes;
    for (int t = 0; t < kTile; t += kLanes) {
      for (int i = 0; i < kWhole; i += kLanes) {
        if (next)
          for (int j = i * kLanes / kWhole; j < (i + kLanes) * kLanes / kWhole; j++) prefetch<T, D>(next[t + j]);
        Vec words[kLanes];
        for (int j = 0; j < kLanes; j++) words[j] = t + j < count ? Mul::words(found[t + j] + i * Mul::kPair) : Vec{};
        if (t < count) transpose(words);
        for (int j = 0; j < kLanes; j++) std::memcpy(&keys[(i + j) * kTile + t], &words[j], sizeof(Vec));
      }
      for (int i = kWhole; i < kDepth; i++)
        for (int j = t; j < t + kLanes; j++)
          keys[i * kTile + j] = j < count ? Mul::pack(found[j] + i * Mul::kPair) : Element{};
    }
    for (int t = 0; t < count; t += Mul::kPair) {
      Vec spread[D / kLanes];
      Mul::template spread_values<D / kLanes>(found[t] + value_offset,
                                              t + 1 < count ? found[t + 1] + value_offset : nullptr, spread);
      std::memcpy(&values[t / Mul::kPair * D], spread, sizeof spread);
    }
    const int packed = (count + Mul::kPair - 1) / Mul::kPair;
    std::fill(values.begin() + packed * D, values.end(), Element{});
  }
};

// Scores of a tile, of which `visible` count, to the weights of its values; what was found before is scaled down to the
// new maximum. Not inlined, so that all callers round alike.
template <int D>
__attribute__((noinline)) void soften(float* scores, int64_t visible, float scale, float* out, float* highest,
                                      float* total) {
  for (int64_t t = visible; t < kTile; t++) scores[t] = -INFINITY;
  Vec most = load(scores);
  for (int t = kLanes; t < kTile; t += kLanes) most = max(most, load(scores + t));
  const float before = *highest, now = max(most) * scale, after = now > before ? now : before;
  Vec added = {};
  for (int t = 0; t < kTile; t += kLanes) {
    const Vec score = load(scores + t);
    const Vec p = score == -INFINITY ? Vec{} : exp(score * scale - after);
    added += p;
    store(scores + t, p);
  }
  const float kept = before == -INFINITY ? 0.0f : exp(splat(before - after))[0];
  *highest = after;
  *total = *total * kept + sum(added);
  if (kept != 1.0f)
    for (int i = 0; i < D; i += kLanes) store(out + i, load(out + i) * kept);
}

// Keys of the tile that begins at `lo`; where it is not full, the last one again.
template <typename T, int D>
inline void locate_tile(const Pages<T, D>& pages, int64_t lo, int64_t hi, const T** keys) {
  const int count = static_cast<int>(hi - lo < kTile ? hi - lo : kTile);
  pages.locate(lo, lo + count, keys);
  for (int t = count; t < kTile; t++) keys[t] = keys[count - 1];
}

// Softmax of `rows` packed queries, the first at position `begin`, over keys [lo, hi): not yet divided by `total`.
template <typename T, int D>
void attend_keys(const Pages<T, D>& pages, Scratch<T, D>& s, int64_t rows, int64_t group, int64_t begin, int64_t lo,
                 int64_t hi, float scale) {
  using Mul = Multiply<T>;
  constexpr int kDepth = Scratch<T, D>::kDepth, kKeys = Scratch<T, D>::kKeys;
  std::fill(s.highest.begin(), s.highest.begin() + rows, -INFINITY);
  std::fill(s.total.begin(), s.total.begin() + rows, 0.0f);
  std::fill(s.out.begin(), s.out.begin() + rows * D, 0.0f);
  const T* buffers[2][kTile];  // keys of this tile and of the next
  const T **found = buffers[0], **next = buffers[1];
  locate_tile(pages, lo, hi, found);
  for (int t = 0; t < kTile; t++) prefetch<T, D>(found[t]), prefetch<T, D>(found[t] + pages.value_offset);
  for (; lo < hi; lo += kTile) {
    const int held = static_cast<int>(hi - lo < kTile ? hi - lo : kTile);
    const bool is_last = lo + kTile >= hi;
    if (!is_last) locate_tile(pages, lo + kTile, hi, next);
    s.pack_tile(found, held, pages.value_offset, is_last ? nullptr : next);
    const int64_t from = lo > begin ? (lo - begin) * group : 0;  // earlier queries see nothing of this tile
    multiply<Mul, kTile>(rows - from, kDepth, s.q.data() + from * kDepth, kDepth, s.keys.data(),
                         s.scores.data() + from * kTile, false);
    int ahead = is_last ? kTile : 0;  // whose values come closer
    const int per_row = static_cast<int>((kTile + rows - from - 1) / (rows - from));
    for (int64_t r = from; r < rows; r++) {
      for (const int until = std::min(ahead + per_row, kTile); ahead < until; ahead++)
        prefetch<T, D>(next[ahead] + pages.value_offset);
      float* scores = s.scores.data() + r * kTile;
      soften<D>(scores, begin + r / group - lo + 1, scale, &s.out[r * D], &s.highest[r], &s.total[r]);
      Mul::pack_row(scores, s.weights.data() + r * kKeys, kTile);
    }
    multiply<Mul, D>(rows - from, kKeys, s.weights.data() + from * kKeys, kKeys, s.values.data(),
                     s.out.data() + from * D, true);
    std::swap(found, next);
  }
}

// Fold the next split of a row into those before it. Not inlined, so that all callers round alike.
template <int D>
__attribute__((noinline)) void merge_split(float* out, float* highest, float* total, const float* next_out,
                                           float next_highest, float next_total) {
  const float most = next_highest > *highest ? next_highest : *highest;
  const float kept = exp(splat(*highest - most))[0], added = exp(splat(next_highest - most))[0];
  *highest = most;
  *total = *total * kept + next_total * added;
  for (int i = 0; i < D; i += kLanes) store(out + i, load(out + i) * kept + load(next_out + i) * added);
}

}  // namespace celeriac
