// Log-probability, entropy, lse and top of each token from hidden states and the head.
//
//     z[v, n] = softcap(scale (weight[v] . hidden[n] + bias[v])) / temperature[n]
//     top[n]  = max_v z[v, n] - lse[n]
//
// A block of weight is multiplied with one tile of tokens after another; each tile of logits stays in
// the L2 cache, joins the softmax of its super-block and tokens and is forgotten. Those of the
// super-blocks are merged in order: the same bits on any number of threads. Traffic: reads NH + VH,
// writes 4N.
#include "asked.h"
#include "kept_exponentials.h"
#include "labels.h"
#include "problem.h"

namespace fused_rl {

// Into how many tasks for each thread a pass is cut at least, where it has as many tiles.
static constexpr int64_t tasks_of_thread = 4;

template <class T>
TokenStatistics<T> PartialSoftmax<T>::finish(const Problem<T>& p,
                                             const std::vector<Acc<T>>& at_label) const {
  using A = Acc<T>;
  TokenStatistics<T> out{std::vector<A>(p.N), std::vector<A>(p.N), std::vector<A>(p.N),
                         std::vector<A>(p.N), std::vector<double>(p.N), std::vector<double>(p.N)};
  for (int64_t n = 0; n < p.N; ++n) {
    A max = -std::numeric_limits<A>::infinity();
    for (int64_t s = 0; s < supers; ++s) max = std::max(max, *at(s, n).max);
    const bool empty = max == -std::numeric_limits<A>::infinity();
    double sum = 0, moment = 0;
    for (int64_t s = 0; s < supers; ++s) {
      const Running<A> part = at(s, n);
      // A super-block of nothing but -inf weighs nothing.
      const double shift = empty ? 0.0 : std::max(double(*part.max) - double(max), -1e4);
      const double factor = std::exp(shift);
      sum += factor * double(*part.sum);
      moment += factor * (double(*part.moment) + shift * double(*part.sum));
    }
    const Statistics<A> s = fused_rl::finish<A>(max, sum, moment, at_label[n]);
    out.logprobs[n] = s.logprob;
    out.entropy[n] = s.entropy;
    out.lse[n] = s.lse;
    out.top[n] = s.top;
    out.max[n] = max;
    out.log_sum[n] = s.log_sum;
  }
  return out;
}

// What a thread of the forward pass keeps between its tasks.
template <class T>
struct OfThread {
  explicit OfThread(const Problem<T>& p) : weight(p), tile(p.block * tile_tokens) {}
  WeightBlock<T> weight;
  Buffer<Acc<T>> tile;
  Acc<T> softmax[3 * tile_tokens];  // of a tile
};

template <class T>
TokenStatistics<T> forward(const Problem<T>& p, Acc<T>* stored, const Picks* picks,
                           Acc<T>* picked, Acc<T>* peaks, const KeptExponentials* kept,
                           AskedOf<T>* asked) {
  using A = Acc<T>;
  const int64_t supers = p.super_blocks(), blocks_of_super = p.super_rows() / p.block;
  // Few super-blocks, as with a small vocabulary, leave threads idle: then the tokens are cut as well.
  const int64_t groups = std::min(p.tiles(), (tasks_of_thread * members() + supers - 1) / supers);
  const PartialSoftmax<T> softmax(p);
  std::vector<A> at_label(p.padded, A(0));
  const HiddenPanels<T> hidden(p);
  std::vector<std::optional<OfThread<T>>> threads(members());

  parallel_tasks(supers * groups, [&](int64_t task, int64_t member) {
    auto& own = threads[member];
    if (!own) own.emplace(p);
    const int64_t s = task / groups, group = task % groups;
    const int64_t first = s * blocks_of_super, last = std::min(p.blocks(), first + blocks_of_super);
    for (int64_t b = first; b < last; ++b) {
      const int64_t v0 = b * p.block, rows = p.block_rows(b);
      const Left<T> weight = own->weight.at(v0, rows);
      for (int64_t t = p.tiles() * group / groups; t < p.tiles() * (group + 1) / groups; ++t) {
        const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
        A* z = stored ? stored + n0 * p.V + v0 * width : own->tile.data();
        logits_tile(p, weight, v0, rows, hidden, t, z, width);
        for (int64_t n = 0; n < width; ++n) {
          const int64_t line = p.labels[n0 + n] - v0;
          if (line >= 0 && line < rows) at_label[n0 + n] = z[line * width + n];
        }
        if (asked) asked->show(z, v0, rows, t, s, member);
        if (picks) {
          picks->each(b, t, [&](Picks::Pick i) {
            picked[i.pair] = z[i.line * width + i.column];
          });
        }
        if constexpr (std::is_same_v<T, c10::BFloat16>) {
          if (kept) {
            A* const of_tile = own->softmax;
            const Running<A> state{of_tile, of_tile + tile_tokens, of_tile + 2 * tile_tokens};
            bfloat16_loops().exponentials(z, rows, width, state, kept->tile(v0, t));
            std::copy_n(of_tile, width, kept->largest(b, n0));
            loops<A>().merge(state, width, softmax.at(s, n0));
            continue;
          }
        }
        A* const largest = peaks ? peaks + v0 / filter_rows * p.padded + n0 : nullptr;
        loops<A>().accumulate(z, rows, width, width, softmax.at(s, n0), largest);
      }
    }
  });
  if (kept) std::copy(at_label.begin(), at_label.end(), kept->at_labels());
  return softmax.finish(p, at_label);
}

template class PartialSoftmax<c10::BFloat16>;
template class PartialSoftmax<float>;
template class PartialSoftmax<double>;
template TokenStatistics<c10::BFloat16> forward(const Problem<c10::BFloat16>&, float*,
                                                const Picks*, float*, float*,
                                                const KeptExponentials*,
                                                AskedOf<c10::BFloat16>*);
template TokenStatistics<float> forward(const Problem<float>&, float*, const Picks*, float*,
                                        float*, const KeptExponentials*, AskedOf<float>*);
template TokenStatistics<double> forward(const Problem<double>&, double*, const Picks*, double*,
                                         double*, const KeptExponentials*, AskedOf<double>*);

}  // namespace fused_rl
