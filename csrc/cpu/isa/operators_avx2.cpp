#include "avx2.h"

#include "../operators.h"

namespace convmixer_fast::cpu {

const OperatorKernels kAvx2Operators = kOperators;

}  // namespace convmixer_fast::cpu
