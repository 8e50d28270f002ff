// What this CPU can do and what the library's inner loops reach of it, on all threads of torch at once:
// for `fused-rl doctor --measure`.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <array>
#include <chrono>
#include <cmath>
#include <future>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "loops.h"
#include "matmul.h"
#include "memory.h"
#include "multiply_adds.h"

#define FUSED_RL_DECLARE(isa)               \
  namespace fused_rl::isa {                 \
  extern const MultiplyAdds multiply_adds;  \
  }

FUSED_RL_DECLARE(baseline)
#ifdef FUSED_RL_X86_64
FUSED_RL_DECLARE(avx2)
FUSED_RL_DECLARE(avx512)
#endif

namespace fused_rl {

using Clock = std::chrono::steady_clock;

// The best is taken: clocks vary, and other processes come and go.
static constexpr int rounds = 8;
using Rates = std::array<double, rounds>;

// Work per second in each round of a thread. batch() does some, and says how much. The rounds of all
// threads are cut by the clock, not by each other.
template <class F>
static Rates rates_of(const F& batch, Clock::time_point start, double seconds) {
  const auto later = [&](double s) {
    return start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
  };
  Rates found;
  std::this_thread::sleep_until(start);
  for (int i = 0; i < rounds; ++i) {
    const auto begin = Clock::now(), end = later(seconds * (i + 1) / rounds);
    auto now = begin;
    double work = 0;
    do {
      work += batch();
      now = Clock::now();
    } while (now < end || now == begin);
    found[i] = work / std::chrono::duration<double>(now - begin).count();
  }
  return found;
}

// Of the best round, the sum over threads.
static double best(const std::vector<Rates>& of_threads) {
  double most = 0;
  for (int i = 0; i < rounds; ++i) {
    double sum = 0;
    for (const Rates& rates : of_threads) sum += rates[i];
    most = std::max(most, sum);
  }
  return most;
}

static Clock::time_point soon(int64_t threads) {
  return Clock::now() + std::chrono::microseconds(200 * threads);
}

// In the threads in which the library runs.
template <class F>
static double in_torch_threads(double seconds, const F& of_thread) {
  const int64_t threads = at::get_num_threads();
  const auto start = soon(threads);
  std::vector<Rates> found(threads, Rates{});
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) found[i] = of_thread(start, seconds);
  });
  return best(found);
}

static const MultiplyAdds* of_float32() {
#ifdef FUSED_RL_X86_64
  if (instruction_set() == std::string("avx512")) return &avx512::multiply_adds;
  if (instruction_set() == std::string("avx2")) return &avx2::multiply_adds;
#endif
  return &baseline::multiply_adds;
}

// In threads of their own: oneDNN remembers of each of torch's which tiles are configured there.
static double rate_of(const MultiplyAdds* unit, double seconds) {
  if (!unit) return 0;
  const auto batch = [&] {
    constexpr int64_t repeats = 2000;
    TORCH_INTERNAL_ASSERT(std::isfinite(unit->run(repeats)));
    return unit->flop * repeats;
  };
  const int64_t threads = at::get_num_threads();
  const auto start = soon(threads);
  std::vector<std::future<Rates>> futures;
  for (int64_t i = 0; i < threads; ++i) {
    futures.push_back(
        std::async(std::launch::async, [&] { return rates_of(batch, start, seconds); }));
  }
  std::vector<Rates> found;
  for (auto& future : futures) found.push_back(future.get());
  return best(found);
}

// Numbers of both signs, of about one.
template <class T>
static void fill(T* to, int64_t size) {
  uint32_t state = 1;
  for (int64_t i = 0; i < size; ++i) {
    state = state * 1664525u + 1013904223u;
    to[i] = T(float(state >> 8) / float(1 << 23) - 1.f);
  }
}

// A block of weight with a tile of tokens, as the forward multiplies them at H = 1024.
template <class T>
static Rates of_product(Clock::time_point start, double seconds) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const MatmulScope scope;
  constexpr int64_t K = 1024, rows = 512 * 1024 / (K * sizeof(T)), width = 64;
  Buffer<T> weight(rows * K), tokens(K * width);
  Buffer<float> z(rows * width);
  fill(weight.data(), rows * K);
  fill(tokens.data(), K * width);
  const auto batch = [&] {
    matmul<T>(rows, width, K, {weight.data(), rows * sum_step<T>}, tokens.data(), z.data(), width);
    return 2.0 * rows * width * K;
  };
  return rates_of(batch, start, seconds);
}

// Logits that join the running softmax of their tokens, as in the forward.
static Rates of_exponentials(Clock::time_point start, double seconds) {
  constexpr int64_t lines = 256, columns = 64;
  Buffer<float> z(lines * columns), running(3 * columns);
  fill(z.data(), lines * columns);
  float *max = running.data(), *sum = max + columns, *moment = sum + columns;
  const auto batch = [&] {
    std::fill(max, max + columns, -std::numeric_limits<float>::infinity());
    std::fill(sum, sum + 2 * columns, 0.f);
    loops<float>().accumulate(z.data(), lines, columns, columns, {max, sum, moment}, nullptr);
    return double(lines * columns);
  };
  return rates_of(batch, start, seconds);
}

// FLOP/s of multiply-adds in registers and of the library's products, and exponentials per second: of
// all threads of torch, for about that many seconds. 0 where the CPU has nothing of the kind.
static double cpu_rate(c10::string_view what, double seconds) {
  TORCH_CHECK_VALUE(seconds >= 0 && seconds <= 60, "seconds must be from 0 to 60, got ", seconds);
  if (what == "amx") return rate_of(amx_bf16(), seconds);
  if (what == "avx512_bf16") return rate_of(avx512_bf16(), seconds);
  if (what == "float32") return rate_of(of_float32(), seconds);
  if (what == "bfloat16 product") {
    return has_microkernel<c10::BFloat16>()
               ? in_torch_threads(seconds, of_product<c10::BFloat16>)
               : 0;
  }
  if (what == "float32 product") return in_torch_threads(seconds, of_product<float>);
  TORCH_CHECK_VALUE(what == "exponentials", "no rate is called ", what);
  return in_torch_threads(seconds, of_exponentials);
}

TORCH_LIBRARY_FRAGMENT(fused_rl, m) {
  m.def("cpu_rate(str what, float seconds) -> float", &cpu_rate);
}

}  // namespace fused_rl
