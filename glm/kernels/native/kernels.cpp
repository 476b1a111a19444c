// The same functions for every instruction set: which one, the compiler's flags say (setup.py builds one library each).
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <algorithm>

#include "export.h"
#include "pool.h"
#include "scratch.h"
#ifdef __AVX512VNNI__
#include "lanes_avx512.h"
#else
#include "lanes_portable.h"
#endif

namespace {

constexpr int64_t kChunkBytes = 256 << 10;   // that a thread reads at a time
constexpr int64_t kTokenBytes = 512 << 10;   // activations that stay in a core's cache while weights pass by

inline void store(float value, const float *bias, float &out) { out = bias ? value + *bias : value; }
inline void store(float value, const uint16_t *bias, uint16_t &out) {
    out = float_to_bf16(bias ? value + bf16_to_float(*bias) : value);
}

template <class Format>
class Product {
    using Scalar = typename Format::Scalar;
    using Activation = typename Format::Activation;

public:
    Product(const Weight &w, const void *x, int64_t num_tokens, void *out)
        : w_(w), x_(static_cast<const Scalar *>(x)), out_(static_cast<Scalar *>(out)), num_tokens_(num_tokens),
          stride_(Format::activations(w.columns)) {}

    void run(int num_threads) {
        static thread_local Scratch scratch;
        const int64_t bytes = stride_ * int64_t(sizeof(Activation));
        const int64_t most = std::max<int64_t>(4, kTokenBytes / bytes / 4 * 4);
        prepared_ = static_cast<Activation *>(scratch.reserve(size_t(std::min(most, num_tokens_) * bytes)));
        for (first_ = 0; first_ < num_tokens_; first_ += most) {
            count_ = std::min(most, num_tokens_ - first_);
            run_chunks(&prepare_token, this, count_, count_ < 4 ? 1 : num_threads);
            run_chunks(&multiply_block, this, num_blocks(w_.rows), num_threads);
        }
    }

private:
    static void prepare_token(void *self, int64_t token) {
        const Product &p = *static_cast<Product *>(self);
        Format::prepare(p.x_ + (p.first_ + token) * p.w_.columns, p.w_.columns, p.prepared_ + token * p.stride_);
    }

    static void multiply_block(void *self, int64_t block) {
        const Product &p = *static_cast<Product *>(self);
        int64_t token = 0;
        for (; token + 8 <= p.count_; token += 8) p.multiply<8>(block, token);
        if (p.count_ & 4) p.multiply<4>(block, token), token += 4;
        if (p.count_ & 2) p.multiply<2>(block, token), token += 2;
        if (p.count_ & 1) p.multiply<1>(block, token);
    }

    template <int Tokens>
    void multiply(int64_t block, int64_t token) const {
        float result[Tokens][kRows];
        Format::template block<Tokens>(w_, block, prepared_ + token * stride_, result);
        const Scalar *bias = static_cast<const Scalar *>(w_.bias);
        const int64_t row = block * kRows, count = std::min(kRows, w_.rows - row);
        for (int t = 0; t < Tokens; ++t)
            for (int64_t r = 0; r < count; ++r)
                store(result[t][r], bias ? bias + row + r : nullptr, out_[(first_ + token + t) * w_.rows + row + r]);
    }

    const Weight &w_;
    const Scalar *x_;
    Scalar *out_;
    int64_t num_tokens_, stride_, first_ = 0, count_ = 0;
    Activation *prepared_ = nullptr;
};

struct Unpacking {
    const Weight *weight;
    int64_t first_block;
    uint16_t *out;
};

// 32 rows in bf16, row by row. Values and scales are finite: rounding need not look for NaN, and vectorises.
template <int Bits, bool Grouped>
void unpack_block(void *context, int64_t index) {
    const Unpacking &u = *static_cast<const Unpacking *>(context);
    const Weight &w = *u.weight;
    const int64_t block = u.first_block + index, columns = w.columns, groups = num_groups(columns);
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t *record = w.record(block, g);
        float scales[kRows];
        if (Grouped)
            widen_scales(w.group_scales(record), kRows, scales);
        else
            std::copy_n(w.scales + block * kRows, kRows, scales);
        for (int64_t r = 0; r < std::min(kRows, w.rows - block * kRows); ++r) {
            const uint8_t *values = record + 4 * r;
            uint32_t words[8];
            for (int64_t i = 0; i < Bits; ++i) std::memcpy(words + i, values + 128 * i, 4);
            if (Bits == 4)
                for (int i = 0; i < 4; ++i) {
                    words[4 + i] = words[i] >> 4 & 0x0f0f0f0f;
                    words[i] &= 0x0f0f0f0f;
                }
            uint8_t integers[kGroup];
            std::memcpy(integers, words, sizeof words);
            uint16_t halves[kGroup];
            for (int i = 0; i < kGroup; ++i) {
                const float value = float(int(integers[i]) - (Bits == 4 ? 8 : 128)) * scales[r];
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                halves[i] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
            }
            const int64_t count = std::min(kGroup, columns - g * kGroup);
            std::memcpy(u.out + (index * kRows + r) * columns + g * kGroup, halves, size_t(count) * 2);
        }
    }
}

