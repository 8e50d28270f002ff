// Compiled with -mamx-tile -mamx-bf16 where the compiler has them (FUSED_RL_AMX).
#include "amx.h"

#include <cstdlib>
#include <cstring>
#include <string>

#ifdef FUSED_RL_AMX
#include <ATen/cpu/Utils.h>
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace fused_rl {

#ifdef FUSED_RL_AMX

static bool forbidden() {
  for (const char* name : {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}) {
    const char* value = std::getenv(name);
    if (!value) continue;
    std::string isa(value);
    for (char& c : isa) c = std::toupper(static_cast<unsigned char>(c));
    return isa.find("AMX") == std::string::npos && isa != "DEFAULT" && isa != "ALL";
  }
  return false;
}

static bool probe() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  return (edx & amx_bf16) && (edx & amx_tile) && !forbidden() && at::cpu::init_amx();
}

bool has_amx() {
  static const bool has = probe();
  return has;
}

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const Shapes shapes;

void amx_configure() { _tile_loadconfig(&shapes); }

void amx_release() { _tile_release(); }

static constexpr int64_t tile = 512, pair = 2 * tile, panel = 8 * pair;  // bf16 elements

// Compilers do not know what the intrinsics read.
static inline void barrier() { __asm__ volatile("" ::: "memory"); }

// Four tiles of C, 32 x 32, from `steps` pairs of tiles of each operand. soon: what is to be in the L2
// cache next, a fourth of a pair of tiles for each step.
static inline __attribute__((always_inline)) void product_32(const uint16_t* A, const uint16_t* B,
                                                             int64_t steps, float* C, int64_t ldc,
                                                             bool add, const char* soon) {
  barrier();
  const int64_t line = ldc * sizeof(float);
  float* const low = C + 16 * ldc;
  if (add) {
    _tile_loadd(0, C, line);
    _tile_loadd(1, C + 16, line);
    _tile_loadd(2, low, line);
    _tile_loadd(3, low + 16, line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, A += pair, B += pair, soon += 256) {
    for (int i = 0; i < 256; i += 64) _mm_prefetch(soon + i, _MM_HINT_T1);
    _tile_loadd(6, B, 64);
    _tile_loadd(4, A, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, B + tile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, A + tile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, C, line);
  _tile_stored(1, C + 16, line);
  _tile_stored(2, low, line);
  _tile_stored(3, low + 16, line);
  barrier();
}

// The last rows of C, fewer than 32: by way of 32.
static void product_rest(int64_t rows, const uint16_t* A, const uint16_t* B, int64_t steps, float* C,
                         int64_t ldc, bool add) {
  alignas(64) float whole[32 * 32] = {};
  for (int64_t m = 0; add && m < rows; ++m) {
    std::memcpy(whole + 32 * m, C + m * ldc, 32 * sizeof(float));
  }
  product_32(A, B, steps, whole, 32, add, reinterpret_cast<const char*>(B));
  for (int64_t m = 0; m < rows; ++m) {
    std::memcpy(C + m * ldc, whole + 32 * m, 32 * sizeof(float));
  }
}

void amx_product(int64_t M, int64_t N, int64_t K, const uint16_t* A, const uint16_t* B, float* C,
                 int64_t ldc, bool add) {
  const int64_t steps = K / 32;
  for (int64_t n = 0; n < N; n += 32) {
    const uint16_t* const right = B + n / 32 * panel;
    // The next columns or, as operands lie one after the other, the next panel or operand.
    const char* const next = reinterpret_cast<const char*>(right + panel);
    for (int64_t m = 0; m < M; m += 32) {
      const uint16_t* const left = A + m / 32 * panel;
      float* const to = C + m * ldc + n;
      if (m + 32 <= M) {
        product_32(left, right, steps, to, ldc, add, next + m * (256 * 8 / 32));
      } else {
        product_rest(M - m, left, right, steps, to, ldc, add);
      }
    }
  }
}

#else

bool has_amx() { return false; }
void amx_configure() {}
void amx_release() {}
void amx_product(int64_t, int64_t, int64_t, const uint16_t*, const uint16_t*, float*, int64_t,
                 bool) {
  std::abort();
}

#endif

}  // namespace fused_rl
