// Gradient of a depthwise convolution's weight and bias on tensor cores: float16 and bfloat16, contiguous rows, sm_80
// and up. One pass over x and gy.
//
// The subtiles are those of the forward pass: 8 x 8 elements of gy, and the x that their taps reach. For each tap row
// dy
//
//   D_dy[i][j] = sum over subtiles s and their rows o of  x[s][o + dy][i] * gy[s][o][j]
//
// with x[s][r][i] as in depthwise/mma/kernel.cuh, and the gradient of tap dx is the sum of D_dy along a diagonal, dx =
// i - j - lead. So the 16 subtiles of an M block are the K of an mma: row o + dy of all of them is the A operand,
// transposed by ldmatrix, row o of gy the B operand. An A operand, loaded once, serves every row of gy that reaches it.
// The D_dy stay in registers, 4 per lane and tap row, for as long as the CTA stays in a channel; the diagonals are then
// summed through shared memory and leave as one partial (wgrad/share.h). The sum of gy is one more product, with ones.
//
// A warp has all tap rows of kernels 3, 5, 7 and 9 high and up to 9 wide, on maps or tiles up to 32 wide. Otherwise it
// has a tap block of 8 tap rows by 16 stored columns, and the warps of a CTA divide the tap blocks: at most 16 of them,
// in whole rows of tap blocks, are one pass.
//
// Each tap has products of its own: an element that is not finite spoils the taps for which it is multiplied with an
// element of the other tensor, or with a zero that stands for one outside the map (0 times Inf), no others.
//
// Terms: docs/glossary.md.
#pragma once
#include <climits>

#include "../../common/access_vector.cuh"
#include "../../common/launch.h"
#include "../../common/ptx.cuh"
#include "../../common/shared_memory.h"
#include "../../depthwise/mma/work_tile.cuh"
#include "../share.h"
#include "plan.h"

namespace convmixer_fast::cuda {

template <class T_, int kTapRows_>
struct WgradTraits {
  using T = T_;
  static constexpr bool kFixed = kTapRows_ > 0;
  static constexpr int kTapRows = kFixed ? kTapRows_ : kWgradMmaTapRows;
  static constexpr int kMaxThreads = 32 * (kFixed ? kWgradFixedWarps : kWgradMaxWarps);
  static constexpr int kMinBlocks = 32 * kWgradMaxWarps / kMaxThreads;  // 128 registers, 64 KB prefetched per SM
  static_assert(kTapRows <= 9, "a subtile and its taps reach into two subtile rows; 36 accumulators");
  static constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;  // two of them
};

// Where one lane finds the 16 subtiles of an M block: the shared addresses that it hands to ldmatrix.
struct WgradLaneAddresses {
  uint32_t x;
  uint32_t gy;

