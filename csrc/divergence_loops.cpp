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
  Probability<T> s, t;
  Vec<T> d;      // log s - log t: 0 where both are out, for 100 nats where one is
  Vec<T> delta;  // s - t
  Vec<T> e;      // expm1(-|d|)
  Vec<T> out_s, out_t;  // 1 where the logit is -inf
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

template <class T>
FUSED_RL_INLINE Pair<T> pair_of(Vec<T> z, Vec<T> zt, const Known<T>& k) {
  const T inf = std::numeric_limits<T>::infinity(), held = T(infinite_log_ratio);
  Pair<T> p;
  p.s = probability<T>(z, k.lse, k.lse_low);
  p.t = probability<T>(zt, k.teacher_lse, k.teacher_lse_low);
  const Vec<T> zero{}, one = splat<T>(1);
  p.out_s = z == -inf ? one : zero;
  p.out_t = zt == -inf ? one : zero;
  const Vec<T> d = ((z - zt) - k.gap) - k.gap_low;
  p.d = d == inf ? splat<T>(held) : (d == -inf ? splat<T>(-held) : d);
  p.d = p.out_s * p.out_t == T(1) ? zero : p.d;
  p.e = expm1<T>(p.d < T(0) ? p.d : -p.d);
  p.delta = (p.d < T(0) ? p.t.p : -p.s.p) * p.e;
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
  if constexpr (kind == reverse_kl) return {p.s.p * p.d, -p.delta};
  if constexpr (kind == forward_kl) return {p.delta, -p.t.p * p.d};
  if constexpr (kind == jensen_shannon) {
    const Vec<T> to_larger = log1p<T>((p.d < T(0) ? splat<T>(T(1) - a) : splat<T>(a)) * p.e);
    const Vec<T> to_s = p.d < T(0) ? to_larger - p.d : to_larger;
    return {(a - T(1)) * p.s.p * to_s, -a * p.t.p * (to_s + p.d)};
  }
  if constexpr (kind == alpha_divergence) {
    const Vec<T> d = at_most<T>(at_least<T>(p.d, -by.held), by.held);
    return {p.s.p * expm1<T>(d * (a - T(1))) / (a - T(1)), -p.t.p * expm1<T>(d * a) / a};
  }
  const Vec<T> zero{}, half = splat<T>(T(0.5));
  const Vec<T> sign = p.d > zero ? half : (p.d < zero ? -half : p.d);
  return {p.s.p * sign, -p.t.p * sign};
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

template <class T, int kind>
static void sums_of(const T* z, const T* zt, int64_t lines, int64_t columns, int64_t ld,
                    TwoLse<T> known, Measure by, double* total, double* g_sum, double* teacher) {
  constexpr int W = Simd<T>::width;
  const Constants<T> c = constants<T>(by);
  const Infinite infinite(by);
  const T factor = T(by.factor), inf = std::numeric_limits<T>::infinity();
  const Vec<T> zero{};
  for (int64_t n = 0; n < columns; n += W) {
    const Known<T> k = known_at(known, n);
    for (int64_t v0 = 0; v0 < lines; v0 += lines_of_sum) {
      const int64_t v1 = v0 + lines_of_sum < lines ? v0 + lines_of_sum : lines;
      Vec<T> sum{}, g{}, of_teacher{};
      for (int64_t v = v0; v < v1; ++v) {
        const Pair<T> p = pair_of<T>(load(z + v * ld + n), load(zt + v * ld + n), k);
        const Slopes<T> by_side = slopes<T, kind>(p, c);
        Vec<T> term = by_side.g + by_side.teacher;
        if (infinite.student) term = p.out_t > p.out_s ? zero + inf : term;
        if (infinite.teacher) term = p.out_s > p.out_t ? zero + inf : term;
        sum += term;
        g += by_side.g;
        of_teacher += by_side.teacher;
      }
      for (int i = 0; i < W; ++i) {
        total[n + i] += double(factor * sum[i]);
        g_sum[n + i] += double(factor * g[i]);
        teacher[n + i] += double(factor * of_teacher[i]);
      }
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

template <class T, int kind>
static void gradient_of(const T* z, const T* zt, int64_t lines, int64_t columns, int64_t ld,
                        TwoLse<T> known, Measure by, const T* ddivergence, const T* slope,
                        Upstream<T> up, Transform<T> transform, T* draw, int64_t ld_draw) {
  constexpr int W = Simd<T>::width;
  const Constants<T> c = constants<T>(by);
  const Vec<T> zero{};
  for (int64_t n = 0; n < columns; n += W) {
    const Known<T> k = known_at(known, n);
    const Vec<T> inv_temperature = load(up.inv_temperature + n);
    const Vec<T> to_product = inv_temperature * transform.scale;
    const Vec<T> entropy = load(up.entropy + n);
    const Vec<T> dlogprob = load(up.dlogprobs + n) * to_product;
    const Vec<T> dentropy = load(up.dentropy + n) * to_product;
    const Vec<T> of_sum = load(ddivergence + n) * to_product * load(slope + n);
    const Vec<T> of_g = load(ddivergence + n) * to_product * T(by.factor);
    const bool cap = transform.softcap != T(0);
    const Vec<T> to_tanh = cap ? T(1) / (inv_temperature * transform.softcap) : zero;
    for (int64_t v = 0; v < lines; ++v) {
      const Vec<T> x = load(z + v * ld + n);
      const Pair<T> p = pair_of<T>(x, load(zt + v * ld + n), k);
      // What comes of log s: of the label, the entropy and the sum of the slopes.
      const Vec<T> of_s = dlogprob + dentropy * (p.s.logp + entropy) + of_sum;
      Vec<T> d = of_g * slopes<T, kind>(p, c).g - p.s.p * of_s;
      if (cap) {
        const Vec<T> t = x * to_tanh;
        d = d * (T(1) - t * t);
      }
      store(draw + v * ld_draw + n, p.out_s == T(1) ? zero : d);
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
