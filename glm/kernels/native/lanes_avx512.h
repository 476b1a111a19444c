// AVX-512 with VNNI: activations as one to three signed bytes each, multiplied exactly by unsigned (offset) weights.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "product.h"

// For one token, of each four lines one is asked for, so many bytes ahead of use, into the second cache: enough to keep
// the processor's own prefetching going while its arithmetic is busy. Asking for all of them stalls it.
constexpr int64_t kAhead = 8192;

// 32 activations of one token: value = scale * (65536 * bytes[2] + 256 * bytes[1] + bytes[0]), as many of the last of
// these as there are Terms. `start` takes back what the weights' offset of 8 or 128 adds to the products: [0] for the two
// lowest bytes, [1] for the highest.
template <int Terms>
struct Group {
    int8_t bytes[Terms][kGroup];
    int32_t start[2];
    float scale;
};

template <int Offset, int Terms>
inline void prepare_group(__m512 first, __m512 second, Group<Terms> &out) {
    constexpr float largest = Terms == 3 ? 127 * 65536 : Terms == 2 ? 127 * 256 : 127;
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
    const __m512 inverse = _mm512_set1_ps(top > 0 ? largest / top : 0);
    __m512i low_sum = _mm512_setzero_si512(), high_sum = low_sum;
    for (int half = 0; half < 2; ++half) {
        __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(half ? second : first, inverse));
        for (int term = 0; term < Terms; ++term) {
            const __m512i next = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8);
            const __m512i byte = term == Terms - 1 ? rest : _mm512_sub_epi32(rest, _mm512_slli_epi32(next, 8));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(out.bytes[term] + 16 * half), _mm512_cvtepi32_epi8(byte));
            if (term < 2)
                low_sum = _mm512_add_epi32(low_sum, term ? _mm512_slli_epi32(byte, 8) : byte);
            else
                high_sum = _mm512_add_epi32(high_sum, byte);
            rest = next;
        }
    }
    out.start[0] = -Offset * _mm512_reduce_add_epi32(low_sum);
    out.start[1] = -Offset * _mm512_reduce_add_epi32(high_sum);
    const bool is_nan = _mm512_cmp_ps_mask(first, second, _CMP_UNORD_Q);  // which max does not tell
    out.scale = is_nan ? std::numeric_limits<float>::quiet_NaN() : top / largest;
}

inline void ask_for(const void *used_now, int64_t ahead) {
    _mm_prefetch(static_cast<const char *>(used_now) + ahead, _MM_HINT_T1);
}

inline __m512i four(const int8_t *bytes) {
    int32_t word;
    std::memcpy(&word, bytes, 4);
    return _mm512_set1_epi32(word);
}

template <int Bits, bool Grouped, int Terms>
struct Integers {
    using Scalar = float;
    using Activation = Group<Terms>;
    using Sum = float;
    static constexpr int kMostTokens = 8, kPanel = kRows;
    static constexpr int64_t kDepth = int64_t(1) << 40;  // never in parts

    static int64_t activations(int64_t columns) { return num_groups(columns); }

