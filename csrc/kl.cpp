// k1, k2, k3 and abs of d = logprobs - ref_logprobs: one pass reads d and writes value and slope.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "loops.h"

namespace fused_rl {

template <class T>
static void run(const at::Tensor& d, int64_t value_kind, int64_t slope_kind, at::Tensor& value,
                at::Tensor& slope) {
  const T* in = d.const_data_ptr<T>();
  T* out = value.mutable_data_ptr<T>();
  T* out_slope = slope.mutable_data_ptr<T>();
  at::parallel_for(0, d.numel(), 4096, [&](int64_t begin, int64_t end) {
    loops<T>().kl(in + begin, end - begin, value_kind, slope_kind, out + begin, out_slope + begin);
  });
}

static std::tuple<at::Tensor, at::Tensor> kl(const at::Tensor& d, int64_t value_kind,
                                             int64_t slope_kind) {
  const at::Tensor in = d.contiguous();
  at::Tensor value = at::empty_like(in), slope = at::empty_like(in);
  if (d.scalar_type() == at::kDouble) {
    run<double>(in, value_kind, slope_kind, value, slope);
  } else {
    run<float>(in, value_kind, slope_kind, value, slope);
  }
  return {value, slope};
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) { m.impl("kl", &kl); }

}  // namespace fused_rl
