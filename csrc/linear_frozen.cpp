// Log-probabilities of a head that is not trained, and the gradient of each with respect to its hidden
// state, in one walk over the vocabulary: 4 NHV, one exp per logit, and no [N, V] buffer.
//
//     unit[n] = d logprobs[n] / d hidden[n]
//             = slope(label) (1 - p[label]) weight[label] - sum_{v != label} slope(v) p[n, v] weight[v]
//     slope(v) = softcap'(z[n, v]) scale / temperature[n]
//
// The sum is over e = exp(z - r), in bf16 where weight is, with a reference r for each super-block and
// token at or above its largest logit: a multiple of 16 ln 2, so that to go from one reference to another
// is to multiply by a power of two, exactly, and sums of several references add up as if they had had
// one. The label is left out of the sum: where p[label] is near 1, p - 1 would be lost in the rounding
// of p.
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "asked.h"
#include "labels.h"
#include "pairs.h"
#include "super_blocks.h"
#include "tokens.h"

namespace fused_rl {

template <class T>
class FrozenPass : public SuperBlocks<T> {
 public:
  using Walk = SuperBlocks<T>;
  using typename Walk::A;
  using typename Walk::OfThread;
  using typename Walk::Step;

  // The parts that `asked` has: one for each super-block, and one for each block of three.
  static int64_t parts(const Problem<T>& p) {
    return p.super_blocks() + 3 * (p.super_rows() / p.block);
  }

  FrozenPass(const Problem<T>& problem, AskedOf<T>* what)
      : Walk(problem, {true, 0, false, true}),
        asked(what),
        softmax(problem),
        at_label(p.padded, A(0)),
        blocks_of_super(p.super_rows() / p.block),
        tile_states(3 * blocks_of_super * 3 * p.padded),
        tile_references(3 * blocks_of_super * p.padded),
        references(3 * p.padded),
        running(2 * p.padded) {}

  // unit: [N, H], the tokens of the problem, contiguous, in any floating dtype.
  TokenStatistics<T> run(const at::Tensor& unit) {
    this->walk();
    const TokenStatistics<T> s = softmax.finish(p, at_label);
    const at::Tensor weight = p.weight;
    at::parallel_for(0, p.N, 16, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::vector<A> line(p.H);
      for (int64_t n = begin; n < end; ++n) finish(s, n, line.data(), unit);
    });
    return s;
  }

 private:
  using Walk::p;
  AskedOf<T>* const asked;  // null, or what is shown every tile
  static constexpr double lowest = -std::numeric_limits<double>::infinity();
  PartialSoftmax<T> softmax;
  std::vector<A> at_label;
  int64_t blocks_of_super;
  Buffer<A> tile_states;           // [slot, block of the super-block, max | sum | moment, padded]
  Buffer<double> tile_references;  // [slot, block of the super-block, padded]
  Buffer<double> references;       // [super-block % 3, padded]: that of its draws
  Buffer<double> running;          // [super-block % 2, padded]: that of the sums after it

  Running<A> state(const Step& step, int64_t block, int64_t n) const {
    A* const at = tile_states.data() + ((step.slot * blocks_of_super + block) * 3) * p.padded + n;
    return {at, at + p.padded, at + 2 * p.padded};
  }
  double* tile_reference(const Step& step, int64_t block) const {
    return tile_references.data() + (step.slot * blocks_of_super + block) * p.padded;
  }
  int64_t part(const Step& step, int64_t block) const {
    return p.super_blocks() + step.slot * blocks_of_super + block;
  }
  double* reference(int64_t super_block) const {
    return references.data() + super_block % 3 * p.padded;
  }
  double* running_reference(int64_t super_block) const {
    return running.data() + super_block % 2 * p.padded;
  }

  void tile(const Step& step, int64_t first, int64_t count, int64_t t, OfThread& own) override {
    const int64_t n0 = t * tile_tokens, width = p.tile_width(t), block = first / p.block;
    A* const z = own.tile.data();
    this->form_logits(step, first, count, t, z);
    const int64_t v0 = step.v0 + first;
    for (int64_t n = 0; n < width; ++n) {
      const int64_t line = p.labels[n0 + n] - v0;
      if (line >= 0 && line < count) at_label[n0 + n] = z[line * width + n];
    }
    if (asked) asked->show(z, v0, count, t, part(step, block), own.member);
    loops<A>().exponentials(z, count, width, width, p.inv_temperature.data() + n0, p.transform,
                            state(step, block, n0), tile_reference(step, block) + n0);
    for (int64_t n = 0; n < width; ++n) {
      const int64_t line = p.labels[n0 + n] - v0;
      if (line >= 0 && line < count) z[line * width + n] = A(0);
    }
    this->put(step, z, first, count, t, width);
  }

  // One reference for the blocks of a super-block, and their softmax.
  void tile_done(const Step& step, int64_t t) override {
    const int64_t n0 = t * tile_tokens, width = p.tile_width(t);
    const int64_t blocks = (step.rows + p.block - 1) / p.block;
    if (asked) asked->gather(step.super_block, part(step, 0), blocks, t);
    for (int64_t b = 0; b < blocks; ++b) {
      loops<A>().merge(state(step, b, n0), width, softmax.at(step.super_block, n0));
    }
    for (int64_t n = n0; n < n0 + width; ++n) {
      double largest = lowest;
      for (int64_t b = 0; b < blocks; ++b) {
        largest = std::max(largest, tile_reference(step, b)[n]);
      }
      reference(step.super_block)[n] = largest;
      for (int64_t b = 0; b < blocks; ++b) {
        const double own = tile_reference(step, b)[n];
        if (own == largest || own == lowest) continue;
        const int64_t first = b * p.block;
        this->rescale_draw(step, first, std::min(p.block, step.rows - first), n, power(own - largest));
      }
    }
  }

