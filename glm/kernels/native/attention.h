// Attention of a few tokens of some sequences over all of their keys.
#pragma once
#include <vector>

#include "step.h"

// The keys and values of one sequence in one layer, and its share of the tokens. Mirrored by native.py.
struct Cache {
    void *keys, *values;  // [kv_heads, capacity, head_dim]
    int64_t capacity;
    int64_t length;   // tokens cached before
    int64_t tokens;   // that are new; each sees the keys up to its own ...
    int64_t visible;  // ... and as many in any case
};

// Mirrored by native.py.
struct Attention {
    const void *query, *key, *value;                              // [tokens, heads, head_dim], or kv_heads
    int64_t query_token_stride, key_token_stride, value_token_stride;  // elements from one token to the next, ...
    int64_t query_stride, key_stride, value_stride;               // ... and from one head to the next
    int64_t tokens, heads, kv_heads, head_dim;
    const Cache *caches;  // of all sequences: their tokens come to `tokens`
    void *out;            // [tokens, heads, head_dim]
};

// Scores of one head -> their exponentials, with the sum of these.
inline float exponentials(float *scores, int64_t length) {
    float largest[16], totals[16] = {}, total = 0;
    std::fill(largest, largest + 16, -INFINITY);
    const int64_t whole = length / 16 * 16;
    for (int64_t p = 0; p < whole; p += 16)
        for (int lane = 0; lane < 16; ++lane)
            largest[lane] = largest[lane] < scores[p + lane] ? scores[p + lane] : largest[lane];
    for (int64_t p = whole; p < length; ++p) largest[0] = std::max(largest[0], scores[p]);
    for (float each : largest) largest[0] = std::max(largest[0], each);
    const float top = largest[0];
    for (int64_t p = 0; p < length; ++p) scores[p] = exponential(clamp(scores[p] - top));
    for (int64_t p = 0; p < whole; p += 16)
        for (int lane = 0; lane < 16; ++lane) totals[lane] += scores[p + lane];
    for (int64_t p = whole; p < length; ++p) totals[p - whole] += scores[p];
    for (float part : totals) total += part;
    return total;
}

// Some rows of one sequence that read the same keys. A row is a head of a token: row r of key/value head `group` is
// that group's head r % shared of the sequence's new token r / shared, `shared` being heads / kv_heads.
struct Rows {
    const Cache *cache;
    int64_t first_token;  // of the sequence, in the whole call
    int64_t group, first, count;
};

// How the work is cut follows from the number of threads; what a row gets does not depend on it.
template <class Scalar>
class Attending {
public:
    explicit Attending(const Attention &a) : a_(a), shared_(a.heads / a.kv_heads) {}

    void run(int threads) const {
        static thread_local std::vector<Rows> pieces;
        pieces.clear();
        const int64_t all = a_.tokens * a_.heads, wanted = threads > 1 ? 4 * threads : 1;
        const int64_t most = std::clamp<int64_t>(all / wanted / 4 * 4, 4, kMostRows);
        int64_t token = 0;
        for (const Cache *cache = a_.caches; token < a_.tokens; token += cache++->tokens)
            for (int64_t group = 0; group < a_.kv_heads; ++group)
                for (int64_t row = 0, rows = cache->tokens * shared_; row < rows; row += most)
                    pieces.push_back({cache, token, group, row, std::min(most, rows - row)});
        const Rows *const first = pieces.data();  // the helpers have vectors of their own
        const int64_t each = a_.tokens < 4 ? 1 : threads;
        token = 0;
        for (const Cache *cache = a_.caches; token < a_.tokens; token += cache++->tokens)
            for_each(a_.kv_heads, int(each), [=](int64_t group) { store(*cache, token, group); });
        for_each(int64_t(pieces.size()), threads, [=](int64_t index) { attend(first[index]); });
    }

private:
    static constexpr int64_t kMostRows = 16;
    static constexpr int64_t kTile = 32;  // keys that stay in a core's first cache while rows pass by

    static Scalar *at(const void *base, int64_t i) { return static_cast<Scalar *>(const_cast<void *>(base)) + i; }

