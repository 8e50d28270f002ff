// Which copy of loops.cpp serves this CPU: asked once, when the library is loaded.
#include "loops.h"

#define FUSED_RL_DECLARE(isa)                     \
  namespace fused_rl::isa {                       \
  extern const Loops<float> float_loops;          \
  extern const Loops<double> double_loops;        \
  extern const BFloat16Loops bfloat16_loops;      \
  extern const PackLoops<float, uint16_t> bfloat16_packs; \
  extern const PackLoops<float, float> float_packs; \
  extern const PackLoops<double, double> double_packs; \
  }

FUSED_RL_DECLARE(baseline)
#ifdef FUSED_RL_X86_64
FUSED_RL_DECLARE(avx2)
FUSED_RL_DECLARE(avx512)
#endif

namespace fused_rl {

struct Tables {
  const char* name;
  const Loops<float>* f32;
  const Loops<double>* f64;
  const BFloat16Loops* bf16;
  const PackLoops<float, uint16_t>* pack_bf16;
  const PackLoops<float, float>* pack_f32;
  const PackLoops<double, double>* pack_f64;
};

#define FUSED_RL_TABLES(isa) \
  Tables {                                                                              \
    #isa, &isa::float_loops, &isa::double_loops, &isa::bfloat16_loops,                    \
        &isa::bfloat16_packs, &isa::float_packs, &isa::double_packs                       \
  }

static Tables choose() {
#ifdef FUSED_RL_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return FUSED_RL_TABLES(avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return FUSED_RL_TABLES(avx2);
  }
#endif
  return FUSED_RL_TABLES(baseline);
}

static const Tables& tables() {
  static const Tables chosen = choose();
  return chosen;
}

template <>
const Loops<float>& loops<float>() {
  return *tables().f32;
}
template <>
const Loops<double>& loops<double>() {
  return *tables().f64;
}
template <>
const PackLoops<float, uint16_t>& pack_loops<float, uint16_t>() {
  return *tables().pack_bf16;
}
template <>
const PackLoops<float, float>& pack_loops<float, float>() {
  return *tables().pack_f32;
}
template <>
const PackLoops<double, double>& pack_loops<double, double>() {
  return *tables().pack_f64;
}
const BFloat16Loops& bfloat16_loops() { return *tables().bf16; }
const char* instruction_set() { return tables().name; }

}  // namespace fused_rl
