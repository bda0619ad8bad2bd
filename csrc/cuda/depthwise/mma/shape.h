// How the tensor-core kernels cut maps into tiles, and tiles into subtiles. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../../../common/math.h"
#include "../../common/host_device.h"

namespace convmixer_fast::cuda {

// A subtile is 8 x 8 outputs: subtile row r holds rows 8r .. 8r + 7, subtile column q columns 8q .. 8q + 7. The M = 16
// rows of an mma are 16 subtiles, of one image or of several images of the same channel; such an M block is what a warp
// computes at a time. In the gradient of the weight the same 16 subtiles are the K of an mma.
constexpr int kSubtile = 8;
constexpr int kSubtilesPerMma = 16;
constexpr int kMmaK = 16;                                   // stored columns (padding included) that one mma covers
constexpr int kMaxWholeMapSubtiles = 16 * kSubtilesPerMma;  // larger maps are cut into tiles

// The widest kernel, its padding centred, whose columns and those of a subtile fit so many mmas along K.
constexpr int max_kernel_w(int k_steps) { return kMmaK * k_steps - (kSubtile - 1); }

// The outputs of one work tile, per channel; for the weight's gradient the elements of gy.
struct TileShape {
  int images;        // images per work tile
  int subtile_rows;  // subtiles along h, per image
  int subtile_cols;  // subtiles along w, per image
  int tiles_h;       // tiles along h, per map
  int tiles_w;       // tiles along w, per map
  bool tiled;        // a map has more than one tile: inputs come with a halo
  int subtiles;      // subtiles per work tile
  int m_blocks;      // sets of kSubtilesPerMma subtiles

  // Images of a channel's last work tile, if maps are whole.
  CMF_HOST_DEVICE int images_in_last(int batch, int tiles_per_channel) const {
    return batch - (tiles_per_channel - 1) * images;
  }
};

inline TileShape tile_shape(int64_t height, int64_t width, int64_t subtile_rows, int64_t subtile_cols, int64_t images) {
  TileShape shape{};
  shape.images = static_cast<int>(images);
  shape.subtile_rows = static_cast<int>(subtile_rows);
  shape.subtile_cols = static_cast<int>(subtile_cols);
  shape.tiles_h = static_cast<int>(ceil_div(height, subtile_rows * kSubtile));
  shape.tiles_w = static_cast<int>(ceil_div(width, subtile_cols * kSubtile));
  shape.tiled = shape.tiles_h * shape.tiles_w > 1;
  shape.subtiles = shape.images * shape.subtile_rows * shape.subtile_cols;
  shape.m_blocks = static_cast<int>(ceil_div(shape.subtiles, kSubtilesPerMma));
  return shape;
}

// The first of these that fits(shape) takes, which is called until it returns true: whole maps, as many images as one M
// block holds, then half as many, and so on; then of one image tiles of as many subtiles a side as `sides` says, one
// after the other. False if none fits.
template <class Fits>
bool first_shape(int64_t height, int64_t width, int64_t batch, std::initializer_list<int64_t> sides, const Fits& fits) {
  const int64_t rows = ceil_div(height, kSubtile);
  const int64_t cols = ceil_div(width, kSubtile);
  const int64_t subtiles = rows * cols;
  const int64_t images_per_m_block = kSubtilesPerMma / std::min<int64_t>(kSubtilesPerMma, subtiles);
  if (subtiles <= kMaxWholeMapSubtiles)
    for (int64_t images = std::min(batch, images_per_m_block); images > 0; images /= 2)
      if (fits(tile_shape(height, width, rows, cols, images))) return true;
  for (const int64_t side : sides)
    if (fits(tile_shape(height, width, std::min(rows, side), std::min(cols, side), 1))) return true;
  return false;
}

// Work tiles per channel, or per set of channels that a CTA works on at a time.
inline int64_t tiles_per_channel(const TileShape& shape, int64_t batch) {
  return ceil_div(batch, shape.images) * shape.tiles_h * shape.tiles_w;
}

}  // namespace convmixer_fast::cuda
