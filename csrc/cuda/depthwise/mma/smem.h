// How the maps of a work tile lie in the shared memory of the tensor-core kernels. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include "shape.h"

namespace convmixer_fast::cuda {

// The pitches of tiles up to 32 wide under kernels up to 9 wide are known at compile time: addresses become immediates.
constexpr int kFixedSubtileCols = 4;
constexpr int kFixedPitch = 40;     // elements from one row of inputs to the next
constexpr int kFixedLeft = 4;       // stored columns left of the map
constexpr int kFixedOutPitch = 32;  // elements from one row of outputs to the next

constexpr int kMaxSmem =
    96 << 10;  // bytes of a CTA that works on one channel; every GPU since sm_80 gives 99 KB or more

// The maps of one channel, image after image. Distances are in elements.
struct StoredMaps {
  int pitch;        // from one row to the next
  int gap;          // unused after every kSubtile rows
  int image_pitch;  // from one image to the next
};

// The smallest gap that brings a distance in elements to slot * 16 bytes modulo 128, which is one row of banks. With
// slot = the number of subtiles that the distance spans, consecutive subtiles start in consecutive 16-byte slots, so
// the eight row addresses of an ldmatrix matrix lie in different banks; so do the stores of the outputs.
constexpr int gap_to_slot(int distance, int slot) { return ((8 * slot - distance) % 64 + 64) % 64; }

template <class Shape>
inline StoredMaps stored_maps(const Shape& shape, int rows, int pitch) {
  StoredMaps maps{};
  maps.pitch = pitch;
  maps.gap = gap_to_slot(kSubtile * pitch, shape.subtile_cols);
  maps.image_pitch = rows * pitch + (rows + kSubtile - 1) / kSubtile * maps.gap;
  maps.image_pitch += gap_to_slot(maps.image_pitch, shape.subtile_rows * shape.subtile_cols);
  return maps;
}

}  // namespace convmixer_fast::cuda
