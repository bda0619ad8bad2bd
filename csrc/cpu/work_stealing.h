// Runs a fixed sequence of parallel stages with work stealing; tolerates threads that start late or never.
//
// Terms: docs/glossary.md.
#pragma once
#if defined(__linux__)
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace convmixer_fast::cpu {

// In each stage every thread has its own range of successive tasks, and takes some of them at a time from its
// beginning; once they are gone, from the ends of the others' ranges. So a thread whose core is slow, busy otherwise or
// not even running yet delays nobody by more than what it has taken, and one thread alone does all.
//
// On virtual machines (steal time) the kernel may take a sleeping core for one that another machine uses, and wake the
// other threads on thread 0's core, where they would not run before the scheduler's next tick, some milliseconds later.
// Thread 0 therefore yields between tasks until every thread has started, and a thread that starts on its core
// migrates. No thread's CPU mask is touched for it: one that somebody else sets at the same time would be undone.
class WorkStealing {
 public:
  using Clock = std::chrono::steady_clock;

  // tasks: their number in each stage, less than 2^32.
  WorkStealing(const std::vector<int64_t>& tasks, int64_t threads)
      : threads_(threads), not_started_(threads), stages_(tasks.size()), ranges_(new Range[tasks.size() * threads]) {
    Range* range = ranges_.get();
    for (size_t s = 0; s < tasks.size(); ++s) {
      stages_[s].left.store(tasks[s], std::memory_order_relaxed);
      for (int64_t t = 0; t < threads; ++t, ++range)
        range->store(packed(tasks[s] * t / threads, tasks[s] * (t + 1) / threads), std::memory_order_relaxed);
    }
  }

  // Works on all stages as thread number `thread`, which is less than the constructor's `threads`; returns when all is
  // done. run(stage, begin, end) does tasks; what it throws leaves here, and ends the other threads' work.
  template <class Run>
  void work(int64_t thread, Run run) {
    if (thread > 0 && core_of_thread_0_ == current_core()) migrate();
    --not_started_;
    for (size_t s = 0; s < stages_.size() && !failed_; ++s) {
      int64_t done = 0;
      for (int64_t i = 0; i < threads_; ++i) {
        Range& range = ranges_[s * threads_ + (thread + i) % threads_];
        for (int64_t begin, end; !failed_ && take(range, i == 0, begin, end); done += end - begin) {
          try {
            run(s, begin, end);
          } catch (...) {
            failed_ = true;
            throw;
          }
          if (thread == 0 && not_started_ > 0) yield_to_late_threads();
        }
      }
      const auto now = Clock::now();
      if (done > 0 && stages_[s].left.fetch_sub(done, std::memory_order_acq_rel) == done) stages_[s].end = now;
      for (int64_t spins = 0; stages_[s].left.load(std::memory_order_acquire) > 0 && !failed_; ++spins) wait(spins);
    }
    if (thread == 0) core_of_thread_0_ = kNoCore;
  }

  // When a stage's last task was done; for a stage that has tasks, after the work.
  Clock::time_point end(size_t stage) const { return stages_[stage].end; }

 private:
  using Range = std::atomic<uint64_t>;  // the first task and the one after the last

  struct Stage {
    std::atomic<int64_t> left;  // tasks that are not done
    Clock::time_point end;
  };

  static constexpr int64_t kMaxSpins = 2000;  // some 50 us, after which a waiting thread leaves the core to others
  static constexpr int kNoCore = -2;          // sched_getcpu's error is -1

  static uint64_t packed(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

  // Takes a quarter of what is left of a range.
  static bool take(Range& range, bool front, int64_t& begin, int64_t& end) {
    uint64_t now = range.load(std::memory_order_relaxed);
    uint64_t then;
    do {
      const int64_t first = int64_t(now >> 32);
      const int64_t last = int64_t(now & 0xffffffff);
      if (first == last) return false;
      const int64_t count = std::max<int64_t>(1, (last - first) / 4);
      begin = front ? first : last - count;
      end = begin + count;
      then = front ? packed(end, last) : packed(first, begin);
    } while (!range.compare_exchange_weak(now, then, std::memory_order_relaxed));
    return true;
  }

  void yield_to_late_threads() {
    core_of_thread_0_ = current_core();
    std::this_thread::yield();
  }

#if defined(__linux__)
  static int current_core() { return sched_getcpu(); }

  // Has this thread woken from another core, if every thread may have one: by a new thread, which gets its own mask as
  // it starts. The kernel moves the reader of a pipe to the writer's core if nothing else runs there. If one of the
  // calls fails the thread stays, which is slower and no error.
  void migrate() const {
    cpu_set_t others;
    if (sched_getaffinity(0, sizeof others, &others) != 0 || CPU_COUNT(&others) < threads_) return;
    CPU_CLR(sched_getcpu(), &others);
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_t waker;
    if (pthread_attr_setaffinity_np(&attributes, sizeof others, &others) == 0 &&
        pthread_create(&waker, &attributes, wake, &ends[1]) == 0) {
      char byte;
      while (read(ends[0], &byte, 1) < 0 && errno == EINTR) {
      }
      pthread_join(waker, nullptr);
    }
    pthread_attr_destroy(&attributes);
    close(ends[0]);
    close(ends[1]);
  }

  static void* wake(void* end) {
    const char byte = 0;
    while (write(*static_cast<const int*>(end), &byte, 1) < 0 && errno == EINTR) {
    }
    return nullptr;
  }
#else
  static int current_core() { return kNoCore; }
  static void migrate() {}
#endif

  static void wait(int64_t spins) {
    if (spins >= kMaxSpins) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t threads_;
  std::atomic<int64_t> not_started_;            // threads
  std::atomic<int> core_of_thread_0_{kNoCore};  // when it last yielded
  std::vector<Stage> stages_;
  std::unique_ptr<Range[]> ranges_;  // by stage, then thread
  std::atomic<bool> failed_{false};
};

}  // namespace convmixer_fast::cpu
