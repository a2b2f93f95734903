// Causal attention of rows with several queries: bound by arithmetic, so tiles of queries meet tiles of packed keys.
//
//   queries of one KV head: row = position * group + head     keys packed [head_dim, 64], values [64, head_dim]
//
// Key tiles begin at multiples of 64 whatever the chunk, so each query adds up in an order of its own: the same for any
// chunking. After FlashAttention-2 (Dao, 2023). bfloat16 is multiplied in pairs where the CPU does so, summed in fp32.
#pragma once

#include <algorithm>
#include <vector>

#include "decode_attention.h"

namespace celeriac {

constexpr int64_t kQueryRows = 96;

// acc[r, :] += a[r, :] * b for MR rows and NV vectors of columns. `Mul` says what an element of a and b is.
template <typename Mul, int MR, int NV>
inline void panel(int depth, const typename Mul::Element* a, int64_t lda, const typename Mul::Element* b, int64_t ldb,
                  float* c, int64_t ldc, bool adds) {
  Vec acc[MR][NV];
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < NV; j++) acc[r][j] = adds ? load(c + r * ldc + j * kLanes) : Vec{};
  for (int k = 0; k < depth; k++)
    for (int r = 0; r < MR; r++)
      for (int j = 0; j < NV; j++) Mul::add(acc[r][j], a[r * lda + k], b + k * ldb + j * kLanes);
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < NV; j++) store(c + r * ldc + j * kLanes, acc[r][j]);
}

template <typename Mul, int NV>
inline void rows_of_panels(int64_t rows, int depth, const typename Mul::Element* a, int64_t lda,
                           const typename Mul::Element* b, int64_t ldb, float* c, int64_t ldc, bool adds) {
  constexpr int kRows = kVectorRegisters == 32 ? 6 : 4;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    panel<Mul, kRows, NV>(depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, adds);
  for (; r < rows; r++) panel<Mul, 1, NV>(depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, adds);
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

// Elements one by one, in fp32.
template <typename T>
struct Multiply {
  using Element = float;
  static constexpr int kPair = 1;
  static void add(Vec& acc, float a, const float* b) { acc += a * load(b); }
  static float pack(T x) { return to_float(x); }
  static void pack_row(const float* p, Element* to, int count) { std::memcpy(to, p, sizeof(float) * count); }
};

#if defined(__AVX512BF16__)
// Two neighbours along the depth at a time.
template <>
struct Multiply<bf16> {
  using Element = uint32_t;
  static constexpr int kPair = 2;
  static void add(Vec& acc, uint32_t a, const uint32_t* b) {
    acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                (__m512bh)_mm512_loadu_si512(b));
  }
  static uint32_t pack(bf16 low, bf16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }
  static void pack_row(const float* p, Element* to, int count) {
    for (int i = 0; i < count; i += kLanes) store(reinterpret_cast<bf16*>(to) + i, load(p + i));
  }
};
#endif

template <typename T, int D>
struct Scratch {
  using Mul = Multiply<T>;
  using Element = typename Mul::Element;
  static constexpr int kDepth = D / Mul::kPair, kKeys = kTile / Mul::kPair;
  std::vector<Element> q, keys, values, weights;
  std::vector<float> scores, out, highest, total;

  explicit Scratch(int64_t rows)
      : q(rows * kDepth), keys(kDepth * kTile), values(kKeys * D), weights(rows * kKeys), scores(rows * kTile),
        out(rows * D), highest(rows), total(rows) {}

  void pack_query(int64_t row, const T* from) {
    for (int i = 0; i < kDepth; i++) {
      if constexpr (Mul::kPair == 1) q[row * kDepth + i] = Mul::pack(from[i]);
      else q[row * kDepth + i] = Mul::pack(from[2 * i], from[2 * i + 1]);
    }
  }

  // Slots beyond `count` hold nothing of this row: zeros, whatever bits are there.
  void pack_tile(const T* const* found, int count, int64_t value_offset) {
    if (count < kTile) {
      std::fill(keys.begin(), keys.end(), Element{});
      std::fill(values.begin(), values.end(), Element{});
    }
    for (int t = 0; t < count; t++)
      for (int i = 0; i < kDepth; i++) {
        if constexpr (Mul::kPair == 1) keys[i * kTile + t] = Mul::pack(found[t][i]);
        else keys[i * kTile + t] = Mul::pack(found[t][2 * i], found[t][2 * i + 1]);
      }
    for (int t = 0; t < count; t += Mul::kPair) {
      const T* low = found[t] + value_offset;
      if constexpr (Mul::kPair == 1) {
        for (int i = 0; i < D; i++) values[t * D + i] = Mul::pack(low[i]);
      } else {
        const T* high = t + 1 < count ? found[t + 1] + value_offset : nullptr;
        for (int i = 0; i < D; i++) values[t / 2 * D + i] = Mul::pack(low[i], high ? high[i] : bf16{0});
      }
    }
  }
};

