// What the forward and the backward pass of the linear head share: operands in kernel layout.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "loops.h"
#include "matmul.h"
#include "memory.h"
#include "pack.h"
#include "parallel.h"

namespace fused_rl {

// Rows of a super-block, rounded to whole blocks.
inline constexpr int64_t super_block_rows = 1024;

// Tokens in a tile.
inline constexpr int64_t tile_tokens = panel_columns;

// For the few large buffers of a step, before they are first written.
inline void prefer_huge_pages(const at::Tensor& buffer) {
  prefer_huge_pages(buffer.data_ptr(), buffer.nbytes());
}

template <class T>
struct Problem {
  using A = Acc<T>;

  int64_t N, padded;    // padded: N to a multiple of 32
  int64_t H, wide, K, V;  // wide: H to a multiple of 32; K: H to what a product takes
  at::Tensor hidden;    // [N, wide] T, contiguous: the tokens that take part, and zeros beyond H
  at::Tensor weight;           // [V, H], any dtype, any strides
  at::Tensor bias;             // [V] A, contiguous, or undefined
  std::vector<int64_t> labels;     // [padded], -1 in the padding
  std::vector<A> inv_temperature;  // [padded], 1 in the padding
  Transform<A> transform;
  int64_t block;  // vocabulary rows in a tile

  int64_t blocks() const { return (V + block - 1) / block; }
  int64_t block_rows(int64_t b) const { return std::min(block, V - b * block); }
  // Rows whose statistics are merged first, and whose gradients are formed at a time.
  int64_t super_rows() const { return std::max<int64_t>(1, super_block_rows / block) * block; }
  int64_t super_blocks() const { return (V + super_rows() - 1) / super_rows(); }
  int64_t tiles() const { return (padded + tile_tokens - 1) / tile_tokens; }
  int64_t tile_width(int64_t t) const { return std::min(tile_tokens, padded - t * tile_tokens); }
  const A* bias_at(int64_t v) const {
    return bias.defined() ? bias.const_data_ptr<A>() + v : nullptr;
  }
  // Rows of weight can be read where they lie.
  bool readable() const {
    return weight.scalar_type() == c10::CppTypeToScalarType<T>::value &&
           (weight.stride(1) == 1 || H == 1);
  }
  // And multiplied there.
  bool in_place() const { return readable() && K == H && !tiled<T>(); }
};

template <class T>
Problem<T> make_problem(const at::Tensor& hidden, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& labels,
                        const at::Tensor& temperature, double scale, double softcap,
                        int64_t rounding, const std::vector<int64_t>& active);

template <class T>
struct Rows {
  const T* data;
  int64_t ld;
};

// Rows v0 .. v0 + rows of weight, at most a block, converted into `buffer`; zeros from H to K.
template <class T>
Rows<T> converted_rows(const Problem<T>& p, int64_t v0, int64_t rows, at::Tensor& buffer) {
  if (!buffer.defined()) {
    buffer = at::zeros({p.block, p.K}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
  }
  buffer.narrow(0, 0, rows).narrow(1, 0, p.H).copy_(p.weight.narrow(0, v0, rows));
  return {buffer.template const_data_ptr<T>(), p.K};
}

// The same, where they lie if they can be read there.
template <class T>
Rows<T> weight_rows(const Problem<T>& p, int64_t v0, int64_t rows, at::Tensor& buffer) {
  if (!p.readable()) return converted_rows(p, v0, rows, buffer);
  return {p.weight.template const_data_ptr<T>() + v0 * p.weight.stride(0), p.weight.stride(0)};
}

// A block of weight as the left operand of the logits.
template <class T>
class WeightBlock {
 public:
  explicit WeightBlock(const Problem<T>& problem) : p(problem) {}
  // Rows v0 .. v0 + rows, until the next call.
  Left<T> at(int64_t v0, int64_t rows) {
    if (v0 == first) return block;
    first = v0;
    if (p.in_place()) {
      const Rows<T> from = weight_rows(p, v0, rows, converted);
      return block = {from.data, sum_step<T>, from.ld};
    }
    if (!tiled<T>()) {
      const Rows<T> from = converted_rows(p, v0, rows, converted);
      return block = {from.data, sum_step<T>, from.ld};
    }
    const Rows<T> from = weight_rows(p, v0, rows, converted);
    const int64_t next = p.block * sum_step<T>;
    if (!packed) packed = Buffer<T>(round_up(p.K, sum_step<T>) * p.block);
    pack_left(from.data, from.ld, rows, p.H, p.K, packed.data(), next);
    return block = {packed.data(), next};
  }

 private:
  const Problem<T>& p;
  at::Tensor converted;
  Buffer<T> packed;
  Left<T> block{nullptr, 0};
  int64_t first = -1;
};

// hidden as the right operand of the logits: one panel [K, 64] per tile of tokens.
template <class T>
class HiddenPanels {
 public:
  explicit HiddenPanels(const Problem<T>& p)
      : size(round_up(p.wide, sum_step<T>) * panel_columns), packed(p.tiles() * size) {
    const T* from = p.hidden.template const_data_ptr<T>();
    parallel_tasks(p.tiles(), [&](int64_t t, int64_t) {
      const int64_t n0 = t * tile_tokens;
      pack_transposed<T>(from + n0 * p.wide, p.wide, p.N - n0, p.tile_width(t),
                         packed.data() + t * size);
    });
  }
  const T* tile(int64_t t) const { return packed.data() + t * size; }

 private:
  int64_t size;
  Buffer<T> packed;
};

// Logits of `rows` vocabulary rows from v0 and the tokens of tile t, into z[rows, ld].
template <class T>
void logits_tile(const Problem<T>& p, Left<T> weight, int64_t v0, int64_t rows,
                 const HiddenPanels<T>& hidden, int64_t t, Acc<T>* z, int64_t ld) {
  const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
  matmul<T>(rows, width, p.K, weight, hidden.tile(t), z, ld);
  if (!p.transform.identity) {
    loops<Acc<T>>().transform(z, rows, width, ld, p.bias_at(v0), p.inv_temperature.data() + n0,
                              p.transform);
  }
}

// Lines v0 .. v0 + lines of chosen columns of a matrix that lies in tiles [tiles, V, width], and zeros
// beyond `count`, into to[lines, width]. A line after the other: those of neighbours share cache lines.
template <class E>
void gather_columns(const E* from, int64_t V, int64_t padded, int64_t v0, int64_t lines,
                    const int64_t* columns, int64_t count, int64_t width, E* to) {
  std::array<const E*, tile_tokens> at;
  std::array<int64_t, tile_tokens> stride;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t first = columns[n] / tile_tokens * tile_tokens;
    stride[n] = std::min(tile_tokens, padded - first);
    at[n] = from + first * V + v0 * stride[n] + columns[n] % tile_tokens;
  }
  for (int64_t v = 0; v < lines; ++v) {
    E* const line = to + v * width;
    for (int64_t n = 0; n < count; ++n) line[n] = at[n][v * stride[n]];
    std::fill(line + count, line + width, E(0));
  }
}

// Where a backward pass has the logits of a tile from.
template <class A>
struct LogitTiles {
  // What a thread keeps between its tiles.
  struct Cache {
    virtual ~Cache() = default;
  };
  virtual ~LogitTiles() = default;
  virtual std::unique_ptr<Cache> cache() const { return nullptr; }
  // z[rows, width] of the vocabulary rows from v0 and the tokens of tile t: where it lies, or in
  // `scratch`.
  virtual const A* tile(int64_t v0, int64_t rows, int64_t t, A* scratch, Cache* own) const = 0;
};

// Formed again.
template <class T>
class FormedTiles : public LogitTiles<Acc<T>> {
 public:
  using Cache = typename LogitTiles<Acc<T>>::Cache;
  explicit FormedTiles(const Problem<T>& problem) : p(problem), hidden(problem) {}
  std::unique_ptr<Cache> cache() const override { return std::make_unique<Own>(p); }
  const Acc<T>* tile(int64_t v0, int64_t rows, int64_t t, Acc<T>* scratch,
                     Cache* own) const override {
    const Left<T> weight = static_cast<Own*>(own)->block.at(v0, rows);
    logits_tile(p, weight, v0, rows, hidden, t, scratch, p.tile_width(t));
    return scratch;
  }

