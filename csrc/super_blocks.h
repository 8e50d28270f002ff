// The walk over the vocabulary that forms gradients: about a thousand rows of weight, a super-block, and
// one or two thousand tokens at most, a chunk, in one step. A step has these stages:
//
//     pack      rows of weight into the operands of the two products
//     tile      a tile of logits, and of it a tile of draw, for each block of rows and tile of tokens
//     weight    rows of dweight = draw hidden, finished and written once the last chunk is in
//     bias      dbias
//     hidden    the step's share of dhidden = draw^T weight
//
// Buffers of steps are threefold, so that threads begin a step while others end the one before.
// Every sum has one task and a fixed order: no atomics, no copy per thread, the same bits on any number
// of threads; and dhidden of a token is the same whatever other tokens there are.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "problem.h"

namespace fused_rl {

template <class T>
class SuperBlocks {
 public:
  using A = Acc<T>;
  struct Wanted {
    bool dhidden;
    int64_t dweight;  // so many of its last columns
    bool dbias;
    bool logits;  // to be formed here
  };

  SuperBlocks(const Problem<T>& problem, Wanted what) : p(problem), wanted(what) {
    if (wanted.logits) hidden_panels.emplace(p);
    if (wanted.dweight) pack_hidden();
    for (int64_t i = 0; i < std::min(slots_of_steps, steps()); ++i) make_slots(i);
    if (wanted.dweight && chunks > 1) {
      dweight_rows = Buffer<A>(round_up(rows_max, p.block) * weight_panels * panel_columns);
    }
    threads.resize(members());
  }
  virtual ~SuperBlocks() = default;

 protected:
  // A step of the walk.
  struct Step {
    int64_t super_block, v0, rows;  // of the vocabulary
    int64_t chunk, n0, tokens;
    int64_t slot;
  };
  struct OfThread {
    OfThread(const SuperBlocks& walk, int64_t member)
        : member(member), tile(walk.p.block * tile_tokens), other(walk.p.block * tile_tokens),
          sum(std::max(walk.p.block, hidden_tokens) * panel_columns) {}
    int64_t member;
    Buffer<A> tile, other, sum;
    std::unique_ptr<typename LogitTiles<A>::Cache> of_other;  // where other logits are formed, too
  };

  const Problem<T>& p;
  const Wanted wanted;

  // Forms the draw of `count` rows of a step, from the row `first` of it on, and the tokens of tile t,
  // and puts it where the products find it.
  virtual void tile(const Step& step, int64_t first, int64_t count, int64_t t, OfThread& own) = 0;
  // After all tiles of a step and of tile t of tokens.
  virtual void tile_done(const Step&, int64_t) {}
  // Adds a part of dhidden to its sums, [tokens, 64] each, of the tokens from n0 on and panel j of 64
  // columns.
  virtual void add_hidden(const Step&, const A* part, A* sums, int64_t, int64_t tokens, int64_t) {
    loops<A>().add_scaled(part, tokens * panel_columns, A(1), sums);
  }
  // Rows of dweight that are finished, [rows, columns] with 64 columns to a line, from the h0-th of those
  // that are wanted on.
  virtual void write_weight(int64_t, const A*, int64_t, int64_t, int64_t) {}
  virtual void bias(const Step&) {}

  // The logits of a tile, formed into z.
  void form_logits(const Step& step, int64_t first, int64_t count, int64_t t, A* z) const {
    const int64_t v0 = step.v0 + first;
    logits_tile(p, logits_operand(step, first), v0, count, *hidden_panels, t, z, p.tile_width(t));
  }

  // A tile of draw into the left operands of the products.
  void put(const Step& step, const A* draw, int64_t first, int64_t count, int64_t t, int64_t ld) {
    const DrawSlot& slot = slots[step.slot];
    const auto target = [&](const Buffer<T>& to, int64_t lines) {
      return LeftTarget<Bits<T>>{bits(to.data()), left_layout<T>(), depth, lines * depth};
    };
    packs<T>().tile(draw, count, p.tile_width(t), ld, first, t * tile_tokens - step.n0,
                    target(slot.by_v, rows_max), target(slot.by_n, round_up(tokens_max, tile_tokens)));
  }

