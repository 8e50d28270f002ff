// Divergences between the distributions of two heads, per token.
//
//     D[n] = sum_v c(s[n, v], t[n, v])        divergence_loops.cpp has the terms c and their slopes
//
// The terms want both sides' lse, and so all of the vocabulary: the logits of a chunk of tokens, of
// both sides, are stored tile by tile while their running softmax is formed, and then read once. The
// gradient of the student's logits is one more reading, in the pass of linear_backward.cpp, which can
// form them again as well. The teacher's gradients are the student's with the sides changed.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include "labels.h"
#include "two_heads.h"

namespace fused_rl {

using Tensors9 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                            at::Tensor, at::Tensor, at::Tensor>;
using Tensors10 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors6 =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

static void check_teacher(const Side& teacher, const std::vector<int64_t>& rows) {
  const at::Tensor t = teacher.temperature.to(at::kDouble).contiguous();
  for (const int64_t n : rows) {
    TORCH_CHECK_VALUE(t.const_data_ptr<double>()[n] > 0, "teacher_temperature[", n, "] is ",
                      t.const_data_ptr<double>()[n], ", and a temperature must be positive");
  }
}

static Tensors9 linear_divergence(
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias,
    const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight, const Bias& teacher_bias,
    const at::Tensor& labels, const at::Tensor& temperature, const at::Tensor& teacher_temperature,
    double scale, double softcap, int64_t rounding, double teacher_scale, double teacher_softcap,
    int64_t teacher_rounding, int64_t kind, double parameter, double factor, int64_t ignore_index,
    int64_t chunk_bytes) {
  const Side student{hidden, weight, bias, temperature, scale, softcap, rounding};
  const Side teacher{teacher_hidden, teacher_weight,  teacher_bias,    teacher_temperature,
                     teacher_scale,  teacher_softcap, teacher_rounding};
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  check_teacher(teacher, active);
  return with_compute_types(student, teacher, [&](auto of_student, auto of_teacher) -> Tensors9 {
    using S = decltype(of_student);
    using T = decltype(of_teacher);
    using A = Acc<S>;
    const auto dtype = c10::CppTypeToScalarType<A>::value;
    TwoStatistics out(y.numel(), dtype);
    Turns<A> turns(active, weight.size(0), chunk_bytes);
    for (const auto& rows : turns.rows) {
      const auto p = Problems<S, T>::of(student, teacher, y, rows);
      two_forward(p, {kind, parameter, factor}, turns.student(), turns.teacher(), rows, out);
    }
    const auto& a = out.all;
    return {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]};
  });
}

static Tensors10 linear_divergence_chunk(
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias,
    const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight, const Bias& teacher_bias,
    const at::Tensor& labels, const at::Tensor& temperature, const at::Tensor& teacher_temperature,
    double scale, double softcap, int64_t rounding, double teacher_scale, double teacher_softcap,
    int64_t teacher_rounding, int64_t kind, double parameter, double factor) {
  const Side student{hidden, weight, bias, temperature, scale, softcap, rounding};
  const Side teacher{teacher_hidden, teacher_weight,  teacher_bias,    teacher_temperature,
                     teacher_scale,  teacher_softcap, teacher_rounding};
  check_labels(labels, weight.size(0), std::nullopt);
  const auto rows = all_rows(hidden.size(0));
  return with_compute_types(student, teacher, [&](auto of_student, auto of_teacher) -> Tensors10 {
    using S = decltype(of_student);
    using T = decltype(of_teacher);
    using A = Acc<S>;
    const auto p = Problems<S, T>::of(student, teacher, labels, rows);
    const auto dtype = c10::CppTypeToScalarType<A>::value;
    TwoStatistics out(labels.numel(), dtype);
    const int64_t room = p.student.V * p.student.padded;
    at::Tensor z = kept_tensor(2 * room, dtype);
    A* to = z.mutable_data_ptr<A>();
    two_forward(p, {kind, parameter, factor}, to, to + room, rows, out);
    const auto& a = out.all;
    return {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], z};
  });
}

