// What a weight is, and arithmetic that every instruction set has.
#pragma once
#include <cstdint>
#include <cstring>

constexpr int64_t kRows = 32;   // rows of a weight that lie together
constexpr int64_t kLanes = 16;  // half of them, computed side by side
constexpr int64_t kGroup = 32;  // columns that share a scale

inline int64_t num_groups(int64_t columns) { return (columns + kGroup - 1) / kGroup; }
inline int64_t num_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }

// Of activations, and of weights that are no integers. Mirrored by native.py.
enum ScalarType : int32_t { kFloat, kBf16, kFp16 };

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

// A weight [rows, columns]. Mirrored by native.py.
//
// fp32, bf16 and fp16 lie row by row. Integers lie in the order of use, as [block of 32 rows][group of 32 columns] of records:
// [4 columns][half of the rows][16 rows][column] as unsigned bytes, 128 more than the weight, so that a vector holds 4
// columns of 16 rows; then, if groups have scales, these in fp16. Four-bit integers, 8 more than the weight, share a
// byte with those 16 columns on: the first in the low half. Rows and columns are padded.
struct Weight {
    const uint8_t *values;
    const float *scales;  // [block][row], null where they are in the records, and where there are none
    const void *bias;     // [rows] in the dtype of the output, or null
    int64_t rows;
    int64_t columns;
    int32_t bits;      // 4 or 8 for integers, 16 or 32
    int32_t type;      // a ScalarType: of what comes in and goes out; of integers fp32
    int32_t is_exact;  // of integers: whether an activation is taken as exactly as fp32 has it

    bool grouped() const { return !scales; }
    int64_t integer_bytes() const { return kRows * kGroup * bits / 8; }  // of a record
    int64_t record_bytes() const { return integer_bytes() + (grouped() ? kRows * 2 : 0); }
    int64_t block_bytes() const {
        return bits >= 16 ? kRows * columns * bits / 8 : num_groups(columns) * record_bytes();
    }
    const uint8_t *record(int64_t block, int64_t group) const {
        return values + block * block_bytes() + group * record_bytes();
    }
    const Fp16 *group_scales(const uint8_t *record) const {
        return reinterpret_cast<const Fp16 *>(record + integer_bytes());
    }
};

// Of the activations of a token, the part that is multiplied.
struct Columns {
    int64_t start, end;
};

// out [num_tokens, rows] = x [num_tokens, columns] times the weight, plus its bias, all of the weight's type and
// contiguous. A row of `out` depends on its row of `x` alone, bit for bit: each sum has an order of its own, whatever is
// computed beside it.
void multiply(const Weight &w, const void *x, int64_t num_tokens, void *out, int num_threads);

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

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) { return as_float(uint32_t(value.bits) << 16); }
inline float to_float(Fp16 value) {
    const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
    uint32_t bits = as_bits(as_float(magnitude) * 5.192296858534828e33f);  // 2^112
    bits |= magnitude >= 0x0f800000 ? 0x7f800000 : 0;                      // infinity, NaN
    return as_float(bits | uint32_t(value.bits & 0x8000) << 16);
}

// Rounds to nearest, ties to even; in a form that compilers vectorise.
inline void put(float value, float &out) { out = value; }
inline void put(float value, Bf16 &out) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = bits >> 16 | 0x40;
    out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}
inline void put(float value, Fp16 &out) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14: beside 0.5 the last place is that of the result. From 2^16 on: infinity, or NaN.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    out.bits = uint16_t((magnitude >= 0x47800000 ? infinite : finite) | (bits >> 16 & 0x8000));
}

// Said explicitly, so that every number of tokens is rounded alike (setup.py turns contraction off).
inline float multiply_add(float a, float b, float sum) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, sum);
#else
    return a * b + sum;
#endif
}
