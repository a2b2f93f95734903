// A linear layer whatever its weight is packed for.
#pragma once

#include "amx_linear.h"
#include "linear.h"

namespace celeriac {

// out[rows, num_out] = x[rows, num_in] W^T + bias, for the outputs of some panels.
template <typename T, typename Out>
void linear(Share panels, int64_t rows, const Weight& weight, const T* x, int64_t x_stride, Out* out,
            int64_t out_stride, Watch* watch = nullptr) {
#if defined(CELERIAC_HAS_TILES)
  if constexpr (std::is_same_v<T, bf16>) {
    if (weight.kind == Kind::tiles)
      return linear_on_tiles<AmxTiles>(panels, rows, weight, x, x_stride, out, out_stride, watch);
    if (weight.kind == Kind::emulated_tiles)
      return linear_on_tiles<EmulatedTiles>(panels, rows, weight, x, x_stride, out, out_stride, watch);
  }
#endif
  if (weight.kind == Kind::int8)
    linear_as<Int8<T>>(panels, rows, weight, x, x_stride, out, out_stride, watch);
  else if (weight.kind == Kind::int4)
    linear_as<Int4<T>>(panels, rows, weight, x, x_stride, out, out_stride, watch);
  else
    linear_as<Plain<T>>(panels, rows, weight, x, x_stride, out, out_stride, watch);
}

// Where panels [share) of a weight lie. Panels of tiles are a little longer, with their depth filled up.
template <typename T>
void will_read(Team& team, const Weight& weight, Share share) {
  int64_t panel_bytes = panel_size<T>(weight.num_in) * static_cast<int64_t>(sizeof(typename Pairs<T>::Element));
  if (weight.kind == Kind::int8) panel_bytes = weight.num_in * kColumns;
  if (weight.kind == Kind::int4) panel_bytes = weight.num_in * kColumns / 2;
  team.will_read(static_cast<const char*>(weight.panels) + share.begin * panel_bytes,
                 (share.end - share.begin) * panel_bytes);
}

}  // namespace celeriac
