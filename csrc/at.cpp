// Log-probabilities at several vocabulary entries per token, and the logits of those entries alone.
//
//     logprobs[n, k] = z[n, ids[n, k]] - lse[n]
//     dz[n, v]       = sum_k dlogprobs[n, k] 1[v = ids[n, k]] + dlse[n] p - sum_k dlogprobs[n, k] p
//                      - dentropy[n] p (log p + entropy[n])
//
// Over the whole vocabulary that is the gradient of linear_logprobs for an upstream gradient of
// sum_k dlogprobs - dlse, without a label; the rest lies at the pairs.
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "labels.h"
#include "pairs.h"

namespace fused_rl {

static Pairs pairs_of(const at::Tensor& ids, int64_t ignore_index) {
  const int64_t N = ids.size(0), K = ids.size(1);
  return {ids, at::arange(N + 1, at::kLong).mul(K), ignore_index};
}

// Every id that is not left out is in the vocabulary; returns the tokens that have one.
static std::vector<int64_t> checked_rows(const Pairs& pairs, int64_t N, int64_t V) {
  std::vector<int64_t> rows;
  for (int64_t n = 0; n < N; ++n) {
    bool any = false;
    pairs.each(n, [&](int64_t i, int64_t v) {
      TORCH_CHECK_VALUE(v >= 0 && v < V, "ids[", i, "] is ", v, ", outside the vocabulary [0, ", V,
                        ") and not ignore_index (", pairs.left_out, ")");
      any = true;
    });
    if (any) rows.push_back(n);
  }
  return rows;
}

// Labels of tokens that have none.
static at::Tensor no_labels(int64_t N) { return at::full({N}, -1, at::kLong); }

static Tensors4 linear_logprobs_at(const at::Tensor& hidden, const at::Tensor& weight,
                                   const Bias& bias, const at::Tensor& ids,
                                   const at::Tensor& temperature, double scale, double softcap,
                                   int64_t rounding, int64_t ignore_index,
                                   int64_t /*chunk_bytes*/) {
  const int64_t N = ids.size(0);
  const Pairs pairs = pairs_of(ids, ignore_index);
  const auto active = checked_rows(pairs, N, weight.size(0));
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors4 {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const auto p = make_problem<T>(hidden, weight, bias, no_labels(N), temperature, scale, softcap,
                                   rounding, active);
    at::Tensor logits = at::zeros(ids.sizes(), of_A), logprobs = at::zeros(ids.sizes(), of_A);
    A* z = logits.mutable_data_ptr<A>();
    A* to = logprobs.mutable_data_ptr<A>();
    TokenStatistics<T> s{};
    if (p.N) {
      const Picks picks = pick(p, pairs, active);
      s = forward<T>(p, nullptr, &picks, z);
    }
    for (int64_t r = 0; r < p.N; ++r) {
      pairs.each(active[r], [&](int64_t i, int64_t) {
        to[i] = log_probability<A>(z[i], s.max[r], s.log_sum[r]);
      });
    }
    return {logprobs, scatter(s.lse, active, N), scatter(s.entropy, active, N), logits};
  });
}

// dz of the pairs -> draw of the pairs; entries that are left out keep 0.
template <class A>
std::vector<A> draw_of_pairs(const at::Tensor& dz, const at::Tensor& z, const Pairs& pairs,
                             const std::vector<int64_t>& rows, const at::Tensor& temperature,
                             double scale, double softcap) {
  const auto of_A = c10::CppTypeToScalarType<A>::value;
  const at::Tensor t = temperature.to(of_A).contiguous();
  const Transform<A> transform{A(scale), A(softcap), no_rounding, false};
  std::vector<A> terms(pairs.size(), A(0));
  for (const int64_t n : rows) {
    const A inv_temperature = A(1) / t.const_data_ptr<A>()[n];
    pairs.each(n, [&](int64_t i, int64_t) {
      terms[i] = raw_gradient(dz.const_data_ptr<A>()[i], z.const_data_ptr<A>()[i], inv_temperature,
                              transform);
    });
  }
  return terms;
}

// Of each token sum_k dlogprobs - dlse: minus what reaches every entry in proportion to p.
template <class A>
at::Tensor dense_upstream(const at::Tensor& dlogprobs, const at::Tensor& dlse, const Pairs& pairs) {
  at::Tensor out = at::empty({dlse.numel()}, dlogprobs.options());
  for (int64_t n = 0; n < dlse.numel(); ++n) {
    double sum = 0;
    pairs.each(n, [&](int64_t i, int64_t) { sum += double(dlogprobs.const_data_ptr<A>()[i]); });
    out.mutable_data_ptr<A>()[n] = A(sum - dlse.const_data_ptr<double>()[n]);
  }
  return out;
}

// The tokens with an upstream gradient at one of their pairs, or one of their own; NaN is one.
template <class A>
std::vector<int64_t> live_rows(const Pairs& pairs, const at::Tensor& of_pairs,
                               const at::Tensor& of_tokens) {
  std::vector<int64_t> rows;
  for (int64_t n = 0; n < of_tokens.numel(); ++n) {
    bool any = false, counted = false;
    pairs.each(n, [&](int64_t i, int64_t) {
      any |= of_pairs.const_data_ptr<A>()[i] != A(0);
      counted = true;
    });
    if (any || (counted && of_tokens.const_data_ptr<bool>()[n])) rows.push_back(n);
  }
  return rows;
}

