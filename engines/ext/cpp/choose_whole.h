// Places in the order of a whole row, likeliest first, without sorting it.
//
// A sample of the row says about where the place lies, as two logits. One pass weighs everything, and keeps what lies
// between the two. Of that a sample is taken again, until so little is left that it is sorted: a few hundred of 50,000
// tokens after the second pass, so nearly all of the cost is the first. What a sample gets wrong costs another pass, and
// never changes the place.
#pragma once

#include <algorithm>
#include <vector>

#include "token_weights.h"

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

// Of some tokens together.
struct Mass {
  int64_t count = 0, weight = 0;

  Mass operator+(const Mass& other) const { return {count + other.count, weight + other.weight}; }
};

// Tokens in the order of their ids. `ids` null: 0, 1, 2, ...
struct Tokens {
  const float* logits;
  const int32_t* ids;
  int64_t size;
};

// Some lanes of a vector.
struct Lanes {
#if defined(__AVX512F__)
  __mmask16 bits;

  static Lanes from(Vec v, float least) {
    return {_mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(least), _CMP_GE_OQ)};
  }

  static Lanes above(Vec v, float least) {
    return {_mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(least), _CMP_GT_OQ)};
  }

  // sums + weights in these lanes, of which `half` is the first.
  VecL add(VecL sums, VecL weights, int half) const {
    const __mmask8 chosen = static_cast<__mmask8>(bits >> half);
    return (VecL)_mm512_mask_add_epi64((__m512i)sums, chosen, (__m512i)sums, (__m512i)weights);
  }
#else
  uint32_t bits;

  static Lanes from(Vec v, float least) {
    Lanes found{0};
    for (int lane = 0; lane < kLanes; lane++) found.bits |= static_cast<uint32_t>(v[lane] >= least) << lane;
    return found;
  }

  static Lanes above(Vec v, float least) {
    Lanes found{0};
    for (int lane = 0; lane < kLanes; lane++) found.bits |= static_cast<uint32_t>(v[lane] > least) << lane;
    return found;
  }

  VecL add(VecL sums, VecL weights, int half) const {
    VecL chosen;
    for (int lane = 0; lane < kDoubles; lane++) chosen[lane] = -static_cast<int64_t>(bits >> (half + lane) & 1);
    return sums + (weights & chosen);
  }
#endif

  Lanes without(Lanes others) const { return {static_cast<decltype(bits)>(bits & ~others.bits)}; }
  int count() const { return __builtin_popcount(bits); }
};

// Logits above `low` and not above `high`.
struct Between {
  float low = -INFINITY, high = INFINITY;
};

// Room for tokens.
class Pool {
 public:
  // Called before `write`: for so many.
  void reserve(int64_t most) {
    if (static_cast<int64_t>(logits_.size()) < most + kLanes) logits_.resize(most + kLanes), ids_.resize(most + kLanes);
    size_ = 0;
  }

  void add(float logit, int64_t id) { logits_[size_] = logit, ids_[size_++] = static_cast<int32_t>(id); }

  void add(Vec logits, VecI ids, Lanes chosen) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(logits_.data() + size_, _mm512_maskz_compress_ps(chosen.bits, (__m512)logits));
    _mm512_storeu_si512(ids_.data() + size_, _mm512_maskz_compress_epi32(chosen.bits, (__m512i)ids));
#else
    if (!chosen.bits) return;
    int64_t at = size_;
    for (int lane = 0; lane < kLanes; lane++) {
      logits_[at] = logits[lane], ids_[at] = ids[lane];
      at += chosen.bits >> lane & 1;
    }
#endif
    size_ += chosen.count();
  }

  Tokens tokens() const { return {logits_.data(), ids_.data(), size_}; }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
  std::vector<float> logits_;
  std::vector<int32_t> ids_;
};

// The likeliest tokens, all of them down to `least`: what is known of a row before a guess.
struct Top {
  float least = INFINITY;
  Mass mass;
};

// About where a share of the weight, or of the tokens, ends. The same for the same tokens.
class Guess {
 public:
  // `share` in [0, 1] of the tokens below `least`, likeliest first. `octaves` as in weights_of; 0: all weigh the same.
  Between operator()(const Tokens& tokens, float least, double share, double octaves) {
    take_sample(tokens, least);
    float high = -INFINITY, low = INFINITY;
    for (int k = 0; k < size_; k++) {
      high = std::max(high, sample_[k]);
      low = sample_[k] > -INFINITY ? std::min(low, sample_[k]) : low;
    }
    if (!(high > low)) return {std::nextafterf(high, -INFINITY), high};  // equal ones, maybe many of them
    // What lies further below has no weight to speak of.
    const float span = octaves > 0 ? std::min<double>(high - low, (kUnitBits + 1) / octaves) : high - low;
    if (!(span < INFINITY)) return {};
    count(high, kBins / span);
    return cut(high, span, share, std::exp2(-span / kBins * octaves));
  }

