// Multiply-adds in registers, as many as the CPU takes: what a product could reach if nothing had to be
// loaded or stored.
#pragma once

#include <cstdint>

namespace fused_rl {

struct MultiplyAdds {
  double flop;                   // of a repeat
  float (*run)(int64_t repeats);  // returns the sum of all the sums, so that none is left out
};

// Products of pairs of bf16, summed in fp32: null where this CPU has none. The one for AMX leaves its
// thread without tiles, whoever had configured some.
const MultiplyAdds* avx512_bf16();
const MultiplyAdds* amx_bf16();

}  // namespace fused_rl
