// The launch geometry of the tensor-core kernel, and for which parameters there is one. Host code, no CUDA: the same
// choice launches the kernel and explains it (convmixer_fast.explain).
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../../common/math.h"
#include "../../../params.h"
#include "../../common/fast_div.h"
#include "../../common/launch_bounds.h"
#include "../../common/obstacle.h"
#include "loader.h"
#include "shape.h"
#include "smem.h"

namespace convmixer_fast::cuda {

constexpr int kMaxKSteps = 3;                          // mmas along K
constexpr int kMaxKernelH = 255;                       // tap rows
constexpr int kMaxKernelW = max_kernel_w(kMaxKSteps);  // tap columns
constexpr int kMaxWarps = 4;                           // warps of a CTA that works on one channel
constexpr int kElementwiseBytes = 32;  // bytes per channel: FastElementwise of the prologue and of the epilogue
static_assert(kMaxKernelW == 41, "three k-steps: 48 stored columns for 8 outputs");

// In channels_last a CTA works on 16 channels, 32 bytes of a pixel and so a whole sector, or on 8; each of its warps on
// one of them. Threads move an octet of channels at a time. 16 warps may have 128 registers per thread; kernels of two
// k-steps need more, and take 8.
constexpr int kOctet = 8;
constexpr int max_channels(int k_steps) { return k_steps == 1 ? 2 * kOctet : kOctet; }
constexpr int kMaxChannelsLastKSteps = 2;  // there are instantiations for no more
constexpr int kMaxKernelWChannelsLast = max_kernel_w(kMaxChannelsLastKSteps);
constexpr int kOctetGap = 32;  // elements after each octet in shared memory, so that two octets lie in different banks
static_assert(kMaxKernelWChannelsLast == 25);

// 16 warps of 128 registers per SM keep 32 KB of prefetched inputs in flight. Wide kernels need 168 registers, or 255
// in channels_last: they are not memory-bound.
constexpr LaunchBounds mma_launch_bounds(bool channels_last, int k_steps) {
  const int warps = channels_last ? max_channels(k_steps) : kMaxWarps;
  return {32 * warps, channels_last ? 1 : k_steps == 1 ? 4 : 3};
}
static_assert(mma_launch_bounds(false, 1).registers() == 128 && mma_launch_bounds(false, 2).registers() == 168);
static_assert(mma_launch_bounds(true, 1).registers() == 128 && mma_launch_bounds(true, 2).registers() == 255);

// The kernel's second parameter. It is flat, in sections, because nvcc addresses the members of nested structs in other
// ways, which changes the kernel's registers and instructions.
struct MmaPlan {
  // Channels.
  bool channels_last;  // layout of x and y
  int channels;        // channels per work tile
  int siblings;        // 2: two CTAs work on the two octets of the same sectors at the same time; else 1

  // Shape of a work tile: the fields of TileShape.
  int images;        // images per work tile
  int subtile_rows;  // subtiles along h, per image
  int subtile_cols;  // subtiles along w, per image
  int tiles_h;       // tiles along h, per map
  int tiles_w;       // tiles along w, per map
  bool tiled;        // a map has more than one tile: inputs come with a halo
  int subtiles;      // subtiles per work tile and channel
  int m_blocks;      // sets of kSubtilesPerMma subtiles

  // Threads.
  int warps;    // warps per CTA
  int k_steps;  // mmas along K that cover a subtile's columns and their halo

  // Layout of shared memory. Distances are in elements; those of inputs and outputs as in StoredMaps.
  int left;                  // stored columns left of the map: the padding, rounded up to 8 bytes, at least 4
  bool fixed;                // the layout is that of the constants kFixed*
  int pitch;                 // inputs: from one row to the next
  int gap;                   // inputs: unused after every kSubtile rows
  int image_pitch;           // inputs: from one image to the next
  int out_pitch;             // outputs: from one row to the next
  int out_gap;               // outputs: unused after every kSubtile rows
  int out_image_pitch;       // outputs: from one image to the next
  int tap_pitch;             // taps: from one row to the next
  int input_channel_pitch;   // inputs: from one channel to the next; kOctetGap more after each octet
  int output_channel_pitch;  // outputs: from one channel to the next; kOctetGap more after each octet

