// What a CTA of the tensor-core kernels processes at a time, and where it lies.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../../params.h"
#include "shape.h"

namespace convmixer_fast::cuda {

// Where a work tile lies. One of several tiles of a map has one image.
struct TilePosition {
  int image;   // the first image
  int images;  // images in this work tile, fewer in the last one
  int row;     // the first row in the map
  int col;     // the first column in the map

  template <class Params>
  __device__ TilePosition(const Params& params, const TileShape& shape, int index) : row(0), col(0) {
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

// Work tiles are numbered by channel (in channels_last by sets of channels), then by image or images, then by tile row
// and tile column, the last one fastest.
struct WorkTile {
  int channel;  // the first channel
  int index;    // number among the channel's work tiles

  template <class Plan>
  __device__ __forceinline__ bool is_last(const Plan& plan) const {
    return index + 1 == plan.tiles_per_channel;
  }
  template <class Plan>
  __device__ __forceinline__ WorkTile following(const Plan& plan, int channel_step) const {
    const bool last = is_last(plan);
    return {channel + last * channel_step, last ? 0 : index + 1};
  }
  // The first image and channel in a tensor whose maps are whole; the first image in one whose maps are in tiles.
  template <class Element, class Plan>
  __device__ Element* in(Element* tensor, const Strides& stride, const Plan& plan) const {
    return tensor + channel * stride.c + index * plan.shape.images * stride.n;
  }
  template <class Element>
  __device__ Element* at(Element* tensor, const Strides& stride, const TilePosition& position) const {
    return tensor + channel * stride.c + position.image * stride.n;
  }
};

// The work tiles of one CTA: CTAs share all of them evenly. Siblings have the same share, each of them its own octet of
// channels.
struct WorkShare {
  WorkTile first;
  int count;

  // channels: channels per work tile.
  template <class Plan>
  __device__ WorkShare(const Plan& plan, int siblings, int channels) {
    const int cta = static_cast<int>(blockIdx.x);
    const int share = cta / siblings;
    const int shares = gridDim.x / siblings;
    const int64_t begin = plan.work_tiles / siblings * share / shares;
    count = static_cast<int>(plan.work_tiles / siblings * (share + 1) / shares - begin);
    first.channel = static_cast<int>(begin / plan.tiles_per_channel) * siblings * channels + cta % siblings * channels;
    first.index = static_cast<int>(begin % plan.tiles_per_channel);
  }
};

}  // namespace convmixer_fast::cuda
