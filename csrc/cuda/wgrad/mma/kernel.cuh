// Gradient of a depthwise convolution's weight and bias on tensor cores: float16 and bfloat16, contiguous rows, sm_80
// and up. One pass over x and gy.
//
// The units are those of the forward pass: 8 x 8 elements of gy, and the x that their taps reach. For each tap row dy
//
//   D_dy[i][j] = sum over units and their rows o of  x[unit, o + dy, i] * gy[unit, o, j]   (i: a window's stored
//   columns)
//
// and the gradient of tap dx is the sum of D_dy along a diagonal, dx = i - j - lead. So 16 units are the K of an mma:
// row o + dy of all of them is the A operand, transposed by ldmatrix, row o of gy the B operand. An A operand, loaded
// once, serves every row of gy that reaches it. The D_dy stay in registers, 4 a lane and tap row, for as long as the
// block stays in a channel; the diagonals are then summed through shared memory and leave as one partial
// (wgrad/share.h). The sum of gy is one more product, with ones.
//
// A warp has all tap rows of kernels 3, 5, 7 and 9 high and up to 9 wide. Of any other kernel it has a group of 8 tap
// rows by 16 stored columns, and the warps of a block divide the groups; 16 groups are one pass.
//
// Each tap has products of its own: an element that is not finite spoils the taps that meet it, and those that meet the
// padding there (0 times Inf), no others.
#pragma once
#include <climits>

#include "../../common/access_vector.cuh"
#include "../../common/launch.h"
#include "../../common/ptx.cuh"
#include "../../common/shared_memory.h"
#include "../../depthwise/mma/work_tile.cuh"
#include "../plan.h"

namespace convmixer_fast::cuda {

template <class T_, int kTapRows_>
struct WgradTraits {
  using T = T_;
  static constexpr bool kFixed = kTapRows_ > 0;
  static constexpr int kTapRows = kFixed ? kTapRows_ : kWgradRows;
  static constexpr int kMaxThreads = 32 * (kFixed ? kWgradFixedWarps : kWgradMaxWarps);
  static constexpr int kMinBlocks = 32 * kWgradMaxWarps / kMaxThreads;  // 128 registers, 64 KB prefetched an SM
  static_assert(kTapRows <= 9, "a unit's rows and its taps lie in two bands; 36 sums");
  static constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;  // a pair
};

// Where one lane finds the 16 units of a group: the shared addresses that it hands to ldmatrix.
struct WgradUnits {
  uint32_t x, gy;

