// What a weight is, and arithmetic that every instruction set has.
#pragma once
#include <cstdint>
#include <cstring>

constexpr int64_t kRows = 16;   // rows of a weight that are computed together
constexpr int64_t kGroup = 32;  // columns that share a scale

inline int64_t num_groups(int64_t columns) { return (columns + kGroup - 1) / kGroup; }
inline int64_t num_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }

// A weight [rows, columns]. Mirrored by native.py.
//
// bf16 lies row by row. Integers lie so that a vector holds 4 columns of 16 rows: [block of 16 rows][group of 32
// columns][4 columns][row][column], as unsigned bytes, 128 more than the weight; rows and columns are padded. Four-bit
// integers, 8 more than the weight, share a byte with those 16 columns on: the first in the low half.
struct Weight {
    const uint8_t *values;
    const void *scales;  // grouped: fp16 [block][group][row], else fp32 [block][row]; none in bf16
    const void *bias;    // [rows] in the dtype of the output, or null
    int64_t rows;
    int64_t columns;
    int32_t bits;  // 4, 8, or 16 for bf16
    int32_t grouped;

    int64_t block_bytes() const {
        return bits == 16 ? kRows * columns * 2 : kRows * num_groups(columns) * kGroup * bits / 8;
    }
    const uint8_t *block(int64_t index) const { return values + index * block_bytes(); }
    const float *row_scales(int64_t block) const { return static_cast<const float *>(scales) + block * kRows; }
    const uint16_t *group_scales(int64_t block, int64_t group) const {
        return static_cast<const uint16_t *>(scales) + (block * num_groups(columns) + group) * kRows;
    }
};

// fp16 scales of 16 rows; subnormal ones too, but neither infinity nor NaN.
inline void widen_scales(const uint16_t *halves, float *out) {
    for (int row = 0; row < kRows; ++row) {
        const uint32_t half = halves[row], magnitude = (half & 0x7fff) << 13;
        float value;
        std::memcpy(&value, &magnitude, 4);
        value *= 5.192296858534828e33f;  // 2^112
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits |= (half & 0x8000) << 16;
        std::memcpy(out + row, &bits, 4);
    }
}

inline float bf16_to_float(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // NaN
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Said explicitly, so that every number of tokens is rounded alike (setup.py turns contraction off).
inline float multiply_add(float a, float b, float sum) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, sum);
#else
    return a * b + sum;
#endif
}
