// Where the elements of the operands of a product lie. No ATen in here: see loops.h.
#pragma once

#include <cstdint>

namespace fused_rl {

// Of a panel of a left operand A[m, k]:
//   (m % 16) row + (m / 16 % 2) half + (m / 32) pair + (k / 32) step + k % 32
// and of a right operand B[k, n], `pack` lines of which lie interleaved, with q = k / pack:
//   (q % 16) row + (q / 16) step + (n / 16 % 2) half + (n / 32) pair + (n % 16) pack + k % pack
struct Layout {
  int64_t row, half, pair, step;

  // Of line m or column n.
  int64_t place(int64_t i) const { return i % 16 * row + place_16(i); }
  int64_t place_16(int64_t i) const { return i / 16 % 2 * half + i / 32 * pair; }
};

// A left operand that is being written, in panels of `depth` products, `next` elements apart. The
// element (m, k) is at data[of_line(m) + of_step(k) + k % 32].
template <class T>
struct LeftTarget {
  T* data;
  Layout layout;
  int64_t depth, next;

  int64_t of_line(int64_t m) const { return layout.place(m); }
  int64_t of_step(int64_t k) const { return k / depth * next + k % depth / 32 * layout.step; }
};

}  // namespace fused_rl
