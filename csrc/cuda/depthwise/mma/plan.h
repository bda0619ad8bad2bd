// How the tensor-core kernel cuts its work: which inputs it takes, and the geometry of one block. Host code, no CUDA:
// the same choice launches the kernel and explains it (convmixer_fast.explain).
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../../common/math.h"
#include "../../../params.h"
#include "../../common/fast_div.h"
#include "loader.h"
#include "smem.h"

namespace convmixer_fast::cuda {

struct MmaTile {
  bool channels_last;    // x and y
  int channels;          // of one item
  int partners;          // blocks that work on the same sectors at the same time, each on its octet of channels; else 1
  int images;            // of one item, all of these channels
  int bands, windows;    // of one image's tile
  int tiles_h, tiles_w;  // of a map
  bool tiled;            // more than one: inputs come with a halo
  int units, groups;     // of one channel of an item
  int warps;             // of a block
  int k_steps;           // mma depths across one window and its halo
  int left;              // stored columns left of the map: the padding, rounded up to 8 bytes
  bool fixed;            // k_steps 1 and windows <= kFixedWindows: the kernel may rely on the constants above
  int pitch, band_gap, image_pitch;              // of the stored inputs, in elements
  int out_pitch, out_band_gap, out_image_pitch;  // of the stored outputs
  int tap_pitch;                                 // of one stored row of taps
  int input_channel, output_channel;             // from one channel to the next, kOctetGap apart
  int load_vector, store_vector;                 // elements a global access: of a row; in channels_last, of a pixel
  int channel_lanes;                             // threads that move the channels of one pixel together
  int load_lanes, store_lanes;                   // such teams that move one row together
  int rows_a_step;                               // rows that the block loads at once
  bool prefetch;  // an item is kPrefetch vectors of 8 a thread, at equal distances: loaded one item ahead. In
                  // channels_last they are pairs, the octets of two neighbouring pixels
  bool flat;      // instead: the planes start on 16 bytes, but their rows do not; pieces of planes are loaded
                  // one item ahead, and cut into rows on the way to and from shared memory
  int plane;      // flat: elements of a plane
  Divisor plane_pieces, row;                           // pieces of it, elements of its rows
  int load_step, input_step, output_step, store_step;  // these distances: in x, stored inputs, stored outputs, y
  int input_elements, output_elements, tap_elements;   // of shared memory's parts, in this order; last the pointwise
  int items_a_channel;                                 // or to the channels of an item
  int64_t items;

