// Vectors as wide as the instruction set this translation unit is compiled for, and exp on them.
//
// Plain vector extensions, no intrinsics and no fast-math: NaN and infinity keep their meaning,
// and the floating-point mode of the process is left alone.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#define FUSED_RL_VECTOR_BYTES 64
#elif defined(__AVX__)
#define FUSED_RL_VECTOR_BYTES 32
#else
#define FUSED_RL_VECTOR_BYTES 16
#endif

#define FUSED_RL_INLINE inline __attribute__((always_inline))

namespace fused_rl::FUSED_RL_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int width = FUSED_RL_VECTOR_BYTES / 4;
  typedef float vec __attribute__((vector_size(FUSED_RL_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(FUSED_RL_VECTOR_BYTES)));
  typedef uint16_t half_bits __attribute__((vector_size(FUSED_RL_VECTOR_BYTES / 2)));
  static constexpr int mantissa = 23;
  static constexpr uint32_t bias = 127;
  static constexpr float round_magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest = -87.f, highest = 88.f;  // exp stays a normal number in between
  static constexpr int terms = 7;
};

template <>
struct Simd<double> {
  static constexpr int width = FUSED_RL_VECTOR_BYTES / 8;
  typedef double vec __attribute__((vector_size(FUSED_RL_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(FUSED_RL_VECTOR_BYTES)));
  static constexpr int mantissa = 52;
  static constexpr uint64_t bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double lowest = -708.0, highest = 709.0;
  static constexpr int terms = 13;
};

template <class T>
using Vec = typename Simd<T>::vec;

template <class T>
FUSED_RL_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
FUSED_RL_INLINE void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof(v));
}

template <class T>
FUSED_RL_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// Comparisons with NaN are false, so a NaN in x passes through at_least and at_most.
template <class T>
FUSED_RL_INLINE Vec<T> at_least(Vec<T> x, T low) {
  const Vec<T> bound = splat<T>(low);
  return x < bound ? bound : x;
}

template <class T>
FUSED_RL_INLINE Vec<T> at_most(Vec<T> x, T high) {
  const Vec<T> bound = splat<T>(high);
  return x > bound ? bound : x;
}

template <class T>
struct ExpParts {
  Vec<T> power;  // 2^n
  Vec<T> rest;   // expm1(f), with x = n ln 2 + f and |f| <= ln(2) / 2
};

// exp(head + tail) = power * (1 + rest), where x is about their sum. x is clamped to where exp is a
// normal number; NaN stays NaN.
template <class T>
FUSED_RL_INLINE ExpParts<T> exp_parts(Vec<T> x, Vec<T> head, Vec<T> tail) {
  using S = Simd<T>;
  const Vec<T> shifted = x * T(1.44269504088896340736) + S::round_magic;
  const Vec<T> n = shifted - S::round_magic;
  const Vec<T> f = ((head - n * S::ln2_high) - n * S::ln2_low) + tail;
  // The Taylor series of (exp(f) - 1) / f; what it leaves out is under a quarter of an ulp.
  T factorial = 1;
  T inverse[S::terms + 1];
  for (int k = 1; k <= S::terms; ++k) {
    factorial *= T(k);
    inverse[k] = T(1) / factorial;
  }
  Vec<T> series = splat<T>(inverse[S::terms]);
#pragma GCC unroll 16
  for (int k = S::terms - 1; k >= 1; --k) series = series * f + inverse[k];
  typename S::bits magic, exponent;
  const Vec<T> magic_value = splat<T>(S::round_magic);
  std::memcpy(&magic, &magic_value, sizeof(magic));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent - magic + S::bias) << S::mantissa;
  Vec<T> power;
  std::memcpy(&power, &exponent, sizeof(power));
  return {power, f * series};
}

template <class T>
FUSED_RL_INLINE Vec<T> within_exp(Vec<T> x) {
  return at_most<T>(at_least<T>(x, Simd<T>::lowest), Simd<T>::highest);
}

// exp(head + tail), given x = head + tail rounded: 0 where that is below the normal numbers.
template <class T>
FUSED_RL_INLINE Vec<T> exp(Vec<T> x, Vec<T> head, Vec<T> tail) {
  const ExpParts<T> e = exp_parts<T>(within_exp<T>(x), head, tail);
  return x < splat<T>(Simd<T>::lowest) ? Vec<T>{} : e.power + e.power * e.rest;
}

template <class T>
FUSED_RL_INLINE Vec<T> exp(Vec<T> x) {
  return exp<T>(x, x, Vec<T>{});
}

// Exact to an ulp or two near 0, where exp(x) - 1 cancels.
template <class T>
FUSED_RL_INLINE Vec<T> expm1(Vec<T> x) {
  x = within_exp<T>(x);
  const ExpParts<T> e = exp_parts<T>(x, x, Vec<T>{});
  return e.power * e.rest + (e.power - T(1));
}

// Round to nearest even, NaN kept quiet.
FUSED_RL_INLINE Simd<float>::bits bfloat16_bits(Vec<float> x) {
  Simd<float>::bits u;
  std::memcpy(&u, &x, sizeof(u));
  const Simd<float>::bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded;
}

// Each to the nearest number of bfloat16, and to the nearest of float16, in float.
FUSED_RL_INLINE Vec<float> as_bfloat16(Vec<float> x) {
  const Simd<float>::bits u = bfloat16_bits(x) << 16;
  Vec<float> near;
  std::memcpy(&near, &u, sizeof(near));
  return near;
}

FUSED_RL_INLINE Vec<float> as_float16(Vec<float> x) {
  Simd<float>::bits u;
  std::memcpy(&u, &x, sizeof(u));
  const Simd<float>::bits sign = u & 0x80000000u, size = u ^ sign;
  // 13 bits fewer; below the normal numbers a multiple of 2^-24, which is an ulp of 1/2.
  const Simd<float>::bits fewer = (size + 0xfffu + ((size >> 13) & 1u)) & ~0x1fffu;
  Vec<float> magnitude, near;
  std::memcpy(&magnitude, &size, sizeof(magnitude));
  std::memcpy(&near, &fewer, sizeof(near));
  near = near > 65504.f ? splat<float>(std::numeric_limits<float>::infinity()) : near;
  near = magnitude < 0x1p-14f ? (magnitude + 0.5f) - 0.5f : near;
  std::memcpy(&u, &near, sizeof(u));
  u |= sign;
  std::memcpy(&near, &u, sizeof(near));
  return x == x ? near : x;
}

}  // namespace fused_rl::FUSED_RL_ISA
