// Rearranging tiles and lines into operands; compiled once per instruction set, as loops.cpp is.
#include <utility>

#include "loops.h"
#include "simd.h"

namespace fused_rl::FUSED_RL_ISA {

using Words = Simd<float>::bits;
using Halves = Simd<float>::half_bits;
static constexpr int W = Simd<float>::width;

FUSED_RL_INLINE Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}
FUSED_RL_INLINE void store_words(void* to, Words words) { std::memcpy(to, &words, sizeof(words)); }
FUSED_RL_INLINE Words load_halves(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return __builtin_convertvector(halves, Words);
}

// The lanes of a and b in turn: those of the first half, or of the second.
template <int... i>
FUSED_RL_INLINE Words zip(Words a, Words b, bool second, std::integer_sequence<int, i...>) {
  return second ? __builtin_shufflevector(a, b, (W / 2 + i / 2 + i % 2 * W)...)
                : __builtin_shufflevector(a, b, (i / 2 + i % 2 * W)...);
}

// to[c, r] = from[r, c] for 16 x 16 words.
FUSED_RL_INLINE void transpose_16(const uint32_t* from, int64_t ld_from, uint32_t* to,
                                  int64_t ld_to) {
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  for (int r = 0; r < 16; r += W) {
    for (int c = 0; c < 16; c += W) {
      Words a[W], b[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) a[i] = load_words(from + (r + i) * ld_from + c);
#pragma GCC unroll 4
      for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
          b[2 * i] = zip(a[i], a[i + W / 2], false, lanes);
          b[2 * i + 1] = zip(a[i], a[i + W / 2], true, lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store_words(to + (c + i) * ld_to + r, a[i]);
    }
  }
}

// Lines v and v + 1 of a tile, of 16 columns from n on, rounded to bf16, as pairs.
FUSED_RL_INLINE void pair_of_lines(const float* z, int64_t lines, int64_t ld, int64_t v, int64_t n,
                                   uint32_t* to) {
  for (int i = 0; i < 16; i += W) {
    const Words even = v < lines ? bfloat16_bits(load(z + v * ld + n + i)) : Words{};
    const Words odd = v + 1 < lines ? bfloat16_bits(load(z + (v + 1) * ld + n + i)) : Words{};
    store_words(to + i, even | (odd << 16));
  }
}

static void pack_tile(const float* z, int64_t lines, int64_t columns, int64_t ld, int64_t v0,
                      int64_t n0, LeftTarget<uint16_t> by_v, LeftTarget<uint16_t> by_n) {
  for (int64_t n = 0; n < columns; n += 16) {
    uint16_t* const column = by_v.data ? by_v.data + by_v.of_step(n0 + n) + (n0 + n) % 32 : nullptr;
    uint16_t* const line = by_n.data ? by_n.data + by_n.of_line(n0 + n) : nullptr;
    for (int64_t v = 0; v < lines; v += 32) {
      alignas(64) uint32_t pairs[16 * 16];
      for (int i = 0; i < 16; ++i) pair_of_lines(z, lines, ld, v + 2 * i, n, pairs + 16 * i);
      for (int64_t i = v; column && i < v + 32 && i < lines; ++i) {
        const uint32_t* const from = pairs + (i - v) / 2 * 16;
        uint16_t* const to = column + by_v.of_line(v0 + i);
        for (int j = 0; j < 16; j += W) {
          const Words both = load_words(from + j);
          const Halves half = __builtin_convertvector(i % 2 ? both >> 16 : both & 0xffffu, Halves);
          std::memcpy(to + j, &half, sizeof(half));
        }
      }
      if (line) {
        uint16_t* const to = line + by_n.of_step(v0 + v);
        transpose_16(pairs, 16, reinterpret_cast<uint32_t*>(to), by_n.layout.row / 2);
      }
    }
  }
}

static void pack_lines(const uint16_t* even, const uint16_t* odd, int64_t columns, Layout layout,
                       uint16_t* to) {
  for (int64_t n = 0; n < 64; n += 16) {
    uint16_t* const place = to + layout.place_16(n);
    if (n + 16 <= columns && odd) {
      for (int i = 0; i < 16; i += W) {
        store_words(place + 2 * i, load_halves(even + n + i) | (load_halves(odd + n + i) << 16));
      }
    } else {
      for (int64_t i = 0; i < 16; ++i) {
        place[2 * i] = n + i < columns ? even[n + i] : 0;
        place[2 * i + 1] = n + i < columns && odd ? odd[n + i] : 0;
      }
    }
  }
}

static void pack_words(const uint32_t* from, int64_t ld, int64_t lines, int64_t row, uint32_t* to) {
  if (lines >= 16) return transpose_16(from, ld, to, row);
  alignas(64) uint32_t some[16 * 16] = {};
  for (int64_t n = 0; n < lines; ++n) std::memcpy(some + 16 * n, from + n * ld, 64);
  transpose_16(some, 16, to, row);
}

static void pack_columns(const uint16_t* from, int64_t ld, int64_t lines, int64_t row,
                         uint16_t* to) {
  pack_words(reinterpret_cast<const uint32_t*>(from), ld / 2, lines, row / 2,
             reinterpret_cast<uint32_t*>(to));
}

static void pack_columns(const float* from, int64_t ld, int64_t lines, int64_t row, float* to) {
  pack_words(reinterpret_cast<const uint32_t*>(from), ld, lines, row,
             reinterpret_cast<uint32_t*>(to));
}

static void pack_columns(const double* from, int64_t ld, int64_t lines, int64_t row, double* to) {
  for (int64_t q = 0; q < 16; ++q) {
    for (int64_t n = 0; n < 16; ++n) to[q * row + n] = n < lines ? from[n * ld + q] : 0;
  }
}

// Of types that are packed as they are.
template <class T>
static void pack_tile(const T* z, int64_t lines, int64_t columns, int64_t ld, int64_t v0, int64_t n0,
                      LeftTarget<T> by_v, LeftTarget<T> by_n) {
  for (int64_t n = 0; n < columns; n += 16) {
    T* const column = by_v.data ? by_v.data + by_v.of_step(n0 + n) + (n0 + n) % 32 : nullptr;
    for (int64_t v = 0; column && v < lines; ++v) {
      std::memcpy(column + by_v.of_line(v0 + v), z + v * ld + n, 16 * sizeof(T));
    }
    T* const line = by_n.data ? by_n.data + by_n.of_line(n0 + n) : nullptr;
    for (int64_t v = 0; line && v < lines; v += 16) {
      T* const to = line + by_n.of_step(v0 + v) + (v0 + v) % 32;
      if (v + 16 <= lines) {
        pack_columns(z + v * ld + n, ld, 16, by_n.layout.row, to);
      } else {
        for (int64_t i = 0; i < 16; ++i) {
          for (int64_t j = 0; j < 16; ++j) {
            to[i * by_n.layout.row + j] = v + j < lines ? z[(v + j) * ld + n + i] : T(0);
          }
        }
      }
    }
  }
}

template <class T>
static void pack_lines(const T* line, const T*, int64_t columns, Layout, T* to) {
  const int64_t count = columns < 64 ? columns : 64;
  std::memcpy(to, line, count * sizeof(T));
  for (int64_t n = count; n < 64; ++n) to[n] = T(0);
}

// Each line is a stream of its own: too many for a CPU to foresee, so it is told.
template <class T>
static void pack_rows(const T* from, int64_t ld, int64_t lines, T* to) {
  constexpr int64_t bytes = 32 * sizeof(T), ahead = 8 * bytes;
  for (int64_t m = 0; m < lines; ++m) {
    const T* const line = from + m * ld;
    __builtin_prefetch(reinterpret_cast<const char*>(line) + ahead);
    for (int64_t i = 0; i < bytes; i += FUSED_RL_VECTOR_BYTES) {
      store_words(reinterpret_cast<char*>(to + 32 * m) + i,
                  load_words(reinterpret_cast<const char*>(line) + i));
    }
  }
}

extern const PackLoops<float, uint16_t> bfloat16_packs;
extern const PackLoops<float, float> float_packs;
extern const PackLoops<double, double> double_packs;
const PackLoops<float, uint16_t> bfloat16_packs = {pack_tile, pack_lines, pack_columns,
                                                   pack_rows<uint16_t>};
const PackLoops<float, float> float_packs = {pack_tile<float>, pack_lines<float>, pack_columns,
                                             pack_rows<float>};
const PackLoops<double, double> double_packs = {pack_tile<double>, pack_lines<double>,
                                                pack_columns, pack_rows<double>};

}  // namespace fused_rl::FUSED_RL_ISA
