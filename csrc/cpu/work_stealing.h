// Steps of tasks, one after another, shared by however many threads come to work on them, whenever they come.
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

// Every thread has a share of each step, successive tasks, and takes some of them at a time from its beginning; once
// they are gone, from the ends of the others' shares. So a thread whose core is slow, busy otherwise or not even
// running yet delays nobody by more than what it has taken, and one thread alone does all.
//
// To a virtual machine's kernel a core that sleeps may look taken by another machine: it then wakes the other threads
// on the core of thread 0, where they would not run before the scheduler's next tick, some milliseconds later. So
// thread 0 lets those that are still to come run between its tasks, and they have themselves woken from another core.
// Nobody's CPU mask is touched for it: one that somebody else sets at the same time would be undone.
class SharedSteps {
 public:
  using Clock = std::chrono::steady_clock;

  // tasks: of every step; each fewer than 2^32.
  SharedSteps(const std::vector<int64_t>& tasks, int64_t threads)
      : threads_(threads), absent_(threads), steps_(tasks.size()), shares_(new Share[tasks.size() * threads]) {
    Share* share = shares_.get();
    for (size_t s = 0; s < tasks.size(); ++s) {
      steps_[s].left.store(tasks[s], std::memory_order_relaxed);
      for (int64_t t = 0; t < threads; ++t, ++share)
        share->store(packed(tasks[s] * t / threads, tasks[s] * (t + 1) / threads), std::memory_order_relaxed);
    }
  }

  // Works on all steps as thread number `thread`, below the constructor's; returns when all is done. run(step, begin,
  // end) does tasks; what it throws leaves here, and ends the other threads' work.
  template <class Run>
  void work(int64_t thread, Run run) {
    if (thread > 0 && core_of_0_ == current_core()) leave_core();
    --absent_;
    for (size_t s = 0; s < steps_.size() && !failed_; ++s) {
      int64_t done = 0;
      for (int64_t i = 0; i < threads_; ++i) {
        Share& share = shares_[s * threads_ + (thread + i) % threads_];
        for (int64_t begin, end; !failed_ && take(share, i == 0, begin, end); done += end - begin) {
          try {
            run(s, begin, end);
          } catch (...) {
            failed_ = true;
            throw;
          }
          if (thread == 0 && absent_ > 0) let_others_run();
        }
      }
      const auto now = Clock::now();
      if (done > 0 && steps_[s].left.fetch_sub(done, std::memory_order_acq_rel) == done) steps_[s].end = now;
      for (int64_t turns = 0; steps_[s].left.load(std::memory_order_acquire) > 0 && !failed_; ++turns) wait(turns);
    }
    if (thread == 0) core_of_0_ = kNoCore;
  }

  // When a step's last task was done; for a step that has tasks, after the work.
  Clock::time_point end(size_t step) const { return steps_[step].end; }

 private:
  using Share = std::atomic<uint64_t>;  // first task and the one after the last

  struct Step {
    std::atomic<int64_t> left;  // tasks that are not done
    Clock::time_point end;
  };

  static constexpr int64_t kTurns = 2000;  // of waiting, some 50 us, before others may have the core

  static constexpr int kNoCore = -2;  // sched_getcpu's error is -1

  static uint64_t packed(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

  // A quarter of what is left of a share.
  static bool take(Share& share, bool front, int64_t& begin, int64_t& end) {
    uint64_t now = share.load(std::memory_order_relaxed), then;
    do {
      const int64_t first = int64_t(now >> 32), last = int64_t(now & 0xffffffff);
      if (first == last) return false;
      const int64_t count = std::max<int64_t>(1, (last - first) / 4);
      begin = front ? first : last - count, end = begin + count;
      then = front ? packed(end, last) : packed(first, begin);
    } while (!share.compare_exchange_weak(now, then, std::memory_order_relaxed));
    return true;
  }

  void let_others_run() {
    core_of_0_ = current_core();
    std::this_thread::yield();
  }

#if defined(__linux__)
  static int current_core() { return sched_getcpu(); }

  // Has this thread woken from another core, if every thread may have one: by a new thread, which gets its own mask as
  // it starts. The kernel moves the reader of a pipe to the writer's core if nothing else runs there. Where a step
  // fails the thread stays, which is slower and no error.
  void leave_core() const {
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
    close(ends[0]), close(ends[1]);
  }

  static void* wake(void* end) {
    const char byte = 0;
    while (write(*static_cast<const int*>(end), &byte, 1) < 0 && errno == EINTR) {
    }
    return nullptr;
  }
#else
  static int current_core() { return kNoCore; }
  static void leave_core() {}
#endif

  static void wait(int64_t turns) {
    if (turns >= kTurns) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int64_t threads_;
  std::atomic<int64_t> absent_;          // threads that have not come yet
  std::atomic<int> core_of_0_{kNoCore};  // where thread 0 was when it last let others run
  std::vector<Step> steps_;
  std::unique_ptr<Share[]> shares_;  // by step, then thread
  std::atomic<bool> failed_{false};
};

}  // namespace convmixer_fast::cpu
