// dhidden, dweight and dbias from dlogprobs and dentropy.
//
//     dz[v, n]   = dlogprobs[n] (1[v = label] - p) - dentropy[n] p (log p + entropy[n])
//     draw[v, n] = dz softcap'(.) scale / temperature[n]
//     dweight    = draw hidden        dhidden = draw^T weight        dbias[v] = sum_n draw[v, n]
//
// The vocabulary is walked in super-blocks of about two thousand rows. For each: the gradient of its
// logits (from logits recomputed or stored), then its rows of dweight, finished and written once, then
// its share of dhidden, which stays in accumulators. Every sum has one owner and a fixed order: no
// atomics, no copy per thread, the same bits on any number of threads.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "problem.h"

namespace fused_rl {

static constexpr int64_t super_block_rows = 2048;
static constexpr int64_t chunk_tokens = 4096;  // bounds the gradient of a super-block's logits
static constexpr int64_t panel = 64;           // columns of dweight in one product
static constexpr int64_t hidden_block = 128;   // lines of dhidden, transposed, in one product

template <class T>
struct Pass {
  using A = Acc<T>;
  static constexpr bool paired = lines_per_pack<T> == 2;
  static constexpr int64_t step = sum_step<T>;

  const Problem<T>& p;
  Upstream<A> up;
  std::unique_ptr<const LogitTiles<A>> formed;  // where none are stored
  const LogitTiles<A>& logits;
  Gradients& out;
  const Picks* picks;
  const A* terms;
  const Teacher<A>* teacher;

  int64_t rows_max = std::min(std::max(p.block, super_block_rows / p.block * p.block),
                              round_up(p.V, p.block));
  int64_t rows_pad = round_up(rows_max, 2);
  int64_t tokens_max = std::min(chunk_tokens, p.padded);
  bool chunked = p.padded > chunk_tokens;
  int64_t panels = (p.H + panel - 1) / panel;

  at::TensorOptions of_T = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  at::TensorOptions of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
  at::Tensor columns_operand;
  // [tokens / step][rows, step]: strides and sums that do not follow the number of tokens.
  at::Tensor draw = at::empty({(tokens_max + step - 1) / step, rows_max, step}, of_T);
  at::Tensor draw_pairs;    // panels [rows / 2, width, 2]
  at::Tensor weight_t;      // [H, rows]
  at::Tensor dhidden_t;     // panels [H, width]
  at::Tensor dweight_rows;  // [blocks, panels][block, 64], when chunked
  at::Tensor bias_parts;    // [tiles, rows] double

