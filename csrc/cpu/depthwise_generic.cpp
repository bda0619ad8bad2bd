#include "isa_generic.h"

#include "entry_points.h"

namespace convmixer_fast::cpu {

const Kernels& generic_kernels() { return kKernels; }

}  // namespace convmixer_fast::cpu
