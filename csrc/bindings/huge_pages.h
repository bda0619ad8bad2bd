// Memory on huge pages: a layer's weights and activations are more than the TLB covers with small ones.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "allocation.h"

namespace convmixer_fast {

constexpr uintptr_t kHugePage = 2 << 20;

constexpr uintptr_t round_up(uintptr_t value, uintptr_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// So many bytes on like's device, on huge pages where the system has them: a layer's weights and activations are more
// than the TLB covers with small ones.
inline Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  Tensor tensor = empty_workspace(like, bytes);
#if defined(__linux__)
  const uintptr_t first = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = round_up(first, kHugePage), end = (first + bytes) / kHugePage * kHugePage;
  if (begin < end) {  // refused, the pages stay small
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);  // small ones of an earlier owner
  }
#endif
  return tensor;
}

// Where the steps' memory begins in a workspace, which has a huge page more than they need.
inline void* aligned(const Tensor& workspace) {
  return reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr()), kHugePage));
}

}  // namespace convmixer_fast
