// The inner loops, once per instruction set; loops<T>() is the table for the CPU at hand.
//
// A tile is a block of logits with one vocabulary row per line and one token per column,
// z[v * ld + n], so that every reduction over the vocabulary runs down the lines and needs no
// horizontal sum. `columns` is a multiple of 16.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fused_rl {

// The numbers of reference.py.
enum Rounding : int { no_rounding, to_bfloat16, to_float16 };

// What turns a raw product hidden . weight into a logit:
//   z = softcap(scale * rounded(raw + bias[v])) / temperature[n]
//   softcap(x) = c tanh(x / c), or x if c = 0;   rounded(x): the nearest number of that dtype, or x
template <class T>
struct Transform {
  T scale;
  T softcap;
  int64_t rounding;  // one of Rounding
  bool identity;     // no bias, scale 1, no softcap, no rounding, every temperature 1
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
  // Adds the softmax of a tile. largest: null, or per column the largest logit of all tiles that were
  // given it.
  void (*accumulate)(const T* z, int64_t lines, int64_t columns, int64_t ld, Running<T>, T* largest);
  // z -> exp(z - reference) times the slope of the softcap, in place, and the softmax of the tile, which
  // is that of accumulate bit by bit. reference: per column, in nats, 16 k ln 2 at or above the largest
  // z, so that it is exact to go from one to another; that z itself where it is beyond 65536 or -inf.
  void (*exponentials)(T* z, int64_t lines, int64_t columns, int64_t ld, const T* inv_temperature,
                       Transform<T>, Running<T> tile, double* reference);
  // Adds a tile to sum = sum_v exp(2 (z - max)), max being the largest logit so far.
  void (*squares)(const T* z, int64_t lines, int64_t columns, int64_t ld, T* max, T* sum);
  // Adds the columns of a tile to sum.
  void (*column_sums)(const T* z, int64_t lines, int64_t columns, int64_t ld, T* sum);
  // The largest logit of each column of a tile.
  void (*largest)(const T* z, int64_t lines, int64_t columns, int64_t ld, T* max);
  // Adds the softmax of a tile that has been accumulated on its own.
  void (*merge)(Running<T> tile, int64_t columns, Running<T>);
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

// From the accumulators' type to that of the operands, T itself, or bf16 for float.
template <class T, class Out>
struct PackLoops {
  // A tile z[v, n] as a part of two left operands: one of lines v and products n, from (v0, n0) on, and
  // one of lines n and products v. Either may be null. The latter is filled with zeros to a whole group
  // of 32 products.
  void (*tile)(const T* z, int64_t lines, int64_t columns, int64_t ld, int64_t v0, int64_t n0,
               LeftTarget<Out> by_v, LeftTarget<Out> by_n);
  // Two lines (bf16) or one, which are lines of a right operand: columns 0 to 63, from which `columns`
  // are taken; the others become 0. odd: null for a line of zeros.
  void (*lines)(const Out* even, const Out* odd, int64_t columns, Layout, Out* to);
  // Lines n of 32 products (bf16) or 16 as a part of a right operand: 16 columns n, from which
  // `lines` are taken; the others become 0.
  void (*columns)(const Out* from, int64_t ld, int64_t lines, int64_t row, Out* to);
  // 16 lines, or the first `lines` of them, of 32 elements each, to lie one after the other.
  void (*rows)(const Out* from, int64_t ld, int64_t lines, Out* to);
};

struct BFloat16Loops {
  void (*narrow)(const float* from, int64_t n, uint16_t* to);
  // The softmax of a tile z[lines, columns], which is that of accumulate bit by bit, and of it
  // e = exp(z - max), max being the column's, in sixteen bits: the sign and the largest of a float's
  // exponent bits are 0 in e <= 1, so that nine of the mantissa are left, two more than bf16 has. What
  // is no number is no number in e either, but may be another.
  void (*exponentials)(const float* z, int64_t lines, int64_t columns, Running<float> tile,
                       uint16_t* e);
  // to[v, n] = factor[n] e[v, n]
  void (*scaled)(const uint16_t* e, int64_t lines, int64_t columns, const float* factor, float* to);
  // sum += factor * x
  void (*add_scaled)(const uint16_t* x, int64_t n, float factor, float* sum);
  double (*dot)(const uint16_t* x, const float* y, int64_t n);
};

template <class T>
const Loops<T>& loops();
template <class T, class Out>
const PackLoops<T, Out>& pack_loops();
const BFloat16Loops& bfloat16_loops();
const char* instruction_set();

}  // namespace fused_rl
