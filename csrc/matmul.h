// The product of two small matrices, on one thread, with accumulators at least as wide as fp32.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "layout.h"

namespace fused_rl {

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// bf16 operands B hold two lines per line, interleaved: (line 2k, line 2k + 1) at every column.
template <class T>
inline constexpr int64_t lines_per_pack = std::is_same_v<T, c10::BFloat16> ? 2 : 1;

// How many products go into one sum in fp32, at most: short sums, added up, lose less than one long
// sum. Operands lie in panels of so many products.
template <class T>
inline constexpr int64_t sum_step = lines_per_pack<T> == 2 ? 256 : 64;

// Columns in a panel of the right operand: four vectors of 16, at which the microkernels are best.
inline constexpr int64_t panel_columns = 64;

// Lines and columns of operands come in whole groups: of the tile unit's 32.
inline constexpr int64_t group = 32;

// Whether operands of this type lie as the tile unit takes them (amx.h).
template <class T>
bool tiled() {
  if constexpr (std::is_same_v<T, c10::BFloat16>) return has_amx();
  return false;
}

template <class T>
Layout left_layout() {
  if (tiled<T>()) return {32, 512, 8192, 1024};
  return {sum_step<T>, 16 * sum_step<T>, 32 * sum_step<T>, 32};
}

template <class T>
Layout right_layout() {
  if (tiled<T>()) return {32, 512, 8192, 1024};
  constexpr int64_t pack = lines_per_pack<T>, row = panel_columns * pack;
  return {row, 16 * pack, 32 * pack, 16 * row};
}

// A[M, K] in panels [M, sum_step], `next` elements apart. Rows of an operand that is not tiled may lie
// further apart, as in a matrix that is multiplied in place.
template <class T>
struct Left {
  const T* data;
  int64_t next;
  int64_t row = sum_step<T>;
};

// C[M, N] = A[M, K] B[K, N], or += when `add`, summed in steps. B lies in panels [sum_step, 64]; N is
// at most 64 and, like K for bf16, a multiple of what the layouts hold together: 16, or 32 where they
// are tiled. Besides M, N and the strides a microkernel knows only sum_step and the rest of K that is
// no whole step, so that there are few of them for any K.
template <class T>
void matmul(int64_t M, int64_t N, int64_t K, Left<T> A, const T* B, Acc<T>* C, int64_t ldc,
            bool add = false);

// Whether a register-blocked microkernel serves T here. Without one, float goes through at::mm and
// bf16 is converted to float first; double always goes through at::mm.
template <class T>
bool has_microkernel();

// Around what a thread multiplies: takes the matrix unit, and gives it back.
struct MatmulScope {
  MatmulScope();
  MatmulScope(const MatmulScope&) = delete;
  MatmulScope& operator=(const MatmulScope&) = delete;
  ~MatmulScope();

 private:
  const bool has_bfloat16, has_float;  // asked for here: a destructor must not throw
};

}  // namespace fused_rl
