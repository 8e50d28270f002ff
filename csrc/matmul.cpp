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

template <class T>
void tile_matmul(int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B, int64_t ldb,
                 Acc<T>* C, int64_t ldc, bool add) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C, true);
  } else if constexpr (std::is_same_v<T, float>) {
    if (has_microkernel<float>()) {
      cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C, false);
    } else {
      mm(M, N, K, A, lda, B, ldb, C, ldc, add);
    }
  } else {
    mm(M, N, K, A, lda, B, ldb, C, ldc, add);
  }
}

MatmulScope::MatmulScope()
    : has_bfloat16(has_microkernel<c10::BFloat16>()), has_float(has_microkernel<float>()) {}

MatmulScope::~MatmulScope() {
  if (has_bfloat16) cpublas::brgemm_release(true);
  if (has_float) cpublas::brgemm_release(false);
}

template bool has_microkernel<c10::BFloat16>();
template bool has_microkernel<float>();
template bool has_microkernel<double>();
template void tile_matmul(int64_t, int64_t, int64_t, const c10::BFloat16*, int64_t,
                          const c10::BFloat16*, int64_t, float*, int64_t, bool);
template void tile_matmul(int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t,
                          float*, int64_t, bool);
template void tile_matmul(int64_t, int64_t, int64_t, const double*, int64_t, const double*, int64_t,
                          double*, int64_t, bool);

}  // namespace fused_rl
