// Log-probabilities renormalised over the vocabulary entries that top-k or top-p sampling kept.
//
//     kept_logprobs[n] = z[n, label] - log sum_{v in kept[n]} exp z[n, v]
//     draw[n, v]      += dkept_logprobs[n] slope[n, v],          v in kept[n]
//     slope[n, v]      = (1[v = label] - q[n, v]) softcap'(.) scale / temperature[n]
//     q[n, v]          = exp z[n, v] / sum_{u in kept[n]} exp z[n, u]
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "labels.h"
#include "pairs.h"

namespace fused_rl {

// No entry of a kept set is left out.
static constexpr int64_t never = -1;

static void check_offsets(const Pairs& sets) {
  const int64_t N = sets.offsets.numel() - 1;
  TORCH_CHECK_VALUE(sets.offset[0] == 0, "cu_kept[0] is ", sets.offset[0], ", and must be 0");
  for (int64_t n = 0; n < N; ++n) {
    TORCH_CHECK_VALUE(sets.begin(n) <= sets.end(n), "cu_kept[", n + 1, "] is ", sets.end(n),
                      ", below cu_kept[", n, "], which is ", sets.begin(n));
  }
  TORCH_CHECK_VALUE(sets.offset[N] == sets.size(), "cu_kept[", N, "] is ", sets.offset[N],
                    ", and must be the length of kept, ", sets.size());
}

static void check_sets(const Pairs& sets, const at::Tensor& labels,
                       const std::vector<int64_t>& active, int64_t V) {
  check_offsets(sets);
  std::vector<int64_t> holder(V, -1);  // the token in whose set a entry was last seen
  for (const int64_t n : active) {
    const int64_t label = labels.const_data_ptr<int64_t>()[n];
    TORCH_CHECK_VALUE(sets.begin(n) < sets.end(n), "the kept set of token ", n,
                      " is empty, and labels[", n, "] is ", label);
    for (int64_t i = sets.begin(n); i < sets.end(n); ++i) {
      const int64_t v = sets.entry[i];
      TORCH_CHECK_VALUE(v >= 0 && v < V, "kept[", i, "] is ", v, ", outside the vocabulary [0, ", V,
                        ")");
      TORCH_CHECK_VALUE(holder[v] != n, "kept[", i, "] is ", v, ", twice in the kept set of token ",
                        n);
      holder[v] = n;
    }
    TORCH_CHECK_VALUE(holder[label] == n, "labels[", n, "] is ", label,
                      ", which is not in the kept set of token ", n);
  }
}

// Softmax over one kept set, z -> slope in place; returns the log-probability of the label.
template <class A>
A renormalise(A* z, const int64_t* entries, int64_t count, int64_t label, A inv_temperature,
              const Transform<A>& transform) {
  double max = -std::numeric_limits<double>::infinity(), sum = 0, at_label = 0;
  for (int64_t i = 0; i < count; ++i) max = std::max(max, double(z[i]));
  for (int64_t i = 0; i < count; ++i) {
    sum += std::exp(double(z[i]) - max);
    if (entries[i] == label) at_label = z[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    const double q = std::exp(double(z[i]) - max) / sum;
    const double t = transform.softcap == A(0)
                         ? 0.0
                         : double(z[i]) / (double(transform.softcap) * double(inv_temperature));
    z[i] = A((double(entries[i] == label) - q) * (1 - t * t) * transform.scale * inv_temperature);
  }
  return A((at_label - max) - std::log(sum));
}

static Tensors5 linear_kept_logprobs(const at::Tensor& hidden, const at::Tensor& weight,
                                     const Bias& bias, const at::Tensor& labels,
                                     const at::Tensor& kept, const at::Tensor& cu_kept,
                                     const at::Tensor& temperature, double scale, double softcap,
                                     int64_t rounding, int64_t ignore_index,
                                     int64_t /*chunk_bytes*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const Pairs sets(kept, cu_kept, never);
  const auto active = counted_rows(y, ignore_index);
  check_sets(sets, y, active, weight.size(0));
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors5 {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, rounding,
                                   active);
    at::Tensor slope = at::zeros({sets.size()}, of_A);
    A* z = slope.mutable_data_ptr<A>();
    std::vector<A> kept_logprobs(p.N);
    TokenStatistics<T> s{};
    if (p.N) {
      const Picks picks = pick(p, sets, active);
      s = forward<T>(p, nullptr, &picks, z);
    }
    at::parallel_for(0, p.N, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t first = sets.begin(active[r]), count = sets.end(active[r]) - first;
        kept_logprobs[r] = renormalise(z + first, sets.entry + first, count, p.labels[r],
                                       p.inv_temperature[r], p.transform);
      }
    });
    const int64_t N = y.numel();
    return {scatter(s.logprobs, active, N), scatter(s.entropy, active, N),
            scatter(s.lse, active, N), scatter(kept_logprobs, active, N), slope};
  });
}

static Tensors3 linear_kept_logprobs_backward(
    const at::Tensor& dlogprobs, const at::Tensor& dentropy, const at::Tensor& dkept_logprobs,
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias, const at::Tensor& labels,
    const at::Tensor& kept, const at::Tensor& cu_kept, const at::Tensor& temperature, double scale,
    double softcap, int64_t rounding, int64_t ignore_index, int64_t /*chunk_bytes*/,
    const at::Tensor& lse, const at::Tensor& entropy, const at::Tensor& slope, bool need_dhidden,
    bool need_dweight, bool need_dbias) {
  const Pairs sets(kept, cu_kept, never);
  const auto dense = rows_with_gradient(labels, ignore_index, dlogprobs, dentropy);
  const at::Tensor others = dentropy.ne(0).logical_or(dkept_logprobs.ne(0));
  const auto rows = rows_with_gradient(labels, ignore_index, dlogprobs, others);
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors3 {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const at::Tensor up = dkept_logprobs.to(of_A).contiguous(), d = slope.contiguous();
    std::vector<A> terms(sets.size(), A(0));
    for (const int64_t n : rows) {
      const A g = up.const_data_ptr<A>()[n];
      if (g == A(0)) continue;
      sets.each(n, [&](int64_t i, int64_t) { terms[i] = g * d.const_data_ptr<A>()[i]; });
    }
    const Inputs in{hidden, weight, bias, labels, temperature, scale, softcap, rounding};
    return backward_of_pairs<T>(in, sets, rows, terms, {lse, entropy, dlogprobs, dentropy},
                                dense, {need_dhidden, need_dweight, need_dbias});
  });
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("linear_kept_logprobs", &linear_kept_logprobs);
  m.impl("linear_kept_logprobs_backward", &linear_kept_logprobs_backward);
}

}  // namespace fused_rl
