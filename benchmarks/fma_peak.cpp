// The processor's peak: chains of fused multiply-adds that depend on nothing but themselves, in registers, on all
// threads. Compiled for the machine that runs it, by depthwise.py.
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

static void work(int64_t iterations, float factor, float summand, float* result) {
  const Vector a = Vector{} + factor, b = Vector{} + summand;
  Vector chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = Vector{} + float(i);
  for (int64_t n = 0; n < iterations; ++n) {
    for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * a + b;
  }
  for (int i = 1; i < kChains; ++i) chain[0] += chain[i];
  *result = chain[0][0];
}

// Runs the loop on every thread; returns the floating-point operations done by all.
extern "C" double fma_loop(int threads, int64_t iterations) {
  std::vector<float> results(threads);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, iterations, 0.5f, 1.0f, &results[t]);
  work(iterations, 0.5f, 1.0f, &results[0]);
  for (std::thread& other : others) other.join();
  volatile float used = results[0];  // else nothing of this need be computed
  (void)used;
  return 2.0 * double(threads) * double(iterations) * kChains * (kBytes / sizeof(float));
}
