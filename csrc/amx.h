// Products of bf16 operands on the tile unit of CPUs that have one (Intel AMX).
#pragma once

#include <cstdint>

namespace fused_rl {

// Whether this CPU has the unit, the system lets this process use it, and oneDNN is not told to do
// without (ONEDNN_MAX_CPU_ISA): what forbids it there forbids it here.
bool has_amx();

// The tile shapes of amx_product, on this thread; to be undone with amx_release.
void amx_configure();
void amx_release();

// C[M, N] = A[M, K] B[K, N], or += when `add`. N and K are multiples of 32; ldc counts columns. Both
// operands lie in the order in which the unit takes them, as pairs of tiles of 1 KiB, for K up to 256:
//   A: [M / 32][8][2][16 rows][32 of k]             B: [N / 32][8][2][16 pairs of k][16 columns][2]
void amx_product(int64_t M, int64_t N, int64_t K, const uint16_t* A, const uint16_t* B, float* C,
                 int64_t ldc, bool add);

}  // namespace fused_rl
