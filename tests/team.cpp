// Stages whose tasks check that what they need is done, on threads that come and go late; for the thread
// sanitizer. Prints the sum that one thread alone must have.
#include "../csrc/team.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

using fused_rl::Team;

// Each task adds to a place of its own, which the stage two before has written without atomics.
static double chain(int members, int stages, int tasks) {
  std::vector<std::vector<double>> value(stages, std::vector<double>(tasks, 0));
  std::vector<double> total(1, 0);
  Team team;
  int64_t sum_before = -1;
  for (int s = 0; s < stages; ++s) {
    const int64_t formed = team.add(tasks, s - 3 >= 0 ? 2 * (s - 3) : -1, [&, s](int64_t t, int64_t) {
      value[s][t] = 1 + (s >= 3 ? value[s - 3][(t + 1) % tasks] : 0);
      if (t % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
    });
    sum_before = team.add(1, std::max(formed, sum_before), [&, s](int64_t, int64_t) {
      for (const double v : value[s]) total[0] = total[0] * 0.5 + v;
    });
  }
  team.start();
  std::vector<std::thread> threads;
  for (int m = 0; m < members; ++m) {
    threads.emplace_back([&team, m] {
      if (m % 3 == 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      team.member(m);
    });
  }
  for (std::thread& thread : threads) thread.join();
  team.finish();
  return total[0];
}

static bool throws(int members) {
  Team team;
  std::atomic<int> after{0};
  const int64_t first = team.add(8, -1, [](int64_t t, int64_t) {
    if (t == 5) throw std::runtime_error("task 5");
  });
  team.add(100, first, [&](int64_t, int64_t) { ++after; });
  team.start();
  std::vector<std::thread> threads;
  for (int m = 0; m < members; ++m) threads.emplace_back([&team, m] { team.member(m); });
  for (std::thread& thread : threads) thread.join();
  try {
    team.finish();
  } catch (const std::runtime_error& error) {
    return std::string(error.what()) == "task 5" && after == 0;
  }
  return false;
}

int main() {
  const double alone = chain(1, 40, 24);
  for (const int members : {2, 3, 8}) {
    for (int again = 0; again < 5; ++again) {
      if (chain(members, 40, 24) != alone) return std::puts("another sum"), 1;
    }
    if (!throws(members)) return std::puts("no error, or work after it"), 1;
  }
  if (!throws(1)) return std::puts("no error on one thread"), 1;
  std::printf("%.17g\n", alone);
  return 0;
}
