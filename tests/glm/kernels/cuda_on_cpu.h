// Enough of CUDA to run kernels.cu on a CPU: g++ includes this first. The threads of a block are fibers that take turns
// and run until a barrier or a shuffle, which all that take part must reach; a thread that does not is found. `order`
// says in which order they take turns: results must not depend on it.

#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector)
{
    const uint64_t bytes = (uint64_t)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}

inline unsigned mask_and_flip(unsigned word, unsigned mask, unsigned flip) { return (word & mask) ^ flip; }

inline float half_to_float(unsigned short bits)
{
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    return bits & 0x8000 ? -value : value;
}

inline unsigned short float_to_half(float value)
{
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7fff;
    int exponent;
    frexpf(value, &exponent);  // value is in [2^(exponent-1), 2^exponent)
    const int last = exponent - 11 > -24 ? exponent - 11 : -24;  // of the last bit that a half keeps
    const float rounded = std::nearbyint(ldexpf(fabsf(value), -last));
    if (std::isinf(value) || ldexpf(rounded, last) > 65504.0f) return sign | 0x7c00;
    if (rounded < 1024) return sign | (unsigned short)rounded;
    return sign + (unsigned short)(((last + 24) << 10) + (int)rounded);  // 1024 of `rounded` raise the exponent by one
}

template <class T> T __ldcs(const T *from)
{
    if ((uintptr_t)from % sizeof(T)) raise(SIGBUS);
    return *from;
}

namespace emulate {

enum State { ready, at_barrier, at_shuffle, finished };

struct Index { unsigned x; };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    float sent, received;
    int distance;
};

inline Index thread_index, block_index;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;

inline void wait(State state)
{
    const unsigned self = thread_index.x;
    fibers[self].state = state;
    swapcontext(&fibers[self].context, &scheduler);
    thread_index.x = self;
}

inline void run_body()
{
    body();
    fibers[thread_index.x].state = finished;
}

// Lets those go on who have all come; false if nobody can.
inline bool release(unsigned num_threads)
{
    bool any = false;
    unsigned num_waiting = 0, num_finished = 0;
    for (unsigned i = 0; i < num_threads; ++i) {
        num_waiting += fibers[i].state == at_barrier;
        num_finished += fibers[i].state == finished;
    }
    if (num_waiting && num_waiting + num_finished == num_threads) {
        for (unsigned i = 0; i < num_threads; ++i)
            if (fibers[i].state == at_barrier) fibers[i].state = ready;
        return true;
    }
    for (unsigned first = 0; first < num_threads; first += 32) {
        bool together = true;
        for (unsigned i = first; i < first + 32; ++i)
            together &= fibers[i].state == at_shuffle && fibers[i].distance == fibers[first].distance;
        if (!together) continue;
        for (unsigned i = first; i < first + 32; ++i) {
            fibers[i].received = fibers[first + (i - first ^ fibers[i].distance)].sent;
            fibers[i].state = ready;
        }
        any = true;
    }
    return any;
}

inline bool run_block(unsigned num_threads, unsigned order)
{
    for (unsigned i = 0; i < num_threads; ++i) {
        Fiber &fiber = fibers[i];
        fiber.state = ready;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 1 << 16;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_body, 0);
    }
    for (unsigned num_finished = 0; num_finished < num_threads;) {
        num_finished = 0;
        for (unsigned i = 0; i < num_threads; ++i) {
            const unsigned turn = (i * (2 * order + 1) + order) % num_threads;  // any order: num_threads is even
            if (fibers[turn].state == ready) {
                thread_index.x = turn;
                swapcontext(&scheduler, &fibers[turn].context);
            }
            num_finished += fibers[turn].state == finished;
        }
        if (num_finished < num_threads && !release(num_threads)) return false;
    }
    return true;
}

template <class Kernel> int run(unsigned num_blocks, unsigned num_threads, unsigned order, Kernel kernel)
{
    if (num_threads % 32 || num_threads & num_threads - 1) return 2;
    while (fibers.size() < num_threads) fibers.push_back({{}, std::make_unique<char[]>(1 << 16)});
    body = kernel;
    for (unsigned block = 0; block < num_blocks; ++block) {
        block_index.x = order % 2 ? num_blocks - 1 - block : block;
        if (!run_block(num_threads, order)) return 1;
    }
    return 0;
}

}  // namespace emulate

#define threadIdx emulate::thread_index
#define blockIdx emulate::block_index

inline void __syncthreads() { emulate::wait(emulate::at_barrier); }

inline float __shfl_xor_sync(unsigned, float value, int distance)
{
    auto &self = emulate::fibers[emulate::thread_index.x];
    self.sent = value, self.distance = distance;
    emulate::wait(emulate::at_shuffle);
    return self.received;
}

// 0 if all went well, 1 for threads that wait for others in vain, 2 for a block that is no power of two of warps.
#define ENTRY(name, num_threads, Arguments) \
    static void name##_body(const Arguments &a); \
    extern "C" int name(const Arguments *a, unsigned num_blocks, unsigned threads, unsigned order) \
    { \
        if (threads != num_threads) return 2; \
        return emulate::run(num_blocks, threads, order, [=] { name##_body(*a); }); \
    } \
    static void name##_body(const Arguments &a)
