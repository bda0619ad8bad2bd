// What the CUDA runtime is told about a kernel with dynamic shared memory, once, before its first launch. No torch.
//
// Terms: docs/glossary.md.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace convmixer_fast::cuda {

// On the current device: lets `kKernel` take as much dynamic shared memory as a CTA can have, and has the driver give
// shared memory the largest part of an SM's L1.
//
// The limit belongs to the function and the device, not to a launch. Were it set to what one launch needs, the smaller
// launch of another thread could lower it before that launch runs, which then fails. The device's maximum is the same
// whoever sets it and whenever, so no lock is needed.
//
// The largest carveout, because the grids of the persistent kernels count on as many CTAs at once as their shared
// memory allows: with a smaller one, some would wait for a second wave. The kernels have no use for a larger L1, and
// the library's GEMMs, which run in between, ask for as much.
//
// static: the flags belong to this library. The linker would merge those of an inline function with those of another
// copy of this library in the process, whose kernels are other functions.
template <auto kKernel>
static cudaError_t prepare_shared_memory() {
  static std::atomic<uint64_t> prepared{0};  // a bit per device
  constexpr int kCountedDevices = 64;        // any beyond are prepared at every launch
  const void* const kernel = reinterpret_cast<const void*>(kKernel);

  int device = 0;
  int max_bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const uint64_t bit = device < kCountedDevices ? uint64_t{1} << device : 0;
  if (prepared.load() & bit) return cudaSuccess;

  cudaFuncAttributes attributes{};
  status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&max_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) {
    max_bytes -= static_cast<int>(attributes.sharedSizeBytes);  // the kernel's static shared memory
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_bytes);
  }
  if (status == cudaSuccess)
    status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (status == cudaSuccess) prepared.fetch_or(bit);
  return status;
}

}  // namespace convmixer_fast::cuda
