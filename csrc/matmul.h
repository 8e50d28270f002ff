// The product of two small matrices, on one thread, with accumulators at least as wide as fp32.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace fused_rl {

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// bf16 operands B hold two lines per line, interleaved: (line 2k, line 2k + 1) at every column.
template <class T>
inline constexpr int64_t lines_per_pack = std::is_same_v<T, c10::BFloat16> ? 2 : 1;

// C[M, N] = A[M, K] B[K, N], or += when `add`. K is even for bf16; ldb counts columns.
template <class T>
void tile_matmul(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb,
                 Acc<T>* C, int64_t ldc, bool add);

// How many products go into one sum in fp32: short sums, added up, lose less than one long sum. bf16
// operands have lost more than that before. A whole number of tiles of tokens.
template <class T>
inline constexpr int64_t sum_step = lines_per_pack<T> == 2 ? 256 : 64;

// C[M, N] = A[M, K] B[K, N], summed in steps. A lies in one panel [M, sum_step] per step, `next`
// elements apart: sum_step where its rows are whole. Besides M, N and the strides a microkernel knows
// only sum_step and the rest of K that is no whole step, so that there are few of them for any K.
template <class T>
void matmul_in_steps(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, int64_t next,
                     const T* B, int64_t ldb, Acc<T>* C, int64_t ldc) {
  constexpr int64_t step = sum_step<T>;
  for (int64_t k0 = 0; k0 < K; k0 += step) {
    tile_matmul<T>(M, N, std::min(step, K - k0), A + k0 / step * next, lda, B + k0 * ldb, ldb, C,
                   ldc, k0 > 0);
  }
}

// Whether a register-blocked microkernel serves T here. Without one, float goes through at::mm and
// bf16 is converted to float first; double always goes through at::mm.
template <class T>
bool has_microkernel();

// To be destroyed on each thread that has multiplied: gives the matrix unit back.
struct MatmulScope {
  MatmulScope();
  MatmulScope(const MatmulScope&) = delete;
  MatmulScope& operator=(const MatmulScope&) = delete;
  ~MatmulScope();

 private:
  const bool has_bfloat16, has_float;  // asked for here: a destructor must not throw
};

}  // namespace fused_rl