  __device__ WgradUnits(const WgradTile& tile, int group, int row_group, int k_step, uint32_t x_tile,
                        uint32_t gy_tile) {
    const int lane = threadIdx.x % 32, units_an_image = tile.bands * tile.windows;
    const auto place = [&](const WgradOperand& operand, int unit, int first_row_group) {
      if (unit >= tile.units) return operand.zero_unit;
      const int image = unit / units_an_image, band = unit % units_an_image / tile.windows + first_row_group;
      return image * operand.image_pitch + band * (kUnit * operand.pitch + operand.band_gap) +
             unit % tile.windows * kUnit;
    };
    // x: matrices (units 0-7, columns 0-7), (units 0-7, columns 8-15), then units 8-15.
    const int x_unit = group * kGroupUnits + lane / 16 * 8 + lane % 8;
    const int col = (x_unit < tile.units ? k_step * kMmaDepth : 0) + lane / 8 % 2 * 8;
    x = x_tile + 2 * (place(tile.x, x_unit, row_group) + col);
    // gy: matrices (row 0, units 0-7), (row 0, units 8-15), then row 1.
    gy = gy_tile + 2 * (place(tile.gy, group * kGroupUnits + lane % 16, 0) + lane / 16 * tile.gy.pitch);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    depthwise_wgrad_mma_kernel(const __grid_constant__ WgradParams params, const __grid_constant__ WgradTile tile,
                               const __grid_constant__ WgradShare share) {
#if __CUDA_ARCH__ >= 800
  using T = typename Traits::T;
  constexpr int kTapRows = Traits::kTapRows;
  extern __shared__ __align__(128) unsigned char smem[];
  T* const x_tile = reinterpret_cast<T*>(smem);
  T* const gy_tile = x_tile + tile.x.elements;
  float* const diagonals = reinterpret_cast<float*>(gy_tile + tile.gy.elements);  // of each warp's tap rows
  float* const scratch = diagonals + tile.warps * kTapRows * kWgradDiagonals;     // one product of each warp
  const int threads = 32 * tile.warps, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int height = static_cast<int>(params.height), width = static_cast<int>(params.width);
  const int kernel_h = static_cast<int>(params.kernel_h), kernel_w = static_cast<int>(params.kernel_w);
  const int x_pitch = Traits::kFixed ? kFixedPitch : tile.x.pitch;
  const int gy_pitch = Traits::kFixed ? kFixedOutPitch : tile.gy.pitch;

  // The taps of this warp.
  const int split = Traits::kFixed ? warp : warp / tile.tap_groups();
  const int tap_group = Traits::kFixed ? 0 : warp % tile.tap_groups();
  const int first_row_group = Traits::kFixed ? 0 : blockIdx.y * tile.row_groups;  // of this pass
  const int row_group = first_row_group + tap_group / tile.k_steps, k_step = tap_group % tile.k_steps;
  const bool sums_gy = params.gbias != nullptr && row_group == 0 && k_step == 0;

  const int first = static_cast<int>(share.first_item(blockIdx.x));
  const int count = static_cast<int>(share.first_item(blockIdx.x + 1)) - first;
  MmaItem item{first / tile.items_a_channel, first % tile.items_a_channel};

  const auto stored = [&](const WgradOperand& operand, int image, int row, int col) {  // row and col of the map or tile
    row += operand.top, col += operand.left;
    return image * operand.image_pitch + row * operand.pitch + row / kUnit * operand.band_gap + col;
  };
  const auto source = [&](const void* tensor, const Strides& stride, const MmaItem& item, const MmaPlace& place) {
    return static_cast<const T*>(tensor) + item.channel * stride.c + place.image * stride.n;
  };

  // What a thread moves of a prefetched item, at equal distances.
  const int my_row = thread / tile.load_lanes, my_col = thread % tile.load_lanes * 8;
  const int my_image = my_row / height, my_image_row = my_row % height;
  const auto my_load = [&](const Strides& stride) {
    return static_cast<int>(my_image * stride.n + my_image_row * stride.h + my_col);
  };
  const int my_x = my_load(params.x_stride), my_gy = my_load(params.gy_stride);
  const uint32_t my_stored_x = shared_address(x_tile + stored(tile.x, my_image, my_image_row, my_col));
  const uint32_t my_stored_gy = shared_address(gy_tile + stored(tile.gy, my_image, my_image_row, my_col));
  const int my_first_row = my_col < width ? my_row : INT_MAX - kPrefetch * tile.rows_a_step;
  const auto has_piece = [&](int images, int step) { return my_first_row + step * tile.rows_a_step < images * height; };

  uint4 next_x[kPrefetch], next_gy[kPrefetch];
  const auto prefetch = [&](const MmaItem& item) {
    const MmaPlace place(params, tile, item.index);
    const T* const x = source(params.x, params.x_stride, item, place) + my_x;
    const T* const gy = source(params.gy, params.gy_stride, item, place) + my_gy;
#pragma unroll
    for (int step = 0; step < kPrefetch; step++) {
      const bool exists = has_piece(place.images, step);  // zeros in place of images beyond the last
      next_x[step] = next_gy[step] = make_uint4(0, 0, 0, 0);
      if (exists) {
        next_x[step] = __ldg(reinterpret_cast<const uint4*>(x + step * tile.x.load_step));
        next_gy[step] = __ldg(reinterpret_cast<const uint4*>(gy + step * tile.gy.load_step));
      }
    }
  };

  const auto write_prefetched = [&] {
#pragma unroll
    for (int step = 0; step < kPrefetch; step++)
      if (has_piece(tile.images, step)) {
        const uint32_t x = my_stored_x + step * 2 * tile.x.store_step;
        store_shared(x, make_uint2(next_x[step].x, next_x[step].y));  // the border left of the map is 8 bytes wide
        store_shared(x + 8, make_uint2(next_x[step].z, next_x[step].w));
        store_shared(my_stored_gy + step * 2 * tile.gy.store_step, next_gy[step]);
      }
  };

  // Any map: row by row; of a tile with its halo, zeros where that leaves the map; zeros for images beyond the last.
  const auto write_rows = [&](const void* tensor, const Strides& stride, const WgradOperand& operand, T* to) {
    const MmaPlace place(params, tile, item.index);
    const T* const from = source(tensor, stride, item, place);
    const int first_row = tile.tiled ? -operand.top : 0, first_col = tile.tiled ? -operand.left : 0;
    with_vector<false>(tile.load_vector, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      for (int line = thread / tile.load_lanes; line < tile.images * operand.rows; line += tile.rows_a_step) {
        const int image = line / operand.rows, row = first_row + line % operand.rows, map_row = place.row + row;
        for (int i = thread % tile.load_lanes * kVector; i < operand.cols; i += tile.load_lanes * kVector) {
          const int col = first_col + i, map_col = place.col + col;
          const bool inside =
              image < place.images && map_row >= 0 && map_row < height && map_col >= 0 && map_col < width;
          Piece<kVector> piece{};
          if (inside) piece = load_global<kVector>(from + image * stride.n + map_row * stride.h + map_col);
          store_inputs(to + stored(operand, image, row, col), piece);
        }
      }
    });
  };

  float sums[kTapRows][4], gy_sums[4];
  const auto clear = [&] {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      gy_sums[i] = 0;
#pragma unroll
      for (int dy = 0; dy < kTapRows; dy++) sums[dy][i] = 0;
    }
  };

