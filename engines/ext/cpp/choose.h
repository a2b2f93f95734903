// The random choice of sampling/choose.py, a row at a time: top_k, top_p and min_p, then the inverse of the cumulative
// distribution over tokens ordered by (logit, id).
//
// Nearly always a few of the likeliest decide. They are found by the maxima of groups of neighbouring logits, which the
// head knows (head.h), or a pass finds: whatever reaches the n-th largest of those is a candidate, so there are at least n,
// and no token behind them equals one of them. Only groups with a candidate in them are looked at. What
// depends on the weight of the whole row is decided with bounds of a sum in fp32; where the two differ, an exact sum
// decides, and where the candidates do not reach, the whole row (choose_whole.h). All ways give the same token, since
// weights are whole numbers (token_weights.h), and each row is decided by itself: neither the batch nor the number of
// threads nor the CPU changes it.
#pragma once

#include <numeric>

#include "choose_whole.h"

namespace celeriac {

struct Filters {
  double coldness, top_p, min_p, uniform;  // coldness: 1 / temperature
  int64_t top_k;  // the size of the vocabulary: off

  bool is_off(int64_t size) const { return top_k >= size && top_p >= 1.0 && min_p <= 0.0; }
  double least_weight() const { return min_p * kUnits; }
  bool needs_total(int64_t size) const { return top_k >= size && (top_p < 1.0 || min_p <= 0.0); }
};

// The largest of each group of neighbouring logits, a row behind the other, `stride` apart; `group` 0: not known.
struct Maxima {
  const float* first = nullptr;
  int64_t stride = 0, group = 0;
};

class RowChooser {
 public:
  // The chosen id. `row` holds no NaN.
  int64_t choose(const float* row, int64_t size, const Filters& filters, const Maxima& maxima) {
    row_ = row, size_ = size;
    maxima.group ? take_maxima(maxima) : find_maxima();
    if (!std::isfinite(most_)) return std::find(row, row + size, most_) - row;
    const Weigher weigher(most_, filters.coldness);
    double low = 0, high = 0;
    Top top;
    if (filters.needs_total(size)) {
      if (looks_flat(filters.coldness)) return choose_from_all(filters, top, 0);
      const double about = rough_total(filters.coldness) * kUnits;
      low = about * (1 - kSlack), high = about * (1 + kSlack);
    }
    for (const int64_t wanted : {filters.top_k <= kMany ? filters.top_k : kFew, kMany}) {
      if (!collect(wanted)) break;
      weigh_candidates(weigher);
      int64_t place = decide(filters, low);
      if (place >= 0 && high > low && place != decide(filters, high)) {
        low = high = exact_total(weigher);
        place = decide(filters, low);
      }
      if (place >= 0) return id_of(candidates_[place]);
      top = {row_[id_of(candidates_.back())], {static_cast<int64_t>(candidates_.size()), held_}};
      if (held_ * kMuch < low) break;  // so flat that a few more would not do
    }
    return choose_from_all(filters, top, low);
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
  static constexpr int64_t kGroup = 4 * kLanes;  // where the row itself is searched for maxima
  static constexpr int64_t kRun = 64 * kLanes;
  static constexpr int64_t kFew = 32, kMany = 224;
  static constexpr double kMuch = 4;
  static constexpr double kFlat = 1024;  // candidates weigh 1 at most, and the first are some fifty
  static constexpr size_t kMostCandidates = 2048;  // with more, looking at the whole row costs less
  // Of rough_total: its power, an argument in fp32 (2e-5), at most 2^6 additions of fp32 in a row (3e-5).
  static constexpr double kSlack = 2e-4;

  void find_maxima() {
    group_ = kGroup;
    const int64_t whole = size_ / kGroup;
    maxima_.resize((size_ + kGroup - 1) / kGroup);
    for (int64_t g = 0; g < whole; g++) {
      const float* from = row_ + g * kGroup;
      maxima_[g] = max(max(max(load(from), load(from + kLanes)), max(load(from + 2 * kLanes), load(from + 3 * kLanes))));
    }
    if (size_ % kGroup) maxima_[whole] = *std::max_element(row_ + whole * kGroup, row_ + size_);
    find_most();
  }

  void take_maxima(const Maxima& maxima) {
    group_ = maxima.group;
    maxima_.resize((size_ + group_ - 1) / group_);
    std::copy_n(maxima.first, maxima_.size(), maxima_.begin());
    find_most();
  }

  void find_most() {
    const int64_t num = static_cast<int64_t>(maxima_.size()), whole = num - num % kLanes;
    Vec most = splat(-INFINITY);
    for (int64_t g = 0; g < whole; g += kLanes) most = max(most, load(&maxima_[g]));
    most_ = max(most);
    for (int64_t g = whole; g < num; g++) most_ = std::max(most_, maxima_[g]);
  }

  // 2^y for y <= 0 by the Taylor polynomial of its fraction, whose error for |f| <= 1/2 is below 7e-5.
  static Vec rough_power(Vec y) {
    const float magic = 12582912.0f;  // as in simd.h: exp
    y = max(y, splat(-125.0f));
    const Vec shifted = y + magic, f = y - (shifted - magic);
    Vec p = f * 0.00961812911f + 0.0555041087f;
    p = p * f + 0.240226507f;
    p = p * f + 0.693147181f;
    p = p * f + 1.0f;
    return (Vec)((VecI)p + ((VecI)shifted << 23));
  }

  // Whether the candidates cannot have weight enough, by some tokens of all parts of the row. A wrong answer costs time.
  bool looks_flat(double coldness) const {
    const float scale = static_cast<float>(coldness * kOctaves);
    const int64_t vectors = size_ / kLanes, seen = 64;
    if (vectors < 4 * seen) return false;
    Vec part = {};
    for (int64_t k = 0; k < seen; k++) part += rough_power((load(row_ + k * vectors / seen * kLanes) - most_) * scale);
    return sum(part) / (seen * kLanes) * static_cast<double>(size_) > kFlat;
  }

  double rough_total(double coldness) const {
    const float scale = static_cast<float>(coldness * kOctaves);
    const int64_t whole = size_ - size_ % kLanes;
    double total = 0;
    for (int64_t lo = 0; lo < whole; lo += kRun) {
      Vec part = {};
      for (int64_t i = lo; i < std::min(lo + kRun, whole); i += kLanes) part += rough_power((load(row_ + i) - most_) * scale);
      total += sum(part);
    }
    for (int64_t i = whole; i < size_; i++) total += std::exp2((row_[i] - most_) * scale);
    return total;
  }

  // At temperature 1, as exact as one exp in fp32.
  double fine_total() const {
    const int64_t whole = size_ - size_ % kLanes;
    constexpr int64_t kShort = 8 * kLanes;
    double total = 0;
    for (int64_t lo = 0; lo < whole; lo += kShort) {
      Vec part = {};
      for (int64_t i = lo; i < std::min(lo + kShort, whole); i += kLanes) part += exp(load(row_ + i) - most_);
      total += sum(part);
    }
    for (int64_t i = whole; i < size_; i++) total += std::exp(row_[i] - most_);
    return total;
  }

  double exact_total(const Weigher& weigher) const {
    const int64_t whole = size_ - size_ % kDoubles;
    VecL totals = {};
    for (int64_t i = 0; i < whole; i += kDoubles) totals += weigher(row_ + i);
    int64_t total = sum(totals);
    for (int64_t i = whole; i < size_; i++) total += weigher(row_[i]);
    return static_cast<double>(total);
  }

  // All that reach the `wanted`-th largest maximum, or one a little less, in no order. False: too many, or nothing is
  // gained by it.
  bool collect(int64_t wanted) {
    const int64_t num = static_cast<int64_t>(maxima_.size());
    if (wanted >= num / 2) return size_ <= static_cast<int64_t>(kMostCandidates) && collect_all();
    // Of maxima far more than wanted the largest of some are as good, and are sorted sooner.
    const int64_t few = std::clamp(num / kLanes * kLanes, int64_t{0}, std::max<int64_t>(8 * wanted, 64) / kLanes * kLanes);
    sorted_.assign(maxima_.begin(), maxima_.begin() + few);
    int64_t at = few;
    for (; few > 0 && at + few <= num; at += few)
      for (int64_t i = 0; i < few; i += kLanes) store(&sorted_[i], max(load(&sorted_[i]), load(&maxima_[at + i])));
    sorted_.insert(sorted_.end(), maxima_.begin() + at, maxima_.end());
    std::nth_element(sorted_.begin(), sorted_.begin() + wanted - 1, sorted_.end(), std::greater<float>());
    const float least = sorted_[wanted - 1];
    find_groups(least);
    if (groups_.size() > kMostCandidates) return false;
    candidates_.clear();
    for (const int64_t g : groups_) {
      if (candidates_.size() > kMostCandidates) return false;
      int64_t k = g * group_;
      const int64_t end = std::min(k + group_, size_);
      for (; k + kLanes <= end; k += kLanes)
        for (uint32_t reached = Lanes::from(load(row_ + k), least).bits; reached; reached &= reached - 1) {
          const int64_t id = k + std::countr_zero(reached);
          candidates_.push_back(ranked(row_[id], id));
        }
      for (; k < end; k++)
        if (row_[k] >= least) candidates_.push_back(ranked(row_[k], k));
    }
    return true;
  }

  // Those with a logit of at least `least`, fetched from memory meanwhile.
  void find_groups(float least) {
    const int64_t num = static_cast<int64_t>(maxima_.size());
    groups_.clear();
    const auto add = [&](int64_t g) {
      groups_.push_back(g);
      for (int64_t k = 0; k < group_; k += 16) __builtin_prefetch(row_ + g * group_ + k);
    };
    int64_t g = 0;
    for (; g + kLanes <= num; g += kLanes)
      for (uint32_t reached = Lanes::from(load(&maxima_[g]), least).bits; reached; reached &= reached - 1)
        add(g + std::countr_zero(reached));
    for (; g < num; g++)
      if (maxima_[g] >= least) add(g);
  }

  bool collect_all() {
    candidates_.clear();
    for (int64_t k = 0; k < size_; k++) candidates_.push_back(ranked(row_[k], k));
    return true;
  }

  void weigh_candidates(const Weigher& weigher) {
    std::sort(candidates_.begin(), candidates_.end());
    logits_.clear();
    for (const uint64_t each : candidates_) logits_.push_back(row_[id_of(each)]);
    logits_.resize(logits_.size() + kDoubles);
    weights_.resize(logits_.size());
    for (size_t i = 0; i < candidates_.size(); i += kDoubles) {
      const VecL some = weigher(&logits_[i]);
      std::memcpy(&weights_[i], &some, sizeof some);
    }
    weights_.resize(candidates_.size());
    held_ = 0;
    for (const int64_t weight : weights_) held_ += weight;
  }

  // The place of the choice among the candidates, were `total` the weight of the row; -1: they do not tell.
  int64_t decide(const Filters& filters, double total) const {
    const int64_t num = static_cast<int64_t>(weights_.size());
    const bool is_all = num == size_, is_off = filters.is_off(size_);
    if (filters.top_k < size_) {
      if (filters.top_k > num) return -1;
      total = static_cast<double>(std::accumulate(weights_.begin(), weights_.begin() + filters.top_k, int64_t{0}));
    }
    int64_t num_kept = 1, kept = weights_[0];
    for (; num_kept < std::min(num, filters.top_k); num_kept++) {
      const int64_t weight = weights_[num_kept];
      if (filters.top_p < 1.0 && !(kept / total < filters.top_p)) break;
      if (!(weight >= filters.least_weight() && weight > 0)) break;
      kept += weight;
    }
    const bool ends_inside = is_all || num_kept < num || num_kept == filters.top_k;
    if (!is_off && !ends_inside) return -1;
    const double target = filters.uniform * (is_off ? total : static_cast<double>(kept));
    int64_t mass = 0;
    for (int64_t place = 0; place < num_kept; place++) {
      mass += weights_[place];
      if (static_cast<double>(mass) > target) return place;
    }
    return ends_inside ? num_kept - 1 : -1;
  }

  int64_t choose_from_all(const Filters& filters, const Top& top, double about) {
    whole_.begin(row_, size_, most_, filters.coldness, top, about);
    const double uniform = filters.uniform;
    if (filters.is_off(size_))
      return whole_.find(uniform, true, [=](const Mass& with, double total) { return with.weight > uniform * total; }).id;
    Mass kept{size_, -1};
    double total = -1;
    if (filters.top_k < size_) {
      const double share = static_cast<double>(filters.top_k) / size_;
      kept = whole_.find(share, false, [&](const Mass& with, double) { return with.count >= filters.top_k; }).with;
      total = kept.weight;
    }
    if (filters.top_p < 1.0) {
      const double share = filters.top_p * (total < 0 ? 1.0 : total / whole_.total());
      const Mass enough = whole_.find(share, true, [&](const Mass& with, double all) {
        return with.weight / (total < 0 ? all : total) >= filters.top_p;
      }).with;
      if (enough.count <= kept.count) kept = enough;
    }
    if (filters.min_p > 0) {
      const Mass enough = whole_.from(filters.least_weight());
      if (enough.count <= kept.count) kept = enough;
    }
    const double target = uniform * kept.weight;
    return whole_.find(target / whole_.total(), true, [=](const Mass& with, double) { return with.weight > target; }).id;
  }

  const float* row_ = nullptr;
  int64_t size_ = 0, group_ = kGroup;
  float most_ = 0;
  int64_t held_ = 0;  // the weight of all candidates
  std::vector<float> maxima_, sorted_, logits_;
  std::vector<int64_t> groups_;
  std::vector<uint64_t> candidates_;
  std::vector<int64_t> weights_;
  WholeRow whole_;
};

// Rows of `logits` by `row_idx`; `columns`: temperature, top_k (0 is off), top_p, min_p and uniform, `num_rows` of each.
// `maxima`: of all rows of `logits`.
inline void choose_tokens(int64_t num_rows, int64_t size, const float* logits, const int64_t* row_idx,
                          const double* columns, const Maxima& maxima, int64_t* ids, int64_t num_threads) {
  const int64_t threads = std::min(num_rows, num_rows * size < (1 << 15) ? 1 : num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t r = 0; r < num_rows; r++) {
    thread_local RowChooser chooser;
    const double top_k = columns[num_rows + r];
    const Filters filters{1.0 / columns[r], columns[2 * num_rows + r], columns[3 * num_rows + r], columns[4 * num_rows + r],
                          top_k > 0 && top_k < size ? static_cast<int64_t>(top_k) : size};
    const Maxima own{maxima.first + row_idx[r] * maxima.stride, maxima.stride, maxima.group};
    ids[r] = chooser.choose(logits + row_idx[r] * size, size, filters, own);
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