 private:
  struct Own : Cache {
    explicit Own(const Problem<T>& p) : block(p) {}
    WeightBlock<T> block;
  };
  const Problem<T>& p;
  const HiddenPanels<T> hidden;
};

// The gradient of a raw product from dz, that of its logit z.
template <class T>
T raw_gradient(T dz, T z, T inv_temperature, const Transform<T>& transform) {
  const T slope = dz * transform.scale * inv_temperature;
  if (transform.softcap == T(0)) return slope;
  const T t = z / (transform.softcap * inv_temperature);
  return slope * (T(1) - t * t);
}

// Chosen pairs (token, entry), grouped by the tile in which their logit lies: a tile finds its own
// without a search.
struct Picks {
  struct Pick {
    int32_t line, column;
    int64_t pair;  // its number in the caller's count
  };
  std::vector<Pick> picks;
  std::vector<int64_t> first;  // [blocks * tiles + 1]
  int64_t tiles;

  // f(pick) for those of block b and tile t.
  template <class F>
  void each(int64_t b, int64_t t, const F& f) const {
    const int64_t group = b * tiles + t;
    for (int64_t i = first[group]; i < first[group + 1]; ++i) f(picks[i]);
  }
};

// One entry per token of the problem.
template <class T>
struct TokenStatistics {
  std::vector<Acc<T>> logprobs, entropy, top, max;
  std::vector<double> lse, log_sum;
};

// What a filtered backward pass skips: so many vocabulary rows for one token. p.block divides it.
inline constexpr int64_t filter_rows = 512;

// The softmax of each super-block and token, [super-blocks, max | sum | moment, padded], to become that
// of the whole vocabulary.
template <class T>
class PartialSoftmax {
 public:
  explicit PartialSoftmax(const Problem<T>& p)
      : supers(p.super_blocks()), padded(p.padded), parts(supers * 3 * padded) {
    for (int64_t s = 0; s < supers; ++s) {
      Acc<T>* const of_s = parts.data() + s * 3 * padded;
      std::fill_n(of_s, padded, -std::numeric_limits<Acc<T>>::infinity());
      std::fill_n(of_s + padded, 2 * padded, Acc<T>(0));
    }
  }
  Running<Acc<T>> at(int64_t super_block, int64_t n) const {
    Acc<T>* const of_s = parts.data() + super_block * 3 * padded + n;
    return {of_s, of_s + padded, of_s + 2 * padded};
  }
  TokenStatistics<T> finish(const Problem<T>& p, const std::vector<Acc<T>>& at_label) const;

