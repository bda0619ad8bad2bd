// How the tensor-core kernel of the gradient of the weight cuts its work. Host code, no CUDA.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../../common/math.h"
#include "../../../params.h"
#include "../../common/host_device.h"
#include "../../depthwise/mma/loader.h"
#include "../../depthwise/mma/smem.h"

namespace convmixer_fast::cuda {

constexpr int kWgradRows = 8;          // tap rows of a warp where no instantiation has all of them
constexpr int kWgradMaxWarps = 16;     // of a block; and of an SM, by the registers
constexpr int kWgradFixedWarps = 4;    // of a block in which every warp has all taps
constexpr int kWgradDiagonals = 24;    // of a 16 x 8 product there are 23; the last is the sum of gy
constexpr int kWgradScratchPitch = 9;  // of a product in shared memory, so that neither rows nor diagonals share banks

// One of the two tensors in shared memory.
struct WgradOperand {
  int rows, cols;                    // loaded of one image: the map, or a tile with its halo
  int top, left;                     // stored rows above and columns left of the map or tile
  int pitch, band_gap, image_pitch;  // in elements
  int zero_unit;                     // where a unit that does not exist lies: zeros
  int elements;
  int load_step, store_step;  // of a prefetched item: from one piece of a thread to its next, in memory and here
};

struct WgradTile {
  bool fixed;                  // all tap rows in the registers of each warp, pitches kFixedPitch and kFixedOutPitch
  int tap_rows;                // of a warp
  int k_steps;                 // products of 16 stored columns that one row of taps needs
  int row_groups, passes;      // a pass takes this many groups of tap rows: one unless there are more than warps
  int images, bands, windows;  // of an item
  int tiles_h, tiles_w;        // of a map
  bool tiled;
  int units, groups;  // of an item, 16 units a group
  int splits;         // warps with the same taps share the groups
  int warps;          // splits x row_groups x k_steps
  WgradOperand x, gy;
  int lead;                                  // stored columns before the first tap of a window
  int load_vector, load_lanes, rows_a_step;  // as in MmaTile
  bool prefetch;
  int items_a_channel;

