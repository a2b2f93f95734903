// The largest logit of each row, in one pass that also looks for NaN.
#pragma once

#include <cmath>

#include "simd.h"

namespace celeriac {

// The first of the largest; `is_nan` where any is NaN, and the id then means nothing.
inline void find_peak(const float* row, int64_t size, int64_t* id, bool* is_nan) {
  const int64_t whole = size - size % kLanes;
  Vec best = splat(-INFINITY);
  VecI best_at = {}, broken = {}, at;
  for (int lane = 0; lane < kLanes; lane++) at[lane] = lane;
  for (int64_t i = 0; i < whole; i += kLanes, at += kLanes) {
    const Vec v = load(row + i);
    const VecI is_larger = v > best;
    broken |= v != v;
    best = is_larger ? v : best;
    best_at = is_larger ? at : best_at;
  }
  float most = -INFINITY;
  int64_t found = 0;
  *is_nan = false;
  for (int lane = 0; lane < kLanes; lane++) {
    if (best[lane] > most || (best[lane] == most && best_at[lane] < found)) most = best[lane], found = best_at[lane];
    *is_nan |= broken[lane] != 0;
  }
  for (int64_t i = whole; i < size; i++) {
    if (row[i] > most) most = row[i], found = i;
    *is_nan |= row[i] != row[i];
  }
  *id = found;
}

inline void find_peaks(int64_t num_rows, int64_t size, const float* logits, int64_t* ids, bool* is_nan,
                       int64_t num_threads) {
  const int64_t threads = num_rows * size < (1 << 18) ? 1 : num_threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < num_rows; r++) find_peak(logits + r * size, size, ids + r, is_nan + r);
}

}  // namespace celeriac
