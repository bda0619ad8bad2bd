// The whole plan of the weight's gradient: the kernel, its launch geometry, and how CTAs share the work. Host code, no
// CUDA.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../common/math.h"
#include "../../params.h"
#include "../common/dtype_bytes.h"
#include "direct/plan.h"
#include "mma/plan.h"
#include "share.h"

namespace convmixer_fast::cuda {

struct WgradDevice {
  int major;            // compute capability: 9 for sm_90
  int multiprocessors;  // SMs
  int cta_smem;         // bytes of shared memory that a CTA may have
  int sm_smem;          // bytes of shared memory that an SM has
};

struct WgradPlan {
  bool tensor_cores;       // which of the two kernels
  WgradMmaPlan mma;        // its geometry if it is the tensor-core kernel
  WgradDirectPlan direct;  // its geometry if it is the direct kernel
  WgradShare share;        // how CTAs share the work tiles
  int smem_bytes;          // dynamic shared memory per CTA
};

// CTAs that an SM holds at once: by the registers that the launch bounds allow, and by shared memory.
inline int wgrad_ctas_per_sm(const WgradDevice& device, int warps, int smem_bytes) {
  constexpr int kSystemSmem = 1024;  // bytes that the system takes per CTA
  const int by_smem = device.sm_smem / (smem_bytes + kSystemSmem);
  return std::max(1, std::min(kWgradMaxWarps / std::max(warps, 1), by_smem));
}

inline WgradPlan plan_wgrad(const WgradParams& params, const WgradDevice& device) {
  WgradPlan plan{};
  WgradShare& share = plan.share;
  share.channels = 1;
  share.sums = params.kernel_h * params.kernel_w + 1;
  if (params.batch * params.channels * params.height * params.width == 0) return plan;  // no tiles: the sums are zero
  int warps = 0;
  plan.tensor_cores = device.major >= 8 && choose_wgrad_mma_plan(params, plan.mma);
  if (plan.tensor_cores) {
    warps = plan.mma.warps;
    plan.smem_bytes = plan.mma.smem_bytes();
    share.tiles_per_channel_block = plan.mma.tiles_per_channel;
  } else {
    const WgradDirectPlan& direct = plan.direct = choose_wgrad_direct_plan(params, device.cta_smem);
    warps = direct.threads / 32;
    plan.smem_bytes = direct.smem_bytes(bytes_of(params.dtype), arithmetic_bytes_of(params.dtype));
    share.channels = direct.channels;
    share.tiles_per_channel_block = ceil_div(params.batch, direct.images) * direct.tiles_h * direct.tiles_w;
  }
  share.channel_blocks = ceil_div(params.channels, share.channels);
  share.work_tiles = share.tiles_per_channel_block * share.channel_blocks;
  const int64_t ctas = int64_t{device.multiprocessors} * wgrad_ctas_per_sm(device, warps, plan.smem_bytes);
  share.ctas = static_cast<int>(std::min(share.work_tiles, ctas));
  share.tiles_per_cta = share.work_tiles / share.ctas;
  share.remainder = share.work_tiles % share.ctas;
  return plan;
}

}  // namespace convmixer_fast::cuda
