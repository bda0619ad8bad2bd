// How the threads of the tensor-core kernels divide what they load and store. Host code, no CUDA; the code that moves
// it is in loaders/.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../../params.h"
#include "smem.h"

namespace convmixer_fast::cuda {

// Which code moves maps between memory and shared memory; a template argument of the kernels. The first three are for
// contiguous rows, the others for contiguous channels.
enum class Loader : int32_t {
  kAlignedRows,       // whole maps, one work tile ahead: rows of whole 16-byte vectors (loaders/aligned_rows.cuh)
  kUnalignedRows,     // whole maps, one work tile ahead: any rows, in words (loaders/unaligned_rows.cuh)
  kTiles,             // maps or tiles with their halo, not ahead: whatever is left (loaders/tiles.cuh)
  kChannelsLast,      // whole maps, one work tile ahead: octets of channels (loaders/channels_last.cuh)
  kChannelsLastTiles  // as kTiles
};

template <Loader kLoader>
using LoaderConstant = std::integral_constant<Loader, kLoader>;

constexpr bool is_channels_last(Loader loader) { return loader >= Loader::kChannelsLast; }

constexpr int64_t kMaxOffset = int64_t{1} << 31;  // indices and offsets inside a work tile are below it

// Registers in which a thread holds its part of the next work tile, per tensor: 16 warps of an SM keep 32 KB in flight.
constexpr int kPrefetchRegisters = 16;

// Threads that load ahead move their part of a work tile in steps. In kAlignedRows that is one step per vector.
constexpr int kAlignedVectors = kPrefetchRegisters / 4;
constexpr int kUnalignedSteps = kPrefetchRegisters;         // a word per step
constexpr int kChannelsLastSteps = kPrefetchRegisters / 8;  // two octets per step, of neighbouring pixels

// Sets to 0 the strides of dimensions of size 1: they are never applied, and 0 passes every test of divisibility.
template <class Params>
inline Strides used_strides(const Params& params, Strides stride) {
  if (params.batch == 1) stride.n = 0;
  if (params.channels == 1) stride.c = 0;
  if (params.height == 1) stride.h = 0;
  if (params.width == 1) stride.w = 0;
  return stride;
}

// The widest access, in elements, that divides the base address, the extent of the contiguous dimension and all other
// strides.
inline int vector_width(const void* base, int64_t extent, const Strides& stride, bool channels_last) {
  const int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) / 2) | extent | stride.n | stride.h |
                       (channels_last ? stride.w : stride.c);
  return bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

// Threads that move `vectors` access vectors together: the smallest power of two that suffices, at most a warp.
inline int threads_for(int64_t vectors) {
  int threads = 1;
  while (threads < vectors && threads < 32) threads *= 2;
  return threads;
}

// How threads move whole maps in steps. A step covers either rows of one image, or several whole images.
struct LoaderSteps {
  int threads_per_row;
  int rows_per_step;    // a power of two
  int images_per_step;  // 1 if a map takes several steps
  int steps_per_image;  // a power of two; 1 if a step covers several images

  CMF_HOST_DEVICE int first_image(int step) const { return step / steps_per_image * images_per_step; }
  CMF_HOST_DEVICE int first_row(int step) const { return step % steps_per_image * rows_per_step; }
};

// False if a work tile takes more than max_steps steps.
inline bool divide_into_steps(const TileShape& shape, int threads, int64_t threads_per_row, int64_t height,
                              int max_steps, LoaderSteps& steps) {
  if (threads_per_row > threads) return false;
  steps.threads_per_row = static_cast<int>(threads_per_row);
  steps.rows_per_step = 1;
  while (2 * steps.rows_per_step * threads_per_row <= threads) steps.rows_per_step *= 2;
  steps.images_per_step = static_cast<int>(std::max<int64_t>(1, steps.rows_per_step / height));
  steps.steps_per_image = 1;
  while (steps.steps_per_image * steps.rows_per_step < height && steps.steps_per_image < max_steps)
    steps.steps_per_image *= 2;
  return steps.steps_per_image * steps.rows_per_step >= height &&
         ceil_div(shape.images, steps.images_per_step) * steps.steps_per_image <= max_steps;
}