  // Multiplies the draw of one token and of the rows from `first` on.
  void rescale_draw(const Step& step, int64_t first, int64_t count, int64_t n, A factor) {
    const LeftTarget<T> by_n{slots[step.slot].by_n.data(), left_layout<T>(), depth,
                             round_up(tokens_max, tile_tokens) * depth};
    for (int64_t v = first; v < first + count; v += group) {
      T* const at = by_n.data + by_n.of_line(n - step.n0) + by_n.of_step(v);
      for (int64_t i = 0; i < group; ++i) at[i] = T(A(at[i]) * factor);
    }
  }

  // f(h0, columns, sums) for the columns of one token's dhidden, panel by panel.
  template <class F>
  void each_panel(int64_t n, const F& f) const {
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t h0 = j * panel_columns;
      f(h0, std::min(panel_columns, p.H - h0), sums_at(j, n));
    }
  }

  // Runs all stages.
  void walk() {
    if (wanted.dhidden) {
      sums = Buffer<A>(panels * p.padded * panel_columns);
      std::fill_n(sums.data(), sums.size(), A(0));
    }
    Team team;
    std::vector<Stages> of_step(steps());
    for (int64_t i = 0; i < steps(); ++i) {
      add_tiles(team, i, of_step);
      if (i > 0) add_products(team, i - 1, of_step);
    }
    add_products(team, steps() - 1, of_step);
    run(team);
  }

 private:
  static constexpr int64_t slots_of_steps = 3;
  // Of dweight alone a step's sums are longer, and fewer, the more tokens it has.
  const int64_t chunk_tokens = wanted.dweight ? 2048 : 1024;
  static constexpr int64_t hidden_tokens = 256;  // of a task of the stage hidden
  static constexpr int64_t depth = sum_step<T>;

  // Rows of weight as the operands of the logits and of dhidden.
  struct WeightSlot {
    Buffer<T> left, right;
  };
  // draw as that of dweight and of dhidden, and how many blocks of each tile of tokens are there.
  struct DrawSlot {
    Buffer<T> by_v, by_n;
    std::unique_ptr<std::atomic<int32_t>[]> done;
  };
  // The numbers of a step's stages.
  struct Stages {
    int64_t tiles = -1, weight = -1, hidden = -1, last = -1;
  };

  const int64_t rows_max = std::min(p.super_rows(), round_up(p.V, group));
  const int64_t tokens_max = std::min(chunk_tokens, p.padded);
  const int64_t chunks = (p.padded + chunk_tokens - 1) / chunk_tokens;
  const int64_t panels = (p.H + panel_columns - 1) / panel_columns;
  const int64_t weight_panels = (wanted.dweight + panel_columns - 1) / panel_columns;
  std::optional<HiddenPanels<T>> hidden_panels;
  Buffer<T> hidden_columns;  // [weight_panels][padded, 64], the right operand of dweight
  Buffer<A> sums;            // of dhidden, [panels][padded, 64]
  Buffer<A> dweight_rows;    // [blocks, weight_panels][block, 64], where there are chunks
  std::array<WeightSlot, slots_of_steps> weight_slots;  // by super-block
  std::array<DrawSlot, slots_of_steps> slots;           // by step
  std::vector<std::unique_ptr<OfThread>> threads;

  A* sums_at(int64_t panel, int64_t n) const {
    return sums.data() + (panel * p.padded + n) * panel_columns;
  }
  int64_t steps() const { return p.super_blocks() * chunks; }
  int64_t blocks(const Step& step) const { return (step.rows + p.block - 1) / p.block; }
  int64_t tiles(const Step& step) const { return (step.tokens + tile_tokens - 1) / tile_tokens; }
  bool packs_left() const { return wanted.logits && !p.in_place(); }

  Step step_at(int64_t i) const {
    const int64_t s = i / chunks, c = i % chunks, v0 = s * p.super_rows(), n0 = c * chunk_tokens;
    return {s, v0, std::min(p.super_rows(), p.V - v0), c, n0, std::min(chunk_tokens, p.padded - n0),
            i % slots_of_steps};
  }

