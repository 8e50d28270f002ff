#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <memory>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fused_rl {

namespace {

constexpr size_t huge_page = 2 << 20, small = 64 << 10;  // whole huge pages pay from a few on

// Sizes are rounded so that a call with a few tokens more or less finds the same blocks again.
size_t rounded(size_t bytes) {
  const size_t unit = bytes < small ? 4096 : bytes < 4 * huge_page ? small : huge_page;
  return (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit;
}

std::align_val_t alignment(size_t size) {
  return std::align_val_t(size < 4 * huge_page ? 4096 : huge_page);
}

struct Block {
  void* data;
  size_t size;
};

struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;  // in the order in which they were given back
  size_t total = 0;
};

// Never destroyed: threads may give memory back while the process ends.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

void destroy(Block block) { ::operator delete(block.data, alignment(block.size)); }

// What the system may take, without a fault for what it leaves.
void offer(const Block& block) {
#if defined(__linux__) && defined(MADV_FREE)
  if (block.size >= huge_page) madvise(block.data, block.size, MADV_FREE);
#else
  (void)block;
#endif
}

}  // namespace

void* take_memory(size_t bytes) {
  const size_t size = rounded(bytes);
  {
    Kept& all = kept();
    const std::lock_guard lock(all.mutex);
    // The latest is the likeliest to be in a cache.
    for (size_t i = all.blocks.size(); i-- > 0;) {
      if (all.blocks[i].size != size) continue;
      void* const found = all.blocks[i].data;
      all.blocks.erase(all.blocks.begin() + i);
      all.total -= size;
      return found;
    }
  }
  void* const fresh = ::operator new(size, alignment(size));
  prefer_huge_pages(fresh, size);
  return fresh;
}

void give_memory(void* from, size_t bytes) noexcept {
  const Block block{from, rounded(bytes)};
  if (block.size > most_kept) return destroy(block);
  offer(block);
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  size_t dropped = 0;
  for (size_t total = all.total + block.size; total > most_kept; ++dropped) {
    total -= all.blocks[dropped].size;
  }
  for (size_t i = 0; i < dropped; ++i) {
    all.total -= all.blocks[i].size;
    destroy(all.blocks[i]);
  }
  all.blocks.erase(all.blocks.begin(), all.blocks.begin() + dropped);
  try {
    all.blocks.push_back(block);
    all.total += block.size;
  } catch (...) {
    destroy(block);
  }
}

size_t kept_memory() {
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  return all.total;
}

void release_memory() {
  Kept& all = kept();
  const std::lock_guard lock(all.mutex);
  for (const Block& block : all.blocks) destroy(block);
  all.blocks.clear();
  all.total = 0;
}

namespace {

// torch's way to memory, with a note of how much there is of it.
struct Allocator final : at::Allocator {
  struct Taken {
    explicit Taken(size_t size) : bytes(size), data(take_memory(size)) {}
    ~Taken() { give_memory(data, bytes); }
    size_t bytes;
    void* data;
  };
  at::DataPtr allocate(size_t bytes) override {
    auto taken = std::make_unique<Taken>(bytes);
    void* const data = taken->data;
    return {data, taken.release(), [](void* of) { delete static_cast<Taken*>(of); }, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

}  // namespace

at::Tensor kept_tensor(at::IntArrayRef size, at::ScalarType dtype) {
  static Allocator* const allocator = new Allocator;
  const at::DispatchKeySet keys(at::DispatchKey::CPU);
  at::Tensor out = at::detail::empty_generic(size, allocator, keys, dtype, std::nullopt);
  // As at::empty does, for those who look for what is never written.
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    if (out.is_floating_point()) {
      out.fill_(std::numeric_limits<double>::quiet_NaN());
    } else {
      out.fill_(-1);
    }
  }
  return out;
}

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page;
  const uintptr_t last = (begin + bytes) / huge_page * huge_page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fused_rl
