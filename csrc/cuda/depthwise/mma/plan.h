// The launch geometry of the tensor-core kernel, and for which parameters there is one. Host code, no CUDA: the same
// choice launches the kernel and explains it (convmixer_fast.explain).
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../../common/math.h"
#include "../../../params.h"
#include "../../common/device.h"
#include "../../common/launch_bounds.h"
#include "../../common/obstacle.h"
#include "loader.h"
#include "shape.h"
#include "smem.h"

namespace convmixer_fast::cuda {

constexpr int kMaxKSteps = 4;                          // mmas along K
constexpr int kMaxKernelW = max_kernel_w(kMaxKSteps);  // tap columns
constexpr int kMaxKernelH = 255;       // tap rows; a tile with the halo of many more would not fit shared memory
constexpr int kMaxWarps = 4;           // warps of a CTA that works on one channel
constexpr int kElementwiseBytes = 32;  // bytes per channel: FastElementwise of the prologue and of the epilogue
static_assert(kMaxKernelW == 57, "four k-steps: 64 stored columns for 8 outputs");

// In channels_last a CTA works on an octet of channels, 16 bytes of a pixel, each of its warps on one of them. Two of
// them fit an SM: while one loads or stores, the other computes. A sector of memory holds two octets, so two CTAs,
// siblings, work on them at the same time.
constexpr int kOctet = 8;
constexpr int kMaxChannelsLastKSteps = 2;  // there are instantiations for no more
constexpr int kMaxKernelWChannelsLast = max_kernel_w(kMaxChannelsLastKSteps);
static_assert(kMaxKernelWChannelsLast == 25);

// 16 warps of 128 registers per SM keep 32 KB of prefetched inputs in flight. Wide kernels need 168 registers, or more
// in channels_last and where unaligned rows meet a ring of three k-steps: they are not memory-bound.
constexpr LaunchBounds mma_launch_bounds(Loader loader, int k_steps, bool one_warp) {
  if (is_channels_last(loader)) return {32 * kOctet, k_steps == 1 ? 2 : 1};
  const int ctas = k_steps == 1 ? 4 : k_steps == 3 && loader == Loader::kUnalignedRows ? 2 : 3;
  return one_warp ? LaunchBounds{32, kMaxWarps * ctas} : LaunchBounds{32 * kMaxWarps, ctas};
}
static_assert(mma_launch_bounds(Loader::kAlignedRows, 1, true).registers() == 128);
static_assert(mma_launch_bounds(Loader::kAlignedRows, 1, false).registers() == 128);
static_assert(mma_launch_bounds(Loader::kAlignedRows, 3, false).registers() == 168);
static_assert(mma_launch_bounds(Loader::kUnalignedRows, 3, false).registers() == 255);
static_assert(mma_launch_bounds(Loader::kChannelsLast, 1, false).registers() == 128);
static_assert(mma_launch_bounds(Loader::kChannelsLast, 2, false).registers() == 255);

// Whether the pitches are kFixedPitch and kFixedOutPitch. Unaligned rows may be few, and waste less memory with pitches
// of their own.
constexpr bool has_fixed_pitches(bool one_warp, Loader loader) { return one_warp && loader == Loader::kAlignedRows; }

// The kernel's second parameter.
struct MmaPlan {
  Loader loader;
  bool one_warp;          // the CTA is a warp, which computes one M block per work tile
  bool odd;               // kUnalignedRows: words of some rows have only one element of the row
                          // kChannelsLast: some pairs of pixels have only one pixel of the row
  int unrolled;           // tap rows, if the Toeplitz fragments of all of them stay in registers; 0: the ring
  int channels;           // channels per work tile: 1, or an octet in channels_last
  int siblings;           // 2: two CTAs work on the two octets of the same sectors at the same time; else 1
  int warps;              // warps per CTA
  int k_steps;            // mmas along K that cover a subtile's columns and their halo
  int left;               // stored columns left of the map: the padding, rounded up to 8 bytes, at least 4
  TileShape shape;        // outputs of a work tile, per channel
  LoaderSteps steps;      // kUnalignedRows, kChannelsLast
  MapOperand x;           // x and the stored inputs
  MapOperand y;           // y and the stored outputs
  int tap_pitch;          // elements from one stored tap row to the next
  int tap_elements;       // size of the taps in shared memory in elements
  int tiles_per_channel;  // work tiles of one set of `channels` channels
  int64_t work_tiles;     // all of them

