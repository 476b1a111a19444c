// What a layer does between its products, for a few tokens: each function one pass where torch makes many.
#pragma once
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "product.h"
#include "scratch.h"
#ifdef __AVX512VNNI__
#include "lanes_avx512.h"
#else
#include "lanes_portable.h"
#endif

// e^x for x in [-87, 88], to two units in the last place; in a form that compilers vectorise.
inline float exponential(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, in the low bits
    const float n = shifted - 12582912.0f;
    const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
    float p = multiply_add(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = multiply_add(p, r, 8.3334519073e-3f);
    p = multiply_add(p, r, 4.1665795894e-2f);
    p = multiply_add(p, r, 1.6666665459e-1f);
    p = multiply_add(p, r, 5.0000001201e-1f);
    p = multiply_add(p * r, r, r) + 1;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = int32_t(uint32_t(bits + 127) << 23);
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline float clamp(float x) { return x < -87 ? -87 : x > 87 ? 87 : x; }  // NaN stays

// body(scalar), with one of the type.
template <class Body>
void with_type(int type, const Body &body) {
    type == kFloat ? body(float{}) : type == kBf16 ? body(Bf16{}) : body(Fp16{});
}

template <class Body>
void for_each(int64_t count, int num_threads, const Body &body) {
    run_chunks([](void *b, int64_t index) { (*static_cast<const Body *>(b))(index); }, const_cast<Body *>(&body), count,
               num_threads);
}

template <class Scalar>
void rms_norm(const Scalar *x, const Scalar *weight, float eps, int64_t tokens, int64_t size, Scalar *out, int threads) {
    for_each(tokens, threads, [=](int64_t token) {
        const Scalar *in = x + token * size;
        float sums[16] = {}, sum = 0;
        int64_t i = 0;
        for (; i + 16 <= size; i += 16)
            for (int lane = 0; lane < 16; ++lane)
                sums[lane] = multiply_add(to_float(in[i + lane]), to_float(in[i + lane]), sums[lane]);
        for (; i < size; ++i) sum += to_float(in[i]) * to_float(in[i]);
        for (float part : sums) sum += part;
        const float factor = 1 / std::sqrt(sum / float(size) + eps);
        for (i = 0; i < size; ++i) {
            Scalar scaled;
            put(to_float(in[i]) * factor, scaled);
            put(to_float(weight[i]) * to_float(scaled), out[token * size + i]);
        }
    });
}

template <class Scalar>
void gate(const Scalar *x, int64_t tokens, int64_t size, Scalar *out, int threads) {
    constexpr int64_t step = 2048;
    const int64_t parts = (size + step - 1) / step;
    for_each(tokens * parts, threads, [=](int64_t index) {
        const int64_t token = index / parts, start = index % parts * step, end = std::min(size, start + step);
        const Scalar *in = x + token * 2 * size;
        for (int64_t i = start; i < end; ++i) {
            const float value = to_float(in[i]);
            Scalar activated;
            put(value / (1 + exponential(clamp(-value))), activated);
            put(to_float(activated) * to_float(in[size + i]), out[token * size + i]);
        }
    });
}

inline float gelu(float x) {  // by the tanh formula: x times a sigmoid
    return x / (1 + exponential(clamp(-1.5957691216f * (x + 0.044715f * x * x * x))));
}

template <class Scalar>
void gelu(const Scalar *x, int64_t tokens, int64_t size, Scalar *out, int threads) {
    for_each(tokens, tokens > 4 ? threads : 1, [=](int64_t token) {
        for (int64_t i = token * size; i < (token + 1) * size; ++i) put(gelu(to_float(x[i])), out[i]);
    });
}

// out = factor * x + y
template <class Scalar>
void add(float factor, const Scalar *x, const Scalar *y, int64_t tokens, int64_t size, Scalar *out, int threads) {
    for_each(tokens, tokens > 4 ? threads : 1, [=](int64_t token) {
        for (int64_t i = token * size; i < (token + 1) * size; ++i) {
            Scalar scaled;
            put(factor * to_float(x[i]), scaled);
            put(to_float(scaled) + to_float(y[i]), out[i]);
        }
    });
}

template <class Scalar>
void layer_norm(const Scalar *x, const Scalar *weight, const Scalar *bias, float eps, int64_t tokens, int64_t size,
                Scalar *out, int threads) {
    for_each(tokens, threads, [=](int64_t token) {
        const Scalar *in = x + token * size;
        const auto mean_of = [&](auto &&value) {
            float sums[16] = {}, sum = 0;
            for (int64_t i = 0; i + 16 <= size; i += 16)
                for (int lane = 0; lane < 16; ++lane) sums[lane] += value(i + lane);
            for (int64_t i = size / 16 * 16; i < size; ++i) sum += value(i);
            for (float part : sums) sum += part;
            return sum / float(size);
        };
        const float mean = mean_of([&](int64_t i) { return to_float(in[i]); });
        const float variance = mean_of([&](int64_t i) { return (to_float(in[i]) - mean) * (to_float(in[i]) - mean); });
        const float factor = 1 / std::sqrt(variance + eps);
        for (int64_t i = 0; i < size; ++i)
            put(multiply_add((to_float(in[i]) - mean) * factor, to_float(weight[i]), to_float(bias[i])),
                out[token * size + i]);
    });
}

// Element i of each part of a head turns with element i + pairs, by the angles of the token and the part; in place.
template <class Scalar>
void rotate_halves(Scalar *head, const float *cos, const float *sin, int64_t parts, int64_t pairs) {
    for (int64_t part = 0; part < parts; ++part, head += 2 * pairs, cos += pairs, sin += pairs)
        for (int64_t i = 0; i < pairs; ++i) {
            const float first = to_float(head[i]), second = to_float(head[pairs + i]);
            put(multiply_add(first, cos[i], -(second * sin[i])), head[i]);
            put(multiply_add(second, cos[i], first * sin[i]), head[pairs + i]);
        }
}

// Neighbours (2i, 2i + 1) of the first `pairs` pairs of each head turn by the token's angles; in place.
template <class Scalar>
void rotate(Scalar *x, int64_t tokens, int64_t token_stride, int64_t heads, int64_t head_dim, const float *cos,
            const float *sin, int64_t pairs, int threads) {
    for_each(tokens, tokens > 4 ? threads : 1, [=](int64_t token) {
        const float *c = cos + token * pairs, *s = sin + token * pairs;
        for (int64_t head = 0; head < heads; ++head) {
            Scalar *values = x + token * token_stride + head * head_dim;
            for (int64_t i = 0; i < pairs; ++i) {
                const float even = to_float(values[2 * i]), odd = to_float(values[2 * i + 1]);
                put(multiply_add(even, c[i], -(odd * s[i])), values[2 * i]);
                put(multiply_add(odd, c[i], even * s[i]), values[2 * i + 1]);
            }
        }
    });
}