  int smem_bytes() const { return 2 * (input_elements + output_elements + tap_elements) + channels * kPointwiseBytes; }
};

// The geometry for these params; false where the tensor-core kernel does not apply, which leaves the direct kernel:
// float32 and float64, neither rows nor the channels of a pixel contiguous, kernels wider than 41 (25 in
// channels_last), too little shared memory. device_smem: bytes that a block of the device may have.
inline bool choose_mma_tile(const DepthwiseParams& params, int device_smem, MmaTile& tile) {
  using namespace tiles;
  constexpr int64_t kMaxOffset = int64_t{1} << 31;
  const bool rows_contiguous =
      (params.width == 1 || params.x_stride.w == 1) && (params.width == 1 || params.y_stride.w == 1);
  const bool pixels_contiguous = params.x_stride.c == 1 && params.y_stride.c == 1;
  if ((params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) || !(rows_contiguous || pixels_contiguous))
    return false;
  if (params.kernel_w > 41 || params.kernel_h > 255) return false;
  // Indices and the offsets inside one item are 32-bit.
  for (const Strides& stride : {params.x_stride, params.y_stride})
    if (std::max({kGroupUnits * stride.n, params.height * stride.h, params.width * stride.w}) >= kMaxOffset)
      return false;
  if (std::max({params.batch, params.channels, params.height, params.width}) >= kMaxOffset) return false;

  const int kernel_h = static_cast<int>(params.kernel_h), kernel_w = static_cast<int>(params.kernel_w);
  const int pad_left = static_cast<int>(params.pad_left);
  tile = {};
  tile.channels_last = !rows_contiguous;
  tile.left = static_cast<int>(std::max<int64_t>(4, round_up(pad_left, 4)));
  tile.k_steps = static_cast<int>(ceil_div(tile.left - pad_left + kernel_w + kUnit - 1, kMmaDepth));
  tile.tap_pitch = kMmaDepth * tile.k_steps + kUnit;
  if (tile.channels_last && tile.k_steps > kMaxChannelsLastKSteps) return false;
  const int max_smem = tile.channels_last ? device_smem : kMaxSmem;

  const auto set_units = [&](int64_t bands, int64_t windows, int64_t images, bool fixed) {
    tile.bands = static_cast<int>(bands), tile.windows = static_cast<int>(windows);
    tile.images = static_cast<int>(images);
    tile.tiles_h = static_cast<int>(ceil_div(params.height, bands * kUnit));
    tile.tiles_w = static_cast<int>(ceil_div(params.width, windows * kUnit));
    tile.tiled = tile.tiles_h * tile.tiles_w > 1;
    tile.units = tile.images * tile.bands * tile.windows;
    tile.groups = static_cast<int>(ceil_div(tile.units, kGroupUnits));
    tile.warps = tile.channels_last ? tile.channels : std::min(tile.groups, kMaxWarps);
    tile.fixed = fixed && tile.k_steps == 1 && tile.windows <= kFixedWindows;
    tile.pitch = tile.fixed ? kFixedPitch : kUnit * (tile.windows - 1) + kMmaDepth * tile.k_steps;
    tile.band_gap = gap_to_slot(kUnit * tile.pitch, tile.windows);
    const int rows = kUnit * tile.bands + kernel_h - 1;
    tile.image_pitch = rows * tile.pitch + (rows + kUnit - 1) / kUnit * tile.band_gap;
    tile.image_pitch += gap_to_slot(tile.image_pitch, tile.bands * tile.windows);
    tile.input_channel = tile.images * tile.image_pitch;
    const int gaps = tile.channels / kOctet * kOctetGap;
    tile.input_elements = tile.channels * tile.input_channel + gaps;
    tile.out_pitch = tile.fixed ? kFixedOutPitch : kUnit * tile.windows;
    tile.out_band_gap = gap_to_slot(kUnit * tile.out_pitch, tile.windows);
    tile.out_image_pitch = tile.bands * (kUnit * tile.out_pitch + tile.out_band_gap);
    tile.out_image_pitch += gap_to_slot(tile.out_image_pitch, tile.bands * tile.windows);
    tile.output_channel = tile.images * tile.out_image_pitch;
    tile.output_elements = tile.channels * tile.output_channel + gaps;
    tile.tap_elements = tile.channels * 2 * kernel_h * tile.tap_pitch;
    return tile.smem_bytes() <= max_smem;
  };

  // In channels_last, where a block holds 16 channels, small maps may need the smaller pitch.
  const auto fits = [&](int channels, int64_t bands, int64_t windows, int64_t images) {
    tile.channels = channels;
    return set_units(bands, windows, images, true) || (tile.channels_last && set_units(bands, windows, images, false));
  };
  // The whole map of as many images as fill a group; a large map in tiles of 64 x 64, or 32 x 32 for large kernels. Of
  // a map that fits one group rather fewer channels than fewer images or tiles: those leave the tensor cores half
  // empty.
  const int64_t bands = ceil_div(params.height, kUnit), windows = ceil_div(params.width, kUnit);
  const int64_t images = std::max<int64_t>(1, kGroupUnits / std::min<int64_t>(kGroupUnits, bands * windows));
  const int fewest = tile.channels_last ? kOctet : 1;
  const int most = tile.channels_last && params.channels > kOctet ? max_channels(tile.k_steps) : fewest;
  bool found = false;
  for (int64_t some = std::min(params.batch, images); some > 0 && !found; some /= 2)
    found = (bands * windows <= 16 * kGroupUnits && fits(most, bands, windows, some)) ||
            (bands * windows <= kGroupUnits && fits(fewest, bands, windows, some));
  for (const int channels : {most, fewest})
    for (const int64_t side : {8, 4})
      found = found || fits(channels, std::min(bands, side), std::min(windows, side), 1);
  if (!found) return false;

  const int64_t extent = tile.channels_last ? params.channels : params.width;
  const Strides x_stride = used_strides(params, params.x_stride), y_stride = used_strides(params, params.y_stride);
  tile.load_vector = vector_width(params.x, extent, x_stride, tile.channels_last);
  tile.store_vector = vector_width(params.y, extent, y_stride, tile.channels_last);
  if (tile.channels_last && std::min(tile.load_vector, tile.store_vector) < kOctet)
    tile.load_vector = tile.store_vector = 1;
  if (!tile.channels_last && tile.tiled) tile.load_vector = std::min(tile.load_vector, 4);  // as the halo is aligned
  tile.channel_lanes = tile.channels_last ? tile.channels / tile.load_vector : 1;
  const bool may_prefetch = !tile.tiled && tile.load_vector == 8 && tile.store_vector == 8 && params.width % 2 == 0;
  const int64_t tile_width = std::min<int64_t>(params.width, kUnit * tile.windows);
  const int load_cols = !tile.channels_last ? tile.load_vector : may_prefetch ? 2 : 1;
  const int store_cols = tile.channels_last ? 1 : tile.store_vector;
  tile.load_lanes = lanes_for(ceil_div(tile.tiled ? tile.pitch : tile_width, load_cols));
  tile.store_lanes = lanes_for(ceil_div(tile_width, store_cols));
  tile.rows_a_step = 32 * tile.warps / tile.channel_lanes / tile.load_lanes;
  const int prefetch_steps = tile.channels_last ? kPrefetch / 2 : kPrefetch;
  const bool within_image = tile.images == 1 && tile.rows_a_step % kUnit == 0;
  tile.prefetch = may_prefetch && tile.load_lanes * load_cols >= params.width &&
                  (within_image || tile.rows_a_step % params.height == 0) &&
                  ceil_div(tile.images * params.height, tile.rows_a_step) <= prefetch_steps;
  // A plane of 8 elements or fewer is not worth it.
  const int64_t plane_pieces = ceil_div(params.height * params.width, 8);
  const auto flat_planes = [&](const void* base, const Strides& stride) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && (stride.n | stride.c) % 8 == 0 &&
           (params.height == 1 || stride.h == params.width);
  };
  tile.flat = !tile.channels_last && !tile.tiled && !tile.prefetch && params.width > 1 && plane_pieces > 1 &&
              tile.images * plane_pieces <= kPrefetch * 32 * tile.warps && flat_planes(params.x, x_stride) &&
              flat_planes(params.y, y_stride);
  tile.plane = static_cast<int>(params.height * params.width);
  if (tile.flat) tile.plane_pieces = divisor(plane_pieces), tile.row = divisor(params.width);
  const int step_rows = within_image ? tile.rows_a_step : 0;
  const int step_images = within_image ? 0 : static_cast<int>(tile.rows_a_step / params.height);
  tile.load_step = static_cast<int>(step_images * params.x_stride.n + step_rows * params.x_stride.h);
  tile.store_step = static_cast<int>(step_images * params.y_stride.n + step_rows * params.y_stride.h);
  tile.input_step = step_images * tile.image_pitch + step_rows * tile.pitch + step_rows / kUnit * tile.band_gap;
  tile.output_step =
      step_images * tile.out_image_pitch + step_rows * tile.out_pitch + step_rows / kUnit * tile.out_band_gap;

