// dhidden, dweight and dbias from dlogprobs and dentropy.
//
//     dz[v, n]   = dlogprobs[n] (1[v = label] - p) - dentropy[n] p (log p + entropy[n])
//     draw[v, n] = dz softcap'(.) scale / temperature[n]
//     dweight    = draw hidden        dhidden = draw^T weight        dbias[v] = sum_n draw[v, n]
//
// From logits that are formed again or stored, or from their exponentials (kept_exponentials.h);
// super_blocks.h has the walk.
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "kept_exponentials.h"
#include "super_blocks.h"

namespace fused_rl {

template <class T>
class Pass : public SuperBlocks<T> {
 public:
  using Walk = SuperBlocks<T>;
  using typename Walk::A;
  using typename Walk::OfThread;
  using typename Walk::Step;

  Pass(const Problem<T>& problem, Upstream<A> upstream, const StoredTiles<A>* stored,
       const ExponentialsOf* exponentials, Gradients& gradients, const Picks* chosen = nullptr,
       const A* chosen_terms = nullptr, const Teacher<A>* other = nullptr)
      : Walk(problem, {gradients.dhidden.defined(), gradients.weight_columns(),
                       gradients.dbias.defined(), !stored && !exponentials}),
        up(upstream),
        stored(stored),
        kept(exponentials),
        out(gradients),
        picks(chosen),
        terms(chosen_terms),
        teacher(other) {
    if (!out.dbias.defined()) return;
    for (auto& parts : bias_parts) parts = Buffer<double>(p.tiles() * p.super_rows());
  }
  void run() {
    this->walk();
    if (!out.dhidden.defined()) return;
    at::parallel_for(0, p.N, 64, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        this->each_panel(n, [&](int64_t h0, int64_t columns, const A* sums) {
          write_row(sums, columns, out.dhidden, n * p.H + h0);
        });
      }
    });
  }

 private:
  using Walk::p;
  Upstream<A> up;
  const StoredTiles<A>* stored;
  const ExponentialsOf* kept;
  Gradients& out;
  const Picks* picks;
  const A* terms;
  const Teacher<A>* teacher;
  std::array<Buffer<double>, 3> bias_parts;  // [tiles, rows], by super-block

  Buffer<double>& parts_of(const Step& step) { return bias_parts[step.super_block % 3]; }

  void tile(const Step& step, int64_t first, int64_t count, int64_t t, OfThread& own) override {
    A* const target = own.tile.data();
    if (!kept) of_logits(step, first, count, t, own);
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      if (kept) of_exponentials(step.v0 + first, count, t, own);
    }
    if (out.dbias.defined()) {
      loops<A>().line_sums(target, count, p.tile_width(t), p.tile_width(t),
                           parts_of(step).data() + t * p.super_rows() + first);
    }
    this->put(step, target, first, count, t, p.tile_width(t));
  }

  // The draw of one tile, of logits or of exponentials.
  void of_logits(const Step& step, int64_t first, int64_t count, int64_t t, OfThread& own) {
    const int64_t v0 = step.v0 + first;
    A* const target = own.tile.data();
    const A *z = target, *zt = nullptr;
    if (stored) {
      z = stored->tile(v0, count, t, target, nullptr);
    } else {
      this->form_logits(step, first, count, t, target);
    }
    if (teacher) {
      auto& cache = own.of_other;
      if (!cache) cache = teacher->logits.cache();
      zt = teacher->logits.tile(v0, count, t, own.other.data(), cache.get());
    }
    gradient(z, zt, target, v0, count, t);
  }

  void of_exponentials(int64_t v0, int64_t rows, int64_t t, OfThread& own) {
    A* const target = own.tile.data();
    uint16_t* const scratch = reinterpret_cast<uint16_t*>(own.other.data());  // of chosen tokens
    const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
    const KeptExponentials& from = kept->kept;
    const bool all = kept->rows.empty();
    const auto of_chunk = [&](int64_t n) { return all ? n0 + n : kept->rows[n0 + n]; };
    const auto lse = [&](int64_t n) { return double(up.lse[n0 + n]) + double(up.lse_low[n0 + n]); };
    const auto slope = [&](int64_t n) {
      return double(p.transform.scale) * up.inv_temperature[n0 + n] * up.dlogprobs[n0 + n];
    };
    const int64_t real = std::min(width, p.N - n0);
    A factor[tile_tokens] = {};
    for (int64_t n = 0; n < real; ++n) {
      const double largest = *from.largest(v0 / p.block, of_chunk(n));
      factor[n] = A(-slope(n) * std::exp(largest - lse(n)));
    }
    if (!all) from.gather(v0, rows, kept->rows.data() + n0, real, width, scratch);
    bfloat16_loops().scaled(all ? from.tile(v0, t) : scratch, rows, width, factor, target);
    without_gradient(target, rows, t);
    for (int64_t n = 0; n < real; ++n) {
      const int64_t line = p.labels[n0 + n] - v0;
      if (line < 0 || line >= rows || up.dlogprobs[n0 + n] == A(0)) continue;
      const double logprob = double(from.at_labels()[of_chunk(n)]) - lse(n);
      target[line * width + n] = A(-slope(n) * std::expm1(logprob));
    }
  }

  // Tokens without an upstream gradient, and what pads them, count for nothing, not even as a NaN: a
  // hidden state of 0 has one for a logit where a weight is infinite.
  void without_gradient(A* target, int64_t rows, int64_t t) const {
    const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
    for (int64_t n = 0; n < width; ++n) {
      const int64_t i = n0 + n;
      if (i < p.N && (teacher || up.dlogprobs[i] != A(0) || up.dentropy[i] != A(0))) continue;
      for (int64_t v = 0; v < rows; ++v) target[v * width + n] = A(0);
    }
  }

  // z -> draw for one tile, with the label's own term.
  void gradient(const A* z, const A* zt, A* target, int64_t v0, int64_t rows, int64_t t) {
    const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
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
                              target, width);
    } else {
      loops<A>().gradient(z, rows, width, width, here, p.transform, target, width);
    }
    without_gradient(target, rows, t);
    for (int64_t n = 0; n < width; ++n) {
      const int64_t line = p.labels[n0 + n] - v0;
      if (line < 0 || line >= rows || up.dlogprobs[n0 + n] == A(0)) continue;
      target[line * width + n] += label_term[n];
    }
    if (picks) {
      picks->each(v0 / p.block, t, [&](Picks::Pick i) {
        target[i.line * width + i.column] += terms[i.pair];
      });
    }
  }

  void write_weight(int64_t v0, const A* from, int64_t rows, int64_t h0, int64_t columns) override {
    for (int64_t v = 0; v < rows; ++v) {
      const int64_t at = (v0 + v) * out.weight_columns() + h0;
      write_row(from + v * panel_columns, columns, out.dweight, at, out.accumulate);
    }
  }

  void bias(const Step& step) override {
    const double* parts = parts_of(step).data();
    std::vector<double> sums(step.rows, 0.0);
    for (int64_t t = 0; t < p.tiles(); ++t) {
      for (int64_t v = 0; v < step.rows; ++v) sums[v] += parts[t * p.super_rows() + v];
    }
    const std::vector<A> rounded(sums.begin(), sums.end());
    write_row(rounded.data(), step.rows, out.dbias, step.v0, out.accumulate);
  }
};

template <class T>
void backward(const Problem<T>& p, Upstream<Acc<T>> up, const StoredTiles<Acc<T>>* stored,
              Gradients& out, const Picks* picks, const Acc<T>* terms,
              const Teacher<Acc<T>>* teacher) {
  Pass<T>(p, up, stored, nullptr, out, picks, terms, teacher).run();
}

void backward(const Problem<c10::BFloat16>& p, Upstream<float> up, const ExponentialsOf& chunk,
              Gradients& out) {
  Pass<c10::BFloat16>(p, up, nullptr, &chunk, out).run();
}

template void backward(const Problem<c10::BFloat16>&, Upstream<float>, const StoredTiles<float>*,
                       Gradients&, const Picks*, const float*, const Teacher<float>*);
template void backward(const Problem<float>&, Upstream<float>, const StoredTiles<float>*,
                       Gradients&, const Picks*, const float*, const Teacher<float>*);
template void backward(const Problem<double>&, Upstream<double>, const StoredTiles<double>*,
                       Gradients&, const Picks*, const double*, const Teacher<double>*);

}  // namespace fused_rl