  // Loader map: which thread moves what. Aligned maps (`prefetch`) and `unaligned_rows` are loaded one work tile ahead,
  // anything else row by row and not ahead.
  int load_vector;       // elements per load: of a row; in channels_last, of a pixel
  int store_vector;      // elements per store, likewise
  int channel_lanes;     // threads that move the channels of one pixel together; 1 for contiguous rows
  int load_lanes;        // sets of channel_lanes threads that load one row together
  int store_lanes;       // sets of channel_lanes threads that store one row together
  int rows_per_step;     // rows that the CTA loads at a time
  bool prefetch;         // a thread holds kPrefetch vectors of 8 elements, load_step, input_step, output_step and
                         // store_step apart; in channels_last these are pairs, the octets of two neighbouring pixels
  bool unaligned_rows;   // maps start on 16 bytes, but their rows do not; vectors are cut into rows on the way to and
                         // from shared memory
  int map_elements;      // elements per map
  Divisor map_vectors;   // vectors of 8 elements per map, if rows are unaligned
  Divisor row_elements;  // elements per row, if rows are unaligned
  int load_step;         // elements from one vector of a thread to its next: in x
  int input_step;        // in the stored inputs
  int output_step;       // in the stored outputs
  int store_step;        // in y

  // Parts of shared memory, in this order; the elementwise parameters of each channel come last.
  int input_elements;   // size in elements
  int output_elements;  // size in elements
  int tap_elements;     // size in elements

  // Work tiles.
  int tiles_per_channel;  // work tiles of one set of `channels` channels
  int64_t work_tiles;     // all of them

