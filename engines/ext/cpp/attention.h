// Paged attention of a step: which queries and which keys make a task, and who merges what.
//
//   rows with several queries   a task is a tile of queries of one KV head, over all its splits
//   rows with one query         a task is one split of one KV head; rows of several splits are merged afterwards
//
// Both kinds run the same arithmetic in the same order (attention_tile.h), so a token computed in a decode step equals
// the same token computed in a prompt, bit for bit.
#pragma once

#include "attention_one.h"

namespace celeriac {

template <typename T, int D>
inline void finish_row(const float* out, float total, T* to) {
  for (int i = 0; i < D; i += kLanes) store(to + i, load(out + i) / total);
}

template <typename T, int D>
void attend_query_tile(const Step& step, int64_t layer, const T* q, int64_t q_stride, T* out, int64_t out_stride,
                       int64_t row, int64_t tile, int64_t kv_head, Scratch<T, D>& s) {
  const int64_t group = step.num_heads / step.num_kv_heads;
  const int64_t per_tile = kQueryRows / group > 0 ? kQueryRows / group : 1;
  const int64_t first = tile * per_tile;
  const int64_t count = step.num_new[row] - first < per_tile ? step.num_new[row] - first : per_tile;
  const int64_t rows = count * group, begin = step.starts[row] + first, end = begin + count;
  const int64_t token = step.token_at[row] + first;
  for (int64_t r = 0; r < rows; r++)
    s.pack_query(r, q + (token + r / group) * q_stride + (kv_head * group + r % group) * D);
  const Pages<T, D> pages(step, row, layer, kv_head);
  for (int64_t lo = 0; lo < end; lo += kSplit) {
    const int64_t hi = lo + kSplit < end ? lo + kSplit : end;
    attend_keys(pages, s, rows, group, begin, lo, hi, step.scale);
    if (lo == 0) {
      std::swap(s.out, s.merged), std::swap(s.highest, s.merged_highest), std::swap(s.total, s.merged_total);
      continue;
    }
    for (int64_t r = lo > begin ? (lo - begin) * group : 0; r < rows; r++)
      merge_split<D>(&s.merged[r * D], &s.merged_highest[r], &s.merged_total[r], &s.out[r * D], s.highest[r],
                     s.total[r]);
  }
  for (int64_t r = 0; r < rows; r++)
    finish_row<T, D>(&s.merged[r * D], s.merged_total[r],
                     out + (token + r / group) * out_stride + (kv_head * group + r % group) * D);
}

template <typename T, int D>
void attend_split(const Step& step, int64_t layer, const T* q, int64_t q_stride, T* out, int64_t out_stride,
                  int64_t row, int64_t split, int64_t kv_head, Scratch<T, D>& s) {
  const int64_t group = step.num_heads / step.num_kv_heads, width = D + 2;
  const int64_t begin = step.starts[row], lo = split * kSplit;
  const int64_t hi = lo + kSplit < begin + 1 ? lo + kSplit : begin + 1;
  const T* query = q + step.token_at[row] * q_stride + kv_head * group * D;
  for (int64_t h = 0; h < group; h++) s.pack_query(h, query + h * D);
  const Pages<T, D> pages(step, row, layer, kv_head);
  if constexpr (Scratch<T, D>::kDepth % kLanes == 0)
    for (int64_t h = 0; h < group; h += kMostHeads)
      attend_some(std::min<int64_t>(group - h, kMostHeads), pages, &s.q[h * Scratch<T, D>::kDepth], lo, hi, step.scale,
                  &s.out[h * D], &s.highest[h], &s.total[h]);
  else
    attend_keys(pages, s, group, group, begin, lo, hi, step.scale);
  if (begin < kSplit) {
    T* to = out + step.token_at[row] * out_stride + kv_head * group * D;
    for (int64_t h = 0; h < group; h++) finish_row<T, D>(&s.out[h * D], s.total[h], to + h * D);
    return;
  }
  float* part = step.partials + ((step.partial_at[row] + split) * step.num_heads + kv_head * group) * width;
  for (int64_t h = 0; h < group; h++, part += width) {
    std::memcpy(part, &s.out[h * D], sizeof(float) * D);
    part[D] = s.highest[h];
    part[D + 1] = s.total[h];
  }
}

template <typename T, int D>
void merge_splits(const Step& step, T* out, int64_t out_stride, int64_t row, int64_t head) {
  const int64_t num_splits = (step.starts[row] + kSplit) / kSplit, width = D + 2, next = step.num_heads * width;
  float* first = step.partials + (step.partial_at[row] * step.num_heads + head) * width;
  for (int64_t s = 1; s < num_splits; s++) {
    const float* part = first + s * next;
    merge_split<D>(first, first + D, first + D + 1, part, part[D], part[D + 1]);
  }
  finish_row<T, D>(first, first[D + 1], out + step.token_at[row] * out_stride + head * D);
}

// Room of a thread, kept from layer to layer: making it takes as long as attending to some tokens.
template <typename T, int D>
Scratch<T, D>& scratch_room(int64_t rows) {
  thread_local std::unique_ptr<Scratch<T, D>> room;
  thread_local int64_t size = 0;
  if (rows > size) room = std::make_unique<Scratch<T, D>>(rows), size = rows;
  return *room;
}

// Tasks so few that each thread has its share from the start. More are drawn one by one: they are not equally long.
inline bool is_shared_out(const Team& team, const Step& step) {
  return step.num_prefill == 0 && step.num_decode * step.num_kv_heads <= 2 * team.size;
}

// q: heads side by side, tokens `q_stride` apart; out likewise. Called by all threads of a team after a barrier.
template <typename T, int D>
void attend(Team& team, const Step& step, int64_t layer, const T* q, int64_t q_stride, T* out, int64_t out_stride) {
  const int64_t kv_heads = step.num_kv_heads, group = step.num_heads / kv_heads;
  const int64_t prefill = step.num_prefill * kv_heads, tasks = prefill + step.num_decode * kv_heads;
  Scratch<T, D>& scratch = scratch_room<T, D>(step.num_prefill && group < kQueryRows ? kQueryRows : group);
  const auto attend_task = [&](int64_t task) {
    if (task >= prefill)
      return attend_split<T, D>(step, layer, q, q_stride, out, out_stride, step.decode_row[(task - prefill) / kv_heads],
                                step.decode_split[(task - prefill) / kv_heads], (task - prefill) % kv_heads, scratch);
    task = prefill - 1 - task;  // long ones first: they see the most keys
    attend_query_tile<T, D>(step, layer, q, q_stride, out, out_stride, step.prefill_row[task / kv_heads],
                            step.prefill_tile[task / kv_heads], task % kv_heads, scratch);
  };
  if (is_shared_out(team, step))
    for (auto [task, end] = team.share(tasks); task < end; task++) attend_task(task);
  else
    for (int64_t task; (task = team.take()) < tasks;) attend_task(task);
  if (step.num_merge == 0) return;
  team.barrier();
  for (auto [i, end] = team.share(step.num_merge * step.num_heads); i < end; i++)
    merge_splits<T, D>(step, out, out_stride, step.merge_row[i / step.num_heads], i % step.num_heads);
}

// Calls `attend` for the head dimensions that there are (also in library.py). False: not this one.
template <typename T>
bool attend_heads(Team& team, int64_t head_dim, const Step& step, int64_t layer, const T* q, int64_t q_stride, T* out,
                  int64_t out_stride) {
  switch (head_dim) {
    case 16: attend<T, 16>(team, step, layer, q, q_stride, out, out_stride); return true;
    case 32: attend<T, 32>(team, step, layer, q, q_stride, out, out_stride); return true;
    case 64: attend<T, 64>(team, step, layer, q, q_stride, out, out_stride); return true;
    case 80: attend<T, 80>(team, step, layer, q, q_stride, out, out_stride); return true;
    case 96: attend<T, 96>(team, step, layer, q, q_stride, out, out_stride); return true;
    case 128: attend<T, 128>(team, step, layer, q, q_stride, out, out_stride); return true;
    default: return false;
  }
}

}  // namespace celeriac
