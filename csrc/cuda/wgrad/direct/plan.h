// How the direct kernel of the gradient of the weight cuts its work. Host code, no CUDA.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "../../../common/math.h"
#include "../../../params.h"
#include "../../common/host_device.h"
#include "../../depthwise/direct/plan.h"
#include "../../depthwise/mma/loader.h"

namespace convmixer_fast::cuda {

constexpr int kWgradPairs = 2;  // tap rows of a thread
constexpr int kWgradMaxThreads = 256;

struct WgradDirectTile {
  int channels;                   // of an item: one, or in channels_last a sector of them, along which the lanes run
  int images;                     // of an item
  int height, width;              // of its tile of gy, whole strips of 8 columns
  int tiles_h, tiles_w;           // of a map
  int taps;                       // tap columns of a thread
  int row_pairs, col_blocks;      // tap rows by kWgradPairs and tap columns by `taps` that a block sums at once,
  int passes_h, passes_w;         // and how often it takes all
  int strip_rows;                 // of gy, which a thread goes down at a time
  int partners;                   // threads with the same taps of the same channel
  int x_rows, x_pitch, gy_pitch;  // of a stored image, in elements
  int x_image, gy_image;          // from one image or channel to the next: whole vectors, but in different banks
  int lanes;                      // threads that fill one row together
  int threads;

  CMF_HOST_DEVICE int tap_groups() const { return row_pairs * col_blocks; }
  CMF_HOST_DEVICE int strips() const { return width / kDirectStripW; }
  CMF_HOST_DEVICE int tasks() const { return images * strips() * ((height + strip_rows - 1) / strip_rows); }
  int smem_bytes(int element, int real) const {
    return std::max(channels * images * (x_image + gy_image) * element, threads * (kWgradPairs * taps + 1) * real);
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

// The first of these that fits shared memory: all taps at once, or some tap columns, or some of both; in channels_last
// a sector of channels before some; large tiles before small ones.
inline WgradDirectTile choose_wgrad_direct_tile(const WgradParams& params, int block_smem) {
  using namespace tiles;
  constexpr int kSmem = 48 << 10, kSmemChannelsLast = 113 << 10;  // on sm_90 four and two blocks an SM
  constexpr int kStrip = kDirectStripW;
  const bool channels_last = wgrad_is_channels_last(params);
  const int element = bytes_of(params.dtype), real = params.dtype == DType::kFloat64 ? 8 : 4;
  const int exact_taps = wgrad_exact_taps(params);
  const auto ceil = [](int64_t a, int64_t b) { return static_cast<int>(ceil_div(a, b)); };

  WgradDirectTile tile{};
  tile.taps = exact_taps ? exact_taps : kDirectTapBlock;
  const int row_pairs = ceil(params.kernel_h, kWgradPairs), col_blocks = ceil(params.kernel_w, tile.taps);
  const int window = static_cast<int>(round_up(kStrip + tile.taps - 1, 8));
  const auto fits = [&](int pairs, int blocks, int channels, int most_height, int most_width, int images, int smem) {
    tile.row_pairs = pairs, tile.col_blocks = blocks, tile.channels = channels, tile.images = images;
    tile.passes_h = ceil(row_pairs, pairs), tile.passes_w = ceil(col_blocks, blocks);
    tile.tiles_h = ceil(params.height, most_height), tile.tiles_w = ceil(params.width, most_width);
    tile.height = ceil(params.height, tile.tiles_h);
    tile.width = static_cast<int>(round_up(ceil(params.width, tile.tiles_w), kStrip));
    tile.tiles_w = ceil(params.width, tile.width);
    tile.x_rows = tile.height + kWgradPairs * pairs - 1;
    const auto pitch = [&](int cols) { return static_cast<int>(round_up(cols * element, 32) + 16) / element; };
    tile.x_pitch = pitch(tile.width - kStrip + (blocks - 1) * tile.taps + window);
    tile.gy_pitch = pitch(tile.width);
    const auto image_pitch = [&](int elements) {
      return static_cast<int>(round_up(elements * element, 128) + 16) / element;
    };
    tile.x_image = image_pitch(tile.x_rows * tile.x_pitch);
    tile.gy_image = image_pitch(tile.height * tile.gy_pitch);
    if (channels * tile.tap_groups() > kWgradMaxThreads) return false;
    tile.partners = kWgradMaxThreads / (channels * tile.tap_groups());
    tile.strip_rows = std::min(tile.height, 16);  // a bound on the chain of additions, too
    while (tile.strip_rows > 2 && tile.tasks() < 2 * tile.partners) tile.strip_rows = (tile.strip_rows + 1) / 2;
    tile.partners = std::min(tile.partners, tile.tasks());
    tile.threads = static_cast<int>(round_up(channels * tile.tap_groups() * tile.partners, 32));
    const int col_lanes = lanes_for(tile.x_pitch);
    tile.lanes = std::min(32, col_lanes * channels);
    return tile.smem_bytes(element, real) <= smem;
  };

  constexpr int kTiles[][2] = {{32, 64}, {32, 32}, {16, 32}, {16, 16}, {8, 16}, {8, 8}, {4, 8}, {2, 8}};
  const int sector = channels_last ? 32 / element : 1;
  const bool small = params.height * params.width <= 256;
  const int most_images = !channels_last ? 8 : small ? 4 : 1;
  const int smem = channels_last ? std::min(block_smem, kSmemChannelsLast) : kSmem;
  for (const auto& [pairs, blocks] : {std::pair{row_pairs, col_blocks}, std::pair{row_pairs, 1},
                                      std::pair{std::min(row_pairs, 8), 1}, std::pair{1, 1}})
    for (int channels = sector; channels > 0; channels /= 2)
      for (const auto& [height, width] : kTiles)
        for (int images = most_images; images > 0; images /= 2)
          if (images <= params.batch && fits(pairs, blocks, channels, height, width, images, smem)) return tile;
  tile.threads = 0;  // not reached: one channel, 2 x 8 outputs and 2 tap rows fit
  return tile;
}

}  // namespace convmixer_fast::cuda
