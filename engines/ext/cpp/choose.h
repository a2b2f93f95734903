// The random choice of sampling/choose.py, a row at a time: top_k, top_p and min_p, then the inverse of the cumulative
// distribution over tokens ordered by (logit, id).
//
// Nearly always a few of the likeliest decide. They are found by the maxima of groups of logits: whatever reaches the
// n-th largest of those is a candidate, so there are at least n, and no token behind them equals one of them. What
// depends on the weight of the whole row is decided with bounds of a sum in fp32; where the two differ, a sum in double
// decides, and where the candidates do not reach, the whole row (choose_whole.h). All ways give the same token, and
// each row is decided by itself: neither the batch nor the number of threads changes it.
#pragma once

#include "choose_whole.h"

namespace celeriac {

struct Filters {
  double coldness, top_p, min_p, uniform;  // coldness: 1 / temperature
  int64_t top_k;  // the size of the vocabulary: off

  bool is_off(int64_t size) const { return top_k >= size && top_p >= 1.0 && min_p <= 0.0; }
  bool needs_total(int64_t size) const { return top_k >= size && (top_p < 1.0 || min_p <= 0.0); }
};

class RowChooser {
 public:
  // The chosen id. `row` holds no NaN.
  int64_t choose(const float* row, int64_t size, const Filters& filters) {
    row_ = row, size_ = size;
    find_maxima();
    if (!std::isfinite(most_)) return std::find(row, row + size, most_) - row;
    double low = 0, high = 0;
    if (filters.needs_total(size)) {
      const double about = rough_total(filters.coldness);
      low = about * (1 - kSlack), high = about * (1 + kSlack);
    }
    for (const int64_t wanted : {filters.top_k <= kMany ? filters.top_k : kFew, kMany}) {
      if (!collect(wanted)) break;
      weigh_candidates(filters.coldness);
      int64_t place = decide(filters, low);
      if (place >= 0 && high > low && place != decide(filters, high)) {
        low = high = exact_total(filters.coldness);
        place = decide(filters, low);
      }
      if (place >= 0) return id_of(candidates_[place]);
      if (held_ * kMuch < low) break;  // so flat that a few more would not do
    }
    return choose_from_all(filters);
  }

  // The `num_top` likeliest ids and the logarithms of their probabilities, then that of `id`, before any filter.
  void score(const float* row, int64_t size, int64_t num_top, int64_t id, int64_t* ids, float* logprobs) {
    row_ = row, size_ = size;
    find_maxima();
    const double norm = std::isfinite(most_) ? most_ + std::log(fine_total()) : NAN;
    if (num_top && !collect(num_top)) collect_all();
    std::partial_sort(candidates_.begin(), candidates_.begin() + num_top, candidates_.end());
    for (int64_t k = 0; k < num_top; k++) {
      ids[k] = id_of(candidates_[k]);
      logprobs[k] = static_cast<float>(row[ids[k]] - norm);
    }
    logprobs[num_top] = static_cast<float>(row[id] - norm);
  }

 private:
  static constexpr int64_t kGroups = 640;          // about so many maxima
  static constexpr int64_t kFew = 32, kMany = 224;
  static constexpr double kMuch = 4;
  static constexpr size_t kMostCandidates = 2048;  // with more, looking at the whole row costs less
  // Of rough_total: its polynomial, an argument in fp32 (2e-5), at most 2^9 additions of fp32 in a row (3e-5).
  static constexpr double kSlack = 2e-4;

  // Maxima of groups: lane by lane over runs of vectors.
  void find_maxima() {
    run_ = std::min<int64_t>(std::max<int64_t>(size_ / kGroups, 4), 512) * kLanes;
    maxima_.clear();
    most_ = -INFINITY;
    const int64_t whole = size_ - size_ % kLanes;
    for (int64_t lo = 0; lo < whole; lo += run_) {
      Vec best = load(row_ + lo);
      for (int64_t i = lo + kLanes; i < std::min(lo + run_, whole); i += kLanes) best = max(best, load(row_ + i));
      const size_t at = maxima_.size();
      maxima_.resize(at + kLanes);
      store(&maxima_[at], best);
    }
    maxima_.insert(maxima_.end(), row_ + whole, row_ + size_);
    for (const float each : maxima_) most_ = each > most_ ? each : most_;
  }

