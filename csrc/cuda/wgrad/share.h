// How the CTAs share the work of the weight's gradient, and where their partial sums go. Host code, no CUDA.
//
// Work tiles are ordered by channel block and split into contiguous ranges, one per CTA. A CTA flushes one partial sum
// per channel block it touches. From one flush to the next exactly one of (CTA, channel block) advances, so
// index = CTA + channel block is unique and dense.
#pragma once
#include <cstdint>

#include "../common/host_device.h"

namespace convmixer_fast::cuda {

struct WgradShare {
  int64_t work_tiles;
  int64_t tiles_per_channel_block;
  int64_t channel_blocks;
  int channels;           // channels per channel block
  int ctas;               // CTAs
  int64_t tiles_per_cta;  // work tiles per CTA; the first `remainder` CTAs have one more
  int64_t remainder;      // work_tiles % ctas
  int64_t sums;           // sums per channel in one partial: one per tap, and that of gy

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

}  // namespace convmixer_fast::cuda