    void store(const Cache &cache, int64_t first, int64_t group) const {
        for (int64_t t = 0; t < cache.tokens; ++t) {
            const int64_t place = (group * cache.capacity + cache.length + t) * a_.head_dim, token = first + t;
            std::copy_n(at(a_.key, token * a_.key_token_stride + group * a_.key_stride), a_.head_dim,
                        at(cache.keys, place));
            std::copy_n(at(a_.value, token * a_.value_token_stride + group * a_.value_stride), a_.head_dim,
                        at(cache.values, place));
        }
    }

    void attend(const Rows &rows) const {
        static thread_local Scratch scratch;
        const Cache &cache = *rows.cache;
        const int64_t dim = a_.head_dim, first_length = cache.length + 1;
        const auto length = [&](int64_t row) {
            return std::max(cache.visible, first_length + (rows.first + row) / shared_);
        };
        const int64_t longest = length(rows.count - 1), padded = (longest + 15) / 16 * 16;
        float *scores = static_cast<float *>(scratch.reserve(size_t(rows.count * (padded + dim)) * sizeof(float)));
        float *vectors = scores + rows.count * padded, totals[kMostRows];
        const int64_t base = rows.group * cache.capacity * dim;
        load_queries(rows, vectors);
        for (int64_t tile = 0; tile < longest; tile += kTile)
            in_fours(rows.count, [&](auto together, int64_t row) {
                dots<together()>(vectors + row * dim, at(cache.keys, base + tile * dim),
                                 std::min(kTile, longest - tile), dim, scores + row * padded + tile, padded);
            });
        for (int64_t row = 0; row < rows.count; ++row) totals[row] = exponentials(scores + row * padded, length(row));
        std::fill(vectors, vectors + rows.count * dim, 0.0f);
        const auto add = [&](auto together, int64_t row, int64_t start, int64_t end) {
            if (start < end)
                weighted_sums<together()>(scores + row * padded + start, padded,
                                          at(cache.values, base + start * dim), end - start, dim, vectors + row * dim);
        };
        for (int64_t tile = 0; tile < longest; tile += kTile)
            in_fours(rows.count, [&](auto together, int64_t row) {
                const int64_t end = std::min(tile + kTile, length(row));  // the first of these rows sees the least
                add(together, row, tile, end);
                for (int r = 1; r < together(); ++r)
                    add(One{}, row + r, std::max(tile, end), std::min(tile + kTile, length(row + r)));
            });
        put_results(rows, vectors, totals);
    }

    using One = std::integral_constant<int, 1>;

    template <class Body>
    static void in_fours(int64_t count, const Body &body) {
        int64_t row = 0;
        for (; row + 4 <= count; row += 4) body(std::integral_constant<int, 4>{}, row);
        for (; row < count; ++row) body(One{}, row);
    }

    int64_t head(const Rows &rows, int64_t row) const { return rows.group * shared_ + (rows.first + row) % shared_; }
    int64_t token(const Rows &rows, int64_t row) const { return rows.first_token + (rows.first + row) / shared_; }

    void load_queries(const Rows &rows, float *queries) const {
        const float scale = 1 / std::sqrt(float(a_.head_dim));
        for (int64_t row = 0; row < rows.count; ++row, queries += a_.head_dim) {
            const Scalar *query =
                at(a_.query, token(rows, row) * a_.query_token_stride + head(rows, row) * a_.query_stride);
            for (int64_t i = 0; i < a_.head_dim; ++i) queries[i] = to_float(query[i]) * scale;
        }
    }

    void put_results(const Rows &rows, const float *sums, const float *totals) const {
        for (int64_t row = 0; row < rows.count; ++row, sums += a_.head_dim) {
            Scalar *out = at(a_.out, (token(rows, row) * a_.heads + head(rows, row)) * a_.head_dim);
            for (int64_t i = 0; i < a_.head_dim; ++i) put(sums[i] / totals[row], out[i]);
        }
    }

    const Attention &a_;
    const int64_t shared_;
};

// The tokens' keys and values go into their caches; then each token's heads attend over all up to its own.
template <class Scalar>
void attend(const Attention &a, int threads) {
    Attending<Scalar>(a).run(threads);
}
