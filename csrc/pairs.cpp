// Gradients at pairs (token, entry): by the tiles of a whole backward pass, or by the pairs alone.
#include "pairs.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <iterator>

namespace fused_rl {

// A pair of the sparse way costs about as much as this many elements of the dense one.
static constexpr int64_t sparse_cost = 64;

// Row `row` of bf16 numbers that follow one another, or null.
template <class A>
const uint16_t* bfloat16_row(const at::Tensor& from, int64_t row) {
  const bool is_one = std::is_same_v<A, float> && from.scalar_type() == at::kBFloat16;
  if (!is_one || from.stride(1) != 1) return nullptr;
  return static_cast<const uint16_t*>(from.const_data_ptr()) + row * from.stride(0);
}

template <class A>
const A* row_in(const at::Tensor& from, int64_t row, A* line) {
  const int64_t H = from.size(1), step = from.stride(1);
  if (step == 1 && from.scalar_type() == c10::CppTypeToScalarType<A>::value) {
    return from.const_data_ptr<A>() + row * from.stride(0);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "row_in", [&] {
    const scalar_t* x = from.const_data_ptr<scalar_t>() + row * from.stride(0);
    for (int64_t h = 0; h < H; ++h) line[h] = A(x[h * step]);
  });
  return line;
}

template <class A>
A product(const at::Tensor& weight, int64_t v, const A* state, A* line) {
  const int64_t H = weight.size(1);
  if constexpr (std::is_same_v<A, float>) {
    if (const uint16_t* bits = bfloat16_row<A>(weight, v)) {
      return A(bfloat16_loops().dot(bits, state, H));
    }
  }
  return A(loops<A>().dot(row_in<A>(weight, v, line), state, H));
}

// sum += factor * row of a [., H] matrix, in any dtype, of any strides; `line` has room for a row.
template <class A>
void add_row(const at::Tensor& from, int64_t row, A factor, A* line, A* sum) {
  const int64_t H = from.size(1);
  if constexpr (std::is_same_v<A, float>) {
    if (const uint16_t* bits = bfloat16_row<A>(from, row)) {
      return bfloat16_loops().add_scaled(bits, H, factor, sum);
    }
  }
  loops<A>().add_scaled(row_in<A>(from, row, line), H, factor, sum);
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

template <class A>
void sparse_backward(const at::Tensor& hidden, const at::Tensor& weight, const Pairs& pairs,
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
      pairs.each(n, [&](int64_t i, int64_t v) { f(n, v, terms[i]); });
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
        pairs.each(rows[r], [&](int64_t i, int64_t v) { sum.add(weight, v, terms[i]); });
        write_row(sum.rounded(), H, out.dhidden, rows[r] * H);
      }
    });
  }
  if (!out.dweight.defined() && !out.dbias.defined()) return;
  const at::Tensor dbias = out.dbias.defined() ? out.dbias.unsqueeze(1) : out.dbias;
  at::parallel_for(0, V, 64, [&](int64_t begin, int64_t end) {
    RowSum<A> sum(H);
    for (int64_t v = begin; v < end; ++v) {
      if (first[v] == first[v + 1]) continue;
      sum.clear();
      if (out.dweight.defined()) sum.add(out.dweight, v, A(1));
      A line;
      double total = dbias.defined() ? *row_in<A>(dbias, v, &line) : A(0);
      for (int64_t e = first[v]; e < first[v + 1]; ++e) {
        total += entries[e].term;
        if (out.dweight.defined()) sum.add(hidden, entries[e].row, entries[e].term);
      }
      if (out.dweight.defined()) write_row(sum.rounded(), H, out.dweight, v * H);
      if (out.dbias.defined()) write_row(&total, 1, out.dbias, v);
    }
  });
}

template <class T>
Tensors3 backward_of_pairs(const Inputs& in, const Pairs& pairs, const std::vector<int64_t>& rows,
                           const std::vector<Acc<T>>& terms, const DenseUpstream& up,
                           std::vector<int64_t> dense, Wanted need) {
  using A = Acc<T>;
  const auto& [hidden, weight, bias, labels, temperature, scale, softcap, rounding] = in;
  std::vector<int64_t> sparse;
  std::set_difference(rows.begin(), rows.end(), dense.begin(), dense.end(),
                      std::back_inserter(sparse));
  int64_t count = 0;
  for (const int64_t n : sparse) count += pairs.end(n) - pairs.begin(n);
  if (count * sparse_cost > int64_t(sparse.size()) * weight.size(0)) {
    dense = rows;
    sparse.clear();
  }
  if (dense.empty()) {
    const Gradients out =
        zero_gradients(hidden, weight, bias, need.dhidden, need.dweight, need.dbias);
    sparse_backward<A>(hidden, weight, pairs, sparse, terms, out);
    return or_empty(out, hidden, weight);
  }
  const auto p = make_problem<T>(hidden, weight, bias, labels, temperature, scale, softcap,
                                 rounding, dense);
  auto g = gather_upstream<A>(up.lse, up.entropy, up.dlogprobs, up.dentropy, dense, p.padded);
  restore_log_sums(p, g);
  const Picks picks = pick(p, pairs, dense);
  Gradients out{{}, {}, {}, false};
  if (need.dhidden) out.dhidden = at::empty({p.N, p.H}, hidden.options());
  if (need.dweight) out.dweight = kept_tensor(weight.sizes(), weight.scalar_type());
  if (need.dbias) out.dbias = at::empty({p.V}, bias->options());
  backward<T>(p, g.upstream(p.inv_temperature), nullptr, out, &picks, terms.data());
  if (need.dhidden) out.dhidden = place_rows(out.dhidden, dense, hidden, hidden.scalar_type());
  if (!sparse.empty()) sparse_backward<A>(hidden, weight, pairs, sparse, terms, out);
  return or_empty(out, hidden, weight);
}

template const float* row_in(const at::Tensor&, int64_t, float*);
template float product(const at::Tensor&, int64_t, const float*, float*);
template void sparse_backward(const at::Tensor&, const at::Tensor&, const Pairs&,
                              const std::vector<int64_t>&, const std::vector<float>&,
                              const Gradients&);
template const double* row_in(const at::Tensor&, int64_t, double*);
template double product(const at::Tensor&, int64_t, const double*, double*);
template void sparse_backward(const at::Tensor&, const at::Tensor&, const Pairs&,
                              const std::vector<int64_t>&, const std::vector<double>&,
                              const Gradients&);
template Tensors3 backward_of_pairs<c10::BFloat16>(const Inputs&, const Pairs&, const std::vector<int64_t>&,
                                       const std::vector<float>&, const DenseUpstream&,
                                       std::vector<int64_t>, Wanted);
template Tensors3 backward_of_pairs<float>(const Inputs&, const Pairs&, const std::vector<int64_t>&,
                                       const std::vector<float>&, const DenseUpstream&,
                                       std::vector<int64_t>, Wanted);
template Tensors3 backward_of_pairs<double>(const Inputs&, const Pairs&, const std::vector<int64_t>&,
                                       const std::vector<double>&, const DenseUpstream&,
                                       std::vector<int64_t>, Wanted);

}  // namespace fused_rl
