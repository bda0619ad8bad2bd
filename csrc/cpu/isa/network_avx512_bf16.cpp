#include "avx512_bf16.h"

#include "../network/entry_points.h"

namespace convmixer_fast::cpu {

const NetworkKernels kAvx512Bf16Network = kNetwork;

}  // namespace convmixer_fast::cpu
