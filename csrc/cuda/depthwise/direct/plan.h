// How the direct kernel cuts its work. Host code, no CUDA: the same choice launches the kernel and explains it
// (convmixer_fast.explain).
#pragma once
#include <algorithm>
#include <cstdint>

#include "../../../params.h"
#include "../../common/element_bytes.h"
#include "../../common/host_device.h"

namespace convmixer_fast::cuda {

constexpr int kDirectStripH = 2, kDirectStripW = 8;  // outputs of a thread
constexpr int kDirectTapBlock = 8;  // tap columns held in registers, where the width is not a usual one
constexpr int kDirectMaxThreads = 256;

// How the work is cut: chosen on the host, the same for all blocks.
struct DirectTile {
  int64_t groups;                           // of `slots` planes
  int tiles_h, tiles_w;                     // a plane
  int slots;                                // planes a block
  int height, width;                        // outputs of one tile
  int tap_rows, tap_cols;                   // of one tap block
  int in_rows, in_cols;                     // of one plane's shared tile, columns padded to whole windows
  int slot_stride, row_stride, col_stride;  // of the shared tile, in elements
  int fill_lanes;                           // threads that fill one row together
  int threads;
  int first_tap_row, taps_h, first_tap_col, taps_w;  // the taps that can reach the map

  CMF_HOST_DEVICE int strips() const { return (width + kDirectStripW - 1) / kDirectStripW; }
  CMF_HOST_DEVICE int strip_rows() const { return (height + kDirectStripH - 1) / kDirectStripH; }
  CMF_HOST_DEVICE int input_bytes(int element) const { return (slots * in_rows * in_cols * element + 15) / 16 * 16; }
  int smem_bytes(int element, int real) const { return input_bytes(element) + slots * tap_rows * tap_cols * real; }
};

// Lanes run over channels, not along rows.
inline bool direct_is_channels_last(const DepthwiseParams& params) {
  return params.x_stride.c == 1 && params.channels > 1;
}

// The taps that can reach the map: for maps smaller than the kernel the others only ever meet padding.
inline void clip_taps(int64_t size, int64_t taps, int64_t pad, int& first, int& count) {
  const int64_t begin = pad - (size - 1) > 0 ? pad - (size - 1) : 0;
  const int64_t end = pad + size < taps ? pad + size : taps;
  first = static_cast<int>(begin);
  count = static_cast<int>(end - begin);
}

// The tap columns if the kernel is compiled for just as many (float32, which has no other kernel), else 0.
inline int direct_exact_taps(const DepthwiseParams& params) {
  int first, taps;
  clip_taps(params.width, params.kernel_w, params.pad_left, first, taps);
  return params.dtype == DType::kFloat32 && taps % 2 == 1 && 3 <= taps && taps <= 9 ? taps : 0;
}

// The first of these that fits shared memory: all tap rows at once, or 8, or 1; then wide before narrow tap blocks,
// high before low tiles, many before few planes.
inline DirectTile choose_direct_tile(const DepthwiseParams& params) {
  constexpr int kSmem = 48 << 10;  // what every architecture gives without asking
  const int element = bytes_of(params.dtype), real = params.dtype == DType::kFloat64 ? 8 : 4;
  const bool channels_last = direct_is_channels_last(params);
  const int exact_taps = direct_exact_taps(params), taps = exact_taps ? exact_taps : kDirectTapBlock;
  const int window_pitch = (kDirectStripW + taps - 1 + 7) / 8 * 8;
  const auto ceil_div = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
  const auto split_evenly = [&](int64_t size, int most) { return ceil_div(size, ceil_div(size, most)); };

  DirectTile tile{};
  clip_taps(params.height, params.kernel_h, params.pad_top, tile.first_tap_row, tile.taps_h);
  clip_taps(params.width, params.kernel_w, params.pad_left, tile.first_tap_col, tile.taps_w);
  tile.width = split_evenly(params.width, channels_last ? 8 : 64);
  tile.tiles_w = ceil_div(params.width, tile.width);
  const int all_rows = std::min(tile.taps_h, 32);

  for (int least_rows : {all_rows, std::min(all_rows, 8), 1})
    for (int most_cols : {32, 8})
      for (int most_height : {channels_last ? 16 : 32, 8, 4})
        for (int slots : {channels_last ? 32 : 128, channels_last ? 16 : 32, 8, 1}) {
          tile.height = split_evenly(params.height, most_height);
          const int strips = tile.strips() * tile.strip_rows();
          tile.slots = channels_last ? slots : std::min(slots, std::max(1, 128 / strips));
          if (tile.slots * strips > kDirectMaxThreads) continue;
          tile.tap_cols = std::min(tile.taps_w, most_cols);
          if (exact_taps && tile.tap_cols != exact_taps) continue;
          tile.in_cols =
              (tile.strips() - 1) * kDirectStripW + (ceil_div(tile.tap_cols, taps) - 1) * taps + window_pitch;
          for (tile.tap_rows = all_rows; tile.tap_rows >= least_rows; tile.tap_rows--) {
            tile.in_rows = tile.strip_rows() * kDirectStripH + tile.tap_rows - 1;
            if (tile.smem_bytes(element, real) > kSmem) continue;
            tile.tiles_h = ceil_div(params.height, tile.height);
            tile.groups = (params.batch * params.channels + tile.slots - 1) / tile.slots;
            tile.slot_stride = channels_last ? 1 : tile.in_rows * tile.in_cols;
            tile.row_stride = channels_last ? tile.in_cols * tile.slots : tile.in_cols;
            tile.col_stride = channels_last ? tile.slots : 1;
            tile.fill_lanes = tile.in_cols <= 8 ? 8 : tile.in_cols <= 16 ? 16 : 32;
            tile.threads = ceil_div(tile.slots * strips, 32) * 32;
            return tile;
          }
        }
  tile.threads = 0;  // not reached: one plane, 4 x 8 outputs and one tap row fit
  return tile;
}

}  // namespace convmixer_fast::cuda
