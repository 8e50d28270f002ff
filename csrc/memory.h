// Buffers that calls take and give back. Fresh memory costs a page fault for every 4 KiB that is
// written first, up to a tenth of a call; so what is given back is kept for the next call, up to
// `most_kept` bytes, and handed to the system where that runs short of memory (madvise, MADV_FREE).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fused_rl {

inline constexpr size_t most_kept = 256 << 20;

// On a cache-line boundary. Throws std::bad_alloc where there is no memory.
void* take_memory(size_t bytes);
void give_memory(void* from, size_t bytes) noexcept;
// Bytes that are kept and that no call has at the moment.
size_t kept_memory();
void release_memory();

// A tensor in such a buffer, contiguous, not initialised: large ones, which a step forms again and again.
at::Tensor kept_tensor(at::IntArrayRef size, at::ScalarType dtype);

// For a large buffer, before it is first written: huge pages, where the system offers them, take a
// fault for 2 MiB at a time.
void prefer_huge_pages(void* data, size_t bytes);

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size), data_(static_cast<T*>(take_memory(bytes()))) {}
  Buffer(Buffer&& other) noexcept
      : size_(std::exchange(other.size_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_) give_memory(data_, bytes());
  }
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  size_t bytes() const { return size_ * sizeof(T); }
  int64_t size_ = 0;
  T* data_ = nullptr;
};

}  // namespace fused_rl