  int smem_bytes() const {
    return 2 * (input_elements + output_elements + tap_elements) + channels * kElementwiseBytes;
  }
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
  for (const Strides& stride : {params.x_stride, params.y_stride})
    if (std::max({kSubtilesPerMma * stride.n, params.height * stride.h, params.width * stride.w}) >= kMaxOffset)
      return Obstacle::kOffsets;
  if (std::max({params.batch, params.channels, params.height, params.width}) >= kMaxOffset) return Obstacle::kOffsets;
  return Obstacle::kNone;
}

// Sets the layout of shared memory for the plan's shape. The compile-time layout (kFixed*) is used if the shape allows
// it, unless `may_be_fixed` is false: the run-time layout of narrow maps is smaller.
inline void set_smem_layout(const DepthwiseParams& params, bool may_be_fixed, MmaPlan& plan) {
  plan.fixed = may_be_fixed && plan.k_steps == 1 && plan.subtile_cols <= kFixedSubtileCols;
  const int rows = kSubtile * plan.subtile_rows;
  const int cols = kSubtile * plan.subtile_cols;
  const int input_rows = rows + static_cast<int>(params.kernel_h) - 1;
  const int input_cols = cols - kSubtile + kMmaK * plan.k_steps;
  const StoredMaps inputs = stored_maps(plan, input_rows, plan.fixed ? kFixedPitch : input_cols);
  plan.pitch = inputs.pitch;
  plan.gap = inputs.gap;
  plan.image_pitch = inputs.image_pitch;
  const StoredMaps outputs = stored_maps(plan, rows, plan.fixed ? kFixedOutPitch : cols);
  plan.out_pitch = outputs.pitch;
  plan.out_gap = outputs.gap;
  plan.out_image_pitch = outputs.image_pitch;
  plan.tap_pitch = kMmaK * plan.k_steps + kSubtile;
  plan.input_channel_pitch = plan.images * plan.image_pitch;
  plan.output_channel_pitch = plan.images * plan.out_image_pitch;

  const int octet_gaps = plan.channels / kOctet * kOctetGap;
  plan.input_elements = plan.channels * plan.input_channel_pitch + octet_gaps;
  plan.output_elements = plan.channels * plan.output_channel_pitch + octet_gaps;
  plan.tap_elements = plan.channels * 2 * static_cast<int>(params.kernel_h) * plan.tap_pitch;
}

// Sets shape, warps and layout to the first of these that fits shared memory: whole maps, as many images as one M block
// holds, then half as many, and so on; tiles of 64 x 64, then of 32 x 32. In channels_last 16 channels are tried
// before 8. For maps of at most one M block 8 channels are tried before images are halved, since fewer images leave
// rows of the mma empty.
inline bool choose_shape(const DepthwiseParams& params, int max_smem, MmaPlan& plan) {
  const auto try_layout = [&](bool may_be_fixed) {
    set_smem_layout(params, may_be_fixed, plan);
    return plan.smem_bytes() <= max_smem;
  };
  const auto try_shape = [&](int channels, int64_t subtile_rows, int64_t subtile_cols, int64_t images) {
    plan.channels = channels;
    set_shape(params.height, params.width, subtile_rows, subtile_cols, images, plan);
    plan.warps = plan.channels_last ? channels : std::min(plan.m_blocks, kMaxWarps);
    // In channels_last, a CTA of 16 channels may need the smaller pitch of small maps.
    return try_layout(true) || (plan.channels_last && try_layout(false));
  };
  const int64_t subtile_rows = ceil_div(params.height, kSubtile);
  const int64_t subtile_cols = ceil_div(params.width, kSubtile);
  const int64_t subtiles = subtile_rows * subtile_cols;
  const int fewest = plan.channels_last ? kOctet : 1;
  const int most = plan.channels_last && params.channels > kOctet ? max_channels(plan.k_steps) : fewest;

  for (int64_t images = std::min(params.batch, images_per_m_block(subtiles)); images > 0; images /= 2) {
    if (subtiles <= kMaxWholeMapSubtiles && try_shape(most, subtile_rows, subtile_cols, images)) return true;
    if (subtiles <= kSubtilesPerMma && try_shape(fewest, subtile_rows, subtile_cols, images)) return true;
  }
  for (const int channels : {most, fewest})
    for (const int64_t side : {8, 4})
      if (try_shape(channels, std::min(subtile_rows, side), std::min(subtile_cols, side), 1)) return true;
  return false;
}

// Whether every map starts on a 16-byte address and its rows follow without gaps.
inline bool has_aligned_maps(const DepthwiseParams& params, const void* base, const Strides& stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && (stride.n | stride.c) % 8 == 0 &&
         (params.height == 1 || stride.h == params.width);
}

// Sets which thread moves what for the plan's shape and layout.
inline void set_loader_map(const DepthwiseParams& params, MmaPlan& plan) {
  const Strides x_stride = used_strides(params, params.x_stride);
  const Strides y_stride = used_strides(params, params.y_stride);
  const int64_t extent = plan.channels_last ? params.channels : params.width;
  plan.load_vector = vector_width(params.x, extent, x_stride, plan.channels_last);
  plan.store_vector = vector_width(params.y, extent, y_stride, plan.channels_last);
  if (plan.channels_last && std::min(plan.load_vector, plan.store_vector) < kOctet) {
    plan.load_vector = 1;
    plan.store_vector = 1;
  }
  // `left` is a multiple of 4, so a tile's halo starts on 4 elements, not on 8.
  if (!plan.channels_last && plan.tiled) plan.load_vector = std::min(plan.load_vector, 4);

  const bool may_prefetch = !plan.tiled && plan.load_vector == 8 && plan.store_vector == 8 && params.width % 2 == 0;
  const int64_t tile_width = std::min<int64_t>(params.width, kSubtile * plan.subtile_cols);
  const int load_cols = !plan.channels_last ? plan.load_vector : may_prefetch ? 2 : 1;
  const int store_cols = plan.channels_last ? 1 : plan.store_vector;
  plan.channel_lanes = plan.channels_last ? plan.channels / plan.load_vector : 1;
  plan.load_lanes = lanes_for(ceil_div(plan.tiled ? plan.pitch : tile_width, load_cols));
  plan.store_lanes = lanes_for(ceil_div(tile_width, store_cols));
  plan.rows_per_step = 32 * plan.warps / plan.channel_lanes / plan.load_lanes;

  const LoaderStep step = loader_step(plan, plan.rows_per_step, params.height);
  const int max_steps = plan.channels_last ? kPrefetch / 2 : kPrefetch;
  plan.prefetch = may_prefetch && plan.load_lanes * load_cols >= params.width &&
                  fits_registers(plan, step, plan.rows_per_step, params.height, max_steps);
  plan.load_step = distance(step, params.x_stride);
  plan.input_step = distance(step, StoredMaps{plan.pitch, plan.gap, plan.image_pitch});
  plan.output_step = distance(step, StoredMaps{plan.out_pitch, plan.out_gap, plan.out_image_pitch});
  plan.store_step = distance(step, params.y_stride);

  // Maps of one vector are not worth a cut into rows.
  const int64_t map_vectors = ceil_div(params.height * params.width, 8);
  plan.map_elements = static_cast<int>(params.height * params.width);
  plan.unaligned_rows = !plan.channels_last && !plan.tiled && !plan.prefetch && params.width > 1 && map_vectors > 1 &&
                        plan.images * map_vectors <= kPrefetch * 32 * plan.warps &&
                        has_aligned_maps(params, params.x, x_stride) && has_aligned_maps(params, params.y, y_stride);
  if (plan.unaligned_rows) {
    plan.map_vectors = divisor(map_vectors);
    plan.row_elements = divisor(params.width);
  }
}

// The launch geometry for these parameters, or what leaves them to the direct kernel. device_smem: bytes that a CTA may
// have on the device.
inline Obstacle choose_mma_plan(const DepthwiseParams& params, int device_smem, MmaPlan& plan) {
  if (const Obstacle obstacle = find_obstacle(params); obstacle != Obstacle::kNone) return obstacle;
  const int pad_left = static_cast<int>(params.pad_left);
  plan = {};
  plan.channels_last = !rows_are_contiguous(params);
  plan.left = static_cast<int>(std::max<int64_t>(4, round_up(pad_left, 4)));
  plan.k_steps = static_cast<int>(ceil_div(plan.left - pad_left + params.kernel_w + kSubtile - 1, kMmaK));
  if (plan.channels_last && plan.k_steps > kMaxChannelsLastKSteps) return Obstacle::kKernelWidthChannelsLast;
  if (!choose_shape(params, plan.channels_last ? device_smem : kMaxSmem, plan)) return Obstacle::kSharedMemory;
  set_loader_map(params, plan);

  const int64_t tiles = tiles_per_channel(plan, params.batch);
  plan.tiles_per_channel = static_cast<int>(tiles);
  plan.siblings = plan.channels == kOctet && params.channels > kOctet ? 2 : 1;
  plan.work_tiles = ceil_div(params.channels, plan.channels * plan.siblings) * plan.siblings * tiles;
  return tiles < kMaxOffset ? Obstacle::kNone : Obstacle::kOffsets;
}

// Whether the instantiation that keeps the fragments of so many tap rows in registers (0: the ring) has code for
// unaligned rows. Kernels without GELU keep ReLU's floor in a register, while GELU's constants are immediates: with 7
// or 9 rows that leaves too few, and such launches take the ring.
constexpr bool has_unaligned_rows(Activation activation, int rows) {
  return activation == Activation::kGelu || rows < 7;
}

// Kernel rows for which there is an instantiation with all Toeplitz fragments in registers; 0 if it is the ring, which
// takes any number of rows.
inline int unrolled_rows(const DepthwiseParams& params, const MmaPlan& plan) {
  const int rows = static_cast<int>(params.kernel_h);
  const bool exists = rows % 2 == 1 && rows >= (plan.channels_last ? 7 : 3) && rows <= 9;
  const bool can_load = !plan.unaligned_rows || has_unaligned_rows(params.epilogue.activation, rows);
  return plan.fixed && exists && can_load && params.pad_top == (rows - 1) / 2 ? rows : 0;
}

}  // namespace convmixer_fast::cuda
