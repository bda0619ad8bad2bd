// Depthwise convolution on CUDA cores: any kernel size, map, strides and dtype.
//
// A block owns `slots` consecutive planes (n, c) and a tile of output rows and columns of each. It brings the tile and
// its halo into shared memory, zeros where the padding is and the prologue applied, and each thread computes a strip of
// 2 x 8 outputs in registers: 16 sums, a window of 8 + kTaps - 1 inputs and kTaps weights feed 16 kTaps FMAs.
// Large kernels go tap block by tap block, so that shared memory stays bounded; the block that holds the central tap
// comes last and leaves z in shared memory for the residual.
#pragma once
#include "../../common/access_vector.cuh"
#include "../../common/activation.cuh"
#include "../../common/launch.h"
#include "../../common/shared_memory.h"
#include "plan.h"

namespace convmixer_fast::cuda {

template <class T_, bool kChannelsLast_, int kTaps_>
struct DirectTraits {
  using T = T_;
  using Real = arithmetic_t<T>;
  static constexpr bool kChannelsLast = kChannelsLast_;              // lanes run over channels, not along a row
  static constexpr bool kGuarded = kTaps_ == 0;                      // any kernel width, in blocks of 8 tap columns
  static constexpr int kTaps = kGuarded ? kDirectTapBlock : kTaps_;  // tap columns held in registers
  static constexpr int kStripH = kDirectStripH, kStripW = kDirectStripW;
  static constexpr int kWindow = kStripW + kTaps - 1;
  static constexpr int kWindowPitch = (kWindow + 7) / 8 * 8;  // read 8 at a time along rows
  static_assert(!kGuarded || kTaps % 8 == 0, "windows of later tap columns start on 16 bytes, too");
  static constexpr int kMaxThreads = kDirectMaxThreads;
  static constexpr int kMinBlocks = sizeof(T) == 8 ? 1 : 2;  // 128 registers a thread hold strip, window and taps
};

// z of one plane: x, or the prologue of x; zero outside the map, and for a plane beyond the last.
template <class T>
class PlaneReader {
 public:
  __device__ PlaneReader(const DepthwiseParams& params, int64_t plane)
      : params_(params),
        exists_(plane < params.batch * params.channels),
        channel_(exists_ ? plane % params.channels : 0),
        x_(static_cast<const T*>(params.x) + (exists_ ? plane / params.channels : 0) * params.x_stride.n +
           channel_ * params.x_stride.c),
        prologue_(params.prologue, channel_) {}

  __device__ __forceinline__ T at(int64_t h, int64_t w) const {
    if (!exists_ || h < 0 || h >= params_.height || w < 0 || w >= params_.width) return narrow<T>(0);
    const T value = x_[h * params_.x_stride.h + w * params_.x_stride.w];
    return params_.has_prologue ? narrow<T>(prologue_(widen(value))) : value;
  }

