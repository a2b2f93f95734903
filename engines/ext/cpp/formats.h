// How a packed weight lies in memory, and how it becomes what one instruction multiplies.
//
//   W [out, in] lies in panels of kColumns outputs: [in / pair][kColumns][pair]. A pair is two neighbours along the
//   depth for bfloat16, which is what one instruction multiplies, and one element for float. Missing outputs are zeros.
//
//   int8  16-bit words [in / pair][kLanes][pair]; of output c + kLanes * half its byte `half`: sign and magnitude
//   int4  16-bit words [in / 2 pair][kLanes][pair]; of output c + kLanes * half its nibble 2 * (which pair) + half: q + 8
//
// Both are whole numbers that bfloat16 holds exactly. A weight is its number times the scale of its group of inputs,
// which multiplies the group's sum: so a number unpacked on the way gives the bits that it gives unpacked before.
#pragma once

#include "simd.h"

#if defined(__AVX512BF16__)
#include <array>
#endif

namespace celeriac {

constexpr int kColumns = 2 * kLanes;
constexpr int64_t kAheadBytes = 2048;  // prefetched: 1 to 4 KiB ahead were equal, 8 KiB slower

// `tiles`: as `plain`, but the depth is filled up to whole tiles with zeros (amx_linear.h).
enum class Kind : int64_t { plain = 0, int8 = 1, int4 = 2, tiles = 3, emulated_tiles = 4 };

// One packed weight. engines/linear/native_linear.py fills it, field by field.
struct Weight {
  const void* panels;
  const void* bias;  // [out] in the model's dtype, or null
  int64_t num_in, num_out;
  Kind kind;
  const float* scales;  // [panel][in / group, rounded up][kColumns], or null for plain
  int64_t group;        // inputs that share a scale, a multiple of what a `load` reads
};

template <typename T>
struct Pairs;

template <>
struct Pairs<float> {
  using Element = float;
  using Spread = Vec;
  static constexpr int kPair = 1;
  static float pack(const float* w) { return *w; }
  static Spread spread(const float* x) { return splat(*x); }
  static void add(Vec& acc, Spread x, Vec w) { acc += x * w; }
};

template <>
struct Pairs<bf16> {
  using Element = uint32_t;
  static constexpr int kPair = 2;
  static uint32_t pack(const bf16* pair) {
    uint32_t both;
    std::memcpy(&both, pair, sizeof both);
    return both;
  }
#if defined(__AVX512BF16__)
  using Spread = __m512bh;
  static Spread spread(const bf16* x) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(pack(x))); }
  static void add(Vec& acc, Spread x, Vec w) { acc = (Vec)_mm512_dpbf16_ps((__m512)acc, x, (__m512bh)w); }
#else
  struct Spread {
    Vec low, high;
  };
  static Spread spread(const bf16* x) { return {splat(to_float(x[0])), splat(to_float(x[1]))}; }
  static void add(Vec& acc, Spread x, Vec w) {
    acc += x.low * (Vec)((VecU)w << 16);
    acc += x.high * (Vec)((VecU)w & 0xffff0000u);
  }
#endif
};

inline int64_t num_panels(int64_t num_out) { return (num_out + kColumns - 1) / kColumns; }

// Elements of a panel: `num_in` is even for pairs (the caller pads).
template <typename T>
inline int64_t panel_size(int64_t num_in) {
  return num_in / Pairs<T>::kPair * kColumns;
}

// A format has kPairs, the pairs of inputs that one `load` gives; kUnitBytes, what it reads; whether it has scales.
template <typename T>
struct Plain {
  using Type = T;
  static constexpr int kPairs = 1, kUnitBytes = kColumns * static_cast<int>(sizeof(typename Pairs<T>::Element));
  static constexpr bool kHasScales = false;
  static void load(const char* unit, Vec (*to)[2]) {
    to[0][0] = load_words(unit);
    to[0][1] = load_words(unit + kUnitBytes / 2);
  }
};

// Numbers unpacked before, into the order of `Plain`.
template <typename T>
struct Unpacked : Plain<T> {
  static constexpr bool kHasScales = true;
};

// Lanes of small whole numbers -> floats.
inline Vec signed_magnitude(VecU byte) {
  return (Vec)((VecU)__builtin_convertvector((VecI)(byte & 127), Vec) | (byte & 128) << 24);
}

inline Vec from_nibble(VecU nibble) { return __builtin_convertvector((VecI)(nibble & 15) - 8, Vec); }