  __device__ WgradLaneAddresses(const WgradMmaPlan& plan, int m_block, int tap_row_block, int k_step, uint32_t x_tile,
                                uint32_t gy_tile) {
    const int lane = threadIdx.x % 32;
    const int subtiles_per_image = plan.shape.subtile_rows * plan.shape.subtile_cols;
    const auto offset = [&](const WgradOperand& operand, int subtile, int skipped_subtile_rows) {
      if (subtile >= plan.shape.subtiles) return operand.zero_subtile;
      const int image = subtile / subtiles_per_image;
      const int subtile_row = subtile % subtiles_per_image / plan.shape.subtile_cols + skipped_subtile_rows;
      return image * operand.maps.image_pitch + subtile_row * (kSubtile * operand.maps.pitch + operand.maps.gap) +
             subtile % plan.shape.subtile_cols * kSubtile;
    };
    // x: matrices (subtiles 0-7, columns 0-7), (subtiles 0-7, columns 8-15), then subtiles 8-15.
    const int x_subtile = m_block * kSubtilesPerMma + lane / 16 * 8 + lane % 8;
    const int col = (x_subtile < plan.shape.subtiles ? k_step * kMmaK : 0) + lane / 8 % 2 * 8;
    x = x_tile + 2 * (offset(plan.x, x_subtile, tap_row_block) + col);
    // gy: matrices (row 0, subtiles 0-7), (row 0, subtiles 8-15), then row 1.
    gy = gy_tile + 2 * (offset(plan.gy, m_block * kSubtilesPerMma + lane % 16, 0) + lane / 16 * plan.gy.maps.pitch);
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    depthwise_wgrad_mma_kernel(const __grid_constant__ WgradParams params, const __grid_constant__ WgradMmaPlan plan,
                               const __grid_constant__ WgradShare share) {
#if __CUDA_ARCH__ >= 800
  using T = typename Traits::T;
  constexpr int kTapRows = Traits::kTapRows;
  extern __shared__ __align__(128) unsigned char smem[];
  T* const x_tile = reinterpret_cast<T*>(smem);
  T* const gy_tile = x_tile + plan.x.elements;
  float* const diagonals = reinterpret_cast<float*>(gy_tile + plan.gy.elements);  // sums for each warp's tap rows
  float* const scratch = diagonals + plan.warps * kTapRows * kWgradDiagonals;     // one product per warp
  const int threads = 32 * plan.warps;
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int height = static_cast<int>(params.height);
  const int width = static_cast<int>(params.width);
  const int kernel_h = static_cast<int>(params.kernel_h);
  const int kernel_w = static_cast<int>(params.kernel_w);
  const int x_pitch = Traits::kFixed ? kFixedPitch : plan.x.maps.pitch;
  const int gy_pitch = Traits::kFixed ? kFixedOutPitch : plan.gy.maps.pitch;

  // The taps that this warp has.
  const int split = Traits::kFixed ? warp : warp / plan.taps.tap_blocks();
  const int tap_block = Traits::kFixed ? 0 : warp % plan.taps.tap_blocks();
  const int first_tap_row_block = Traits::kFixed ? 0 : blockIdx.y * plan.taps.tap_row_blocks;  // the pass's first
  const int tap_row_block = first_tap_row_block + tap_block / plan.taps.k_steps;
  const int k_step = tap_block % plan.taps.k_steps;
  const bool sums_gy = params.gbias != nullptr && tap_row_block == 0 && k_step == 0;

  const int first = static_cast<int>(share.first_tile(blockIdx.x));
  const int count = static_cast<int>(share.first_tile(blockIdx.x + 1)) - first;
  WorkTile work_tile{first / plan.tiles_per_channel, first % plan.tiles_per_channel};

  // Elements from an operand's first to that of a row and column of the map or tile.
  const auto stored = [&](const WgradOperand& operand, int image, int row, int col) {
    row += operand.top;
    col += operand.left;
    return image * operand.maps.image_pitch + row * operand.maps.pitch + row / kSubtile * operand.maps.gap + col;
  };
  const auto source = [&](const void* tensor, const Strides& stride, const WorkTile& work_tile,
                          const TilePosition& position) {
    return static_cast<const T*>(tensor) + work_tile.channel * stride.c + position.image * stride.n;
  };

  // A thread's share of a prefetched work tile, at equal distances.
  const int loader_row = thread / plan.load_lanes;
  const int loader_col = thread % plan.load_lanes * 8;
  const int loader_image = loader_row / height;
  const int loader_image_row = loader_row % height;
  const auto load_offset = [&](const Strides& stride) {
    return static_cast<int>(loader_image * stride.n + loader_image_row * stride.h + loader_col);
  };
  const int x_offset = load_offset(params.x_stride);
  const int gy_offset = load_offset(params.gy_stride);
  const uint32_t loader_x = shared_address(x_tile + stored(plan.x, loader_image, loader_image_row, loader_col));
  const uint32_t loader_gy = shared_address(gy_tile + stored(plan.gy, loader_image, loader_image_row, loader_col));
  // A thread beyond the width has a first row that no step brings below the number of rows.
  const int first_loaded_row = loader_col < width ? loader_row : INT_MAX - kPrefetch * plan.rows_per_step;
  const auto has_vector = [&](int images, int step) {
    return first_loaded_row + step * plan.rows_per_step < images * height;
  };

  uint4 prefetched_x[kPrefetch];
  uint4 prefetched_gy[kPrefetch];
  const auto prefetch = [&](const WorkTile& work_tile) {
    const TilePosition position(params, plan.shape, work_tile.index);
    const T* const x = source(params.x, params.x_stride, work_tile, position) + x_offset;
    const T* const gy = source(params.gy, params.gy_stride, work_tile, position) + gy_offset;
#pragma unroll
    for (int step = 0; step < kPrefetch; step++) {
      const bool exists = has_vector(position.images, step);  // else zeros, for images beyond the last
      prefetched_x[step] = make_uint4(0, 0, 0, 0);
      prefetched_gy[step] = make_uint4(0, 0, 0, 0);
      if (exists) {
        prefetched_x[step] = __ldg(reinterpret_cast<const uint4*>(x + step * plan.x.load_step));
        prefetched_gy[step] = __ldg(reinterpret_cast<const uint4*>(gy + step * plan.gy.load_step));
      }
    }
  };

  const auto write_prefetched = [&] {
#pragma unroll
    for (int step = 0; step < kPrefetch; step++)
      if (has_vector(plan.shape.images, step)) {
        const uint32_t x = loader_x + step * 2 * plan.x.store_step;
        // 8 bytes at a time, as the border left of the map is 8 bytes wide.
        store_shared(x, make_uint2(prefetched_x[step].x, prefetched_x[step].y));
        store_shared(x + 8, make_uint2(prefetched_x[step].z, prefetched_x[step].w));
        store_shared(loader_gy + step * 2 * plan.gy.store_step, prefetched_gy[step]);
      }
  };

  // Row by row, whatever the map; a tile of x comes with its halo. Zeros beyond the map and for images beyond the last.
  const auto write_rows = [&](const void* tensor, const Strides& stride, const WgradOperand& operand, T* to) {
    const TilePosition position(params, plan.shape, work_tile.index);
    const T* const from = source(tensor, stride, work_tile, position);
    const int first_row = plan.shape.tiled ? -operand.top : 0;
    const int first_col = plan.shape.tiled ? -operand.left : 0;
    with_vector_width<false>(plan.load_vector, [&](auto width_constant) {
      constexpr int kVector = decltype(width_constant)::value;
      for (int line = thread / plan.load_lanes; line < plan.shape.images * operand.rows; line += plan.rows_per_step) {
        const int image = line / operand.rows;
        const int row = first_row + line % operand.rows;
        const int map_row = position.row + row;
        for (int i = thread % plan.load_lanes * kVector; i < operand.cols; i += plan.load_lanes * kVector) {
          const int col = first_col + i;
          const int map_col = position.col + col;
          const bool inside =
              image < position.images && map_row >= 0 && map_row < height && map_col >= 0 && map_col < width;
          AccessVector<kVector> vector{};
          if (inside) vector = load_global<kVector>(from + image * stride.n + map_row * stride.h + map_col);
          store_inputs(to + stored(operand, image, row, col), vector);
        }
      }
    });
  };

  float acc[kTapRows][4];
  float gy_acc[4];
  const auto clear = [&] {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      gy_acc[i] = 0;
#pragma unroll
      for (int dy = 0; dy < kTapRows; dy++) acc[dy][i] = 0;
    }
  };

  const auto accumulate = [&](const WgradLaneAddresses& addresses) {
    uint32_t gy[kSubtile][2];
    const uint32_t next_subtile_row = addresses.x + 2 * plan.x.maps.gap;
#pragma unroll
    for (int row = 0; row < kSubtile + kTapRows - 1; row++) {
      if (row < kSubtile && row % 2 == 0) {
        uint32_t two_rows[4];
        ldmatrix_x4_trans(two_rows, addresses.gy + 2 * row * gy_pitch);
#pragma unroll
        for (int i = 0; i < 4; i++) gy[row + i / 2][i % 2] = two_rows[i];
      }
      uint32_t x[4];
      ldmatrix_x4_trans(x, (row < kSubtile ? addresses.x : next_subtile_row) + 2 * row * x_pitch);
#pragma unroll
      for (int o = 0; o < kSubtile; o++)
        if (row - o >= 0 && row - o < kTapRows) mma_m16n8k16<T>(acc[row - o], x, gy[o], acc[row - o]);
    }
    if (sums_gy) {
      const uint32_t ones[4] = {Traits::kOnes, Traits::kOnes, Traits::kOnes, Traits::kOnes};
#pragma unroll
      for (int o = 0; o < kSubtile; o++) mma_m16n8k16<T>(gy_acc, ones, gy[o], gy_acc);
    }
  };

  // Sums the channel's accumulators along the diagonals, and writes the sums to the workspace.
  const auto write_partial = [&] {
    float* const product = scratch + warp * kMmaK * kWgradScratchPitch;
    float* const mine = diagonals + warp * kTapRows * kWgradDiagonals;
#pragma unroll
    for (int dy = 0; dy < kTapRows; dy++) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        product[(lane / 4 + i / 2 * 8) * kWgradScratchPitch + lane % 4 * 2 + i % 2] = acc[dy][i];
      __syncthreads();
      if (lane < kWgradDiagonals - 1) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kSubtile; j++) {
          const int i = lane - (kSubtile - 1) + j;
          if (i >= 0 && i < kMmaK) sum += product[i * kWgradScratchPitch + j];
        }
        mine[dy * kWgradDiagonals + lane] = sum;
      }
      __syncthreads();
    }
    float gy_sum = gy_acc[0] + gy_acc[1];  // all 16 rows are alike
    for (int i = 1; i < 4; i *= 2) gy_sum += __shfl_xor_sync(0xffffffff, gy_sum, i);
    if (lane == 0) mine[kWgradDiagonals - 1] = gy_sum;
    __syncthreads();