 private:
  const DepthwiseParams& params_;
  bool exists_;
  int64_t channel_;
  const T* x_;
  Pointwise<T> prologue_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    depthwise_direct_kernel(const __grid_constant__ DepthwiseParams params, const __grid_constant__ DirectTile tile) {
  using T = typename Traits::T;
  using Real = typename Traits::Real;
  constexpr int kTaps = Traits::kTaps, kStripH = Traits::kStripH, kStripW = Traits::kStripW;
  extern __shared__ __align__(16) unsigned char smem[];
  T* const inputs = reinterpret_cast<T*>(smem);
  Real* const weights = reinterpret_cast<Real*>(smem + tile.input_bytes(sizeof(T)));

  const int64_t planes = params.batch * params.channels;
  const int taps = tile.tap_rows * tile.tap_cols;  // pitch of one slot's weights
  const auto plane_of = [&](int64_t group, int slot) { return group * tile.slots + slot; };
  const auto weight_at = [&](int slot, int row, int col) -> Real& {
    const int tap = row * tile.tap_cols + col;
    return weights[Traits::kChannelsLast ? tap * tile.slots + slot : slot * taps + tap];
  };

  // The strip of this thread.
  const int strips = tile.strips(), strips_a_slot = strips * tile.strip_rows();
  const int slot = Traits::kChannelsLast ? threadIdx.x % tile.slots : threadIdx.x / strips_a_slot;
  const int strip = Traits::kChannelsLast ? threadIdx.x / tile.slots : threadIdx.x % strips_a_slot;
  const int strip_row = strip / strips * kStripH, strip_col = strip % strips * kStripW;
  const bool has_strip = slot < tile.slots && strip < strips_a_slot;

  const int tap_blocks_h = (tile.taps_h + tile.tap_rows - 1) / tile.tap_rows;
  const int tap_blocks_w = (tile.taps_w + tile.tap_cols - 1) / tile.tap_cols;
  const int tap_blocks = tap_blocks_h * tap_blocks_w;
  const int central_block = (static_cast<int>(params.pad_top) - tile.first_tap_row) / tile.tap_rows * tap_blocks_w +
                            (static_cast<int>(params.pad_left) - tile.first_tap_col) / tile.tap_cols;

  const int64_t tiles = tile.groups * tile.tiles_h * tile.tiles_w;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const int64_t group = index / (tile.tiles_h * tile.tiles_w);
    const int tile_index = static_cast<int>(index % (tile.tiles_h * tile.tiles_w));
    const int64_t tile_row = static_cast<int64_t>(tile_index / tile.tiles_w) * tile.height;
    const int64_t tile_col = static_cast<int64_t>(tile_index % tile.tiles_w) * tile.width;

    Real sums[kStripH][kStripW] = {};
    int64_t origin_row = 0, origin_col = 0;  // of the shared tile in the map
    int tap_row0 = 0, tap_col0 = 0;          // of the tap block in the kernel

    const auto fill_inputs = [&] {
      if constexpr (Traits::kChannelsLast) {
        const int lane = threadIdx.x % tile.slots;
        const PlaneReader<T> z(params, plane_of(group, lane));
        for (int pixel = threadIdx.x / tile.slots; pixel < tile.in_rows * tile.in_cols;
             pixel += tile.threads / tile.slots)
          inputs[pixel * tile.slots + lane] =
              z.at(origin_row + pixel / tile.in_cols, origin_col + pixel % tile.in_cols);
      } else {
        const int lane = threadIdx.x % tile.fill_lanes;
        for (int s = 0; s < tile.slots; s++) {
          const PlaneReader<T> z(params, plane_of(group, s));
          for (int row = threadIdx.x / tile.fill_lanes; row < tile.in_rows; row += tile.threads / tile.fill_lanes)
            for (int col = lane; col < tile.in_cols; col += tile.fill_lanes)
              inputs[s * tile.slot_stride + row * tile.row_stride + col] = z.at(origin_row + row, origin_col + col);
        }
      }
    };

    const auto fill_weights = [&] {
      const T* const w = static_cast<const T*>(params.weight);
      for (int i = threadIdx.x; i < tile.slots * taps; i += tile.threads) {
        const int s = i / taps, row = i % taps / tile.tap_cols, col = i % tile.tap_cols;
        const int64_t plane = plane_of(group, s);
        const int tap_row = tap_row0 + row, tap_col = tap_col0 + col;
        Real tap = 0;
        if (plane < planes && tap_row < params.kernel_h && tap_col < params.kernel_w) {
          const int64_t kernel = params.kernel_h * params.kernel_w, index = tap_row * params.kernel_w + tap_col;
          tap = widen(w[plane % params.channels * kernel + (params.flip_taps ? kernel - 1 - index : index)]);
        }
        weight_at(s, row, col) = tap;
      }
    };

    // Tap column block by tap column block; within it every input row feeds both output rows of the strip.
    const auto accumulate = [&] {
      const int rows = min(tile.tap_rows, tile.first_tap_row + tile.taps_h - tap_row0);
      const int cols = min(tile.tap_cols, tile.first_tap_col + tile.taps_w - tap_col0);
      for (int dx = 0; dx < cols; dx += kTaps) {
        Real taps_above[kTaps], taps_here[kTaps];
        for (int dy = 0; dy <= rows; dy++) {
          const T* const line = inputs + slot * tile.slot_stride + (strip_row + dy) * tile.row_stride +
                                (strip_col + dx) * tile.col_stride;
          Real window[Traits::kWindowPitch];
          if constexpr (Traits::kChannelsLast) {
#pragma unroll
            for (int i = 0; i < Traits::kWindow; i++) window[i] = widen(line[i * tile.col_stride]);
          } else {
            load_window(window, line);
          }
#pragma unroll
          for (int j = 0; j < kTaps; j++) {
            taps_above[j] = taps_here[j];
            if (dy < rows && (!Traits::kGuarded || dx + j < cols)) taps_here[j] = weight_at(slot, dy, dx + j);
          }
#pragma unroll
          for (int i = 0; i < kStripH; i++) {
            if (i == 0 ? dy == rows : dy == 0) continue;
            const Real(&taps)[kTaps] = i == 0 ? taps_here : taps_above;
            Real row_sums[kStripW];  // joins the rest at once: less is rounded away
#pragma unroll
            for (int j = 0; j < kTaps; j++) {
              if (Traits::kGuarded && dx + j >= cols) break;
#pragma unroll
              for (int k = 0; k < kStripW; k++)
                row_sums[k] = j == 0 ? taps[j] * window[k] : row_sums[k] + taps[j] * window[j + k];
            }
#pragma unroll
            for (int k = 0; k < kStripW; k++) sums[i][k] += row_sums[k];
          }
        }
      }
    };

    const auto write_outputs = [&] {
      const int64_t plane = plane_of(group, slot);
      if (!has_strip || plane >= planes) return;
      const int64_t n = plane / params.channels, c = plane % params.channels;
      const Pointwise<T> epilogue(params.epilogue, c);
      const int centre_row = static_cast<int>(tile_row - origin_row);
      const int centre_col = static_cast<int>(tile_col - origin_col);
      for (int i = 0; i < kStripH; i++) {
        const int64_t h = tile_row + strip_row + i, w0 = tile_col + strip_col;
        if (strip_row + i >= tile.height || h >= params.height) return;
        const T* const z = inputs + slot * tile.slot_stride + (centre_row + strip_row + i) * tile.row_stride +
                           (centre_col + strip_col) * tile.col_stride;
        const int count =
            static_cast<int>(min(static_cast<int64_t>(min(kStripW, tile.width - strip_col)), params.width - w0));
        __align__(16) T out[kStripW];
#pragma unroll
        for (int j = 0; j < kStripW; j++) {
          const Real v = epilogue(i == 0 ? sums[0][j] : sums[1][j]);
          out[j] = narrow<T>(params.residual && j < count ? v + widen(z[j * tile.col_stride]) : v);
        }
        T* const y = static_cast<T*>(params.y) + n * params.y_stride.n + c * params.y_stride.c + h * params.y_stride.h +
                     w0 * params.y_stride.w;
        if (!Traits::kChannelsLast && count == kStripW && params.y_stride.w == 1 &&
            reinterpret_cast<uintptr_t>(y) % 16 == 0) {
#pragma unroll
          for (int j = 0; j < kStripW * static_cast<int>(sizeof(T)) / 16; j++)
            reinterpret_cast<uint4*>(y)[j] = reinterpret_cast<const uint4*>(out)[j];
        } else {
#pragma unroll
          for (int j = 0; j < kStripW; j++)
            if (j < count) y[j * params.y_stride.w] = out[j];
        }
      }
    };

    for (int b = 1; b <= tap_blocks; b++) {
      const int block = (central_block + b) % tap_blocks;
      tap_row0 = tile.first_tap_row + block / tap_blocks_w * tile.tap_rows;
      tap_col0 = tile.first_tap_col + block % tap_blocks_w * tile.tap_cols;
      origin_row = tile_row + tap_row0 - params.pad_top;
      origin_col = tile_col + tap_col0 - params.pad_left;
      __syncthreads();  // the previous tap block or tile is no longer read
      fill_inputs();
      fill_weights();
      __syncthreads();
      if (has_strip) accumulate();
    }
    write_outputs();
  }
}

template <class Traits>
cudaError_t launch_direct(const DepthwiseParams& params, const DirectTile& tile, cudaStream_t stream) {
  constexpr auto kernel = depthwise_direct_kernel<Traits>;
  if (const cudaError_t status = prepare_shared_memory<kernel>(); status != cudaSuccess) return status;
  const int64_t tiles = tile.groups * tile.tiles_h * tile.tiles_w;
  const int blocks = static_cast<int>(std::min<int64_t>(tiles, 1 << 30));
  const int smem = tile.smem_bytes(sizeof(typename Traits::T), sizeof(typename Traits::Real));
  kernel<<<blocks, tile.threads, smem, stream>>>(params, tile);
  return cudaGetLastError();
}

// One dtype, both layouts; instantiated in depthwise_direct_<dtype>.cu, so that they compile side by side.
template <class T>
cudaError_t depthwise_direct(const DepthwiseParams& params, cudaStream_t stream) {
  const DirectTile tile = choose_direct_tile(params);
  if (tile.threads == 0) return cudaErrorInvalidConfiguration;
  const auto with_taps = [&](auto taps) {
    constexpr int kTaps = decltype(taps)::value;
    if (direct_is_channels_last(params)) return launch_direct<DirectTraits<T, true, kTaps>>(params, tile, stream);
    return launch_direct<DirectTraits<T, false, kTaps>>(params, tile, stream);
  };
  if constexpr (std::is_same_v<T, float>) switch (direct_exact_taps(params)) {
      case 3: return with_taps(std::integral_constant<int, 3>{});
      case 5: return with_taps(std::integral_constant<int, 5>{});
      case 7: return with_taps(std::integral_constant<int, 7>{});
      case 9: return with_taps(std::integral_constant<int, 9>{});
      default: break;
    }
  return with_taps(std::integral_constant<int, 0>{});
}

}  // namespace convmixer_fast::cuda