  // Within kSlack. 2^f by its Taylor polynomial, whose error for |f| <= 1/2 is below 7e-5.
  double rough_total(double coldness) const {
    const float scale = static_cast<float>(coldness * 1.4426950408889634), magic = 12582912.0f;  // as in simd.h: exp
    const int64_t whole = size_ - size_ % kLanes;
    double total = 0;
    for (int64_t lo = 0; lo < whole; lo += run_) {
      Vec part = {};
      for (int64_t i = lo; i < std::min(lo + run_, whole); i += kLanes) {
        const Vec y = max((load(row_ + i) - most_) * scale, splat(-125.0f));
        const Vec shifted = y + magic, f = y - (shifted - magic);
        Vec p = f * 0.00961812911f + 0.0555041087f;
        p = p * f + 0.240226507f;
        p = p * f + 0.693147181f;
        p = p * f + 1.0f;
        part += (Vec)((VecI)p + ((VecI)shifted << 23));
      }
      total += sum(part);
    }
    for (int64_t i = whole; i < size_; i++) total += std::exp2((row_[i] - most_) * scale);
    return total;
  }

  // At temperature 1, as exact as one exp in fp32.
  double fine_total() const {
    const int64_t whole = size_ - size_ % kLanes;
    constexpr int64_t kRun = 8 * kLanes;
    double total = 0;
    for (int64_t lo = 0; lo < whole; lo += kRun) {
      Vec part = {};
      for (int64_t i = lo; i < std::min(lo + kRun, whole); i += kLanes) part += exp(load(row_ + i) - most_);
      total += sum(part);
    }
    for (int64_t i = whole; i < size_; i++) total += std::exp(row_[i] - most_);
    return total;
  }

  double exact_total(double coldness) const {
    const double most = most_;
    const int64_t whole = size_ - size_ % kDoubles;
    VecD total = {};
    for (int64_t i = 0; i < whole; i += kDoubles) total += exp_down((load_wide(row_ + i) - most) * coldness);
    double rest = 0;
    for (int64_t i = whole; i < size_; i++) rest += exp_down(VecD{} + (row_[i] - most) * coldness)[0];
    return sum(total) + rest;
  }

  // All that reach the `wanted`-th largest maximum, in no order. False: too many, or nothing is gained by it.
  bool collect(size_t wanted) {
    if (wanted >= maxima_.size() / 2) return size_ <= static_cast<int64_t>(kMostCandidates) && collect_all();
    sorted_ = maxima_;
    std::nth_element(sorted_.begin(), sorted_.begin() + wanted - 1, sorted_.end(), std::greater<float>());
    const float least = sorted_[wanted - 1];
    const int64_t whole = size_ - size_ % kLanes;
    candidates_.clear();
    for (int64_t i = 0; i < whole; i += kLanes) {
      if (!any(load(row_ + i) >= least)) continue;
      if (candidates_.size() > kMostCandidates) return false;
      for (int64_t k = i; k < i + kLanes; k++)
        if (row_[k] >= least) candidates_.push_back(ranked(row_[k], k));
    }
    for (int64_t k = whole; k < size_; k++)
      if (row_[k] >= least) candidates_.push_back(ranked(row_[k], k));
    return true;
  }

  bool collect_all() {
    candidates_.clear();
    for (int64_t k = 0; k < size_; k++) candidates_.push_back(ranked(row_[k], k));
    return true;
  }

  void weigh_candidates(double coldness) {
    std::sort(candidates_.begin(), candidates_.end());
    logits_.clear();
    for (const uint64_t each : candidates_) logits_.push_back(row_[id_of(each)]);
    weights_.resize(logits_.size());
    weigh(logits_.data(), static_cast<int64_t>(logits_.size()), most_, coldness, weights_.data());
    held_ = 0;
    for (const double weight : weights_) held_ += weight;
  }