    float* const partial = static_cast<float*>(params.workspace) + share.partial(blockIdx.x, work_tile.channel, 0);
    const int first_tap = first_tap_row_block * kTapRows * kernel_w;
    const int taps = min(kernel_h - first_tap_row_block * kTapRows, plan.taps.tap_row_blocks * kTapRows) * kernel_w;
    for (int tap = thread; tap < taps; tap += threads) {
      const int dy = tap / kernel_w;
      const int diagonal = tap % kernel_w + plan.lead + kSubtile - 1;
      float sum = 0;
      for (int split = 0; split < plan.splits; split++)
        for (int step = 0; step < plan.taps.k_steps; step++) {
          const int tap_block = (split * plan.taps.tap_row_blocks + dy / kTapRows) * plan.taps.k_steps + step;
          const int index = diagonal - step * kMmaK;
          if (index >= 0 && index < kWgradDiagonals - 1)
            sum += diagonals[(tap_block * kTapRows + dy % kTapRows) * kWgradDiagonals + index];
        }
      partial[first_tap + tap] = sum;
    }
    if (thread == 0 && first_tap_row_block == 0) {
      float sum = 0;
      for (int split = 0; split < plan.splits; split++)
        sum += diagonals[split * plan.taps.tap_blocks() * kTapRows * kWgradDiagonals + kWgradDiagonals - 1];
      partial[kernel_h * kernel_w] = sum;
    }
  };

  // Zeros for the implicit padding, once: nothing below writes there, except for tiles, which bring their own zeros.
  for (int i = thread; i < (plan.x.elements + plan.gy.elements) / 8; i += threads)
    reinterpret_cast<uint4*>(smem)[i] = make_uint4(0, 0, 0, 0);
  if (plan.prefetch) prefetch(work_tile);

  const auto addresses_of = [&](int m_block) {
    return WgradLaneAddresses(plan, m_block, tap_row_block, k_step, shared_address(x_tile), shared_address(gy_tile));
  };
  WgradLaneAddresses addresses = addresses_of(split);
  clear();
  __syncthreads();
  for (int remaining = count; remaining > 0; remaining--) {
    if (plan.prefetch) {
      write_prefetched();
    } else {
      write_rows(params.x, params.x_stride, plan.x, x_tile);
      write_rows(params.gy, params.gy_stride, plan.gy, gy_tile);
    }
    __syncthreads();

    const WorkTile following = work_tile.following(plan, 1);
    if (plan.prefetch && remaining > 1) prefetch(following);
    for (int m_block = split; m_block < plan.shape.m_blocks; m_block += plan.splits) {
      if (plan.shape.m_blocks > plan.splits) addresses = addresses_of(m_block);
      accumulate(addresses);
    }
    if (following.index == 0 || remaining == 1) {
      write_partial();
      clear();
    }
    work_tile = following;
    __syncthreads();
  }
#else
  __trap();  // compiled for an older GPU, for which this kernel is not chosen
#endif
}

// Picks the instantiation for one dtype. Instantiated in instantiations/depthwise_wgrad_mma_<dtype>.cu, which compile
// side by side.
template <class T>
cudaError_t depthwise_wgrad_mma(const WgradParams& params, const WgradMmaPlan& plan, const WgradShare& share,
                                cudaStream_t stream) {
  const auto launch = [&](auto tap_rows) {
    constexpr auto kernel = depthwise_wgrad_mma_kernel<WgradTraits<T, decltype(tap_rows)::value>>;
    if (const cudaError_t status = prepare_shared_memory<kernel>(); status != cudaSuccess) return status;
    const dim3 grid(share.ctas, plan.taps.passes);
    kernel<<<grid, 32 * plan.warps, plan.smem_bytes(), stream>>>(params, plan, share);
    return cudaGetLastError();
  };
  if (!plan.taps.fixed) return launch(Int<0>{});
  switch (plan.taps.tap_rows) {
    case 3: return launch(Int<3>{});
    case 5: return launch(Int<5>{});
    case 7: return launch(Int<7>{});
    default: return launch(Int<9>{});
  }
}

}  // namespace convmixer_fast::cuda
