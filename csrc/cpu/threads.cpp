#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace latentmas {
namespace {

// About 100 us of pauses: longer than any phase of a step is late, unless the core was taken away.
constexpr int kSpins = 4000;
constexpr int kMostThreads = 1024;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Done>
bool spin(Done done) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return true;
    pause();
  }
  return false;
}

class ThreadTeam {
 public:
  explicit ThreadTeam(int size) : size_(size), barrier_(size), counters_(size) {
    for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { work(i); });
  }
  ~ThreadTeam() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int size() const { return size_; }

  void run(Job job, const void* argument) {
    if (size_ > 1) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        job_ = job;
        argument_ = argument;
        round_.fetch_add(1, std::memory_order_release);
      }
      wake_.notify_all();
    }
    const Worker worker{0, size_, &barrier_, counters_.data()};
    job(argument, worker);
    worker.wait();  // the argument lives on the caller's stack
  }

 private:
  void work(int index) {
    const Worker worker{index, size_, &barrier_, counters_.data()};
    for (unsigned seen = 0;;) {
      if (!spin([&] { return round_.load(std::memory_order_acquire) != seen; })) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
      }
      ++seen;  // a round begins only after all workers have met at the end of the round before
      Job job;
      const void* argument;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        job = job_;
        argument = argument_;
      }
      if (!job) return;
      job(argument, worker);
      worker.wait();
    }
  }

  const int size_;
  Barrier barrier_;
  std::vector<WorkCounter> counters_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned> round_{0};
  Job job_ = nullptr;
  const void* argument_ = nullptr;
  std::vector<std::thread> threads_;
};

// Both are left behind by a fork: the child has none of the threads, and the mutex may be held by one of them.
struct Process {
  std::mutex turn;
  std::unique_ptr<ThreadTeam> team;
};
Process* process = new Process;

const int at_fork = pthread_atfork(nullptr, nullptr, [] { process = new Process; });

}  // namespace

void Barrier::wait() {
  const unsigned round = __atomic_load_n(&round_, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == count_) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
    return;
  }
  while (!spin([&] { return __atomic_load_n(&round_, __ATOMIC_ACQUIRE) != round; })) sched_yield();
}

int team_size() {
  const char* requested = std::getenv("LATENTMAS_NUM_THREADS");
  if (requested && *requested) {
    char* end = nullptr;
    const long threads = std::strtol(requested, &end, 10);
    if (*end || threads < 1 || threads > kMostThreads)
      throw std::runtime_error("LATENTMAS_NUM_THREADS=" + std::string(requested) + " is no number of threads from 1 to " +
                               std::to_string(kMostThreads) + ". Unset the variable to use all cores.");
    return static_cast<int>(threads);
  }
#ifdef __linux__
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
#endif
  const unsigned cores_of_machine = std::thread::hardware_concurrency();
  return cores_of_machine ? static_cast<int>(cores_of_machine) : 1;
}

void parallel_run(Job job, const void* argument, int threads) {
  Process& here = *process;
  const std::lock_guard<std::mutex> lock(here.turn);
  if (!here.team || here.team->size() != threads) {
    here.team.reset();
    here.team.reset(new ThreadTeam(threads));
  }
  here.team->run(job, argument);
}

}  // namespace latentmas
