// How the gradient of the weight cuts its work: which kernel, its geometry, and where the partial sums go. Host code,
// no CUDA.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../common/math.h"
#include "../../params.h"
#include "direct/plan.h"
#include "mma/plan.h"
#include "share.h"

namespace convmixer_fast::cuda {

struct WgradDevice {
  int major;  // of the compute capability
  int multiprocessors;
  int block_smem, multiprocessor_smem;  // bytes that a block may have, that an SM has
};

struct WgradPlan {
  bool tensor_cores;
  WgradTile mma;
  WgradDirectTile direct;
  WgradShare share;
  int smem_bytes;
};

inline WgradPlan plan_wgrad(const WgradParams& params, const WgradDevice& device) {
  using namespace tiles;
  WgradPlan plan{};
  WgradShare& share = plan.share;
  share.channels = 1;
  share.sums = params.kernel_h * params.kernel_w + 1;
  if (params.batch * params.channels * params.height * params.width == 0) return plan;  // no items: the sums are zero
  int warps = 0;
  plan.tensor_cores = device.major >= 8 && choose_wgrad_tile(params, plan.mma);
  if (plan.tensor_cores) {
    warps = plan.mma.warps;
    plan.smem_bytes = plan.mma.smem_bytes();
    share.items_a_group = plan.mma.items_a_channel;
  } else {
    const WgradDirectTile& tile = plan.direct = choose_wgrad_direct_tile(params, device.block_smem);
    warps = tile.threads / 32;
    plan.smem_bytes = tile.smem_bytes(bytes_of(params.dtype), params.dtype == DType::kFloat64 ? 8 : 4);
    share.channels = tile.channels;
    share.items_a_group = ceil_div(params.batch, tile.images) * tile.tiles_h * tile.tiles_w;
  }
  share.groups = ceil_div(params.channels, share.channels);
  share.items = share.items_a_group * share.groups;
  // Blocks that an SM holds at once: by the registers that the launch bounds allow, and by shared memory.
  constexpr int kSystemSmem = 1024;  // of each block
  const int by_smem = device.multiprocessor_smem / (plan.smem_bytes + kSystemSmem);
  const int64_t each = std::max(1, std::min(kWgradMaxWarps / std::max(warps, 1), by_smem));
  share.blocks = static_cast<int>(std::min(share.items, device.multiprocessors * each));
  share.items_a_block = share.items / share.blocks;
  share.rest = share.items % share.blocks;
  return plan;
}

}  // namespace convmixer_fast::cuda
