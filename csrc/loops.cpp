// Compiled once per instruction set, with FUSED_RL_ISA naming the set. No ATen in here: an inline
// function of a shared header, compiled for a newer CPU, could be the copy that the linker keeps.
#include "loops.h"

#include "simd.h"
#include "softmax.h"

namespace fused_rl::FUSED_RL_ISA {

FUSED_RL_INLINE Vec<float> rounded(Vec<float> x, int64_t rounding) {
  return rounding == to_bfloat16 ? as_bfloat16(x) : as_float16(x);
}

// By way of float, as torch converts.
FUSED_RL_INLINE Vec<double> rounded(Vec<double> x, int64_t rounding) {
  typedef float part __attribute__((vector_size(sizeof(Vec<double>) / 2)));
  part narrow = __builtin_convertvector(x, part);
  Vec<float> padded{};
  std::memcpy(&padded, &narrow, sizeof(narrow));
  padded = rounded(padded, rounding);
  std::memcpy(&narrow, &padded, sizeof(narrow));
  return __builtin_convertvector(narrow, Vec<double>);
}

template <class T>
static void transform(T* z, int64_t lines, int64_t columns, int64_t ld, const T* bias,
                      const T* inv_temperature, Transform<T> by) {
  constexpr int W = Simd<T>::width;
  for (int64_t v = 0; v < lines; ++v) {
    const T shift = bias ? bias[v] : T(0);
    for (int64_t n = 0; n < columns; n += W) {
      T* at = z + v * ld + n;
      Vec<T> x = load(at) + shift;
      if (by.rounding != no_rounding) x = rounded(x, by.rounding);
      x *= by.scale;
      if (by.softcap != T(0)) {
        // tanh(u) = -expm1(-2u) / (expm1(-2u) + 2), on |u| so that nothing overflows.
        const Vec<T> u = x / by.softcap;
        const Vec<T> magnitude = u < T(0) ? -u : u;
        const Vec<T> e = expm1<T>(magnitude * T(-2));
        const Vec<T> t = -e / (e + T(2));
        x = (u < T(0) ? -t : t) * by.softcap;
      }
      store(at, x * load(inv_temperature + n));
    }
  }
}

template <class T>
struct State {
  Vec<T> max, sum, moment;
};

// Where every logit so far is -inf the reference point is 0, so that -inf - max is not NaN.
template <class T>
FUSED_RL_INLINE Vec<T> reference_point(Vec<T> max) {
  return max == -std::numeric_limits<T>::infinity() ? Vec<T>{} : max;
}

// Returns exp(z - reference).
template <class T>
FUSED_RL_INLINE Vec<T> add_logit(State<T>& s, Vec<T> z, Vec<T> reference) {
  const Vec<T> d = z - reference, p = exp<T>(d);
  s.sum += p;
  s.moment += p * at_least<T>(d, Simd<T>::lowest);
  return p;
}

// How many terms go into one sum: a sum that holds p = 1 loses the last digits of what comes after.
static constexpr int64_t terms_of_sum = 16;

// logit(v) for v in [0, count), added to s in short sums.
template <class T, class F>
FUSED_RL_INLINE void add_logits(State<T>& s, int64_t count, Vec<T> reference, const F& logit) {
  for (int64_t v0 = 0; v0 < count; v0 += terms_of_sum) {
    const int64_t v1 = v0 + terms_of_sum < count ? v0 + terms_of_sum : count;
    State<T> part{};
    for (int64_t v = v0; v < v1; ++v) add_logit<T>(part, logit(v), reference);
    s.sum += part.sum;
    s.moment += part.moment;
  }
}

// (max, sum, moment) seen from a new reference point.
template <class T>
FUSED_RL_INLINE void rescale(State<T>& s, Vec<T> reference) {
  const Vec<T> d = s.max - reference, factor = exp<T>(d);
  s.moment = factor * (s.moment + at_least<T>(d, Simd<T>::lowest) * s.sum);
  s.sum = factor * s.sum;
}

template <class T>
FUSED_RL_INLINE Vec<T> largest_of(const T* z, int64_t lines, int64_t ld) {
  Vec<T> max = splat<T>(-std::numeric_limits<T>::infinity());
  for (int64_t v = 0; v < lines; ++v) {
    const Vec<T> x = load(z + v * ld);
    max = x > max ? x : max;
  }
  return max;
}

template <class T>
FUSED_RL_INLINE State<T> load_state(Running<T> run, int64_t n) {
  return {load(run.max + n), load(run.sum + n), load(run.moment + n)};
}

template <class T>
FUSED_RL_INLINE void store_state(const State<T>& s, Running<T> run, int64_t n) {
  store(run.max + n, s.max);
  store(run.sum + n, s.sum);
  store(run.moment + n, s.moment);
}

template <class T>
FUSED_RL_INLINE void merge_state(State<T> tile, Running<T> run, int64_t n) {
  State<T> all = load_state(run, n);
  const Vec<T> max = tile.max > all.max ? tile.max : all.max, reference = reference_point<T>(max);
  rescale<T>(all, reference);
  rescale<T>(tile, reference);
  store_state<T>({max, all.sum + tile.sum, all.moment + tile.moment}, run, n);
}

template <class T>
static void accumulate(const T* z, int64_t lines, int64_t columns, int64_t ld, Running<T> run,
                       T* largest) {
  for (int64_t n = 0; n < columns; n += Simd<T>::width) {
    State<T> tile{largest_of(z + n, lines, ld), Vec<T>{}, Vec<T>{}};
    if (largest) {
      const Vec<T> before = load(largest + n);
      store(largest + n, tile.max > before ? tile.max : before);
    }
    add_logits<T>(tile, lines, reference_point<T>(tile.max),
                  [&](int64_t v) { return load(z + v * ld + n); });
    merge_state(tile, run, n);
  }
}

// term(z) of the logits of a column, summed in short sums.
template <class T, class F>
FUSED_RL_INLINE Vec<T> summed(const T* z, int64_t lines, int64_t ld, const F& term) {
  Vec<T> sum{};
  for (int64_t v0 = 0; v0 < lines; v0 += terms_of_sum) {
    const int64_t v1 = v0 + terms_of_sum < lines ? v0 + terms_of_sum : lines;
    Vec<T> part{};
    for (int64_t v = v0; v < v1; ++v) part += term(load(z + v * ld));
    sum += part;
  }
  return sum;
}

template <class T>
static void squares(const T* z, int64_t lines, int64_t columns, int64_t ld, T* max, T* sum) {
  for (int64_t n = 0; n < columns; n += Simd<T>::width) {
    const Vec<T> before = load(max + n), of_tile = largest_of(z + n, lines, ld);
    const Vec<T> now = of_tile > before ? of_tile : before, reference = reference_point<T>(now);
    const Vec<T> factor = exp<T>(before - reference);
    const Vec<T> added = summed<T>(z + n, lines, ld, [&](Vec<T> x) {
      const Vec<T> e = exp<T>(x - reference);
      return e * e;
    });
    store(sum + n, factor * factor * load(sum + n) + added);
    store(max + n, now);
  }
}

template <class T>
static void column_sums(const T* z, int64_t lines, int64_t columns, int64_t ld, T* sum) {
  for (int64_t n = 0; n < columns; n += Simd<T>::width) {
    store(sum + n, load(sum + n) + summed<T>(z + n, lines, ld, [](Vec<T> x) { return x; }));
  }
}

template <class T>
static void largest(const T* z, int64_t lines, int64_t columns, int64_t ld, T* max) {
  for (int64_t n = 0; n < columns; n += Simd<T>::width) store(max + n, largest_of(z + n, lines, ld));
}

template <class T>
static void merge(Running<T> tile, int64_t columns, Running<T> run) {
  for (int64_t n = 0; n < columns; n += Simd<T>::width) {
    merge_state(load_state(tile, n), run, n);
  }
}

// The reference of columns whose largest logits these are, and exp(max - reference).
template <class T>
FUSED_RL_INLINE Vec<T> refer(Vec<T> max, double* reference) {
  using S = Simd<T>;
  constexpr double ln2 = 0.69314718055994530942;
  const T limit = 65536;
  const Vec<T> inside = at_most<T>(at_least<T>(max, -limit), limit);
  const Vec<T> x = inside * T(1 / (16 * ln2));
  const Vec<T> near = (x + S::round_magic) - S::round_magic;
  const Vec<T> bits = (near < x ? near + T(1) : near) * T(16);
  const Vec<T> head = inside - bits * S::ln2_high, tail = bits * -S::ln2_low;
  for (int i = 0; i < S::width; ++i) {
    reference[i] = max[i] == inside[i] ? double(bits[i]) * ln2 : double(max[i]);
  }
  return max == inside ? exp<T>(head + tail, head, tail) : splat<T>(1);
}

template <class T>
static void exponentials(T* z, int64_t lines, int64_t columns, int64_t ld, const T* inv_temperature,
                         Transform<T> by, Running<T> out, double* reference) {
  for (int64_t n = 0; n < columns; n += Simd<T>::width) {
    State<T> tile{largest_of(z + n, lines, ld), Vec<T>{}, Vec<T>{}};
    const Vec<T> origin = reference_point<T>(tile.max);
    const Vec<T> factor = refer<T>(tile.max, reference + n);
    const bool capped = by.softcap != T(0);
    const Vec<T> to_tanh = T(1) / (load(inv_temperature + n) * (capped ? by.softcap : T(1)));
    for (int64_t v0 = 0; v0 < lines; v0 += terms_of_sum) {
      const int64_t v1 = v0 + terms_of_sum < lines ? v0 + terms_of_sum : lines;
      State<T> part{};
      for (int64_t v = v0; v < v1; ++v) {
        T* const at = z + v * ld + n;
        const Vec<T> x = load(at);
        Vec<T> e = add_logit<T>(part, x, origin) * factor;
        if (capped) {
          const Vec<T> t = x * to_tanh;
          e *= T(1) - t * t;
        }
        store(at, e);
      }
      tile.sum += part.sum;
      tile.moment += part.moment;
    }
    store_state(tile, out, n);
  }
}

template <class T>
static void gradient(const T* z, int64_t lines, int64_t columns, int64_t ld, Upstream<T> up,
                     Transform<T> by, T* draw, int64_t ld_draw) {
  constexpr int W = Simd<T>::width;
  for (int64_t n = 0; n < columns; n += W) {
    const Vec<T> inv_temperature = load(up.inv_temperature + n);
    const Vec<T> slope = inv_temperature * by.scale;
    const Vec<T> lse = load(up.lse + n), lse_low = load(up.lse_low + n);
    const Vec<T> entropy = load(up.entropy + n);
    const Vec<T> dlogprob = load(up.dlogprobs + n) * slope;
    const Vec<T> dentropy = load(up.dentropy + n) * slope;
    const T* from = z + n;
    T* to = draw + n;
    if (by.softcap != T(0)) {
      // d softcap(x) / dx = 1 - tanh(x / c)^2, and tanh(x / c) = z temperature / c.
      const Vec<T> to_tanh = T(1) / (inv_temperature * by.softcap);
      for (int64_t v = 0; v < lines; ++v) {
        const Vec<T> x = load(from + v * ld), t = x * to_tanh;
        const Vec<T> d = softmax_gradient<T>(x, lse, lse_low, entropy, dlogprob, dentropy);
        store(to + v * ld_draw, d * (T(1) - t * t));
      }
    } else if (up.has_dentropy) {
      for (int64_t v = 0; v < lines; ++v) {
        const Vec<T> x = load(from + v * ld);
        store(to + v * ld_draw, softmax_gradient<T>(x, lse, lse_low, entropy, dlogprob, dentropy));
      }
    } else {
      for (int64_t v = 0; v < lines; ++v) {
        store(to + v * ld_draw, probability<T>(load(from + v * ld), lse, lse_low).p * -dlogprob);
      }
    }
  }
}

// As many numbers as a vector of doubles has.
template <class T>
FUSED_RL_INLINE Vec<double> widened(const T* from) {
  typedef T part __attribute__((vector_size(Simd<double>::width * sizeof(T))));
  part narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, Vec<double>);
}

