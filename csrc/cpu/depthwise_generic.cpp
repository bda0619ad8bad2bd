// Any CPU: 16-byte vectors (SSE2, NEON).
#define CMF_ISA "generic"
#define CMF_VECTOR_BYTES 16
#if defined(__aarch64__)
#define CMF_VECTOR_REGISTERS 32
#else
#define CMF_VECTOR_REGISTERS 16
#endif
#include "entry_points.h"

namespace convmixer_fast::cpu {

const Kernels& generic_kernels() { return kKernels; }

}  // namespace convmixer_fast::cpu
