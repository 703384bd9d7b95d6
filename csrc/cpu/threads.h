// The threads of a step. One team per process; one job at a time runs on all of its threads, which meet at barriers.
//
// Not OpenMP: torch brings an OpenMP runtime of its own, whose threads spin after each of its regions on the cores that
// ours need, and a fork after a parallel region leaves it unusable. A team is made anew in a forked child.
#pragma once

#include <cstdint>

namespace latentmas {

// Inlined wherever it is used: a copy that one instruction set compiled must not serve the others (see kernels.h).
#define LATENTMAS_INLINE inline __attribute__((always_inline))

// Waiting threads spin, since a step has hundreds of barriers a few microseconds apart, and yield when that takes long.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

 private:
  const int count_;
  alignas(64) int arrived_ = 0;
  alignas(64) unsigned round_ = 0;
};

struct Range {
  std::int64_t begin, end;
};

// How many pieces of a worker's partition are taken, by itself or by other workers. Two phases alternate: a worker resets the
// next one while it works in this one.
struct alignas(64) WorkCounter {
  std::int64_t takes[2] = {0, 0};
  int phase = 0;
};

// One thread of a team, as a job sees it.
struct Worker {
  int index, count;
  Barrier* barrier;
  WorkCounter* counters;  // one per worker; null where there is one worker

  LATENTMAS_INLINE void wait() const {
    if (count > 1) barrier->wait();
  }
  // This worker's part of n items, in whole units but for the last.
  LATENTMAS_INLINE Range partition(std::int64_t n, std::int64_t unit = 1) const { return partition_of(index, n, unit); }
  LATENTMAS_INLINE Range partition_of(int of_worker, std::int64_t n, std::int64_t unit) const {
    const std::int64_t units = (n + unit - 1) / unit;
    const std::int64_t begin = units * of_worker / count * unit, end = units * (of_worker + 1) / count * unit;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

// Distributes n items in whole units but for the last. A worker takes half of its own partition, then half of the rest, and so
// on; then it takes from the partitions of the other workers. Threads that read memory side by side are often a fifth apart at
// the end of a product. In halves, since each take is a locked instruction, which waits for all loads before it: one for every
// 16 rows of a weight was 7 % of a step. All workers make the same queues in the same order, and meet between two of them.
class WorkQueue {
 public:
  LATENTMAS_INLINE WorkQueue(const Worker& worker, std::int64_t n, std::int64_t unit)
      : worker_(worker), n_(n), unit_(unit), from_(worker.index) {
    if (worker.count == 1) return;
    WorkCounter& counter = worker.counters[worker.index];
    phase_ = counter.phase;
    counter.phase = 1 - phase_;
    counter.takes[counter.phase] = 0;
  }
  // False where nothing is left.
  LATENTMAS_INLINE bool next(Range* range) {
    for (; tried_ < worker_.count; ++tried_, from_ = (from_ + 1) % worker_.count) {
      std::int64_t* takes = worker_.count == 1 ? &alone_ : &worker_.counters[from_].takes[phase_];
      const std::int64_t take = __atomic_fetch_add(takes, 1, __ATOMIC_RELAXED);
      const Range partition = worker_.partition_of(from_, n_, unit_);
      const std::int64_t units = (partition.end - partition.begin + unit_ - 1) / unit_;
      if (take > 62 || units >> take == 0) continue;
      const std::int64_t end = partition.begin + (units - (units >> (take + 1))) * unit_;
      *range = {partition.begin + (units - (units >> take)) * unit_, end < partition.end ? end : partition.end};
      return true;
    }
    return false;
  }

 private:
  const Worker& worker_;
  const std::int64_t n_, unit_;
  int from_, tried_ = 0, phase_ = 0;
  std::int64_t alone_ = 0;
};

using Job = void (*)(const void* argument, const Worker& worker);

// Threads that a job runs on: LATENTMAS_NUM_THREADS, or the cores that this process may use. Read from the environment
// each time. Throws std::runtime_error where the variable is no number of threads.
int team_size();
// Runs the job on so many threads and returns when all have finished. Calls from several threads take turns.
void parallel_run(Job job, const void* argument, int threads);

}  // namespace latentmas
