// AMX tiles in software, bit for bit as documented: what the self-check compares with, and what runs where there are none.
//
// TDPBF16PS (Intel SDM volume 2, "TDPBF16PS", Operation): for each row and output the products of the first halves of all
// pairs are one chain of fused multiply-adds from +0, those of the second halves another; then both are added, and their
// sum to the tile. Each rounds to nearest even, takes denormals as zeros and gives none (DAZ = FTZ = 1), and neither
// reads MXCSR nor raises anything. Here MXCSR says the same to ordinary FMA instructions for the while. Of a NaN only
// that it is one is equal. What the CPU would refuse (#UD, #GP) ends the process: only a bug asks for it.
#pragma once

#include <cstring>

#include "amx.h"

#if defined(CELERIAC_HAS_TILES)

#include <xmmintrin.h>

namespace celeriac {

struct EmulatedTiles {
  static constexpr int kTiles = 8, kPairs = kTileBytes / 4;

  struct State {
    alignas(64) uint8_t tiles[kTiles][kTileRows][kTileBytes] = {};
    TileConfig config = none();

    static TileConfig none() {
      TileConfig config;
      config.palette = 0;
      return config;
    }
  };

  // Of this thread, as the registers are.
  static State& state() {
    thread_local State state;
    return state;
  }

  static void check(bool is_allowed) {
    if (!is_allowed) __builtin_trap();
  }

  static void configure(const TileConfig& config) {
    check(config.palette == 1);
    for (int i = 0; i < 14; i++) check(config.reserved[i] == 0);
    for (int i = 0; i < 16; i++) {
      check(config.rows[i] <= kTileRows && config.row_bytes[i] <= kTileBytes);
      check((config.rows[i] == 0) == (config.row_bytes[i] == 0) && (i < kTiles || config.rows[i] == 0));
    }
    State& now = state();
    now.config = config;
    std::memset(now.tiles, 0, sizeof now.tiles);
  }

  static void release() { state().config = State::none(); }

  static void check_tile(int tile) {
    const TileConfig& config = state().config;
    check(config.palette == 1 && config.rows[tile] > 0);
  }

  template <int Tile>
  static void zero() {
    check_tile(Tile);
    std::memset(state().tiles[Tile], 0, sizeof state().tiles[Tile]);
  }

  template <int Tile>
  static void load(const void* from, int64_t stride) {
    zero<Tile>();
    State& now = state();
    for (int r = 0; r < now.config.rows[Tile]; r++)
      std::memcpy(now.tiles[Tile][r], static_cast<const char*>(from) + r * stride, now.config.row_bytes[Tile]);
  }

  template <int Tile>
  static void store(void* to, int64_t stride) {
    check_tile(Tile);
    const State& now = state();
    for (int r = 0; r < now.config.rows[Tile]; r++)
      std::memcpy(static_cast<char*>(to) + r * stride, now.tiles[Tile][r], now.config.row_bytes[Tile]);
  }

  template <int Sums, int X, int W>
  static void multiply() {
    check_tile(Sums), check_tile(X), check_tile(W);
    State& now = state();
    const TileConfig& config = now.config;
    check(config.rows[Sums] == config.rows[X] && config.row_bytes[Sums] == config.row_bytes[W]);
    check(config.row_bytes[X] == 4 * config.rows[W]);
    constexpr unsigned kAsDocumented = 0x1f80 | 0x8000 | 0x0040;  // all exceptions masked, FTZ, DAZ, to nearest even
    const unsigned before = _mm_getcsr();
    _mm_setcsr(kAsDocumented);
    for (int m = 0; m < config.rows[Sums]; m++)
      add_products(config.rows[W], now.tiles[X][m], &now.tiles[W][0][0], now.tiles[Sums][m]);
    _mm_setcsr(before);
  }

 private:
  // One row. Not inlined, and it works on memory only: so no operation leaves the span in which MXCSR is set.
  [[gnu::noinline]] static void add_products(int num_pairs, const uint8_t* x, const uint8_t* w, uint8_t* sums) {
    uint32_t pairs[kPairs];
    float first[kPairs] = {}, second[kPairs] = {}, total[kPairs];
    std::memcpy(total, sums, sizeof total);
    for (int k = 0; k < num_pairs; k++) {
      uint32_t pair;
      std::memcpy(&pair, x + 4 * k, sizeof pair);
      std::memcpy(pairs, w + kTileBytes * k, sizeof pairs);
      for (int n = 0; n < kPairs; n++) {
        first[n] = __builtin_fmaf(low(pair), low(pairs[n]), first[n]);
        second[n] = __builtin_fmaf(high(pair), high(pairs[n]), second[n]);
      }
    }
    for (int n = 0; n < kPairs; n++) total[n] = total[n] + (first[n] + second[n]);
    std::memcpy(sums, total, sizeof total);
  }

  static float low(uint32_t pair) { return as_float(pair << 16); }

  static float high(uint32_t pair) { return as_float(pair & 0xffff0000u); }

  static float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

}  // namespace celeriac

#endif
