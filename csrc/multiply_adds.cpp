// Compiled once per instruction set, with FUSED_RL_ISA naming the set.
#include "multiply_adds.h"

#include "simd.h"

namespace fused_rl::FUSED_RL_ISA {

// More than latency times units of any CPU (4 x 2 on x86, 4 x 4 elsewhere), fewer than registers.
#ifdef __x86_64__
static constexpr int chains = 12;
#else
static constexpr int chains = 24;
#endif

static float run(int64_t repeats) {
  Vec<float> sums[chains];
  for (int i = 0; i < chains; ++i) sums[i] = splat<float>(float(i));
  for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < chains; ++i) sums[i] = sums[i] * 0.5f + 1.f;
  }
  Vec<float> total{};
  for (int i = 0; i < chains; ++i) total += sums[i];
  float lanes[Simd<float>::width], sum = 0;
  store(lanes, total);
  for (float lane : lanes) sum += lane;
  return sum;
}

extern const MultiplyAdds multiply_adds;
const MultiplyAdds multiply_adds{2.0 * chains * Simd<float>::width, &run};

}  // namespace fused_rl::FUSED_RL_ISA