  // Shared memory holds the inputs, the outputs, the taps and each channel's elementwise parameters.
  int smem_bytes() const { return 2 * (x.elements + y.elements + tap_elements) + channels * kElementwiseBytes; }
};

inline bool rows_are_contiguous(const DepthwiseParams& params) {
  return params.width == 1 || (params.x_stride.w == 1 && params.y_stride.w == 1);
}

// What keeps the kernel from these parameters, whatever the geometry: it takes float16 and bfloat16, contiguous rows or
// contiguous channels of a pixel, kernels up to kMaxKernelH x kMaxKernelW, and 32-bit indices and offsets inside a work
// tile.
inline Obstacle find_obstacle(const DepthwiseParams& params) {
  const bool pixels_contiguous = params.x_stride.c == 1 && params.y_stride.c == 1;
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return Obstacle::kDType;
  if (!rows_are_contiguous(params) && !pixels_contiguous) return Obstacle::kLayout;
  if (params.kernel_w > kMaxKernelW) return Obstacle::kKernelWidth;
  if (params.kernel_h > kMaxKernelH) return Obstacle::kKernelHeight;
  for (const Strides& stride : {used_strides(params, params.x_stride), used_strides(params, params.y_stride)})
    if (std::max({kSubtilesPerMma * stride.n, params.height * stride.h, params.width * stride.w}) >= kMaxOffset)
      return Obstacle::kOffsets;
  if (std::max({params.batch, params.channels, params.height, params.width}) >= kMaxOffset) return Obstacle::kOffsets;
  return Obstacle::kNone;
}

// Kernel rows for which there are instantiations with all Toeplitz fragments in registers; 0 if there is only the ring,
// which takes any number of rows.
inline int unrolled_rows(const DepthwiseParams& params, int k_steps, bool channels_last) {
  const int rows = static_cast<int>(params.kernel_h);
  const bool exists = rows % 2 == 1 && rows >= (channels_last ? 7 : 3) && rows <= 9;
  return k_steps == 1 && exists && params.pad_top == (rows - 1) / 2 ? rows : 0;
}

// Sets the layout of shared memory for the plan's shape.
inline void set_smem_layout(const DepthwiseParams& params, MmaPlan& plan) {
  const int rows = kSubtile * plan.shape.subtile_rows;
  const int cols = kSubtile * plan.shape.subtile_cols;
  const int pad_top = static_cast<int>(params.pad_top);
  const int input_rows = rows + static_cast<int>(params.kernel_h) - 1 - pad_top;
  const int input_cols = cols - kSubtile + kMmaK * plan.k_steps;
  const bool fixed = has_fixed_pitches(plan.one_warp, plan.loader);
  plan.x.maps = stored_maps(plan.shape, pad_top, plan.left, input_rows, fixed ? kFixedPitch : input_cols);
  plan.y.maps = stored_maps(plan.shape, 0, 0, rows, fixed ? kFixedOutPitch : cols);
  for (MapOperand* operand : {&plan.x, &plan.y}) {
    operand->channel_pitch = plan.shape.images * operand->maps.image_pitch;
    operand->elements = static_cast<int>(round_up(plan.channels * operand->channel_pitch, kSubtile));
  }
  plan.tap_pitch = kMmaK * plan.k_steps + kSubtile;
  plan.tap_elements = plan.channels * 2 * static_cast<int>(params.kernel_h) * plan.tap_pitch;
}

// The widest access, in elements, to both tensors.
inline int common_vector_width(const DepthwiseParams& params, bool channels_last) {
  const int64_t extent = channels_last ? params.channels : params.width;
  return std::min(vector_width(params.x, extent, used_strides(params, params.x_stride), channels_last),
                  vector_width(params.y, extent, used_strides(params, params.y_stride), channels_last));
}

// Sets the first loader that can hold the work tile of the plan's shape in a thread's registers, else one of tiles.
inline void choose_loader(const DepthwiseParams& params, bool channels_last, MmaPlan& plan) {
  const int threads = 32 * plan.warps;
  const int vector = common_vector_width(params, channels_last);
  plan.odd = channels_last ? params.width % 2 != 0 : vector == 1;
  if (!channels_last) {
    plan.loader = choose_row_loader(plan.shape, threads, vector, params.height, params.width, plan.steps);
    if (plan.k_steps == kMaxKSteps) plan.loader = Loader::kTiles;  // leaves no registers to load ahead
    return;
  }
  const int64_t pixel_pairs = ceil_div(params.width, 2);
  const bool fits = vector == kOctet && !plan.shape.tiled &&
                    divide_into_steps(plan.shape, threads, pixel_pairs, params.height, kChannelsLastSteps, plan.steps);
  plan.loader = fits ? Loader::kChannelsLast : Loader::kChannelsLastTiles;
}

// Sets shape, warps, loader and layout to the first of these that fits shared memory: whole maps, as many images as one
// M block holds, then half as many, and so on; tiles of 64 x 64, then of 32 x 32. In channels_last it first looks for
// one of which two CTAs fit an SM, if they have the registers for it.
inline bool choose_shape(const DepthwiseParams& params, bool channels_last, const Device& device, MmaPlan& plan) {
  const int unrolled = unrolled_rows(params, plan.k_steps, channels_last);
  const auto try_shape = [&](int max_smem, const TileShape& shape) {
    plan.shape = shape;
    plan.warps = channels_last ? kOctet : std::min(plan.shape.m_blocks, kMaxWarps);
    choose_loader(params, channels_last, plan);
    if (plan.loader == Loader::kTiles && plan.warps < kMaxWarps) {
      // Warps without an M block help to load and store maps that fewer cannot hold.
      const int warps = plan.warps;
      plan.warps = kMaxWarps;
      choose_loader(params, channels_last, plan);
      if (plan.loader == Loader::kTiles) plan.warps = warps;
    }
    const bool fits_one_warp = unrolled && plan.warps == 1 && shape.subtile_cols <= kFixedSubtileCols;
    // Maps of 8 columns waste too much memory with fixed pitches: fewer CTAs would fit an SM.
    plan.one_warp = fits_one_warp && (plan.loader == Loader::kUnalignedRows ||
                                      (plan.loader == Loader::kAlignedRows && shape.subtile_cols > 1));
    // There are no other instantiations of unaligned rows with all fragments in registers.
    plan.unrolled = plan.loader == Loader::kUnalignedRows && !plan.one_warp ? 0 : unrolled;
    set_smem_layout(params, plan);
    return plan.smem_bytes() <= max_smem;
  };
  const auto try_shapes = [&](int max_smem) {
    return first_shape(params.height, params.width, params.batch, {8, 4},
                       [&](const TileShape& shape) { return try_shape(max_smem, shape); });
  };
  plan.channels = channels_last ? kOctet : 1;
  if (!channels_last) return try_shapes(kMaxSmem);
  const bool two_ctas = plan.k_steps == 1 && try_shapes(device.sm_smem / 2 - kSystemSmem);
  return two_ctas || try_shapes(device.cta_smem);
}

// Sets what each thread moves: of tiles how wide its accesses are, of whole maps how far apart they are.
inline void divide_accesses(const DepthwiseParams& params, MmaPlan& plan) {
  const bool channels_last = is_channels_last(plan.loader);
  const int vector = common_vector_width(params, channels_last);
  const int channel_step = plan.channels * plan.siblings;
  set_distances(plan.loader, plan.shape, plan.steps, plan.tiles_per_channel, channel_step,
                used_strides(params, params.x_stride), plan.x);
  set_distances(plan.loader, plan.shape, plan.steps, plan.tiles_per_channel, channel_step,
                used_strides(params, params.y_stride), plan.y);
  if (channels_last) {
    plan.x.vector = vector == kOctet ? kOctet : 1;
    plan.y.vector = plan.x.vector;
  } else {
    // `left` is a multiple of 4, so a tile's halo starts on 4 elements, not on 8.
    plan.x.vector = plan.shape.tiled ? std::min(vector, 4) : vector;
    plan.y.vector = vector;
  }
  const auto threads_per_row = [&](const MapOperand& operand, int64_t width) {
    const int cols_per_access = !channels_last ? operand.vector : operand.vector == kOctet ? 2 : 1;
    return threads_for(ceil_div(width, cols_per_access));
  };
  const int64_t tile_width = std::min<int64_t>(params.width, kSubtile * plan.shape.subtile_cols);
  plan.x.threads_per_row = threads_per_row(plan.x, plan.shape.tiled ? plan.x.maps.pitch : tile_width);
  plan.y.threads_per_row = threads_per_row(plan.y, tile_width);
}

// The launch geometry for these parameters, or what leaves them to the direct kernel.
inline Obstacle choose_mma_plan(const DepthwiseParams& params, const Device& device, MmaPlan& plan) {
  if (const Obstacle obstacle = find_obstacle(params); obstacle != Obstacle::kNone) return obstacle;
  const int pad_left = static_cast<int>(params.pad_left);
  const bool channels_last = !rows_are_contiguous(params);
  plan = {};
  plan.left = static_cast<int>(std::max<int64_t>(kFixedLeft, round_up(pad_left, 4)));
  plan.k_steps = static_cast<int>(ceil_div(plan.left - pad_left + params.kernel_w + kSubtile - 1, kMmaK));
  if (channels_last && plan.k_steps > kMaxChannelsLastKSteps) return Obstacle::kKernelWidthChannelsLast;
  if (!choose_shape(params, channels_last, device, plan)) return Obstacle::kSharedMemory;

  const int64_t tiles = tiles_per_channel(plan.shape, params.batch);
  if (tiles >= kMaxOffset) return Obstacle::kOffsets;
  plan.tiles_per_channel = static_cast<int>(tiles);
  plan.siblings = plan.channels == kOctet && params.channels > kOctet ? 2 : 1;
  plan.work_tiles = ceil_div(params.channels, plan.channels * plan.siblings) * plan.siblings * tiles;
  divide_accesses(params, plan);
  return Obstacle::kNone;
}

}  // namespace convmixer_fast::cuda
