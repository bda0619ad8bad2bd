// The launch geometry of the direct kernel. Host code, no CUDA: the same choice launches the kernel and explains it
// (convmixer_fast.explain).
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../../common/math.h"
#include "../../../params.h"
#include "../../common/dtype_bytes.h"
#include "../../common/host_device.h"
#include "../../common/launch_bounds.h"

namespace convmixer_fast::cuda {

constexpr int kDirectStripH = 2;    // output rows per thread
constexpr int kDirectStripW = 8;    // output columns per thread
constexpr int kDirectTapBlock = 8;  // tap columns held in registers if there is no instantiation for the kernel's width
constexpr int kDirectMaxThreads = 256;

// 128 registers per thread hold strip, window and taps; those of float64 are twice as large.
constexpr LaunchBounds direct_launch_bounds(int element_bytes) {
  return {kDirectMaxThreads, element_bytes == 8 ? 1 : 2};
}
static_assert(direct_launch_bounds(4).registers() == 128 && direct_launch_bounds(8).registers() == 255);

struct DirectPlan {
  int64_t map_blocks;  // sets of `slots` maps
  int tiles_h;         // tiles along h, per map
  int tiles_w;         // tiles along w, per map
  int slots;           // maps per CTA
  int height;          // output rows per tile
  int width;           // output columns per tile
  int tap_rows;        // tap rows per tap block
  int tap_cols;        // tap columns per tap block
  int in_rows;         // stored input rows per map
  int in_cols;         // stored input columns per map, padded to whole windows
  int slot_stride;     // elements from one map's inputs to the next's, in shared memory
  int row_stride;      // elements from one row to the next
  int col_stride;      // elements from one column to the next
  int fill_lanes;      // threads that fill one row together
  int threads;         // threads per CTA
  int first_tap_row;   // the first tap row that can reach the map
  int taps_h;          // tap rows that can reach the map
  int first_tap_col;   // the first tap column that can reach the map
  int taps_w;          // tap columns that can reach the map