  // exp of a difference of references.
  static A power(double difference) {
    const double bits = difference / std::log(2.0), whole = std::nearbyint(bits);
    if (std::abs(bits - whole) < 1e-6) return std::ldexp(A(1), int(std::max(whole, -4096.0)));
    return A(std::exp(difference));
  }

  void add_hidden(const Step& step, const A* part, A* sums, int64_t n0, int64_t tokens,
                  int64_t j) override {
    const int64_t s = step.super_block;
    int64_t added = 0;  // lines that are in the sums; those from there to n have a factor of 1
    const auto add = [&](int64_t n, A factor, int64_t lines) {
      const int64_t at = added * panel_columns;
      loops<A>().add_scaled(part + at, lines * panel_columns, factor, sums + at);
      added = n;
    };
    for (int64_t n = 0; n < tokens; ++n) {
      const double own = reference(s)[n0 + n];
      const double before = s > 0 ? running_reference(s - 1)[n0 + n] : lowest;
      const double now = std::max(own, before);
      if (j == 0) running_reference(s)[n0 + n] = now;
      if (own == now && (before == now || before == lowest)) continue;
      add(n, A(1), n - added);
      A* const line = sums + n * panel_columns;
      const A factor = before == lowest ? A(1) : power(before - now);
      for (int64_t h = 0; h < panel_columns; ++h) line[h] *= factor;
      add(n + 1, own == lowest ? A(0) : power(own - now), 1);
    }
    add(tokens, A(1), tokens - added);
  }

  // sums -> unit of one token; `line` has room for a row of weight.
  void finish(const TokenStatistics<T>& s, int64_t n, A* line, const at::Tensor& unit) const {
    const double last = running_reference(p.super_blocks() - 1)[n];
    const double slope = double(p.transform.scale) * double(p.inv_temperature[n]);
    // exp(z) / sum_v exp(z) = e * of_sum, in steps that lose no digits of a large lse.
    const double of_sum = std::exp((last - double(s.max[n])) - s.log_sum[n]);
    const A of_label = A(-std::expm1(double(s.logprobs[n]))) *
                       raw_gradient(A(1), at_label[n], p.inv_temperature[n], p.transform);
    const A factor = A(-slope * of_sum);
    const A* const row = row_in(p.weight, p.labels[n], line);
    this->each_panel(n, [&](int64_t h0, int64_t columns, const A* sums) {
      A part[panel_columns];
      for (int64_t h = 0; h < columns; ++h) part[h] = of_label * row[h0 + h] + factor * sums[h];
      write_row(part, columns, unit, n * p.H + h0);
    });
  }
};

// The statistics of the tokens `active`, and the unit of all.
template <class T>
static std::pair<TokenStatistics<T>, at::Tensor> frozen(const Problem<T>& p,
                                                        const std::vector<int64_t>& active,
                                                        const at::Tensor& hidden,
                                                        AskedOf<T>* asked = nullptr) {
  const at::Tensor unit = at::empty({p.N, p.H}, hidden.options());
  TokenStatistics<T> s;
  if (p.N) s = FrozenPass<T>(p, asked).run(unit);
  return {std::move(s), place_rows(unit, active, hidden, hidden.scalar_type())};
}

static Tensors5 linear_logprobs_frozen(const at::Tensor& hidden, const at::Tensor& weight,
                                       const Bias& bias, const at::Tensor& labels,
                                       const at::Tensor& temperature, double scale, double softcap,
                                       int64_t rounding, int64_t ignore_index,
                                       int64_t /*chunk_bytes*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors5 {
    using T = decltype(zero);
    const int64_t N = y.numel();
    const auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, rounding,
                                   active);
    const auto [s, unit] = frozen<T>(p, active, hidden);
    return {scatter(s.logprobs, active, N), scatter(s.entropy, active, N),
            scatter(s.lse, active, N), scatter(s.top, active, N), unit};
  });
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                  at::Tensor>
linear_statistics_frozen(const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias,
                         const at::Tensor& labels, const at::Tensor& temperature, double scale,
                         double softcap, int64_t rounding, bool collision, bool mean_logit,
                         int64_t top, int64_t ignore_index, int64_t /*chunk_bytes*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  return with_compute_type(hidden, weight, [&](auto zero) {
    using T = decltype(zero);
    const int64_t N = y.numel();
    const auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, rounding,
                                   active);
    AskedOf<T> asked(p, {collision, mean_logit, top}, FrozenPass<T>::parts(p));
    const auto [s, unit] = frozen<T>(p, active, hidden, &asked);
    return std::tuple_cat(Tensors3{scatter(s.logprobs, active, N), scatter(s.entropy, active, N),
                                   scatter(s.lse, active, N)},
                          asked.finish(s, active, N), std::tuple(unit));
  });
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("linear_logprobs_frozen", &linear_logprobs_frozen);
  m.impl("linear_statistics_frozen", &linear_statistics_frozen);
}

}  // namespace fused_rl
