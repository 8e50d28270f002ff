// The terms of a divergence between two heads, and their gradient: once per instruction set.
//
//     D = sum_v c,   g = dc / d log s,   g' = dc / d log t,   c = g + g'
//     dz_v = g_v - s_v sum_u g_u
//
// reference.py says why the slopes are such that nothing cancels where s is near t.
#include "loops.h"

#include "simd.h"
#include "softmax.h"

namespace fused_rl::FUSED_RL_ISA {

// Lines whose terms go into one sum.
static constexpr int64_t lines_of_sum = 16;

// log(1 + x) for x > -1, exact to an ulp or two near 0.
template <class T>
FUSED_RL_INLINE Vec<T> log1p(Vec<T> x) {
  using S = Simd<T>;
  using Bits = typename S::bits;
  constexpr int terms = S::mantissa == 23 ? 6 : 13;
  // 1 + x = 2^k (1 + r) with 1 + r in [3/4, 3/2); where k is 0, r is x itself.
  const Vec<T> u = x + T(1), three_quarters = splat<T>(T(0.75));
  Bits bits, low;
  std::memcpy(&bits, &u, sizeof(bits));
  std::memcpy(&low, &three_quarters, sizeof(low));
  const Bits biased = (bits - low + (S::bias << S::mantissa)) >> S::mantissa;
  const Bits mantissa = bits - ((biased - S::bias) << S::mantissa);
  Vec<T> m;
  std::memcpy(&m, &mantissa, sizeof(m));
  const Vec<T> k = __builtin_convertvector(biased, Vec<T>) - T(S::bias);
  const Vec<T> r = k == T(0) ? x : m - T(1);
  // log(1 + r) = 2 atanh(w),  w = r / (2 + r),  |w| <= 1/5
  const Vec<T> w = r / (r + T(2)), square = w * w;
  Vec<T> series = splat<T>(T(1) / T(2 * terms + 1));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 0; --i) series = series * square + T(1) / T(2 * i + 1);
  const Vec<T> value = k * S::ln2_high + (k * S::ln2_low + T(2) * w * series);
  return x == x ? value : x;
}

template <class T>
struct Pair {
  Vec<T> s, t;
  Vec<T> logs;
  Vec<T> d;      // log s - log t: 0 where both are out, for 100 nats where one is
  Vec<T> e;      // expm1(-|d|)
  Vec<T> delta;  // s - t
  Vec<T> out_s, out_t;  // 1 where the logit is -inf; not formed where none is
};

// Of one token.
template <class T>
struct Known {
  Vec<T> lse, lse_low, teacher_lse, teacher_lse_low, gap, gap_low;
};

template <class T>
FUSED_RL_INLINE Known<T> known_at(TwoLse<T> k, int64_t n) {
  return {load(k.lse + n),             load(k.lse_low + n), load(k.teacher_lse + n),
          load(k.teacher_lse_low + n), load(k.gap + n),     load(k.gap_low + n)};
}

// Whether one of a block of logits is -inf, of either side.
template <class T>
FUSED_RL_INLINE bool any_out(const T* z, const T* zt, int64_t lines, int64_t ld) {
  const T inf = std::numeric_limits<T>::infinity();
  Vec<T> low = splat<T>(0);
  for (int64_t v = 0; v < lines; ++v) {
    const Vec<T> x = load(z + v * ld), y = load(zt + v * ld);
    low = x < low ? x : low;
    low = y < low ? y : low;
  }
  bool any = false;
  for (int i = 0; i < Simd<T>::width; ++i) any |= low[i] == -inf;
  return any;
}

// The larger probability by its own logit, the smaller by the ratio.
template <class T, bool out>
FUSED_RL_INLINE Pair<T> pair_of(Vec<T> z, Vec<T> zt, const Known<T>& k) {
  const T inf = std::numeric_limits<T>::infinity(), held = T(infinite_log_ratio);
  const Vec<T> zero{}, one = splat<T>(1);
  Pair<T> p;
  p.d = ((z - zt) - k.gap) - k.gap_low;
  if constexpr (out) {
    p.out_s = z == -inf ? one : zero;
    p.out_t = zt == -inf ? one : zero;
    p.d = p.d == inf ? splat<T>(held) : (p.d == -inf ? splat<T>(-held) : p.d);
    p.d = p.out_s * p.out_t == T(1) ? zero : p.d;
  }
  const auto less = p.d < T(0);
  const Vec<T> x = less ? zt : z, lse = less ? k.teacher_lse : k.lse;
  const Vec<T> low = less ? k.teacher_lse_low : k.lse_low;
  const Vec<T> larger = probability<T>(x, lse, low).p, apart = less ? p.d : -p.d;
  const ExpParts<T> parts = exp_parts<T>(within_exp<T>(apart), within_exp<T>(apart), zero);
  p.e = parts.power * parts.rest + (parts.power - T(1));
  const Vec<T> ratio = apart < T(Simd<T>::lowest) ? zero : parts.power + parts.power * parts.rest;
  const Vec<T> smaller = larger * ratio, between = larger * p.e;
  p.s = less ? smaller : larger;
  p.t = less ? larger : smaller;
  p.delta = less ? between : -between;
  p.logs = at_least<T>((z - k.lse) - k.lse_low, Simd<T>::lowest);
  if constexpr (out) {
    p.s = p.out_s == T(1) ? zero : p.s;
    p.t = p.out_t == T(1) ? zero : p.t;
    // With one side out, delta is the other; with both, 0.
    p.delta = p.out_s + p.out_t > T(0) ? p.s - p.t : p.delta;
  }
  return p;
}

