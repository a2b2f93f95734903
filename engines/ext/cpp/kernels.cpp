// The C interface of the kernels, loaded with ctypes by engines/ext/library.py. Pointers and lengths, no torch.
#include "amx_check.h"
#include "head.h"
#include "peaks.h"
#include "stack.h"

using celeriac::bf16;
using celeriac::Crew;
using celeriac::Head;
using celeriac::Stack;
using celeriac::Step;
using celeriac::Team;
using celeriac::Weight;

namespace {

template <typename T, typename Out>
void linear(const Weight& weight, int64_t rows, const T* x, int64_t x_stride, Out* out, int64_t num_threads) {
  Crew crew;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  celeriac::linear(Team(crew).share(celeriac::num_panels(weight.num_out)), rows, weight, x, x_stride, out,
                   weight.num_out);
}

// -1: no kernel for this head_dim.
template <typename T>
int attend(const Step& step, int64_t layer, int64_t head_dim, const T* q, int64_t q_stride, T* out) {
  const int64_t tasks = (step.num_decode + step.num_prefill) * step.num_kv_heads;
  const int64_t threads = tasks < step.num_threads ? tasks : step.num_threads;
  bool is_known = true;
  Crew crew;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : is_known)
  {
    Team team(crew);
    is_known = celeriac::attend_heads(team, head_dim, step, layer, q, q_stride, out, step.num_heads * head_dim);
  }
  return is_known ? 0 : -1;
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
  extern "C" int attend_##NAME(const Step* step, int64_t layer, int64_t head_dim, const T* q, int64_t q_stride,      \
                               T* out) {                                                                             \
    return attend(*step, layer, head_dim, q, q_stride, out);                                                         \
  }                                                                                                                  \
  extern "C" void write_kv_##NAME(const Step* step, int64_t layer, int64_t head_dim, const T* k, int64_t k_stride,   \
                                  const T* v, int64_t v_stride) {                                                    \
    celeriac::write_kv(*step, layer, head_dim, k, k_stride, v, v_stride);                                            \
  }                                                                                                                  \
  extern "C" void norm_##NAME(int64_t num_tokens, int64_t num_heads, int64_t size, T* x, int64_t x_stride,           \
                              const T* delta, const T* weight, float eps, T* out, int64_t out_stride,                \
                              int64_t num_threads) {                                                                 \
    celeriac::norm(num_tokens, num_heads, size, x, x_stride, delta, weight, eps, out, out_stride, num_threads);      \
  }                                                                                                                  \
  extern "C" void silu_mul_##NAME(int64_t num_tokens, int64_t size, const T* gate_up, T* out, int64_t num_threads) { \
    celeriac::silu_mul(num_tokens, size, gate_up, out, num_threads);                                                 \
  }                                                                                                                  \
  extern "C" void rotate_##NAME(int64_t num_tokens, int64_t num_heads, int64_t size, T* x, int64_t x_stride,         \
                                const T* cos, const T* sin, int64_t num_threads) {                                   \
    celeriac::rotate(num_tokens, num_heads, size, x, x_stride, cos, sin, num_threads);                               \
  }                                                                                                                  \
  extern "C" int run_layers_##NAME(const Stack* stack, const Step* step, int64_t lo, int64_t hi, const int64_t* ids, \
                                   const int64_t* positions, T* hidden) {                                            \
    return celeriac::run_layers(*stack, *step, lo, hi, ids, positions, hidden) ? 0 : -1;                             \
  }                                                                                                                  \
  extern "C" void run_head_##NAME(const Head* head, int64_t rows, T* hidden, float* logits, int64_t* ids,            \
                                  bool* is_nan, float* maxima, int64_t stride, int64_t num_threads) {                \
    celeriac::run_head(*head, rows, hidden, logits, ids, is_nan, maxima, stride, num_threads);                       \
  }                                                                                                                  \
  extern "C" int64_t packed_size_##NAME(int64_t num_in, int64_t num_out) {                                           \
    return celeriac::num_panels(num_out) * celeriac::panel_size<T>(num_in) * celeriac::Pairs<T>::kPair;              \
  }                                                                                                                  \
  extern "C" void pack_weight_##NAME(const T* weight, int64_t num_in, int64_t num_out, void* panels,                 \
                                     int64_t num_threads) {                                                          \
    celeriac::pack_weight(weight, num_in, num_out, static_cast<celeriac::Pairs<T>::Element*>(panels), num_threads);  \
  }                                                                                                                  \
  extern "C" void linear_##NAME(const Weight* weight, int64_t rows, const T* x, int64_t x_stride, T* out,            \
                                int64_t num_threads) {                                                               \
    linear(*weight, rows, x, x_stride, out, num_threads);                                                            \
  }                                                                                                                  \
  extern "C" void linear_wide_##NAME(const Weight* weight, int64_t rows, const T* x, int64_t x_stride, float* out,   \
                                     int64_t num_threads) {                                                          \
    linear(*weight, rows, x, x_stride, out, num_threads);                                                            \
  }

// `AmxState`; runs the self-check in a child process the first time.
extern "C" int64_t find_amx() {
  static const celeriac::AmxState state = celeriac::find_amx();
  return static_cast<int64_t>(state);
}

// The self-check alone, whatever the CPU says that it has. For tests.
extern "C" int64_t try_amx() { return static_cast<int64_t>(celeriac::try_amx()); }

// The same in this process, which a CPU without AMX ends. For tests that handle SIGILL.
extern "C" int64_t amx_equals_emulation() { return celeriac::amx_equals_emulation(); }

// Whether weights may be packed for tiles at all, those in software included.
extern "C" int64_t has_emulated_tiles() {
#if defined(CELERIAC_HAS_TILES)
  return 1;
#else
  return 0;
#endif
}

// So many neighbouring logits have one entry in the `maxima` of run_head.
extern "C" int64_t head_group() { return celeriac::kColumns; }

extern "C" void find_peaks(int64_t num_rows, int64_t size, const float* logits, int64_t* ids, bool* is_nan,
                           int64_t num_threads) {
  celeriac::find_peaks(num_rows, size, logits, ids, is_nan, num_threads);
}

EXPORT(float32, float)
EXPORT(bfloat16, bf16)
