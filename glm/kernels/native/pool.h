// Threads that sleep when there has been no work for a moment, and a caller that works along with them.
#pragma once
#include <cstdint>

// Calls task(context, chunk) once for each chunk in [0, num_chunks), on the caller's thread and up to num_threads - 1
// others, and returns when all are done. A thread whose core is busy elsewhere takes fewer; a helper that never woke is not waited for. While another caller has the helpers, the caller works alone.
void run_chunks(void (*task)(void *context, int64_t chunk), void *context, int64_t num_chunks, int num_threads);
