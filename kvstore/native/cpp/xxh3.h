// xxh3_64 (seed 0) of inputs longer than 240 bytes, in pieces that a copy can be woven into.
//
// After the XXH3 chapter of the xxHash specification: eight 64-bit lanes take in stripes of 64 bytes, and are stirred
// after every 16. The lanes fit one AVX-512 register or two of AVX2, so this hides behind the loads of a copy.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace xxh3 {

constexpr int64_t STRIPE = 64, STRIPES = 16, BLOCK = STRIPE * STRIPES, SECRET_BYTES = 192;
constexpr uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9,
                   P64_4 = 0x85EBCA77C2B2AE63, P64_5 = 0x27D4EB2F165667C5;

alignas(64) constexpr uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

inline uint64_t read64(const void* from) {
    uint64_t value;
    std::memcpy(&value, from, 8);
    return value;
}

#if defined(__AVX512F__)

struct Stripe {
    __m512i v;
    static Stripe load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
    void store(uint8_t* to) const { _mm512_storeu_si512(to, v); }
    void stream(uint8_t* to) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v); }
};
inline void fence() { _mm_sfence(); }

struct Lanes {
    __m512i v = _mm512_set_epi64(P32_1, P64_5, P32_2, P64_4, P64_3, P64_2, P64_1, P32_3);
    void take(const Stripe& in, const uint8_t* secret) {
        const __m512i key = _mm512_xor_si512(in.v, _mm512_loadu_si512(secret));
        const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
        v = _mm512_add_epi64(v, _mm512_add_epi64(product, _mm512_shuffle_epi32(in.v, _MM_PERM_BADC)));
    }
    void stir(const uint8_t* secret) {
        const __m512i x = _mm512_xor_si512(_mm512_xor_si512(v, _mm512_srli_epi64(v, 47)), _mm512_loadu_si512(secret));
        const __m512i prime = _mm512_set1_epi64(P32_1);
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), prime);
        v = _mm512_add_epi64(_mm512_mul_epu32(x, prime), _mm512_slli_epi64(high, 32));
    }
    void get(uint64_t* to) const { _mm512_storeu_si512(to, v); }
};

#elif defined(__AVX2__)

struct Stripe {
    __m256i a, b;
    static Stripe load(const uint8_t* from) {
        const auto* p = reinterpret_cast<const __m256i*>(from);
        return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
    }
    void store(uint8_t* to) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, b);
    }
    void stream(uint8_t* to) const {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), a);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, b);
    }
};
inline void fence() { _mm_sfence(); }

struct Lanes {
    __m256i a = _mm256_set_epi64x(P64_3, P64_2, P64_1, P32_3), b = _mm256_set_epi64x(P32_1, P64_5, P32_2, P64_4);
    static __m256i taken(__m256i lanes, __m256i in, const uint8_t* secret) {
        const __m256i key = _mm256_xor_si256(in, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
        const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
        return _mm256_add_epi64(lanes, _mm256_add_epi64(product, _mm256_shuffle_epi32(in, _MM_SHUFFLE(1, 0, 3, 2))));
    }
    static __m256i stirred(__m256i lanes, const uint8_t* secret) {
        const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret));
        const __m256i x = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), key);
        const __m256i prime = _mm256_set1_epi64x(P32_1);
        const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
        return _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
    }
    void take(const Stripe& in, const uint8_t* secret) {
        a = taken(a, in.a, secret), b = taken(b, in.b, secret + 32);
    }
    void stir(const uint8_t* secret) { a = stirred(a, secret), b = stirred(b, secret + 32); }
    void get(uint64_t* to) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, b);
    }
};

#else

struct Stripe {
    uint64_t v[8];
    static Stripe load(const uint8_t* from) {
        Stripe stripe;
        std::memcpy(stripe.v, from, STRIPE);
        return stripe;
    }
    void store(uint8_t* to) const { std::memcpy(to, v, STRIPE); }
    void stream(uint8_t* to) const { store(to); }
};
inline void fence() {}

struct Lanes {
    uint64_t v[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    void take(const Stripe& in, const uint8_t* secret) {
        for (int i = 0; i < 8; ++i) {
            const uint64_t key = in.v[i] ^ read64(secret + 8 * i);
            v[i ^ 1] += in.v[i];
            v[i] += (key & 0xFFFFFFFF) * (key >> 32);
        }
    }
    void stir(const uint8_t* secret) {
        for (int i = 0; i < 8; ++i) v[i] = (v[i] ^ (v[i] >> 47) ^ read64(secret + 8 * i)) * P32_1;
    }
    void get(uint64_t* to) const { std::memcpy(to, v, STRIPE); }
};

#endif

inline uint64_t fold(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t finish(const Lanes& lanes, int64_t length) {
    uint64_t v[8], result = static_cast<uint64_t>(length) * P64_1;
    lanes.get(v);
    for (int i = 0; i < 4; ++i)
        result += fold(v[2 * i] ^ read64(SECRET + 11 + 16 * i), v[2 * i + 1] ^ read64(SECRET + 19 + 16 * i));
    result ^= result >> 37;
    result *= 0x165667919E3779F9;
    return result ^ (result >> 32);
}

}  // namespace xxh3