// Words of a unit -> what is multiplied. `decode` makes floats of what lies `shift` bits up in each word.
template <typename Decode>
inline Vec widen(const char* unit, int shift, float, Decode decode) {
  VecH words;
  std::memcpy(&words, unit, sizeof words);
  return decode(__builtin_convertvector(words, VecU) >> shift);
}

template <typename Decode>
inline Vec widen(const char* unit, int shift, bf16, Decode decode) {
  VecU words;
  std::memcpy(&words, unit, sizeof words);
  const VecU low = (VecU)decode((words & 0xffff) >> shift), high = (VecU)decode(words >> (16 + shift));
  return (Vec)(low >> 16 | high);
}

template <typename T>
struct Int8 {
  using Type = T;
  static constexpr int kPairs = 1, kUnitBytes = kColumns * Pairs<T>::kPair;
  static constexpr bool kHasScales = true;
  static void load(const char* unit, Vec (*to)[2]) {
    for (int half = 0; half < 2; half++)
      to[0][half] = widen(unit, 8 * half, T{}, [](VecU byte) { return signed_magnitude(byte); });
  }
};

template <typename T>
struct Int4 {
  using Type = T;
  static constexpr int kPairs = 2, kUnitBytes = kColumns * Pairs<T>::kPair;
  static constexpr bool kHasScales = true;
  static void load(const char* unit, Vec (*to)[2]) {
    for (int i = 0; i < 4; i++)
      to[i / 2][i % 2] = widen(unit, 4 * i, T{}, [](VecU nibble) { return from_nibble(nibble); });
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// bfloat16 of 0..127, its low bytes and its high bytes: looked up, since no instruction converts bytes.
template <int Byte>
constexpr std::array<uint8_t, 128> bytes_of_bfloat16() {
  std::array<uint8_t, 128> table{};
  for (int i = 1; i < 128; i++) {
    int exponent = 0;
    while (i >> (exponent + 1)) exponent++;
    const int bits = (127 + exponent) << 7 | (i << (7 - exponent) & 127);
    table[i] = static_cast<uint8_t>(bits >> (8 * Byte));
  }
  return table;
}

alignas(64) inline constexpr auto kLowBytes = bytes_of_bfloat16<0>();
alignas(64) inline constexpr auto kHighBytes = bytes_of_bfloat16<1>();

template <>
inline void Int8<bf16>::load(const char* unit, Vec (*to)[2]) {
  const __m512i bytes = _mm512_loadu_si512(unit), mask = _mm512_set1_epi16(0x00ff);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kLowBytes.data()), bytes,
                                               _mm512_load_si512(kLowBytes.data() + 64));
  const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(kHighBytes.data()), bytes,
                                                     _mm512_load_si512(kHighBytes.data() + 64));
  // magnitude | (bytes & 0x80), then the two bytes of each half side by side: a ? b : c is 0xca
  const __m512i high = _mm512_ternarylogic_epi32(magnitude, bytes, _mm512_set1_epi8(-128), 0xf8);
  to[0][0] = (Vec)_mm512_ternarylogic_epi32(mask, low, _mm512_slli_epi16(high, 8), 0xca);
  to[0][1] = (Vec)_mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 8), high, 0xca);
}
#endif

#if defined(__AVX512BF16__)
// bfloat16 of -8..7, twice: the look-up reads five bits of a word, the fifth of which is the next nibble's.
constexpr std::array<uint16_t, 32> bfloat16_of_nibbles() {
  std::array<uint16_t, 32> table{};
  for (int i = 0; i < 32; i++) {
    const int value = i % 16 - 8, size = value < 0 ? -value : value;
    if (!size) continue;
    int exponent = 0;
    while (size >> (exponent + 1)) exponent++;
    table[i] = static_cast<uint16_t>((value < 0) << 15 | (127 + exponent) << 7 | (size << (7 - exponent) & 127));
  }
  return table;
}

alignas(64) inline constexpr auto kNibbles = bfloat16_of_nibbles();

template <>
inline void Int4<bf16>::load(const char* unit, Vec (*to)[2]) {
  const __m512i words = _mm512_loadu_si512(unit), table = _mm512_load_si512(kNibbles.data());
  to[0][0] = (Vec)_mm512_permutexvar_epi16(words, table);
  to[0][1] = (Vec)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
  to[1][0] = (Vec)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
  to[1][1] = (Vec)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
}
#endif

}  // namespace celeriac
