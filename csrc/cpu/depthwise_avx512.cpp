#include "isa_avx512.h"

#include "entry_points.h"

namespace convmixer_fast::cpu {

const Kernels& avx512_kernels() { return kKernels; }

}  // namespace convmixer_fast::cpu
