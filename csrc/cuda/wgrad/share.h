// How the blocks of the gradient of the weight share its work, and where their partial sums go. Host code, no CUDA.
//
// Items (some images or a tile of one channel, or of some channels) are numbered group by group of channels. Each block
// takes consecutive ones and sums over those of one group; a block that meets a new group first writes its sums away.
// So the sums of (block b, group g) are partial number b + g: along the items either a block or a group ends between
// two.
#pragma once
#include <cstdint>

#include "../common/host_device.h"

namespace convmixer_fast::cuda {

// How blocks share the items, and the partial sums that they leave.
struct WgradShare {
  int64_t items;
  int64_t items_a_group;
  int64_t groups;  // of channels
  int channels;    // of a group
  int blocks;
  int64_t items_a_block;  // the first items % blocks of them have one more
  int64_t rest;           // items % blocks
  int64_t sums;           // of a channel in one partial: a tap each, and gy's

  CMF_HOST_DEVICE int64_t first_item(int64_t block) const {
    return block * items_a_block + (block < rest ? block : rest);
  }
  CMF_HOST_DEVICE int64_t block_of(int64_t item) const {
    const int64_t of_larger = rest * (items_a_block + 1);
    return item < of_larger ? item / (items_a_block + 1) : rest + (item - of_larger) / items_a_block;
  }
  CMF_HOST_DEVICE int64_t partial(int64_t block, int64_t group, int channel) const {  // its first element
    return ((block + group) * channels + channel) * sums;
  }
  int64_t partial_elements() const { return blocks == 0 ? 0 : (blocks + groups - 1) * channels * sums; }
};

}  // namespace convmixer_fast::cuda
