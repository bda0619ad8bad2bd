#include "avx2.h"

#include "../network/entry_points.h"

namespace convmixer_fast::cpu {

const NetworkKernels kAvx2Network = kNetwork;

}  // namespace convmixer_fast::cpu
