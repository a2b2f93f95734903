// The C interface of sampling, loaded with ctypes by engines/sampling/native.py: a library of its own, since it knows
// nothing of models and dtypes. Logits are fp32.
#include "choose.h"

extern "C" void choose_tokens(int64_t num_rows, int64_t size, const float* logits, const int64_t* row_idx,
                              const double* columns, const float* maxima, int64_t stride, int64_t group, int64_t* ids,
                              int64_t num_threads) {
  celeriac::choose_tokens(num_rows, size, logits, row_idx, columns, {maxima, stride, group}, ids, num_threads);
}

extern "C" void score_tokens(int64_t num_rows, int64_t size, const float* logits, const int64_t* row_idx,
                             const int64_t* chosen, int64_t num_top, int64_t* ids, float* logprobs,
                             int64_t num_threads) {
  celeriac::score_tokens(num_rows, size, logits, row_idx, chosen, num_top, ids, logprobs, num_threads);
}

// What each token of a row weighs, as the choice has it. For tests.
extern "C" void weigh_row(int64_t size, const float* row, float most, double coldness, int64_t* weights) {
  const celeriac::Weigher weigher(most, coldness);
  for (int64_t i = 0; i < size; i++) weights[i] = weigher(row[i]);
}
