// The parts of a layer one by one, for callers that do the rest themselves.
#include "step.h"

#include "attention.h"
#include "export.h"

// All take fp32, or bf16 where `is_bf16`; sums are in fp32.

// out = weight * x / sqrt(mean(x^2) + eps), [tokens, size]
EXPORTED void glm_rms_norm(const void *x, const void *weight, float eps, int64_t tokens, int64_t size, void *out,
                           int is_bf16, int threads) {
    if (is_bf16)
        rms_norm(static_cast<const uint16_t *>(x), static_cast<const uint16_t *>(weight), eps, tokens, size,
                 static_cast<uint16_t *>(out), threads);
    else
        rms_norm(static_cast<const float *>(x), static_cast<const float *>(weight), eps, tokens, size,
                 static_cast<float *>(out), threads);
}

// out [tokens, size] = silu of the first half of x [tokens, 2 * size] times the second
EXPORTED void glm_gate(const void *x, int64_t tokens, int64_t size, void *out, int is_bf16, int threads) {
    if (is_bf16)
        gate(static_cast<const uint16_t *>(x), tokens, size, static_cast<uint16_t *>(out), threads);
    else
        gate(static_cast<const float *>(x), tokens, size, static_cast<float *>(out), threads);
}

// The first `heads` heads of each token of x are rotated in place; cos and sin are fp32 [tokens, pairs].
EXPORTED void glm_rotate(void *x, int64_t tokens, int64_t token_stride, int64_t heads, int64_t head_dim,
                         const float *cos, const float *sin, int64_t pairs, int is_bf16, int threads) {
    if (is_bf16)
        rotate(static_cast<uint16_t *>(x), tokens, token_stride, heads, head_dim, cos, sin, pairs, threads);
    else
        rotate(static_cast<float *>(x), tokens, token_stride, heads, head_dim, cos, sin, pairs, threads);
}

EXPORTED void glm_attend(const Attention *a, int is_bf16, int threads) {
    is_bf16 ? attend<uint16_t>(*a, threads) : attend<float>(*a, threads);
}