struct Reading {
    const uint64_t *words;
    int64_t count;
    uint64_t result;
};

void read_chunk(void *context, int64_t chunk) {
    Reading &reading = *static_cast<Reading *>(context);
    constexpr int64_t step = kChunkBytes / 8;
    const uint64_t *words = reading.words + chunk * step;
    const int64_t count = std::min(step, reading.count - chunk * step);
    uint64_t sums[32] = {};
    for (int64_t i = 0; i + 32 <= count; i += 32) {
        for (int lane = 0; lane < 32; lane += 8) __builtin_prefetch(words + i + lane + 256);
        for (int lane = 0; lane < 32; ++lane) sums[lane] ^= words[i + lane];
    }
    for (uint64_t sum : sums) reading.result ^= sum;  // a race that nobody minds: the value only keeps the loop alive
}

}  // namespace

void multiply(const Weight &w, const void *x, int64_t num_tokens, void *out, int num_threads) {
    const auto product = [&](auto format) { Product<decltype(format)>(w, x, num_tokens, out).run(num_threads); };
    const auto integers = [&](auto of_1, auto of_2, auto of_3) {
        w.is_exact ? product(of_3) : w.bits == 4 || num_tokens > kMostOfTwoTerms ? product(of_1) : product(of_2);
    };
    if (w.bits == 16)
        product(Halves{});
    else if (w.bits == 8)
        integers(Integers<8, false, 1>{}, Integers<8, false, 2>{}, Integers<8, false, 3>{});
    else if (w.grouped())
        integers(Integers<4, true, 1>{}, Integers<4, true, 2>{}, Integers<4, true, 3>{});
    else
        integers(Integers<4, false, 1>{}, Integers<4, false, 2>{}, Integers<4, false, 3>{});
}

// Tells libraries apart from those of other sources that Python might find.
EXPORTED int glm_interface() { return 4; }

// Whether this processor and system have every instruction that this library was compiled for.
EXPORTED int glm_supported() {
#if defined(__AVX512BF16__)
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
#endif
#if defined(__AVX512VNNI__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

EXPORTED void glm_product(const Weight *w, const void *x, int64_t num_tokens, void *out, int num_threads) {
    multiply(*w, x, num_tokens, out, num_threads);
}

// Some rows of an integer weight, from a multiple of 32 on, dequantised: bf16 [num_rows, columns].
EXPORTED void glm_unpack(const Weight *w, int64_t first_row, int64_t num_rows, void *out, int num_threads) {
    Unpacking unpacking{w, first_row / kRows, static_cast<uint16_t *>(out)};
    const auto task = w->bits == 8 ? &unpack_block<8, false> : w->grouped() ? &unpack_block<4, true> : &unpack_block<4, false>;
    run_chunks(task, &unpacking, num_blocks(num_rows), num_threads);
}

// Whether the processor has a matrix unit for bf16 (AMX) that the system lets programs use.
EXPORTED int glm_has_matrix_unit() {
#if defined(__x86_64__) && defined(__GNUC__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return 0;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & 3u << 17) == 3u << 17;
#else
    return 0;
#endif
}

// Reads memory and does nothing else with it: what a product would cost if arithmetic were free.
EXPORTED uint64_t glm_read(const void *data, int64_t num_bytes, int num_threads) {
    Reading reading{static_cast<const uint64_t *>(data), num_bytes / 8, 0};
    run_chunks(&read_chunk, &reading, (num_bytes + kChunkBytes - 1) / kChunkBytes, num_threads);
    return reading.result;
}
