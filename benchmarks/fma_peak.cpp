// The processor's peak: chains of fused multiply-adds that depend on nothing but themselves, in registers, on all
// threads. Compiled by depthwise.py for the instruction set that our kernels use; without FMA, a multiplication and an
// addition take the place of each.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kChains = 12;  // two units of latency 4 want 8; 12 and the two factors fit 16 registers

typedef float Vector __attribute__((vector_size(kBytes)));

// A vector of a value that the compiler does not know. Else it drops a chain that starts at its fixed point.
static inline Vector opaque(float value) {
  asm volatile("" : "+m"(value));
  return Vector{} + value;
}

static void work(int64_t iterations, float* result) {
  const Vector factor = opaque(0.5f), summand = opaque(1.0f);
  Vector chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = opaque(float(i));
  for (int64_t n = 0; n < iterations; ++n) {
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + summand;
  }
  for (int i = 1; i < kChains; ++i) chain[0] += chain[i];
  *result = chain[0][0];
}

// Runs the loop on every thread; returns the floating-point operations done by all, and the seconds from the first
// thread's start to the last one's end. Before that each runs half of it, and waits for the others: a thread that has
// just been created may share a core with another one for tens of milliseconds.
extern "C" double fma_loop(int threads, int64_t iterations, double* seconds) {
  using Clock = std::chrono::steady_clock;
  std::vector<float> results(threads);
  std::vector<Clock::time_point> starts(threads), ends(threads);
  std::atomic<int> ready{0};
  const auto run = [&](int thread) {
    work(iterations / 2, &results[thread]);
    ++ready;
    while (ready < threads) std::this_thread::yield();
    starts[thread] = Clock::now();
    work(iterations, &results[thread]);
    ends[thread] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  const auto first = *std::min_element(starts.begin(), starts.end());
  const auto last = *std::max_element(ends.begin(), ends.end());
  *seconds = std::chrono::duration<double>(last - first).count();
  volatile float used = results[0];  // else nothing of this need be computed
  (void)used;
  return 2.0 * double(threads) * double(iterations) * kChains * (kBytes / sizeof(float));
}
