// WorkStealing without torch: every task once and after the stage before it, however many threads come and whatever is
// thrown; and no thread's CPU mask is set, not even for a moment. Prints what went wrong; the exit status is the number
// of complaints.
#include "../csrc/cpu/work_stealing.h"

#include <dirent.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <stdexcept>

using convmixer_fast::cpu::WorkStealing;

namespace {

int complaints = 0;
std::atomic<int> masks_set{0};

}  // namespace

// In place of the C library's, which sets the masks of threads that it creates without this function.
extern "C" int sched_setaffinity(pid_t thread, size_t bytes, const cpu_set_t* mask) {
  ++masks_set;
  return int(syscall(SYS_sched_setaffinity, thread, bytes, mask));
}

namespace {

void expect(bool holds, const char* what, int64_t threads, int64_t come) {
  if (holds) return;
  ++complaints;
  std::printf("%s: %ld of %ld threads\n", what, long(come), long(threads));
}

// Only the first `come` of `threads` ranges have a thread; task 0 of stage `thrown` throws.
void run(int64_t threads, int64_t come, int64_t thrown) {
  std::vector<int64_t> tasks;
  for (int64_t s = 0; s < 60; ++s) tasks.push_back(s * 7 % 23 + (s % 5 == 0 ? 200 : 0));  // none, few, many
  WorkStealing stages(tasks, threads);
  std::vector<std::vector<std::atomic<int>>> times;
  std::vector<std::atomic<int64_t>> done(tasks.size());
  for (int64_t count : tasks) times.emplace_back(count);
  std::atomic<int> early{0}, caught{0}, confined{0};
  const auto work = [&](int64_t thread) {
    cpu_set_t before, after;
    sched_getaffinity(0, sizeof before, &before);
    try {
      stages.work(thread, [&](size_t stage, int64_t begin, int64_t end) {
        if (stage > 0 && done[stage - 1] != tasks[stage - 1]) ++early;
        for (int64_t task = begin; task < end; ++task) {
          if (int64_t(stage) == thrown && task == 0) throw std::runtime_error("a task's");
          if (task % 16 == 0) std::this_thread::yield();
          ++times[stage][task];
        }
        done[stage] += end - begin;
      });
    } catch (const std::runtime_error&) {
      ++caught;
    }
    sched_getaffinity(0, sizeof after, &after);
    if (!CPU_EQUAL(&before, &after)) ++confined;
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < come; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();

  bool once = true, ordered = true;
  for (size_t s = 0; s < tasks.size(); ++s) {
    for (const std::atomic<int>& count : times[s]) once = once && (thrown < 0 ? count == 1 : count <= 1);
    const bool both = thrown < 0 && s > 0 && tasks[s - 1] > 0 && tasks[s] > 0;
    ordered = ordered && (!both || stages.end(s - 1) <= stages.end(s));
  }
  expect(once, "a task did not run once", threads, come);
  expect(ordered, "a stage ended before the one before it", threads, come);
  expect(confined == 0, "a thread may run on other cores than before", threads, come);
  expect(early == 0, "a stage began before the one before it had ended", threads, come);
  expect(caught == (thrown < 0 ? 0 : 1), "what a task throws did not leave its thread, and only that", threads, come);
}

int count_entries(const char* folder) {
  int count = 0;
  DIR* entries = opendir(folder);
  while (entries && readdir(entries)) ++count;
  closedir(entries);
  return count;
}

// Thread 1 comes late, on the core of thread 0, as often as the scheduler lets it: it leaves that core, or not, without
// a mask, and neither threads nor files stay behind. Returns whether it had to.
bool come_late_on_the_same_core(const cpu_set_t& allowed, int core) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  const auto set_mask = [](const cpu_set_t& mask) { syscall(SYS_sched_setaffinity, 0, sizeof mask, &mask); };
  WorkStealing stages({200}, 2);
  std::atomic<bool> begun{false};
  std::atomic<int> done{0};
  bool late = false;
  cpu_set_t after;
  std::thread other([&] {
    set_mask(one);
    while (!begun) std::this_thread::yield();
    set_mask(allowed);
    late = sched_getcpu() == core && done < 200;
    stages.work(1, [&](size_t, int64_t begin, int64_t end) { done += int(end - begin); });
    sched_getaffinity(0, sizeof after, &after);
  });
  set_mask(one);
  stages.work(0, [&](size_t, int64_t begin, int64_t end) {
    begun = true;
    const auto until = WorkStealing::Clock::now() + std::chrono::microseconds(50);
    while (WorkStealing::Clock::now() < until) {
    }
    done += int(end - begin);
  });
  other.join();
  set_mask(allowed);
  expect(done == 200, "a task did not run once", 2, 2);
  expect(CPU_EQUAL(&allowed, &after), "a late thread may run on other cores than before", 2, 2);
  return late;
}

}  // namespace

int main() {
  for (int repeat = 0; repeat < 12; ++repeat)
    for (int64_t threads = 1; threads <= 5; ++threads)
      for (int64_t come = 1; come <= threads; ++come) run(threads, come, repeat % 3 == 2 ? 10 : -1);

  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  if (CPU_COUNT(&allowed) > 1) {
    int core = 0, late = 0;
    while (!CPU_ISSET(core, &allowed)) ++core;
    const int threads = count_entries("/proc/self/task"), files = count_entries("/proc/self/fd");
    for (int i = 0; i < 200; ++i) late += come_late_on_the_same_core(allowed, core);
    std::printf("late on the core of thread 0: %d of 200 times\n", late);
    expect(late > 0, "no thread came late on the core of thread 0", 2, 2);
    expect(count_entries("/proc/self/task") == threads, "a thread stayed behind", 2, 2);
    expect(count_entries("/proc/self/fd") == files, "a file stayed open", 2, 2);
  }
  expect(masks_set == 0, "a thread's CPU mask was set", 0, 0);
  return complaints;
}
