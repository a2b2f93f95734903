// Where the KV of a step is: kv[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], and block tables.
#pragma once

#include <cstring>

#include "row_ops.h"

namespace celeriac {

// One step, filled by engines/attention/native_backend.py (`_StepArgs`, field by field). Rows are sequences.
struct Step {
  void* kv;
  int64_t num_layers, num_heads, num_kv_heads, heads_apart, block_size, num_threads;  // heads_apart: in the region
  float scale;
  int64_t num_tokens;
  const int64_t* slots;      // [num_tokens]: block * block_size + offset
  const int64_t* tables;     // block ids of all rows, one row after another
  const int64_t* table_at;   // [num_rows] where a row's ids begin in `tables`
  const int64_t* token_at;   // [num_rows] where a row's queries begin in the packed batch
  const int64_t* starts;     // [num_rows] position of its first query
  const int64_t* num_new;    // [num_rows] queries
  int64_t num_decode;        // tasks [split] of rows with one query
  const int64_t* decode_row; // [num_decode]
  const int64_t* decode_split;
  int64_t num_prefill;       // tasks [query tile] of the other rows
  const int64_t* prefill_row;
  const int64_t* prefill_tile;
  int64_t num_merge;         // rows with one query
  const int64_t* merge_row;
  const int64_t* partial_at; // [num_rows] where its splits begin in `partials`, in splits
  float* partials;           // [splits, num_heads, head_dim + 2]: output, maximum, sum of each split
};

// The pages of one (row, layer, KV head).
template <typename T, int D>
struct Pages {
  const T* keys;  // page of block 0
  int64_t block_stride, value_offset, block_size;
  const int64_t* table;

  Pages(const Step& step, int64_t row, int64_t layer, int64_t kv_head)
      : block_stride(step.num_layers * 2 * step.heads_apart * step.block_size * D),
        value_offset(step.heads_apart * step.block_size * D),
        block_size(step.block_size),
        table(step.tables + step.table_at[row]) {
    keys = static_cast<const T*>(step.kv) + (layer * 2 * step.heads_apart + kv_head) * step.block_size * D;
  }

  // Keys of positions [lo, hi), at most `Tile` of them; the values lie `value_offset` behind.
  void locate(int64_t lo, int64_t hi, const T** found) const {
    int64_t block = lo / block_size, offset = lo % block_size;
    for (int64_t position = lo; position < hi; block++, offset = 0) {
      const T* page = keys + table[block] * block_stride;
      for (; offset < block_size && position < hi; offset++, position++) *found++ = page + offset * D;
    }
  }
};

// Keys and values of one token, heads side by side, to their slot.
template <typename T>
inline void write_kv_token(const Step& step, int64_t layer, int64_t head_dim, int64_t t, const T* k, const T* v) {
  const int64_t page = step.block_size * head_dim, half = step.heads_apart * page;
  const int64_t block = step.slots[t] / step.block_size, offset = step.slots[t] % step.block_size;
  T* to = static_cast<T*>(step.kv) + (block * step.num_layers + layer) * 2 * half + offset * head_dim;
  for (int64_t h = 0; h < step.num_kv_heads; h++) {
    std::memcpy(to + h * page, k + h * head_dim, sizeof(T) * head_dim);
    std::memcpy(to + half + h * page, v + h * head_dim, sizeof(T) * head_dim);
  }
}

// Those of all tokens, which are `stride` elements apart.
template <typename T>
void write_kv(const Step& step, int64_t layer, int64_t head_dim, const T* k, int64_t k_stride, const T* v,
              int64_t v_stride) {
  const int threads = threads_for(step.num_tokens * step.num_kv_heads * head_dim * 2, step.num_threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < step.num_tokens; t++)
    write_kv_token(step, layer, head_dim, t, k + t * k_stride, v + t * v_stride);
}

}  // namespace celeriac
