// Rearranging operands into the layouts that tile_matmul reads.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

namespace fused_rl {

// A buffer for one thread, on a cache-line boundary. Throws std::bad_alloc where there is no memory.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), line))) {}
  T* data() { return data_.get(); }

 private:
  static constexpr std::align_val_t line{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, line); }
  };
  std::unique_ptr<T, Free> data_;
};

template <size_t bytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};

// to[c * ld_to + r] = from[r * ld_from + c], in 8 x 8 blocks so that each line is touched once.
template <class T>
void transpose(const T* from, int64_t ld_from, int64_t rows, int64_t columns, T* to,
               int64_t ld_to) {
  using word = typename Word<sizeof(T)>::type;
  typedef word vec __attribute__((vector_size(8 * sizeof(word))));
  const word* in = reinterpret_cast<const word*>(from);
  word* out = reinterpret_cast<word*>(to);
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t c = 0; c < whole_columns; c += 8) {
    for (int64_t r = 0; r < whole_rows; r += 8) {
      vec a[8], b[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&a[i], in + (r + i) * ld_from + c, sizeof(vec));
      for (int i = 0; i < 4; ++i) {
        b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
      }
      for (int i = 0; i < 4; ++i) {
        a[2 * i] = __builtin_shufflevector(b[i], b[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        a[2 * i + 1] = __builtin_shufflevector(b[i], b[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
      }
      for (int i = 0; i < 4; ++i) {
        b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
      }
      for (int i = 0; i < 8; ++i) std::memcpy(out + (c + i) * ld_to + r, &b[i], sizeof(vec));
    }
    for (int64_t r = whole_rows; r < rows; ++r) {
      for (int64_t i = c; i < c + 8; ++i) out[i * ld_to + r] = in[r * ld_from + i];
    }
  }
  for (int64_t c = whole_columns; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * ld_to + r] = in[r * ld_from + c];
  }
}

// Tokens n0 .. n0 + width of hidden [N, K] as the operand [K, width], zeros beyond N.
// bf16: K counts pairs of lines, so a pair of neighbours in a row moves as one 32-bit word.
template <class T>
void pack_transposed(const T* hidden, int64_t K, int64_t N, int64_t n0, int64_t width, T* to) {
  using word = typename Word<sizeof(T) * (std::is_same_v<T, c10::BFloat16> ? 2 : 1)>::type;
  const int64_t words = K * sizeof(T) / sizeof(word);
  const int64_t count = std::clamp<int64_t>(N - n0, 0, width);
  word* out = reinterpret_cast<word*>(to);
  transpose(reinterpret_cast<const word*>(hidden) + n0 * words, words, count, words, out, width);
  for (int64_t k = 0; k < words && count < width; ++k) {
    std::memset(out + k * width + count, 0, (width - count) * sizeof(word));
  }
}

// Columns h0 .. h0 + 64 of hidden [N, K] as the operand [tokens, 64], zeros beyond N and K.
template <class T>
void pack_columns(const T* hidden, int64_t K, int64_t N, int64_t tokens, int64_t h0, T* to) {
  constexpr int64_t pack = std::is_same_v<T, c10::BFloat16> ? 2 : 1;
  const int64_t width = std::min<int64_t>(64, K - h0);
  std::memset(static_cast<void*>(to), 0, tokens * 64 * sizeof(T));
  for (int64_t n = 0; n < N; ++n) {
    T* line = to + (n / pack) * 64 * pack + n % pack;
    for (int64_t h = 0; h < width; ++h) line[h * pack] = hidden[n * K + h0 + h];
  }
}

}  // namespace fused_rl
