// The same functions for every instruction set: which one, the compiler's flags say (setup.py builds one library each).
#include <algorithm>
#include <type_traits>

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
        const int64_t most = std::max<int64_t>(Format::kMostTokens, kTokenBytes / std::min(bytes, Format::kDepth) /
                                                                        Format::kMostTokens * Format::kMostTokens);
        prepared_ = static_cast<Activation *>(scratch.reserve(size_t(std::min(most, num_tokens_) * bytes)));
        for (first_ = 0; first_ < num_tokens_; first_ += most) {
            count_ = std::min(most, num_tokens_ - first_);
            run_chunks(&prepare_token, this, count_, count_ < 4 ? 1 : num_threads);
            run_chunks(&multiply_block, this, num_blocks(w_.rows), num_threads);
        }
    }

private:
    using Sum = typename Format::Sum;

    static void prepare_token(void *self, int64_t token) {
        const Product &p = *static_cast<Product *>(self);
        Format::prepare(p.x_ + (p.first_ + token) * p.w_.columns, p.w_.columns, p.prepared_ + token * p.stride_);
    }

    // For many tokens a part of the columns after the other, so that activations and weights stay in a core's caches while
    // they pass by each other; sums are carried on from part to part, and so are the same sums.
    static void multiply_block(void *self, int64_t block) {
        static thread_local Scratch scratch;
        const Product &p = *static_cast<Product *>(self);
        const int64_t end = std::min((block + 1) * kRows, p.w_.rows);
        const int64_t depth = p.count_ > 8 ? Format::kDepth / int64_t(sizeof(Activation)) : p.stride_;
        Sum *const carried = depth < p.stride_ ? static_cast<Sum *>(scratch.reserve(size_t(p.count_ * kRows) * sizeof(Sum))) : nullptr;
        for (int64_t start = 0; start < p.stride_; start += depth) {
            const Columns columns{start, std::min(start + depth, p.stride_)};
            for (int64_t row = block * kRows; row < end; row += Format::kPanel)
                p.multiply_panel(row, columns, carried + row % kRows * p.count_);
        }
    }

    void multiply_panel(int64_t row, const Columns &columns, Sum *carried) const {
        int64_t token = 0;
        const auto next = [&](auto tokens) {
            multiply<tokens()>(row, token, columns, carried + token * Format::kPanel);
            token += tokens();
        };
        for (constexpr int most = Format::kMostTokens; token + most <= count_;) next(Count<most>{});
        const int64_t rest = count_ - token;
        if constexpr (Format::kMostTokens > 4)
            if (rest & 4) next(Count<4>{});
        if (rest & 2) next(Count<2>{});
        if (rest & 1) next(Count<1>{});
    }

    template <int Tokens>
    using Count = std::integral_constant<int, Tokens>;

    template <int Tokens>
    void multiply(int64_t row, int64_t token, const Columns &columns, Sum *carried) const {
        float result[Tokens][Format::kPanel];
        Format::template panel<Tokens>(w_, row, prepared_ + token * stride_, columns, carried, result);
        if (columns.end < stride_) return;
        const Scalar *bias = static_cast<const Scalar *>(w_.bias);
        const int64_t count = std::min<int64_t>(Format::kPanel, w_.rows - row);
        for (int t = 0; t < Tokens; ++t)
            for (int64_t r = 0; r < count; ++r)
                put(bias ? result[t][r] + to_float(bias[row + r]) : result[t][r],
                    out_[(first_ + token + t) * w_.rows + row + r]);
    }

    const Weight &w_;
    const Scalar *x_;
    Scalar *out_;
    int64_t num_tokens_, stride_, first_ = 0, count_ = 0;
    Activation *prepared_ = nullptr;
};

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
    const auto integers = [&](auto rounded, auto exact) { w.is_exact ? product(exact) : product(rounded); };
    if (w.bits == 32)
        product(Dense<float>{});
    else if (w.bits == 16)
        w.type == kBf16 ? product(Dense<Bf16>{}) : product(Dense<Fp16>{});
    else if (w.bits == 8)
        integers(Integers<8, false, 2>{}, Integers<8, false, 3>{});
    else if (w.grouped())
        integers(Integers<4, true, 1>{}, Integers<4, true, 3>{});
    else
        integers(Integers<4, false, 1>{}, Integers<4, false, 3>{});
}

// Tells libraries apart from those of other sources that Python might find.
EXPORTED int glm_interface() { return 5; }

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

// Reads memory and does nothing else with it: what a product would cost if arithmetic were free.
EXPORTED uint64_t glm_read(const void *data, int64_t num_bytes, int num_threads) {
    Reading reading{static_cast<const uint64_t *>(data), num_bytes / 8, 0};
    run_chunks(&read_chunk, &reading, (num_bytes + kChunkBytes - 1) / kChunkBytes, num_threads);
    return reading.result;
}
