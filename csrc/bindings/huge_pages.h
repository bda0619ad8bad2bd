// Tensors on huge pages. The weights and activations of a layer are more than the TLB covers with small pages.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "allocation.h"

namespace convmixer_fast {

constexpr uintptr_t kHugePage = 2 << 20;  // bytes

constexpr uintptr_t align_up(uintptr_t value, uintptr_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Uninitialised bytes on like's device, on huge pages if the system has them.
inline Tensor empty_on_huge_pages(const Tensor& like, int64_t bytes) {
  Tensor tensor = empty_workspace(like, bytes);
#if defined(__linux__)
  const uintptr_t first = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = align_up(first, kHugePage);
  const uintptr_t end = (first + bytes) / kHugePage * kHugePage;
  if (begin < end) {  // madvise may fail; the pages then stay small
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);  // gives back small pages of an earlier owner
  }
#endif
  return tensor;
}

// The first address in a workspace that is a multiple of kHugePage; the caller has allocated kHugePage bytes more.
inline void* huge_page_aligned(const Tensor& workspace) {
  return reinterpret_cast<void*>(align_up(reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr()), kHugePage));
}

}  // namespace convmixer_fast
