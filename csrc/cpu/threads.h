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

// How often was taken of a member's share, by itself or by others. Two phases, which alternate: a member makes the next one
// ready while it works in this one.
struct alignas(64) Taken {
  std::int64_t takes[2] = {0, 0};
  int phase = 0;
};

// What a job knows of the thread that it runs on.
struct Member {
  int index, count;
  Barrier* barrier;
  Taken* taken;  // of all members; null where there is one

  LATENTMAS_INLINE void wait() const {
    if (count > 1) barrier->wait();
  }
  // This thread's part of n things, in whole units but for the last.
  LATENTMAS_INLINE Range share(std::int64_t n, std::int64_t unit = 1) const { return share_of(index, n, unit); }
  LATENTMAS_INLINE Range share_of(int member, std::int64_t n, std::int64_t unit) const {
    const std::int64_t units = (n + unit - 1) / unit;
    const std::int64_t begin = units * member / count * unit, end = units * (member + 1) / count * unit;
    return {begin < n ? begin : n, end < n ? end : n};
  }
};

// Hands out n things in whole units but for the last: to each member half of its share, then half of what is left of it, and so
// on; then what the others have not come to. Threads that read memory side by side are often a fifth apart at the end of a
// product. In halves, since each take is a locked instruction, which waits for all loads before it: one for every 16 rows
// of a weight was 7 % of a step. Everybody makes the same handouts in the same order, and all meet between two of them.
class Handout {
 public:
  LATENTMAS_INLINE Handout(const Member& me, std::int64_t n, std::int64_t unit) : me_(me), n_(n), unit_(unit), from_(me.index) {
    if (me.count == 1) return;
    Taken& own = me.taken[me.index];
    phase_ = own.phase;
    own.phase = 1 - phase_;
    own.takes[own.phase] = 0;
  }
  // False where nothing is left.
  LATENTMAS_INLINE bool next(Range* range) {
    for (; tried_ < me_.count; ++tried_, from_ = (from_ + 1) % me_.count) {
      std::int64_t* taken = me_.count == 1 ? &alone_ : &me_.taken[from_].takes[phase_];
      const std::int64_t take = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
      const Range share = me_.share_of(from_, n_, unit_);
      const std::int64_t units = (share.end - share.begin + unit_ - 1) / unit_;
      if (take > 62 || units >> take == 0) continue;
      const std::int64_t end = share.begin + (units - (units >> (take + 1))) * unit_;
      *range = {share.begin + (units - (units >> take)) * unit_, end < share.end ? end : share.end};
      return true;
    }
    return false;
  }

 private:
  const Member& me_;
  const std::int64_t n_, unit_;
  int from_, tried_ = 0, phase_ = 0;
  std::int64_t alone_ = 0;
};

using Job = void (*)(const void* argument, const Member& member);

// Threads that a job runs on: LATENTMAS_NUM_THREADS, or the cores that this process may use. Read from the environment
// each time. Throws std::runtime_error where the variable is no number of threads.
int team_size();
// Runs the job on so many threads and returns when all have. Calls from several threads take turns.
void run_on_team(Job job, const void* argument, int threads);

}  // namespace latentmas
