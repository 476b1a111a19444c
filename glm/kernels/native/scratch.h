#pragma once
#include <cstdlib>

// Memory that lives as long as the calling thread and only grows.
class Scratch {
public:
    ~Scratch() { std::free(data_); }

    void *reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(64, size_);
        }
        return data_;
    }

private:
    void *data_ = nullptr;
    size_t size_ = 0;
};
