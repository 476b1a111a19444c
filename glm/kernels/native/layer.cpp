// Whole layers for the tokens of some sequences: nothing but arithmetic from one end to the other.
#include <vector>

#include "attention.h"
#include "export.h"

// Weight, and in a layer norm bias; no weight: no such norm.
struct Norm {
    const void *weight, *bias;
};

// Mirrored by layer.py.
struct Layer {
    const Weight *query_key_value, *dense, *up, *down;
    Norm input, post, attended, expanded;
    int64_t hidden_size, heads, kv_heads, head_dim, parts, pairs;
    float eps, alpha;
    int32_t is_prefix, type;  // a ScalarType
};

// Mirrored by native.py: a sequence in a range of layers.
struct CachedSequence {
    void *const (*places)[2];  // of the keys and of the values of each layer
    int64_t capacity, length, tokens, visible;  // as in Cache
};

namespace {

template <class Scalar>
struct Step {
    const Layer &layer;
    const Scalar *hidden;
    int64_t tokens;
    const float *cos, *sin;  // [tokens, parts, pairs]
    const Cache *caches;
    Scalar *out;
    int threads;

    const int64_t size = layer.hidden_size;
    static constexpr int64_t kMostKept = 64;  // tokens whose memory is kept for the next step

    // Memory for all that the layer makes on its way.
    struct Buffers {
        Scalar *normed, *fused, *attended, *added, *wide, *narrow;
    };

    Buffers buffers(Scratch &scratch) const {
        const int64_t sizes[] = {size, layer.query_key_value->rows, layer.heads * layer.head_dim, size, layer.up->rows,
                                 layer.down->columns};
        int64_t total = 0;
        for (int64_t each : sizes) total += (each * tokens + 31) / 32 * 32;
        Scalar *next = static_cast<Scalar *>(scratch.reserve(size_t(total) * sizeof(Scalar)));
        Scalar *places[6];
        for (int i = 0; i < 6; ++i) {
            places[i] = next;
            next += (sizes[i] * tokens + 31) / 32 * 32;
        }
        return {places[0], places[1], places[2], places[3], places[4], places[5]};
    }

    void norm(const Scalar *x, const Norm &n, Scalar *result) const {
        const Scalar *weight = static_cast<const Scalar *>(n.weight), *bias = static_cast<const Scalar *>(n.bias);
        if (bias)
            layer_norm(x, weight, bias, layer.eps, tokens, size, result, threads);
        else
            rms_norm(x, weight, layer.eps, tokens, size, result, threads);
    }

    void add(const Scalar *x, const Scalar *y, Scalar *result) const {
        ::add(layer.alpha, x, y, tokens, size, result, threads);
    }

    // Of fused queries, keys and values: where the first key and the first value are, and how far it is to the next head.
    Attention attention(const Scalar *fused, int64_t key, int64_t value, int64_t stride, Scalar *attended) const {
        const int64_t width = layer.query_key_value->rows;
        return {fused, fused + key, fused + value, width, width, width, stride, stride, stride, tokens, layer.heads,
                layer.kv_heads, layer.head_dim, caches, attended};
    }

    // fused [tokens, query heads, key heads, value heads], neighbours rotated
    Attention grouped(Scalar *fused, Scalar *attended) const {
        const int64_t dim = layer.head_dim, width = layer.query_key_value->rows, turning = layer.heads + layer.kv_heads;
        rotate(fused, tokens, width, turning, dim, cos, sin, layer.pairs, threads);
        return attention(fused, layer.heads * dim, turning * dim, dim, attended);
    }

    // fused [tokens, heads, (query, key, value)], halves rotated
    Attention interleaved(Scalar *fused, Scalar *attended) const {
        const int64_t dim = layer.head_dim, width = layer.query_key_value->rows, angles = layer.parts * layer.pairs;
        for_each(tokens, threads, [=](int64_t t) {
            for (int64_t i = 0; i < 3 * layer.heads; ++i)
                if (i % 3 < 2)
                    rotate_halves(fused + t * width + i * dim, cos + t * angles, sin + t * angles, layer.parts,
                                  layer.pairs);
        });
        return attention(fused, dim, 2 * dim, 3 * dim, attended);
    }

    void activate(const Scalar *wide, Scalar *narrow) const {
        (layer.is_prefix ? gelu<Scalar> : gate<Scalar>)(wide, tokens, layer.down->columns, narrow, threads);
    }

    // `out` may be `hidden`.
    void run() const {
        static thread_local Scratch kept;
        Scratch passing;  // a long prompt's hundreds of MB go when it is done
        const Buffers b = buffers(tokens > kMostKept ? passing : kept);
        norm(hidden, layer.input, b.normed);
        multiply(*layer.query_key_value, b.normed, tokens, b.fused, threads);
        attend<Scalar>(layer.is_prefix ? interleaved(b.fused, b.attended) : grouped(b.fused, b.attended), threads);
        multiply(*layer.dense, b.attended, tokens, b.added, threads);
        if (layer.attended.weight) norm(b.added, layer.attended, b.added);
        add(layer.is_prefix ? b.normed : hidden, b.added, out);
        norm(out, layer.post, b.normed);
        multiply(*layer.up, b.normed, tokens, b.wide, threads);
        activate(b.wide, b.narrow);
        multiply(*layer.down, b.narrow, tokens, b.added, threads);
        if (layer.expanded.weight) norm(b.added, layer.expanded, b.added);
        add(layer.is_prefix ? b.normed : out, b.added, out);
    }
};

}  // namespace

// out [tokens, hidden_size] = the layers, one after the other, of `hidden`: tokens of the sequences, one sequence after
// the other; their keys and values are cached. All in one type.
EXPORTED void glm_layers(const Layer *const *layers, int64_t num_layers, const void *hidden, int64_t tokens,
                         const float *cos, const float *sin, const CachedSequence *sequences, int64_t num_sequences,
                         void *out, int threads) {
    static thread_local std::vector<Cache> caches;
    caches.resize(size_t(num_sequences));
    for (int64_t i = 0; i < num_layers; ++i) {
        for (int64_t s = 0; s < num_sequences; ++s) {
            const CachedSequence &sequence = sequences[s];
            void *const *place = sequence.places[i];
            caches[size_t(s)] = {place[0], place[1], sequence.capacity, sequence.length, sequence.tokens,
                                 sequence.visible};
        }
        with_type(layers[i]->type, [&](auto scalar) {
            using Scalar = decltype(scalar);
            Step<Scalar>{*layers[i], static_cast<const Scalar *>(i ? out : hidden), tokens, cos, sin, caches.data(),
                         static_cast<Scalar *>(out), threads}
                .run();
        });
    }
}