  OfThread& of(int64_t member) {
    if (!threads[member]) threads[member] = std::make_unique<OfThread>(*this, member);
    return *threads[member];
  }

  void make_slots(int64_t i) {
    const int64_t deep = round_up(rows_max, depth);
    if (packs_left()) weight_slots[i].left = Buffer<T>(rows_max * round_up(p.K, depth));
    if (wanted.dhidden) {
      weight_slots[i].right = Buffer<T>(panels * deep * panel_columns);
      slots[i].by_n = Buffer<T>(round_up(tokens_max, tile_tokens) * deep);
    }
    if (wanted.dweight) slots[i].by_v = Buffer<T>(rows_max * round_up(tokens_max, depth));
    slots[i].done = std::make_unique<std::atomic<int32_t>[]>(tokens_max / tile_tokens + 1);
  }

  void pack_hidden() {
    hidden_columns = Buffer<T>(weight_panels * round_up(p.padded, depth) * panel_columns);
    const T* const from = p.hidden.template const_data_ptr<T>() + p.H - wanted.dweight;
    parallel_tasks(p.tiles(), [&](int64_t t, int64_t) {
      const int64_t n0 = t * tile_tokens;
      pack_right<T>(from + n0 * p.wide, p.wide, p.N - n0, n0, p.tile_width(t), wanted.dweight,
                    hidden_columns.data(), columns_at(1, 0));
    });
  }
  int64_t columns_at(int64_t panel, int64_t n0) const {
    return (panel * round_up(p.padded, depth) + n0) * panel_columns;
  }

  const WeightSlot& weight_slot(const Step& step) const {
    return weight_slots[step.super_block % slots_of_steps];
  }
  Left<T> logits_operand(const Step& step, int64_t first) const {
    if (p.in_place()) {
      const int64_t ld = p.weight.stride(0);
      return {p.weight.template const_data_ptr<T>() + (step.v0 + first) * ld, depth, ld};
    }
    const T* const left = weight_slot(step).left.data();
    if (tiled<T>()) return {left + first * depth, rows_max * depth};
    return {left + first * p.K, depth, p.K};
  }

  void pack_weight(const Step& step, int64_t block) {
    const int64_t first = block * p.block, rows = std::min(p.block, step.rows - first);
    at::Tensor buffer;
    const Rows<T> from = weight_rows(p, step.v0 + first, rows, buffer);
    const WeightSlot& to = weight_slot(step);
    if (to.left && tiled<T>()) {
      pack_left(from.data, from.ld, rows, p.H, p.K, to.left.data() + first * depth,
                rows_max * depth);
    } else if (to.left) {
      for (int64_t v = 0; v < rows; ++v) {
        T* const line = to.left.data() + (first + v) * p.K;
        std::fill(std::copy_n(from.data + v * from.ld, p.H, line), line + p.K, T(0.f));
      }
    }
    if (!to.right) return;
    const int64_t lines = lines_per_pack<T> == 2 ? round_up(rows, group) : rows;
    pack_right<T>(from.data, from.ld, rows, first, lines, p.H, right_panel(step, 0), panel_size());
  }
  int64_t panel_size() const { return round_up(rows_max, depth) * panel_columns; }
  T* right_panel(const Step& step, int64_t j) const {
    return weight_slot(step).right.data() + j * panel_size();
  }

  void add_tiles(Team& team, int64_t i, std::vector<Stages>& of_step) {
    const Step step = step_at(i);
    const int64_t in_step = blocks(step), s = step.super_block;
    int64_t needs = i >= slots_of_steps ? of_step[i - slots_of_steps].last : -1;
    if (packs_left() || wanted.dhidden) {
      if (step.chunk == 0) {
        const int64_t before = s >= slots_of_steps ? of_step[(s - 2) * chunks - 1].last : -1;
        packed = team.add(in_step, before,
                          [=, this](int64_t block, int64_t) { pack_weight(step, block); });
      }
      needs = std::max(needs, packed);
    }
    const int64_t groups = parts(in_step, tiles(step));
    of_step[i].tiles = team.add(in_step * groups, needs, [=, this](int64_t task, int64_t member) {
      tiles_of(step, task / groups, task % groups, groups, of(member));
    });
  }

