#include "avx512.h"

#include "../network/entry_points.h"

namespace convmixer_fast::cpu {

const NetworkKernels kAvx512Network = kNetwork;

}  // namespace convmixer_fast::cpu
