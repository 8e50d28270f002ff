// Instructions that only some CPUs have, each in a function that is compiled for it and for nothing else.
#include <ATen/cpu/Utils.h>

#include "multiply_adds.h"

#ifdef FUSED_RL_X86_64
#include <cpuid.h>
#include <immintrin.h>
#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)
#define FUSED_RL_HAS_AMX_INTRINSICS
#endif
#endif

namespace fused_rl {

#ifdef FUSED_RL_X86_64
static constexpr int dot_chains = 16;

__attribute__((target("avx512f,avx512bf16"))) static float run_avx512_bf16(int64_t repeats) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  // 1 and -1: what is added is 0.
  const __m512bh signs = (__m512bh)_mm512_set1_epi32(0x3f80bf80);
  __m512 sums[dot_chains];
  for (int i = 0; i < dot_chains; ++i) sums[i] = _mm512_set1_ps(float(i));
  for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < dot_chains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], ones, signs);
  }
  __m512 total = sums[0];
  for (int i = 1; i < dot_chains; ++i) total = _mm512_add_ps(total, sums[i]);
  return _mm512_reduce_add_ps(total);
}

const MultiplyAdds* avx512_bf16() {
  static constexpr MultiplyAdds here{2.0 * dot_chains * 32, &run_avx512_bf16};
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16") ? &here
                                                                                   : nullptr;
}
#else
const MultiplyAdds* avx512_bf16() { return nullptr; }
#endif

#ifdef FUSED_RL_HAS_AMX_INTRINSICS
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

__attribute__((target("amx-tile,amx-bf16"))) static float run_amx_bf16(int64_t repeats) {
  const TileConfig config;
  alignas(64) uint16_t ones[512], signs[512];
  alignas(64) float sums[256];
  for (int i = 0; i < 512; ++i) {
    ones[i] = 0x3f80;
    signs[i] = i % 2 ? 0xbf80 : 0x3f80;
  }
  // GCC is not told that these instructions read, and write, all of it.
  asm volatile("" : : "r"(&config), "r"(ones), "r"(signs), "r"(sums) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, signs, 64);
  for (int64_t r = 0; r < repeats; ++r) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_release();
  asm volatile("" : : : "memory");
  return sums[0];
}

const MultiplyAdds* amx_bf16() {
  static constexpr MultiplyAdds here{2.0 * 6 * 16 * 16 * 32, &run_amx_bf16};
  unsigned int eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return nullptr;
  constexpr unsigned int bfloat16 = 1u << 22, tiles = 1u << 24;
  if (!(edx & bfloat16) || !(edx & tiles)) return nullptr;
  // Tiles are 8 KiB of state more, which a process has to ask the kernel for.
  return at::cpu::init_amx() ? &here : nullptr;
}
#else
const MultiplyAdds* amx_bf16() { return nullptr; }
#endif

}  // namespace fused_rl
