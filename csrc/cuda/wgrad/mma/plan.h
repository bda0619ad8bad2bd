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
#include "../../common/launch_bounds.h"
#include "../../common/obstacle.h"
#include "../../depthwise/mma/loader.h"
#include "../../depthwise/mma/shape.h"
#include "../../depthwise/mma/smem.h"
#include "../share.h"

namespace convmixer_fast::cuda {

constexpr int kWgradMmaTapRows = 8;     // tap rows per warp if no instantiation has all of them
constexpr int kWgradUnrolledWarps = 4;  // warps that share the M blocks, divided by the number of tap blocks
static_assert(kWgradMmaTapRows == kSubtile, "the next tap row block reads one subtile row further down");
constexpr LaunchBounds wgrad_launch_bounds(bool unrolled, Loader loader) {
  if (!unrolled) return {32 * kWgradMaxWarps, 1};
  return {32 * kWgradUnrolledWarps, loader == Loader::kUnalignedRows ? 3 : 4};
}
// 128 registers keep 64 KB prefetched per SM; the addresses of words take more.
static_assert(wgrad_launch_bounds(true, Loader::kAlignedRows).registers() == 128);
static_assert(wgrad_launch_bounds(true, Loader::kUnalignedRows).registers() == 168);
static_assert(wgrad_launch_bounds(false, Loader::kAlignedRows).registers() == 128);

// Products that one accumulator adds up before the sum is taken out of it. Tensor cores cut off what a product adds
// below the sum's last place, always towards zero, so that the error grows with their number: by 2^-25 of the sum for
// each 16 subtiles on sm_90, by twice as much before. After so many it is 2^-16 at most, which float16 does not see.
constexpr int kWgradChain = 512;

constexpr int kWgradDiagonals = 24;    // a 16 x 8 product has 23; the last is the sum of gy
constexpr int kWgradMaxKernelH = 256;  // a tile with the halo of many more tap rows would not fit shared memory
constexpr int kWgradMaxKernelW = max_kernel_w(kWgradMaxWarps);
constexpr int kWgradScratchPitch = 9;  // pitch of a product in shared memory: neither rows nor diagonals share banks

// One of the two tensors, x or gy.
struct WgradOperand {
  MapOperand map;    // the tensor and its maps in shared memory
  int top;           // stored rows above the map or tile
  int left;          // stored columns left of the map or tile
  int rows;          // rows stored of a tile, with its halo
  int zero_subtile;  // elements to row 0, column -left of a subtile that does not exist: zeros
};

// How the taps are divided among the warps of a CTA.
struct WgradTaps {
  bool unrolled;       // each warp has all tap rows in its registers
  int tap_rows;        // tap rows per warp
  int k_steps;         // products of 16 stored columns (here the M of an mma) that one row of taps needs
  int tap_row_blocks;  // sets of tap_rows tap rows that a pass takes
  int passes;          // passes over x and gy: one unless there are more tap row blocks than warps

  // The parts of the taps that warps can have: tap row blocks by 16 stored columns.
  CMF_HOST_DEVICE int tap_blocks() const { return tap_row_blocks * k_steps; }
};

struct WgradMmaPlan {
  Loader loader;
  bool odd;                 // kUnalignedRows: words of some rows have only one element of the row
  WgradTaps taps;           // how the taps are divided among warps
  TileShape shape;          // elements of gy in a work tile
  int splits;               // warps that have the same taps and share the M blocks
  int warps;                // warps per CTA: splits x tap blocks
  LoaderSteps steps;        // kUnalignedRows
  WgradOperand x;           // x in shared memory
  WgradOperand gy;          // gy in shared memory
  int lead;                 // stored columns before the first tap of a subtile
  int row_bytes[kSubtile];  // from row r of a window to row r + 1 in the stored x, by r modulo 8
  int tiles_per_channel;    // work tiles per channel
  int tiles_per_chain;      // work tiles whose products may follow each other in one accumulator

