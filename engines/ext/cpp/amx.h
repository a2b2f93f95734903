// The AMX instructions that a linear layer needs: tiles of 16 rows of 64 bytes, and their products of bfloat16 pairs.
//
// Written as assembly, which any assembler since binutils 2.35 knows: no compiler flag or target attribute, so the same
// library builds and loads on every x86-64. Only amx_check.h decides whether they may run. GCC keeps nothing in tiles,
// so between `configure` and `release` they belong to the caller. GCC 12's own _tile_loadconfig tells the compiler of 8 of
// the 64 bytes that it reads, and _tile_loadd of none; here the compiler knows of all.
//
// Intel SDM volume 1 chapter "Programming with Intel AMX", volume 2 "LDTILECFG", "TILELOADD", "TDPBF16PS".
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__FMA__)
#define CELERIAC_HAS_TILES 1  // to compile; every CPU with AMX has FMA
#endif

namespace celeriac {

constexpr int kTileRows = 16, kTileBytes = 64;  // of palette 1

// What LDTILECFG reads. A tile of no rows must have no bytes in a row, either, and then may not be used.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // palette 1 has eight tiles: the other entries stay 0
  uint8_t rows[16] = {};

  void set(int tile, int64_t num_rows) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = num_rows ? kTileBytes : 0;
  }
};
static_assert(sizeof(TileConfig) == 64);

#if defined(CELERIAC_HAS_TILES)

// `amx_emulation.h` has the same functions in software. Addresses need no alignment; strides are in bytes.
struct AmxTiles {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

  static void release() { asm volatile("tilerelease"); }

  template <int Tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
  }

  template <int Tile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
  }

  template <int Tile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
  }

  // sums[m][n] += x[m] . w[n], tiles of fp32, of pairs along the rows, and of pairs along the columns.
  template <int Sums, int X, int W>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(X), "i"(W));
  }
};

#endif

}  // namespace celeriac
