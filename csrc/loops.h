// The inner loops, once per instruction set; loops<T>() is the table for the CPU at hand.
//
// A tile is a block of logits with one vocabulary row per line and one token per column,
// z[v * ld + n], so that every reduction over the vocabulary runs down the lines and needs no
// horizontal sum. `columns` is a multiple of 16.
#pragma once

#include <cstdint>

namespace fused_rl {

// What turns a raw product hidden . weight into a logit:
//   z = softcap(scale * (raw + bias[v])) / temperature[n],   softcap(x) = c tanh(x / c), or x if c = 0
template <class T>
struct Transform {
  T scale;
  T softcap;
  bool identity;  // no bias, scale 1, no softcap, every temperature 1
};

// The running softmax of one token: p is relative to the maximum so far.
//   sum = sum_v exp(z - max),   moment = sum_v exp(z - max) (z - max)
template <class T>
struct Running {
  T* max;
  T* sum;
  T* moment;
};

// What the gradient of a logit needs, per token.
template <class T>
struct Upstream {
  const T* lse;      // rounded to T,
  const T* lse_low;  // and what that left over
  const T* entropy;
  const T* dlogprobs;
  const T* dentropy;
  const T* inv_temperature;
  bool has_dentropy;
};

// The numbers of reference.py.
enum Kind : int { reverse_kl = 1, forward_kl, jensen_shannon, alpha_divergence, total_variation };
// In nats: what an infinite log-ratio counts for in a gradient, and where its exponents are held.
inline constexpr double infinite_log_ratio = 100, largest_exponent = 80;

struct Measure {
  int64_t kind;
  double parameter, factor;
};

// What the log-probabilities of two heads' logits, and their difference, are formed with, per token.
template <class T>
struct TwoLse {
  const T *lse, *lse_low, *teacher_lse, *teacher_lse_low;
  const T *gap, *gap_low;  // lse - teacher_lse, rounded to T, and what that left over
};

template <class T>
struct Loops {
  // raw -> z in place. bias: one per line, or null.
  void (*transform)(T* z, int64_t lines, int64_t columns, int64_t ld, const T* bias,
                    const T* inv_temperature, Transform<T>);
  // largest: null, or per column the largest logit of all tiles that were given it.
  void (*accumulate)(const T* z, int64_t lines, int64_t columns, int64_t ld, Running<T>, T* largest);
  // z -> draw, without the label's own term; may write where it reads.
  void (*gradient)(const T* z, int64_t lines, int64_t columns, int64_t ld, Upstream<T>,
                   Transform<T>, T* draw, int64_t ld_draw);
  // sums[v] = sum_n z[v, n]
  void (*line_sums)(const T* z, int64_t lines, int64_t columns, int64_t ld, double* sums);
  // A row of V logits, contiguous: its statistics and its gradient (without the label's own term).
  void (*row_statistics)(const T* logits, int64_t V, T temperature, T* max, T* sum, T* moment);
  void (*row_gradient)(const T* logits, int64_t V, T temperature, T lse, T lse_low, T entropy,
                       T dlogprob, T dentropy, T* dlogits);
  // k1, k2, k3, abs of d: value and derivative.
  void (*kl)(const T* d, int64_t n, int64_t value_kind, int64_t slope_kind, T* value, T* slope);
  // sum += factor * x
  void (*add_scaled)(const T* x, int64_t n, T factor, T* sum);
  double (*dot)(const T* x, const T* y, int64_t n);
  // Adds the terms of a divergence, and each side's slopes, of the logits z and zt of two heads.
  void (*two_sums)(const T* z, const T* zt, int64_t lines, int64_t columns, int64_t ld, TwoLse<T>,
                   Measure, double* total, double* g, double* teacher);
  // z, zt -> draw of the student, without the label's own term; may write where it reads.
  void (*two_gradient)(const T* z, const T* zt, int64_t lines, int64_t columns, int64_t ld,
                       TwoLse<T>, Measure, const T* ddivergence, const T* slope, Upstream<T>,
                       Transform<T>, T* draw, int64_t ld_draw);
};

// fp32 to bf16, and the two layouts of a bf16 tile that the products of the backward pass read.
struct BFloat16Loops {
  // rows[v * ld_rows + n] = tile;  pairs[(v / 2) * 2 * ld_pairs + 2 * n + (v & 1)] = tile.
  // Either may be null.
  void (*pack)(const float* tile, int64_t lines, int64_t columns, int64_t ld, uint16_t* rows,
               int64_t ld_rows, uint16_t* pairs, int64_t ld_pairs);
  void (*narrow)(const float* from, int64_t n, uint16_t* to);
  // sum += factor * x
  void (*add_scaled)(const uint16_t* x, int64_t n, float factor, float* sum);
  double (*dot)(const uint16_t* x, const float* y, int64_t n);
};

template <class T>
const Loops<T>& loops();
const BFloat16Loops& bfloat16_loops();
const char* instruction_set();

}  // namespace fused_rl
