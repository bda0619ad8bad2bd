// Depthwise convolution on CUDA cores: any kernel size, map, strides and dtype.
//
// A CTA owns `slots` consecutive maps (n, c) and a tile of output rows and columns of each. It brings the tile and its
// halo into shared memory, zeros where the padding is and the prologue applied, and each thread computes a strip of
// 2 x 8 outputs in registers: 16 accumulators, a window of 8 + kTaps - 1 inputs and kTaps weights feed 16 kTaps FMAs.
// Large kernels go tap block by tap block, so that shared memory stays bounded; the tap block that holds the central
// tap comes last and leaves z in shared memory for the residual.
//
// Terms: docs/glossary.md.
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
  static constexpr bool kGuarded = kTaps_ == 0;                      // any kernel width, 8 tap columns at a time
  static constexpr int kTaps = kGuarded ? kDirectTapBlock : kTaps_;  // tap columns held in registers
  static constexpr int kStripH = kDirectStripH;
  static constexpr int kStripW = kDirectStripW;
  static constexpr int kWindow = kStripW + kTaps - 1;
  static constexpr int kWindowPitch = (kWindow + 7) / 8 * 8;  // read 8 at a time along rows
  static_assert(!kGuarded || kTaps % 8 == 0, "windows of later tap columns start on 16 bytes, too");
  static constexpr LaunchBounds kBounds = direct_launch_bounds(sizeof(T));
};

