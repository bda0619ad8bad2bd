#include "avx512.h"

#include "../operators.h"

namespace convmixer_fast::cpu {

const OperatorKernels kAvx512Operators = kOperators;

}  // namespace convmixer_fast::cpu
