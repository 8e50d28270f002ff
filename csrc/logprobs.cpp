// Log-probabilities and entropies from logits that are already there.
//
//     z           = logits / temperature
//     logprobs[n] = z[n, labels[n]] - lse[n]
//     entropy[n]  = lse[n] - sum_v p[n, v] z[n, v]
//     dlogits     = (dlogprobs (1[label] - p) - dentropy p (log p + entropy)) / temperature
//
// One thread owns a row. Traffic: forward reads NV, backward reads NV and writes NV.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "labels.h"
#include "loops.h"

namespace fused_rl {

// Row n of logits as T: in place where it can be, else converted into `buffer`.
template <class T>
static const T* row(const at::Tensor& logits, int64_t n, std::vector<T>& buffer) {
  const at::Tensor line = logits.select(0, n);
  if (line.scalar_type() == c10::CppTypeToScalarType<T>::value && line.stride(0) == 1) {
    return line.const_data_ptr<T>();
  }
  const int64_t V = line.numel();
  buffer.resize(V);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, line.scalar_type(), "logprobs_from_logits", [&] {
        const scalar_t* from = line.const_data_ptr<scalar_t>();
        const int64_t stride = line.stride(0);
        for (int64_t v = 0; v < V; ++v) buffer[v] = static_cast<T>(from[v * stride]);
      });
  return buffer.data();
}

template <class T>
static void forward(const at::Tensor& logits, const int64_t* labels, const T* temperature,
                    int64_t ignore_index, T* logprobs, T* entropy, double* lse) {
  const int64_t N = logits.size(0), V = logits.size(1);
  at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer;
    for (int64_t n = begin; n < end; ++n) {
      if (labels[n] == ignore_index) {
        logprobs[n] = entropy[n] = 0;
        lse[n] = 0;
        continue;
      }
      check_temperature(temperature[n], n);
      const T* z = row<T>(logits, n, buffer);
      T max, sum, moment;
      loops<T>().row_statistics(z, V, temperature[n], &max, &sum, &moment);
      const Statistics<T> s = finish<T>(max, sum, moment, z[labels[n]] / temperature[n]);
      logprobs[n] = s.logprob;
      entropy[n] = s.entropy;
      lse[n] = s.lse;
    }
  });
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor> logits_logprobs(
    const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& temperature,
    int64_t ignore_index) {
  check_labels(labels, logits.size(1), ignore_index);
  const at::Tensor y = labels.contiguous(), t = temperature.contiguous();
  at::Tensor logprobs = at::empty({logits.size(0)}, t.options());
  at::Tensor entropy = at::empty_like(logprobs);
  at::Tensor lse = at::empty({logits.size(0)}, t.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "logprobs_from_logits", [&] {
    forward<scalar_t>(logits, y.const_data_ptr<int64_t>(), t.const_data_ptr<scalar_t>(),
                      ignore_index, logprobs.mutable_data_ptr<scalar_t>(),
                      entropy.mutable_data_ptr<scalar_t>(), lse.mutable_data_ptr<double>());
  });
  return {logprobs, entropy, lse};
}

template <class T>
static void backward(const at::Tensor& dlogprobs, const at::Tensor& dentropy,
                     const at::Tensor& logits, const int64_t* labels, const T* temperature,
                     int64_t ignore_index, const double* lse, const T* entropy, at::Tensor& dlogits) {
  const int64_t N = logits.size(0), V = logits.size(1);
  const T* g = dlogprobs.const_data_ptr<T>();
  const T* h = dentropy.const_data_ptr<T>();
  at::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer, gradient(V);
    for (int64_t n = begin; n < end; ++n) {
      if (labels[n] == ignore_index || (g[n] == T(0) && h[n] == T(0))) continue;
      const T* z = row<T>(logits, n, buffer);
      auto split = SplitLse<T>::of(lse[n], entropy[n]);
      if (split.lost()) {
        T max, sum, moment;
        loops<T>().row_statistics(z, V, temperature[n], &max, &sum, &moment);
        split = {max, std::log(sum)};
      }
      loops<T>().row_gradient(z, V, temperature[n], split.high, split.low, entropy[n], g[n], h[n],
                              gradient.data());
      gradient[labels[n]] += g[n] / temperature[n];
      AT_DISPATCH_FLOATING_TYPES_AND2(
          at::kHalf, at::kBFloat16, dlogits.scalar_type(), "logprobs_from_logits_backward", [&] {
            scalar_t* to = dlogits.mutable_data_ptr<scalar_t>() + n * V;
            for (int64_t v = 0; v < V; ++v) to[v] = static_cast<scalar_t>(gradient[v]);
          });
    }
  });
}

static at::Tensor logits_logprobs_backward(const at::Tensor& dlogprobs, const at::Tensor& dentropy,
                                           const at::Tensor& logits, const at::Tensor& labels,
                                           const at::Tensor& temperature, int64_t ignore_index,
                                           const at::Tensor& lse, const at::Tensor& entropy) {
  at::Tensor dlogits = at::zeros(logits.sizes(), logits.options());
  const at::Tensor y = labels.contiguous(), t = temperature.contiguous();
  const at::Tensor g = dlogprobs.contiguous(), h = dentropy.contiguous();
  AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "logprobs_from_logits_backward", [&] {
    backward<scalar_t>(g, h, logits, y.const_data_ptr<int64_t>(), t.const_data_ptr<scalar_t>(),
                       ignore_index, lse.const_data_ptr<double>(),
                       entropy.const_data_ptr<scalar_t>(), dlogits);
  });
  return dlogits;
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("logits_logprobs", &logits_logprobs);
  m.impl("logits_logprobs_backward", &logits_logprobs_backward);
}

}  // namespace fused_rl
