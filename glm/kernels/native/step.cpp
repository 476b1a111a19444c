// The parts of a layer one by one, for callers that do the rest themselves.
#include "step.h"

#include "attention.h"
#include "export.h"

// `type`, a ScalarType, is that of all but the rotary tables; sums are in fp32.

// out = weight * x / sqrt(mean(x^2) + eps), [tokens, size]
EXPORTED void glm_rms_norm(const void *x, const void *weight, float eps, int64_t tokens, int64_t size, void *out,
                           int type, int threads) {
    with_type(type, [&](auto scalar) {
        using Scalar = decltype(scalar);
        rms_norm(static_cast<const Scalar *>(x), static_cast<const Scalar *>(weight), eps, tokens, size,
                 static_cast<Scalar *>(out), threads);
    });
}

// out [tokens, size] = silu of the first half of x [tokens, 2 * size] times the second
EXPORTED void glm_gate(const void *x, int64_t tokens, int64_t size, void *out, int type, int threads) {
    with_type(type, [&](auto scalar) {
        using Scalar = decltype(scalar);
        gate(static_cast<const Scalar *>(x), tokens, size, static_cast<Scalar *>(out), threads);
    });
}

// The first `heads` heads of each token of x are rotated in place; cos and sin are fp32 [tokens, pairs].
EXPORTED void glm_rotate(void *x, int64_t tokens, int64_t token_stride, int64_t heads, int64_t head_dim,
                         const float *cos, const float *sin, int64_t pairs, int type, int threads) {
    with_type(type, [&](auto scalar) {
        using Scalar = decltype(scalar);
        rotate(static_cast<Scalar *>(x), tokens, token_stride, heads, head_dim, cos, sin, pairs, threads);
    });
}

EXPORTED void glm_attend(const Attention *a, int type, int threads) {
    with_type(type, [&](auto scalar) { attend<decltype(scalar)>(*a, threads); });
}