  const int64_t items = ceil_div(params.batch, tile.images) * tile.tiles_h * tile.tiles_w;
  tile.items_a_channel = static_cast<int>(items);
  tile.partners = tile.channels == kOctet && params.channels > kOctet ? 2 : 1;
  tile.items = ceil_div(params.channels, tile.channels * tile.partners) * tile.partners * items;
  return items < kMaxOffset;
}

// Whether the kernel with so many rows of Toeplitz matrices in registers (0: the ring) has code for flat planes.
// Without GELU, whose constants are immediates, 7 and 9 rows leave too few registers for it.
constexpr bool has_flat(bool gelu, int rows) { return gelu || rows < 7; }

// Kernel rows for which there is an instantiation with all Toeplitz matrices in registers; 0 where it is the ring of
// any.
inline int unrolled_rows(const DepthwiseParams& params, const MmaTile& tile) {
  const int rows = static_cast<int>(params.kernel_h);
  const bool exists = rows % 2 == 1 && rows >= (tile.channels_last ? 7 : 3) && rows <= 9;
  const bool flat = !tile.flat || has_flat(params.epilogue.activation == Activation::kGelu, rows);
  return tile.fixed && exists && flat && params.pad_top == (rows - 1) / 2 ? rows : 0;
}

}  // namespace convmixer_fast::cuda
