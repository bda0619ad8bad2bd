// How the CTAs share the work of the weight's gradient, and where their partial sums go. Host code, no CUDA.
//
// Work tiles are ordered by channel block and split into contiguous ranges, one per CTA. A CTA flushes one partial sum
// per channel block it touches. From one flush to the next exactly one of (CTA, channel block) advances, so
// index = CTA + channel block is unique and dense.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../common/math.h"
#include "../common/device.h"
#include "../common/host_device.h"

namespace convmixer_fast::cuda {

constexpr int kWgradMaxWarps = 16;  // warps per CTA

struct WgradShare {
  int64_t work_tiles;               // all of them
  int64_t tiles_per_channel_block;  // work tiles per channel block
  int64_t channel_blocks;           // channel blocks
  int channels;                     // channels per channel block
  int ctas;                         // CTAs
  int64_t tiles_per_cta;            // work tiles per CTA; the first `remainder` CTAs have one more
  int64_t remainder;                // work_tiles % ctas
  int64_t sums;                     // sums per channel in one partial: one per tap, and that of gy

  CMF_HOST_DEVICE int64_t first_tile(int64_t cta) const {
    return cta * tiles_per_cta + (cta < remainder ? cta : remainder);
  }
  CMF_HOST_DEVICE int64_t cta_of(int64_t work_tile) const {
    const int64_t in_larger = remainder * (tiles_per_cta + 1);
    return work_tile < in_larger ? work_tile / (tiles_per_cta + 1)
                                 : remainder + (work_tile - in_larger) / tiles_per_cta;
  }
  // The first element of a channel's partial.
  CMF_HOST_DEVICE int64_t partial(int64_t cta, int64_t channel_block, int channel) const {
    return ((cta + channel_block) * channels + channel) * sums;
  }
  int64_t partial_elements() const { return ctas == 0 ? 0 : (ctas + channel_blocks - 1) * channels * sums; }
};

// Divides the work among as many CTAs as the device holds at once. warps: per CTA; warps_per_sm: as many as an SM
// has registers for. share.channels and share.sums must be set.
inline void share_work(int64_t channels, int64_t tiles_per_channel_block, int warps, int warps_per_sm, int smem_bytes,
                       const Device& device, WgradShare& share) {
  const int by_registers = warps_per_sm / std::max(warps, 1);
  const int by_smem = device.sm_smem / (smem_bytes + kSystemSmem);
  const int64_t ctas_per_sm = std::max(1, std::min(by_registers, by_smem));
  share.channel_blocks = ceil_div(channels, share.channels);
  share.tiles_per_channel_block = tiles_per_channel_block;
  share.work_tiles = share.tiles_per_channel_block * share.channel_blocks;
  share.ctas = static_cast<int>(std::min(share.work_tiles, device.sms * ctas_per_sm));
  share.tiles_per_cta = share.work_tiles / share.ctas;
  share.remainder = share.work_tiles % share.ctas;
}

}  // namespace convmixer_fast::cuda