  int smem_bytes() const {
    return 2 * (x.map.elements + gy.map.elements) +
           4 * warps * (taps.tap_rows * kWgradDiagonals + kMmaK * kWgradScratchPitch);
  }
};

// What keeps the kernel from these parameters, whatever the geometry: it takes float16 and bfloat16, contiguous rows,
// kernels up to kWgradMaxKernelH x kWgradMaxKernelW, and indices and offsets inside a work tile of 32 bits.
inline Obstacle find_obstacle(const WgradParams& params) {
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return Obstacle::kDType;
  if (params.width > 1 && (params.x_stride.w != 1 || params.gy_stride.w != 1)) return Obstacle::kLayout;
  for (const Strides& stride : {used_strides(params, params.x_stride), used_strides(params, params.gy_stride)})
    if (std::max(kSubtilesPerMma * stride.n, params.height * stride.h) >= kMaxOffset) return Obstacle::kOffsets;
  if (std::max({params.batch, params.channels, params.height, params.width}) >= kMaxOffset) return Obstacle::kOffsets;
  if (params.kernel_h > kWgradMaxKernelH) return Obstacle::kKernelHeight;
  return params.kernel_w > kWgradMaxKernelW ? Obstacle::kKernelWidth : Obstacle::kNone;
}

inline WgradTaps divide_taps(const WgradParams& params, int k_steps, const TileShape& shape) {
  const int kernel_h = static_cast<int>(params.kernel_h);
  WgradTaps taps{};
  taps.k_steps = k_steps;
  taps.unrolled = k_steps == 1 && shape.subtile_cols <= kFixedSubtileCols && kernel_h % 2 == 1 && 3 <= kernel_h &&
                  kernel_h <= 9 && params.pad_top == (kernel_h - 1) / 2;
  taps.tap_rows = taps.unrolled ? kernel_h : kWgradMmaTapRows;
  const int tap_row_blocks = static_cast<int>(ceil_div(kernel_h, taps.tap_rows));
  taps.passes = static_cast<int>(ceil_div(tap_row_blocks, kWgradMaxWarps / k_steps));
  taps.tap_row_blocks = static_cast<int>(ceil_div(tap_row_blocks, taps.passes));
  return taps;
}

// What lies in shared memory of one tensor: `rows` stored rows per map from its first on, and if subtiles are missing
// from the last M block zeros for one subtile, which reads zero_rows rows of zero_cols columns.
inline void set_layout(const TileShape& shape, int rows, int pitch, int zero_rows, int zero_cols,
                       WgradOperand& operand) {
  const StoredMaps maps = stored_maps(shape, operand.top, operand.left, rows, pitch);
  const int first_zero = shape.images * maps.image_pitch;
  const int first_row = maps.row(-operand.top);
  operand.map.maps = maps;
  operand.zero_subtile = first_zero - first_row;
  const bool is_complete = shape.subtiles % kSubtilesPerMma == 0;
  const int zeros = is_complete ? 0 : maps.row(zero_rows - 1 - operand.top) - first_row + zero_cols;
  operand.map.elements = static_cast<int>(round_up(first_zero + zeros, kSubtile));
}

// Sets taps, tile and shared memory to the first of these that fits: whole maps, as many images as fill an M block,
// then half as many, and so on; tiles of 64 x 64, 32 x 32, then 16 x 16.
inline bool choose_shape(const WgradParams& params, int k_steps, WgradMmaPlan& plan) {
  const int kernel_h = static_cast<int>(params.kernel_h);
  const auto fits = [&](const TileShape& shape) {
    plan.shape = shape;
    plan.taps = divide_taps(params, k_steps, plan.shape);
    plan.splits = std::min(plan.shape.m_blocks, std::max(1, kWgradUnrolledWarps / plan.taps.tap_blocks()));
    plan.warps = plan.splits * plan.taps.tap_blocks();

    const int rows = kSubtile * plan.shape.subtile_rows;
    const int gy_cols = kSubtile * plan.shape.subtile_cols;
    const int x_cols = gy_cols - kSubtile + kMmaK * k_steps;
    const int tap_rows = plan.taps.passes * plan.taps.tap_row_blocks * plan.taps.tap_rows;
    const bool fixed = plan.taps.unrolled;
    set_layout(plan.shape, rows + tap_rows - 1 - plan.x.top, fixed ? kFixedPitch : x_cols,
               kSubtile + plan.taps.tap_rows - 1, kMmaK, plan.x);
    set_layout(plan.shape, rows, fixed ? kFixedOutPitch : gy_cols, kSubtile, kSubtile, plan.gy);
    plan.x.rows = rows + kernel_h - 1;
    plan.gy.rows = rows;
    return plan.smem_bytes() <= kMaxSmem;
  };
  return first_shape(params.height, params.width, params.batch, {8, 4, 2}, fits);
}

// Sets which thread loads what of a plan's shape.
inline void choose_loader(const WgradParams& params, WgradMmaPlan& plan) {
  const Strides x_stride = used_strides(params, params.x_stride);
  const Strides gy_stride = used_strides(params, params.gy_stride);
  const int vector = std::min(vector_width(params.x, params.width, x_stride, false),
                              vector_width(params.gy, params.width, gy_stride, false));
  plan.odd = vector == 1;
  plan.loader = choose_row_loader(plan.shape, 32 * plan.warps, vector, params.height, params.width, plan.steps);
  // There are no other instantiations of unaligned rows: words do not fit the registers of 16 warps per CTA.
  if (plan.loader == Loader::kUnalignedRows && !plan.taps.unrolled) plan.loader = Loader::kTiles;
  set_distances(plan.loader, plan.shape, plan.steps, plan.tiles_per_channel, 1, x_stride, plan.x.map);
  set_distances(plan.loader, plan.shape, plan.steps, plan.tiles_per_channel, 1, gy_stride, plan.gy.map);
  plan.x.map.vector = plan.shape.tiled ? std::min(vector, 4) : vector;  // the halo is aligned to 4 elements
  plan.gy.map.vector = vector;
  for (MapOperand* map : {&plan.x.map, &plan.gy.map})
    map->threads_per_row = threads_for(ceil_div(plan.shape.tiled ? map->maps.pitch : params.width, map->vector));
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
  const StoredMaps& maps = plan.x.map.maps;
  for (int row = 0; row < kSubtile; row++)
    plan.row_bytes[row] = 2 * (maps.row(row + 1 - plan.x.top) - maps.row(row - plan.x.top));

  const int64_t tiles = tiles_per_channel(plan.shape, params.batch);
  if (tiles * params.channels >= kMaxOffset) return Obstacle::kOffsets;
  plan.tiles_per_channel = static_cast<int>(tiles);
  const int64_t products = kSubtile * ceil_div(plan.shape.m_blocks, plan.splits);
  plan.tiles_per_chain = static_cast<int>(std::max<int64_t>(1, kWgradChain / products));
  choose_loader(params, plan);
  return Obstacle::kNone;
}

}  // namespace convmixer_fast::cuda