// The student's gradients, from logits that are formed again.
static Tensors3 student_gradients(const Side& student, const Side& teacher,
                                  const at::Tensor& labels, int64_t ignore_index, const Given& given,
                                  Measure by, bool need_dhidden, bool need_dweight,
                                  bool need_dbias) {
  const auto rows = given.rows(labels, ignore_index);
  const auto &hidden = student.hidden, &weight = student.weight;
  if (rows.empty() || !(need_dhidden || need_dweight || need_dbias)) {
    return or_empty(
        zero_gradients(hidden, weight, student.bias, need_dhidden, need_dweight, need_dbias),
        hidden, weight);
  }
  return with_compute_types(student, teacher, [&](auto of_student, auto of_teacher) -> Tensors3 {
    using S = decltype(of_student);
    using T = decltype(of_teacher);
    using A = Acc<S>;
    const auto p = Problems<S, T>::of(student, teacher, labels, rows);
    const auto g = given.gathered<A>(rows, p.student.padded);
    Gradients out{{}, {}, {}, false};
    if (need_dhidden) out.dhidden = at::empty({p.student.N, p.student.H}, hidden.options());
    if (need_dweight) out.dweight = kept_tensor(weight.sizes(), weight.scalar_type());
    if (need_dbias) out.dbias = at::empty({p.student.V}, student.bias->options());
    const FormedTiles<T> logits(p.teacher);
    const Teacher<A> other = g.teacher(logits, by);
    backward<S>(p.student, g.student.upstream(p.student.inv_temperature), nullptr, out, nullptr,
                nullptr, &other);
    if (need_dhidden) out.dhidden = place_rows(out.dhidden, rows, hidden, hidden.scalar_type());
    return or_empty(out, hidden, weight);
  });
}

// The divergence that is the same when the sides change places.
static Measure swapped(Measure by) {
  if (by.kind == reverse_kl || by.kind == forward_kl) {
    return {by.kind == reverse_kl ? forward_kl : reverse_kl, by.parameter, by.factor};
  }
  return {by.kind, 1 - by.parameter, by.factor};
}

static Tensors6 linear_divergence_backward(
    const at::Tensor& ddivergence, const at::Tensor& dlogprobs, const at::Tensor& dentropy,
    const at::Tensor& dteacher_logprobs, const at::Tensor& dteacher_entropy,
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias,
    const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight, const Bias& teacher_bias,
    const at::Tensor& labels, const at::Tensor& temperature, const at::Tensor& teacher_temperature,
    double scale, double softcap, int64_t rounding, double teacher_scale, double teacher_softcap,
    int64_t teacher_rounding, int64_t kind, double parameter, double factor, int64_t ignore_index,
    int64_t /*chunk_bytes*/, const at::Tensor& lse, const at::Tensor& entropy,
    const at::Tensor& teacher_lse, const at::Tensor& teacher_entropy, const at::Tensor& slope,
    const at::Tensor& teacher_slope, bool need_dhidden, bool need_dweight, bool need_dbias,
    bool need_dteacher_hidden, bool need_dteacher_weight, bool need_dteacher_bias) {
  const Side student{hidden, weight, bias, temperature, scale, softcap, rounding};
  const Side teacher{teacher_hidden, teacher_weight,  teacher_bias,    teacher_temperature,
                     teacher_scale,  teacher_softcap, teacher_rounding};
  const Given of_student{ddivergence, dlogprobs,   dentropy,        lse,
                         entropy,     teacher_lse, teacher_entropy, slope};
  const Given of_teacher{ddivergence,     dteacher_logprobs, dteacher_entropy, teacher_lse,
                         teacher_entropy, lse,               entropy,          teacher_slope};
  const Measure by{kind, parameter, factor};
  const auto [h, w, b] = student_gradients(student, teacher, labels, ignore_index, of_student, by,
                                           need_dhidden, need_dweight, need_dbias);
  const auto [th, tw, tb] =
      student_gradients(teacher, student, labels, ignore_index, of_teacher, swapped(by),
                        need_dteacher_hidden, need_dteacher_weight, need_dteacher_bias);
  return {h, w, b, th, tw, tb};
}

