#include "avx2.h"

#include "../operators.h"

namespace convmixer_fast::cpu {

const Kernels& avx2_kernels() { return kKernels; }

}  // namespace convmixer_fast::cpu
