// What a CTA of the tensor-core kernels processes at a time, and where it lies.
#pragma once
#include "shape.h"

namespace convmixer_fast::cuda {

// Work tiles are numbered channel by channel (in channels_last, 16 channels by 16), and within a channel tile by tile,
// then image by image.
struct WorkTile {
  int channel;  // the first channel
  int index;    // number among the channel's work tiles

  template <class Plan>
  __device__ WorkTile following(const Plan& plan, int channel_step) const {
    const bool last = index + 1 == plan.tiles_per_channel;
    return {channel + last * channel_step, last ? 0 : index + 1};
  }
};

struct TilePosition {
  int image;   // the first image
  int images;  // images that exist
  int row;     // the first row in the map
  int col;     // the first column in the map

  // `shape` has the fields of TileShape.
  template <class Params, class Shape>
  __device__ TilePosition(const Params& params, const Shape& shape, int index) : row(0), col(0) {
    if (shape.tiled) {
      const int tiles = shape.tiles_h * shape.tiles_w;
      const int rest = index % tiles;
      image = index / tiles;
      row = rest / shape.tiles_w * shape.subtile_rows * kSubtile;
      col = rest % shape.tiles_w * shape.subtile_cols * kSubtile;
    } else {
      image = index * shape.images;
    }
    images = min(shape.images, static_cast<int>(params.batch) - image);
  }
};

}  // namespace convmixer_fast::cuda
