// Vectors as GCC and Clang have them on every processor; activations and sums in fp32.
#pragma once
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>

#include "product.h"

#ifdef __AVX2__
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;    // vectors that hold one number for each of 16 rows
constexpr int kAtOnce = kWidth == 8 ? 4 : 2;  // tokens whose sums fit the registers

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kWidth)));

template <class Vector>
inline Vector load(const void *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats add_product(Floats sum, Floats a, Floats b) {
#ifdef __AVX2__
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

template <int Bits, bool Grouped, int>
struct Integers {
    using Scalar = float;
    using Activation = float;
    using Sum = float;
    static constexpr int kMostTokens = 8, kPanel = kRows;
    static constexpr int64_t kDepth = int64_t(1) << 40;  // never in parts

    static int64_t activations(int64_t columns) { return num_groups(columns) * kGroup; }

    static void prepare(const float *x, int64_t columns, float *out) {
        std::copy(x, x + columns, out);
        std::fill(out + columns, out + activations(columns), 0.0f);
    }

    template <int Tokens>
    static void panel(const Weight &w, int64_t row, const float *x, Columns, Sum *, float (&result)[Tokens][kPanel]) {
        constexpr int at_once = std::min(Tokens, kAtOnce);
        for (int half = 0; half < 2; ++half)
            for (int t = 0; t < Tokens; t += at_once)
                few<at_once>(w, row / kRows, half, x + t * activations(w.columns), result + t);
    }

    template <int Tokens>
    static void few(const Weight &w, int64_t block, int half, const float *x, float (*result)[kRows]) {
        const int64_t groups = num_groups(w.columns), stride = activations(w.columns), row = half * kLanes;
        Floats totals[Tokens][kParts] = {};
        for (int64_t g = 0; g < groups; ++g, x += kGroup) {
            const uint8_t *record = w.record(block, g), *values = record + 64 * half;
            Floats sums[Tokens][kParts] = {};
            for (int i = 0; i < Bits; ++i) {
                __builtin_prefetch(values + 128 * i + 2048);
                four_bytes<Tokens>(values + 128 * i, x + 4 * i, stride, sums);
            }
            float scales[kLanes];
            for (int lane = 0; lane < kLanes; ++lane)
                scales[lane] = Grouped ? to_float(w.group_scales(record)[row + lane]) : 1.0f;
            for (int t = 0; t < Tokens; ++t)
                for (int part = 0; part < kParts; ++part)
                    totals[t][part] = add_product(totals[t][part], sums[t][part], load<Floats>(scales + part * kWidth));
        }
        for (int t = 0; t < Tokens; ++t)
            for (int part = 0; part < kParts; ++part) {
                if (!Grouped) totals[t][part] *= load<Floats>(w.scales + block * kRows + row + part * kWidth);
                std::memcpy(result[t] + row + part * kWidth, &totals[t][part], sizeof(Floats));
            }
    }

    // Four bytes of each of 16 rows: four columns, and in int4 those 16 columns on.
    template <int Tokens>
    static void four_bytes(const uint8_t *values, const float *x, int64_t stride, Floats (&sums)[Tokens][kParts]) {
        Words words[kParts];
        for (int part = 0; part < kParts; ++part) words[part] = load<Words>(values + part * sizeof(Words));
#pragma GCC unroll 8
        for (int shift = 0; shift < 32; shift += Bits) {
            const int column = shift / 8 + (Bits == 4 && shift % 8 ? 16 : 0);
            for (int part = 0; part < kParts; ++part) {
                const Ints integers = Ints(words[part] >> shift & (Bits == 4 ? 15 : 255)) - (Bits == 4 ? 8 : 128);
                const Floats weights = __builtin_convertvector(integers, Floats);
                for (int t = 0; t < Tokens; ++t)
                    sums[t][part] = add_product(sums[t][part], weights, Floats{} + x[t * stride + column]);
            }
        }
    }
};

inline Floats widened(const float *values) { return load<Floats>(values); }
inline Floats widened(const Bf16 *values) {
    return (Floats)(__builtin_convertvector(load<Shorts>(values), Words) << 16);
}
inline Floats widened(const Fp16 *values) {
#ifdef __AVX2__
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(values)));
#else
    Floats wide;
    for (int i = 0; i < kWidth; ++i) wide[i] = to_float(values[i]);
    return wide;
#endif
}

