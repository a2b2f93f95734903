// Vectors of floats, bfloat16 storage, exp: what all kernels share.
//
// GCC vector extensions, so the same source serves AVX-512, AVX2 and NEON; `-march=native` picks the width.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace celeriac {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kVectorRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kVectorRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));
typedef uint16_t VecS __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}

inline void store(float* to, float x) { *to = x; }

// Round to nearest even; NaN stays NaN.
inline void store(bf16* to, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const bf16* from) {
  VecH h;
  std::memcpy(&h, from, sizeof h);
  return (Vec)(__builtin_convertvector(h, VecU) << 16);
}

// Bits as they are.
inline Vec load_words(const void* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline VecH round_bf16(Vec v) {
  VecU u = (VecU)v;
  VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  VecI is_nan = v != v;
  return __builtin_convertvector(is_nan ? (VecU{} + 0x7fc0) : rounded, VecH);
}

inline void store(bf16* to, Vec v) {
  VecH h = round_bf16(v);
  std::memcpy(to, &h, sizeof h);
}

// Halves onto halves: the order of addition is fixed.
template <int N>
struct Sum {
  typedef float Whole __attribute__((vector_size(4 * N)));
  typedef float Half __attribute__((vector_size(2 * N)));
  static float of(Whole v) {
    Half low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<char*>(&v) + sizeof low, sizeof high);
    return Sum<N / 2>::of(low + high);
  }
};

template <>
struct Sum<2> {
  typedef float Whole __attribute__((vector_size(8)));
  static float of(Whole v) { return v[0] + v[1]; }
};

inline float sum(Vec v) { return Sum<kLanes>::of(v); }

template <bool Second, int... I>
inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((Second ? kLanes / 2 : 0) + I / 2 + I % 2 * kLanes)...);
}

// Rows to columns of kLanes vectors. Each round moves one bit of the row number to the end of the lane number.
inline void transpose(Vec* v) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; i++) {
      next[2 * i] = interleave<false>(v[i], v[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave<true>(v[i], v[i + kLanes / 2], lanes);
    }
    for (int i = 0; i < kLanes; i++) v[i] = next[i];
  }
}

// Of lanes that are 0 or -1.
inline bool any(VecI lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#else
  typedef int64_t Words __attribute__((vector_size(4 * kLanes)));
  const Words words = (Words)lanes;
  int64_t found = 0;
  for (int i = 0; i < kLanes / 2; i++) found |= words[i];
  return found != 0;
#endif
}

// The second where either is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline float max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; i++) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// e^x, within 2 ulp on [-87, 88] and clamped outside; exp(0) is exactly 1; NaN stays NaN. Polynomial as in Cephes.
inline Vec exp(Vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  Vec shifted = x * 1.44269504088896341f + magic;
  VecI n = (VecI)shifted - 0x4b400000;
  Vec whole = shifted - magic;
  Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vec)((n + 127) << 23);
}

}  // namespace celeriac