// Distances between consecutive steps of a thread, in a tensor or in shared memory. Because everything that divides the
// steps is a power of two, the distance from step s to s + 1 depends only on how often 2 divides s + 1: on whether the
// step leaves an image, or 8 rows, after which there is a gap.
constexpr int kStepLevels = 4;
struct StepDistances {
  int after[kStepLevels];  // elements, by how often 2 divides s + 1
};
static_assert(kUnalignedSteps <= 1 << kStepLevels, "2 divides the number of every step but the first less often");

// offset(image, row): elements from the first image and row.
template <class Offset>
inline StepDistances step_distances(const LoaderSteps& steps, int max_steps, const Offset& offset) {
  StepDistances distances{};
  const auto at = [&](int step) -> int64_t { return offset(steps.first_image(step), steps.first_row(step)); };
  for (int level = 0; level < kStepLevels && 1 << level < max_steps; level++)
    distances.after[level] = static_cast<int>(at(1 << level) - at((1 << level) - 1));
  return distances;
}

// From one work tile of a CTA to its next, in a tensor whose maps are whole. Distances are in elements.
struct TileDistances {
  int64_t next;     // to the channel's next images
  int64_t channel;  // from the channel's last images to the next channel's first

  // is_last: the work tile is the channel's last.
  CMF_HOST_DEVICE int64_t after(bool is_last) const { return is_last ? channel : next; }
};

inline TileDistances tile_distances(const TileShape& shape, int64_t tiles_per_channel, int64_t channel_step,
                                    const Strides& stride) {
  const int64_t next = shape.images * stride.n;
  return {next, channel_step * stride.c - (tiles_per_channel - 1) * next};
}

// A tensor and its maps in shared memory.
struct MapOperand {
  StoredMaps maps;             // one channel in shared memory
  int channel_pitch;           // elements from one channel to the next in shared memory
  int elements;                // size in shared memory in elements
  int vector;                  // kTiles, kChannelsLastTiles: elements per access, of a row or of a pixel
  int threads_per_row;         // likewise; if a thread moves one channel of a pixel, sets of eight threads
  StepDistances steps;         // kUnalignedRows, kChannelsLast: in the tensor
  StepDistances stored_steps;  // likewise: in shared memory
  uint32_t odd_steps;          // kUnalignedRows, bit s: whether step s is an odd number of elements from step 0
  TileDistances tiles;         // all loaders that work ahead: in the tensor
};

// Sets how far apart the accesses of a loader that works ahead are.
inline void set_distances(Loader loader, const TileShape& shape, const LoaderSteps& steps, int64_t tiles_per_channel,
                          int64_t channel_step, const Strides& stride, MapOperand& operand) {
  operand.tiles = tile_distances(shape, tiles_per_channel, channel_step, stride);
  if (loader != Loader::kUnalignedRows && loader != Loader::kChannelsLast) return;
  const int max_steps = loader == Loader::kUnalignedRows ? kUnalignedSteps : kChannelsLastSteps;
  const auto offset = [&](int image, int row) { return image * stride.n + row * stride.h; };
  const auto stored_offset = [&](int image, int row) { return operand.maps.at(image, row, 0) - operand.maps.origin; };
  operand.steps = step_distances(steps, max_steps, offset);
  operand.stored_steps = step_distances(steps, max_steps, stored_offset);
  operand.odd_steps = 0;
  if (loader == Loader::kUnalignedRows)
    for (int step = 0; step < max_steps; step++)
      if (offset(steps.first_image(step), steps.first_row(step)) % 2 != 0) operand.odd_steps |= uint32_t{1} << step;
}

// The first loader of contiguous rows that can hold the maps of a work tile in a thread's registers, else kTiles.
// vector: the widest access, in elements, to all tensors. Sets the steps, if the loader has any.
inline Loader choose_row_loader(const TileShape& shape, int threads, int vector, int64_t height, int64_t width,
                                LoaderSteps& steps) {
  if (shape.tiled) return Loader::kTiles;
  if (vector == kSubtile && 2 * shape.subtiles <= threads) return Loader::kAlignedRows;  // two threads per subtile
  // At an odd address a row of an even number of elements touches one word more.
  const int64_t words = ceil_div(width + (vector == 1), 2);
  return divide_into_steps(shape, threads, words, height, kUnalignedSteps, steps) ? Loader::kUnalignedRows
                                                                                  : Loader::kTiles;
}

}  // namespace convmixer_fast::cuda
