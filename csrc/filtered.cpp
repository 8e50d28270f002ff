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
#include "pairs.h"
#include "problem.h"
#include "tokens.h"

namespace fused_rl {

static int64_t filter_groups(int64_t V) { return (V + filter_rows - 1) / filter_rows; }

static Tensors5 linear_filtered_logprobs(const at::Tensor& hidden, const at::Tensor& weight,
                                         const Bias& bias, const at::Tensor& labels,
                                         const at::Tensor& temperature, double scale,
                                         double softcap, int64_t rounding, int64_t ignore_index,
                                         int64_t /*chunk_bytes*/, double /*filter*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  const int64_t N = y.numel(), groups = filter_groups(weight.size(0));
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors5 {
    using T = decltype(zero);
    using A = Acc<T>;
    auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, rounding,
                             active);
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
  for (size_t i = 0; i < rows.size(); ++i) {
    loops<A>().add_scaled(from.const_data_ptr<A>() + i * H, H, A(1),
                          to.mutable_data_ptr<A>() + rows[i] * H);
  }
}

// The backward pass, group by group, each on one thread.
template <class T>
struct FilteredPass {
  using A = Acc<T>;
  struct OfGroup {
    std::vector<int64_t> tokens;
    at::Tensor dhidden;  // [tokens, H]
  };
  const Inputs& in;
  const Gradients& all;
  std::vector<int64_t> rows;
  double log_filter;
  at::Tensor labels, lse, entropy, peaks;  // contiguous; lse in double, the others of floats in A
  const at::Tensor &dlogprobs, &dentropy;

  int64_t V() const { return in.weight.size(0); }

  // dweight and dbias of group g, and its share of dhidden.
  OfGroup backward_of(int64_t g) const {
    const int64_t v0 = g * filter_rows, count = std::min(filter_rows, V() - v0);
    OfGroup group{tokens_of_group(rows, peaks.const_data_ptr<A>() + g * labels.numel(),
                                  labels.const_data_ptr<int64_t>(), lse.const_data_ptr<double>(),
                                  entropy.const_data_ptr<A>(), g, log_filter),
                  {}};
    Gradients out{{}, {}, {}, false};
    if (all.dweight.defined()) out.dweight = all.dweight.narrow(0, v0, count);
    if (all.dbias.defined()) out.dbias = all.dbias.narrow(0, v0, count);
    if (group.tokens.empty()) {
      if (out.dweight.defined()) out.dweight.zero_();
      if (out.dbias.defined()) out.dbias.zero_();
      return group;
    }
    const Bias own_bias = in.bias ? Bias(in.bias->narrow(0, v0, count)) : Bias();
    auto p = make_problem<T>(in.hidden, in.weight.narrow(0, v0, count), own_bias, labels,
                             in.temperature, in.scale, in.softcap, in.rounding, group.tokens);
    for (int64_t& label : p.labels) label -= v0;
    const auto up =
        gather_upstream<A>(lse, entropy, dlogprobs, dentropy, group.tokens, p.padded);
    if (all.dhidden.defined()) {
      group.dhidden = at::empty({p.N, p.H}, at::TensorOptions().dtype(
                                                c10::CppTypeToScalarType<A>::value));
      out.dhidden = group.dhidden;
    }
    backward<T>(p, up.upstream(p.inv_temperature), nullptr, out);
    return group;
  }

  // Shares of dhidden are added up in the order of the groups, while others are formed.
  void run() const {
    const int64_t groups = filter_groups(V()), ahead = 2 * members();
    std::vector<OfGroup> formed(groups);
    std::vector<int64_t> added(groups);
    Team team;
    const auto add = [&](int64_t g, int64_t needs) {
      added[g] = team.add(1, needs, [&, g](int64_t, int64_t) {
        if (formed[g].dhidden.defined()) {
          add_rows<A>(formed[g].dhidden, formed[g].tokens, all.dhidden);
        }
        formed[g] = {};
      });
    };
    std::vector<int64_t> ready(groups);
    for (int64_t g = 0; g < groups + ahead; ++g) {
      if (g < groups) {
        const int64_t needs = g >= 2 * ahead ? added[g - 2 * ahead] : -1;
        ready[g] = team.add(1, needs, [&, g](int64_t, int64_t) { formed[g] = backward_of(g); });
      }
      const int64_t last = g - ahead;
      if (last >= 0) add(last, std::max(ready[last], last > 0 ? added[last - 1] : -1));
    }
    fused_rl::run(team);
  }
};

static Tensors3 linear_filtered_logprobs_backward(
    const at::Tensor& dlogprobs, const at::Tensor& dentropy, const at::Tensor& hidden,
    const at::Tensor& weight, const Bias& bias, const at::Tensor& labels,
    const at::Tensor& temperature, double scale, double softcap, int64_t rounding,
    int64_t ignore_index, int64_t /*chunk_bytes*/, double filter, const at::Tensor& lse,
    const at::Tensor& entropy, const at::Tensor& peaks, bool need_dhidden, bool need_dweight,
    bool need_dbias) {
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors3 {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    Gradients all{{}, {}, {}, false};
    if (need_dhidden) all.dhidden = at::zeros(hidden.sizes(), of_A);
    if (need_dweight) all.dweight = kept_tensor(weight.sizes(), weight.scalar_type());
    if (need_dbias) all.dbias = at::empty({weight.size(0)}, bias->options());
    const Inputs in{hidden, weight, bias, labels, temperature, scale, softcap, rounding};
    FilteredPass<T>{in,
                    all,
                    rows_with_gradient(labels, ignore_index, dlogprobs, dentropy),
                    std::log(filter),
                    labels.contiguous(),
                    lse.to(at::kDouble).contiguous(),
                    entropy.to(of_A).contiguous(),
                    peaks.to(of_A).contiguous(),
                    dlogprobs,
                    dentropy}
        .run();
    if (need_dhidden) all.dhidden = all.dhidden.to(hidden.scalar_type());
    return or_empty(all, hidden, weight);
  });
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("linear_filtered_logprobs", &linear_filtered_logprobs);
  m.impl("linear_filtered_logprobs_backward", &linear_filtered_logprobs_backward);
}

}  // namespace fused_rl
