// The launch geometry of the direct kernel for the weight's gradient. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../../common/math.h"
#include "../../../params.h"
#include "../../common/dtype_bytes.h"
#include "../../common/host_device.h"
#include "../../depthwise/direct/plan.h"
#include "../../depthwise/mma/loader.h"

namespace convmixer_fast::cuda {

constexpr int kWgradDirectTapRows = 2;  // tap rows per thread
constexpr int kWgradMaxThreads = 256;

struct WgradDirectPlan {
  int channels;    // channels per work tile: one, or in channels_last a sector of them, along which the lanes run
  int images;      // images per work tile
  int height;      // rows of gy per tile
  int width;       // columns of gy per tile: whole strips
  int tiles_h;     // tiles along h, per map
  int tiles_w;     // tiles along w, per map
  int taps;        // tap columns per thread
  int row_pairs;   // pairs of tap rows that a CTA sums at a time
  int col_blocks;  // sets of `taps` tap columns that a CTA sums at a time
  int passes_h;    // passes over x and gy until all tap rows are summed
  int passes_w;    // passes over x and gy until all tap columns are summed
  int strip_rows;  // rows of gy that a thread goes down at a time
  int partners;    // threads that have the same taps of the same channel
  int x_rows;      // stored rows of x per image
  int x_pitch;     // elements from one stored row of x to the next
  int gy_pitch;    // elements from one stored row of gy to the next
  int x_image;     // elements from one image or channel of x to the next: whole vectors, but in different banks
  int gy_image;    // elements from one image or channel of gy to the next, likewise
  int lanes;       // threads that fill one row together
  int threads;     // threads per CTA

