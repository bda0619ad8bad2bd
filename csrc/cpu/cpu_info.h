// What the kernels ask about the processor.
#pragma once
#include <cstdint>

namespace convmixer_fast::cpu {

// The size of a core's L2 cache; 1 MiB where the system does not tell.
int64_t l2_bytes();

}  // namespace convmixer_fast::cpu