static at::Tensor linear_divergence_chunk_backward(
    const at::Tensor& z, const at::Tensor& ddivergence, const at::Tensor& dlogprobs,
    const at::Tensor& dentropy, const at::Tensor& hidden, const at::Tensor& weight,
    const Bias& bias, const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight,
    const Bias& teacher_bias, const at::Tensor& labels, const at::Tensor& temperature,
    const at::Tensor& teacher_temperature, double scale, double softcap, int64_t rounding,
    double teacher_scale, double teacher_softcap, int64_t teacher_rounding, int64_t kind,
    double parameter, double factor, const at::Tensor& lse, const at::Tensor& entropy,
    const at::Tensor& teacher_lse, const at::Tensor& teacher_entropy, const at::Tensor& slope,
    const at::Tensor& /*teacher_slope*/, const at::Tensor& dweight, const at::Tensor& dbias,
    bool accumulate, bool partial) {
  const Side student{hidden, weight, bias, temperature, scale, softcap, rounding};
  const Side teacher{teacher_hidden, teacher_weight,  teacher_bias,    teacher_temperature,
                     teacher_scale,  teacher_softcap, teacher_rounding};
  const Given given{ddivergence, dlogprobs,   dentropy,        lse,
                    entropy,     teacher_lse, teacher_entropy, slope};
  const auto rows = given.rows(labels, -1);
  return with_compute_types(student, teacher, [&](auto of_student, auto) -> at::Tensor {
    using S = decltype(of_student);
    using A = Acc<S>;
    const at::ScalarType dtype = dhidden_dtype<A>(hidden, partial);
    if (rows.empty()) {
      if (!accumulate) {
        dweight.zero_();
        dbias.zero_();
      }
      return at::zeros(hidden.sizes(), hidden.options().dtype(dtype));
    }
    const auto p = student.problem<S>(labels, rows);
    const auto g = given.gathered<A>(rows, p.padded);
    const int64_t N = hidden.size(0), padded = round_up(N, group), room = p.V * padded;
    const auto taken = p.N == N ? std::vector<int64_t>{} : rows;
    const A* from = z.const_data_ptr<A>();
    const StoredTiles<A> stored(from, p.V, padded, p.N, taken);
    const StoredTiles<A> of_teacher(from + room, p.V, padded, p.N, taken);
    const Teacher<A> other = g.teacher(of_teacher, {kind, parameter, factor});
    Gradients out{at::empty({p.N, p.H}, hidden.options().dtype(dtype)), {}, {}, accumulate};
    if (dweight.numel()) {
      out.dweight = dweight;
      if (!accumulate) prefer_huge_pages(dweight);
    }
    if (dbias.numel()) out.dbias = dbias;
    backward<S>(p, g.student.upstream(p.inv_temperature), &stored, out, nullptr, nullptr, &other);
    return place_rows(out.dhidden, rows, hidden, dtype);
  });
}

// linear_divergence, and the gradient of each divergence while the logits are there.
static Tensors10 linear_divergence_frozen(
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias,
    const at::Tensor& teacher_hidden, const at::Tensor& teacher_weight, const Bias& teacher_bias,
    const at::Tensor& labels, const at::Tensor& temperature, const at::Tensor& teacher_temperature,
    double scale, double softcap, int64_t rounding, double teacher_scale, double teacher_softcap,
    int64_t teacher_rounding, int64_t kind, double parameter, double factor, int64_t ignore_index,
    int64_t chunk_bytes) {
  const Side student{hidden, weight, bias, temperature, scale, softcap, rounding};
  const Side teacher{teacher_hidden, teacher_weight,  teacher_bias,    teacher_temperature,
                     teacher_scale,  teacher_softcap, teacher_rounding};
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  check_teacher(teacher, active);
  return with_compute_types(student, teacher, [&](auto of_student, auto of_teacher) -> Tensors10 {
    using S = decltype(of_student);
    using T = decltype(of_teacher);
    using A = Acc<S>;
    const auto of_A = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
    TwoStatistics out(y.numel(), c10::CppTypeToScalarType<A>::value);
    const auto& a = out.all;
    at::Tensor unit = at::zeros(hidden.sizes(), hidden.options());
    const at::Tensor ones = at::ones({y.numel()}, of_A), zeros = at::zeros({y.numel()}, of_A);
    const Given given{ones, zeros, zeros, a[3], a[2], a[6], a[5], a[7]};
    const Measure by{kind, parameter, factor};
    Turns<A> turns(active, weight.size(0), chunk_bytes);
    for (const auto& rows : turns.rows) {
      const auto p = Problems<S, T>::of(student, teacher, y, rows);
      two_forward(p, by, turns.student(), turns.teacher(), rows, out);
      const auto& q = p.student;
      const auto g = given.gathered<A>(rows, q.padded);
      const StoredTiles<A> stored(turns.student(), q.V, q.padded, q.N, {});
      const StoredTiles<A> other(turns.teacher(), q.V, q.padded, q.N, {});
      const Teacher<A> of_other = g.teacher(other, by);
      Gradients part{at::empty({q.N, q.H}, hidden.options()), {}, {}, false};
      backward<S>(q, g.student.upstream(q.inv_temperature), &stored, part, nullptr, nullptr,
                  &of_other);
      unit.index_copy_(0, index_tensor(rows), part.dhidden);
    }
    return {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], unit};
  });
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("linear_divergence", &linear_divergence);
  m.impl("linear_divergence_frozen", &linear_divergence_frozen);
  m.impl("linear_divergence_backward", &linear_divergence_backward);
  m.impl("linear_divergence_chunk", &linear_divergence_chunk);
  m.impl("linear_divergence_chunk_backward", &linear_divergence_chunk_backward);
}

}  // namespace fused_rl
