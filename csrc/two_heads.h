// What the operators of two heads share: both sides in kernel layout, their statistics, and what a
// pass over the student's gradients takes.
#pragma once

#include <vector>

#include "labels.h"
#include "problem.h"
#include "tokens.h"

namespace fused_rl {

// Lines that are read of both sides before the next tile is: both stay in the first-level cache.
inline constexpr int64_t lines_at_once = 64;
inline constexpr int64_t most_slabs = 64;
// What is stored at once where the buffer is used again: for so many tokens, and in so many bytes,
// reading the heads again costs little beside the products.
inline constexpr int64_t tokens_at_once = 512, bytes_at_once = 160 << 20;

// One side, as an operator is given it.
struct Side {
  const at::Tensor& hidden;
  const at::Tensor& weight;
  const Bias& bias;
  const at::Tensor& temperature;
  double scale, softcap;
  int64_t rounding;

  template <class T>
  Problem<T> problem(const at::Tensor& labels, const std::vector<int64_t>& rows) const {
    return make_problem<T>(hidden, weight, bias, labels, temperature, scale, softcap, rounding,
                           rows);
  }
};

// f(S(), T()): the types that the student's and the teacher's products are computed in. Both are
// double where either is.
template <class F>
auto with_compute_types(const Side& student, const Side& teacher, const F& f) {
  const auto is_double = [](const Side& side) {
    return side.hidden.scalar_type() == at::kDouble || side.weight.scalar_type() == at::kDouble;
  };
  if (is_double(student) || is_double(teacher)) return f(0.0, 0.0);
  const auto half = [](const Side& side) {
    return side.hidden.scalar_type() == at::kBFloat16 &&
           side.weight.scalar_type() == at::kBFloat16 && has_microkernel<c10::BFloat16>();
  };
  const c10::BFloat16 bf16(0.f);
  if (half(student)) return half(teacher) ? f(bf16, bf16) : f(bf16, 0.f);
  return half(teacher) ? f(0.f, bf16) : f(0.f, 0.f);
}

template <class S, class T>
struct Problems {
  Problem<S> student;
  Problem<T> teacher;

  // With tiles of the same shape.
  static Problems of(const Side& student, const Side& teacher, const at::Tensor& labels,
                     const std::vector<int64_t>& rows) {
    Problems p{student.problem<S>(labels, rows), teacher.problem<T>(labels, rows)};
    p.student.block = p.teacher.block = std::min(p.student.block, p.teacher.block);
    return p;
  }
};

// The lse of both sides and their difference, each as a sum of two; [padded].
template <class A>
struct TwoSums {
  std::vector<A> lse, lse_low, teacher_lse, teacher_lse_low, gap, gap_low;

  explicit TwoSums(int64_t padded)
      : lse(padded), lse_low(padded), teacher_lse(padded), teacher_lse_low(padded), gap(padded),
        gap_low(padded) {}
  void set(int64_t n, double of_student, SplitLse<A> student, double of_teacher,
           SplitLse<A> teacher) {
    lse[n] = student.high;
    lse_low[n] = student.low;
    teacher_lse[n] = teacher.high;
    teacher_lse_low[n] = teacher.low;
    gap[n] = A(of_student - of_teacher);
    gap_low[n] = A(of_student - of_teacher - double(gap[n]));
  }
  TwoLse<A> at(int64_t n) const {
    return {lse.data() + n,             lse_low.data() + n, teacher_lse.data() + n,
            teacher_lse_low.data() + n, gap.data() + n,     gap_low.data() + n};
  }
};

// Nine numbers of each token, over all tokens: zeros where none are set.
struct TwoStatistics {
  std::vector<at::Tensor> all;

