// What a token weighs in a random choice: e^((logit - most) / temperature) as a whole number of units of 2^-43.
//
// Sums of whole numbers are exact, so it means nothing in which order they are added: every CPU, every number of lanes
// and threads, and torch (sampling/choose.py has the same formula, operation by operation) come to the same sums and so
// to the same tokens. That holds while no multiplication and addition become one operation: compile with
// -ffp-contract=off. A token of less than half a unit weighs nothing. 2^19 tokens of the largest weight are no overflow.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace celeriac {

constexpr int kDoubles = kLanes / 2;
typedef double VecD __attribute__((vector_size(8 * kDoubles)));
typedef int64_t VecL __attribute__((vector_size(8 * kDoubles)));
typedef uint64_t VecU64 __attribute__((vector_size(8 * kDoubles)));
typedef float VecHalf __attribute__((vector_size(4 * kDoubles)));

constexpr int kUnitBits = 43;
constexpr double kUnits = static_cast<double>(1LL << kUnitBits);
constexpr double kOctaves = 1.4426950408889634;  // 1 / ln 2

constexpr int64_t bits_of(double power, int64_t j) { return std::bit_cast<int64_t>(kUnits * power) - (j << 48); }

// The bits of kUnits * 2^(j/16), without what power_of adds for j.
alignas(64) inline constexpr int64_t kSixteenths[16] = {
    bits_of(1.0, 0), bits_of(1.0442737824274138, 1), bits_of(1.0905077326652577, 2), bits_of(1.1387886347566916, 3),
    bits_of(1.189207115002721, 4), bits_of(1.241857812073484, 5), bits_of(1.2968395546510096, 6),
    bits_of(1.3542555469368927, 7), bits_of(1.4142135623730951, 8), bits_of(1.4768261459394993, 9),
    bits_of(1.5422108254079407, 10), bits_of(1.6104903319492543, 11), bits_of(1.681792830507429, 12),
    bits_of(1.7562521603732995, 13), bits_of(1.8340080864093424, 14), bits_of(1.9152065613971474, 15)};

inline VecD load_wide(const float* from) {
#if defined(__AVX512F__)
  return (VecD)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#else
  VecHalf v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, VecD);
#endif
}

inline VecD at_least(double least, VecD x) {
#if defined(__AVX512F__)
  return (VecD)_mm512_max_pd((__m512d)x, _mm512_set1_pd(least));
#else
  return x > least ? x : VecD{} + least;
#endif
}

// kUnits * 2^(n/16) for n in the last 16 bits of each lane, as a signed number, the others being of no account.
inline VecD power_of(VecL n) {
#if defined(__AVX512F__)
  const VecL part =
      (VecL)_mm512_permutex2var_epi64(_mm512_load_si512(kSixteenths), (__m512i)n, _mm512_load_si512(kSixteenths + 8));
#else
  VecL part;
  for (int lane = 0; lane < kDoubles; lane++) part[lane] = kSixteenths[n[lane] & 15];
#endif
  return (VecD)((VecU64)part + ((VecU64)n << 48));  // the whole part of n/16 comes to the exponent
}

// To the nearest whole number, of at most 2^51.
inline VecL round_whole(VecD x) {
  return (VecL)(x + 6755399441055744.0) - 0x4338000000000000;  // 1.5 * 2^52: its last bit is worth 1
}

// The weights of tokens that lie so far below the likeliest: `below` <= 0, -inf included. `octaves`: kOctaves by the
// temperature. Exactly kUnits at 0; elsewhere within 6e-12 of the true one, and then rounded.
inline VecL weights_of(VecD below, double octaves) {
  const double magic = 422212465065984.0;  // 1.5 * 2^48: adding it rounds to sixteenths, which are then in the low bits
  const VecD y = at_least(-64.0, below * octaves);
  const VecD shifted = y + magic, f = y - (shifted - magic);
  VecD p = f * 0.009618317140428106 + 0.05550541078374851;  // 2^f for |f| <= 1/32, fitted at Chebyshev's nodes
  p = p * f + 0.24022650691319433;
  p = p * f + 0.6931471804009947;
  p = p * f + 1.0;
  return round_whole(p * power_of((VecL)shifted));
}

inline int64_t weight_of(double below, double octaves) { return weights_of(VecD{} + below, octaves)[0]; }

inline int64_t sum(VecL v) {
  int64_t total = 0;
  for (int i = 0; i < kDoubles; i++) total += v[i];
  return total;
}

// Weighs the tokens of one row. `most`: its largest logit, finite.
struct Weigher {
  double most, octaves;

  Weigher(float most, double coldness) : most(most), octaves(coldness * kOctaves) {}

  VecL operator()(const float* logits) const { return weights_of(load_wide(logits) - most, octaves); }
  int64_t operator()(float logit) const { return weight_of(logit - most, octaves); }
};

}  // namespace celeriac
