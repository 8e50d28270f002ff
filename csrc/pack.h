// Matrices as operands: the loops of pack_loops.cpp over whole rows and columns.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "loops.h"
#include "matmul.h"

namespace fused_rl {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// What the loops take for T: bf16 as its bits.
template <class T>
using Bits = std::conditional_t<std::is_same_v<T, c10::BFloat16>, uint16_t, T>;

template <class T>
const PackLoops<Acc<T>, Bits<T>>& packs() {
  return pack_loops<Acc<T>, Bits<T>>();
}

template <class T>
const Bits<T>* bits(const T* p) {
  return reinterpret_cast<const Bits<T>*>(p);
}
template <class T>
Bits<T>* bits(T* p) {
  return reinterpret_cast<Bits<T>*>(p);
}

// Rows of a matrix [rows, H] as the left operand [rows, K] where it is tiled; zeros from H on. Panels
// lie `next` apart.
template <class T>
void pack_left(const T* from, int64_t ld, int64_t rows, int64_t H, int64_t K, T* to, int64_t next) {
  const LeftTarget<T> target{to, left_layout<T>(), sum_step<T>, next};
  for (int64_t m = 0; m < rows; m += 16) {
    const int64_t lines = std::min<int64_t>(16, rows - m);
    T* const line = to + target.of_line(m);
    for (int64_t k = 0; k < K; k += group) {
      const int64_t count = std::clamp<int64_t>(H - k, 0, group);
      T* const place = line + target.of_step(k);
      if (count == group) {
        packs<T>().rows(bits(from + m * ld + k), ld, lines, bits(place));
      } else {
        for (int64_t i = 0; i < lines; ++i) {
          T* const at = place + i * group;
          std::fill(std::copy_n(from + (m + i) * ld + k, count, at), at + group, T(0.f));
        }
      }
    }
  }
}

// Rows of a matrix [rows, H] as the lines from k0 on of right operands [., 64], one for each 64 of its
// columns and `next` elements apart; zeros beyond rows, up to `lines`, and beyond H. k0 and, for bf16,
// lines are even. A row is read from its beginning to its end: that is what a CPU foresees.
template <class T>
void pack_right(const T* from, int64_t ld, int64_t rows, int64_t k0, int64_t lines, int64_t H, T* to,
                int64_t next) {
  constexpr int64_t pack = lines_per_pack<T>, panel = sum_step<T> * panel_columns;
  const Layout layout = right_layout<T>();
  for (int64_t i = 0; i < lines; i += pack) {
    const int64_t k = k0 + i, q = k % sum_step<T> / pack;
    T* place = to + k / sum_step<T> * panel + q % 16 * layout.row + q / 16 * layout.step;
    for (int64_t h0 = 0; h0 < H; h0 += panel_columns, place += next) {
      if (i < rows) {
        const T* const line = from + i * ld + h0;
        packs<T>().lines(bits(line), i + 1 < rows ? bits(line + ld) : nullptr,
                         std::min(panel_columns, H - h0), layout, bits(place));
      } else {
        for (int64_t n = 0; n < panel_columns; n += 16) {
          std::fill_n(place + layout.place_16(n), 16 * pack, T(0.f));
        }
      }
    }
  }
}

// Rows n of a matrix [rows, ld], ld a multiple of 32, as columns n of a right operand [ld, 64]; zeros
// beyond rows, in `columns` of the 64, a multiple of 16.
template <class T>
void pack_transposed(const T* from, int64_t ld, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t pack = lines_per_pack<T>, panel = sum_step<T> * panel_columns;
  const Layout layout = right_layout<T>();
  for (int64_t n = 0; n < columns; n += 16) {
    for (int64_t k = 0; k < ld; k += 16 * pack) {
      T* const place = to + k / sum_step<T> * panel + k % sum_step<T> / pack / 16 * layout.step;
      packs<T>().columns(bits(from + n * ld + k), ld, rows - n, layout.row,
                         bits(place + layout.place_16(n)));
    }
  }
}

}  // namespace fused_rl
