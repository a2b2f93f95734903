// y = x W^T + bias for any number of rows, with W packed once.
//
//   W [out, in] lies in panels of kColumns outputs: [in / pair][kColumns][pair]. A pair is two neighbours along the
//   depth for bfloat16, which is what one instruction multiplies, and one element for float. Missing outputs are zeros.
//
// Every output is one chain of additions over the whole depth, in order, in one fp32 accumulator. So a row's result
// depends on the row alone: not on how many rows there are, nor on the number of threads, which share the outputs.
// With few rows the panels stream from memory; with many, a tile of rows and a panel stay in the second-level cache.
#pragma once

#include "simd.h"

namespace celeriac {

constexpr int kColumns = 2 * kLanes;
constexpr int kRows = kVectorRegisters == 32 ? 12 : 4;  // accumulators: kRows * 2 registers
constexpr int64_t kRowTileBytes = 384 * 1024;           // of the second-level cache for a tile of x
constexpr int64_t kAheadBytes = 2048;                   // prefetched: 1 to 4 KiB ahead were equal, 8 KiB slower

// One packed weight. engines/linear/native_linear.py fills it, field by field.
struct Weight {
  const void* panels;
  const void* bias;  // [out] in the model's dtype, or null
  int64_t num_in, num_out;
};

template <typename T>
struct Pairs;

template <>
struct Pairs<float> {
  using Element = float;
  using Spread = Vec;
  static constexpr int kPair = 1;
  static float pack(const float* w) { return *w; }
  static Spread spread(const float* x) { return splat(*x); }
  static void add(Vec& acc, Spread x, Vec w) { acc += x * w; }
};

template <>
struct Pairs<bf16> {
  using Element = uint32_t;
  static constexpr int kPair = 2;
  static uint32_t pack(const bf16* pair) {
    uint32_t both;
    std::memcpy(&both, pair, sizeof both);
    return both;
  }
#if defined(__AVX512BF16__)
  using Spread = __m512bh;
  static Spread spread(const bf16* x) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(pack(x))); }
  static void add(Vec& acc, Spread x, Vec w) { acc = (Vec)_mm512_dpbf16_ps((__m512)acc, x, (__m512bh)w); }
#else
  struct Spread {
    Vec low, high;
  };
  static Spread spread(const bf16* x) { return {splat(to_float(x[0])), splat(to_float(x[1]))}; }
  static void add(Vec& acc, Spread x, Vec w) {
    acc += x.low * (Vec)((VecU)w << 16);
    acc += x.high * (Vec)((VecU)w & 0xffff0000u);
  }
#endif
};

inline int64_t num_panels(int64_t num_out) { return (num_out + kColumns - 1) / kColumns; }

// Elements of a panel: `num_in` is even for pairs (the caller pads).
template <typename T>
inline int64_t panel_size(int64_t num_in) {
  return num_in / Pairs<T>::kPair * kColumns;
}

// weight [num_out, num_in] -> panels
template <typename T>
void pack_weight(const T* weight, int64_t num_in, int64_t num_out, typename Pairs<T>::Element* panels,
                 int64_t num_threads) {
  constexpr int kPair = Pairs<T>::kPair;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t p = 0; p < num_panels(num_out); p++) {
    auto* to = panels + p * panel_size<T>(num_in);
    for (int64_t k = 0; k < num_in / kPair; k++)
      for (int c = 0; c < kColumns; c++) {
        const int64_t out = p * kColumns + c;
        *to++ = out < num_out ? Pairs<T>::pack(weight + out * num_in + k * kPair) : 0;
      }
  }
}

// `Rows` rows of one panel. `Streams`: the panel comes from memory.
template <typename T, typename Out, int Rows, bool Streams>
inline void multiply_panel(int64_t num_in, const T* x, int64_t x_stride, const typename Pairs<T>::Element* panel,
                           const T* bias, Out* out, int64_t out_stride, int64_t columns) {
  using P = Pairs<T>;
  Vec acc[Rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) acc[r][0] = acc[r][1] = Vec{};
  for (int64_t k = 0; k < num_in; k += P::kPair, panel += kColumns) {
    if constexpr (Streams)
      for (int byte = 0; byte < 8 * kLanes; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(panel) + kAheadBytes + byte);
    const Vec low = load_words(panel), high = load_words(panel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      const auto spread = P::spread(x + r * x_stride + k);
      P::add(acc[r][0], spread, low);
      P::add(acc[r][1], spread, high);
    }
  }
  if (columns < kColumns || bias) {
    T padded[kColumns] = {};
    if (bias) std::memcpy(padded, bias, sizeof(T) * columns);
    Out made[kColumns];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      store(made, bias ? acc[r][0] + load(padded) : acc[r][0]);
      store(made + kLanes, bias ? acc[r][1] + load(padded + kLanes) : acc[r][1]);
      std::memcpy(out + r * out_stride, made, sizeof(Out) * columns);
    }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
    store(out + r * out_stride, acc[r][0]);
    store(out + r * out_stride + kLanes, acc[r][1]);
  }
}

template <typename T, typename Out, bool Streams, int Rows = kRows>
inline void multiply_rows(int64_t rows, int64_t num_in, const T* x, int64_t x_stride,
                          const typename Pairs<T>::Element* panel, const T* bias, Out* out, int64_t out_stride,
                          int64_t columns) {
  if (rows == Rows)
    multiply_panel<T, Out, Rows, Streams>(num_in, x, x_stride, panel, bias, out, out_stride, columns);
  else if constexpr (Rows > 1)
    multiply_rows<T, Out, Streams, Rows - 1>(rows, num_in, x, x_stride, panel, bias, out, out_stride, columns);
}

// out[rows, num_out] = x[rows, num_in] W^T + bias. Called by all threads of a team; ends with their barrier.
template <typename T, typename Out>
void linear(int64_t rows, const Weight& weight, const T* x, int64_t x_stride, Out* out, int64_t out_stride) {
  const int64_t num_in = weight.num_in, num_out = weight.num_out;
  const int64_t fitting = kRowTileBytes / (num_in * static_cast<int64_t>(sizeof(T))) / kRows * kRows;
  const int64_t tile = fitting > kRows ? fitting : kRows;
  const auto* panels = static_cast<const typename Pairs<T>::Element*>(weight.panels);
  const auto* bias = static_cast<const T*>(weight.bias);
  for (int64_t begin = 0; begin < rows; begin += tile) {
    const int64_t held = rows - begin < tile ? rows - begin : tile, blocks = (held + kRows - 1) / kRows;
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < num_panels(num_out); p++) {
      const int64_t first = p * kColumns, columns = num_out - first < kColumns ? num_out - first : kColumns;
      const auto* panel = panels + p * panel_size<T>(num_in);
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t row = begin + held * b / blocks, count = begin + held * (b + 1) / blocks - row;
        const T* from = x + row * x_stride;
        Out* to = out + row * out_stride + first;
        if (b == 0)
          multiply_rows<T, Out, true>(count, num_in, from, x_stride, panel, bias ? bias + first : nullptr, to,
                                      out_stride, columns);
        else
          multiply_rows<T, Out, false>(count, num_in, from, x_stride, panel, bias ? bias + first : nullptr, to,
                                       out_stride, columns);
      }
    }
  }
#pragma omp barrier
}

}  // namespace celeriac
