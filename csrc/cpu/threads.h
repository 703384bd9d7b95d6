// The threads of a step. One team per process; one job at a time runs on all of its threads, which meet at barriers.
//
// Not OpenMP: torch brings an OpenMP runtime of its own, whose threads spin after each of its regions on the cores that
// ours need, and a fork after a parallel region leaves it unusable. A team is made anew in a forked child.
#pragma once

#include <atomic>
#include <cstdint>

namespace latentmas {

// Waiting threads spin, since a step has hundreds of barriers a few microseconds apart, and yield when that takes long.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

 private:
  const int count_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

struct Range {
  std::int64_t begin, end;
};

// What a job knows of the thread that it runs on.
struct Member {
  int index, count;
  Barrier* barrier;

  void wait() const {
    if (count > 1) barrier->wait();
  }
  // This thread's part of n things, in whole units but for the last.
  Range share(std::int64_t n, std::int64_t unit = 1) const {
    const std::int64_t units = (n + unit - 1) / unit;
    const std::int64_t begin = units * index / count * unit, end = units * (index + 1) / count * unit;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

using Job = void (*)(const void* argument, const Member& member);

// Threads that a job runs on: LATENTMAS_NUM_THREADS, or the cores that this process may use. Read from the environment
// each time. Throws std::runtime_error where the variable is no number of threads.
int team_size();
// Runs the job on all threads and returns when all have. Calls from several threads take turns.
void run_on_team(Job job, const void* argument);

}  // namespace latentmas
