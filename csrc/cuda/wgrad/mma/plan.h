// The launch geometry of the tensor-core kernel for the weight's gradient, and for which parameters there is one. Host
// code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../../common/math.h"
#include "../../../params.h"
#include "../../common/host_device.h"
#include "../../common/obstacle.h"
#include "../../depthwise/mma/loader.h"
#include "../../depthwise/mma/shape.h"
#include "../../depthwise/mma/smem.h"
#include "../share.h"

namespace convmixer_fast::cuda {

constexpr int kWgradMmaTapRows = 8;  // tap rows per warp if no instantiation has all of them
constexpr int kWgradFixedWarps =
    4;  // warps that share the M blocks if each has all taps; fewer per set of taps otherwise
constexpr int kWgradDiagonals = 24;  // a 16 x 8 product has 23; the last is the sum of gy
constexpr int kWgradMaxKernelH = kMmaK * kWgradMaxWarps;
constexpr int kWgradMaxKernelW = max_kernel_w(kWgradMaxWarps);
constexpr int kWgradScratchPitch = 9;  // pitch of a product in shared memory: neither rows nor diagonals share banks

// One of the two tensors, x or gy, in shared memory. Distances are in elements.
struct WgradOperand {
  int rows;          // rows loaded per image: the map, or a tile with its halo
  int cols;          // columns loaded per image, likewise
  int top;           // stored rows above the map or tile
  int left;          // stored columns left of the map or tile
  StoredMaps maps;   // where rows and images lie
  int zero_subtile;  // where a subtile that does not exist lies: zeros
  int elements;      // size in elements
  int load_step;     // from one prefetched vector of a thread to its next: in the tensor
  int store_step;    // in shared memory
};

// How the taps are divided among the warps of a CTA.
struct WgradTaps {
  bool fixed;          // each warp has all tap rows in its registers; pitches are kFixedPitch and kFixedOutPitch
  int tap_rows;        // tap rows per warp
  int k_steps;         // products of 16 stored columns (here the M of an mma) that one row of taps needs
  int tap_row_blocks;  // sets of tap_rows tap rows that a pass takes
  int passes;          // passes over x and gy: one unless there are more tap row blocks than warps

  // The parts of the taps that warps can have: tap row blocks by 16 stored columns.
  CMF_HOST_DEVICE int tap_blocks() const { return tap_row_blocks * k_steps; }
};

struct WgradMmaPlan {
  WgradTaps taps;         // how the taps are divided among warps
  TileShape shape;        // elements of gy in a work tile
  int splits;             // warps that have the same taps and share the M blocks
  int warps;              // warps per CTA: splits x tap blocks
  WgradOperand x;         // x in shared memory
  WgradOperand gy;        // gy in shared memory
  int lead;               // stored columns before the first tap of a subtile
  int load_vector;        // elements per load
  int load_lanes;         // threads that load one row together
  int rows_per_step;      // rows that the CTA loads at a time
  bool prefetch;          // a thread's share of a work tile is kPrefetch vectors of 8 elements, at equal distances
  int tiles_per_channel;  // work tiles per channel

