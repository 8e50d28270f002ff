// The operators of the linear head: they choose the arithmetic, pick the tokens that take part, and
// put the results of forward() and backward() where those tokens were.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include "asked.h"
#include "kept_exponentials.h"
#include "labels.h"
#include "problem.h"
#include "tokens.h"

namespace fused_rl {

template <class T>
Problem<T> make_problem(const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias,
                        const at::Tensor& labels, const at::Tensor& temperature, double scale,
                        double softcap, int64_t rounding, const std::vector<int64_t>& active) {
  using A = Acc<T>;
  constexpr int64_t tile_bytes = 512 * 1024;  // of weight: it shares the L2 cache with the logits
  Problem<T> p;
  p.N = active.size();
  p.padded = round_up(p.N, group);
  p.H = hidden.size(1);
  p.wide = round_up(p.H, group);
  p.K = tiled<T>() ? p.wide : round_up(p.H, lines_per_pack<T>);
  p.V = weight.size(0);
  p.block = std::clamp<int64_t>(tile_bytes / (p.K * sizeof(T)) / 32 * 32, 64, 256);
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const bool all = p.N == hidden.size(0);
  const at::Tensor chosen = all ? hidden : at::index_select(hidden, 0, index_tensor(active));
  if (p.wide == p.H) {
    p.hidden = chosen.to(options).contiguous();
  } else {
    p.hidden = at::zeros({p.N, p.wide}, options);
    p.hidden.narrow(1, 0, p.H).copy_(chosen);
  }
  p.weight = weight;
  const auto of_A = c10::CppTypeToScalarType<A>::value;
  if (bias) p.bias = bias->to(of_A).contiguous();
  const at::Tensor y = labels.contiguous(), t = temperature.to(of_A).contiguous();
  p.labels.assign(p.padded, -1);
  p.inv_temperature.assign(p.padded, A(1));
  bool same_temperature = true;
  for (int64_t n = 0; n < p.N; ++n) {
    p.labels[n] = y.const_data_ptr<int64_t>()[active[n]];
    const A of_token = t.const_data_ptr<A>()[active[n]];
    check_temperature(of_token, active[n]);
    p.inv_temperature[n] = A(1) / of_token;
    same_temperature &= p.inv_temperature[n] == A(1);
  }
  const bool identity =
      same_temperature && !bias && scale == 1.0 && softcap == 0.0 && rounding == no_rounding;
  p.transform = {A(scale), A(softcap), rounding, identity};
  return p;
}

template Problem<c10::BFloat16> make_problem(const at::Tensor&, const at::Tensor&, const Bias&,
                                             const at::Tensor&, const at::Tensor&, double, double,
                                             int64_t, const std::vector<int64_t>&);
template Problem<float> make_problem(const at::Tensor&, const at::Tensor&, const Bias&,
                                     const at::Tensor&, const at::Tensor&, double, double,
                                     int64_t, const std::vector<int64_t>&);
template Problem<double> make_problem(const at::Tensor&, const at::Tensor&, const Bias&,
                                      const at::Tensor&, const at::Tensor&, double, double,
                                      int64_t, const std::vector<int64_t>&);

static Tensors4 linear_logprobs(const at::Tensor& hidden, const at::Tensor& weight,
                                const Bias& bias, const at::Tensor& labels,
                                const at::Tensor& temperature, double scale, double softcap,
                                int64_t rounding, int64_t ignore_index, int64_t /*chunk_bytes*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors4 {
    using T = decltype(zero);
    const auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, rounding,
                                   active);
    const TokenStatistics<T> s = p.N ? forward<T>(p, nullptr) : TokenStatistics<T>{};
    const int64_t N = y.numel();
    return {scatter(s.logprobs, active, N), scatter(s.entropy, active, N),
            scatter(s.lse, active, N), scatter(s.top, active, N)};
  });
}

using AskedTensors = decltype(std::tuple_cat(Tensors3{}, Tensors4{}));

template <class T>
AskedTensors all_of(const TokenStatistics<T>& s, const AskedOf<T>& asked,
                    const std::vector<int64_t>& active, int64_t N) {
  return std::tuple_cat(Tensors3{scatter(s.logprobs, active, N), scatter(s.entropy, active, N),
                                 scatter(s.lse, active, N)},
                        asked.finish(s, active, N));
}

static AskedTensors linear_statistics(const at::Tensor& hidden, const at::Tensor& weight,
                                      const Bias& bias, const at::Tensor& labels,
                                      const at::Tensor& temperature, double scale, double softcap,
                                      int64_t rounding, bool collision, bool mean_logit,
                                      int64_t top, int64_t ignore_index, int64_t /*chunk_bytes*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  return with_compute_type(hidden, weight, [&](auto zero) {
    using T = decltype(zero);
    const auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, rounding,
                                   active);
    AskedOf<T> asked(p, {collision, mean_logit, top}, p.super_blocks());
    TokenStatistics<T> s;
    if (p.N) s = forward<T>(p, nullptr, nullptr, nullptr, nullptr, nullptr, &asked);
    return all_of(s, asked, active, y.numel());
  });
}

// forward(), and what it keeps of the logits: exponentials where they serve, or the logits.
template <class T>
std::pair<TokenStatistics<T>, at::Tensor> keeping_forward(const Problem<T>& p, bool has_dentropy,
                                                          AskedOf<T>* asked = nullptr) {
  using A = Acc<T>;
  if (std::is_same_v<T, c10::BFloat16> && p.transform.softcap == 0 && !has_dentropy) {
    const at::Tensor z = kept_tensor(KeptExponentials::size(p.V, p.padded), at::kShort);
    const KeptExponentials kept(z.mutable_data_ptr(), p.V, p.padded);
    return {forward<T>(p, nullptr, nullptr, nullptr, nullptr, &kept, asked), z};
  }
  const at::Tensor z = kept_tensor(p.V * p.padded, c10::CppTypeToScalarType<A>::value);
  return {forward<T>(p, z.mutable_data_ptr<A>(), nullptr, nullptr, nullptr, nullptr, asked), z};
}

static decltype(std::tuple_cat(AskedTensors{}, Tensors2{})) linear_statistics_stored(
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias, const at::Tensor& labels,
    const at::Tensor& temperature, double scale, double softcap, int64_t rounding, bool collision,
    bool mean_logit, int64_t top, int64_t ignore_index, int64_t /*chunk_bytes*/) {
  check_labels(labels, weight.size(0), ignore_index);
  const at::Tensor y = labels.contiguous();
  const auto active = counted_rows(y, ignore_index);
  return with_compute_type(hidden, weight, [&](auto zero) {
    using T = decltype(zero);
    const auto p = make_problem<T>(hidden, weight, bias, y, temperature, scale, softcap, rounding,
                                   active);
    AskedOf<T> asked(p, {collision, mean_logit, top}, p.super_blocks());
    const auto [s, z] = keeping_forward<T>(p, false, &asked);
    return std::tuple_cat(all_of(s, asked, active, y.numel()),
                          Tensors2{index_tensor(active).clone(), z});
  });
}

static Tensors3 linear_logprobs_backward(
    const at::Tensor& dlogprobs, const at::Tensor& dentropy, const at::Tensor& hidden,
    const at::Tensor& weight, const Bias& bias, const at::Tensor& labels,
    const at::Tensor& temperature, double scale, double softcap, int64_t rounding,
    int64_t ignore_index, int64_t /*chunk_bytes*/, const at::Tensor& lse, const at::Tensor& entropy,
    bool need_dhidden, bool need_dweight, bool need_dbias) {
  const auto rows = rows_with_gradient(labels, ignore_index, dlogprobs, dentropy);
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors3 {
    using T = decltype(zero);
    using A = Acc<T>;
    if (rows.empty()) {
      return or_empty(zero_gradients(hidden, weight, bias, need_dhidden, need_dweight, need_dbias),
                      hidden, weight);
    }
    const auto p = make_problem<T>(hidden, weight, bias, labels, temperature, scale, softcap,
                                   rounding, rows);
    auto g = gather_upstream<A>(lse, entropy, dlogprobs, dentropy, rows, p.padded);
    restore_log_sums(p, g);
    Gradients out{{}, {}, {}, false};
    if (need_dhidden) out.dhidden = at::empty({p.N, p.H}, hidden.options());
    if (need_dweight) out.dweight = kept_tensor(weight.sizes(), weight.scalar_type());
    if (need_dbias) out.dbias = at::empty({p.V}, bias->options());
    backward<T>(p, g.upstream(p.inv_temperature), nullptr, out);
    if (need_dhidden) out.dhidden = place_rows(out.dhidden, rows, hidden, hidden.scalar_type());
    return or_empty(out, hidden, weight);
  });
}

