#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

// A sleeping thread takes tens of microseconds to wake, as long as a small product takes. So threads look out for work
// this long before they sleep: from one part of a layer to the next, but not from one step to the next.
constexpr std::chrono::microseconds kPatience{60};

inline void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

template <class Condition>
bool comes_soon(const Condition &condition) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    do {
        for (int i = 0; i < 16; ++i) {
            if (condition()) return true;
            breathe();
        }
    } while (std::chrono::steady_clock::now() < end);
    return condition();
}

struct Pool {
    // How many helpers may still enter the work at hand, and how many are inside it, in one word.
    static constexpr uint64_t kInside = 1, kWanted = uint64_t(1) << 32, kAllInside = kWanted - 1;

    std::mutex callers;  // held by the one caller that has the helpers
    std::atomic<uint64_t> state{0};
    // Written while nobody is inside.
    void (*task)(void *, int64_t) = nullptr;
    void *context = nullptr;
    int64_t num_chunks = 0;
    int num_threads = 1;
    std::atomic<int64_t> next{0};
    // For those who sleep. They count themselves before they look at the state a last time; whoever changes it looks at
    // the counts afterwards: one of both sees the other.
    std::mutex mutex;
    std::condition_variable work, finished;
    std::atomic<int> sleeping{0};
    std::atomic<bool> caller_sleeps{false};
    int num_helpers = 0;

    // Many neighbours first, for memory is fastest when read on and on; in the end one by one, so that all end together.
    void take_chunks() {
        for (int64_t first = next.load(std::memory_order_relaxed); first < num_chunks;) {
            const int64_t end = first + std::max<int64_t>(1, (num_chunks - first) / (4 * num_threads));
            if (!next.compare_exchange_weak(first, end, std::memory_order_relaxed)) continue;
            for (; first < end; ++first) task(context, first);
            first = next.load(std::memory_order_relaxed);
        }
    }

    bool enter() {
        for (uint64_t seen = state.load(); seen >= kWanted;)
            if (state.compare_exchange_weak(seen, seen - kWanted + kInside)) return true;
        return false;
    }

    void leave() {
        if (state.fetch_sub(kInside) == kInside && caller_sleeps.load()) {
            { std::lock_guard<std::mutex> lock(mutex); }
            finished.notify_one();
        }
    }

    void help() {
        for (;;) {
            if (!comes_soon([this] { return state.load(std::memory_order_relaxed) >= kWanted; })) {
                std::unique_lock<std::mutex> lock(mutex);
                ++sleeping;
                work.wait(lock, [this] { return state.load() >= kWanted; });
                --sleeping;
            }
            if (enter()) {
                take_chunks();
                leave();
            }
        }
    }

    void run(int helpers) {
        for (; num_helpers < helpers; ++num_helpers) std::thread([this] { help(); }).detach();
        next.store(0, std::memory_order_relaxed);
        state.store(uint64_t(helpers) * kWanted);
        if (sleeping.load()) {
            { std::lock_guard<std::mutex> lock(mutex); }
            for (int i = 0; i < helpers; ++i) work.notify_one();
        }
        take_chunks();
        state.fetch_and(kAllInside);  // who has not come yet need not come
        const auto nobody_inside = [this] { return state.load() == 0; };
        if (comes_soon(nobody_inside)) return;
        std::unique_lock<std::mutex> lock(mutex);
        caller_sleeps = true;
        finished.wait(lock, nobody_inside);
        caller_sleeps = false;
    }
};

// Never destroyed: helpers sleep in it until the process ends. A forked child starts with a new one, without helpers.
Pool *pool = new Pool;

#ifndef _WIN32
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif

}  // namespace

void run_chunks(void (*task)(void *, int64_t), void *context, int64_t num_chunks, int num_threads) {
    if (num_threads > num_chunks) num_threads = int(num_chunks);
    std::unique_lock<std::mutex> mine(pool->callers, std::defer_lock);
    if (num_threads <= 1 || !mine.try_lock()) {
        for (int64_t chunk = 0; chunk < num_chunks; ++chunk) task(context, chunk);
        return;
    }
    pool->task = task;
    pool->context = context;
    pool->num_chunks = num_chunks;
    pool->num_threads = num_threads;
    pool->run(num_threads - 1);
}