template <class T>
static void line_sums(const T* z, int64_t lines, int64_t columns, int64_t ld, double* sums) {
  constexpr int W = Simd<double>::width;
  for (int64_t v = 0; v < lines; ++v) {
    Vec<double> total{};
    for (int64_t n = 0; n < columns; n += W) total += widened(z + v * ld + n);
    double sum = 0;
    for (int i = 0; i < W; ++i) sum += total[i];
    sums[v] = sum;
  }
}

// Divided, not multiplied by a reciprocal: one rounding instead of two.
template <class T, bool divide>
FUSED_RL_INLINE Vec<T> at_temperature(Vec<T> z, T temperature) {
  if constexpr (divide) return z / temperature;
  return z;
}

template <class T, bool divide>
static void row_statistics_of(const T* logits, int64_t V, T temperature, T* max_out, T* sum_out,
                              T* moment_out) {
  constexpr int W = Simd<T>::width;
  constexpr int64_t block = 4096 / W * W;
  const T minus_inf = -std::numeric_limits<T>::infinity();
  State<T> s{splat<T>(0) + minus_inf, Vec<T>{}, Vec<T>{}};
  const int64_t whole = V / W * W;
  alignas(64) T tail[W];
  for (int i = 0; i < W; ++i) tail[i] = whole + i < V ? logits[whole + i] : minus_inf;
  const int64_t padded = whole < V ? whole + W : whole;
  const auto logit = [&](int64_t v) {
    return at_temperature<T, divide>(load(v < whole ? logits + v : tail), temperature);
  };
  for (int64_t v0 = 0; v0 < padded; v0 += block) {
    const int64_t v1 = v0 + block < padded ? v0 + block : padded;
    Vec<T> max = s.max;
    for (int64_t v = v0; v < v1; v += W) {
      const Vec<T> z = logit(v);
      max = z > max ? z : max;
    }
    const Vec<T> reference = reference_point<T>(max);
    State<T> here{max, Vec<T>{}, Vec<T>{}};
    add_logits<T>(here, (v1 - v0) / W, reference, [&](int64_t i) { return logit(v0 + i * W); });
    rescale<T>(s, reference);
    s = {max, s.sum + here.sum, s.moment + here.moment};
  }
  T max = minus_inf;
  for (int i = 0; i < W; ++i) max = s.max[i] > max ? s.max[i] : max;
  rescale<T>(s, reference_point<T>(splat<T>(0) + max));
  T sum = 0, moment = 0;
  for (int i = 0; i < W; ++i) {
    sum += s.sum[i];
    moment += s.moment[i];
  }
  *max_out = max;
  *sum_out = sum;
  *moment_out = moment;
}