  // Parts of the taps that threads can have.
  CMF_HOST_DEVICE int tap_blocks() const { return row_pairs * col_blocks; }
  CMF_HOST_DEVICE int strips() const { return width / kDirectStripW; }
  CMF_HOST_DEVICE int tasks() const { return images * strips() * ((height + strip_rows - 1) / strip_rows); }
  int smem_bytes(int element, int real) const {
    const int tiles = channels * images * (x_image + gy_image) * element;
    return std::max(tiles, threads * (kWgradDirectTapRows * taps + 1) * real);
  }
};

inline bool wgrad_is_channels_last(const WgradParams& params) {
  return params.channels > 1 && params.x_stride.c == 1 && params.gy_stride.c == 1;
}

// The tap columns if the kernel is compiled for just as many, else 0.
inline int wgrad_exact_taps(const WgradParams& params) {
  const int64_t taps = params.kernel_w;
  return params.dtype != DType::kFloat64 && taps % 2 == 1 && 3 <= taps && taps <= 9 ? static_cast<int>(taps) : 0;
}

// What a CTA takes at a time.
struct WgradDirectCut {
  int row_pairs;   // pairs of tap rows
  int col_blocks;  // sets of WgradDirectPlan::taps tap columns
  int channels;    // channels
  int max_height;  // rows of gy per tile, at most
  int max_width;   // columns of gy per tile, at most
  int images;      // images
};

// Pairs of tap rows, and blocks of tap columns, that cover the kernel.
inline int wgrad_row_pairs(const WgradParams& params) {
  return static_cast<int>(ceil_div(params.kernel_h, kWgradDirectTapRows));
}
inline int wgrad_col_blocks(const WgradParams& params, int taps) {
  return static_cast<int>(ceil_div(params.kernel_w, taps));
}

// Elements from one stored row, or image, to the next: a multiple of 16 bytes, neighbours in different banks.
inline int wgrad_row_pitch(int cols, int element) {
  return static_cast<int>(round_up(cols * element, 32) + 16) / element;
}
inline int wgrad_image_pitch(int elements, int element) {
  return static_cast<int>(round_up(elements * element, 128) + 16) / element;
}

// Sets everything that depends on the cut; false if it needs too many threads.
inline bool set_tile(const WgradParams& params, const WgradDirectCut& cut, WgradDirectPlan& plan) {
  const int element = bytes_of(params.dtype);
  plan.row_pairs = cut.row_pairs;
  plan.col_blocks = cut.col_blocks;
  plan.channels = cut.channels;
  plan.images = cut.images;
  plan.passes_h = static_cast<int>(ceil_div(wgrad_row_pairs(params), cut.row_pairs));
  plan.passes_w = static_cast<int>(ceil_div(wgrad_col_blocks(params, plan.taps), cut.col_blocks));
  plan.tiles_h = static_cast<int>(ceil_div(params.height, cut.max_height));
  plan.height = static_cast<int>(ceil_div(params.height, plan.tiles_h));
  plan.width = static_cast<int>(round_up(split_evenly(params.width, cut.max_width), kDirectStripW));
  plan.tiles_w = static_cast<int>(ceil_div(params.width, plan.width));

  const int window = static_cast<int>(round_up(kDirectStripW + plan.taps - 1, 8));
  const int x_cols = plan.width - kDirectStripW + (cut.col_blocks - 1) * plan.taps + window;
  plan.x_rows = plan.height + kWgradDirectTapRows * cut.row_pairs - 1;
  plan.x_pitch = wgrad_row_pitch(x_cols, element);
  plan.gy_pitch = wgrad_row_pitch(plan.width, element);
  plan.x_image = wgrad_image_pitch(plan.x_rows * plan.x_pitch, element);
  plan.gy_image = wgrad_image_pitch(plan.height * plan.gy_pitch, element);

  const int teams = cut.channels * plan.tap_blocks();
  if (teams > kWgradMaxThreads) return false;
  plan.partners = kWgradMaxThreads / teams;
  plan.strip_rows = std::min(plan.height, 16);  // bounds the chain of additions, too
  while (plan.strip_rows > 2 && plan.tasks() < 2 * plan.partners) plan.strip_rows = (plan.strip_rows + 1) / 2;
  plan.partners = std::min(plan.partners, plan.tasks());
  plan.threads = static_cast<int>(round_up(teams * plan.partners, 32));
  plan.lanes = std::min(32, threads_for(plan.x_pitch) * cut.channels);
  return true;
}

// The first of these that fits shared memory: all taps at once, or some tap columns, or some of both; in channels_last
// a sector of channels before some; large tiles before small ones.
inline WgradDirectPlan choose_wgrad_direct_plan(const WgradParams& params, int cta_smem) {
  constexpr int kSmem = 48 << 10;               // bytes: four CTAs per SM on sm_90
  constexpr int kSmemChannelsLast = 113 << 10;  // bytes: two CTAs per SM on sm_90
  const bool channels_last = wgrad_is_channels_last(params);
  const int element = bytes_of(params.dtype);
  const int real = arithmetic_bytes_of(params.dtype);
  const int exact_taps = wgrad_exact_taps(params);
  WgradDirectPlan plan{};
  plan.taps = exact_taps ? exact_taps : kDirectTapBlock;

  struct TapCut {
    int row_pairs;
    int col_blocks;
  };
  struct TileSize {
    int height;  // rows of gy
    int width;   // columns of gy
  };
  const int row_pairs = wgrad_row_pairs(params);
  const int col_blocks = wgrad_col_blocks(params, plan.taps);
  const TapCut tap_cuts[] = {{row_pairs, col_blocks}, {row_pairs, 1}, {std::min(row_pairs, 8), 1}, {1, 1}};
  constexpr TileSize kSizes[] = {{32, 64}, {32, 32}, {16, 32}, {16, 16}, {8, 16}, {8, 8}, {4, 8}, {2, 8}};
  const int sector = channels_last ? 32 / element : 1;
  const bool small = params.height * params.width <= 256;
  const int max_images = !channels_last ? 8 : small ? 4 : 1;
  const int smem = channels_last ? std::min(cta_smem, kSmemChannelsLast) : kSmem;
  for (const TapCut& taps : tap_cuts)
    for (int channels = sector; channels > 0; channels /= 2)
      for (const TileSize& size : kSizes)
        for (int images = max_images; images > 0; images /= 2) {
          if (images > params.batch) continue;
          const WgradDirectCut cut{taps.row_pairs, taps.col_blocks, channels, size.height, size.width, images};
          if (set_tile(params, cut, plan) && plan.smem_bytes(element, real) <= smem) return plan;
        }
  plan.threads = 0;  // not reached: one channel, 2 x 8 outputs and 2 tap rows fit
  return plan;
}

}  // namespace convmixer_fast::cuda