  TwoStatistics(int64_t N, at::ScalarType dtype) {
    for (int i = 0; i < 9; ++i) {
      all.push_back(at::zeros({N}, at::TensorOptions().dtype(i == 3 || i == 6 ? at::kDouble : dtype)));
    }
  }
  template <class A>
  void set(int i, int64_t n, double value) {
    if (all[i].scalar_type() == at::kDouble) {
      all[i].mutable_data_ptr<double>()[n] = value;
    } else {
      all[i].mutable_data_ptr<A>()[n] = A(value);
    }
  }
};

// The statistics of both sides of the tokens `rows`, whose logits z and zt then hold, [V * padded].
template <class S, class T>
void two_forward(const Problems<S, T>& p, const Measure& by, Acc<S>* z, Acc<S>* zt,
                 const std::vector<int64_t>& rows, TwoStatistics& out) {
  using A = Acc<S>;
  const Problem<S>& student = p.student;
  const TokenStatistics<S> s = forward<S>(student, z);
  const TokenStatistics<T> t = forward<T>(p.teacher, zt);
  const int64_t N = student.N, V = student.V, padded = student.padded, tiles = student.tiles();
  TwoSums<A> sums(padded);
  for (int64_t n = 0; n < N; ++n) {
    sums.set(n, s.lse[n], SplitLse<A>::of(s.lse[n], s.entropy[n]), t.lse[n],
             SplitLse<A>::of(t.lse[n], t.entropy[n]));
  }
  const int64_t pieces = (V + lines_at_once - 1) / lines_at_once;
  const int64_t slabs = std::min(most_slabs, pieces);
  std::vector<double> parts(slabs * 3 * padded, 0.0);
  at::parallel_for(0, slabs * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slab = task / tiles, n0 = task % tiles * tile_tokens;
      const int64_t width = student.tile_width(task % tiles);
      double* part = parts.data() + slab * 3 * padded + n0;
      for (int64_t i = pieces * slab / slabs; i < pieces * (slab + 1) / slabs; ++i) {
        const int64_t v0 = i * lines_at_once, lines = std::min(lines_at_once, V - v0);
        loops<A>().two_sums(z + n0 * V + v0 * width, zt + n0 * V + v0 * width, lines, width, width,
                            sums.at(n0), by, part, part + padded, part + 2 * padded);
      }
    }
  });
  for (int64_t n = 0; n < N; ++n) {
    double total[3] = {0, 0, 0};
    for (int64_t slab = 0; slab < slabs; ++slab) {
      for (int i = 0; i < 3; ++i) total[i] += parts[(slab * 3 + i) * padded + n];
    }
    const double values[9] = {total[0],      s.logprobs[n], s.entropy[n], s.lse[n], t.logprobs[n],
                              t.entropy[n],  t.lse[n],      total[1],     total[2]};
    for (int i = 0; i < 9; ++i) out.template set<A>(i, rows[n], values[i]);
  }
}

// A buffer for the logits of both sides, and the tokens that it is used for in turn.
template <class A>
struct Turns {
  std::vector<std::vector<int64_t>> rows;
  at::Tensor z;
  int64_t room;  // for one side

  Turns(const std::vector<int64_t>& active, int64_t V, int64_t chunk_bytes) {
    const int64_t fit = std::min(chunk_bytes, bytes_at_once) / int64_t(2 * V * sizeof(A));
    const int64_t whole =
        fit < tile_tokens ? std::max<int64_t>(fit, 1) : fit / tile_tokens * tile_tokens;
    const int64_t most = std::min(tokens_at_once, whole), N = active.size();
    for (int64_t n0 = 0; n0 < N; n0 += most) {
      rows.emplace_back(active.begin() + n0, active.begin() + std::min(N, n0 + most));
    }
    room = V * round_up(std::min(most, N), group);
    z = kept_tensor(2 * room, c10::CppTypeToScalarType<A>::value);
  }
  A* student() { return z.mutable_data_ptr<A>(); }
  A* teacher() { return student() + room; }
};

// What a pass over the student's gradients takes of some of the tokens.
template <class A>
struct TwoGathered {
  Gathered<A> student;
  TwoSums<A> sums;
  std::vector<A> ddivergence, slope;

  Teacher<A> teacher(const LogitTiles<A>& logits, Measure by) const {
    return {logits, sums.at(0), ddivergence.data(), slope.data(), by};
  }
};

// [N] each.
struct Given {
  const at::Tensor &ddivergence, &dlogprobs, &dentropy;
  const at::Tensor &lse, &entropy, &teacher_lse, &teacher_entropy, &slope;

  std::vector<int64_t> rows(const at::Tensor& labels, int64_t ignore_index) const {
    const at::Tensor others = dentropy.ne(0).logical_or(ddivergence.ne(0));
    return rows_with_gradient(labels, ignore_index, dlogprobs, others);
  }
  template <class A>
  TwoGathered<A> gathered(const std::vector<int64_t>& rows, int64_t padded) const {
    TwoGathered<A> g{gather_upstream<A>(lse, entropy, dlogprobs, dentropy, rows, padded),
                     TwoSums<A>(padded), gather<A>(ddivergence, rows, padded),
                     gather<A>(slope, rows, padded)};
    const auto of_student = gather<double>(lse, rows, padded);
    const auto of_teacher = gather<double>(teacher_lse, rows, padded);
    const auto teachers = gather<A>(teacher_entropy, rows, padded);
    for (size_t n = 0; n < rows.size(); ++n) {
      g.sums.set(n, of_student[n], SplitLse<A>(g.student.lse[n], g.student.lse_low[n]),
                 of_teacher[n], SplitLse<A>::of(of_teacher[n], teachers[n]));
    }
    return g;
  }
};

}  // namespace fused_rl
