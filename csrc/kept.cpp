// Log-probabilities renormalised over the vocabulary entries that top-k or top-p sampling kept.
//
//     kept_logprobs[n] = z[n, label] - log sum_{v in kept[n]} exp z[n, v]
//     draw[n, v]      += dkept_logprobs[n] slope[n, v],          v in kept[n]
//     slope[n, v]      = (1[v = label] - q[n, v]) softcap'(.) scale / temperature[n]
//     q[n, v]          = exp z[n, v] / sum_{u in kept[n]} exp z[n, u]
//
// The logits of the kept entries are picked out of the tiles that the full-vocabulary pass has in
// the cache anyway, and the terms of the gradient are added to the tiles of draw: no product more than
// without them. Where nothing but kept_logprobs has an upstream gradient, draw is as sparse as the
// kept sets, and so are the products: M H instead of N H V.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "labels.h"
#include "problem.h"
#include "tokens.h"

namespace fused_rl {

// A pair of the sparse way costs about as much as this many elements of the dense one.
static constexpr int64_t sparse_cost = 64;

// The kept entries of token n are entry[begin(n)] .. entry[end(n) - 1].
struct KeptSets {
  at::Tensor entries, offsets;
  const int64_t* entry = entries.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();

  KeptSets(const at::Tensor& kept, const at::Tensor& cu_kept)
      : entries(kept.contiguous()), offsets(cu_kept.contiguous()) {}
  int64_t size() const { return entries.numel(); }
  int64_t begin(int64_t n) const { return offset[n]; }
  int64_t end(int64_t n) const { return offset[n + 1]; }
};

static void check_offsets(const KeptSets& sets) {
  const int64_t N = sets.offsets.numel() - 1;
  TORCH_CHECK_VALUE(sets.offset[0] == 0, "cu_kept[0] is ", sets.offset[0], ", and must be 0");
  for (int64_t n = 0; n < N; ++n) {
    TORCH_CHECK_VALUE(sets.begin(n) <= sets.end(n), "cu_kept[", n + 1, "] is ", sets.end(n),
                      ", below cu_kept[", n, "], which is ", sets.begin(n));
  }
  TORCH_CHECK_VALUE(sets.offset[N] == sets.size(), "cu_kept[", N, "] is ", sets.offset[N],
                    ", and must be the length of kept, ", sets.size());
}

static void check_sets(const KeptSets& sets, const at::Tensor& labels,
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

// The pairs of the tokens at `rows`, which are those of the problem; numbered as in kept.
template <class T>
Picks pick_kept(const Problem<T>& p, const KeptSets& sets, const std::vector<int64_t>& rows) {
  Picks out{{}, std::vector<int64_t>(p.blocks() * p.tiles() + 1, 0), p.tiles()};
  const auto each = [&](const auto& f) {
    for (int64_t r = 0; r < p.N; ++r) {
      for (int64_t i = sets.begin(rows[r]); i < sets.end(rows[r]); ++i) {
        f(sets.entry[i] / p.block * p.tiles() + r / tile_tokens, r, i);
      }
    }
  };
  each([&](int64_t group, int64_t, int64_t) { ++out.first[group + 1]; });
  for (size_t g = 1; g < out.first.size(); ++g) out.first[g] += out.first[g - 1];
  std::vector<int64_t> next(out.first.begin(), out.first.end() - 1);
  out.picks.resize(out.first.back());
  each([&](int64_t group, int64_t r, int64_t i) {
    out.picks[next[group]++] = {int32_t(sets.entry[i] % p.block), int32_t(r % tile_tokens), i};
  });
  return out;
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
                                     int64_t ignore_index, int64_t /*chunk_bytes*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const KeptSets sets(kept, cu_kept);
  const auto active = counted_rows(y, ignore_index);
  check_sets(sets, y, active, weight.size(0));
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors5 {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, active);
    at::Tensor slope = at::zeros({sets.size()}, of_A);
    A* z = slope.mutable_data_ptr<A>();
    std::vector<A> kept_logprobs(p.N);
    TokenStatistics<T> s{};
    if (p.N) {
      const Picks picks = pick_kept(p, sets, active);
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

// sum += factor * row of a [., H] matrix, in any dtype, of any strides; `line` has room for a row.
template <class A>
void add_row(const at::Tensor& from, int64_t row, A factor, A* line, A* sum) {
  const int64_t H = from.size(1), step = from.stride(1);
  const at::ScalarType dtype = from.scalar_type();
  if (step == 1 && dtype == c10::CppTypeToScalarType<A>::value) {
    return loops<A>().add_scaled(from.const_data_ptr<A>() + row * from.stride(0), H, factor, sum);
  }
  if constexpr (std::is_same_v<A, float>) {
    if (step == 1 && dtype == at::kBFloat16) {
      const auto* bits = static_cast<const uint16_t*>(from.const_data_ptr());
      return bfloat16_loops().add_scaled(bits + row * from.stride(0), H, factor, sum);
    }
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, dtype, "linear_kept_logprobs_backward", [&] {
        const scalar_t* x = from.const_data_ptr<scalar_t>() + row * from.stride(0);
        for (int64_t h = 0; h < H; ++h) line[h] = A(x[h * step]);
      });
  loops<A>().add_scaled(line, H, factor, sum);
}

template <class A>
void write_row(const A* from, int64_t count, const at::Tensor& to, int64_t offset) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, to.scalar_type(), "linear_kept_logprobs_backward", [&] {
        scalar_t* line = to.mutable_data_ptr<scalar_t>() + offset;
        for (int64_t h = 0; h < count; ++h) line[h] = scalar_t(from[h]);
      });
}

// A sum of factors times rows of length H: in A for as many terms as a product sums in one go, in
// double beyond.
template <class A>
class RowSum {
 public:
  explicit RowSum(int64_t H) : part(H), line(H), total(H) {}
  void clear() {
    std::fill(part.begin(), part.end(), A(0));
    std::fill(total.begin(), total.end(), 0.0);
    terms = 0;
  }
  void add(const at::Tensor& from, int64_t row, A factor) {
    if (terms == sum_step<A>) close_part();
    ++terms;
    add_row(from, row, factor, line.data(), part.data());
  }
  const A* rounded() {
    close_part();
    std::copy(total.begin(), total.end(), part.begin());
    return part.data();
  }

 private:
  void close_part() {
    for (size_t h = 0; h < total.size(); ++h) total[h] += part[h];
    std::fill(part.begin(), part.end(), A(0));
    terms = 0;
  }
  std::vector<A> part, line;
  std::vector<double> total;
  int64_t terms = 0;
};

// The products of a draw that holds `terms` at the kept pairs of the tokens at `rows`, and nothing
// else. The gradients are in the dtypes of what they belong to, over all tokens, and hold zeros.
template <class A>
void sparse_backward(const at::Tensor& hidden, const at::Tensor& weight, const KeptSets& sets,
                     const std::vector<int64_t>& rows, const std::vector<A>& terms,
                     const Gradients& out) {
  struct Entry {
    int64_t row;
    A term;
  };
  const int64_t V = weight.size(0), H = weight.size(1);
  std::vector<int64_t> first(V + 1, 0);
  const auto each = [&](const auto& f) {
    for (const int64_t n : rows) {
      for (int64_t i = sets.begin(n); i < sets.end(n); ++i) f(n, sets.entry[i], terms[i]);
    }
  };
  each([&](int64_t, int64_t v, A) { ++first[v + 1]; });
  for (int64_t v = 0; v < V; ++v) first[v + 1] += first[v];
  std::vector<Entry> entries(first.back());
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  each([&](int64_t n, int64_t v, A term) { entries[next[v]++] = {n, term}; });

  if (out.dhidden.defined()) {
    at::parallel_for(0, rows.size(), 1, [&](int64_t begin, int64_t end) {
      RowSum<A> sum(H);
      for (int64_t r = begin; r < end; ++r) {
        sum.clear();
        for (int64_t i = sets.begin(rows[r]); i < sets.end(rows[r]); ++i) {
          sum.add(weight, sets.entry[i], terms[i]);
        }
        write_row(sum.rounded(), H, out.dhidden, rows[r] * H);
      }
    });
  }
  if (!out.dweight.defined() && !out.dbias.defined()) return;
  at::parallel_for(0, V, 64, [&](int64_t begin, int64_t end) {
    RowSum<A> sum(H);
    for (int64_t v = begin; v < end; ++v) {
      if (first[v] == first[v + 1]) continue;
      sum.clear();
      double total = 0;
      for (int64_t e = first[v]; e < first[v + 1]; ++e) {
        total += entries[e].term;
        if (out.dweight.defined()) sum.add(hidden, entries[e].row, entries[e].term);
      }
      if (out.dweight.defined()) write_row(sum.rounded(), H, out.dweight, v * H);
      if (out.dbias.defined()) write_row(&total, 1, out.dbias, v);
    }
  });
}

static Tensors3 linear_kept_logprobs_backward(
    const at::Tensor& dlogprobs, const at::Tensor& dentropy, const at::Tensor& dkept_logprobs,
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias, const at::Tensor& labels,
    const at::Tensor& kept, const at::Tensor& cu_kept, const at::Tensor& temperature, double scale,
    double softcap, int64_t ignore_index, int64_t /*chunk_bytes*/, const at::Tensor& lse,
    const at::Tensor& entropy, const at::Tensor& slope, bool need_dhidden, bool need_dweight,
    bool need_dbias) {
  const KeptSets sets(kept, cu_kept);
  const auto dense = rows_with_gradient(labels, ignore_index, dlogprobs, dentropy);
  const at::Tensor others = dentropy.ne(0).logical_or(dkept_logprobs.ne(0));
  const auto rows = rows_with_gradient(labels, ignore_index, dlogprobs, others);
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors3 {
    using T = decltype(zero);
    using A = Acc<T>;
    const auto of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const at::Tensor up = dkept_logprobs.to(of_A).contiguous(), d = slope.contiguous();
    std::vector<A> terms(sets.size(), A(0));
    int64_t pairs = 0;
    for (const int64_t n : rows) {
      const A g = up.const_data_ptr<A>()[n];
      pairs += sets.end(n) - sets.begin(n);
      if (g == A(0)) continue;
      for (int64_t i = sets.begin(n); i < sets.end(n); ++i) {
        terms[i] = g * d.const_data_ptr<A>()[i];
      }
    }
    const int64_t elements = int64_t(rows.size()) * weight.size(0);
    const bool sparse = dense.empty() && pairs * sparse_cost <= elements;
    Gradients out{{}, {}, {}, false};
    if (sparse) {
      out = zero_gradients(hidden, weight, bias, need_dhidden, need_dweight, need_dbias);
      sparse_backward<A>(hidden, weight, sets, rows, terms, out);
    } else {
      const auto p =
          make_problem<T>(hidden, weight, bias, labels, temperature, scale, softcap, rows);
      auto g = gather_upstream<A>(lse, entropy, dlogprobs, dentropy, rows, p.padded);
      restore_log_sums(p, g);
      const Picks picks = pick_kept(p, sets, rows);
      if (need_dhidden) out.dhidden = at::empty({p.N, p.H}, of_A);
      if (need_dweight) {
        out.dweight = at::empty(weight.sizes(), weight.options());
        prefer_huge_pages(out.dweight);
      }
      if (need_dbias) out.dbias = at::empty({p.V}, bias->options());
      backward<T>(p, g.upstream(p.inv_temperature), nullptr, out, &picks, terms.data());
      if (need_dhidden) out.dhidden = place_rows(out.dhidden, rows, hidden, hidden.scalar_type());
    }
    return or_empty(out, hidden, weight);
  });
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("linear_kept_logprobs", &linear_kept_logprobs);
  m.impl("linear_kept_logprobs_backward", &linear_kept_logprobs_backward);
}

}  // namespace fused_rl