template <class T>
static void row_statistics(const T* logits, int64_t V, T temperature, T* max, T* sum, T* moment) {
  const auto run = temperature == T(1) ? row_statistics_of<T, false> : row_statistics_of<T, true>;
  run(logits, V, temperature, max, sum, moment);
}

template <class T, bool divide>
static void row_gradient_of(const T* logits, int64_t V, T temperature, T lse, T lse_low, T entropy,
                            T dlogprob, T dentropy, T* dlogits) {
  constexpr int W = Simd<T>::width;
  const Vec<T> l = splat<T>(lse), low = splat<T>(lse_low), e = splat<T>(entropy);
  const Vec<T> g = splat<T>(dlogprob / temperature), h = splat<T>(dentropy / temperature);
  const auto gradient_at = [&](const T* at) {
    const Vec<T> z = at_temperature<T, divide>(load(at), temperature);
    return softmax_gradient<T>(z, l, low, e, g, h);
  };
  int64_t v = 0;
  for (; v + W <= V; v += W) store(dlogits + v, gradient_at(logits + v));
  if (v < V) {
    alignas(64) T tail[W] = {};
    std::memcpy(tail, logits + v, (V - v) * sizeof(T));
    store(tail, gradient_at(tail));
    std::memcpy(dlogits + v, tail, (V - v) * sizeof(T));
  }
}

