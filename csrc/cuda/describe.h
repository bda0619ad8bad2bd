// A choice of select.h in words: the kernel's name, and why it is not the tensor-core kernel. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include <string>

#include "common/kernel_activation.h"
#include "pool/plan.h"
#include "select.h"

namespace convmixer_fast::cuda {

struct KernelLimits {
  int height;               // tap rows, at most
  int width;                // tap columns, at most
  int width_channels_last;  // tap columns in channels_last, at most
  bool channels_last;       // whether it takes that layout
};
constexpr KernelLimits kDepthwiseLimits = {kMaxKernelH, kMaxKernelW, kMaxKernelWChannelsLast, true};
constexpr KernelLimits kWgradLimits = {kWgradMaxKernelH, kWgradMaxKernelW, 0, false};

// Empty if nothing keeps the tensor-core kernel from running. Params: DepthwiseParams or WgradParams.
template <class Params>
std::string describe(Obstacle obstacle, const Params& params, const Device& device, const KernelLimits& limits) {
  const std::string kernel = "the tensor-core kernel ";
  const auto up_to = [](int most, const char* what, int64_t given) {
    return "takes kernels up to " + std::to_string(most) + what + ", kernel_size has " + std::to_string(given);
  };
  switch (obstacle) {
    case Obstacle::kNone: return "";
    case Obstacle::kComputeCapability:
      return kernel + "needs sm_80 or later, the GPU is sm_" + std::to_string(device.major) + "x";
    case Obstacle::kDType:
      return kernel + "takes float16 and bfloat16, dtype is " +
             (params.dtype == DType::kFloat64 ? "float64" : "float32");
    case Obstacle::kLayout:
      return kernel + (limits.channels_last
                           ? "takes tensors whose rows, or the channels of whose pixels, are contiguous"
                           : "takes tensors whose rows are contiguous");
    case Obstacle::kKernelWidth: return kernel + up_to(limits.width, " columns wide", params.kernel_w);
    case Obstacle::kKernelWidthChannelsLast:
      return "in channels_last " + kernel + up_to(limits.width_channels_last, " columns wide", params.kernel_w);
    case Obstacle::kKernelHeight: return kernel + up_to(limits.height, " rows high", params.kernel_h);
    case Obstacle::kOffsets: return kernel + "numbers images, channels and elements with 32 bits, which do not suffice";
    case Obstacle::kSharedMemory: return "no tile of the tensor-core kernel fits its shared memory";
  }
  return "";
}

inline const char* element_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "double";
    case DType::kFloat32: return "float";
    case DType::kFloat16: return "__half";
    case DType::kBFloat16: return "__nv_bfloat16";
  }
  return "";
}

// A kernel's name in C++ with its template arguments, as a demangler gives it, without namespaces.
inline std::string kernel_name(const DepthwiseParams& params, const DepthwiseChoice& choice) {
  const auto flag = [](bool value) { return value ? ", true" : ", false"; };
  const std::string type = element_type(params.dtype);
  if (!choice.tensor_cores)
    return "depthwise_direct_kernel<DirectTraits<" + type + flag(direct_is_channels_last(params)) + ", " +
           std::to_string(direct_exact_taps(params)) + ">>";
  const int activation = static_cast<int>(kernel_activation(params.epilogue.activation));
  return "depthwise_mma_kernel<MmaTraits<" + type + ", " + std::to_string(choice.mma.unrolled) + ", " +
         std::to_string(choice.mma.k_steps) + ", (Activation)" + std::to_string(activation) + ", (Loader)" +
         std::to_string(static_cast<int>(choice.mma.loader)) + flag(choice.mma.one_warp) + ">>";
}

inline std::string kernel_name(const WgradParams& params, const WgradMmaPlan& plan) {
  return std::string("depthwise_wgrad_mma_kernel<WgradTraits<") + element_type(params.dtype) + ", " +
         std::to_string(plan.taps.unrolled ? plan.taps.tap_rows : 0) + ", (Loader)" +
         std::to_string(static_cast<int>(plan.loader)) + ">>";
}

inline std::string kernel_name(const PoolParams& params, const PoolPlan& plan) {
  const int activation = static_cast<int>(kernel_activation(params.prologue.activation));
  return std::string("activate_pool_kernel<PoolTraits<") + element_type(params.dtype) + ", (Activation)" +
         std::to_string(activation) + ", (PoolAccess)" + std::to_string(static_cast<int>(plan.access)) +
         (plan.small_maps ? ", true>>" : ", false>>");
}

}  // namespace convmixer_fast::cuda