    static void prepare(const float *x, int64_t columns, Activation *out) {
        for (int64_t i = 0; i < columns; i += kGroup) {
            const auto load = [&](int64_t place) {
                const int64_t left = std::clamp<int64_t>(columns - place, 0, 16);
                return _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), x + place);
            };
            prepare_group<Bits == 4 ? 8 : 128>(load(i), load(i + 16), *out++);
        }
    }

    // The order of sums does not depend on the number of tokens. One takes all rows of a record at once, so that a
    // vector of activations is loaded for two of weights: loads are what limits. Several have no registers for that.
    template <int Tokens>
    static void panel(const Weight &w, int64_t row, const Activation *x, Columns, Sum *, float (&result)[Tokens][kPanel]) {
        if constexpr (Tokens == 1) {
            halves<Tokens, 2>(w, row / kRows, 0, x, result);
        } else {
            halves<Tokens, 1>(w, row / kRows, 0, x, result);
            halves<Tokens, 1>(w, row / kRows, 1, x, result);
        }
    }

    template <int Tokens, int Halves>
    static void halves(const Weight &w, int64_t block, int first, const Activation *x, float (&result)[Tokens][kRows]) {
        const int64_t groups = num_groups(w.columns);
        constexpr int64_t half_bytes = 64 * Bits, record_bytes = 2 * half_bytes + (Grouped ? kRows * 2 : 0);
        const int64_t block_bytes = groups * record_bytes;
        const uint8_t *record = w.record(block, 0);
        __m512 sums[Halves][Tokens];
        for (auto &half : sums)
            for (auto &sum : half) sum = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g, ++x, record += record_bytes) {
            __m512i weights[Halves][8];
            __m512 scales[Halves];
            for (int h = 0; h < Halves; ++h) {
                const uint8_t *lines = record + 64 * (first + h);  // the halves' take turns
                load(lines, weights[h]);
                if (Tokens == 1 && h == 0)
                    for (int64_t at = 0; at < 2 * half_bytes; at += 256) ask_for(record + at, kAhead);
                if (Tokens > 1)  // time enough for the next block, as it will be used
                    for (int64_t at = 0; at < 2 * half_bytes; at += 128) ask_for(lines + at, block_bytes);
                if (Grouped && Tokens > 1 && first == 0) ask_for(record + 2 * half_bytes, block_bytes);
                if (Grouped)
                    scales[h] = _mm512_cvtph_ps(_mm256_loadu_si256(
                        reinterpret_cast<const __m256i *>(record + 2 * half_bytes + (first + h) * kLanes * 2)));
            }
            for (int t = 0; t < Tokens; ++t) {
                const Activation &a = x[t * groups];
                __m512 totals[Halves];
                add_up<Halves>(weights, a, totals);
                const __m512 scale = _mm512_set1_ps(a.scale);
                for (int h = 0; h < Halves; ++h)
                    sums[h][t] =
                        _mm512_fmadd_ps(totals[h], Grouped ? _mm512_mul_ps(scales[h], scale) : scale, sums[h][t]);
            }
        }
        for (int h = 0; h < Halves; ++h) {
            const int64_t row = (first + h) * kLanes;
            const __m512 scales = Grouped ? _mm512_set1_ps(1) : _mm512_loadu_ps(w.scales + block * kRows + row);
            for (int t = 0; t < Tokens; ++t) _mm512_storeu_ps(result[t] + row, _mm512_mul_ps(sums[h][t], scales));
        }
    }

    // The weights of 16 rows and 32 columns, 4 columns to a vector, from every other line of a record. Of int4, the vectors from 4 on hold 16 times the
    // weight: taking that from a sum costs less than from each vector.
    static void load(const uint8_t *values, __m512i (&weights)[8]) {
        const __m512i low = _mm512_set1_epi8(0x0f);
        for (int i = 0; i < Bits; ++i) {
            const __m512i packed = _mm512_loadu_si512(values + 128 * i);
            if constexpr (Bits == 8) {
                weights[i] = packed;
            } else {
                weights[i] = _mm512_and_si512(packed, low);
                weights[i + 4] = _mm512_andnot_si512(low, packed);
            }
        }
    }

    // Exact sums of weights times the integers of one token's activations.
    template <int Halves>
    static void add_up(const __m512i (&weights)[Halves][8], const Activation &a, __m512 (&totals)[Halves]) {
        constexpr int kParts = Bits == 4 ? 2 : 1;
        __m512i sums[Halves][Terms][kParts];
        for (int h = 0; h < Halves; ++h)
            for (int term = 0; term < Terms; ++term)
                for (int part = 0; part < kParts; ++part)
                    sums[h][term][part] =
                        term == 1 || part == 1 ? _mm512_setzero_si512() : _mm512_set1_epi32(a.start[term / 2]);
        for (int i = 0; i < 8; ++i)
            for (int term = 0; term < Terms; ++term) {
                const __m512i activations = four(a.bytes[term] + 4 * i);
                for (int h = 0; h < Halves; ++h) {
                    __m512i &sum = sums[h][term][Bits == 4 ? i / 4 : 0];
                    sum = _mm512_dpbusd_epi32(sum, weights[h][i], activations);
                }
            }
        for (int h = 0; h < Halves; ++h) {
            __m512i whole[Terms];
            for (int term = 0; term < Terms; ++term) {
                whole[term] = sums[h][term][0];
                if (Bits == 4)
                    whole[term] = _mm512_add_epi32(whole[term], _mm512_srai_epi32(sums[h][term][kParts - 1], 4));
            }
            if constexpr (Terms > 1) whole[0] = _mm512_add_epi32(_mm512_slli_epi32(whole[1], 8), whole[0]);
            totals[h] = _mm512_cvtepi32_ps(whole[0]);
            if constexpr (Terms == 3)
                totals[h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[2]), _mm512_set1_ps(65536), totals[h]);
        }
    }
};

