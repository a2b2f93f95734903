// y = x W^T + bias for any number of rows, with W packed once (formats.h).
//
// Every output is one chain of additions over the depth, in order, in one fp32 accumulator; quantised, one chain per
// group of inputs, and their sums times their scales added up in order. So a row's result depends on the row alone: not
// on how many rows there are, nor on the number of threads, which share the outputs. With few rows the panels stream
// from memory; with many, a tile of rows and a panel, unpacked once for all of them, stay in the second-level cache.
#pragma once

#include <memory>

#include "formats.h"
#include "team.h"

namespace celeriac {

constexpr int kRows = kVectorRegisters == 32 ? 12 : 4;  // accumulators: kRows * 2 registers
constexpr int64_t kRowTileBytes = 384 * 1024;           // of the second-level cache for a tile of x

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

// `Rows` rows of one panel, summed into sums[Rows][2]. `Streams`: the panel comes from memory. `unpacked`: where to leave
// the panel in the order of `Plain` for the blocks of rows that follow, or null.
template <typename Format, int Rows, bool Streams>
inline void multiply_panel(int64_t num_in, const typename Format::Type* x, int64_t x_stride, const char* panel,
                           const float* scales, int64_t group, char* unpacked, Vec (*sums)[2]) {
  using P = Pairs<typename Format::Type>;
  constexpr int kStep = Format::kPairs * P::kPair;
  if constexpr (Format::kHasScales)
    for (int r = 0; r < Rows; r++) sums[r][0] = sums[r][1] = Vec{};
  for (int64_t k = 0; k < num_in;) {
    Vec acc[Rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) acc[r][0] = acc[r][1] = Vec{};
    const int64_t end = Format::kHasScales && group < num_in - k ? k + group : num_in;
    for (; k < end; k += kStep, panel += Format::kUnitBytes) {
      if constexpr (Streams)
        for (int byte = 0; byte < Format::kUnitBytes; byte += 64) __builtin_prefetch(panel + kAheadBytes + byte);
      Vec words[Format::kPairs][2];
      Format::load(panel, words);
      // Fewer rows are never followed by others.
      if constexpr (Streams && Format::kHasScales && Rows >= kRows / 2)
        if (unpacked) std::memcpy(unpacked, words, sizeof words), unpacked += sizeof words;
#pragma GCC unroll 2
      for (int pair = 0; pair < Format::kPairs; pair++)
#pragma GCC unroll 16
        for (int r = 0; r < Rows; r++) {
          const auto spread = P::spread(x + r * x_stride + k + pair * P::kPair);
          P::add(acc[r][0], spread, words[pair][0]);
          P::add(acc[r][1], spread, words[pair][1]);
        }
    }
    if constexpr (Format::kHasScales) {
      const Vec low = load(scales), high = load(scales + kLanes);
      scales += kColumns;
#pragma GCC unroll 16
      for (int r = 0; r < Rows; r++) sums[r][0] += acc[r][0] * low, sums[r][1] += acc[r][1] * high;
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; r++) sums[r][0] = acc[r][0], sums[r][1] = acc[r][1];
    }
  }
}

template <typename Format, bool Streams, int Rows = kRows>
inline void multiply_rows(int64_t rows, int64_t num_in, const typename Format::Type* x, int64_t x_stride,
                          const char* panel, const float* scales, int64_t group, char* unpacked, Vec (*sums)[2]) {
  if (rows == Rows)
    multiply_panel<Format, Rows, Streams>(num_in, x, x_stride, panel, scales, group, unpacked, sums);
  else if constexpr (Rows > 1)
    multiply_rows<Format, Streams, Rows - 1>(rows, num_in, x, x_stride, panel, scales, group, unpacked, sums);
}

// Sums of a panel -> out, with the bias added and rounded once.
template <typename T, typename Out>
inline void finish_rows(int64_t rows, Vec (*sums)[2], const T* bias, Out* out, int64_t out_stride, int64_t columns) {
  if (bias) {
    T padded[kColumns] = {};
    std::memcpy(padded, bias, sizeof(T) * columns);
    const Vec low = load(padded), high = load(padded + kLanes);
    for (int64_t r = 0; r < rows; r++) sums[r][0] += low, sums[r][1] += high;
  }
  for (int64_t r = 0; r < rows; r++, out += out_stride) {
    if (columns == kColumns) {
      store(out, sums[r][0]), store(out + kLanes, sums[r][1]);
      continue;
    }
    Out made[kColumns];
    store(made, sums[r][0]), store(made + kLanes, sums[r][1]);
    std::memcpy(out, made, sizeof(Out) * columns);
  }
}

// Room of a thread for one unpacked panel.
inline char* panel_room(int64_t num_bytes) {
  thread_local std::unique_ptr<char[]> room;
  thread_local int64_t size = 0;
  if (num_bytes > size) room.reset(new char[num_bytes + 64]), size = num_bytes;
  return room.get() + (-reinterpret_cast<uintptr_t>(room.get()) & 63);
}

// Looks at the sums of a panel as soon as they are final: rows [row, row + count), outputs [first, first + columns).
struct Watch {
  virtual void see(int64_t row, int64_t count, int64_t first, int64_t columns, const Vec (*sums)[2]) = 0;

 protected:
  ~Watch() = default;
};

template <typename Format, typename Out>
void linear_as(Share panels, int64_t rows, const Weight& weight, const typename Format::Type* x, int64_t x_stride,
               Out* out, int64_t out_stride, Watch* watch) {
  using T = typename Format::Type;
  using Held = std::conditional_t<Format::kHasScales, Unpacked<T>, Plain<T>>;
  const int64_t num_in = weight.num_in, num_out = weight.num_out, group = weight.group;
  const int64_t panel_bytes = num_in / (Format::kPairs * Pairs<T>::kPair) * Format::kUnitBytes;
  const int64_t num_scales = Format::kHasScales ? (num_in + group - 1) / group * kColumns : 0;
  const int64_t fitting = kRowTileBytes / (num_in * static_cast<int64_t>(sizeof(T))) / kRows * kRows;
  const int64_t tile = fitting > kRows ? fitting : kRows;
  const auto* bias = static_cast<const T*>(weight.bias);
  Vec sums[kRows][2];
  for (int64_t begin = 0; begin < rows; begin += tile) {
    const int64_t held = rows - begin < tile ? rows - begin : tile, blocks = (held + kRows - 1) / kRows;
    for (int64_t p = panels.begin; p < panels.end; p++) {
      const int64_t first = p * kColumns, columns = num_out - first < kColumns ? num_out - first : kColumns;
      const char* panel = static_cast<const char*>(weight.panels) + p * panel_bytes;
      const float* scales = weight.scales + p * num_scales;
      char* unpacked = nullptr;
      if (Format::kHasScales && blocks > 1)
        unpacked = panel_room(panel_size<T>(num_in) * static_cast<int64_t>(sizeof(typename Pairs<T>::Element)));
      const char* held_panel = unpacked ? unpacked : panel;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t row = begin + held * b / blocks, count = begin + held * (b + 1) / blocks - row;
        const T* from = x + row * x_stride;
        if (b == 0)
          multiply_rows<Format, true>(count, num_in, from, x_stride, panel, scales, group, unpacked, sums);
        else
          multiply_rows<Held, false>(count, num_in, from, x_stride, held_panel, scales, group, nullptr, sums);
        finish_rows(count, sums, bias ? bias + first : nullptr, out + row * out_stride + first, out_stride, columns);
        if (watch) watch->see(row, count, first, columns, sums);
      }
    }
  }
}

}  // namespace celeriac
