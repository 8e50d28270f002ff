// What a chunk keeps of its logits in half the room: e = exp(z - largest) in sixteen bits (loops.h), of
// which the gradient of a log-probability is a multiple,
//
//     dz[v, n] = -dlogprob[n] exp(largest[n] - lse[n]) e[v, n],   v != label
//
// with the largest logit of each block of the vocabulary and token, and the logits of the labels: where
// p[label] is near 1, 1 - p would be lost in the rounding of e. Neither the gradient of an entropy nor
// the slope of a softcap comes from it: they ask for log p, of which sixteen bits have too little.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace fused_rl {

// Lies in one buffer of int16: e, tile by tile, [tiles, V, width]; the largest logits, [blocks, padded],
// and those of the labels, [padded], in float.
class KeptExponentials {
 public:
  // padded: of the chunk.
  KeptExponentials(void* buffer, int64_t V, int64_t padded)
      : V(V),
        padded(padded),
        e(static_cast<uint16_t*>(buffer)),
        of_blocks(reinterpret_cast<float*>(e + V * padded)),
        labels(of_blocks + most_blocks(V) * padded) {}

  // Elements of the buffer.
  static int64_t size(int64_t V, int64_t padded) {
    return (V + 2 * most_blocks(V) + 2) * padded;
  }

  uint16_t* tile(int64_t v0, int64_t t) const {
    const int64_t n0 = t * tile_tokens;
    return e + n0 * V + v0 * width(t);
  }
  float* largest(int64_t block, int64_t n) const { return of_blocks + block * padded + n; }
  float* at_labels() const { return labels; }

  // A tile of chosen tokens, and zeros beyond `count`.
  void gather(int64_t v0, int64_t lines, const int64_t* tokens, int64_t count, int64_t width,
              uint16_t* to) const {
    gather_columns(e, V, padded, v0, lines, tokens, count, width, to);
  }

 private:
  static constexpr int64_t least_block = 64;  // the rows of a block are at least so many
  static int64_t most_blocks(int64_t V) { return (V + least_block - 1) / least_block; }
  int64_t width(int64_t t) const { return std::min(tile_tokens, padded - t * tile_tokens); }

  int64_t V, padded;
  uint16_t* e;
  float* of_blocks;
  float* labels;
};

}  // namespace fused_rl
