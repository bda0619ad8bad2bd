#include "avx512.h"

#include "../operators.h"

namespace convmixer_fast::cpu {

const Kernels& avx512_kernels() { return kKernels; }

}  // namespace convmixer_fast::cpu