// Four vectors of sums side by side.
template <class Scalar>
inline float dot(const float *x, const Scalar *values, int64_t count) {
    Floats sums[4] = {};
    float sum = 0;
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth)
        for (int part = 0; part < 4; ++part)
            sums[part] =
                add_product(sums[part], widened(values + i + part * kWidth), load<Floats>(x + i + part * kWidth));
    for (; i < count; ++i) sum += to_float(values[i]) * x[i];
    const Floats all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < kWidth; ++lane) sum += all[lane];
    return sum;
}

// out[r * stride + p] = the dot product of x[r] and keys[p], for some rows of x [.., size] and `count` keys [.., size].
template <int Rows, class Scalar>
inline void dots(const float *x, const Scalar *keys, int64_t count, int64_t size, float *out, int64_t stride) {
    for (int64_t p = 0; p < count; ++p)
        for (int r = 0; r < Rows; ++r) out[r * stride + p] = dot(x + r * size, keys + p * size, size);
}

// Weights that are no integers, row by row. A sum has a part for each lane, over all columns in order: so each tile of
// rows by tokens gives the same bits.
template <class Number>
struct Dense {
    using Scalar = Number;
    using Activation = float;
    using Sum = Floats;
    static constexpr int kMostTokens = 4, kPanel = 4;
    static constexpr int64_t kDepth = 4096;

    static int64_t activations(int64_t columns) { return (columns + kWidth - 1) / kWidth * kWidth; }

    static void prepare(const Scalar *x, int64_t columns, float *out) {
        for (int64_t i = 0; i < columns; ++i) out[i] = to_float(x[i]);
        std::fill(out + columns, out + activations(columns), 0.0f);
    }

    template <int Tokens>
    static void panel(const Weight &w, int64_t row, const float *x, Columns columns, Sum *carried,
                      float (&result)[Tokens][kPanel]) {
        constexpr int together = Tokens == 1 ? 4 : 2;  // whose sums fit the registers
        for (int r = 0; r < kPanel; r += together)
            tile<Tokens, together>(w, row + r, x, columns, carried + r, &result[0][r]);
    }

    template <int Tokens, int Together>
    static void tile(const Weight &w, int64_t first, const float *x, Columns columns, Sum *carried, float *result) {
        const Scalar *rows[Together];
        for (int r = 0; r < Together; ++r)  // behind the last row: that one again
            rows[r] = reinterpret_cast<const Scalar *>(w.values) + std::min(first + r, w.rows - 1) * w.columns;
        const int64_t stride = activations(w.columns), whole = w.columns / kWidth * kWidth;
        Floats sums[Tokens][Together] = {};
        if (columns.start)
            for (int t = 0; t < Tokens; ++t) std::copy_n(carried + t * kPanel, Together, sums[t]);
        const auto step = [&](const Scalar *const(&values)[Together], const float *activations) {
            for (int r = 0; r < Together; ++r) {
                const Floats weights = widened(values[r]);
                for (int t = 0; t < Tokens; ++t)
                    sums[t][r] = add_product(sums[t][r], weights, load<Floats>(activations + t * stride));
            }
        };
        const Scalar *at[Together];
        for (int64_t i = columns.start; i < std::min(columns.end, whole); i += kWidth) {
            for (int r = 0; r < Together; ++r) at[r] = rows[r] + i;
            step(at, x + i);
        }
        if (columns.end < stride) {
            for (int t = 0; t < Tokens; ++t) std::copy_n(sums[t], Together, carried + t * kPanel);
            return;
        }
        if (whole < w.columns) {
            Scalar edges[Together][kWidth] = {};
            for (int r = 0; r < Together; ++r)
                at[r] = std::copy(rows[r] + whole, rows[r] + w.columns, edges[r]) - (w.columns - whole);
            step(at, x + whole);
        }
        for (int t = 0; t < Tokens; ++t)
            for (int r = 0; r < Together; ++r) {
                float sum = 0;
                for (int lane = 0; lane < kWidth; ++lane) sum += sums[t][r][lane];
                result[t * kPanel + r] = sum;
            }
    }
};

// sums[r][i] += the sum over p of scores[r * stride + p] * values[p * size + i], one p after the other, for some rows and
// all i < size.
template <int Rows, class Scalar>
inline void weighted_sums(const float *scores, int64_t stride, const Scalar *values, int64_t length, int64_t size,
                          float *sums) {
    for (int r = 0; r < Rows; ++r)
        for (int64_t p = 0; p < length; ++p)
            for (int64_t i = 0; i < size; ++i)
                sums[r * size + i] =
                    multiply_add(scores[r * stride + p], to_float(values[p * size + i]), sums[r * size + i]);
}