// Reads z of one map: x, or the prologue of x; zero outside the map, and for a map beyond the last.
template <class T>
class MapReader {
 public:
  __device__ MapReader(const DepthwiseParams& params, int64_t map)
      : params_(params),
        exists_(map < params.batch * params.channels),
        channel_(exists_ ? map % params.channels : 0),
        x_(static_cast<const T*>(params.x) + (exists_ ? map / params.channels : 0) * params.x_stride.n +
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
  Elementwise<T> prologue_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kBounds.threads, Traits::kBounds.min_ctas)
    depthwise_direct_kernel(const __grid_constant__ DepthwiseParams params, const __grid_constant__ DirectPlan plan) {
  using T = typename Traits::T;
  using Real = typename Traits::Real;
  constexpr int kTaps = Traits::kTaps;
  constexpr int kStripH = Traits::kStripH;
  constexpr int kStripW = Traits::kStripW;
  extern __shared__ __align__(16) unsigned char smem[];
  T* const inputs = reinterpret_cast<T*>(smem);
  Real* const weights = reinterpret_cast<Real*>(smem + plan.input_bytes(sizeof(T)));

  const int64_t maps = params.batch * params.channels;
  const int taps = plan.tap_rows * plan.tap_cols;  // taps of one slot in shared memory
  const auto map_of = [&](int64_t map_block, int slot) { return map_block * plan.slots + slot; };
  const auto weight_at = [&](int slot, int row, int col) -> Real& {
    const int tap = row * plan.tap_cols + col;
    return weights[Traits::kChannelsLast ? tap * plan.slots + slot : slot * taps + tap];
  };

  // The strip that this thread computes.
  const int strips = plan.strips();
  const int strips_per_slot = strips * plan.strip_rows();
  const int slot = Traits::kChannelsLast ? threadIdx.x % plan.slots : threadIdx.x / strips_per_slot;
  const int strip = Traits::kChannelsLast ? threadIdx.x / plan.slots : threadIdx.x % strips_per_slot;
  const int strip_row = strip / strips * kStripH;
  const int strip_col = strip % strips * kStripW;
  const bool has_strip = slot < plan.slots && strip < strips_per_slot;

  const int tap_blocks_h = (plan.taps_h + plan.tap_rows - 1) / plan.tap_rows;
  const int tap_blocks_w = (plan.taps_w + plan.tap_cols - 1) / plan.tap_cols;
  const int tap_blocks = tap_blocks_h * tap_blocks_w;
  const int central_tap_block = (static_cast<int>(params.pad_top) - plan.first_tap_row) / plan.tap_rows * tap_blocks_w +
                                (static_cast<int>(params.pad_left) - plan.first_tap_col) / plan.tap_cols;

  const int64_t tiles = plan.map_blocks * plan.tiles_h * plan.tiles_w;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const int64_t map_block = index / (plan.tiles_h * plan.tiles_w);
    const int tile_index = static_cast<int>(index % (plan.tiles_h * plan.tiles_w));
    const int64_t tile_row = static_cast<int64_t>(tile_index / plan.tiles_w) * plan.height;
    const int64_t tile_col = static_cast<int64_t>(tile_index % plan.tiles_w) * plan.width;

    Real acc[kStripH][kStripW] = {};
    int64_t origin_row = 0;  // map row of the first stored row
    int64_t origin_col = 0;  // map column of the first stored column
    int tap_row0 = 0;        // first tap row of the tap block
    int tap_col0 = 0;        // first tap column of the tap block

    const auto fill_inputs = [&] {
      if constexpr (Traits::kChannelsLast) {
        const int lane = threadIdx.x % plan.slots;
        const MapReader<T> z(params, map_of(map_block, lane));
        for (int pixel = threadIdx.x / plan.slots; pixel < plan.in_rows * plan.in_cols;
             pixel += plan.threads / plan.slots)
          inputs[pixel * plan.slots + lane] =
              z.at(origin_row + pixel / plan.in_cols, origin_col + pixel % plan.in_cols);
      } else {
        const int lane = threadIdx.x % plan.fill_lanes;
        for (int s = 0; s < plan.slots; s++) {
          const MapReader<T> z(params, map_of(map_block, s));
          for (int row = threadIdx.x / plan.fill_lanes; row < plan.in_rows; row += plan.threads / plan.fill_lanes)
            for (int col = lane; col < plan.in_cols; col += plan.fill_lanes)
              inputs[s * plan.slot_stride + row * plan.row_stride + col] = z.at(origin_row + row, origin_col + col);
        }
      }
    };

    const auto fill_weights = [&] {
      const T* const w = static_cast<const T*>(params.weight);
      for (int i = threadIdx.x; i < plan.slots * taps; i += plan.threads) {
        const int s = i / taps;
        const int row = i % taps / plan.tap_cols;
        const int col = i % plan.tap_cols;
        const int64_t map = map_of(map_block, s);
        const int tap_row = tap_row0 + row;
        const int tap_col = tap_col0 + col;
        Real tap = 0;
        if (map < maps && tap_row < params.kernel_h && tap_col < params.kernel_w) {
          const int64_t kernel = params.kernel_h * params.kernel_w;
          const int64_t index = tap_row * params.kernel_w + tap_col;
          tap = widen(w[map % params.channels * kernel + (params.flip_taps ? kernel - 1 - index : index)]);
        }
        weight_at(s, row, col) = tap;
      }
    };

    // Takes kTaps tap columns at a time; every input row feeds both output rows of the strip.
    const auto accumulate = [&] {
      const int rows = min(plan.tap_rows, plan.first_tap_row + plan.taps_h - tap_row0);
      const int cols = min(plan.tap_cols, plan.first_tap_col + plan.taps_w - tap_col0);
      for (int dx = 0; dx < cols; dx += kTaps) {
        Real taps_above[kTaps];
        Real taps_here[kTaps];
        for (int dy = 0; dy <= rows; dy++) {
          const T* const line = inputs + slot * plan.slot_stride + (strip_row + dy) * plan.row_stride +
                                (strip_col + dx) * plan.col_stride;
          Real window[Traits::kWindowPitch];
          if constexpr (Traits::kChannelsLast) {
#pragma unroll
            for (int i = 0; i < Traits::kWindow; i++) window[i] = widen(line[i * plan.col_stride]);
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
            Real row_acc[kStripW];  // one tap row, before it joins the others: less is rounded away
#pragma unroll
            for (int j = 0; j < kTaps; j++) {
              if (Traits::kGuarded && dx + j >= cols) break;
#pragma unroll
              for (int k = 0; k < kStripW; k++)
                row_acc[k] = j == 0 ? taps[j] * window[k] : row_acc[k] + taps[j] * window[j + k];
            }
#pragma unroll
            for (int k = 0; k < kStripW; k++) acc[i][k] += row_acc[k];
          }
        }
      }
    };

    const auto write_outputs = [&] {
      const int64_t map = map_of(map_block, slot);
      if (!has_strip || map >= maps) return;
      const int64_t n = map / params.channels;
      const int64_t c = map % params.channels;
      const Elementwise<T> epilogue(params.epilogue, c);
      const int centre_row = static_cast<int>(tile_row - origin_row);
      const int centre_col = static_cast<int>(tile_col - origin_col);
      for (int i = 0; i < kStripH; i++) {
        const int64_t h = tile_row + strip_row + i;
        const int64_t w0 = tile_col + strip_col;
        if (strip_row + i >= plan.height || h >= params.height) return;
        const T* const z = inputs + slot * plan.slot_stride + (centre_row + strip_row + i) * plan.row_stride +
                           (centre_col + strip_col) * plan.col_stride;
        const int count =
            static_cast<int>(min(static_cast<int64_t>(min(kStripW, plan.width - strip_col)), params.width - w0));
        __align__(16) T out[kStripW];
#pragma unroll
        for (int j = 0; j < kStripW; j++) {
          const Real v = epilogue(i == 0 ? acc[0][j] : acc[1][j]);
          out[j] = narrow<T>(params.residual && j < count ? v + widen(z[j * plan.col_stride]) : v);
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

    for (int i = 1; i <= tap_blocks; i++) {
      const int tap_block = (central_tap_block + i) % tap_blocks;
      tap_row0 = plan.first_tap_row + tap_block / tap_blocks_w * plan.tap_rows;
      tap_col0 = plan.first_tap_col + tap_block % tap_blocks_w * plan.tap_cols;
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
cudaError_t launch_direct(const DepthwiseParams& params, const DirectPlan& plan, cudaStream_t stream) {
  constexpr auto kernel = depthwise_direct_kernel<Traits>;
  if (const cudaError_t status = prepare_shared_memory<kernel>(); status != cudaSuccess) return status;
  const int ctas = static_cast<int>(std::min<int64_t>(plan.work_tiles(), 1 << 30));
  const int smem = plan.smem_bytes(sizeof(typename Traits::T), sizeof(typename Traits::Real));
  kernel<<<ctas, plan.threads, smem, stream>>>(params, plan);
  return cudaGetLastError();
}

// Picks the instantiation for one dtype, both layouts. Instantiated in instantiations/depthwise_direct_<dtype>.cu,
// which compile side by side.
template <class T>
cudaError_t depthwise_direct(const DepthwiseParams& params, const DirectPlan& plan, cudaStream_t stream) {
  if (plan.threads == 0) return cudaErrorInvalidConfiguration;
  const auto with_taps = [&](auto taps) {
    constexpr int kTaps = decltype(taps)::value;
    if (direct_is_channels_last(params)) return launch_direct<DirectTraits<T, true, kTaps>>(params, plan, stream);
    return launch_direct<DirectTraits<T, false, kTaps>>(params, plan, stream);
  };
  if constexpr (std::is_same_v<T, float>) switch (direct_exact_taps(params)) {
      case 3: return with_taps(Int<3>{});
      case 5: return with_taps(Int<5>{});
      case 7: return with_taps(Int<7>{});
      case 9: return with_taps(Int<9>{});
      default: break;
    }
  return with_taps(Int<0>{});
}

}  // namespace convmixer_fast::cuda
