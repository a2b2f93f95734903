// A linear layer whatever its weight is packed for.
#pragma once

#include "amx_linear.h"
#include "linear.h"

namespace celeriac {

// out[rows, num_out] = x[rows, num_in] W^T + bias. Called by all threads of a team; ends with their barrier.
template <typename T, typename Out>
void linear(int64_t rows, const Weight& weight, const T* x, int64_t x_stride, Out* out, int64_t out_stride) {
#if defined(CELERIAC_HAS_TILES)
  if constexpr (std::is_same_v<T, bf16>) {
    if (weight.kind == Kind::tiles) return linear_on_tiles<AmxTiles>(rows, weight, x, x_stride, out, out_stride);
    if (weight.kind == Kind::emulated_tiles)
      return linear_on_tiles<EmulatedTiles>(rows, weight, x, x_stride, out, out_stride);
  }
#endif
  if (weight.kind == Kind::int8)
    linear_as<Int8<T>>(rows, weight, x, x_stride, out, out_stride);
  else if (weight.kind == Kind::int4)
    linear_as<Int4<T>>(rows, weight, x, x_stride, out, out_stride);
  else
    linear_as<Plain<T>>(rows, weight, x, x_stride, out, out_stride);
}

}  // namespace celeriac
