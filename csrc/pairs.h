// Pairs (token, vocabulary entry): their logits are picked out of the tiles that a pass over the whole
// vocabulary has in the cache anyway, and their terms of the gradient are added to the tiles of draw.
// Where nothing but pairs has an upstream gradient, draw is as sparse as they are, and so are the
// products: M H instead of N H V.
#pragma once

#include <ATen/ops/empty.h>

#include <limits>
#include <vector>

#include "problem.h"
#include "tokens.h"

namespace fused_rl {

// The entries of token n are entry[begin(n)] .. entry[end(n) - 1], without those that are left_out.
struct Pairs {
  at::Tensor entries, offsets;
  int64_t left_out;
  const int64_t* entry = entries.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();

  Pairs(const at::Tensor& of_tokens, const at::Tensor& from, int64_t never)
      : entries(of_tokens.contiguous()), offsets(from.contiguous()), left_out(never) {}
  int64_t size() const { return entries.numel(); }
  int64_t begin(int64_t n) const { return offset[n]; }
  int64_t end(int64_t n) const { return offset[n + 1]; }

  // f(i, entry) for the pairs of token n.
  template <class F>
  void each(int64_t n, const F& f) const {
    for (int64_t i = begin(n); i < end(n); ++i) {
      if (entry[i] != left_out) f(i, entry[i]);
    }
  }
};

// The pairs of the tokens at `rows`, which are those of the problem; numbered as in `pairs`.
template <class T>
Picks pick(const Problem<T>& p, const Pairs& pairs, const std::vector<int64_t>& rows) {
  Picks out{{}, std::vector<int64_t>(p.blocks() * p.tiles() + 1, 0), p.tiles()};
  const auto each = [&](const auto& f) {
    for (int64_t r = 0; r < p.N; ++r) {
      pairs.each(rows[r], [&](int64_t i, int64_t v) {
        f(v / p.block * p.tiles() + r / tile_tokens, r, i, v);
      });
    }
  };
  each([&](int64_t group, int64_t, int64_t, int64_t) { ++out.first[group + 1]; });
  for (size_t g = 1; g < out.first.size(); ++g) out.first[g] += out.first[g - 1];
  std::vector<int64_t> next(out.first.begin(), out.first.end() - 1);
  out.picks.resize(out.first.back());
  each([&](int64_t group, int64_t r, int64_t i, int64_t v) {
    out.picks[next[group]++] = {int32_t(v % p.block), int32_t(r % tile_tokens), i};
  });
  return out;
}

// What a gradient is of, as every backward operator takes it.
struct Inputs {
  const at::Tensor &hidden, &weight;
  const Bias& bias;
  const at::Tensor &labels, &temperature;
  double scale, softcap;
  int64_t rounding;
};

// What the dense way needs of each token: the gradients that reach the whole vocabulary.
struct DenseUpstream {
  const at::Tensor &lse, &entropy, &dlogprobs, &dentropy;
};

struct Wanted {
  bool dhidden, dweight, dbias;
};

// Adds the products of a draw that holds `terms` at the pairs of the tokens at `rows`, and nothing
// else. The gradients are in the dtypes of what they belong to, over all tokens; dhidden holds zeros
// at these.
template <class A>
void sparse_backward(const at::Tensor& hidden, const at::Tensor& weight, const Pairs& pairs,
                     const std::vector<int64_t>& rows, const std::vector<A>& terms,
                     const Gradients& out);

// The gradients of the tokens at `rows`, rising: `terms` at their pairs and, of those among them that
// are in `dense`, the gradient of the statistics over the whole vocabulary. The others cost M H.
template <class T>
Tensors3 backward_of_pairs(const Inputs& in, const Pairs& pairs, const std::vector<int64_t>& rows,
                           const std::vector<Acc<T>>& terms, const DenseUpstream& up,
                           std::vector<int64_t> dense, Wanted need);

// A row of a [., H] matrix in A: where it lies, or converted into `line`, which has room for it.
template <class A>
const A* row_in(const at::Tensor& from, int64_t row, A* line);

// hidden[n] . weight[v], `state` being row n of hidden in A; `line` has room for a row.
template <class A>
A product(const at::Tensor& weight, int64_t v, const A* state, A* line);

}  // namespace fused_rl