static Tensors5 linear_logprobs_chunk(const at::Tensor& hidden, const at::Tensor& weight,
                                      const Bias& bias, const at::Tensor& labels,
                                      const at::Tensor& temperature, double scale, double softcap,
                                      int64_t rounding, bool has_dentropy) {
  check_labels(labels, weight.size(0), std::nullopt);
  const auto rows = all_rows(hidden.size(0));
  return with_compute_type(hidden, weight, [&](auto zero) -> Tensors5 {
    using T = decltype(zero);
    const auto p = make_problem<T>(hidden, weight, bias, labels, temperature, scale, softcap,
                                   rounding, rows);
    const auto [s, z] = keeping_forward<T>(p, has_dentropy);
    return {scatter(s.logprobs, rows, p.N), scatter(s.entropy, rows, p.N),
            scatter(s.lse, rows, p.N), scatter(s.top, rows, p.N), z};
  });
}

static at::Tensor linear_logprobs_chunk_backward(
    const at::Tensor& z, const at::Tensor& dlogprobs, const at::Tensor& dentropy,
    const at::Tensor& hidden, const at::Tensor& weight, const Bias& bias, const at::Tensor& labels,
    const at::Tensor& temperature, double scale, double softcap, int64_t rounding,
    const at::Tensor& lse, const at::Tensor& entropy, const at::Tensor& dweight,
    const at::Tensor& dbias, bool accumulate, bool partial) {
  auto rows = rows_with_gradient(labels, -1, dlogprobs, dentropy);
  const int64_t N = hidden.size(0), live = rows.size();
  at::Tensor states = hidden, silent;
  if (live > N * 3 / 4 && live < N) {
    // A few without a gradient cost less than the others' way to new places.
    silent = dlogprobs.eq(0).logical_and(dentropy.eq(0)).unsqueeze(1);
    states = hidden.masked_fill(silent, 0);
    rows = all_rows(N);
  }
  const at::Tensor dhidden = with_compute_type(hidden, weight, [&](auto zero) -> at::Tensor {
    using T = decltype(zero);
    using A = Acc<T>;
    const at::ScalarType dtype = dhidden_dtype<A>(hidden, partial);
    if (rows.empty()) {
      if (!accumulate) {
        dweight.zero_();
        dbias.zero_();
      }
      return at::zeros(hidden.sizes(), hidden.options().dtype(dtype));
    }
    const auto p = make_problem<T>(states, weight, bias, labels, temperature, scale, softcap,
                                   rounding, rows);
    auto g = gather_upstream<A>(lse, entropy, dlogprobs, dentropy, rows, p.padded);
    restore_log_sums(p, g);
    const std::vector<int64_t> some = p.N == N ? std::vector<int64_t>{} : rows;
    const int64_t padded = round_up(N, group);
    Gradients out{at::empty({p.N, p.H}, hidden.options().dtype(dtype)), {}, {}, accumulate};
    if (dweight.numel()) {
      out.dweight = dweight;
      if (!accumulate) prefer_huge_pages(dweight);
    }
    if (dbias.numel()) out.dbias = dbias;
    const Upstream<A> up = g.upstream(p.inv_temperature);
    if (z.scalar_type() == c10::CppTypeToScalarType<A>::value) {
      const StoredTiles<A> stored(z.const_data_ptr<A>(), p.V, padded, p.N, some);
      backward<T>(p, up, &stored, out);
    } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
      const KeptExponentials kept(const_cast<void*>(z.const_data_ptr()), p.V, padded);
      if (g.has_dentropy) {
        // Which the exponentials do not give.
        backward<T>(p, up, nullptr, out);
      } else {
        backward(p, up, ExponentialsOf{kept, some}, out);
      }
    }
    return place_rows(out.dhidden, rows, hidden, dtype);
  });
  return silent.defined() ? dhidden.masked_fill(silent, 0) : dhidden;
}

static std::string cpu_features() {
  std::string out = instruction_set();
  if (has_microkernel<c10::BFloat16>()) out += " bfloat16";
  if (tiled<c10::BFloat16>()) out += " amx";
  if (has_microkernel<float>()) out += " float32";
  return out;
}

TORCH_LIBRARY_FRAGMENT(fused_rl, m) {
  m.def("cpu_features() -> str", &cpu_features);
  m.def("cpu_kept_memory() -> int", []() { return int64_t(kept_memory()); });
  m.def("cpu_release_memory() -> ()", &release_memory);
  m.def("cpu_empty(int[] size, ScalarType dtype) -> Tensor", &kept_tensor);
}

TORCH_LIBRARY_IMPL(fused_rl, CPU, m) {
  m.impl("linear_logprobs", &linear_logprobs);
  m.impl("linear_logprobs_backward", &linear_logprobs_backward);
  m.impl("linear_statistics", &linear_statistics);
  m.impl("linear_statistics_stored", &linear_statistics_stored);
  m.impl("linear_logprobs_chunk", &linear_logprobs_chunk);
  m.impl("linear_logprobs_chunk_backward", &linear_logprobs_chunk_backward);
}

}  // namespace fused_rl
