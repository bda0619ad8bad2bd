#include "isa_avx2.h"

#include "entry_points.h"

namespace convmixer_fast::cpu {

const Kernels& avx2_kernels() { return kKernels; }

}  // namespace convmixer_fast::cpu
