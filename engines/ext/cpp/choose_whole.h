// Places in the order of a whole row, likeliest first, without sorting it: bins by logit, and only the bin in which a
// place lies is sorted.
#pragma once

#include <algorithm>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "simd_double.h"

namespace celeriac {

// Likeliest first, equal ones by id: the order of these numbers.
inline uint64_t ranked(float logit, int64_t id) {
  uint32_t bits;
  logit += 0.0f;  // -0 equals 0
  std::memcpy(&bits, &logit, 4);
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

inline int64_t id_of(uint64_t ranked) { return static_cast<uint32_t>(ranked); }

// weights[i] = e^((row[i] - most) * coldness), as in choose.py.
inline void weigh(const float* row, int64_t size, float most, double coldness, double* weights) {
  const int64_t whole = size - size % kDoubles;
  for (int64_t i = 0; i < whole; i += kDoubles) {
    const VecD w = exp_down((load_wide(row + i) - static_cast<double>(most)) * coldness);
    std::memcpy(weights + i, &w, sizeof w);
  }
  for (int64_t i = whole; i < size; i++) weights[i] = exp_down(VecD{} + (static_cast<double>(row[i]) - most) * coldness)[0];
}

class WholeRow {
 public:
  // `row` is kept; `most` is its largest, finite.
  void begin(const float* row, int64_t size, float most, double coldness) {
    row_ = row, size_ = size, opened_ = -1;
    weights_.resize(size + kDoubles), bin_of_.resize(size + kLanes);
    weigh(row, size, most, coldness, weights_.data());
    // What lies further below has no weight to speak of: one bin is enough for it.
    const float span = std::min<double>(most - least_finite(most), kSpan / coldness);
    const float scale = (kBins - 1) / span;
    const int64_t whole = size - size % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec place = (most - load(row + i)) * scale;
      const VecI bin = __builtin_convertvector(place < kBins - 1 ? place : splat(kBins - 1), VecI);
      std::memcpy(&bin_of_[i], &bin, sizeof bin);
    }
    for (int64_t i = whole; i < size; i++) {
      const float place = (most - row[i]) * scale;
      bin_of_[i] = place < kBins - 1 ? static_cast<int>(place) : kBins - 1;  // NaN, too: all finite ones are equal
    }
    count_.assign(kBins + 1, 0), mass_.assign(kBins + 1, 0.0);
    for (int64_t i = 0; i < size; i++) count_[bin_of_[i] + 1]++, mass_[bin_of_[i] + 1] += weights_[i];
    for (int b = 0; b < kBins; b++) count_[b + 1] += count_[b], mass_[b + 1] += mass_[b];
  }

  double total() const { return mass_[kBins]; }

  // How many weigh at least `least`, and anything at all.
  int64_t num_from(double least) const {
    const int64_t whole = size_ - size_ % kDoubles;
    VecL counts = {};
    for (int64_t i = 0; i < whole; i += kDoubles) {
      VecD weight;
      std::memcpy(&weight, &weights_[i], sizeof weight);
      counts -= (weight >= least) & (weight > 0.0);  // true is -1
    }
    int64_t count = 0;
    for (int lane = 0; lane < kDoubles; lane++) count += counts[lane];
    for (int64_t i = whole; i < size_; i++) count += weights_[i] >= least && weights_[i] > 0;
    return count;
  }

  // Of the first `rank` together.
  double mass_of(int64_t rank) {
    const int bin = bin_at(rank - 1);
    open(bin);
    double mass = mass_[bin];
    for (int64_t k = 0; k < rank - count_[bin]; k++) mass += weights_[id_of(members_[k])];
    return mass;
  }

  int64_t id_at(int64_t rank) {
    const int bin = bin_at(rank);
    open(bin);
    return id_of(members_[rank - count_[bin]]);
  }

  // The first place at which `is_end(mass of those before it, mass with it)`; `size` if there is none. Once true it stays
  // true as masses grow, so that whole bins can be passed.
  template <typename End>
  int64_t first(End is_end) {
    for (int b = 0; b < kBins; b++) {
      if (count_[b] == count_[b + 1] || !is_end(mass_[b + 1], mass_[b + 1])) continue;
      open(b);
      double mass = mass_[b];
      for (size_t k = 0; k < members_.size(); k++) {
        const double weight = weights_[id_of(members_[k])], with = mass + weight;
        if (is_end(with - weight, with)) return count_[b] + static_cast<int64_t>(k);
        mass = with;
      }
    }
    return size_;
  }

 private:
  static constexpr int kBins = 2048;
  static constexpr double kSpan = 64.0;

  int bin_at(int64_t rank) const {
    return static_cast<int>(std::upper_bound(count_.begin(), count_.end(), rank) - count_.begin()) - 1;
  }

  float least_finite(float least) const {
    const int64_t whole = size_ - size_ % kLanes;
    Vec low = splat(least);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec v = load(row_ + i);
      low = (v < low) & (v > -INFINITY) ? v : low;
    }
    for (int lane = 0; lane < kLanes; lane++) least = std::min(least, low[lane]);
    for (int64_t i = whole; i < size_; i++) least = row_[i] > -INFINITY ? std::min(least, row_[i]) : least;
    return least;
  }

  void open(int bin) {
    if (bin == opened_) return;
    opened_ = bin;
    members_.clear();
    const int64_t whole = size_ - size_ % kLanes;
    for (int64_t i = 0; i < size_; i += kLanes) {
      VecI bins;
      std::memcpy(&bins, &bin_of_[i], sizeof bins);
      if (i < whole && !any(bins == bin)) continue;
      for (int64_t k = i; k < std::min(i + kLanes, size_); k++)
        if (bin_of_[k] == bin) members_.push_back(ranked(row_[k], k));
    }
    std::sort(members_.begin(), members_.end());
  }

  const float* row_ = nullptr;
  int64_t size_ = 0;
  int opened_ = -1;
  std::vector<double> weights_, mass_;  // mass_[b], count_[b]: of the bins before b
  std::vector<int64_t> count_;
  std::vector<int32_t> bin_of_;
  std::vector<uint64_t> members_;  // of the open bin, in order
};

}  // namespace celeriac
