// What the tensor-core kernels share: the items of work, and where they lie.
#pragma once
#include "smem.h"

namespace convmixer_fast::cuda {

// One of the pieces that blocks share out: channel by channel (in channels_last, 16 by 16), and within a channel tile
// by tile, then image by image.
struct MmaItem {
  int channel;  // the first
  int index;    // among the channel's items

  template <class Tile>
  __device__ MmaItem following(const Tile& tile, int channel_step) const {
    const bool last = index + 1 == tile.items_a_channel;
    return {channel + last * channel_step, last ? 0 : index + 1};
  }
};

// Where an item lies.
struct MmaPlace {
  int image;     // the first
  int images;    // that exist
  int row, col;  // of the tile in the map

  template <class Params, class Tile>
  __device__ MmaPlace(const Params& params, const Tile& tile, int index) : row(0), col(0) {
    if (tile.tiled) {
      const int tiles = tile.tiles_h * tile.tiles_w, rest = index % tiles;
      image = index / tiles;
      row = rest / tile.tiles_w * tile.bands * kUnit;
      col = rest % tile.tiles_w * tile.windows * kUnit;
    } else {
      image = index * tile.images;
    }
    images = min(tile.images, static_cast<int>(params.batch) - image);
  }
};

}  // namespace convmixer_fast::cuda