 private:
  static constexpr int kBins = 256, kChunks = 64, kMost = kChunks * kLanes;

  void take_sample(const Tokens& tokens, float least) {
    size_ = 0;
    const int64_t vectors = tokens.size / kLanes, chunks = std::min<int64_t>(vectors, kChunks);
    for (int64_t c = 0; c < chunks; c++) {
      const float* chunk = tokens.logits + c * vectors / chunks * kLanes;
      for (int lane = 0; lane < kLanes; lane++) {
        sample_[size_] = chunk[lane];
        size_ += chunk[lane] < least;
      }
    }
  }

  void count(float high, float bins_per_logit) {
    std::fill(counts_, counts_ + kBins, 0);
    for (int k = 0; k < size_; k++) {
      const float place = (high - sample_[k]) * bins_per_logit;
      counts_[place < kBins - 1 ? static_cast<int>(place) : kBins - 1]++;
    }
  }

  // A token of a bin weighs `step` times what one of the bin before does.
  Between cut(float high, float span, double share, double step) const {
    double total = 0, squares = 0, weight = 1;
    for (int b = 0; b < kBins; b++, weight *= step) total += counts_[b] * weight, squares += counts_[b] * weight * weight;
    // Three deviations of a share in so many independent tokens as the weights amount to. The last tokens are left out
    // where it can be: they are many.
    const double effective = total * total / squares;
    const double doubt = 3 * std::sqrt(share * (1 - share) / effective) + 2 / effective;
    const double from = share - doubt, to = std::min(share + doubt, 1 - (1 - share) / 8);
    Between found;
    double before = 0;
    weight = 1;
    for (int b = 0; b < kBins; b++, weight *= step) {
      const double with = before + counts_[b] * weight;
      if (b > 0 && before <= from * total) found.high = high - span * b / kBins;
      if (b < kBins - 1 && with >= to * total) {
        found.low = high - span * (b + 1) / kBins;
        break;
      }
      before = with;
    }
    return found;
  }

  float sample_[kMost + 1];
  int counts_[kBins];
  int size_ = 0;
};

// A place in the order: its token, and what the tokens up to it have together, itself included.
struct Place {
  int64_t id;
  Mass with;
};

class WholeRow {
 public:
  // `row` is kept; `most` is its largest, finite. `total`: about its weight, where `top` is not empty.
  void begin(const float* row, int64_t size, float most, double coldness, const Top& top, double total) {
    row_ = {row, nullptr, size};
    weigher_ = Weigher(most, coldness);
    top_ = top, about_ = total, total_ = -1;
  }

  // Of all tokens; known after the first pass.
  int64_t total() const { return total_; }

  // The tokens that weigh at least `least` units, and anything at all.
  Mass from(double least) {
    const int64_t whole = row_.size - row_.size % kDoubles;
    VecL counts = {}, sums = {}, all = {};
    for (int64_t i = 0; i < whole; i += kDoubles) {
      const VecL weights = weigher_(row_.logits + i);
      const VecL is_kept = (__builtin_convertvector(weights, VecD) >= least) & (weights > 0);
      counts -= is_kept, sums += weights & is_kept, all += weights;
    }
    Mass found{sum(counts), sum(sums)};
    total_ = sum(all);
    for (int64_t i = whole; i < row_.size; i++) {
      const int64_t weight = weigher_(row_.logits[i]);
      total_ += weight;
      if (static_cast<double>(weight) >= least && weight > 0) found = found + Mass{1, weight};
    }
    return found;
  }

