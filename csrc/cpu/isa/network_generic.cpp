#include "generic.h"

#include "../network/entry_points.h"

namespace convmixer_fast::cpu {

const NetworkKernels kGenericNetwork = kNetwork;

}  // namespace convmixer_fast::cpu
