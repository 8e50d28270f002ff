// The threads of one pass, in one parallel region. The pass is a list of stages, each of many tasks.
// Threads take the tasks of all stages from one counter, in order; before a stage's task a thread waits
// until the stages that it needs are done. As those lie at least a stage back, where the pass has
// buffers for it, a thread that loses its core for a while does not stop the others, and one that must
// wait gives its core away after some microseconds, as barriers of OpenMP do not.
//
// Which thread does a task never changes a result: every sum has one task, and tasks that add to the
// same place are in stages that need each other. A thread alone does all tasks in order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace fused_rl {

class Team {
 public:
  // body(task, member), for task in [0, tasks) and the thread's number.
  using Body = std::function<void(int64_t, int64_t)>;

  // A stage that starts when stage `needs` is done and all before it; -1: at once. Returns its number.
  int64_t add(int64_t tasks, int64_t needs, Body body) {
    stages_.push_back({first_, tasks, needs, std::move(body)});
    first_ += tasks;
    return int64_t(stages_.size()) - 1;
  }

  // More members than this have nothing to do.
  int64_t widest() const {
    int64_t tasks = 1;
    for (const Stage& stage : stages_) tasks = std::max(tasks, stage.tasks);
    return tasks;
  }

  // To be called before the members start, once.
  void start() {
    left_ = std::make_unique<std::atomic<int32_t>[]>(stages_.size());
    for (size_t s = 0; s < stages_.size(); ++s) left_[s] = int32_t(stages_[s].tasks);
  }

  // What each thread runs. Throws nothing: see finish().
  void member(int64_t number) noexcept {
    int64_t s = 0, done = -1;  // the stages up to `done` are known to be done
    for (;;) {
      const int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= first_) return;
      while (ticket >= stages_[s].first + stages_[s].tasks) ++s;
      for (; done < stages_[s].needs; ++done) wait(done + 1);
      try {
        if (!failed_.load(std::memory_order_relaxed)) {
          stages_[s].body(ticket - stages_[s].first, number);
        }
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
      if (left_[s].fetch_sub(1, std::memory_order_acq_rel) == 1) left_[s].notify_all();
    }
  }

  // After all members: throws what the first task that failed threw.
  void finish() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct Stage {
    int64_t first, tasks, needs;
    Body body;
  };

  void wait(int64_t stage) const {
    for (int i = 0; i < spins; ++i) {
      if (left_[stage].load(std::memory_order_acquire) == 0) return;
      relax();
    }
    int32_t left;
    while ((left = left_[stage].load(std::memory_order_acquire)) != 0) left_[stage].wait(left);
  }

  static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int spins = 100;  // 5 microseconds or so
  std::vector<Stage> stages_;
  int64_t first_ = 0;
  std::unique_ptr<std::atomic<int32_t>[]> left_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace fused_rl
