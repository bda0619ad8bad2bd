// What a CTA of the tensor-core kernels processes at a time, and where it lies.
//
// Terms: docs/glossary.md.
#pragma once
#include "shape.h"

namespace convmixer_fast::cuda {

// Work tiles are numbered by channel (in channels_last by sets of channels), then by image or images, then by tile row
// and tile column, the last one fastest.
struct WorkTile {
  int channel;  // the first channel
  int index;    // number among the channel's work tiles

  template <class Plan>
  __device__ WorkTile following(const Plan& plan, int channel_step) const {
    const bool last = index + 1 == plan.tiles_per_channel;
    return {channel + last * channel_step, last ? 0 : index + 1};
  }
};

// Where a work tile lies. One of several tiles of a map has one image.
struct TilePosition {
  int image;   // the first image
  int images;  // images in this work tile, fewer in the last one
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