template <class T>
struct Slopes {
  Vec<T> g, teacher;
};

// What slopes() needs of a measure; parameter and held in T.
template <class T>
struct Constants {
  T parameter, held;
};

// Each divergence's pair, without the factor.
template <class T, int kind>
FUSED_RL_INLINE Slopes<T> slopes(const Pair<T>& p, Constants<T> by) {
  const T a = by.parameter;
  if constexpr (kind == reverse_kl) return {p.s * p.d, -p.delta};
  if constexpr (kind == forward_kl) return {p.delta, -p.t * p.d};
  if constexpr (kind == jensen_shannon) {
    const Vec<T> to_larger = log1p<T>((p.d < T(0) ? splat<T>(T(1) - a) : splat<T>(a)) * p.e);
    const Vec<T> to_s = p.d < T(0) ? to_larger - p.d : to_larger;
    return {(a - T(1)) * p.s * to_s, -a * p.t * (to_s + p.d)};
  }
  if constexpr (kind == alpha_divergence) {
    const Vec<T> d = at_most<T>(at_least<T>(p.d, -by.held), by.held);
    return {p.s * expm1<T>(d * (a - T(1))) / (a - T(1)), -p.t * expm1<T>(d * a) / a};
  }
  const Vec<T> zero{}, half = splat<T>(T(0.5));
  const Vec<T> sign = p.d > zero ? half : (p.d < zero ? -half : p.d);
  return {p.s * sign, -p.t * sign};
}

template <class T>
Constants<T> constants(Measure by) {
  const double a = by.parameter, most = std::fmax(std::fmax(std::fabs(a), std::fabs(a - 1)), 1);
  return {T(a), T(largest_exponent / most)};
}

// What a term becomes where the student alone can sample the entry, or the teacher alone: infinite.
struct Infinite {
  bool student, teacher;
  explicit Infinite(Measure by)
      : student(by.kind == reverse_kl || (by.kind == alpha_divergence && by.parameter >= 1)),
        teacher(by.kind == forward_kl || (by.kind == alpha_divergence && by.parameter <= 0)) {}
};

template <class T>
struct Terms {
  Vec<T> total{}, g{}, teacher{};
};

template <class T, int kind, bool out>
FUSED_RL_INLINE Terms<T> terms_of(const T* z, const T* zt, int64_t lines, int64_t ld,
                                  const Known<T>& k, Constants<T> c, Infinite infinite) {
  const Vec<T> inf = splat<T>(std::numeric_limits<T>::infinity());
  Terms<T> sum;
  for (int64_t v = 0; v < lines; ++v) {
    const Pair<T> p = pair_of<T, out>(load(z + v * ld), load(zt + v * ld), k);
    const Slopes<T> slope = slopes<T, kind>(p, c);
    Vec<T> term = slope.g + slope.teacher;
    if constexpr (out) {
      if (infinite.student) term = p.out_t > p.out_s ? inf : term;
      if (infinite.teacher) term = p.out_s > p.out_t ? inf : term;
    }
    sum.total += term;
    sum.g += slope.g;
    sum.teacher += slope.teacher;
  }
  return sum;
}

template <class T, int kind>
static void sums_of(const T* z, const T* zt, int64_t lines, int64_t columns, int64_t ld,
                    TwoLse<T> known, Measure by, double* total, double* g, double* teacher) {
  constexpr int W = Simd<T>::width;
  const Constants<T> c = constants<T>(by);
  const Infinite infinite(by);
  const double factor = by.factor;
  for (int64_t n = 0; n < columns; n += W) {
    const Known<T> k = known_at(known, n);
    Terms<T> sum;
    for (int64_t v0 = 0; v0 < lines; v0 += lines_of_sum) {
      const T *at = z + v0 * ld + n, *at_teacher = zt + v0 * ld + n;
      const int64_t count = v0 + lines_of_sum < lines ? lines_of_sum : lines - v0;
      const Terms<T> part = any_out<T>(at, at_teacher, count, ld)
                                ? terms_of<T, kind, true>(at, at_teacher, count, ld, k, c, infinite)
                                : terms_of<T, kind, false>(at, at_teacher, count, ld, k, c, infinite);
      sum.total += part.total;
      sum.g += part.g;
      sum.teacher += part.teacher;
    }
    for (int i = 0; i < W; ++i) {
      total[n + i] += factor * double(sum.total[i]);
      g[n + i] += factor * double(sum.g[i]);
      teacher[n + i] += factor * double(sum.teacher[i]);
    }
  }
}

