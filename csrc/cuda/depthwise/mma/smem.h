// How the maps of a work tile lie in the shared memory of the tensor-core kernels. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../common/host_device.h"
#include "shape.h"

namespace convmixer_fast::cuda {

// Pitches that are known at compile time, so that addresses become immediates: those of maps up to kFixedSubtileCols
// subtiles wide under kernels of one k-step, in the forward kernel if one warp moves aligned rows, in wgrad if each
// warp has all taps.
constexpr int kFixedSubtileCols = 4;
constexpr int kFixedPitch = 40;     // elements from one row of inputs to the next
constexpr int kFixedOutPitch = 32;  // elements from one row of outputs to the next

constexpr int kFixedLeft = 4;  // stored columns left of the map under all kernels of one k-step; wider ones have more

// The most shared memory in bytes of a CTA that works on one channel; every GPU since sm_80 gives 99 KB or more.
constexpr int kMaxSmem = 96 << 10;

// The maps of one channel, image after image, each with its border. Distances are in elements.
//
// Rows are numbered as in the map: those of the border above it are negative. There is a gap before each row 8, 16 and
// so on, and before row 0, -8 and so on; so rows in two subtiles below each other are equally far apart whatever the
// row, and the rows of one subtile follow each other without a gap.
struct StoredMaps {
  int pitch;        // from one row to the next
  int gap;          // unused before every kSubtile-th row
  int image_pitch;  // from one image to the next
  int origin;       // from the start to row 0, column 0 of the first map

  CMF_HOST_DEVICE int row(int row) const { return row * pitch + floor_subtile(row) * gap; }
  CMF_HOST_DEVICE int at(int image, int row, int col) const {
    return origin + image * image_pitch + this->row(row) + col;
  }
  CMF_HOST_DEVICE static constexpr int floor_subtile(int row) { return row >> 3; }  // also of negative rows
};
static_assert(kSubtile == 1 << 3 && StoredMaps::floor_subtile(-1) == -1);

// The smallest gap that brings a distance in elements to slot * 16 bytes modulo 128, which is one row of banks. With
// slot = the number of subtiles that the distance spans, consecutive subtiles start in consecutive 16-byte slots, so
// the eight row addresses of an ldmatrix matrix lie in different banks; so do the stores of the outputs.
constexpr int gap_to_slot(int distance, int slot) { return ((8 * slot - distance) % 64 + 64) % 64; }

// `top` and `left`: stored rows above and columns left of the map; `rows`: stored rows from the map's first on.
inline StoredMaps stored_maps(const TileShape& shape, int top, int left, int rows, int pitch) {
  StoredMaps maps{};
  maps.pitch = pitch;
  maps.gap = gap_to_slot(kSubtile * pitch, shape.subtile_cols);
  maps.origin = -maps.row(-top) + left;
  maps.image_pitch = maps.row(rows - 1) - maps.row(-top) + pitch;
  maps.image_pitch += gap_to_slot(maps.image_pitch, shape.subtile_rows * shape.subtile_cols);
  return maps;
}

// Elements from the start to row 0, column 0 of a subtile, or of the one skipped_rows subtile rows further down.
CMF_HOST_DEVICE inline int subtile_start(const TileShape& shape, const StoredMaps& maps, int subtile,
                                         int skipped_rows = 0) {
  const int subtiles_per_image = shape.subtile_rows * shape.subtile_cols;
  const int row = subtile % subtiles_per_image / shape.subtile_cols + skipped_rows;
  return maps.at(subtile / subtiles_per_image, row * kSubtile, subtile % shape.subtile_cols * kSubtile);
}

}  // namespace convmixer_fast::cuda
