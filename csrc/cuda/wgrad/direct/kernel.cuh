// Gradient of a depthwise convolution's weight and bias on CUDA cores: any kernel size, map, strides and dtype.
//
// A block brings tiles of x, with their halo, and of gy into shared memory, zeros where the padding is. Each thread
// sums 2 tap rows by kTaps tap columns in registers over its share of the tile: it goes down strips of 8 columns, and a
// row of x, loaded once, meets the row of gy of either tap row, 16 kTaps FMAs. The sums stay in registers for as long
// as the block stays in a channel; then the threads with the same taps add theirs up through shared memory and leave
// one partial (wgrad/share.h). In channels_last a tile is of as many channels as a sector holds.
#pragma once
#include "../../common/access_vector.cuh"
#include "../../common/launch.h"
#include "../../common/shared_memory.h"
#include "../plan.h"

namespace convmixer_fast::cuda {

template <class T_, int kTaps_>
struct WgradDirectTraits {
  using T = T_;
  using Real = arithmetic_t<T>;
  // 0: any kernel width, in blocks of 8 tap columns.
  static constexpr int kTaps = kTaps_ == 0 ? kDirectTapBlock : kTaps_;
  static constexpr int kStrip = kDirectStripW;
  static constexpr int kWindowPitch = (kStrip + kTaps - 1 + 7) / 8 * 8;  // read 8 at a time
  // 128 registers a thread hold sums, window and two rows of gy.
  static constexpr int kMinBlocks = sizeof(T) == 8 ? 1 : 2;
};

template <class Traits>
__global__ void __launch_bounds__(kWgradMaxThreads, Traits::kMinBlocks)
    depthwise_wgrad_direct_kernel(const __grid_constant__ WgradParams params,
                                  const __grid_constant__ WgradDirectTile tile,
                                  const __grid_constant__ WgradShare share) {
  using T = typename Traits::T;
  using Real = typename Traits::Real;
  constexpr int kTaps = Traits::kTaps, kStrip = Traits::kStrip, kSums = kWgradPairs * kTaps + 1;
  extern __shared__ __align__(16) unsigned char smem[];
  T* const x_tile = reinterpret_cast<T*>(smem);
  T* const gy_tile = x_tile + tile.channels * tile.images * tile.x_image;
  Real* const thread_sums = reinterpret_cast<Real*>(smem);  // once the tiles are no longer needed
  const int thread = threadIdx.x;

  // The taps of this thread, its channel, and its place among those with the same.
  const int partner = thread % tile.partners, team = thread / tile.partners;
  const int tap_group = team % tile.tap_groups(), my_channel = team / tile.tap_groups();
  const bool has_taps = my_channel < tile.channels;
  const int tap_row = tap_group / tile.col_blocks * kWgradPairs, tap_col = tap_group % tile.col_blocks * kTaps;
  const int pass_row = blockIdx.y / tile.passes_w * tile.row_pairs * kWgradPairs;  // the first taps of this pass
  const int pass_col = blockIdx.y % tile.passes_w * tile.col_blocks * kTaps;

  Real sums[kWgradPairs][kTaps], gy_sum, gy_lost;  // what additions to gy_sum rounded away
  const auto clear = [&] {
    gy_sum = gy_lost = 0;
#pragma unroll
    for (int j = 0; j < kTaps; j++) sums[0][j] = sums[1][j] = 0;
  };

  // rows x pitch elements of each channel and image, whose first is (first_row, first_col) of the map.
  const auto fill = [&](const void* tensor, const Strides& stride, int64_t group, int64_t first_image,
                        int64_t first_row, int64_t first_col, int rows, int pitch, int image_pitch, T* to) {
    const int lane = thread % tile.lanes, channel = lane % tile.channels;
    const int64_t c = group * tile.channels + channel;
    const T* const from = static_cast<const T*>(tensor) + c * stride.c;
    const int skew = static_cast<int>(first_col & 7);  // lanes start at whole sectors
    for (int line = thread / tile.lanes; line < tile.images * rows; line += tile.threads / tile.lanes) {
      const int image = line / rows, row = line % rows;
      const int64_t n = first_image + image, h = first_row + row;
      T* const to_line = to + (channel * tile.images + image) * image_pitch + row * pitch;
      const bool has_line = c < params.channels && n < params.batch && h >= 0 && h < params.height;
      for (int col = lane / tile.channels - skew; col < pitch; col += tile.lanes / tile.channels) {
        if (col < 0) continue;
        const int64_t w = first_col + col;
        to_line[col] =
            has_line && w >= 0 && w < params.width ? from[n * stride.n + h * stride.h + w * stride.w] : narrow<T>(0);
      }
    }
  };

  const auto accumulate = [&] {
    const int tasks = tile.tasks(), strips = tile.strips();
    for (int task = partner; task < tasks; task += tile.partners) {
      const int strip = task % strips, image = my_channel * tile.images + task / strips % tile.images;
      const int first = task / strips / tile.images * tile.strip_rows, end = min(first + tile.strip_rows, tile.height);
      const T* x = x_tile + image * tile.x_image + (first + tap_row) * tile.x_pitch + strip * kStrip + tap_col;
      const T* gy = gy_tile + image * tile.gy_image + first * tile.gy_pitch + strip * kStrip;
      Real here[kStrip] = {}, above[kStrip];
      Real strip_sums[kWgradPairs][kTaps] = {};  // rows, strips, then all: less is rounded away
      for (int row = first; row <= end; row++) {
        Real window[Traits::kWindowPitch];
        load_window(window, x);
#pragma unroll
        for (int i = 0; i < kStrip; i++) above[i] = here[i], here[i] = 0;
        if (row < end) load_window(here, gy);
#pragma unroll
        for (int i = 0; i < kWgradPairs; i++) {
          if (i == 0 ? row == end : row == first) continue;
          const Real(&gy_row)[kStrip] = i == 0 ? here : above;
#pragma unroll
          for (int j = 0; j < kTaps; j++) {
            Real row_sum = gy_row[0] * window[j];
#pragma unroll
            for (int k = 1; k < kStrip; k++) row_sum += gy_row[k] * window[j + k];
            strip_sums[i][j] += row_sum;
          }
        }
        const Real row_gy = ((here[0] + here[1]) + (here[2] + here[3])) + ((here[4] + here[5]) + (here[6] + here[7]));
        const Real total = gy_sum + row_gy, kept = total - gy_sum;
        gy_lost += (gy_sum - (total - kept)) + (row_gy - kept);
        gy_sum = total;
        x += tile.x_pitch, gy += tile.gy_pitch;
      }
#pragma unroll
      for (int j = 0; j < kTaps; j++) sums[0][j] += strip_sums[0][j], sums[1][j] += strip_sums[1][j];
    }
  };

  const auto write_partial = [&](int64_t group) {
    __syncthreads();  // the tiles are no longer read
    if (has_taps) {
      Real* const mine = thread_sums + thread * kSums;
#pragma unroll
      for (int j = 0; j < kTaps; j++) mine[j] = sums[0][j], mine[kTaps + j] = sums[1][j];
      mine[kSums - 1] = gy_lost == gy_lost ? gy_sum + gy_lost : gy_sum;  // NaN where gy_sum is infinite
    }
    __syncthreads();
    const int teams = tile.channels * tile.tap_groups();
    for (int i = thread; i < teams * kSums; i += tile.threads) {
      const int team = i / kSums, sum = i % kSums, tap_group = team % tile.tap_groups();
      const int64_t row = pass_row + tap_group / tile.col_blocks * kWgradPairs + sum / kTaps;
      const int64_t col = pass_col + tap_group % tile.col_blocks * kTaps + sum % kTaps;
      const bool is_tap = sum < kSums - 1 && row < params.kernel_h && col < params.kernel_w;
      const bool is_gy = sum == kSums - 1 && tap_group == 0 && blockIdx.y == 0;
      if (!is_tap && !is_gy) continue;
      double total = 0;
      for (int p = 0; p < tile.partners; p++) total += thread_sums[(team * tile.partners + p) * kSums + sum];
      Real* const partial =
          static_cast<Real*>(params.workspace) + share.partial(blockIdx.x, group, team / tile.tap_groups());
      partial[is_gy ? share.sums - 1 : row * params.kernel_w + col] = static_cast<Real>(total);
    }
  };

  clear();
  const int64_t end = share.first_item(blockIdx.x + 1);
  for (int64_t item = share.first_item(blockIdx.x); item < end; item++) {
    const int64_t group = item / share.items_a_group, index = item % share.items_a_group;
    const int tiles = tile.tiles_h * tile.tiles_w, tile_index = static_cast<int>(index % tiles);
    const int64_t image = index / tiles * tile.images;
    const int64_t row = int64_t{tile_index / tile.tiles_w} * tile.height;
    const int64_t col = int64_t{tile_index % tile.tiles_w} * tile.width;
    __syncthreads();  // the previous tiles or sums are no longer read
    fill(params.x, params.x_stride, group, image, row + pass_row - params.pad_top, col + pass_col - params.pad_left,
         tile.x_rows, tile.x_pitch, tile.x_image, x_tile);
    fill(params.gy, params.gy_stride, group, image, row, col, tile.height, tile.gy_pitch, tile.gy_image, gy_tile);
    __syncthreads();
    if (has_taps) accumulate();
    if (index + 1 == share.items_a_group || item + 1 == end) {
      write_partial(group);
      clear();
    }
  }
}

// One dtype; instantiated in depthwise_wgrad_direct_<dtype>.cu, so that they compile side by side.
template <class T>
cudaError_t depthwise_wgrad_direct(const WgradParams& params, const WgradPlan& plan, cudaStream_t stream) {
  const WgradDirectTile& tile = plan.direct;
  if (tile.threads == 0) return cudaErrorInvalidConfiguration;
  const auto launch = [&](auto taps) {
    constexpr auto kernel = depthwise_wgrad_direct_kernel<WgradDirectTraits<T, decltype(taps)::value>>;
    if (const cudaError_t status = prepare_shared_memory<kernel>(); status != cudaSuccess) return status;
    const dim3 grid(plan.share.blocks, tile.passes_h * tile.passes_w);
    kernel<<<grid, tile.threads, plan.smem_bytes, stream>>>(params, tile, plan.share);
    return cudaGetLastError();
  };
  if constexpr (sizeof(T) < 8) switch (wgrad_exact_taps(params)) {
      case 3: return launch(std::integral_constant<int, 3>{});
      case 5: return launch(std::integral_constant<int, 5>{});
      case 7: return launch(std::integral_constant<int, 7>{});
      case 9: return launch(std::integral_constant<int, 9>{});
      default: break;
    }
  return launch(std::integral_constant<int, 0>{});
}

}  // namespace convmixer_fast::cuda
