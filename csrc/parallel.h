// Teams on torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <utility>

#include "matmul.h"
#include "team.h"

namespace fused_rl {

// How many threads run() has at most.
inline int64_t members() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Runs the stages of a team whose tasks multiply. Throws what a task throws.
inline void run(Team& team) {
  team.start();
  at::parallel_for(0, std::min(members(), team.widest()), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const MatmulScope scope;
    for (int64_t member = begin; member < end; ++member) team.member(member);
  });
  team.finish();
}

// body(task, member) for tasks that need none of each other.
template <class F>
void parallel_tasks(int64_t tasks, F&& body) {
  Team team;
  team.add(tasks, -1, std::forward<F>(body));
  run(team);
}

}  // namespace fused_rl
