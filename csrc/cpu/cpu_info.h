// Facts about the processor that the kernels' plans depend on.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>

namespace convmixer_fast::cpu {

constexpr int64_t kCacheLine = 64;  // bytes

// The size of a core's L2 cache; 1 MiB if the system does not tell.
int64_t l2_bytes();

}  // namespace convmixer_fast::cpu
