// Products with int8 and int4 weights, and the small steps between them, for any card from sm_61 on.
//
// Compiled at load by NVRTC for the card at hand, without any header, for one kind of activations: -DActivation=Half,
// Bfloat or Single. All arithmetic is fp32: Pascal's fp16 is slow, and nobody's fp16 sums are exact. 16-bit values are
// converted by instructions or shifts that every card has.
//
// Weights lie as glm/quantization.py packs them. A thread takes 16 bytes of a row at a time: 16 columns of int8, or 32
// of int4, which are one group with one scale.

typedef unsigned short Bits16;
typedef unsigned int Bits32;

#ifdef __CUDACC__
static __device__ __forceinline__ float half_to_float(Bits16 bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

static __device__ __forceinline__ Bits16 float_to_half(float value)
{
    Bits16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// One instruction, where the compiler would take two: both constants are not the same.
static __device__ __forceinline__ Bits32 mask_and_flip(Bits32 word, Bits32 mask, Bits32 flip)
{
    Bits32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(word), "r"(mask), "r"(flip));
    return result;
}
#endif

#ifndef ENTRY
#define ENTRY(name, num_threads, Arguments) extern "C" __global__ void __launch_bounds__(num_threads) name(const Arguments a)
#endif

// What kernels.py fills in; every kernel takes one of these.

struct Product {
    const void *values, *scales;  // scales: fp32 [rows], or fp16 [rows, columns / 32] for groups
    const void *bias;             // or null
    const void *x;                // [tokens, columns], rows 16 bytes aligned
    void *out;                    // [tokens, rows]
    int rows, columns, tokens;
};

struct Dequantise {
    const void *values, *scales;
    void *out;  // [rows, columns]
    int rows, columns;
};

struct Norm {
    const void *x, *weight;  // [tokens, size], [size]
    void *out;
    float eps;
    int size;
};

struct Gate {
    const void *x;  // [tokens, 2 * size]
    void *out;      // [tokens, size]
    int tokens, size;
};

struct Rotate {
    void *x;  // [tokens, stride], of which the first heads * head_dim are rotated
    const float *cosines, *sines;  // [tokens, pairs]
    int tokens, stride, heads, head_dim, pairs;
};

// Kinds of activations.

struct Half {
    typedef Bits16 Stored;
    static __device__ __forceinline__ float widen(Stored value) { return half_to_float(value); }
    static __device__ __forceinline__ Stored narrow(float value) { return float_to_half(value); }
};

struct Bfloat {
    typedef Bits16 Stored;
    static __device__ __forceinline__ float widen(Stored value) { return __uint_as_float((Bits32)value << 16); }
    static __device__ __forceinline__ Stored narrow(float value)
    {
        const Bits32 bits = __float_as_uint(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN: rounding might carry into the sign
        return (Stored)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
};

struct Single {
    typedef float Stored;
    static __device__ __forceinline__ float widen(Stored value) { return value; }
    static __device__ __forceinline__ Stored narrow(float value) { return value; }
};

typedef Activation::Stored Stored;

template <class Unused = void> static __device__ __forceinline__ void load_eight(const Bits16 *from, float *to)
{
    const uint4 raw = *(const uint4 *)from;
    const Bits32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = Activation::widen((Stored)(words[i / 2] >> (i % 2 * 16)));
}

template <class Unused = void> static __device__ __forceinline__ void load_eight(const float *from, float *to)
{
    const float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

template <class Unused = void> static __device__ __forceinline__ void store_eight(const float *from, Bits16 *to)
{
    Bits32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words[i] = (Bits32)(Bits16)Activation::narrow(from[2 * i]);
        words[i] |= (Bits32)(Bits16)Activation::narrow(from[2 * i + 1]) << 16;
    }
    *(uint4 *)to = make_uint4(words[0], words[1], words[2], words[3]);
}

template <class Unused = void> static __device__ __forceinline__ void store_eight(const float *from, float *to)
{
    ((float4 *)to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    ((float4 *)to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

// Kinds of weights. `decode` gives eight columns of one or two 32-bit words, exactly. An integer goes into the last
// bits of 2^23 as a float and 2^23 is taken away again: much faster than the instruction that converts.

static __device__ __forceinline__ void decode_int8(Bits32 low, Bits32 high, float *to)
{
    const Bits32 words[2] = {low ^ 0x80808080u, high ^ 0x80808080u};
#pragma unroll
    for (int i = 0; i < 8; ++i)
        to[i] = __uint_as_float(__byte_perm(words[i / 4], 0x4b000000u, 0x7440u + i % 4)) - 8388736.0f;
}

static __device__ __forceinline__ void decode_int4(Bits32 word, float *to)
{
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int shift = i % 4 * 4 ^ 4;  // an even column is the high half of its byte
        const Bits32 half = i < 4 ? word : word >> 16;
        const Bits32 raised = mask_and_flip(half, 15u << shift, 0x4b000000u | (8u << shift));
        to[i] = fmaf(__uint_as_float(raised), 1.0f / (1 << shift), -(8388608.0f / (1 << shift) + 8.0f));
    }
}

struct Int8 {
    enum { columns = 16, grouped = 0 };  // columns in 16 bytes
    static __device__ __forceinline__ void decode(const Bits32 *words, int octet, float *to)
    {
        decode_int8(words[2 * octet], words[2 * octet + 1], to);
    }
};

struct Int4 {
    enum { columns = 32, grouped = 0 };
    static __device__ __forceinline__ void decode(const Bits32 *words, int octet, float *to)
    {
        decode_int4(words[octet], to);
    }
};

struct GroupedInt4 : Int4 {
    enum { grouped = 1 };
};

// A block multiplies four rows of the weight by up to eight tokens: each thread sums over its share of the columns,
// and the threads' sums are added up in an order that depends on nothing but the number of columns. So a token's
// result is the same in any company.

enum { product_rows = 4, product_threads = 128, warp = 32 };

template <class Kind, int num_tokens> static __device__ __forceinline__ void product(const Product &a)
{
    __shared__ float shared[product_threads / warp][num_tokens * product_rows];
    const int chunks = a.columns / Kind::columns;
    const uint4 *rows[product_rows];
    const Bits16 *scales[product_rows];
    float sums[num_tokens][product_rows];
#pragma unroll
    for (int r = 0; r < product_rows; ++r) {
        const size_t row = min((int)blockIdx.x * product_rows + r, a.rows - 1);
        rows[r] = (const uint4 *)a.values + row * chunks;
        scales[r] = (const Bits16 *)a.scales + row * chunks;
#pragma unroll
        for (int t = 0; t < num_tokens; ++t) sums[t][r] = 0;
    }

#pragma unroll(num_tokens < 4 ? 2 : 1)  // what registers allow
    for (int chunk = threadIdx.x; chunk < chunks; chunk += product_threads) {
        Bits32 words[product_rows][4];
        float scale[product_rows], partial[num_tokens][product_rows];
#pragma unroll
        for (int r = 0; r < product_rows; ++r) {
            const uint4 raw = __ldcs(rows[r] + chunk);
            words[r][0] = raw.x, words[r][1] = raw.y, words[r][2] = raw.z, words[r][3] = raw.w;
            scale[r] = Kind::grouped ? half_to_float(scales[r][chunk]) : 1.0f;
#pragma unroll
            for (int t = 0; t < num_tokens; ++t) partial[t][r] = Kind::grouped ? 0.0f : sums[t][r];
        }
#pragma unroll
        for (int octet = 0; octet < Kind::columns / 8; ++octet) {
            float weight[product_rows][8];
#pragma unroll
            for (int r = 0; r < product_rows; ++r) Kind::decode(words[r], octet, weight[r]);
#pragma unroll
            for (int t = 0; t < num_tokens; ++t) {
                const size_t token = min(t, a.tokens - 1);
                float x[8];
                load_eight((const Stored *)a.x + token * a.columns + chunk * Kind::columns + octet * 8, x);
#pragma unroll
                for (int r = 0; r < product_rows; ++r)
#pragma unroll
                    for (int i = 0; i < 8; ++i) partial[t][r] = fmaf(weight[r][i], x[i], partial[t][r]);
            }
        }
#pragma unroll
        for (int r = 0; r < product_rows; ++r)
#pragma unroll
            for (int t = 0; t < num_tokens; ++t)
                sums[t][r] = Kind::grouped ? fmaf(scale[r], partial[t][r], sums[t][r]) : partial[t][r];
    }

#pragma unroll
    for (int t = 0; t < num_tokens; ++t)
#pragma unroll
        for (int r = 0; r < product_rows; ++r) {
            float sum = sums[t][r];
#pragma unroll
            for (int distance = warp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            if (threadIdx.x % warp == 0) shared[threadIdx.x / warp][t * product_rows + r] = sum;
        }
    __syncthreads();

    const int token = threadIdx.x / product_rows, row = blockIdx.x * product_rows + threadIdx.x % product_rows;
    if (token >= num_tokens || token >= a.tokens || row >= a.rows) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < product_threads / warp; ++w) sum += shared[w][threadIdx.x];
    if (!Kind::grouped) sum *= ((const float *)a.scales)[row];
    if (a.bias) sum += Activation::widen(((const Stored *)a.bias)[row]);
    ((Stored *)a.out)[(size_t)token * a.rows + row] = Activation::narrow(sum);
}

#define PRODUCTS(name, Kind) \
    ENTRY(product_##name##_1, product_threads, Product) { product<Kind, 1>(a); } \
    ENTRY(product_##name##_2, product_threads, Product) { product<Kind, 2>(a); } \
    ENTRY(product_##name##_4, product_threads, Product) { product<Kind, 4>(a); } \
    ENTRY(product_##name##_8, product_threads, Product) { product<Kind, 8>(a); }
PRODUCTS(int8, Int8)
PRODUCTS(int4, Int4)
PRODUCTS(grouped_int4, GroupedInt4)

// Weights as torch's matmul takes them: a thread writes eight columns.

enum { step_threads = 256 };

template <class Kind> static __device__ __forceinline__ void dequantise(const Dequantise &a)
{
    const size_t index = (size_t)blockIdx.x * step_threads + threadIdx.x;
    const int octets = a.columns / 8;
    if (index >= (size_t)a.rows * octets) return;
    const int row = (int)(index / octets), octet = (int)(index % octets);
    Bits32 words[2];
    if (Kind::columns == 32) {
        words[0] = ((const Bits32 *)a.values)[index];
    } else {
        const uint2 raw = ((const uint2 *)a.values)[index];
        words[0] = raw.x, words[1] = raw.y;
    }
    const float scale = Kind::grouped ? half_to_float(((const Bits16 *)a.scales)[(size_t)row * (octets / 4) + octet / 4])
                                      : ((const float *)a.scales)[row];
    float weight[8];
    Kind::decode(words, 0, weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) weight[i] *= scale;
    store_eight(weight, (Stored *)a.out + index * 8);
}

ENTRY(dequantise_int8, step_threads, Dequantise) { dequantise<Int8>(a); }
ENTRY(dequantise_int4, step_threads, Dequantise) { dequantise<Int4>(a); }
ENTRY(dequantise_grouped_int4, step_threads, Dequantise) { dequantise<GroupedInt4>(a); }

// The small steps between products, each in one pass; a block takes one token's norm.

ENTRY(rms_norm, step_threads, Norm)
{
    __shared__ float shared[step_threads / warp];
    const Stored *x = (const Stored *)a.x + (size_t)blockIdx.x * a.size;
    Stored *out = (Stored *)a.out + (size_t)blockIdx.x * a.size;
    float sum = 0;
    for (int i = threadIdx.x; i < a.size; i += step_threads) {
        const float value = Activation::widen(x[i]);
        sum = fmaf(value, value, sum);
    }
#pragma unroll
    for (int distance = warp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (threadIdx.x % warp == 0) shared[threadIdx.x / warp] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < step_threads / warp; ++w) sum += shared[w];
    const float factor = 1.0f / sqrtf(sum / a.size + a.eps);
    for (int i = threadIdx.x; i < a.size; i += step_threads) {
        const float scaled = Activation::widen(Activation::narrow(Activation::widen(x[i]) * factor));
        out[i] = Activation::narrow(scaled * Activation::widen(((const Stored *)a.weight)[i]));
    }
}

ENTRY(gate, step_threads, Gate)
{
    const size_t index = (size_t)blockIdx.x * step_threads + threadIdx.x;
    if (index >= (size_t)a.tokens * a.size) return;
    const Stored *x = (const Stored *)a.x + index / a.size * 2 * a.size + index % a.size;
    const float gate = Activation::widen(x[0]), up = Activation::widen(x[a.size]);
    ((Stored *)a.out)[index] = Activation::narrow(gate / (1.0f + expf(-gate)) * up);
}

ENTRY(rotate, step_threads, Rotate)
{
    const size_t index = (size_t)blockIdx.x * step_threads + threadIdx.x;
    const size_t turning = (size_t)a.heads * a.pairs;
    if (index >= a.tokens * turning) return;
    const size_t token = index / turning, head = index % turning / a.pairs, pair = index % a.pairs;
    Stored *x = (Stored *)a.x + token * a.stride + head * a.head_dim + 2 * pair;
    const float cosine = a.cosines[token * a.pairs + pair], sine = a.sines[token * a.pairs + pair];
    const float even = Activation::widen(x[0]), odd = Activation::widen(x[1]);
    x[0] = Activation::narrow(even * cosine - odd * sine);
    x[1] = Activation::narrow(odd * cosine + even * sine);
}
