#include "matmul.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <new>

namespace fused_rl {

namespace cpublas = at::native::cpublas;

// oneDNN decides at run time what the CPU has, and throws where it has no kernel for the type.
template <class T>
static bool probe() {
  constexpr int64_t size = 16;
  T ones[size * size];
  float product[size * size];
  std::fill(std::begin(ones), std::end(ones), T(1.f));
  try {
    cpublas::brgemm(size, size, size, size, size, size, false, ones, ones, product,
                    lines_per_pack<T> == 2);
    cpublas::brgemm_release(lines_per_pack<T> == 2);
  } catch (const std::bad_alloc&) {
    throw;  // says nothing about the CPU, and what is decided here stays
  } catch (const std::exception&) {
    return false;
  }
  return product[0] == float(size);
}

template <class T>
bool has_microkernel() {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    static const bool has = probe<T>();
    return has;
  }
}

template <class T>
static void mm(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb,
               T* C, int64_t ldc, bool add) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const at::Tensor a = at::from_blob(const_cast<T*>(A), {M, K}, {lda, 1}, options);
  const at::Tensor b = at::from_blob(const_cast<T*>(B), {K, N}, {ldb, 1}, options);
  at::Tensor c = at::from_blob(C, {M, N}, {ldc, 1}, options);
  if (add) {
    at::addmm_out(c, c, a, b);
  } else {
    at::mm_out(c, a, b);
  }
}

// One after the other into an accumulator, as AVX512-BF16 has them, 256 products lose up to a fifth more
// than torch's in fp32, and 128 a third less. The tile unit loses less: it sums by 32.
static constexpr int64_t bfloat16_step = 128;

// The product of one panel.
template <class T>
static void multiply(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B,
                     Acc<T>* C, int64_t ldc, bool add) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (tiled<T>()) {
      amx_product(M, N, K, reinterpret_cast<const uint16_t*>(A),
                  reinterpret_cast<const uint16_t*>(B), C, ldc, add);
    } else {
      for (int64_t k = 0; k < K; k += bfloat16_step) {
        cpublas::brgemm(M, N, std::min(bfloat16_step, K - k), lda, panel_columns, ldc, add || k > 0,
                        A + k, B + k * panel_columns, C, true);
      }
    }
  } else if constexpr (std::is_same_v<T, float>) {
    if (has_microkernel<float>()) {
      cpublas::brgemm(M, N, K, lda, panel_columns, ldc, add, A, B, C, false);
    } else {
      mm(M, N, K, A, lda, B, panel_columns, C, ldc, add);
    }
  } else {
    mm(M, N, K, A, lda, B, panel_columns, C, ldc, add);
  }
}

template <class T>
void matmul(int64_t M, int64_t N, int64_t K, Left<T> A, const T* B, Acc<T>* C, int64_t ldc,
            bool add) {
  constexpr int64_t step = sum_step<T>;
  for (int64_t k0 = 0; k0 < K; k0 += step) {
    multiply<T>(M, N, std::min(step, K - k0), A.data + k0 / step * A.next, A.row,
                B + k0 * panel_columns, C, ldc, add || k0 > 0);
  }
}

// On an AMX machine oneDNN's bf16 kernels are not called: they would set shapes of tiles of their own.
MatmulScope::MatmulScope()
    : has_bfloat16(has_microkernel<c10::BFloat16>()), has_float(has_microkernel<float>()) {
  if (has_amx()) amx_configure();
}

MatmulScope::~MatmulScope() {
  if (has_amx()) {
    amx_release();
  } else if (has_bfloat16) {
    cpublas::brgemm_release(true);
  }
  if (has_float) cpublas::brgemm_release(false);
}

template bool has_microkernel<c10::BFloat16>();
template bool has_microkernel<float>();
template bool has_microkernel<double>();
template void matmul(int64_t, int64_t, int64_t, Left<c10::BFloat16>, const c10::BFloat16*, float*,
                     int64_t, bool);
template void matmul(int64_t, int64_t, int64_t, Left<float>, const float*, float*, int64_t, bool);
template void matmul(int64_t, int64_t, int64_t, Left<double>, const double*, double*, int64_t,
                     bool);

}  // namespace fused_rl
