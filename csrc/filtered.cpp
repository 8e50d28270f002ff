// Log-probabilities whose backward pass leaves out what hardly matters.
//
// The forward pass keeps, for each token and group of 512 vocabulary entries, the largest logit. The
// backward pass walks the groups: a group's tokens are those that give one of its entries a
// probability of at least `filter`, or have their label in it; for the others neither logits nor
// gradients are formed.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <bit>
#include <cmath>
#include <limits>

#include "labels.h"
#include "problem.h"
#include "tokens.h"

namespace fused_rl {

static int64_t filter_groups(int64_t V) { return (V + filter_rows - 1) / filter_rows; }

static Tensors5 linear_filtered_logprobs(const at::Tensor& hidden, const at::Tensor& weight,
                                         const Bias& bias, const at::Tensor& labels,
                                         const at::Tensor& temperature, double scale,
                                         double softcap, int64_t ignore_index,
                                         int64_t /*chunk_bytes*/, double /*filter*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  const int64_t N = y.numel(), groups = filter_groups(weight.size(0));
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors5 {
    using T = decltype(zero);
    using A = Acc<T>;
    auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, active);
    p.block = std::bit_floor(uint64_t(p.block));
    const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const A lowest = -std::numeric_limits<A>::infinity();
    at::Tensor peaks = at::full({groups, p.padded}, lowest, options);
    const auto s = p.N ? forward<T>(p, nullptr, nullptr, nullptr, peaks.mutable_data_ptr<A>())
                       : TokenStatistics<T>{};
    peaks = peaks.narrow(1, 0, p.N).contiguous();
    if (p.N < N) {
      peaks = at::full({groups, N}, lowest, options).index_copy_(1, index_tensor(active), peaks);
    }
    return {scatter(s.logprobs, active, N), scatter(s.entropy, active, N),
            scatter(s.lse, active, N), scatter(s.top, active, N), peaks};
  });
}

// Of the tokens `rows`, those that take part in group g.
template <class A>
static std::vector<int64_t> tokens_of_group(const std::vector<int64_t>& rows, const A* peaks,
                                            const int64_t* labels, const double* lse,
                                            const A* entropy, int64_t g, double log_filter) {
  std::vector<int64_t> chosen;
  for (int64_t n : rows) {
    const auto split = SplitLse<A>::of(lse[n], entropy[n]);
    const A log_p = (peaks[n] - split.high) - split.low;
    // A NaN is above every bound: it must reach the gradient.
    if (!(log_p < log_filter) || labels[n] / filter_rows == g) {
      chosen.push_back(n);
    }
  }
  return chosen;
}

// to[rows[i]] += from[i]
template <class A>
static void add_rows(const at::Tensor& from, const std::vector<int64_t>& rows,
                     const at::Tensor& to) {
  const int64_t H = from.size(1);
  at::parallel_for(0, rows.size(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      loops<A>().add_scaled(from.const_data_ptr<A>() + i * H, H, A(1),
                            to.mutable_data_ptr<A>() + rows[i] * H);
    }
  });
}

static Tensors3 linear_filtered_logprobs_backward(
    const at::Tensor& dlogprobs, const at::Tensor& dentropy, const at::Tensor& hidden,
    const at::Tensor& weight, const Bias& bias, const at::Tensor& labels,
    const at::Tensor& temperature, double scale, double softcap, int64_t ignore_index,
    int64_t /*chunk_bytes*/, double filter, const at::Tensor& lse, const at::Tensor& entropy,
    const at::Tensor& peaks, bool need_dhidden, bool need_dweight, bool need_dbias) {
  const auto rows = rows_with_gradient(labels, ignore_index, dlogprobs, dentropy);
  const at::Tensor y = labels.contiguous(), exact = lse.to(at::kDouble).contiguous();
  const int64_t V = weight.size(0);
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors3 {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    Gradients all{{}, {}, {}, false};
    if (need_dhidden) all.dhidden = at::zeros(hidden.sizes(), of_A);
    if (need_dweight) {
      all.dweight = at::empty(weight.sizes(), weight.options());
      prefer_huge_pages(all.dweight);
    }
    if (need_dbias) all.dbias = at::empty({V}, bias->options());
    const at::Tensor largest = peaks.to(of_A).contiguous(), H = entropy.to(of_A).contiguous();
    for (int64_t g = 0; g < filter_groups(V); ++g) {
      const int64_t v0 = g * filter_rows, count = std::min(filter_rows, V - v0);
      const auto chosen = tokens_of_group(rows, largest.const_data_ptr<A>() + g * y.numel(),
                                          y.const_data_ptr<int64_t>(),
                                          exact.const_data_ptr<double>(), H.const_data_ptr<A>(), g,
                                          std::log(filter));
      Gradients out{{}, {}, {}, false};
      if (need_dweight) out.dweight = all.dweight.narrow(0, v0, count);
      if (need_dbias) out.dbias = all.dbias.narrow(0, v0, count);
      if (chosen.empty()) {
        if (need_dweight) out.dweight.zero_();
        if (need_dbias) out.dbias.zero_();
        continue;
      }
      const Bias own_bias = bias ? Bias(bias->narrow(0, v0, count)) : Bias();
      auto p = make_problem<T>(hidden, weight.narrow(0, v0, count), own_bias, y, temperature, scale,
                               softcap, chosen);
      for (int64_t& label : p.labels) label -= v0;
      const auto up = gather_upstream<A>(exact, entropy, dlogprobs, dentropy, chosen, p.padded);
      if (need_dhidden) out.dhidden = at::empty({p.N, p.H}, of_A);
      backward<T>(p, up.upstream(p.inv_temperature), nullptr, out);
      if (need_dhidden) add_rows<A>(out.dhidden, chosen, all.dhidden);
    }
    if (need_dhidden) all.dhidden = all.dhidden.to(hidden.scalar_type());
    return or_empty(all, hidden, weight);
  });
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("linear_filtered_logprobs", &linear_filtered_logprobs);
  m.impl("linear_filtered_logprobs_backward", &linear_filtered_logprobs_backward);
}

}  // namespace fused_rl
