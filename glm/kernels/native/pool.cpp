#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

struct Pool {
    std::mutex callers;  // held by the one caller that has the helpers
    std::mutex mutex;    // guards everything below
    std::condition_variable work, finished;
    int num_helpers = 0, wanted = 0, inside = 0;
    void (*task)(void *, int64_t) = nullptr;
    void *context = nullptr;
    int64_t num_chunks = 0;
    std::atomic<int64_t> next{0};

    void take_chunks() {
        for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < num_chunks;) task(context, chunk);
    }

    void help() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            work.wait(lock, [this] { return wanted > 0; });
            --wanted;
            ++inside;
            lock.unlock();
            take_chunks();
            lock.lock();
            if (--inside == 0) finished.notify_one();
        }
    }

    void run(int num_threads) {
        const int helpers = num_threads - 1;
        {
            std::lock_guard<std::mutex> lock(mutex);
            for (; num_helpers < helpers; ++num_helpers) std::thread([this] { help(); }).detach();
            wanted = helpers;
        }
        for (int i = 0; i < helpers; ++i) work.notify_one();
        take_chunks();
        std::unique_lock<std::mutex> lock(mutex);
        wanted = 0;
        finished.wait(lock, [this] { return inside == 0; });
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
    std::unique_lock<std::mutex> mine(pool->callers, std::try_to_lock);
    if (num_threads <= 1 || !mine.owns_lock()) {
        for (int64_t chunk = 0; chunk < num_chunks; ++chunk) task(context, chunk);
        return;
    }
    pool->task = task;
    pool->context = context;
    pool->num_chunks = num_chunks;
    pool->next.store(0, std::memory_order_relaxed);
    pool->run(num_threads);
}
