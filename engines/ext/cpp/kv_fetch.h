// Keys and values on their way while qkv's weights stream: attention to few tokens would wait for each of its tiles.
#pragma once

#include "attention.h"

namespace celeriac {

// Watches the panels of qkv, and after each of them fetches a part of what this thread will attend to.
template <typename T>
class KvFetch final : public Watch {
 public:
  KvFetch(const Team& team, const Step& step, int64_t layer, int64_t head_dim, Share panels)
      : step_(step), layer_(layer), head_dim_(head_dim) {
    if (!is_shared_out(team, step) || panels.begin == panels.end) return;
    const Share tasks = team.share(step.num_decode * step.num_kv_heads);
    task_ = tasks.begin, end_ = tasks.end;
    const int64_t row_bytes = 2 * head_dim * static_cast<int64_t>(sizeof(T));
    int64_t tokens = 0;
    for (int64_t task = task_; task < end_; task++) tokens += bounds(task).end - bounds(task).begin;
    tokens = std::min(tokens, kFetchBytes / row_bytes);
    per_panel_ = tokens / (panels.end - panels.begin) + 1;
  }

  void see(int64_t, int64_t, int64_t, int64_t, const Vec (*)[2]) override {
    for (int64_t left = per_panel_; left > 0 && task_ < end_;) left -= fetch(left);
  }

 private:
  Share bounds(int64_t task) const {
    const int64_t row = step_.decode_row[task / step_.num_kv_heads], at = step_.starts[row];
    const int64_t lo = step_.decode_split[task / step_.num_kv_heads] * kSplit;
    return {lo, std::min(lo + kSplit, at)};
  }

  // At most `most` tokens, which lie side by side. How many, or 1 at the end of a task.
  int64_t fetch(int64_t most) {
    const Share tokens = bounds(task_);
    const int64_t position = tokens.begin + done_, size = step_.block_size;
    if (position >= tokens.end) {
      task_++, done_ = 0;
      return 1;
    }
    const int64_t count = std::min({most, size - position % size, tokens.end - position});
    const int64_t half = step_.heads_apart * size * head_dim_, row = step_.decode_row[task_ / step_.num_kv_heads];
    const int64_t block = step_.tables[step_.table_at[row] + position / size];
    const T* keys = static_cast<const T*>(step_.kv) + (block * step_.num_layers + layer_) * 2 * half +
                    (task_ % step_.num_kv_heads * size + position % size) * head_dim_;
    for (const T* from : {keys, keys + half})
      for (int64_t at = 0; at < count * head_dim_; at += kLineBytes / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(from + at, 0, 2);
    done_ += count;
    return count;
  }

  const Step& step_;
  int64_t layer_, head_dim_, task_ = 0, end_ = 0, per_panel_ = 0, done_ = 0;
};

}  // namespace celeriac
