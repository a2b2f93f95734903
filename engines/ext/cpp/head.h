// From hidden states to logits in one call: norm, head, and the largest logit of each row.
//
// A pass over the logits would cost as much as some layers' attention. So each thread looks at its outputs while they are
// in registers, and what the threads have found is compared at the end. A random choice asks for the largest logit of
// each panel, too: they tell it where to look (choose.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "any_linear.h"
#include "row_ops.h"

namespace celeriac {

// The last norm and the head. Filled by engines/models/native_head.py, field by field.
struct Head {
  const void* norm;
  Weight weight;
  float eps;
};

// The first of the largest of some logits, and whether any of them is NaN: then `id` means nothing.
struct Peak {
  float most = -INFINITY;
  bool is_nan = false;
  int64_t id = 0;

  void see(float logit, int64_t at) {
    if (logit > most) most = logit, id = at;
    is_nan |= logit != logit;
  }
};

// Watches a thread's part of a linear. A row meets a larger logit some ten times in all, so the others cost a comparison.
class PeakWatch final : public Watch {
 public:
  // `maxima` of all panels, a row behind the other, `stride` apart; or null.
  PeakWatch(Peak* peaks, float* maxima, int64_t stride) : peaks_(peaks), maxima_(maxima), stride_(stride) {}

  void see(int64_t row, int64_t count, int64_t first, int64_t columns, const Vec (*sums)[2]) override {
    for (int64_t r = 0; r < count; r++) {
      Peak& peak = peaks_[row + r];
      const Vec most = splat(peak.most);
      if (any(~((sums[r][0] <= most) & (sums[r][1] <= most))))  // also where there is a NaN
        for (int64_t c = 0; c < columns; c++) peak.see(sums[r][c / kLanes][c % kLanes], first + c);
    }
    if (!maxima_) return;
    for (int64_t r = 0; r < count; r++) {
      float& most = maxima_[(row + r) * stride_ + first / kColumns];
      if (columns == kColumns) {
        most = max(max(sums[r][0], sums[r][1]));
        continue;
      }
      most = -INFINITY;
      for (int64_t c = 0; c < columns; c++) most = std::max(most, sums[r][c / kLanes][c % kLanes]);
    }
  }

 private:
  Peak* peaks_;
  float* maxima_;
  int64_t stride_;
};

// logits[rows, num_out], maxima[rows, panels] or null, its rows `stride` apart. hidden: rows of `num_in` elements side by side.
template <typename T>
void run_head(const Head& head, int64_t rows, T* hidden, float* logits, int64_t* ids, bool* is_nan,
              float* maxima, int64_t stride, int64_t num_threads) {
  const int64_t size = head.weight.num_in, num_out = head.weight.num_out;
  const auto normed = std::make_unique_for_overwrite<T[]>(rows * size);
  const auto peaks = std::make_unique<Peak[]>(rows * num_threads);
  Crew crew;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Team team(crew);
    const Share panels = team.share(num_panels(num_out));
    will_read<T>(team, head.weight, panels);
    for (auto [r, end] = team.share(rows); r < end; r++)
      norm_row<T>(size, hidden + r * size, nullptr, static_cast<const T*>(head.norm), head.eps, &normed[r * size]);
    team.barrier();
    PeakWatch watch(&peaks[team.index * rows], maxima, stride);
    linear(panels, rows, head.weight, normed.get(), size, logits, num_out, &watch);
    team.barrier();
    for (auto [r, end] = team.share(rows); r < end; r++) {
      Peak peak = peaks[r];
      for (int64_t thread = 1; thread < team.size; thread++) {
        const Peak& other = peaks[thread * rows + r];
        peak.is_nan |= other.is_nan;
        if (other.most > peak.most) peak.most = other.most, peak.id = other.id;
      }
      ids[r] = peak.id, is_nan[r] = peak.is_nan;
    }
  }
}

}  // namespace celeriac
