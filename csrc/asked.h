// More numbers per token out of a pass over the vocabulary, where they are asked for.
//
//     collision[n]  = sum_v p[n, v]^2
//     mean_logit[n] = 1/V sum_v z[n, v]
//     top_ids[n]    = the entries with the largest logits, from the largest on, and of ties the first
//
// A pass shows each tile of logits once, while the tile is in the L2 cache.
#pragma once

#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "labels.h"
#include "problem.h"
#include "tokens.h"

namespace fused_rl {

struct Asked {
  bool collision, mean_logit;
  int64_t top;  // entries
};

template <class T>
class AskedOf {
 public:
  using A = Acc<T>;

  // parts: of the vocabulary; tiles of one part and the same tokens are shown in order, by one thread
  // after another. members: threads.
  AskedOf(const Problem<T>& problem, Asked what, int64_t parts)
      : p(problem), asked(what), parts(parts), best(members()) {
    const A none = -std::numeric_limits<A>::infinity();
    if (asked.collision) {
      largest = filled(none);
      squares = filled(A(0));
    }
    if (asked.mean_logit) totals = filled(A(0));
  }

  // z[rows, width] of the vocabulary rows from v0 and the tokens of tile t.
  void show(const A* z, int64_t v0, int64_t rows, int64_t t, int64_t part, int64_t member) {
    const int64_t n0 = t * tile_tokens, width = p.tile_width(t), at = part * p.padded + n0;
    if (asked.collision) {
      loops<A>().squares(z, rows, width, width, largest.data() + at, squares.data() + at);
    }
    if (asked.mean_logit) loops<A>().column_sums(z, rows, width, width, totals.data() + at);
    if (asked.top) look_for_best(z, v0, rows, n0, width, member);
  }

  // What was shown as the parts from `first` on, in their order, becomes the part `to`; they are as new.
  void gather(int64_t to, int64_t first, int64_t count, int64_t t) {
    const int64_t n0 = t * tile_tokens, n1 = n0 + p.tile_width(t);
    for (int64_t i = first; i < first + count; ++i) {
      for (int64_t n = n0; n < n1; ++n) {
        const int64_t from = i * p.padded + n, at = to * p.padded + n;
        if (asked.collision) {
          const A now = std::max(largest[from], largest[at]);
          squares[at] = scaled_to(now, at) + scaled_to(now, from);
          largest[at] = now;
          largest[from] = -std::numeric_limits<A>::infinity();
          squares[from] = A(0);
        }
        if (asked.mean_logit) totals[at] += std::exchange(totals[from], A(0));
      }
    }
  }

  // collision, mean_logit, top_ids, top_logprobs of the tokens `rows` among N; zeros elsewhere, and
  // nothing of what was not asked for.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> finish(
      const TokenStatistics<T>& s, const std::vector<int64_t>& rows, int64_t N) const {
    const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    const at::Tensor collision = at::zeros({asked.collision ? N : 0}, options);
    const at::Tensor mean_logit = at::zeros({asked.mean_logit ? N : 0}, options);
    const at::Tensor ids = at::zeros({N, asked.top}, at::kLong);
    const at::Tensor logprobs = at::zeros({N, asked.top}, options);
    for (int64_t n = 0; n < p.N; ++n) {
      if (asked.collision) collision.mutable_data_ptr<A>()[rows[n]] = collision_of(n, s);
      if (asked.mean_logit) mean_logit.mutable_data_ptr<A>()[rows[n]] = mean_of(n);
    }
    if (asked.top) {
      at::parallel_for(0, p.N, 64, [&](int64_t begin, int64_t end) {
        std::vector<Entry> all;
        for (int64_t n = begin; n < end; ++n) {
          best_of(n, all);
          for (int64_t k = 0; k < asked.top; ++k) {
            const int64_t to = rows[n] * asked.top + k;
            // Of logits that are no numbers fewer may have been found.
            ids.mutable_data_ptr<int64_t>()[to] = std::min(all[k].id, p.V - 1);
            logprobs.mutable_data_ptr<A>()[to] =
                log_probability<A>(all[k].z, s.max[n], s.log_sum[n]);
          }
        }
      });
    }
    return {collision, mean_logit, ids, logprobs};
  }

 private:
  struct Entry {
    A z;
    int64_t id;
    bool operator<(const Entry& other) const {
      return z > other.z || (z == other.z && id < other.id);
    }
  };
  // Rows of which the largest logit is found before each is looked at.
  static constexpr int64_t looked_at = 64;

  const Problem<T>& p;
  const Asked asked;
  const int64_t parts;
  std::vector<A> largest, squares, totals;  // [parts, padded]
  std::vector<std::vector<Entry>> best;     // of each thread [N, top], in order

  std::vector<A> filled(A value) const { return std::vector<A>(parts * p.padded, value); }

  // The sum of squares of a part, seen from a larger logit.
  A scaled_to(A now, int64_t at) const {
    if (largest[at] == now) return squares[at];
    return std::exp(2 * (largest[at] - now)) * squares[at];
  }

  void look_for_best(const A* z, int64_t v0, int64_t rows, int64_t n0, int64_t width,
                     int64_t member) {
    std::vector<Entry>& found = best[member];
    if (found.empty()) {
      found.assign(p.N * asked.top, {-std::numeric_limits<A>::infinity(), p.V});
    }
    A peaks[tile_tokens];
    for (int64_t first = 0; first < rows; first += looked_at) {
      const int64_t last = std::min(rows, first + looked_at);
      loops<A>().largest(z + first * width, last - first, width, width, peaks);
      for (int64_t n = 0; n < std::min(width, p.N - n0); ++n) {
        Entry* const of_token = found.data() + (n0 + n) * asked.top;
        Entry& least = of_token[asked.top - 1];
        // Ties too: of two threads' entries the first of the vocabulary counts.
        if (!(peaks[n] >= least.z)) continue;
        for (int64_t line = first; line < last; ++line) {
          const Entry entry{z[line * width + n], v0 + line};
          if (!(entry < least)) continue;
          Entry* to = &least;
          for (; to > of_token && entry < to[-1]; --to) *to = to[-1];
          *to = entry;
        }
      }
    }
  }

  void best_of(int64_t n, std::vector<Entry>& all) const {
    all.clear();
    for (const auto& found : best) {
      if (found.empty()) continue;
      all.insert(all.end(), found.begin() + n * asked.top, found.begin() + (n + 1) * asked.top);
    }
    std::partial_sort(all.begin(), all.begin() + asked.top, all.end());
  }

  A collision_of(int64_t n, const TokenStatistics<T>& s) const {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) {
      const double shift = double(largest[i * p.padded + n]) - double(s.max[n]);
      // A part of nothing but -inf weighs nothing.
      sum += std::exp(2 * std::max(shift, -1e4)) * double(squares[i * p.padded + n]);
    }
    return A(sum * std::exp(-2 * s.log_sum[n]));
  }

  A mean_of(int64_t n) const {
    double sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += double(totals[i * p.padded + n]);
    return A(sum / double(p.V));
  }
};

}  // namespace fused_rl