  // The first place with which `is_reached(tokens up to it, total)`, which stays true as they grow. The last, if there is
  // none. `share`: about how much of the weight lies before it, or of the tokens.
  template <typename Reached>
  Place find(double share, bool by_weight, Reached is_reached) {
    const double octaves = by_weight ? weigher_.octaves : 0;
    const auto measure = [=](const Mass& mass) { return static_cast<double>(by_weight ? mass.weight : mass.count); };
    const auto ends_by = [&](const Mass& mass) { return is_reached(mass, static_cast<double>(total_)); };
    Tokens tokens = row_;
    Mass before;
    Between guess = guess_row(share, octaves, by_weight);
    while (tokens.size > kSorted) {
      Pool& pool = pools_[tokens.logits == pools_[0].tokens().logits];
      Split split = scan(tokens, guess, pool);
      if (total_ < 0) total_ = split.all.weight;
      if (tokens.ids == nullptr) share *= by_weight ? total_ : row_.size;  // from here on what lies before the place
      if (split.above.count > 0 && ends_by(before + split.above)) {
        split = scan(tokens, {guess.high, INFINITY}, pool);
      } else if (!ends_by(before + split.above + split.inside)) {
        split = scan(tokens, {-INFINITY, guess.low}, pool);
      }
      before = before + split.above;
      const bool is_stuck = pool.size() == tokens.size;
      tokens = pool.tokens();
      if (is_stuck) break;
      const double inside = std::clamp((share - measure(before)) / measure(split.inside), 0.0, 1.0);
      guess = guess_(tokens, INFINITY, inside >= 0 ? inside : 0, octaves);
    }
    return walk(tokens, before, ends_by);
  }

 private:
  static constexpr int64_t kSorted = 128;

  // What a pass found: above and between the two logits; all of it.
  struct Split {
    Mass above, inside, all;
  };

  Between guess_row(double share, double octaves, bool by_weight) {
    if (top_.mass.count == 0) return guess_(row_, INFINITY, share, octaves);
    const double all = by_weight ? (total_ < 0 ? about_ : total_) : row_.size;
    const double known = by_weight ? top_.mass.weight : top_.mass.count;
    if (share * all <= known) return {std::nextafterf(top_.least, -INFINITY), INFINITY};
    return guess_(row_, top_.least, std::clamp((share * all - known) / (all - known), 0.0, 1.0), octaves);
  }

  Split scan(const Tokens& tokens, const Between& between, Pool& pool) const {
    pool.reserve(tokens.size);
    Pool out = std::move(pool);  // its size in a register
    const int64_t whole = tokens.size - tokens.size % kLanes;
    const Weigher weigher = weigher_;
    VecL above = {}, reached = {}, all = {};
    VecI ids;
    Split split;
    for (int lane = 0; lane < kLanes; lane++) ids[lane] = lane;
    for (int64_t i = 0; i < whole; i += kLanes, ids += kLanes) {
      const Vec v = load(tokens.logits + i);
      const Lanes is_above = Lanes::above(v, between.high), is_reached = Lanes::above(v, between.low);
      for (int half = 0; half < kLanes; half += kDoubles) {
        const VecL weights = weigher(tokens.logits + i + half);
        all += weights;
        above = is_above.add(above, weights, half);
        reached = is_reached.add(reached, weights, half);
      }
      split.above.count += is_above.count();
      if (tokens.ids) std::memcpy(&ids, tokens.ids + i, sizeof ids);
      out.add(v, ids, is_reached.without(is_above));
    }
    split.above.weight = sum(above), split.inside.weight = sum(reached) - sum(above);
    split.all = {tokens.size, sum(all)};
    for (int64_t i = whole; i < tokens.size; i++) {
      const float logit = tokens.logits[i];
      const int64_t weight = weigher(logit);
      split.all.weight += weight;
      if (logit > between.high) split.above = split.above + Mass{1, weight};
      if (!(logit > between.low && logit <= between.high)) continue;
      split.inside.weight += weight;
      out.add(logit, tokens.ids ? tokens.ids[i] : i);
    }
    split.inside.count = out.size();
    pool = std::move(out);
    return split;
  }

  template <typename Ends>
  Place walk(const Tokens& tokens, Mass mass, Ends ends_by) {
    members_.clear();
    for (int64_t i = 0; i < tokens.size; i++) members_.push_back(ranked(tokens.logits[i], tokens.ids ? tokens.ids[i] : i));
    if (!std::is_sorted(members_.begin(), members_.end())) std::sort(members_.begin(), members_.end());
    for (const uint64_t each : members_) {
      mass = mass + Mass{1, weigher_(row_.logits[id_of(each)])};
      if (ends_by(mass)) return {id_of(each), mass};
    }
    return {members_.empty() ? 0 : id_of(members_.back()), mass};
  }

  Tokens row_{};
  Weigher weigher_{0, 1};
  Top top_;
  double about_ = 0;
  int64_t total_ = -1;
  Pool pools_[2];
  Guess guess_;
  std::vector<uint64_t> members_;
};

}  // namespace celeriac
