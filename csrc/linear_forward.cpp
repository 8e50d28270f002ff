// Log-probability, entropy, lse and top of each token from hidden states and the head.
//
//     z[v, n] = softcap(scale (weight[v] . hidden[n] + bias[v])) / temperature[n]
//     top[n]  = max_v z[v, n] - lse[n]
//
// A block of weight is multiplied where it lies with one tile of tokens after another; each tile of
// logits stays in the L2 cache, joins the running softmax of its tokens and is forgotten. The
// vocabulary is cut into slabs, as many for one thread as for sixty-four, and the slabs are merged
// in order: the same bits on any number of threads. Traffic: reads NH + VH, writes 4N.
#include "labels.h"
#include "problem.h"

namespace fused_rl {

static constexpr int64_t max_slabs = 64;

template <class T>
TokenStatistics<T> forward(const Problem<T>& p, Acc<T>* stored, const Picks* picks,
                           Acc<T>* picked, Acc<T>* peaks) {
  using A = Acc<T>;
  // Blocks that share a row of peaks stay in one slab.
  const int64_t together = peaks ? filter_rows / p.block : 1;
  const int64_t units = (p.blocks() + together - 1) / together;
  const int64_t slabs = std::min(max_slabs, units);
  // Few slabs, as with a small vocabulary, leave threads idle: then the tokens are cut as well.
  const int64_t groups = std::min(p.tiles(), (max_slabs + slabs - 1) / slabs);
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
  at::Tensor running = at::zeros({slabs, 3, p.padded}, options);
  running.select(1, 0).fill_(-std::numeric_limits<A>::infinity());
  A* state = running.template mutable_data_ptr<A>();
  std::vector<A> at_label(p.padded, A(0));
  const at::Tensor packed = pack_for_logits(p);
  const T* operand = packed.template const_data_ptr<T>();

  parallel_tasks(slabs * groups, [&](int64_t begin, int64_t end) {
    at::Tensor buffer;
    Scratch<A> tile(p.block * tile_tokens);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slab = task / groups, group = task % groups;
      A* max = state + slab * 3 * p.padded;
      const int64_t end_block = std::min(p.blocks(), units * (slab + 1) / slabs * together);
      for (int64_t b = units * slab / slabs * together; b < end_block; ++b) {
        const int64_t v0 = b * p.block, rows = p.block_rows(b);
        const Block<T> weight = weight_block(p, v0, rows, buffer);
        for (int64_t t = p.tiles() * group / groups; t < p.tiles() * (group + 1) / groups; ++t) {
          const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
          A* z = stored ? stored + n0 * p.V + v0 * width : tile.data();
          logits_tile(p, weight, v0, rows, operand, t, z, width);
          loops<A>().accumulate(z, rows, width, width,
                                {max + n0, max + p.padded + n0, max + 2 * p.padded + n0},
                                peaks ? peaks + b / together * p.padded + n0 : nullptr);
          for (int64_t n = 0; n < width; ++n) {
            const int64_t line = p.labels[n0 + n] - v0;
            if (line >= 0 && line < rows) at_label[n0 + n] = z[line * width + n];
          }
          if (picks) {
            picks->each(b, t, [&](Picks::Pick i) {
              picked[i.pair] = z[i.line * width + i.column];
            });
          }
        }
      }
    }
  });

  TokenStatistics<T> out{std::vector<A>(p.N), std::vector<A>(p.N), std::vector<A>(p.N),
                         std::vector<A>(p.N), std::vector<double>(p.N), std::vector<double>(p.N)};
  for (int64_t n = 0; n < p.N; ++n) {
    A max = -std::numeric_limits<A>::infinity();
    for (int64_t s = 0; s < slabs; ++s) max = std::max(max, state[s * 3 * p.padded + n]);
    const bool empty = max == -std::numeric_limits<A>::infinity();
    double sum = 0, moment = 0;
    for (int64_t s = 0; s < slabs; ++s) {
      const A* slab = state + s * 3 * p.padded + n;
      // A slab of nothing but -inf weighs nothing.
      const double shift = empty ? 0.0 : std::max(double(slab[0]) - double(max), -1e4);
      const double factor = std::exp(shift);
      sum += factor * double(slab[p.padded]);
      moment += factor * (double(slab[2 * p.padded]) + shift * double(slab[p.padded]));
    }
    const Statistics<A> s = finish<A>(max, sum, moment, at_label[n]);
    out.logprobs[n] = s.logprob;
    out.entropy[n] = s.entropy;
    out.lse[n] = s.lse;
    out.top[n] = s.top;
    out.max[n] = max;
    out.log_sum[n] = s.log_sum;
  }
  return out;
}

template TokenStatistics<c10::BFloat16> forward(const Problem<c10::BFloat16>&, float*,
                                                const Picks*, float*, float*);
template TokenStatistics<float> forward(const Problem<float>&, float*, const Picks*, float*,
                                        float*);
template TokenStatistics<double> forward(const Problem<double>&, double*, const Picks*, double*,
                                         double*);

}  // namespace fused_rl
