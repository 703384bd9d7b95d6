// Ahead: weights that a thread will read next, asked for while the memory would have nothing to do: in attention, which
// computes more than it reads, and while the thread waits for the others. Each layer has seven such gaps.
#pragma once

#include "simd.h"
#include "threads.h"

namespace latentmas {
namespace LATENTMAS_ISA {

// What one thread asks for before a product: a quarter of a second cache of 1 MB.
constexpr std::int64_t kAheadBytes = 256 * 1024;

class Ahead {
 public:
  Ahead() = default;
  // `bytes` from each of `count` places, in turn.
  Ahead(const char* first, const char* second, int count, std::int64_t bytes)
      : places_{first, second}, count_(count), left_(bytes < kAheadBytes / count ? bytes : kAheadBytes / count) {}

  bool is_done() const { return left_ <= 0; }
  void ask(int lines) {
    for (; lines > 0 && left_ > 0; lines -= count_, left_ -= 64)
      for (int i = 0; i < count_; ++i) {
        prefetch_later(places_[i]);
        places_[i] += 64;
      }
  }

 private:
  const char* places_[2] = {nullptr, nullptr};
  int count_ = 1;
  std::int64_t left_ = 0;
};

// Meets the other members, and asks ahead until they are there.
inline void meet(const Member& me, Ahead& ahead) {
  if (me.count == 1) return;
  const unsigned round = me.barrier->arrive();
  while (!me.barrier->is_over(round)) {
    if (ahead.is_done()) return me.barrier->wait(round);
    ahead.ask(4);
  }
}

}  // namespace LATENTMAS_ISA
}  // namespace latentmas
