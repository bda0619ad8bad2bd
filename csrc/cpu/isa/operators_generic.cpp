#include "generic.h"

#include "../operators.h"

namespace convmixer_fast::cpu {

const OperatorKernels kGenericOperators = kOperators;

}  // namespace convmixer_fast::cpu
