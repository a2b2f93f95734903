// Rows of KV values to one byte each with a scale per row, and back. The same IEEE operations, one by one, as the numpy
// of compress.py: both ends must come to the same bytes, whichever of the two they have. No -ffast-math here.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

enum Dtype { BFLOAT16 = 0, FLOAT16 = 1, FLOAT32 = 2 };
constexpr int64_t MAX_DIM = 4096;

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even; a NaN stays one
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

inline void load(const void* words, int dtype, int64_t at, int64_t dim, float* row) {
    if (dtype == BFLOAT16) {
        const uint16_t* from = static_cast<const uint16_t*>(words) + at;
        for (int64_t i = 0; i < dim; ++i) row[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
    } else {
        std::memcpy(row, static_cast<const float*>(words) + at, dim * sizeof(float));
    }
}

}  // namespace

extern "C" {

// `table`: e4m3 byte of each bfloat16, or null for int8. Returns 1 and does nothing if a row is too long.
int compress_rows(const void* words, int dtype, int64_t rows, int64_t dim, float inverse, const uint8_t* table,
                  uint8_t* scales, uint8_t* out) {
    if (dim > MAX_DIM || dtype == FLOAT16) return 1;
    float row[MAX_DIM];
    for (int64_t r = 0; r < rows; ++r, out += dim) {
        load(words, dtype, r * dim, dim, row);
        uint32_t largest = 0;  // by bits, so that a NaN is the largest of all
        for (int64_t i = 0; i < dim; ++i) {
            const uint32_t bits = as_bits(row[i]) & 0x7FFFFFFFu;
            largest = bits > largest ? bits : largest;
        }
        const float scale = as_float(largest) * inverse;
        std::memcpy(scales + 4 * r, &scale, 4);
        const float divisor = scale > 0 ? scale : 1.0f;
        for (int64_t i = 0; i < dim; ++i) {
            const float value = row[i] / divisor;
            row[i] = value == value ? value : 0.0f;
        }
        if (table != nullptr) {
            for (int64_t i = 0; i < dim; ++i) out[i] = table[to_bfloat16(row[i])];
        } else {
            for (int64_t i = 0; i < dim; ++i) {
                const float low = row[i] < -127.0f ? -127.0f : row[i];
                out[i] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(low > 127.0f ? 127.0f : low))));
            }
        }
    }
    return 0;
}

// `table`: value of each e4m3 byte, or null for int8.
int expand_rows(const uint8_t* scales, const uint8_t* values, int dtype, int64_t rows, int64_t dim, const float* table,
                void* words) {
    if (dim > MAX_DIM || dtype == FLOAT16) return 1;
    float row[MAX_DIM];
    for (int64_t r = 0; r < rows; ++r, values += dim) {
        float scale;
        std::memcpy(&scale, scales + 4 * r, 4);
        if (table != nullptr) {
            for (int64_t i = 0; i < dim; ++i) row[i] = table[values[i]] * scale;
        } else {
            for (int64_t i = 0; i < dim; ++i) row[i] = static_cast<float>(static_cast<int8_t>(values[i])) * scale;
        }
        if (dtype == BFLOAT16) {
            uint16_t* to = static_cast<uint16_t*>(words) + r * dim;
            for (int64_t i = 0; i < dim; ++i) to[i] = to_bfloat16(row[i]);
        } else {
            std::memcpy(static_cast<float*>(words) + r * dim, row, dim * sizeof(float));
        }
    }
    return 0;
}

}  // extern "C"