// One tile of queries of one KV head.
template <typename T, int D>
void attend_query_tile(const Step& step, int64_t layer, const T* q, int64_t q_stride, T* out, int64_t row,
                       int64_t tile, int64_t kv_head, Scratch<T, D>& s) {
  using Mul = Multiply<T>;
  const int64_t group = step.num_heads / step.num_kv_heads;
  const int64_t per_tile = kQueryRows / group > 0 ? kQueryRows / group : 1;
  const int64_t first = tile * per_tile;
  const int64_t count = step.num_new[row] - first < per_tile ? step.num_new[row] - first : per_tile;
  const int64_t rows = count * group, begin = step.starts[row] + first, end = begin + count;
  const int64_t token = step.token_at[row] + first;
  for (int64_t r = 0; r < rows; r++) {
    s.pack_query(r, q + (token + r / group) * q_stride + (kv_head * group + r % group) * D);
    s.highest[r] = -INFINITY;
    s.total[r] = 0;
  }
  std::fill(s.out.begin(), s.out.begin() + rows * D, 0.0f);
  const Pages<T, D> pages(step, row, layer, kv_head);
  const T* found[kTile];
  for (int64_t lo = 0; lo < end; lo += kTile) {
    const int held = static_cast<int>(end - lo < kTile ? end - lo : kTile);
    pages.locate(lo, lo + held, found);
    s.pack_tile(found, held, pages.value_offset);
    const int64_t from = lo > begin ? (lo - begin) * group : 0;  // earlier queries see nothing of this tile
    multiply<Mul, kTile>(rows - from, Scratch<T, D>::kDepth, s.q.data() + from * Scratch<T, D>::kDepth,
                         Scratch<T, D>::kDepth, s.keys.data(), s.scores.data() + from * kTile, false);
    for (int64_t r = from; r < rows; r++) {
      float* scores = s.scores.data() + r * kTile;
      const int64_t visible = begin + r / group - lo + 1;
      for (int64_t t = visible; t < kTile; t++) scores[t] = -INFINITY;
      Vec most = load(scores);
      for (int t = kLanes; t < kTile; t += kLanes) most = max(most, load(scores + t));
      const float before = s.highest[r], now = max(most) * step.scale;
      const float highest = s.highest[r] = now > before ? now : before;
      Vec added = {};
      for (int t = 0; t < kTile; t += kLanes) {
        const Vec score = load(scores + t);
        const Vec p = score == -INFINITY ? Vec{} : exp(score * step.scale - highest);
        added += p;
        store(scores + t, p);
      }
      Mul::pack_row(scores, s.weights.data() + r * Scratch<T, D>::kKeys, kTile);
      const float kept = before == -INFINITY ? 0.0f : exp(splat(before - highest))[0];
      s.total[r] = s.total[r] * kept + sum(added);
      if (kept != 1.0f)
        for (int i = 0; i < D; i += kLanes) store(s.out.data() + r * D + i, load(s.out.data() + r * D + i) * kept);
    }
    multiply<Mul, D>(rows - from, Scratch<T, D>::kKeys, s.weights.data() + from * Scratch<T, D>::kKeys,
                     Scratch<T, D>::kKeys, s.values.data(), s.out.data() + from * D, true);
  }
  for (int64_t r = 0; r < rows; r++) {
    T* to = out + ((token + r / group) * step.num_heads + kv_head * group + r % group) * D;
    for (int i = 0; i < D; i += kLanes) store(to + i, load(s.out.data() + r * D + i) / s.total[r]);
  }
}

template <typename T, int D>
void attend_prefill(const Step& step, int64_t layer, const T* q, int64_t q_stride, T* out) {
  const int64_t num_tasks = step.num_prefill * step.num_kv_heads;
  const int64_t group = step.num_heads / step.num_kv_heads;
  const int threads = static_cast<int>(num_tasks < step.num_threads ? num_tasks : step.num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<T, D> scratch(group > kQueryRows ? group : kQueryRows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = num_tasks - 1; task >= 0; task--) {  // long ones first: the last tiles see the most keys
      const int64_t i = task / step.num_kv_heads;
      attend_query_tile<T, D>(step, layer, q, q_stride, out, step.prefill_row[i], step.prefill_tile[i],
                              task % step.num_kv_heads, scratch);
    }
  }
}

}  // namespace celeriac