template <class T>
static void row_gradient(const T* logits, int64_t V, T temperature, T lse, T lse_low, T entropy,
                         T dlogprob, T dentropy, T* dlogits) {
  const auto run = temperature == T(1) ? row_gradient_of<T, false> : row_gradient_of<T, true>;
  run(logits, V, temperature, lse, lse_low, entropy, dlogprob, dentropy, dlogits);
}

template <class T>
struct Dual {
  Vec<T> value, slope;
};

// The estimators of KL(policy, reference) at d = logprob - ref_logprob. k3's exponent is held at
// 20 nats: the value stays finite, and the slope is the one at the bound, not 0.
template <class T>
FUSED_RL_INLINE Dual<T> k1(Vec<T> d) {
  return {d, splat<T>(1)};
}
template <class T>
FUSED_RL_INLINE Dual<T> k2(Vec<T> d) {
  return {T(0.5) * d * d, d};
}
template <class T>
FUSED_RL_INLINE Dual<T> k3(Vec<T> d) {
  const Vec<T> e = expm1<T>(at_most<T>(-d, T(20)));
  // e >= -d for every real d; rounding must not make the estimate negative.
  return {at_least<T>(e + d, T(0)), -e};
}
template <class T>
FUSED_RL_INLINE Dual<T> absolute(Vec<T> d) {
  const Vec<T> zero{};
  const Vec<T> sign = d > zero ? splat<T>(1) : (d < zero ? splat<T>(-1) : d);
  return {d < zero ? -d : d, sign};
}

