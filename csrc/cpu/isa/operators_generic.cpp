#include "generic.h"

#include "../operators.h"

namespace convmixer_fast::cpu {

const Kernels& generic_kernels() { return kKernels; }

}  // namespace convmixer_fast::cpu
