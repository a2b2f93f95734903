// Vectors of doubles and their exp: for sums over a vocabulary whose error has to stay at the last bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace celeriac {

constexpr int kDoubles = kLanes / 2;
typedef double VecD __attribute__((vector_size(8 * kDoubles)));
typedef int64_t VecL __attribute__((vector_size(8 * kDoubles)));
typedef float VecHalf __attribute__((vector_size(4 * kDoubles)));

inline VecD load_wide(const float* from) {
  VecHalf v;
  std::memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, VecD);
}

// In the order of the lanes.
inline double sum(VecD v) {
  double total = v[0];
  for (int i = 1; i < kDoubles; i++) total += v[i];
  return total;
}

constexpr double kVanishes = -700.0;  // choose.py: VANISHES

// e^x for x <= 0, within 2 ulp; 0 below kVanishes; exp(0) is exactly 1; NaN stays NaN.
inline VecD exp_down(VecD x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, which is then in the low bits
  const VecL vanishes = x < kVanishes;
  x = vanishes ? VecD{} : x;
  const VecD shifted = x * 1.4426950408889634 + magic;
  const VecL n = (VecL)shifted - 0x4338000000000000;
  const VecD whole = shifted - magic;
  const VecD r = x - whole * 6.93147180369123816490e-01 - whole * 1.90821492927058770002e-10;  // ln 2 in two parts
  VecD p = VecD{} + 1.0 / 6227020800.0;  // Taylor: |r| <= ln(2) / 2, so what follows r^13 is below 2^-57
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  return vanishes ? VecD{} : p * (VecD)((n + 1023) << 52);
}

}  // namespace celeriac
