// What the forward and the backward pass of the linear head share: operands in kernel layout.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "loops.h"
#include "matmul.h"
#include "pack.h"

namespace fused_rl {

// Tokens in a tile: four vectors of 16, the width at which the microkernels are at their best.
inline constexpr int64_t tile_tokens = 64;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// For the few large buffers of a step, before they are first written. A fresh buffer of 128 MiB costs
// 32768 page faults, a tenth of the step; with huge pages, where the system offers them, 64.
inline void prefer_huge_pages(const at::Tensor& buffer) {
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + buffer.nbytes()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// body(begin, end) on each thread, for tasks that multiply.
template <class F>
void parallel_tasks(int64_t tasks, const F& body) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const MatmulScope scope;
    body(begin, end);
  });
}

template <class T>
struct Problem {
  using A = Acc<T>;

  int64_t N, padded, H, K, V;  // padded: N to a multiple of 16; K: H to a whole pack of lines
  at::Tensor hidden;           // [N, K] T, contiguous: the tokens that take part
  at::Tensor weight;           // [V, H], any dtype, any strides
  at::Tensor bias;             // [V] A, contiguous, or undefined
  std::vector<int64_t> labels;     // [padded], -1 in the padding
  std::vector<A> inv_temperature;  // [padded], 1 in the padding
  Transform<A> transform;
  int64_t block;  // vocabulary rows in a tile

  int64_t blocks() const { return (V + block - 1) / block; }
  int64_t block_rows(int64_t b) const { return std::min(block, V - b * block); }
  int64_t tiles() const { return (padded + tile_tokens - 1) / tile_tokens; }
  int64_t tile_width(int64_t t) const { return std::min(tile_tokens, padded - t * tile_tokens); }
  const A* bias_at(int64_t v) const {
    return bias.defined() ? bias.const_data_ptr<A>() + v : nullptr;
  }
  // A weight block can be multiplied where it lies.
  bool in_place() const {
    return weight.scalar_type() == c10::CppTypeToScalarType<T>::value &&
           (weight.stride(1) == 1 || H == 1) && K == H;
  }
};

template <class T>
Problem<T> make_problem(const at::Tensor& hidden, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& labels,
                        const at::Tensor& temperature, double scale, double softcap,
                        const std::vector<int64_t>& active);

template <class T>
struct Block {
  const T* data;
  int64_t ld;
};

// Rows v0 .. v0 + rows of weight as [rows, K] T; `buffer` holds them when they need converting.
template <class T>
Block<T> weight_block(const Problem<T>& p, int64_t v0, int64_t rows, at::Tensor& buffer) {
  if (p.in_place()) return {p.weight.template const_data_ptr<T>() + v0 * p.weight.stride(0),
                            p.weight.stride(0)};
  if (!buffer.defined()) {
    buffer = at::zeros({p.block, p.K}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
  }
  buffer.narrow(0, 0, rows).narrow(1, 0, p.H).copy_(p.weight.narrow(0, v0, rows));
  return {buffer.template const_data_ptr<T>(), p.K};
}

// hidden as the right operand of the logits: one panel [K, width] per tile of tokens.
template <class T>
at::Tensor pack_for_logits(const Problem<T>& p) {
  at::Tensor packed = at::empty({p.padded * p.K}, p.hidden.options());
  const T* from = p.hidden.template const_data_ptr<T>();
  T* to = packed.template mutable_data_ptr<T>();
  at::parallel_for(0, p.tiles(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n0 = t * tile_tokens;
      pack_transposed<T>(from, p.K, p.N, n0, p.tile_width(t), to + n0 * p.K);
    }
  });
  return packed;
}

// Logits of `rows` vocabulary rows from v0 and the tokens of tile t, into z[rows, ld].
template <class T>
void logits_tile(const Problem<T>& p, Block<T> weight, int64_t v0, int64_t rows, const T* packed,
                 int64_t t, Acc<T>* z, int64_t ld) {
  const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
  const T* tokens = packed + n0 * p.K;
  matmul_in_steps<T>(rows, width, p.K, weight.data, weight.ld, sum_step<T>, tokens, width, z, ld);
  if (!p.transform.identity) {
    loops<Acc<T>>().transform(z, rows, width, ld, p.bias_at(v0), p.inv_temperature.data() + n0,
                              p.transform);
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
  explicit FormedTiles(const Problem<T>& problem) : p(problem), operand(pack_for_logits(problem)) {}
  std::unique_ptr<Cache> cache() const override { return std::make_unique<Own>(); }
  const Acc<T>* tile(int64_t v0, int64_t rows, int64_t t, Acc<T>* scratch,
                     Cache* own) const override {
    Own& c = *static_cast<Own*>(own);
    if (c.first != v0) c.block = weight_block(p, v0, rows, c.buffer);
    c.first = v0;
    logits_tile(p, c.block, v0, rows, operand.template const_data_ptr<T>(), t, scratch,
                p.tile_width(t));
    return scratch;
  }

 private:
  struct Own : Cache {
    at::Tensor buffer;
    Block<T> block{nullptr, 0};
    int64_t first = -1;
  };
  const Problem<T>& p;
  const at::Tensor operand;
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

// stored: null, or a buffer for V * padded logits, tile by tile: [tiles, V, width].
// picks: null, or the pairs whose logits are wanted in `picked`, each under its number.
// peaks: null, or -inf [V / filter_rows, padded], to become the largest logits.
template <class T>
TokenStatistics<T> forward(const Problem<T>& p, Acc<T>* stored, const Picks* picks = nullptr,
                           Acc<T>* picked = nullptr, Acc<T>* peaks = nullptr);

// Gradients of one pass. Undefined tensors are not wanted.
struct Gradients {
  at::Tensor dhidden;  // [N, H], accumulator dtype: the tokens of the problem
  at::Tensor dweight;  // [V, H], contiguous
  at::Tensor dbias;    // [V], contiguous, the dtype of dweight
  bool accumulate;     // add to dweight and dbias rather than overwrite
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
    const int64_t width = std::min(tile_tokens, round_up(N, 16) - n0);
    for (int64_t n = 0; n < width; ++n) {
      int64_t stride = 0;
      const bool real = n0 + n < N;
      const A* from = real ? column(rows[n0 + n], v0, &stride) : nullptr;
      for (int64_t v = 0; v < lines; ++v) scratch[v * width + n] = real ? from[v * stride] : A(0);
    }
    return scratch;
  }

 private:
  // Where the logits of a token of the chunk start, and the stride of the vocabulary.
  const A* column(int64_t row, int64_t v, int64_t* stride) const {
    const int64_t first = row / tile_tokens * tile_tokens;
    *stride = std::min(tile_tokens, padded - first);
    return z + first * V + v * *stride + row % tile_tokens;
  }
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

// up.*: [padded], zeros in the padding. stored: null to form the logits again.
// picks: null, or the pairs to whose draw `terms` are added, each under its number.
// teacher: null, or what a divergence is from.
template <class T>
void backward(const Problem<T>& p, Upstream<Acc<T>> up, const StoredTiles<Acc<T>>* stored,
              Gradients& out, const Picks* picks = nullptr, const Acc<T>* terms = nullptr,
              const Teacher<Acc<T>>* teacher = nullptr);

}  // namespace fused_rl
