// Sizes of the storage types. Host code, no CUDA.
#pragma once
#include "../../params.h"

namespace convmixer_fast::cuda {

inline int bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace convmixer_fast::cuda