  CMF_HOST_DEVICE int tap_groups() const { return row_groups * k_steps; }
  int smem_bytes() const {
    return 2 * (x.elements + gy.elements) + 4 * warps * (tap_rows * kWgradDiagonals + kMmaDepth * kWgradScratchPitch);
  }
};

// The geometry for these params; false where the tensor-core kernel does not apply: float32 and float64, rows that are
// not contiguous, kernels over 240 wide.
inline bool choose_wgrad_tile(const WgradParams& params, WgradTile& tile) {
  using namespace tiles;
  constexpr int64_t kMaxOffset = int64_t{1} << 31;
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return false;
  if (params.width > 1 && (params.x_stride.w != 1 || params.gy_stride.w != 1)) return false;
  // Indices and the offsets inside one item are 32-bit.
  for (const Strides& stride : {params.x_stride, params.gy_stride})
    if (std::max(kGroupUnits * stride.n, params.height * stride.h) >= kMaxOffset) return false;
  if (std::max({params.batch, params.channels, params.height, params.width}) >= kMaxOffset) return false;
  if (std::max(params.kernel_h, params.kernel_w) > kMmaDepth * kWgradMaxWarps) return false;

  const int kernel_h = static_cast<int>(params.kernel_h), kernel_w = static_cast<int>(params.kernel_w);
  const int pad_top = static_cast<int>(params.pad_top), pad_left = static_cast<int>(params.pad_left);
  tile = {};
  tile.x.top = pad_top;
  tile.x.left = static_cast<int>(std::max<int64_t>(kFixedLeft, round_up(pad_left, 4)));
  tile.lead = tile.x.left - pad_left;
  tile.k_steps = static_cast<int>(ceil_div(tile.lead + kernel_w + kUnit - 1, kMmaDepth));
  if (tile.k_steps > kWgradMaxWarps) return false;

  const auto set_units = [&](int64_t bands, int64_t windows, int64_t images) {
    tile.bands = static_cast<int>(bands), tile.windows = static_cast<int>(windows);
    tile.images = static_cast<int>(images);
    tile.tiles_h = static_cast<int>(ceil_div(params.height, bands * kUnit));
    tile.tiles_w = static_cast<int>(ceil_div(params.width, windows * kUnit));
    tile.tiled = tile.tiles_h * tile.tiles_w > 1;
    tile.units = tile.images * tile.bands * tile.windows;
    tile.groups = static_cast<int>(ceil_div(tile.units, kGroupUnits));
    tile.fixed =
        tile.k_steps == 1 && tile.windows <= kFixedWindows && kernel_h % 2 == 1 && 3 <= kernel_h && kernel_h <= 9;
    tile.tap_rows = tile.fixed ? kernel_h : kWgradRows;
    const int row_groups = static_cast<int>(ceil_div(kernel_h, tile.tap_rows));
    tile.passes = static_cast<int>(ceil_div(row_groups, kWgradMaxWarps / tile.k_steps));
    tile.row_groups = static_cast<int>(ceil_div(row_groups, tile.passes));
    tile.splits = std::min(tile.groups, std::max(1, kWgradFixedWarps / tile.tap_groups()));
    tile.warps = tile.splits * tile.tap_groups();

    const auto set_operand = [&](WgradOperand& operand, int rows, int pitch, int zero_rows, int zero_cols) {
      operand.rows =
          static_cast<int>(tile.tiled ? kUnit * bands + (&operand == &tile.x ? kernel_h - 1 : 0) : params.height);
      operand.pitch = pitch;
      operand.cols = static_cast<int>(tile.tiled ? pitch : params.width);
      operand.band_gap = gap_to_slot(kUnit * pitch, tile.windows);
      operand.image_pitch = rows * pitch + (rows + kUnit - 1) / kUnit * operand.band_gap;
      operand.image_pitch += gap_to_slot(operand.image_pitch, tile.bands * tile.windows);
      operand.zero_unit = tile.images * operand.image_pitch;
      const int zeros = tile.units % kGroupUnits == 0 ? 0 : zero_rows * pitch + operand.band_gap + zero_cols;
      operand.elements = operand.zero_unit + static_cast<int>(round_up(zeros, kUnit));
    };
    set_operand(tile.x, kUnit * tile.bands + tile.passes * tile.row_groups * tile.tap_rows - 1,
                tile.fixed ? kFixedPitch : kUnit * (tile.windows - 1) + kMmaDepth * tile.k_steps,
                kUnit + tile.tap_rows - 2, kMmaDepth);
    set_operand(tile.gy, kUnit * tile.bands, tile.fixed ? kFixedOutPitch : kUnit * tile.windows, kUnit - 1, kUnit);
    return tile.smem_bytes() <= kMaxSmem;
  };

  // As in the forward pass: the whole map of as many images as fill a group, else a tile of 64 x 64 or 32 x 32.
  const int64_t bands = ceil_div(params.height, kUnit), windows = ceil_div(params.width, kUnit);
  const int64_t images = std::max<int64_t>(1, kGroupUnits / std::min<int64_t>(kGroupUnits, bands * windows));
  bool found = false;
  for (int64_t some = std::min(params.batch, images); some > 0 && !found; some /= 2)
    found = bands * windows <= 16 * kGroupUnits && set_units(bands, windows, some);
  for (const int64_t side : {8, 4, 2}) found = found || set_units(std::min(bands, side), std::min(windows, side), 1);
  if (!found) return false;

  tile.load_vector = std::min(vector_width(params.x, params.width, params.x_stride, false),
                              vector_width(params.gy, params.width, params.gy_stride, false));
  if (tile.tiled) tile.load_vector = std::min(tile.load_vector, 4);  // as the halo is aligned
  tile.load_lanes = lanes_for(ceil_div(tile.x.cols, tile.load_vector));
  tile.rows_a_step = 32 * tile.warps / tile.load_lanes;
  const bool within_image = tile.images == 1 && tile.rows_a_step % kUnit == 0;
  tile.prefetch = !tile.tiled && tile.load_vector == 8 && tile.load_lanes * 8 >= params.width &&
                  (within_image || tile.rows_a_step % params.height == 0) &&
                  ceil_div(tile.images * params.height, tile.rows_a_step) <= kPrefetch;
  const int step_rows = within_image ? tile.rows_a_step : 0;
  const int step_images = within_image ? 0 : static_cast<int>(tile.rows_a_step / params.height);
  const auto set_steps = [&](WgradOperand& operand, const Strides& stride) {
    operand.load_step = static_cast<int>(step_images * stride.n + step_rows * stride.h);
    operand.store_step =
        step_images * operand.image_pitch + step_rows * operand.pitch + step_rows / kUnit * operand.band_gap;
  };
  set_steps(tile.x, params.x_stride);
  set_steps(tile.gy, params.gy_stride);

  const int64_t items = ceil_div(params.batch, tile.images) * tile.tiles_h * tile.tiles_w;
  tile.items_a_channel = static_cast<int>(items);
  return items * params.channels < kMaxOffset;
}

}  // namespace convmixer_fast::cuda
