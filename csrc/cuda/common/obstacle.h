// What keeps a tensor-core kernel from running, which leaves the direct kernel. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>

namespace convmixer_fast::cuda {

enum class Obstacle : int32_t {
  kNone,
  kComputeCapability,        // the GPU is older than sm_80
  kDType,                    // neither float16 nor bfloat16
  kLayout,                   // the tensors have a layout that the kernel does not take
  kKernelWidth,              // the kernel has too many columns
  kKernelWidthChannelsLast,  // the kernel has too many columns for channels_last
  kKernelHeight,             // the kernel has too many rows
  kOffsets,                  // indices, or offsets in a work tile of 16 images, need more than 32 bits
  kSharedMemory,             // not even the smallest tile fits shared memory
};

}  // namespace convmixer_fast::cuda