  int smem_bytes() const {
    return 2 * (x.elements + gy.elements) + 4 * warps * (taps.tap_rows * kWgradDiagonals + kMmaK * kWgradScratchPitch);
  }
};

// What keeps the kernel from these parameters, whatever the geometry: it takes float16 and bfloat16, contiguous rows,
// kernels up to kWgradMaxKernelH x kWgradMaxKernelW, and indices and offsets inside a work tile of 32 bits.
inline Obstacle find_obstacle(const WgradParams& params) {
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return Obstacle::kDType;
  if (params.width > 1 && (params.x_stride.w != 1 || params.gy_stride.w != 1)) return Obstacle::kLayout;
  for (const Strides& stride : {params.x_stride, params.gy_stride})
    if (std::max(kSubtilesPerMma * stride.n, params.height * stride.h) >= kMaxOffset) return Obstacle::kOffsets;
  if (std::max({params.batch, params.channels, params.height, params.width}) >= kMaxOffset) return Obstacle::kOffsets;
  if (params.kernel_h > kWgradMaxKernelH) return Obstacle::kKernelHeight;
  return params.kernel_w > kWgradMaxKernelW ? Obstacle::kKernelWidth : Obstacle::kNone;
}

inline WgradTaps divide_taps(int kernel_h, int k_steps, const TileShape& shape) {
  WgradTaps taps{};
  taps.k_steps = k_steps;
  taps.fixed =
      k_steps == 1 && shape.subtile_cols <= kFixedSubtileCols && kernel_h % 2 == 1 && 3 <= kernel_h && kernel_h <= 9;
  taps.tap_rows = taps.fixed ? kernel_h : kWgradMmaTapRows;
  const int tap_row_blocks = static_cast<int>(ceil_div(kernel_h, taps.tap_rows));
  taps.passes = static_cast<int>(ceil_div(tap_row_blocks, kWgradMaxWarps / k_steps));
  taps.tap_row_blocks = static_cast<int>(ceil_div(tap_row_blocks, taps.passes));
  return taps;
}

// What lies in shared memory of one tensor: `rows` stored rows per map, and if subtiles are missing from the last M
// block zeros for one subtile, whose last row is last_zero_row, of zero_cols columns.
inline void set_layout(const TileShape& shape, int rows, int pitch, int last_zero_row, int zero_cols,
                       WgradOperand& operand) {
  operand.maps = stored_maps(shape, rows, pitch);
  operand.zero_subtile = shape.images * operand.maps.image_pitch;
  const bool is_complete = shape.subtiles % kSubtilesPerMma == 0;
  const int zeros = is_complete ? 0 : last_zero_row * pitch + operand.maps.gap + zero_cols;
  operand.elements = operand.zero_subtile + static_cast<int>(round_up(zeros, kSubtile));
}

// Sets taps, tile and shared memory to the first of these that fits: the whole map of as many images as fill an M
// block, else a tile of 64 x 64, 32 x 32 or 16 x 16.
inline bool choose_shape(const WgradParams& params, int k_steps, WgradMmaPlan& plan) {
  const int kernel_h = static_cast<int>(params.kernel_h);
  const auto fits = [&](int64_t subtile_rows, int64_t subtile_cols, int64_t images) {
    set_shape(params.height, params.width, subtile_rows, subtile_cols, images, plan.shape);
    plan.taps = divide_taps(kernel_h, k_steps, plan.shape);
    plan.splits = std::min(plan.shape.m_blocks, std::max(1, kWgradFixedWarps / plan.taps.tap_blocks()));
    plan.warps = plan.splits * plan.taps.tap_blocks();

    const int rows = kSubtile * plan.shape.subtile_rows;
    const int gy_cols = kSubtile * plan.shape.subtile_cols;
    const int x_cols = gy_cols - kSubtile + kMmaK * k_steps;
    const int tap_rows = plan.taps.passes * plan.taps.tap_row_blocks * plan.taps.tap_rows;
    set_layout(plan.shape, rows + tap_rows - 1, plan.taps.fixed ? kFixedPitch : x_cols,
               kSubtile + plan.taps.tap_rows - 2, kMmaK, plan.x);
    set_layout(plan.shape, rows, plan.taps.fixed ? kFixedOutPitch : gy_cols, kSubtile - 1, kSubtile, plan.gy);

    const bool tiled = plan.shape.tiled;
    plan.x.rows = static_cast<int>(tiled ? rows + kernel_h - 1 : params.height);
    plan.gy.rows = static_cast<int>(tiled ? rows : params.height);
    plan.x.cols = static_cast<int>(tiled ? plan.x.maps.pitch : params.width);
    plan.gy.cols = static_cast<int>(tiled ? plan.gy.maps.pitch : params.width);
    return plan.smem_bytes() <= kMaxSmem;
  };
  const int64_t subtile_rows = ceil_div(params.height, kSubtile);
  const int64_t subtile_cols = ceil_div(params.width, kSubtile);
  const int64_t subtiles = subtile_rows * subtile_cols;
  if (subtiles <= kMaxWholeMapSubtiles)
    for (int64_t images = std::min(params.batch, images_per_m_block(subtiles)); images > 0; images /= 2)
      if (fits(subtile_rows, subtile_cols, images)) return true;
  for (const int64_t side : {8, 4, 2})
    if (fits(std::min(subtile_rows, side), std::min(subtile_cols, side), 1)) return true;
  return false;
}

// Sets which thread loads what of a plan's shape.
inline void choose_loader(const WgradParams& params, WgradMmaPlan& plan) {
  plan.load_vector = std::min(vector_width(params.x, params.width, params.x_stride, false),
                              vector_width(params.gy, params.width, params.gy_stride, false));
  if (plan.shape.tiled) plan.load_vector = std::min(plan.load_vector, 4);  // the halo is aligned to 4 elements
  plan.load_lanes = lanes_for(ceil_div(plan.x.cols, plan.load_vector));
  plan.rows_per_step = 32 * plan.warps / plan.load_lanes;
  const LoaderStep step = loader_step(plan.shape, plan.rows_per_step, params.height);
  plan.prefetch = !plan.shape.tiled && plan.load_vector == 8 && plan.load_lanes * 8 >= params.width &&
                  fits_registers(plan.shape, step, plan.rows_per_step, params.height, kPrefetch);
  plan.x.load_step = distance(step, params.x_stride);
  plan.x.store_step = distance(step, plan.x.maps);
  plan.gy.load_step = distance(step, params.gy_stride);
  plan.gy.store_step = distance(step, plan.gy.maps);
}

// The launch geometry for these parameters, or what leaves them to the direct kernel.
inline Obstacle choose_wgrad_mma_plan(const WgradParams& params, WgradMmaPlan& plan) {
  if (const Obstacle obstacle = find_obstacle(params); obstacle != Obstacle::kNone) return obstacle;
  const int pad_left = static_cast<int>(params.pad_left);
  plan = {};
  plan.x.top = static_cast<int>(params.pad_top);
  plan.x.left = static_cast<int>(std::max<int64_t>(kFixedLeft, round_up(pad_left, 4)));
  plan.lead = plan.x.left - pad_left;
  const int k_steps = static_cast<int>(ceil_div(plan.lead + params.kernel_w + kSubtile - 1, kMmaK));
  if (k_steps > kWgradMaxWarps) return Obstacle::kKernelWidth;
  if (!choose_shape(params, k_steps, plan)) return Obstacle::kSharedMemory;
  choose_loader(params, plan);

  const int64_t tiles = tiles_per_channel(plan.shape, params.batch);
  plan.tiles_per_channel = static_cast<int>(tiles);
  return tiles * params.channels < kMaxOffset ? Obstacle::kNone : Obstacle::kOffsets;
}

}  // namespace convmixer_fast::cuda
