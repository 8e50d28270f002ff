// The product of two small matrices, on one thread, with accumulators at least as wide as fp32.
#pragma once

#include <c10/util/BFloat16.h>

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

// Whether a register-blocked microkernel serves T here. Without one, float goes through at::mm and
// bf16 is converted to float first; double always goes through at::mm.
template <class T>
bool has_microkernel();

// To be destroyed on each thread that has multiplied: gives the matrix unit back.
struct MatmulScope {
  MatmulScope() = default;
  MatmulScope(const MatmulScope&) = delete;
  MatmulScope& operator=(const MatmulScope&) = delete;
  ~MatmulScope();
};

}  // namespace fused_rl
