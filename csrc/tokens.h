// What the operators of the linear head share: the arithmetic they choose, the tokens that take
// part, and the way from those tokens to all tokens and back.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "labels.h"
#include "problem.h"

namespace fused_rl {

using Tensors2 = std::tuple<at::Tensor, at::Tensor>;
using Tensors3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Bias = std::optional<at::Tensor>;

// Calls f with a value of the type that the products are computed in: bf16 where hidden and weight
// are bf16 and the CPU multiplies it, double where either is double, float for all the rest.
template <class F>
auto with_compute_type(const at::Tensor& hidden, const at::Tensor& weight, const F& f) {
  const auto both = [&](at::ScalarType t) {
    return hidden.scalar_type() == t && weight.scalar_type() == t;
  };
  if (both(at::kBFloat16) && has_microkernel<c10::BFloat16>()) return f(c10::BFloat16());
  if (hidden.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble) return f(0.0);
  return f(0.f);
}

inline at::Tensor index_tensor(const std::vector<int64_t>& rows) {
  return at::from_blob(const_cast<int64_t*>(rows.data()), {int64_t(rows.size())},
                       at::TensorOptions().dtype(at::kLong));
}

template <class A>
at::Tensor scatter(const std::vector<A>& values, const std::vector<int64_t>& rows, int64_t N) {
  at::Tensor out = at::zeros({N}, at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value));
  A* to = out.mutable_data_ptr<A>();
  for (size_t i = 0; i < rows.size(); ++i) to[rows[i]] = values[i];
  return out;
}

inline std::vector<int64_t> all_rows(int64_t N) {
  std::vector<int64_t> rows(N);
  for (int64_t n = 0; n < N; ++n) rows[n] = n;
  return rows;
}

// Tokens that are not ignored. labels are contiguous.
inline std::vector<int64_t> counted_rows(const at::Tensor& labels, int64_t ignore_index) {
  std::vector<int64_t> rows;
  for (int64_t n = 0; n < labels.numel(); ++n) {
    if (labels.const_data_ptr<int64_t>()[n] != ignore_index) rows.push_back(n);
  }
  return rows;
}

// The per-token inputs of a backward pass, gathered and padded.
template <class A>
struct Gathered {
  std::vector<A> lse, lse_low, entropy, dlogprobs, dentropy;
  bool has_dentropy = false;

  Upstream<A> upstream(const std::vector<A>& inv_temperature) const {
    return {lse.data(),       lse_low.data(),  entropy.data(),        dlogprobs.data(),
            dentropy.data(), inv_temperature.data(), has_dentropy};
  }
};

// A number per token, of some tokens, with zeros in the padding.
template <class A>
std::vector<A> gather(const at::Tensor& tensor, const std::vector<int64_t>& rows, int64_t padded) {
  const at::Tensor from = tensor.to(c10::CppTypeToScalarType<A>::value).contiguous();
  std::vector<A> to(padded, A(0));
  for (size_t i = 0; i < rows.size(); ++i) to[i] = from.const_data_ptr<A>()[rows[i]];
  return to;
}

template <class A>
Gathered<A> gather_upstream(const at::Tensor& lse, const at::Tensor& entropy,
                            const at::Tensor& dlogprobs, const at::Tensor& dentropy,
                            const std::vector<int64_t>& rows, int64_t padded) {
  const auto take = [&](const at::Tensor& tensor) { return gather<A>(tensor, rows, padded); };
  const std::vector<A> zeros(padded, A(0));
  Gathered<A> g{zeros, zeros, take(entropy), take(dlogprobs), take(dentropy)};
  const at::Tensor exact = lse.to(at::kDouble).contiguous();
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto split = SplitLse<A>::of(exact.const_data_ptr<double>()[rows[i]], g.entropy[i]);
    g.lse[i] = split.high;
    g.lse_low[i] = split.low;
  }
  for (A d : g.dentropy) g.has_dentropy |= d != A(0);
  return g;
}

// Forms the log_sums once more that lse has lost digits of: in float64, where the logits are large. Not
// where lse is another, that of a vocabulary of which these entries are a part.
template <class T>
void restore_log_sums(const Problem<T>& p, Gathered<Acc<T>>& g) {
  using A = Acc<T>;
  const auto lost = [&](int64_t n) { return SplitLse<A>(g.lse[n], g.lse_low[n]).lost(); };
  bool any = false;
  for (int64_t n = 0; n < p.N; ++n) any |= lost(n);
  if (!any) return;
  const TokenStatistics<T> s = forward<T>(p, nullptr);
  for (int64_t n = 0; n < p.N; ++n) {
    const double off = 4 * std::numeric_limits<double>::epsilon() * std::abs(s.lse[n]);
    if (!lost(n) || !(std::abs(s.lse[n] - double(g.lse[n])) <= off)) continue;
    g.lse[n] = A(s.lse[n] + double(s.top[n]));
    g.lse_low[n] = -s.top[n];
  }
}

// Tokens that are not ignored and have an upstream gradient; NaN is one.
inline std::vector<int64_t> rows_with_gradient(const at::Tensor& labels, int64_t ignore_index,
                                               const at::Tensor& dlogprobs,
                                               const at::Tensor& dentropy) {
  const at::Tensor live = dlogprobs.ne(0).logical_or(dentropy.ne(0)).contiguous();
  const at::Tensor y = labels.contiguous();
  std::vector<int64_t> rows;
  for (int64_t n = 0; n < y.numel(); ++n) {
    if (live.const_data_ptr<bool>()[n] && y.const_data_ptr<int64_t>()[n] != ignore_index) {
      rows.push_back(n);
    }
  }
  return rows;
}

// dhidden of some tokens to all tokens of hidden.
inline at::Tensor place_rows(const at::Tensor& dhidden, const std::vector<int64_t>& rows,
                             const at::Tensor& hidden, at::ScalarType dtype) {
  if (int64_t(rows.size()) == hidden.size(0)) return dhidden.to(dtype);
  at::Tensor out = at::zeros(hidden.sizes(), hidden.options().dtype(dtype));
  out.index_copy_(0, index_tensor(rows), dhidden.to(dtype));
  return out;
}

// The gradients that are asked for, of tokens that have none.
inline Gradients zero_gradients(const at::Tensor& hidden, const at::Tensor& weight,
                                const Bias& bias, bool need_dhidden, bool need_dweight,
                                bool need_dbias) {
  Gradients out{{}, {}, {}, false};
  if (need_dhidden) out.dhidden = at::zeros(hidden.sizes(), hidden.options());
  if (need_dweight) out.dweight = at::zeros(weight.sizes(), weight.options());
  if (need_dbias) out.dbias = at::zeros({weight.size(0)}, bias->options());
  return out;
}

// Gradients as an operator returns them: empty where they were not asked for.
inline Tensors3 or_empty(const Gradients& out, const at::Tensor& hidden,
                         const at::Tensor& weight) {
  const auto given = [](const at::Tensor& gradient, const at::Tensor& like) {
    return gradient.defined() ? gradient : at::empty({0}, like.options());
  };
  return {given(out.dhidden, hidden), given(out.dweight, weight), given(out.dbias, weight)};
}

// What a gradient waits in for the scale of its loss: float16 could underflow meanwhile.
inline at::ScalarType kept_dtype(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf ? at::kFloat : tensor.scalar_type();
}

// That of dhidden: a summand, which is rounded once, after the sum, has the accumulators'.
template <class A>
at::ScalarType dhidden_dtype(const at::Tensor& hidden, bool partial) {
  return partial ? c10::CppTypeToScalarType<A>::value : kept_dtype(hidden);
}

}  // namespace fused_rl
