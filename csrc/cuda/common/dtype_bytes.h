// Sizes of the storage types, and of the types that their arithmetic is done in. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../params.h"

namespace convmixer_fast::cuda {

inline int bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Accumulators, taps in shared memory, partial sums.
inline int arithmetic_bytes_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

}  // namespace convmixer_fast::cuda