// Sums of four vectors, in order.
inline __m128 four_sums(const __m512 (&x)[4]) {
    const auto pair = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    const __m512 all = pair(pair(x[0], x[2]), pair(x[1], x[3]));  // in each four lanes: one of each
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Weights and activations of 16 rows of products: what a register holds, and how one is added to a sum. fp16 is widened
// to fp32; so are, apart, the even and the odd columns of bf16 where the processor does not multiply that.
template <class Scalar>
struct Vectors;

template <>
struct Vectors<float> {
    static constexpr int64_t kColumns = 16;
    using Vector = __m512;
    static Vector load(const float *values, int64_t count) {
        return _mm512_maskz_loadu_ps(count >= kColumns ? 0xffff : __mmask16((1u << count) - 1), values);
    }
    static __m512 add_product(__m512 sum, __m512 w, __m512 x) { return _mm512_fmadd_ps(w, x, sum); }
};

template <>
struct Vectors<Fp16> : Vectors<float> {
    static Vector load(const Fp16 *values, int64_t count) {
        const __mmask16 lanes = count >= kColumns ? 0xffff : __mmask16((1u << count) - 1);
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, values));
    }
};

template <>
struct Vectors<Bf16> {
    static constexpr int64_t kColumns = 32;
    static __m512i load_bits(const Bf16 *values, int64_t count) {
        return count >= kColumns ? _mm512_loadu_si512(values)
                                 : _mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), values);
    }
#ifdef __AVX512BF16__
    using Vector = __m512bh;
    static Vector load(const Bf16 *values, int64_t count) { return (__m512bh)load_bits(values, count); }
    static __m512 add_product(__m512 sum, Vector w, Vector x) { return _mm512_dpbf16_ps(sum, w, x); }
#else
    struct alignas(64) Vector {
        __m512 even, odd;
    };
    static Vector load(const Bf16 *values, int64_t count) {
        const __m512i bits = load_bits(values, count), high = _mm512_set1_epi32(int(0xffff0000));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(_mm512_and_si512(bits, high))};
    }
    static __m512 add_product(__m512 sum, const Vector &w, const Vector &x) {
        return _mm512_fmadd_ps(w.odd, x.odd, _mm512_fmadd_ps(w.even, x.even, sum));
    }
#endif
};

// Weights that are no integers, row by row. A sum has 16 parts, one a lane, each over all columns in order: so each tile
// of rows by tokens gives the same bits.
template <class Number>
struct Dense {
    using Scalar = Number;
    using Lanes = Vectors<Number>;
    using Activation = typename Lanes::Vector;
    using Sum = __m512;
    static constexpr int kMostTokens = 6, kPanel = 4;  // their 24 sums, and what goes into them, fill the registers
    static constexpr int64_t kColumns = Lanes::kColumns, kDepth = 64 * sizeof(Activation);