  CMF_HOST_DEVICE int strips() const { return (width + kDirectStripW - 1) / kDirectStripW; }
  CMF_HOST_DEVICE int strip_rows() const { return (height + kDirectStripH - 1) / kDirectStripH; }
  CMF_HOST_DEVICE int input_bytes(int element) const { return (slots * in_rows * in_cols * element + 15) / 16 * 16; }
  int64_t work_tiles() const { return map_blocks * tiles_h * tiles_w; }
  int smem_bytes(int element, int real) const { return input_bytes(element) + slots * tap_rows * tap_cols * real; }
};

// Whether lanes run over channels, not along rows.
inline bool direct_is_channels_last(const DepthwiseParams& params) {
  return params.x_stride.c == 1 && params.channels > 1;
}

// The tap columns if the kernel is compiled for just as many (float32, which has no other kernel), else 0.
inline int direct_exact_taps(const DepthwiseParams& params) {
  const int taps = clip_taps(params.width, params.kernel_w, params.pad_left).count;
  return params.dtype == DType::kFloat32 && taps % 2 == 1 && 3 <= taps && taps <= 9 ? taps : 0;
}

// Bounds on a tile and on a tap block.
struct DirectBounds {
  int min_tap_rows;  // tap rows per tap block, at least
  int max_tap_cols;  // tap columns per tap block, at most
  int max_height;    // output rows per tile, at most
  int max_slots;     // maps per CTA, at most
};

// The largest part of `size` when it is split evenly into parts of at most `most`.
inline int split_evenly(int64_t size, int most) { return static_cast<int>(ceil_div(size, ceil_div(size, most))); }

// Sets everything that depends on the bounds; false if it does not fit shared memory or needs too many threads.
inline bool set_tile(const DepthwiseParams& params, const DirectBounds& bounds, int max_tap_rows, DirectPlan& plan) {
  constexpr int kSmem = 48 << 10;  // bytes that every architecture gives without asking
  const int element = bytes_of(params.dtype);
  const int real = arithmetic_bytes_of(params.dtype);
  const bool channels_last = direct_is_channels_last(params);
  const int exact_taps = direct_exact_taps(params);
  const int register_taps = exact_taps ? exact_taps : kDirectTapBlock;
  const int window_pitch = static_cast<int>(round_up(kDirectStripW + register_taps - 1, 8));

  plan.height = split_evenly(params.height, bounds.max_height);
  const int strips = plan.strips() * plan.strip_rows();
  plan.slots = channels_last ? bounds.max_slots : std::min(bounds.max_slots, std::max(1, 128 / strips));
  if (plan.slots * strips > kDirectMaxThreads) return false;
  plan.tap_cols = std::min(plan.taps_w, bounds.max_tap_cols);
  if (exact_taps && plan.tap_cols != exact_taps) return false;
  const int later_taps = (static_cast<int>(ceil_div(plan.tap_cols, register_taps)) - 1) * register_taps;
  plan.in_cols = (plan.strips() - 1) * kDirectStripW + later_taps + window_pitch;

  for (plan.tap_rows = max_tap_rows; plan.tap_rows >= bounds.min_tap_rows; plan.tap_rows--) {
    plan.in_rows = plan.strip_rows() * kDirectStripH + plan.tap_rows - 1;
    if (plan.smem_bytes(element, real) <= kSmem) break;
  }
  if (plan.tap_rows < bounds.min_tap_rows) return false;
  plan.tiles_h = static_cast<int>(ceil_div(params.height, plan.height));
  plan.map_blocks = ceil_div(params.batch * params.channels, plan.slots);
  plan.slot_stride = channels_last ? 1 : plan.in_rows * plan.in_cols;
  plan.row_stride = channels_last ? plan.in_cols * plan.slots : plan.in_cols;
  plan.col_stride = channels_last ? plan.slots : 1;
  plan.fill_lanes = plan.in_cols <= 8 ? 8 : plan.in_cols <= 16 ? 16 : 32;
  plan.threads = static_cast<int>(round_up(plan.slots * strips, 32));
  return true;
}

// The first of these that fits shared memory: all tap rows at once, or 8, or 1; then wide before narrow tap blocks,
// high before low tiles, many before few maps.
inline DirectPlan choose_direct_plan(const DepthwiseParams& params) {
  const bool channels_last = direct_is_channels_last(params);
  const TapRange tap_rows = clip_taps(params.height, params.kernel_h, params.pad_top);
  const TapRange tap_cols = clip_taps(params.width, params.kernel_w, params.pad_left);
  DirectPlan plan{};
  plan.first_tap_row = tap_rows.first;
  plan.taps_h = tap_rows.count;
  plan.first_tap_col = tap_cols.first;
  plan.taps_w = tap_cols.count;
  plan.width = split_evenly(params.width, channels_last ? 8 : 64);
  plan.tiles_w = static_cast<int>(ceil_div(params.width, plan.width));

  const int max_tap_rows = std::min(plan.taps_h, 32);
  const int min_tap_rows_choices[] = {max_tap_rows, std::min(max_tap_rows, 8), 1};
  const int max_height_choices[] = {channels_last ? 16 : 32, 8, 4};
  const int max_slots_choices[] = {channels_last ? 32 : 128, channels_last ? 16 : 32, 8, 1};
  for (const int min_tap_rows : min_tap_rows_choices)
    for (const int max_tap_cols : {32, 8})
      for (const int max_height : max_height_choices)
        for (const int max_slots : max_slots_choices)
          if (set_tile(params, {min_tap_rows, max_tap_cols, max_height, max_slots}, max_tap_rows, plan)) return plan;
  plan.threads = 0;  // not reached: one map, 4 x 8 outputs and one tap row fit
  return plan;
}

}  // namespace convmixer_fast::cuda