static Tensors3 linear_logprobs_at_backward(
    const at::Tensor& dlogprobs, const at::Tensor& dlse, const at::Tensor& dentropy,
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias, const at::Tensor& ids,
    const at::Tensor& temperature, double scale, double softcap, int64_t rounding,
    int64_t ignore_index, int64_t /*chunk_bytes*/, const at::Tensor& lse, const at::Tensor& entropy,
    const at::Tensor& logits, bool need_dhidden, bool need_dweight, bool need_dbias) {
  const Pairs pairs = pairs_of(ids, ignore_index);
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors3 {
    using T = decltype(zero);
    using A = Acc<T>;
    const at::Tensor of_pairs = dlogprobs.contiguous(), z = logits.contiguous();
    const at::Tensor of_all = dense_upstream<A>(of_pairs, dlse.contiguous(), pairs);
    const at::Tensor dense = of_all.ne(0).logical_or(dentropy.ne(0)).contiguous();
    const auto rows = live_rows<A>(pairs, of_pairs, dense);
    std::vector<int64_t> whole;
    for (const int64_t n : rows) {
      if (dense.const_data_ptr<bool>()[n]) whole.push_back(n);
    }
    const auto terms = draw_of_pairs<A>(of_pairs, z, pairs, rows, temperature, scale, softcap);
    const at::Tensor labels = no_labels(ids.size(0));
    const Inputs in{hidden, weight, bias, labels, temperature, scale, softcap, rounding};
    return backward_of_pairs<T>(in, pairs, rows, terms, {lse, entropy, of_all, dentropy}, whole,
                                {need_dhidden, need_dweight, need_dbias});
  });
}

// raw product with bias -> z
template <class A>
A logit(A x, A inv_temperature, const Transform<A>& transform) {
  if (transform.rounding == to_bfloat16) x = A(c10::BFloat16(float(x)));
  if (transform.rounding == to_float16) x = A(c10::Half(float(x)));
  x *= transform.scale;
  if (transform.softcap != A(0)) x = transform.softcap * std::tanh(x / transform.softcap);
  return x * inv_temperature;
}

static Tensors2 linear_logits_at(const at::Tensor& hidden, const at::Tensor& weight,
                                 const Bias& bias, const at::Tensor& ids,
                                 const at::Tensor& temperature, double scale, double softcap,
                                 int64_t rounding, int64_t ignore_index, int64_t /*chunk_bytes*/) {
  const int64_t H = hidden.size(1);
  const Pairs pairs = pairs_of(ids, ignore_index);
  const auto active = checked_rows(pairs, ids.size(0), weight.size(0));
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors2 {
    using A = Acc<decltype(zero)>;
    const auto of_A = c10::CppTypeToScalarType<A>::value;
    const at::Tensor t = temperature.to(of_A).contiguous();
    const at::Tensor b = bias ? bias->to(of_A).contiguous() : at::Tensor();
    at::Tensor logits = at::zeros(ids.sizes(), of_A), slope = at::zeros(ids.sizes(), of_A);
    A* z = logits.mutable_data_ptr<A>();
    A* d = slope.mutable_data_ptr<A>();
    const Transform<A> transform{A(scale), A(softcap), rounding, false};
    for (const int64_t n : active) check_temperature(t.const_data_ptr<A>()[n], n);
    at::parallel_for(0, active.size(), 1, [&](int64_t begin, int64_t end) {
      std::vector<A> state(H), line(H);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t n = active[r];
        const A* row = row_in<A>(hidden, n, state.data());
        const A inv_temperature = A(1) / t.const_data_ptr<A>()[n];
        pairs.each(n, [&](int64_t i, int64_t v) {
          A x = product(weight, v, row, line.data());
          if (bias) x += b.const_data_ptr<A>()[v];
          z[i] = logit(x, inv_temperature, transform);
          d[i] = raw_gradient(A(1), z[i], inv_temperature, transform);
        });
      }
    });
    return {logits, slope};
  });
}

static Tensors3 linear_logits_at_backward(
    const at::Tensor& dlogits, const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias,
    const at::Tensor& ids, const at::Tensor& /*temperature*/, double /*scale*/, double /*softcap*/,
    int64_t /*rounding*/, int64_t ignore_index, int64_t /*chunk_bytes*/, const at::Tensor& slope,
    bool need_dhidden, bool need_dweight, bool need_dbias) {
  const Pairs pairs = pairs_of(ids, ignore_index);
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors3 {
    using A = Acc<decltype(zero)>;
    const at::Tensor dz = dlogits.contiguous(), d = slope.contiguous();
    const auto rows = live_rows<A>(pairs, dz, at::zeros({ids.size(0)}, at::kBool));
    std::vector<A> terms(pairs.size(), A(0));
    for (const int64_t n : rows) {
      pairs.each(n, [&](int64_t i, int64_t) {
        terms[i] = dz.const_data_ptr<A>()[i] * d.const_data_ptr<A>()[i];
      });
    }
    const Gradients out =
        zero_gradients(hidden, weight, bias, need_dhidden, need_dweight, need_dbias);
    sparse_backward<A>(hidden, weight, pairs, rows, terms, out);
    return or_empty(out, hidden, weight);
  });
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("linear_logprobs_at", &linear_logprobs_at);
  m.impl("linear_logprobs_at_backward", &linear_logprobs_at_backward);
  m.impl("linear_logits_at", &linear_logits_at);
  m.impl("linear_logits_at_backward", &linear_logits_at_backward);
}

}  // namespace fused_rl
