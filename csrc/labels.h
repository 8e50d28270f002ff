// What every op does with labels, and with the running softmax of a row once it is complete.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>

namespace fused_rl {

inline void check_labels(const at::Tensor& labels, int64_t V, std::optional<int64_t> ignore_index) {
  const at::Tensor y = labels.contiguous();
  const int64_t* label = y.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < y.numel(); ++n) {
    if ((label[n] >= 0 && label[n] < V) || label[n] == ignore_index) continue;
    TORCH_CHECK_VALUE(ignore_index, "labels[", n, "] is ", label[n],
                      ", outside the vocabulary [0, ", V, ")");
    TORCH_CHECK_VALUE(false, "labels[", n, "] is ", label[n], ", outside the vocabulary [0, ", V,
                      ") and not ignore_index (", *ignore_index, ")");
  }
}

inline void check_temperature(double temperature, int64_t n) {
  TORCH_CHECK_VALUE(temperature > 0, "temperature[", n, "] is ", temperature,
                    ", and a temperature must be positive");
}

// lse is kept in double whatever T: its rounding would be a relative error of every p of the row.
template <class T>
struct Statistics {
  T logprob, entropy, top;
  double lse, log_sum;
};

// lse as a sum of two, from which log p = (z - high) - low keeps its digits. Logits so large that they
// lie 64 apart or more leave log_sum no place in lse = max + log_sum. But then only those that tie
// with the largest have a probability, so that log_sum is the entropy, and lse rounds to the largest.
template <class T>
struct SplitLse {
  static constexpr double apart = 128.0 / std::numeric_limits<T>::epsilon();
  T high, low;

  SplitLse(T max, T log_sum) : high(max), low(log_sum) {}
  static SplitLse of(double lse, T entropy) {
    const T high = T(lse);
    return {high, std::abs(lse) < apart ? T(lse - double(high)) : entropy};
  }
  // Whether lse left out digits of log_sum that a double has room for beside a smaller lse.
  bool lost() const {
    const double size = std::abs(double(high));
    return std::is_same_v<T, double> && size >= 1024 && size < apart;
  }
};

// z - lse in steps that lose no digits, however large the logits are.
template <class T>
T log_probability(double z, double max, double log_sum) {
  return T((z - max) - log_sum);
}

// sum = sum_v exp(z - max), moment = sum_v exp(z - max) (z - max). A row of nothing but -inf has no
// distribution: NaN, as in torch. top, the log-probability of the most likely token, is rounded as
// that of the label is: the two are equal where the label has the largest logit.
template <class T>
Statistics<T> finish(double max, double sum, double moment, double label_logit) {
  const double log_sum = std::log(sum);
  const bool empty = max == -std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double entropy = empty ? nan : log_sum - moment / sum;
  const double top = empty ? nan : 0.0 - log_sum;
  return {log_probability<T>(label_logit, max, log_sum), T(entropy), T(top), max + log_sum, log_sum};
}

}  // namespace fused_rl