 private:
  int64_t supers, padded;
  Buffer<Acc<T>> parts;
};

class KeptExponentials;
template <class T>
class AskedOf;

// stored: null, or a buffer for V * padded logits, tile by tile: [tiles, V, width].
// kept: null, or where their exponentials go. Of bf16 alone, and without softcap.
// picks: null, or the pairs whose logits are wanted in `picked`, each under its number.
// peaks: null, or -inf [V / filter_rows, padded], to become the largest logits.
// asked: null, or what is shown every tile, in parts of a super-block.
template <class T>
TokenStatistics<T> forward(const Problem<T>& p, Acc<T>* stored, const Picks* picks = nullptr,
                           Acc<T>* picked = nullptr, Acc<T>* peaks = nullptr,
                           const KeptExponentials* kept = nullptr, AskedOf<T>* asked = nullptr);

// n numbers, rounded once, into a contiguous tensor of any floating dtype, from element `offset` on;
// added to what is there if `add`.
template <class A>
void write_row(const A* from, int64_t n, const at::Tensor& tensor, int64_t offset, bool add = false) {
  if constexpr (std::is_same_v<A, float>) {
    if (tensor.scalar_type() == at::kBFloat16 && !add) {
      bfloat16_loops().narrow(from, n, static_cast<uint16_t*>(tensor.mutable_data_ptr()) + offset);
      return;
    }
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor.scalar_type(), "write_row", [&] {
    scalar_t* const to = tensor.mutable_data_ptr<scalar_t>() + offset;
    for (int64_t i = 0; i < n; ++i) to[i] = scalar_t(add ? A(to[i]) + from[i] : from[i]);
  });
}

// Gradients of one pass. Undefined tensors are not wanted.
struct Gradients {
  at::Tensor dhidden;  // [N, H], contiguous, any floating dtype: the tokens of the problem
  at::Tensor dweight;  // [V, H], or its last columns alone, contiguous
  at::Tensor dbias;    // [V], contiguous, the dtype of dweight
  bool accumulate;     // add to dweight and dbias rather than overwrite

  int64_t weight_columns() const { return dweight.defined() ? dweight.size(1) : 0; }
};

// Logits that forward() stored for a chunk of tokens, of which a problem of N has those at `rows`.
template <class A>
class StoredTiles : public LogitTiles<A> {
 public:
  using Cache = typename LogitTiles<A>::Cache;
  // padded: of the chunk; rows: empty if all, in order.
  StoredTiles(const A* z, int64_t V, int64_t padded, int64_t N, std::vector<int64_t> rows)
      : z(z), V(V), padded(padded), N(N), rows(std::move(rows)) {}
  const A* tile(int64_t v0, int64_t lines, int64_t t, A* scratch, Cache*) const override {
    const int64_t n0 = t * tile_tokens;
    if (rows.empty()) return z + n0 * V + v0 * std::min(tile_tokens, padded - n0);
    const int64_t width = std::min(tile_tokens, round_up(N, group) - n0);
    gather_columns(z, V, padded, v0, lines, rows.data() + n0, std::min(width, N - n0), width, scratch);
    return scratch;
  }

 private:
  const A* z;
  int64_t V, padded, N;
  std::vector<int64_t> rows;
};

// The other side of a divergence whose gradient a pass adds to the student's: [padded] each.
template <class A>
struct Teacher {
  const LogitTiles<A>& logits;
  TwoLse<A> lse;
  const A* ddivergence;
  const A* slope;  // the sum of the student's slopes
  Measure measure;
};

// The exponentials of a chunk of tokens, of which a problem has those at `rows`; all, in order, if empty.
struct ExponentialsOf {
  const KeptExponentials& kept;
  std::vector<int64_t> rows;
};

// up.*: [padded], zeros in the padding. stored: null to form the logits again.
// picks: null, or the pairs to whose draw `terms` are added, each under its number.
// teacher: null, or what a divergence is from.
template <class T>
void backward(const Problem<T>& p, Upstream<Acc<T>> up, const StoredTiles<Acc<T>>* stored,
              Gradients& out, const Picks* picks = nullptr, const Acc<T>* terms = nullptr,
              const Teacher<Acc<T>>* teacher = nullptr);

// The same from exponentials: of an upstream without entropy and a problem without softcap.
void backward(const Problem<c10::BFloat16>& p, Upstream<float> up, const ExponentialsOf& chunk,
              Gradients& out);

}  // namespace fused_rl
