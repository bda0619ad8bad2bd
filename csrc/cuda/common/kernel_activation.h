// Which activation the kernels' instantiations have. Host code, no CUDA.
#pragma once
#include "../../params.h"

namespace convmixer_fast::cuda {

// The activation of the instantiation that serves `activation`: ReLU is a maximum with 0, no activation one with -inf.
constexpr Activation kernel_activation(Activation activation) {
  return activation == Activation::kNone ? Activation::kRelu : activation;
}

}  // namespace convmixer_fast::cuda
