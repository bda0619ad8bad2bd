// Gradient of a depthwise convolution's weight and bias on CUDA cores: any kernel size, map, strides and dtype.
//
// A CTA brings tiles of x, with their halo, and of gy into shared memory, zeros where the padding is. Each thread sums
// 2 tap rows by kTaps tap columns in registers over its share of the tile: it goes down strips of 8 columns, and
// each row of x, loaded once, meets the row of gy of either tap row, 16 kTaps FMAs. The accumulators stay in registers
// for as long as the CTA stays in a channel; then the threads with the same taps add theirs up through shared memory
// and leave one partial (wgrad/share.h). In channels_last a tile has as many channels as a sector holds.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../common/access_vector.cuh"
#include "../../common/launch.h"
#include "../../common/shared_memory.h"
#include "../share.h"
#include "plan.h"

namespace convmixer_fast::cuda {

template <class T_, int kTaps_>
struct WgradDirectTraits {
  using T = T_;
  using Real = arithmetic_t<T>;
  // 0: any kernel width, 8 tap columns at a time.
  static constexpr int kTaps = kTaps_ == 0 ? kDirectTapBlock : kTaps_;
  static constexpr int kStrip = kDirectStripW;
  static constexpr int kWindowPitch = (kStrip + kTaps - 1 + 7) / 8 * 8;  // read 8 at a time
  // 128 registers per thread hold accumulators, window and two rows of gy.
  static constexpr int kMinBlocks = sizeof(T) == 8 ? 1 : 2;
};

template <class Traits>
__global__ void __launch_bounds__(kWgradMaxThreads, Traits::kMinBlocks)
    depthwise_wgrad_direct_kernel(const __grid_constant__ WgradParams params,
                                  const __grid_constant__ WgradDirectPlan plan,
                                  const __grid_constant__ WgradShare share) {
  using T = typename Traits::T;
  using Real = typename Traits::Real;
  constexpr int kTaps = Traits::kTaps;
  constexpr int kStrip = Traits::kStrip;
  constexpr int kSums = kWgradDirectTapRows * kTaps + 1;
  extern __shared__ __align__(16) unsigned char smem[];
  T* const x_tile = reinterpret_cast<T*>(smem);
  T* const gy_tile = x_tile + plan.channels * plan.images * plan.x_image;
  Real* const thread_sums = reinterpret_cast<Real*>(smem);  // once the tiles are no longer needed
  const int thread = threadIdx.x;

  // The taps of this thread, its channel, and its number among the partners, which have the same.
  const int partner = thread % plan.partners;
  const int team = thread / plan.partners;
  const int tap_block = team % plan.tap_blocks();
  const int team_channel = team / plan.tap_blocks();
  const bool has_taps = team_channel < plan.channels;
  const int tap_row = tap_block / plan.col_blocks * kWgradDirectTapRows;
  const int tap_col = tap_block % plan.col_blocks * kTaps;
  // The first taps of this pass.
  const int pass_row = blockIdx.y / plan.passes_w * plan.row_pairs * kWgradDirectTapRows;
  const int pass_col = blockIdx.y % plan.passes_w * plan.col_blocks * kTaps;

  Real acc[kWgradDirectTapRows][kTaps];
  Real gy_sum;
  Real gy_lost;  // what additions to gy_sum rounded away
  const auto clear = [&] {
    gy_sum = 0;
    gy_lost = 0;
#pragma unroll
    for (int j = 0; j < kTaps; j++) {
      acc[0][j] = 0;
      acc[1][j] = 0;
    }
  };

  // Fills rows x pitch elements per channel and image, the first of them element (first_row, first_col) of the map.
  const auto fill = [&](const void* tensor, const Strides& stride, int64_t channel_block, int64_t first_image,
                        int64_t first_row, int64_t first_col, int rows, int pitch, int image_pitch, T* to) {
    const int lane = thread % plan.lanes;
    const int channel = lane % plan.channels;
    const int64_t c = channel_block * plan.channels + channel;
    const T* const from = static_cast<const T*>(tensor) + c * stride.c;
    const int skew = static_cast<int>(first_col & 7);  // lanes start at whole sectors
    for (int line = thread / plan.lanes; line < plan.images * rows; line += plan.threads / plan.lanes) {
      const int image = line / rows;
      const int row = line % rows;
      const int64_t n = first_image + image;
      const int64_t h = first_row + row;
      T* const to_line = to + (channel * plan.images + image) * image_pitch + row * pitch;
      const bool has_line = c < params.channels && n < params.batch && h >= 0 && h < params.height;
      for (int col = lane / plan.channels - skew; col < pitch; col += plan.lanes / plan.channels) {
        if (col < 0) continue;
        const int64_t w = first_col + col;
        to_line[col] =
            has_line && w >= 0 && w < params.width ? from[n * stride.n + h * stride.h + w * stride.w] : narrow<T>(0);
      }
    }
  };

  const auto accumulate = [&] {
    const int tasks = plan.tasks();
    const int strips = plan.strips();
    for (int task = partner; task < tasks; task += plan.partners) {
      const int strip = task % strips;
      const int image = team_channel * plan.images + task / strips % plan.images;
      const int first = task / strips / plan.images * plan.strip_rows;
      const int end = min(first + plan.strip_rows, plan.height);
      const T* x = x_tile + image * plan.x_image + (first + tap_row) * plan.x_pitch + strip * kStrip + tap_col;
      const T* gy = gy_tile + image * plan.gy_image + first * plan.gy_pitch + strip * kStrip;
      Real here[kStrip] = {};
      Real above[kStrip];
      Real strip_acc[kWgradDirectTapRows][kTaps] = {};  // one strip, before it joins the others: less is rounded away
      for (int row = first; row <= end; row++) {
        Real window[Traits::kWindowPitch];
        load_window(window, x);
#pragma unroll
        for (int i = 0; i < kStrip; i++) {
          above[i] = here[i];
          here[i] = 0;
        }
        if (row < end) load_window(here, gy);
#pragma unroll
        for (int i = 0; i < kWgradDirectTapRows; i++) {
          if (i == 0 ? row == end : row == first) continue;
          const Real(&gy_row)[kStrip] = i == 0 ? here : above;
#pragma unroll
          for (int j = 0; j < kTaps; j++) {
            Real row_acc = gy_row[0] * window[j];
#pragma unroll
            for (int k = 1; k < kStrip; k++) row_acc += gy_row[k] * window[j + k];
            strip_acc[i][j] += row_acc;
          }
        }
        const Real row_gy = ((here[0] + here[1]) + (here[2] + here[3])) + ((here[4] + here[5]) + (here[6] + here[7]));
        const Real total = gy_sum + row_gy;
        const Real kept = total - gy_sum;
        gy_lost += (gy_sum - (total - kept)) + (row_gy - kept);
        gy_sum = total;
        x += plan.x_pitch;
        gy += plan.gy_pitch;
      }
#pragma unroll
      for (int j = 0; j < kTaps; j++) {
        acc[0][j] += strip_acc[0][j];
        acc[1][j] += strip_acc[1][j];
      }
    }
  };

  const auto write_partial = [&](int64_t channel_block) {
    __syncthreads();  // the tiles are no longer read
    if (has_taps) {
      Real* const mine = thread_sums + thread * kSums;
#pragma unroll
      for (int j = 0; j < kTaps; j++) {
        mine[j] = acc[0][j];
        mine[kTaps + j] = acc[1][j];
      }
      mine[kSums - 1] = gy_lost == gy_lost ? gy_sum + gy_lost : gy_sum;  // gy_lost is NaN if gy_sum is infinite
    }
    __syncthreads();
    const int teams = plan.channels * plan.tap_blocks();
    for (int i = thread; i < teams * kSums; i += plan.threads) {
      const int team = i / kSums;
      const int sum = i % kSums;
      const int tap_block = team % plan.tap_blocks();
      const int64_t row = pass_row + tap_block / plan.col_blocks * kWgradDirectTapRows + sum / kTaps;
      const int64_t col = pass_col + tap_block % plan.col_blocks * kTaps + sum % kTaps;
      const bool is_tap = sum < kSums - 1 && row < params.kernel_h && col < params.kernel_w;
      const bool is_gy = sum == kSums - 1 && tap_block == 0 && blockIdx.y == 0;
      if (!is_tap && !is_gy) continue;
      double total = 0;
      for (int p = 0; p < plan.partners; p++) total += thread_sums[(team * plan.partners + p) * kSums + sum];
      Real* const partial =
          static_cast<Real*>(params.workspace) + share.partial(blockIdx.x, channel_block, team / plan.tap_blocks());
      partial[is_gy ? share.sums - 1 : row * params.kernel_w + col] = static_cast<Real>(total);
    }
  };

  clear();
  const int64_t end = share.first_tile(blockIdx.x + 1);
  for (int64_t work_tile = share.first_tile(blockIdx.x); work_tile < end; work_tile++) {
    const int64_t channel_block = work_tile / share.tiles_per_channel_block;
    const int64_t index = work_tile % share.tiles_per_channel_block;
    const int tiles = plan.tiles_h * plan.tiles_w;
    const int tile_index = static_cast<int>(index % tiles);
    const int64_t image = index / tiles * plan.images;
    const int64_t row = int64_t{tile_index / plan.tiles_w} * plan.height;
    const int64_t col = int64_t{tile_index % plan.tiles_w} * plan.width;
    __syncthreads();  // the previous tiles or sums are no longer read
    fill(params.x, params.x_stride, channel_block, image, row + pass_row - params.pad_top,
         col + pass_col - params.pad_left, plan.x_rows, plan.x_pitch, plan.x_image, x_tile);
    fill(params.gy, params.gy_stride, channel_block, image, row, col, plan.height, plan.gy_pitch, plan.gy_image,
         gy_tile);
    __syncthreads();
    if (has_taps) accumulate();
    if (index + 1 == share.tiles_per_channel_block || work_tile + 1 == end) {
      write_partial(channel_block);
      clear();
    }
  }
}

// Picks the instantiation for one dtype. Instantiated in instantiations/depthwise_wgrad_direct_<dtype>.cu, which
// compile side by side.
template <class T>
cudaError_t depthwise_wgrad_direct(const WgradParams& params, const WgradDirectPlan& plan, const WgradShare& share,
                                   cudaStream_t stream) {
  if (plan.threads == 0) return cudaErrorInvalidConfiguration;
  const auto launch = [&](auto taps) {
    constexpr auto kernel = depthwise_wgrad_direct_kernel<WgradDirectTraits<T, decltype(taps)::value>>;
    if (const cudaError_t status = prepare_shared_memory<kernel>(); status != cudaSuccess) return status;
    const dim3 grid(share.ctas, plan.passes_h * plan.passes_w);
    const int smem = plan.smem_bytes(sizeof(T), sizeof(arithmetic_t<T>));
    kernel<<<grid, plan.threads, smem, stream>>>(params, plan, share);
    return cudaGetLastError();
  };
  if constexpr (sizeof(T) < 8) switch (wgrad_exact_taps(params)) {
      case 3: return launch(Int<3>{});
      case 5: return launch(Int<5>{});
      case 7: return launch(Int<7>{});
      case 9: return launch(Int<9>{});
      default: break;
    }
  return launch(Int<0>{});
}

}  // namespace convmixer_fast::cuda