  // Into how many parts each of `tasks` is cut, that there are enough for all threads: few, as each reads
  // its operand anew from another thread's cache. At most `most`.
  static int64_t parts(int64_t tasks, int64_t most) {
    return std::min(most, (2 * members() + tasks - 1) / tasks);
  }

  void tiles_of(const Step& step, int64_t block, int64_t part, int64_t parts, OfThread& own) {
    const int64_t first = block * p.block, rows = std::min(p.block, step.rows - first);
    const int64_t count = tiles(step), t0 = step.n0 / tile_tokens;
    for (int64_t t = count * part / parts; t < count * (part + 1) / parts; ++t) {
      tile(step, first, rows, t0 + t, own);
      std::atomic<int32_t>& done = slots[step.slot].done[t];
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == blocks(step)) {
        done.store(0, std::memory_order_relaxed);
        tile_done(step, t0 + t);
      }
    }
  }

  void add_products(Team& team, int64_t i, std::vector<Stages>& of_step) {
    const Step step = step_at(i);
    Stages& stages = of_step[i];
    const Stages before = i > 0 ? of_step[i - 1] : Stages{};
    if (wanted.dweight) {
      const int64_t needs = chunks > 1 ? std::max(stages.tiles, before.weight) : stages.tiles;
      const int64_t cut = parts(blocks(step), weight_panels);
      stages.last = stages.weight =
          team.add(blocks(step) * cut, needs, [=, this](int64_t task, int64_t member) {
            const int64_t part = task % cut;
            for (int64_t j = weight_panels * part / cut; j < weight_panels * (part + 1) / cut; ++j) {
              weight_product(step, task / cut, j, of(member));
            }
          });
    }
    if (wanted.dbias && step.chunk == chunks - 1) {
      stages.last = team.add(1, stages.tiles, [=, this](int64_t, int64_t) { bias(step); });
    }
    if (wanted.dhidden) {
      const int64_t needs = std::max(stages.tiles, before.hidden);
      const int64_t groups = (step.tokens + hidden_tokens - 1) / hidden_tokens;
      const int64_t cut = parts(groups, panels);
      stages.last = stages.hidden =
          team.add(groups * cut, needs, [=, this](int64_t task, int64_t member) {
            for (int64_t j = panels * (task % cut) / cut; j < panels * (task % cut + 1) / cut; ++j) {
              hidden_product(step, task / cut * hidden_tokens, j, of(member));
            }
          });
    }
    stages.last = std::max(stages.last, stages.tiles);
  }

  void weight_product(const Step& step, int64_t block, int64_t j, OfThread& own) {
    const int64_t first = block * p.block, rows = std::min(p.block, step.rows - first);
    const bool last = step.chunk == chunks - 1;
    A* total = own.sum.data();
    if (chunks > 1) {
      total = dweight_rows.data() + (block * weight_panels + j) * p.block * panel_columns;
    }
    matmul<T>(rows, panel_columns, step.tokens,
              {slots[step.slot].by_v.data() + first * depth, rows_max * depth},
              hidden_columns.data() + columns_at(j, step.n0), total, panel_columns,
              step.chunk > 0);
    const int64_t h0 = j * panel_columns;
    const int64_t columns = std::min(panel_columns, wanted.dweight - h0);
    if (last) write_weight(step.v0 + first, total, rows, h0, columns);
  }

  void hidden_product(const Step& step, int64_t n, int64_t j, OfThread& own) {
    const int64_t tokens = std::min(hidden_tokens, step.tokens - n);
    const int64_t K = lines_per_pack<T> == 2 ? round_up(step.rows, group) : step.rows;
    const int64_t next = round_up(tokens_max, tile_tokens) * depth;
    matmul<T>(tokens, panel_columns, K, {slots[step.slot].by_n.data() + n * depth, next},
              right_panel(step, j), own.sum.data(), panel_columns);
    add_hidden(step, own.sum.data(), sums_at(j, step.n0 + n), step.n0 + n, tokens, j);
  }

  int64_t packed = -1;  // the stage of the super-block that add_tiles is at
};

}  // namespace fused_rl
