// The probability of a logit and the gradient of a softmax, on vectors.
#pragma once

#include "simd.h"

namespace fused_rl::FUSED_RL_ISA {

template <class T>
struct Probability {
  Vec<T> p, logp;
};

// The rounding of z - lse would be a relative error of p, the larger the smaller p is. Where
// |z| <= |lse| it is z - ((z - lse) + lse), exactly, and elsewhere it is lost in that of z.
template <class T>
FUSED_RL_INLINE Probability<T> probability(Vec<T> z, Vec<T> lse, Vec<T> lse_low) {
  const Vec<T> d = z - lse, logp = d - lse_low;
  const Vec<T> rest = (z - (d + lse)) - lse_low;
  return {exp<T>(logp, d, rest), at_least<T>(logp, Simd<T>::lowest)};
}

// d(logprob)/dz = 1[label] - p and d(entropy)/dz = -p (log p + entropy); the 1[label] is left out.
template <class T>
FUSED_RL_INLINE Vec<T> softmax_gradient(Vec<T> z, Vec<T> lse, Vec<T> lse_low, Vec<T> entropy,
                                        Vec<T> dlogprob, Vec<T> dentropy) {
  const Probability<T> of_z = probability<T>(z, lse, lse_low);
  return -of_z.p * (dlogprob + dentropy * (of_z.logp + entropy));
}

}  // namespace fused_rl::FUSED_RL_ISA
