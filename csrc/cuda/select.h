// Which CUDA kernel runs, with which launch geometry, and why it is not the tensor-core kernel: the only place that
// decides, for the launchers and for convmixer_fast.explain. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../common/math.h"
#include "../params.h"
#include "common/device.h"
#include "common/dtype_bytes.h"
#include "common/launch_bounds.h"
#include "common/obstacle.h"
#include "depthwise/direct/plan.h"
#include "depthwise/mma/plan.h"
#include "wgrad/direct/plan.h"
#include "wgrad/mma/plan.h"
#include "wgrad/share.h"

namespace convmixer_fast::cuda {

constexpr int kMmaMajor = 8;  // compute capability from which the tensor-core kernels run

// The plan of the tensor-core kernel, or what keeps it from running.
inline Obstacle plan_tensor_cores(const DepthwiseParams& params, const Device& device, MmaPlan& plan) {
  if (device.major < kMmaMajor) return Obstacle::kComputeCapability;
  return choose_mma_plan(params, device, plan);
}
inline Obstacle plan_tensor_cores(const WgradParams& params, const Device& device, WgradMmaPlan& plan) {
  if (device.major < kMmaMajor) return Obstacle::kComputeCapability;
  return choose_wgrad_mma_plan(params, plan);
}

struct DepthwiseChoice {
  bool tensor_cores;    // which of the two kernels
  Obstacle obstacle;    // why it is the direct kernel
  MmaPlan mma;          // launch geometry if it is the tensor-core kernel
  DirectPlan direct;    // launch geometry if it is the direct kernel
  LaunchBounds bounds;  // launch bounds of the kernel
};

inline DepthwiseChoice select(const DepthwiseParams& params, const Device& device) {
  DepthwiseChoice choice{};
  choice.obstacle = plan_tensor_cores(params, device, choice.mma);
  choice.tensor_cores = choice.obstacle == Obstacle::kNone;
  if (choice.tensor_cores) {
    choice.bounds = mma_launch_bounds(choice.mma.loader, choice.mma.k_steps, choice.mma.one_warp);
  } else {
    choice.direct = choose_direct_plan(params);
    choice.bounds = direct_launch_bounds(bytes_of(params.dtype));
  }
  return choice;
}

struct WgradChoice {
  bool tensor_cores;       // which of the two kernels
  Obstacle obstacle;       // why it is the direct kernel
  WgradMmaPlan mma;        // launch geometry if it is the tensor-core kernel
  WgradDirectPlan direct;  // launch geometry if it is the direct kernel
  WgradShare share;        // how CTAs share the work tiles; no CTAs if there is nothing to sum
};

inline WgradChoice select(const WgradParams& params, const Device& device) {
  WgradChoice choice{};
  choice.share.channels = 1;
  choice.share.sums = params.kernel_h * params.kernel_w + 1;
  if (params.batch * params.channels * params.height * params.width == 0) return choice;
  choice.obstacle = plan_tensor_cores(params, device, choice.mma);
  choice.tensor_cores = choice.obstacle == Obstacle::kNone;
  if (choice.tensor_cores) {
    const LaunchBounds bounds = wgrad_launch_bounds(choice.mma.taps.unrolled, choice.mma.loader);
    share_work(params.channels, choice.mma.tiles_per_channel, choice.mma.warps, bounds.threads / 32 * bounds.min_ctas,
               choice.mma.smem_bytes(), device, choice.share);
  } else {
    const WgradDirectPlan& direct = choice.direct = choose_wgrad_direct_plan(params, device.cta_smem);
    choice.share.channels = direct.channels;
    const int smem_bytes = direct.smem_bytes(bytes_of(params.dtype), arithmetic_bytes_of(params.dtype));
    const int64_t tiles = ceil_div(params.batch, direct.images) * direct.tiles_h * direct.tiles_w;
    share_work(params.channels, tiles, direct.threads / 32, kWgradMaxWarps, smem_bytes, device, choice.share);
  }
  return choice;
}

}  // namespace convmixer_fast::cuda