  // The place of the choice among the candidates, were `total` the weight of the row; -1: they do not tell.
  int64_t decide(const Filters& filters, double total) const {
    const int64_t num = static_cast<int64_t>(weights_.size());
    const bool is_all = num == size_, is_off = filters.is_off(size_);
    if (filters.top_k < size_) {
      if (filters.top_k > num) return -1;
      total = 0;
      for (int64_t i = 0; i < filters.top_k; i++) total += weights_[i];
    }
    int64_t num_kept = 1;
    double kept = weights_[0];
    for (; num_kept < std::min(num, filters.top_k); num_kept++) {
      const double weight = weights_[num_kept], with = kept + weight;
      if (filters.top_p < 1.0 && !((with - weight) / total < filters.top_p)) break;
      if (!(weight >= filters.min_p && weight > 0)) break;
      kept = with;
    }
    const bool ends_inside = is_all || num_kept < num || num_kept == filters.top_k;
    if (!is_off && !ends_inside) return -1;
    const double target = filters.uniform * (is_off ? total : kept);
    double mass = 0;
    for (int64_t place = 0; place < num_kept; place++) {
      mass += weights_[place];
      if (mass > target) return place;
    }
    return ends_inside ? num_kept - 1 : -1;
  }

  int64_t choose_from_all(const Filters& filters) {
    whole_.begin(row_, size_, most_, filters.coldness);
    const double total = filters.top_k < size_ ? whole_.mass_of(filters.top_k) : whole_.total();
    int64_t num_kept = std::min(filters.top_k, whole_.num_from(filters.min_p));
    if (filters.top_p < 1.0)
      num_kept = std::min(num_kept, whole_.first([&](double before, double) { return !(before / total < filters.top_p); }));
    num_kept = std::max<int64_t>(num_kept, 1);
    const double target = filters.uniform * (filters.is_off(size_) ? total : whole_.mass_of(num_kept));
    const int64_t place = whole_.first([&](double, double with) { return with > target; });
    return whole_.id_at(std::min(place, num_kept - 1));
  }

  const float* row_ = nullptr;
  int64_t size_ = 0, run_ = kLanes;
  float most_ = 0;
  double held_ = 0;  // the weight of all candidates
  std::vector<float> maxima_, sorted_, logits_;
  std::vector<uint64_t> candidates_;
  std::vector<double> weights_;
  WholeRow whole_;
};

// Rows of `logits` by `row_idx`; `columns`: temperature, top_k (0 is off), top_p, min_p and uniform, `num_rows` of each.
inline void choose_tokens(int64_t num_rows, int64_t size, const float* logits, const int64_t* row_idx,
                          const double* columns, int64_t* ids, int64_t num_threads) {
  const int64_t threads = std::min(num_rows, num_rows * size < (1 << 15) ? 1 : num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t r = 0; r < num_rows; r++) {
    thread_local RowChooser chooser;
    const double top_k = columns[num_rows + r];
    const Filters filters{1.0 / columns[r], columns[2 * num_rows + r], columns[3 * num_rows + r], columns[4 * num_rows + r],
                          top_k > 0 && top_k < size ? static_cast<int64_t>(top_k) : size};
    ids[r] = chooser.choose(logits + row_idx[r] * size, size, filters);
  }
}

// `ids` [num_rows, num_top], `logprobs` [num_rows, num_top + 1]: the last is that of `chosen`.
inline void score_tokens(int64_t num_rows, int64_t size, const float* logits, const int64_t* row_idx,
                         const int64_t* chosen, int64_t num_top, int64_t* ids, float* logprobs, int64_t num_threads) {
  const int64_t threads = std::min(num_rows, num_rows * size < (1 << 15) ? 1 : num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t r = 0; r < num_rows; r++) {
    thread_local RowChooser chooser;
    chooser.score(logits + row_idx[r] * size, size, num_top, chosen[r], ids + r * num_top, logprobs + r * (num_top + 1));
  }
}

}  // namespace celeriac