template <class T>
void two_sums(const T* z, const T* zt, int64_t lines, int64_t columns, int64_t ld, TwoLse<T> known,
              Measure by, double* total, double* g, double* teacher) {
  const auto run = [&] {
    switch (by.kind) {
      case reverse_kl: return sums_of<T, reverse_kl>;
      case forward_kl: return sums_of<T, forward_kl>;
      case jensen_shannon: return sums_of<T, jensen_shannon>;
      case alpha_divergence: return sums_of<T, alpha_divergence>;
      default: return sums_of<T, total_variation>;
    }
  }();
  run(z, zt, lines, columns, ld, known, by, total, g, teacher);
}

// What the gradient of a token's logits is formed with.
template <class T>
struct Factors {
  Vec<T> entropy, dlogprob, dentropy, of_sum, of_g, to_tanh;
  bool cap;
};

template <class T, int kind, bool out>
FUSED_RL_INLINE void gradients_of(const T* z, const T* zt, int64_t lines, int64_t ld,
                                  const Known<T>& k, Constants<T> c, const Factors<T>& f, T* draw,
                                  int64_t ld_draw) {
  for (int64_t v = 0; v < lines; ++v) {
    const Vec<T> x = load(z + v * ld);
    const Pair<T> p = pair_of<T, out>(x, load(zt + v * ld), k);
    // What comes of log s: of the label, the entropy and the sum of the slopes.
    const Vec<T> of_s = f.dlogprob + f.dentropy * (p.logs + f.entropy) + f.of_sum;
    Vec<T> d = f.of_g * slopes<T, kind>(p, c).g - p.s * of_s;
    if (f.cap) {
      const Vec<T> t = x * f.to_tanh;
      d = d * (T(1) - t * t);
    }
    if constexpr (out) d = p.out_s == T(1) ? Vec<T>{} : d;
    store(draw + v * ld_draw, d);
  }
}

template <class T, int kind>
static void gradient_of(const T* z, const T* zt, int64_t lines, int64_t columns, int64_t ld,
                        TwoLse<T> known, Measure by, const T* ddivergence, const T* slope,
                        Upstream<T> up, Transform<T> transform, T* draw, int64_t ld_draw) {
  constexpr int W = Simd<T>::width;
  const Constants<T> c = constants<T>(by);
  for (int64_t n = 0; n < columns; n += W) {
    const Known<T> k = known_at(known, n);
    const Vec<T> inv_temperature = load(up.inv_temperature + n);
    const Vec<T> to_product = inv_temperature * transform.scale;
    const Vec<T> of_divergence = load(ddivergence + n) * to_product;
    const bool cap = transform.softcap != T(0);
    const Factors<T> f{load(up.entropy + n),
                       load(up.dlogprobs + n) * to_product,
                       load(up.dentropy + n) * to_product,
                       of_divergence * load(slope + n),
                       of_divergence * T(by.factor),
                       cap ? T(1) / (inv_temperature * transform.softcap) : Vec<T>{},
                       cap};
    for (int64_t v0 = 0; v0 < lines; v0 += lines_of_sum) {
      const T *at = z + v0 * ld + n, *at_teacher = zt + v0 * ld + n;
      const int64_t count = v0 + lines_of_sum < lines ? lines_of_sum : lines - v0;
      T* to = draw + v0 * ld_draw + n;
      if (any_out<T>(at, at_teacher, count, ld)) {
        gradients_of<T, kind, true>(at, at_teacher, count, ld, k, c, f, to, ld_draw);
      } else {
        gradients_of<T, kind, false>(at, at_teacher, count, ld, k, c, f, to, ld_draw);
      }
    }
  }
}

template <class T>
void two_gradient(const T* z, const T* zt, int64_t lines, int64_t columns, int64_t ld,
                  TwoLse<T> known, Measure by, const T* ddivergence, const T* slope, Upstream<T> up,
                  Transform<T> transform, T* draw, int64_t ld_draw) {
  const auto run = [&] {
    switch (by.kind) {
      case reverse_kl: return gradient_of<T, reverse_kl>;
      case forward_kl: return gradient_of<T, forward_kl>;
      case jensen_shannon: return gradient_of<T, jensen_shannon>;
      case alpha_divergence: return gradient_of<T, alpha_divergence>;
      default: return gradient_of<T, total_variation>;
    }
  }();
  run(z, zt, lines, columns, ld, known, by, ddivergence, slope, up, transform, draw, ld_draw);
}

#define FUSED_RL_INSTANTIATE(T)                                                                 \
  template void two_sums(const T*, const T*, int64_t, int64_t, int64_t, TwoLse<T>, Measure,     \
                         double*, double*, double*);                                            \
  template void two_gradient(const T*, const T*, int64_t, int64_t, int64_t, TwoLse<T>, Measure, \
                             const T*, const T*, Upstream<T>, Transform<T>, T*, int64_t);
FUSED_RL_INSTANTIATE(float)
FUSED_RL_INSTANTIATE(double)

}  // namespace fused_rl::FUSED_RL_ISA
