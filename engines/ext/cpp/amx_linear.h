// y = x W^T + bias in bfloat16 on tiles: AMX, or its emulation.
//
// A weight lies in the panels of `Plain` (formats.h), whose pairs are what a tile wants, with the depth filled up to whole
// tiles with zeros: sixteen pairs of sixteen outputs are a tile with rows a panel's row apart. A block of rows is one tile
// of x or two, a panel one tile or two, and their products stay in tiles over the whole depth. So every output is one chain
// of additions: pairs of 32 inputs as TDPBF16PS adds them (amx_emulation.h), one such sum after another. It depends on
// the row alone: not on how many rows there are, on which tile it is in, nor on the number of threads.
#pragma once

#include "amx_emulation.h"
#include "linear.h"

namespace celeriac {

#if defined(CELERIAC_HAS_TILES)

constexpr int kTileDepth = kTileBytes / static_cast<int>(sizeof(bf16));
constexpr int kBlockRows = 2 * kTileRows;
constexpr int64_t kPanelRowBytes = kColumns * 4;
static_assert(kColumns == kTileRows || kColumns == 2 * kTileRows);
constexpr bool kIsPanelWide = kColumns == 2 * kTileRows;

// Rows [upper of one tile, the others of a second one] of every block, which is then told apart by its first row only.
struct RowBlocks {
  int64_t size, upper;

  // `rows` in the fewest blocks, as even as can be. The last may begin within the one before: that changes no bit.
  explicit RowBlocks(int64_t rows) {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    size = (rows + blocks - 1) / blocks;
    upper = size > kTileRows ? (size + 1) / 2 : size;
  }

  // Tiles 0..3 are sums, 4 and 5 rows of x, 6 and 7 weights.
  TileConfig config() const {
    TileConfig config;
    const int64_t rows[] = {upper, upper, size - upper, size - upper, upper, size - upper, kTileRows, kTileRows};
    for (int tile = 0; tile < 8; tile++) config.set(tile, rows[tile]);
    return config;
  }
};

// One block of rows and one panel -> sums[block.size][2]. `IsTall`: the block has a second tile.
template <typename Tiles, bool IsTall, bool Streams>
inline void multiply_block(const RowBlocks& block, int64_t num_in, const bf16* x, int64_t x_stride, const char* panel,
                           Vec (*sums)[2]) {
  Tiles::template zero<0>();
  if constexpr (kIsPanelWide) Tiles::template zero<1>();
  if constexpr (IsTall) Tiles::template zero<2>();
  if constexpr (IsTall && kIsPanelWide) Tiles::template zero<3>();
  const auto add_depth = [&](const bf16* from, int64_t stride) {
    constexpr int64_t kBytes = kTileDepth / 2 * kPanelRowBytes;
    if constexpr (Streams)
      for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(panel + kAheadBytes + byte);
    Tiles::template load<6>(panel, kPanelRowBytes);
    Tiles::template load<4>(from, stride * sizeof(bf16));
    Tiles::template multiply<0, 4, 6>();
    if constexpr (IsTall) {
      Tiles::template load<5>(from + block.upper * stride, stride * sizeof(bf16));
      Tiles::template multiply<2, 5, 6>();
    }
    if constexpr (kIsPanelWide) {
      Tiles::template load<7>(panel + kTileBytes, kPanelRowBytes);
      Tiles::template multiply<1, 4, 7>();
      if constexpr (IsTall) Tiles::template multiply<3, 5, 7>();
    }
    panel += kBytes;
  };
  int64_t k = 0;
  for (; k + kTileDepth <= num_in; k += kTileDepth) add_depth(x + k, x_stride);
  if (k < num_in) {
    // A tile would read on into what follows the row: that may be no number, and zeros would not undo it.
    alignas(64) bf16 tail[kBlockRows * kTileDepth] = {};
    for (int64_t r = 0; r < block.size; r++)
      std::memcpy(tail + r * kTileDepth, x + r * x_stride + k, sizeof(bf16) * (num_in - k));
    add_depth(tail, kTileDepth);
  }
  char* upper = reinterpret_cast<char*>(sums);
  char* lower = upper + block.upper * kPanelRowBytes;
  Tiles::template store<0>(upper, kPanelRowBytes);
  if constexpr (kIsPanelWide) Tiles::template store<1>(upper + kTileBytes, kPanelRowBytes);
  if constexpr (IsTall) Tiles::template store<2>(lower, kPanelRowBytes);
  if constexpr (IsTall && kIsPanelWide) Tiles::template store<3>(lower + kTileBytes, kPanelRowBytes);
}

template <typename Tiles, bool Streams>
inline void multiply_block(const RowBlocks& block, int64_t num_in, const bf16* x, int64_t x_stride, const char* panel,
                           Vec (*sums)[2]) {
  if (block.size > block.upper)
    multiply_block<Tiles, true, Streams>(block, num_in, x, x_stride, panel, sums);
  else
    multiply_block<Tiles, false, Streams>(block, num_in, x, x_stride, panel, sums);
}

// Each thread configures its tiles and releases them.
template <typename Tiles, typename Out>
void linear_on_tiles(Share panels, int64_t rows, const Weight& weight, const bf16* x, int64_t x_stride, Out* out,
                     int64_t out_stride, Watch* watch) {
  const int64_t num_in = weight.num_in, num_out = weight.num_out;
  const int64_t panel_bytes = (num_in + kTileDepth - 1) / kTileDepth * (kTileDepth / 2) * kPanelRowBytes;
  const int64_t fitting = kRowTileBytes / (num_in * static_cast<int64_t>(sizeof(bf16))) / kBlockRows * kBlockRows;
  const int64_t most = fitting > kBlockRows ? fitting : kBlockRows;
  const auto* bias = static_cast<const bf16*>(weight.bias);
  alignas(64) Vec sums[kBlockRows][2];
  for (int64_t begin = 0; begin < rows; begin += most) {
    const int64_t held = rows - begin < most ? rows - begin : most;
    const RowBlocks block(held);
    Tiles::configure(block.config());
    for (int64_t p = panels.begin; p < panels.end; p++) {
      const int64_t first = p * kColumns, columns = num_out - first < kColumns ? num_out - first : kColumns;
      const char* panel = static_cast<const char*>(weight.panels) + p * panel_bytes;
      for (int64_t at = 0; at < held; at += block.size) {
        const int64_t row = begin + (at + block.size <= held ? at : held - block.size);
        if (at == 0)
          multiply_block<Tiles, true>(block, num_in, x + row * x_stride, x_stride, panel, sums);
        else
          multiply_block<Tiles, false>(block, num_in, x + row * x_stride, x_stride, panel, sums);
        finish_rows(block.size, sums, bias ? bias + first : nullptr, out + row * out_stride + first, out_stride,
                    columns);
        if (watch) watch->see(row, block.size, first, columns, sums);
      }
    }
  }
  Tiles::release();
}

// All panels, by the calling thread.
template <typename Tiles, typename Out>
void linear_on_tiles(int64_t rows, const Weight& weight, const bf16* x, int64_t x_stride, Out* out,
                     int64_t out_stride) {
  linear_on_tiles<Tiles>({0, num_panels(weight.num_out)}, rows, weight, x, x_stride, out, out_stride, nullptr);
}

#endif

}  // namespace celeriac
