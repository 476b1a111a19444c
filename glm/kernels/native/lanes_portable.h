// Plain loops over 16 rows, which compilers vectorise; activations and sums in fp32.
#pragma once
#include <algorithm>

#include "product.h"

template <int Bits, bool Grouped, int>
struct Integers {
    using Scalar = float;
    using Activation = float;

    static int64_t activations(int64_t columns) { return num_groups(columns) * kGroup; }

    static void prepare(const float *x, int64_t columns, float *out) {
        std::copy(x, x + columns, out);
        std::fill(out + columns, out + activations(columns), 0.0f);
    }

    // sums[row] += weight of one column of 16 rows, times x.
    static void add_column(const uint32_t *lanes, int shift, float x, float *sums) {
        constexpr int mask = Bits == 4 ? 15 : 255, offset = Bits == 4 ? 8 : 128;
        for (int row = 0; row < kRows; ++row)
            sums[row] = multiply_add(float(int(lanes[row] >> shift & mask) - offset), x, sums[row]);
    }

    template <int Tokens>
    static void block(const Weight &w, int64_t block, const float *x, float (&result)[Tokens][kRows]) {
        const int64_t groups = num_groups(w.columns), stride = activations(w.columns);
        const uint8_t *values = w.block(block);
        for (auto &sums : result) std::fill(sums, sums + kRows, 0.0f);
        for (int64_t g = 0; g < groups; ++g, x += kGroup) {
            alignas(64) float sums[Tokens][kRows] = {};
            for (int column = 0; column < kGroup; column += Bits == 4 ? 8 : 4, values += 4 * kRows) {
                alignas(64) uint32_t lanes[kRows];
                std::memcpy(lanes, values, sizeof lanes);
                for (int shift = 0; shift < 32; shift += Bits) {
                    const int place = Bits == 8 ? column + shift / 8 : column / 2 + shift / 8 + (shift & 4 ? 16 : 0);
                    for (int t = 0; t < Tokens; ++t) add_column(lanes, shift, x[t * stride + place], sums[t]);
                }
            }
            float scales[kRows];
            for (int row = 0; row < kRows; ++row)
                scales[row] = Grouped ? half_to_float(w.group_scales(block, g)[row]) : 1;
            for (int t = 0; t < Tokens; ++t)
                for (int row = 0; row < kRows; ++row) 
                    result[t][row] = multiply_add(sums[t][row], scales[row], result[t][row]);
        }
        if (!Grouped)
            for (auto &sums : result)
                for (int row = 0; row < kRows; ++row) sums[row] *= w.row_scales(block)[row];
    }
};

inline float widened(float value) { return value; }
inline float widened(uint16_t value) { return bf16_to_float(value); }

// Sixteen sums side by side.
template <class Scalar>
inline float dot(const float *x, const Scalar *values, int64_t count) {
    float sums[16] = {}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int lane = 0; lane < 16; ++lane)
            sums[lane] = multiply_add(widened(values[i + lane]), x[i + lane], sums[lane]);
    for (; i < count; ++i) sum = multiply_add(widened(values[i]), x[i], sum);
    for (float part : sums) sum += part;
    return sum;
}

struct Halves {
    using Scalar = uint16_t;
    using Activation = float;

    static int64_t activations(int64_t columns) { return columns; }

    static void prepare(const uint16_t *x, int64_t columns, float *out) {
        for (int64_t i = 0; i < columns; ++i) out[i] = bf16_to_float(x[i]);
    }

    template <int Tokens>
    static void block(const Weight &w, int64_t block, const float *x, float (&result)[Tokens][kRows]) {
        for (int64_t r = 0; r < kRows; ++r) {
            const int64_t row = std::min(block * kRows + r, w.rows - 1);
            const uint16_t *values = reinterpret_cast<const uint16_t *>(w.values) + row * w.columns;
            for (int t = 0; t < Tokens; ++t) result[t][r] = dot(x + t * w.columns, values, w.columns);
        }
    }
};