  Pass(const Problem<T>& problem, Upstream<A> upstream, const StoredTiles<A>* stored,
       Gradients& gradients, const Picks* chosen, const A* chosen_terms, const Teacher<A>* other)
      : p(problem),
        up(upstream),
        formed(stored ? nullptr : std::make_unique<FormedTiles<T>>(problem)),
        logits(stored ? static_cast<const LogitTiles<A>&>(*stored) : *formed),
        out(gradients),
        picks(chosen),
        terms(chosen_terms),
        teacher(other) {
    if (out.dweight.defined()) {
      columns_operand = at::empty({panels, p.padded, panel}, of_T);
      T* to = columns_operand.template mutable_data_ptr<T>();
      parallel_tasks(panels, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          pack_columns<T>(p.hidden.template const_data_ptr<T>(), p.K, p.N, p.padded, j * panel,
                          to + j * p.padded * panel);
        }
      });
      if (chunked) dweight_rows = at::empty({rows_max, panels * panel}, of_A);
    }
    if (out.dhidden.defined()) {
      weight_t = at::zeros({p.H, rows_pad}, of_T);
      dhidden_t = at::zeros({p.padded * p.H}, of_A);
      if constexpr (paired) draw_pairs = at::empty({tokens_max * rows_pad}, of_T);
    }
    if (out.dbias.defined()) bias_parts = at::empty({p.tiles(), rows_max}, at::kDouble);
  }

  void run() {
    for (int64_t v0 = 0; v0 < p.V; v0 += rows_max) {
      const int64_t rows = std::min(rows_max, p.V - v0);
      if (out.dhidden.defined()) transpose_weight(v0, rows);
      for (int64_t n0 = 0; n0 < p.padded; n0 += tokens_max) {
        const int64_t tokens = std::min(tokens_max, p.padded - n0);
        logit_gradients(v0, rows, n0, tokens);
        if (out.dweight.defined()) weight_gradient(v0, rows, n0, tokens);
        if (out.dhidden.defined()) hidden_gradient(rows, n0, tokens);
      }
      if (out.dbias.defined()) bias_gradient(v0, rows);
    }
    if (out.dhidden.defined()) finish_hidden();
  }

  void transpose_weight(int64_t v0, int64_t rows) {
    T* to = weight_t.template mutable_data_ptr<T>();
    const int64_t blocks = (rows + p.block - 1) / p.block;
    parallel_tasks(blocks, [&](int64_t begin, int64_t end) {
      at::Tensor buffer;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * p.block, count = std::min(p.block, rows - first);
        const Block<T> weight = weight_block(p, v0 + first, count, buffer);
        transpose<T>(weight.data, weight.ld, count, p.H, to + first, rows_pad);
      }
    });
    if (paired && rows % 2) {
      for (int64_t h = 0; h < p.H; ++h) to[h * rows_pad + rows] = T(0.f);
    }
  }

  // Where the line `row` of a super-block and the token `column` of a chunk lie in draw.
  T* draw_at(int64_t row, int64_t column) {
    return draw.template mutable_data_ptr<T>() + (column / step * rows_max + row) * step +
           column % step;
  }

  void logit_gradients(int64_t v0, int64_t rows, int64_t chunk0, int64_t tokens) {
    const int64_t blocks = (rows + p.block - 1) / p.block;
    const int64_t tiles = (tokens + tile_tokens - 1) / tile_tokens;
    parallel_tasks(blocks * tiles, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(p.block * tile_tokens);
      Scratch<A> of_teacher(teacher ? p.block * tile_tokens : 0);
      const auto own = logits.cache(), teachers = teacher ? teacher->logits.cache() : nullptr;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / tiles, t = chunk0 / tile_tokens + task % tiles;
        const int64_t first = b * p.block, count = std::min(p.block, rows - first);
        const A* z = logits.tile(v0 + first, count, t, scratch.data(), own.get());
        const A* zt = nullptr;
        if (teacher) {
          zt = teacher->logits.tile(v0 + first, count, t, of_teacher.data(), teachers.get());
        }
        tile_gradient(z, zt, scratch.data(), v0 + first, first, count, t, chunk0);
      }
    });
  }

  // z -> draw for one tile, with the label's own term, into the layouts of the two products.
  void tile_gradient(const A* z, const A* zt, A* scratch, int64_t v0, int64_t first, int64_t rows,
                     int64_t t, int64_t chunk0) {
    const int64_t n0 = t * tile_tokens, width = p.tile_width(t), column = n0 - chunk0;
    A* target = scratch;
    int64_t ld_target = width;
    if constexpr (!paired) {
      target = draw_at(first, column);
      ld_target = step;
    }
    A label_term[tile_tokens];
    for (int64_t n = 0; n < width; ++n) {
      const int64_t line = p.labels[n0 + n] - v0;
      if (line >= 0 && line < rows) {
        label_term[n] = raw_gradient(up.dlogprobs[n0 + n], z[line * width + n],
                                     up.inv_temperature[n0 + n], p.transform);
      }
    }
    const Upstream<A> here{up.lse + n0,       up.lse_low + n0,  up.entropy + n0,
                           up.dlogprobs + n0, up.dentropy + n0, up.inv_temperature + n0,
                           up.has_dentropy};
    if (zt) {
      const TwoLse<A> l = teacher->lse;
      const TwoLse<A> known{l.lse + n0,             l.lse_low + n0, l.teacher_lse + n0,
                            l.teacher_lse_low + n0, l.gap + n0,     l.gap_low + n0};
      loops<A>().two_gradient(z, zt, rows, width, width, known, teacher->measure,
                              teacher->ddivergence + n0, teacher->slope + n0, here, p.transform,
                              target, ld_target);
    } else {
      loops<A>().gradient(z, rows, width, width, here, p.transform, target, ld_target);
    }
    // What pads the tokens, a hidden state of 0, has a NaN for a logit where a weight is infinite.
    for (int64_t n = p.N - n0; n < width; ++n) {
      for (int64_t v = 0; v < rows; ++v) target[v * ld_target + n] = A(0);
    }
    for (int64_t n = 0; n < width; ++n) {
      const int64_t line = p.labels[n0 + n] - v0;
      if (line >= 0 && line < rows) target[line * ld_target + n] += label_term[n];
    }
    if (picks) {
      picks->each(v0 / p.block, t, [&](Picks::Pick i) {
        target[i.line * ld_target + i.column] += terms[i.pair];
      });
    }
    if (out.dbias.defined()) {
      loops<A>().line_sums(target, rows, width, ld_target,
                           bias_parts.template mutable_data_ptr<double>() + t * rows_max + first);
    }
    if constexpr (paired) {
      uint16_t *as_rows = nullptr, *as_pairs = nullptr;
      if (out.dweight.defined()) as_rows = reinterpret_cast<uint16_t*>(draw_at(first, column));
      if (out.dhidden.defined()) as_pairs = bits(draw_pairs) + column * rows_pad + first * width;
      bfloat16_loops().pack(target, rows, width, ld_target, as_rows, step, as_pairs, width);
    }
  }

  static uint16_t* bits(const at::Tensor& tensor) {
    return static_cast<uint16_t*>(tensor.mutable_data_ptr());
  }

  void weight_gradient(int64_t v0, int64_t rows, int64_t chunk0, int64_t tokens) {
    const bool first_chunk = chunk0 == 0, last_chunk = chunk0 + tokens >= p.padded;
    const int64_t blocks = (rows + p.block - 1) / p.block;
    const T* right = columns_operand.template const_data_ptr<T>();
    parallel_tasks(blocks * panels, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(p.block * panel);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / panels, j = task % panels;
        const int64_t first = b * p.block, count = std::min(p.block, rows - first);
        A* total = scratch.data();
        if (chunked) total = dweight_rows.template mutable_data_ptr<A>() + task * p.block * panel;
        A* sum = first_chunk ? total : scratch.data();
        matmul_in_steps<T>(count, panel, tokens, draw_at(first, 0), step, rows_max * step,
                           right + (j * p.padded + chunk0) * panel, panel, sum, panel);
        if (sum != total) loops<A>().add_scaled(sum, count * panel, A(1), total);
        if (last_chunk) {
          for (int64_t v = 0; v < count; ++v) {
            write(out.dweight, (v0 + first + v) * p.H + j * panel, total + v * panel,
                  std::min(panel, p.H - j * panel));
          }
        }
      }
    });
  }

  void hidden_gradient(int64_t rows, int64_t chunk0, int64_t tokens) {
    const int64_t K = paired ? round_up(rows, 2) : rows;
    const int64_t blocks = (p.H + hidden_block - 1) / hidden_block;
    const int64_t tiles = (tokens + tile_tokens - 1) / tile_tokens;
    const T* left = weight_t.template const_data_ptr<T>();
    A* to = dhidden_t.template mutable_data_ptr<A>();
    parallel_tasks(blocks * tiles, [&](int64_t begin, int64_t end) {
      Scratch<A> sum(hidden_block * tile_tokens);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t h0 = task / tiles * hidden_block, t = chunk0 / tile_tokens + task % tiles;
        const int64_t lines = std::min(hidden_block, p.H - h0);
        const int64_t n0 = t * tile_tokens, width = p.tile_width(t), column = n0 - chunk0;
        const T* right = paired ? draw_pairs.template const_data_ptr<T>() + column * rows_pad
                                : draw_at(0, column);
        matmul_in_steps<T>(lines, width, K, left + h0 * rows_pad, rows_pad, step, right,
                           paired ? width : step, sum.data(), width);
        loops<A>().add_scaled(sum.data(), lines * width, A(1), to + n0 * p.H + h0 * width);
      }
    });
  }

  void bias_gradient(int64_t v0, int64_t rows) {
    const double* parts = bias_parts.template const_data_ptr<double>();
    std::vector<double> sums(rows, 0.0);
    for (int64_t t = 0; t < p.tiles(); ++t) {
      for (int64_t v = 0; v < rows; ++v) sums[v] += parts[t * rows_max + v];
    }
    const std::vector<A> rounded(sums.begin(), sums.end());
    write(out.dbias, v0, rounded.data(), rows);
  }

  void finish_hidden() {
    const A* from = dhidden_t.template const_data_ptr<A>();
    A* to = out.dhidden.template mutable_data_ptr<A>();
    at::parallel_for(0, p.tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
        transpose<A>(from + n0 * p.H, width, p.H, std::min(width, p.N - n0), to + n0 * p.H, p.H);
      }
    });
  }

  // n numbers into a contiguous gradient tensor, from element `offset` on.
  void write(const at::Tensor& tensor, int64_t offset, const A* from, int64_t n) const {
    if (tensor.scalar_type() == at::kBFloat16 && !out.accumulate && std::is_same_v<A, float>) {
      bfloat16_loops().narrow(reinterpret_cast<const float*>(from), n, bits(tensor) + offset);
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, tensor.scalar_type(), "linear_logprobs_backward", [&] {
          scalar_t* to = tensor.mutable_data_ptr<scalar_t>() + offset;
          if (out.accumulate) {
            for (int64_t i = 0; i < n; ++i) to[i] = scalar_t(A(to[i]) + from[i]);
          } else {
            for (int64_t i = 0; i < n; ++i) to[i] = scalar_t(from[i]);
          }
        });
  }
};

template <class T>
void backward(const Problem<T>& p, Upstream<Acc<T>> up, const StoredTiles<Acc<T>>* stored,
              Gradients& out, const Picks* picks, const Acc<T>* terms,
              const Teacher<Acc<T>>* teacher) {
  Pass<T>(p, up, stored, out, picks, terms, teacher).run();
}

template void backward(const Problem<c10::BFloat16>&, Upstream<float>, const StoredTiles<float>*,
                       Gradients&, const Picks*, const float*, const Teacher<float>*);
template void backward(const Problem<float>&, Upstream<float>, const StoredTiles<float>*,
                       Gradients&, const Picks*, const float*, const Teacher<float>*);
template void backward(const Problem<double>&, Upstream<double>, const StoredTiles<double>*,
                       Gradients&, const Picks*, const double*, const Teacher<double>*);

}  // namespace fused_rl