template <class T>
FUSED_RL_INLINE Dual<T> kl_estimator(Vec<T> d, int64_t kind) {
  switch (kind) {
    case 1: return k1<T>(d);
    case 2: return k2<T>(d);
    case 3: return k3<T>(d);
    default: return absolute<T>(d);
  }
}

template <class T>
static void kl(const T* d, int64_t n, int64_t value_kind, int64_t slope_kind, T* value, T* slope) {
  constexpr int W = Simd<T>::width;
  for (int64_t i = 0; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    alignas(64) T in[W] = {}, out[W], out_slope[W];
    std::memcpy(in, d + i, count * sizeof(T));
    store(out, kl_estimator<T>(load(in), value_kind).value);
    store(out_slope, kl_estimator<T>(load(in), slope_kind).slope);
    std::memcpy(value + i, out, count * sizeof(T));
    std::memcpy(slope + i, out_slope, count * sizeof(T));
  }
}

template <class T>
static void add_scaled(const T* x, int64_t n, T factor, T* sum) {
  constexpr int W = Simd<T>::width;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(sum + i, load(sum + i) + load(x + i) * factor);
  for (; i < n; ++i) sum[i] += x[i] * factor;
}

static FUSED_RL_INLINE Vec<float> widened(Simd<float>::half_bits half) {
  const auto bits = __builtin_convertvector(half, Simd<float>::bits) << 16;
  Vec<float> wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

static void add_scaled_bfloat16(const uint16_t* x, int64_t n, float factor, float* sum) {
  constexpr int W = Simd<float>::width;
  using Half = Simd<float>::half_bits;
  Half half;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    std::memcpy(&half, x + i, sizeof(half));
    store(sum + i, load(sum + i) + widened(half) * factor);
  }
  if (i < n) {
    half = Half{};
    std::memcpy(&half, x + i, (n - i) * sizeof(uint16_t));
    const Vec<float> rest = widened(half) * factor;
    for (int k = 0; i + k < n; ++k) sum[i + k] += rest[k];
  }
}

static void narrow(const float* from, int64_t n, uint16_t* to) {
  constexpr int W = Simd<float>::width;
  using Half = Simd<float>::half_bits;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Half half = __builtin_convertvector(bfloat16_bits(load(from + i)), Half);
    std::memcpy(to + i, &half, sizeof(half));
  }
  if (i < n) {
    alignas(64) float tail[W] = {};
    std::memcpy(tail, from + i, (n - i) * sizeof(float));
    const Half half = __builtin_convertvector(bfloat16_bits(load(tail)), Half);
    std::memcpy(to + i, &half, (n - i) * sizeof(uint16_t));
  }
}

// Bits of a float's mantissa that exponentials in sixteen bits are without.
static constexpr int dropped = 14;

static void short_exponentials(const float* z, int64_t lines, int64_t columns, Running<float> out,
                               uint16_t* e) {
  using Half = Simd<float>::half_bits;
  for (int64_t n = 0; n < columns; n += Simd<float>::width) {
    State<float> tile{largest_of(z + n, lines, columns), Vec<float>{}, Vec<float>{}};
    int64_t at = n;
    const Vec<float> origin = reference_point<float>(tile.max);
    for (int64_t v0 = 0; v0 < lines; v0 += terms_of_sum) {
      const int64_t v1 = v0 + terms_of_sum < lines ? v0 + terms_of_sum : lines;
      State<float> part{};
      for (int64_t v = v0; v < v1; ++v, at += columns) {
        const Vec<float> p = add_logit<float>(part, load(z + at), origin);
        Simd<float>::bits u;
        std::memcpy(&u, &p, sizeof(u));
        u = (u + ((1u << (dropped - 1)) - 1) + ((u >> dropped) & 1u)) >> dropped;
        const Half half = __builtin_convertvector(u, Half);
        std::memcpy(e + at, &half, sizeof(half));
      }
      tile.sum += part.sum;
      tile.moment += part.moment;
    }
    store_state(tile, out, n);
  }
}

