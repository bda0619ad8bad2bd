// How many CTAs of a kernel an SM holds at once. No torch.
//
// Terms: docs/glossary.md.
#pragma once
#include <cuda_runtime_api.h>

#include "answer_cache.h"

namespace convmixer_fast::cuda {

struct OccupancyQuestion {
  int device;
  int threads;  // per CTA
  int smem;     // bytes of dynamic shared memory per CTA

  bool operator==(const OccupancyQuestion& other) const {
    return device == other.device && threads == other.threads && smem == other.smem;
  }
};

// Entries for one kernel. A network's layers need one or two; where the sizes of maps keep changing, the driver is
// asked each time.
constexpr size_t kCachedOccupancies = 8;

// On the current device. The kernel must have been prepared (prepare_shared_memory), since the answer depends on what
// shared memory it may have.
//
// static: the cache belongs to this library, as the flags of prepare_shared_memory do.
template <auto kKernel>
static cudaError_t query_ctas_per_sm(int threads, int smem, int& ctas_per_sm) {
  static AnswerCache<OccupancyQuestion, int, kCachedOccupancies> answers;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  return answers.get({device, threads, smem}, ctas_per_sm, [&](int& asked) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&asked, kKernel, threads, smem);
  });
}

}  // namespace convmixer_fast::cuda