    static int64_t activations(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

    static void prepare(const Scalar *x, int64_t columns, Activation *out) {
        for (int64_t i = 0; i < columns; i += kColumns) *out++ = Lanes::load(x + i, columns - i);
    }

    template <int Tokens>
    static void panel(const Weight &w, int64_t first, const Activation *x, Columns columns, Sum *carried,
                      float (&result)[Tokens][kPanel]) {
        const Scalar *rows[kPanel];
        for (int r = 0; r < kPanel; ++r)  // behind the last row: that one again
            rows[r] = reinterpret_cast<const Scalar *>(w.values) + std::min(first + r, w.rows - 1) * w.columns;
        const int64_t steps = activations(w.columns);
        __m512 sums[Tokens][kPanel];
#pragma GCC unroll 8  // here and below: else the sums stay in memory
        for (int t = 0; t < Tokens; ++t)
            for (int r = 0; r < kPanel; ++r)
                sums[t][r] = columns.start ? carried[t * kPanel + r] : _mm512_setzero_ps();
        for (int64_t i = columns.start; i < columns.end; ++i) {
            Activation weights[kPanel];
            for (int r = 0; r < kPanel; ++r)
                weights[r] = Lanes::load(rows[r] + i * kColumns, w.columns - i * kColumns);
            if (Tokens == 1 && i % 4 == 0)
                for (int r = 0; r < kPanel; ++r)  // the next panel, as it will be used
                    ask_for(rows[r] + i * kColumns, kPanel * w.columns * int64_t(sizeof(Scalar)));
            for (int t = 0; t < Tokens; ++t)
                for (int r = 0; r < kPanel; ++r)
                    sums[t][r] = Lanes::add_product(sums[t][r], weights[r], x[t * steps + i]);
        }
        const bool is_last = columns.end == steps;
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
            if (is_last)
                _mm_storeu_ps(result[t], four_sums(sums[t]));
            else
                for (int r = 0; r < kPanel; ++r) carried[t * kPanel + r] = sums[t][r];
    }
};

inline __m512 load_lanes(const float *values, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, values); }
inline __m512 load_lanes(const Bf16 *values, __mmask16 lanes) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 load_lanes(const Fp16 *values, __mmask16 lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, values));
}

// out[r * stride + p] = the dot product of x[r] and keys[p], for some rows of x [.., size] and `count` keys [.., size].
template <int Rows, class Scalar>
inline void dots(const float *x, const Scalar *keys, int64_t count, int64_t size, float *out, int64_t stride) {
    for (int64_t p = 0; p < count; p += 4) {
        const int64_t left = std::min<int64_t>(4, count - p);
        __m512 sums[Rows][4];
        for (auto &row : sums)
            for (auto &sum : row) sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += 16) {
            const __mmask16 lanes = size - i >= 16 ? 0xffff : __mmask16((1u << (size - i)) - 1);
            __m512 wide[4];
            for (int k = 0; k < 4; ++k)  // behind the last key: that one again
                wide[k] = load_lanes(keys + (p + std::min<int64_t>(k, left - 1)) * size + i, lanes);
            for (int r = 0; r < Rows; ++r) {
                const __m512 row = load_lanes(x + r * size + i, lanes);
                for (int k = 0; k < 4; ++k) sums[r][k] = _mm512_fmadd_ps(row, wide[k], sums[r][k]);
            }
        }
        for (int r = 0; r < Rows; ++r)
            _mm_mask_storeu_ps(out + r * stride + p, __mmask8((1u << left) - 1), four_sums(sums[r]));
    }
}

// sums[r][i] += the sum over p of scores[r * stride + p] * values[p * size + i], one p after the other, for some rows and
// all i < size. Rows that go together read the values once.
template <int Rows, class Scalar>
inline void weighted_sums(const float *scores, int64_t stride, const Scalar *values, int64_t length, int64_t size,
                          float *sums) {
    constexpr int64_t width = 64;  // the sums of four rows take half of the registers
    for (int64_t start = 0; start < size; start += width) {
        __mmask16 lanes[4];
        for (int i = 0; i < 4; ++i)
            lanes[i] = __mmask16((1u << std::clamp<int64_t>(size - start - 16 * i, 0, 16)) - 1);
        __m512 parts[Rows][4];
        for (int r = 0; r < Rows; ++r)
            for (int i = 0; i < 4; ++i) parts[r][i] = load_lanes(sums + r * size + start + 16 * i, lanes[i]);
        for (int64_t p = 0; p < length; ++p) {
            const Scalar *from = values + p * size + start;
            __m512 wide[4];
            for (int i = 0; i < 4; ++i) wide[i] = load_lanes(from + 16 * i, lanes[i]);
            for (int r = 0; r < Rows; ++r) {
                const __m512 score = _mm512_set1_ps(scores[r * stride + p]);
                for (int i = 0; i < 4; ++i) parts[r][i] = _mm512_fmadd_ps(score, wide[i], parts[r][i]);
            }
        }
        for (int r = 0; r < Rows; ++r)
            for (int i = 0; i < 4; ++i) _mm512_mask_storeu_ps(sums + r * size + start + 16 * i, lanes[i], parts[r][i]);
    }
}