static void scaled(const uint16_t* e, int64_t lines, int64_t columns, const float* factor, float* to) {
  for (int64_t v = 0; v < lines; ++v) {
    for (int64_t n = 0; n < columns; n += Simd<float>::width) {
      Simd<float>::half_bits half;
      std::memcpy(&half, e + v * columns + n, sizeof(half));
      const Simd<float>::bits u = __builtin_convertvector(half, Simd<float>::bits) << dropped;
      Vec<float> p;
      std::memcpy(&p, &u, sizeof(p));
      store(to + v * columns + n, p * load(factor + n));
    }
  }
}

// The sum of n products, product(i, count) giving those from i on in a vector: short sums in T, added
// up in double.
template <class T, class F>
static FUSED_RL_INLINE double sum_of_products(int64_t n, const F& product) {
  constexpr int W = Simd<T>::width;
  constexpr int64_t step = 64 * W;
  double total = 0;
  for (int64_t first = 0; first < n; first += step) {
    const int64_t last = first + step < n ? first + step : n;
    Vec<T> sums[4] = {};
    int64_t i = first;
    for (; i + 4 * W <= last; i += 4 * W) {
      for (int j = 0; j < 4; ++j) sums[j] += product(i + j * W, W);
    }
    for (; i < last; i += W) sums[0] += product(i, last - i < W ? int(last - i) : W);
    const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int j = 0; j < W; ++j) total += double(sum[j]);
  }
  return total;
}

// Some of the numbers from x on, and zeros.
template <class V, class T>
static FUSED_RL_INLINE V load_some(const T* x, int count) {
  V out = {};
  std::memcpy(&out, x, count * sizeof(T));
  return out;
}

template <class T>
static double dot(const T* x, const T* y, int64_t n) {
  return sum_of_products<T>(n, [&](int64_t i, int count) {
    if (count == Simd<T>::width) return load(x + i) * load(y + i);
    return load_some<Vec<T>>(x + i, count) * load_some<Vec<T>>(y + i, count);
  });
}

static double dot_bfloat16(const uint16_t* x, const float* y, int64_t n) {
  using Half = Simd<float>::half_bits;
  return sum_of_products<float>(n, [&](int64_t i, int count) {
    const auto half = load_some<Half>(x + i, count);
    if (count == Simd<float>::width) return widened(half) * load(y + i);
    return widened(half) * load_some<Vec<float>>(y + i, count);
  });
}

// divergence_loops.cpp
template <class T>
void two_sums(const T*, const T*, int64_t, int64_t, int64_t, TwoLse<T>, Measure, double*, double*,
              double*);
template <class T>
void two_gradient(const T*, const T*, int64_t, int64_t, int64_t, TwoLse<T>, Measure, const T*,
                  const T*, Upstream<T>, Transform<T>, T*, int64_t);

template <class T>
static constexpr Loops<T> table() {
  return {transform<T>,      accumulate<T>, exponentials<T>, squares<T>,
          column_sums<T>,    largest<T>,    merge<T>,        gradient<T>,
          line_sums<T>,      row_statistics<T>, row_gradient<T>, kl<T>,
          add_scaled<T>,     dot<T>,        two_sums<T>,     two_gradient<T>};
}

extern const Loops<float> float_loops;
extern const Loops<double> double_loops;
extern const BFloat16Loops bfloat16_loops;
const Loops<float> float_loops = table<float>();
const Loops<double> double_loops = table<double>();
const BFloat16Loops bfloat16_loops = {narrow, short_exponentials, scaled, add_scaled_bfloat16,
                                       dot_bfloat16};

}  // namespace fused_rl::FUSED_RL_ISA