  const auto accumulate = [&](const WgradUnits& units) {
    uint32_t gy[kUnit][2];
    const uint32_t next_band = units.x + 2 * tile.x.band_gap;
#pragma unroll
    for (int row = 0; row < kUnit + kTapRows - 1; row++) {
      if (row < kUnit && row % 2 == 0) {
        uint32_t two_rows[4];
        ldmatrix_x4_trans(two_rows, units.gy + 2 * row * gy_pitch);
#pragma unroll
        for (int i = 0; i < 4; i++) gy[row + i / 2][i % 2] = two_rows[i];
      }
      uint32_t x[4];
      ldmatrix_x4_trans(x, (row < kUnit ? units.x : next_band) + 2 * row * x_pitch);
#pragma unroll
      for (int o = 0; o < kUnit; o++)
        if (row - o >= 0 && row - o < kTapRows) mma_m16n8k16<T>(sums[row - o], x, gy[o], sums[row - o]);
    }
    if (sums_gy) {
      const uint32_t ones[4] = {Traits::kOnes, Traits::kOnes, Traits::kOnes, Traits::kOnes};
#pragma unroll
      for (int o = 0; o < kUnit; o++) mma_m16n8k16<T>(gy_sums, ones, gy[o], gy_sums);
    }
  };

  // The sums of the channel, along the diagonals, to the workspace.
  const auto write_partial = [&] {
    float* const product = scratch + warp * kMmaDepth * kWgradScratchPitch;
    float* const mine = diagonals + warp * kTapRows * kWgradDiagonals;
#pragma unroll
    for (int dy = 0; dy < kTapRows; dy++) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        product[(lane / 4 + i / 2 * 8) * kWgradScratchPitch + lane % 4 * 2 + i % 2] = sums[dy][i];
      __syncthreads();
      if (lane < kWgradDiagonals - 1) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kUnit; j++) {
          const int i = lane - (kUnit - 1) + j;
          if (i >= 0 && i < kMmaDepth) sum += product[i * kWgradScratchPitch + j];
        }
        mine[dy * kWgradDiagonals + lane] = sum;
      }
      __syncthreads();
    }
    float gy_sum = gy_sums[0] + gy_sums[1];  // all 16 rows are alike
    for (int i = 1; i < 4; i *= 2) gy_sum += __shfl_xor_sync(0xffffffff, gy_sum, i);
    if (lane == 0) mine[kWgradDiagonals - 1] = gy_sum;
    __syncthreads();

    float* const partial = static_cast<float*>(params.workspace) + share.partial(blockIdx.x, item.channel, 0);
    const int first_tap = first_row_group * kTapRows * kernel_w;
    const int taps = min(kernel_h - first_row_group * kTapRows, tile.row_groups * kTapRows) * kernel_w;
    for (int tap = thread; tap < taps; tap += threads) {
      const int dy = tap / kernel_w, diagonal = tap % kernel_w + tile.lead + kUnit - 1;
      float sum = 0;
      for (int split = 0; split < tile.splits; split++)
        for (int step = 0; step < tile.k_steps; step++) {
          const int from = (split * tile.row_groups + dy / kTapRows) * tile.k_steps + step;
          const int at = diagonal - step * kMmaDepth;
          if (at >= 0 && at < kWgradDiagonals - 1)
            sum += diagonals[(from * kTapRows + dy % kTapRows) * kWgradDiagonals + at];
        }
      partial[first_tap + tap] = sum;
    }
    if (thread == 0 && first_row_group == 0) {
      float sum = 0;
      for (int split = 0; split < tile.splits; split++)
        sum += diagonals[split * tile.tap_groups() * kTapRows * kWgradDiagonals + kWgradDiagonals - 1];
      partial[kernel_h * kernel_w] = sum;
    }
  };

  // The implicit padding, once: nothing below writes there, but for tiles, which bring their own zeros.
  for (int i = thread; i < (tile.x.elements + tile.gy.elements) / 8; i += threads)
    reinterpret_cast<uint4*>(smem)[i] = make_uint4(0, 0, 0, 0);
  if (tile.prefetch) prefetch(item);

  const auto units_of = [&](int group) {
    return WgradUnits(tile, group, row_group, k_step, shared_address(x_tile), shared_address(gy_tile));
  };
  WgradUnits units = units_of(split);
  clear();
  __syncthreads();
  for (int remaining = count; remaining > 0; remaining--) {
    if (tile.prefetch) {
      write_prefetched();
    } else {
      write_rows(params.x, params.x_stride, tile.x, x_tile);
      write_rows(params.gy, params.gy_stride, tile.gy, gy_tile);
    }
    __syncthreads();

    const MmaItem following = item.following(tile, 1);
    if (tile.prefetch && remaining > 1) prefetch(following);
    for (int group = split; group < tile.groups; group += tile.splits) {
      if (tile.groups > tile.splits) units = units_of(group);
      accumulate(units);
    }
    if (following.index == 0 || remaining == 1) {
      write_partial();
      clear();
    }
    item = following;
    __syncthreads();
  }
#else
  __trap();  // compiled for an older GPU: plan_wgrad does not choose this kernel there
#endif
}

// Instantiated in depthwise_wgrad_mma_<dtype>.cu, so that they compile side by side.
template <class T>
cudaError_t depthwise_wgrad_mma(const WgradParams& params, const WgradPlan& plan, cudaStream_t stream) {
  const auto launch = [&](auto tap_rows) {
    constexpr auto kernel = depthwise_wgrad_mma_kernel<WgradTraits<T, decltype(tap_rows)::value>>;
    if (const cudaError_t status = prepare_shared_memory<kernel>(); status != cudaSuccess) return status;
    const dim3 grid(plan.share.blocks, plan.mma.passes);
    kernel<<<grid, 32 * plan.mma.warps, plan.smem_bytes, stream>>>(params, plan.mma, plan.share);
    return cudaGetLastError();
  };
  if (!plan.mma.fixed) return launch(Int<0>{});
  switch (plan.mma.tap_rows) {
    case 3: return launch(Int<3>{});
    case 5: return launch(Int<5>{});
    case 7: return launch(Int<7>{});
    default: return launch(Int<9>{});
  }
}

}  // namespace convmixer_fast::cuda
