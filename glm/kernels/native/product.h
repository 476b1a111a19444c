// What a weight is, and arithmetic that every instruction set has.
#pragma once
#include <cstdint>
#include <cstring>

constexpr int64_t kRows = 32;   // rows of a weight that lie together
constexpr int64_t kLanes = 16;  // half of them, computed side by side
constexpr int64_t kGroup = 32;  // columns that share a scale

// Of int8 that need not be exact: up to so many tokens activations have two bytes, where the instruction set makes a
// choice, and one in longer prompts, which take half the time so.
constexpr int64_t kMostOfTwoTerms = 64;

inline int64_t num_groups(int64_t columns) { return (columns + kGroup - 1) / kGroup; }
inline int64_t num_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }

// A weight [rows, columns]. Mirrored by native.py.
//
// bf16 lies row by row. Integers lie in the order of use, as [block of 32 rows][group of 32 columns] of records:
// [4 columns][half of the rows][16 rows][column] as unsigned bytes, 128 more than the weight, so that a vector holds 4
// columns of 16 rows; then, if groups have scales, these in fp16. Four-bit integers, 8 more than the weight, share a
// byte with those 16 columns on: the first in the low half. Rows and columns are padded.
struct Weight {
    const uint8_t *values;
    const float *scales;  // [block][row], null where they are in the records, and in bf16
    const void *bias;     // [rows] in the dtype of the output, or null
    int64_t rows;
    int64_t columns;
    int32_t bits;      // 4, 8, or 16 for bf16
    int32_t is_exact;  // of integers: whether an activation is taken as exactly as fp32 has it

    bool grouped() const { return !scales; }
    int64_t integer_bytes() const { return kRows * kGroup * bits / 8; }  // of a record
    int64_t record_bytes() const { return integer_bytes() + (grouped() ? kRows * 2 : 0); }
    int64_t block_bytes() const {
        return bits == 16 ? kRows * columns * 2 : num_groups(columns) * record_bytes();
    }
    const uint8_t *record(int64_t block, int64_t group) const {
        return values + block * block_bytes() + group * record_bytes();
    }
    const uint16_t *group_scales(const uint8_t *record) const {
        return reinterpret_cast<const uint16_t *>(record + integer_bytes());
    }
};

// out [num_tokens, rows] = x [num_tokens, columns] times the weight, plus its bias: x and out in bf16 for a bf16 weight,
// else in fp32. All are contiguous; a row of `out` depends on its row of `x` alone, not on how many there are.
void multiply(const Weight &w, const void *x, int64_t num_tokens, void *out, int num_threads);

// fp16 scales of `count` rows; subnormal ones too, but neither infinity nor NaN.
inline void widen_scales(const uint16_t *halves, int64_t count, float *out) {
    for (int64_t row = 0; row < count; ++row) {
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
