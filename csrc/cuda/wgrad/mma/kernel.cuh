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
// The D_dy stay in registers, 4 per lane and tap row, for up to kWgradChain products; the diagonals are then summed in
// shared memory, and leave as one partial (wgrad/share.h) when the CTA leaves the channel. The sum of gy is one more
// product, with ones.
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
#include "../../common/access_vector.cuh"
#include "../../common/ptx.cuh"
#include "../../common/shared_memory.h"
#include "../share.h"
#include "operand_reader.cuh"
#include "plan.h"

namespace convmixer_fast::cuda {

template <class T_, int kTapRows_, Loader kLoader_>
struct WgradTraits {
  using T = T_;
  static constexpr bool kUnrolled = kTapRows_ > 0;  // WgradTaps::unrolled
  static constexpr int kTapRows = kUnrolled ? kTapRows_ : kWgradMmaTapRows;
  static constexpr Loader kLoader = kLoader_;
  static constexpr LaunchBounds kBounds = wgrad_launch_bounds(kUnrolled, kLoader);
  static_assert(kTapRows <= 9, "a subtile and its taps reach into two subtile rows; 36 accumulators");
  static constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;  // two of them

  // Pitches of the stored x and gy.
  static __device__ __forceinline__ int x_pitch(const WgradMmaPlan& plan) {
    return kUnrolled ? kFixedPitch : plan.x.map.maps.pitch;
  }
  static __device__ __forceinline__ int gy_pitch(const WgradMmaPlan& plan) {
    return kUnrolled ? kFixedOutPitch : plan.gy.map.maps.pitch;
  }
};

// The taps and M blocks of one warp.
template <class Traits>
struct WgradWarp {
  int split;                // the first of its M blocks; it takes every splits-th
  int first_tap_row_block;  // the pass's first
  int tap_row_block;
  int k_step;
  bool sums_gy;

  __device__ WgradWarp(const WgradParams& params, const WgradMmaPlan& plan) {
    const int warp = threadIdx.x / 32;
    const int tap_block = Traits::kUnrolled ? 0 : warp % plan.taps.tap_blocks();
    split = Traits::kUnrolled ? warp : warp / plan.taps.tap_blocks();
    first_tap_row_block = Traits::kUnrolled ? 0 : blockIdx.y * plan.taps.tap_row_blocks;
    tap_row_block = first_tap_row_block + tap_block / plan.taps.k_steps;
    k_step = tap_block % plan.taps.k_steps;
    sums_gy = params.gbias != nullptr && tap_row_block == 0 && k_step == 0;
  }
};

// Where one lane finds the 16 subtiles of an M block: the shared addresses that it hands to ldmatrix for their row 0.
struct WgradLaneAddresses {
  uint32_t x;
  uint32_t gy;

  __device__ WgradLaneAddresses(const WgradMmaPlan& plan, int m_block, int tap_row_block, int k_step, uint32_t x_tile,
                                uint32_t gy_tile) {
    const int lane = threadIdx.x % 32;
    const auto offset = [&](const WgradOperand& operand, int subtile, int skipped_subtile_rows) {
      if (subtile >= plan.shape.subtiles) return operand.zero_subtile;
      return subtile_start(plan.shape, operand.map.maps, subtile, skipped_subtile_rows) - operand.left;
    };
    // x: matrices (subtiles 0-7, columns 0-7), (subtiles 0-7, columns 8-15), then subtiles 8-15.
    const int x_subtile = m_block * kSubtilesPerMma + lane / 16 * 8 + lane % 8;
    const int col = (x_subtile < plan.shape.subtiles ? k_step * kMmaK : 0) + lane / 8 % 2 * 8;
    x = x_tile + 2 * (offset(plan.x, x_subtile, tap_row_block) + col);
    // gy: matrices (row 0, subtiles 0-7), (row 0, subtiles 8-15), then row 1.
    gy = gy_tile + 2 * (offset(plan.gy, m_block * kSubtilesPerMma + lane % 16, 0) + lane / 16 * plan.gy.map.maps.pitch);
  }
};

template <class Traits>
struct WgradAccumulators {
  float taps[Traits::kTapRows][4];
  float gy[4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      gy[i] = 0;
#pragma unroll
      for (int dy = 0; dy < Traits::kTapRows; dy++) taps[dy][i] = 0;
    }
  }
};

// Adds the products of one M block.
template <class Traits>
__device__ __forceinline__ void accumulate(const WgradMmaPlan& plan, const WgradLaneAddresses& addresses, bool sums_gy,
                                           WgradAccumulators<Traits>& acc) {
  using T = typename Traits::T;
  constexpr int kTapRows = Traits::kTapRows;
  constexpr int kPadTop = (kTapRows - 1) / 2;  // if all taps are in registers
  const StoredMaps& maps = plan.x.map.maps;
  const int x_pitch = Traits::x_pitch(plan);
  const int gy_pitch = Traits::gy_pitch(plan);
  uint32_t gy[kSubtile][2];
  uint32_t x_row = Traits::kUnrolled ? 0 : addresses.x + 2 * maps.row(-plan.x.top);
#pragma unroll
  for (int row = 0; row < kSubtile + kTapRows - 1; row++) {
    if (row < kSubtile && row % 2 == 0) {
      uint32_t two_rows[4];
      ldmatrix_x4_trans(two_rows, addresses.gy + 2 * row * gy_pitch);
#pragma unroll
      for (int i = 0; i < 4; i++) gy[row + i / 2][i % 2] = two_rows[i];
    }
    if constexpr (Traits::kUnrolled)
      x_row = addresses.x + StoredMaps::floor_subtile(row - kPadTop) * 2 * maps.gap + (row - kPadTop) * 2 * x_pitch;
    uint32_t x[4];
    ldmatrix_x4_trans(x, x_row);
    if constexpr (!Traits::kUnrolled) x_row += plan.row_bytes[row % kSubtile];
#pragma unroll
    for (int o = 0; o < kSubtile; o++)
      if (row - o >= 0 && row - o < kTapRows) mma_m16n8k16<T>(acc.taps[row - o], x, gy[o], acc.taps[row - o]);
  }
  if (sums_gy) {
    const uint32_t ones[4] = {Traits::kOnes, Traits::kOnes, Traits::kOnes, Traits::kOnes};
#pragma unroll
    for (int o = 0; o < kSubtile; o++) mma_m16n8k16<T>(acc.gy, ones, gy[o], acc.gy);
  }
}

// Each warp sums its accumulators along the diagonals into its own part of `diagonals`, by way of its own part of
// `scratch`, which has room for one product per warp. is_first: the channel has no sums there yet.
template <class Traits>
__device__ __forceinline__ void add_to_diagonals(const WgradAccumulators<Traits>& acc, bool is_first, float* diagonals,
                                                 float* scratch) {
  constexpr int kTapRows = Traits::kTapRows;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float* const product = scratch + warp * kMmaK * kWgradScratchPitch;
  float* const mine = diagonals + warp * kTapRows * kWgradDiagonals;
#pragma unroll
  for (int dy = 0; dy < kTapRows; dy++) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      product[(lane / 4 + i / 2 * 8) * kWgradScratchPitch + lane % 4 * 2 + i % 2] = acc.taps[dy][i];
    __syncwarp();
    if (lane < kWgradDiagonals - 1) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kSubtile; j++) {
        const int i = lane - (kSubtile - 1) + j;
        if (i >= 0 && i < kMmaK) sum += product[i * kWgradScratchPitch + j];
      }
      float& diagonal = mine[dy * kWgradDiagonals + lane];
      diagonal = is_first ? sum : diagonal + sum;
    }
    __syncwarp();
  }
  float gy_sum = acc.gy[0] + acc.gy[1];  // all 16 rows are alike
  for (int i = 1; i < 4; i *= 2) gy_sum += __shfl_xor_sync(0xffffffff, gy_sum, i);
  if (lane == 0) {
    float& diagonal = mine[kWgradDiagonals - 1];
    diagonal = is_first ? gy_sum : diagonal + gy_sum;
  }
}

// Writes a channel's sums to the workspace.
template <class Traits>
__device__ __forceinline__ void write_partial(const WgradParams& params, const WgradMmaPlan& plan,
                                              const WgradShare& share, int first_tap_row_block, int channel,
                                              const float* diagonals) {
  constexpr int kTapRows = Traits::kTapRows;
  const int thread = threadIdx.x;
  const int kernel_h = static_cast<int>(params.kernel_h);
  const int kernel_w = static_cast<int>(params.kernel_w);
  float* const partial = static_cast<float*>(params.workspace) + share.partial(blockIdx.x, channel, 0);
  const int first_tap = first_tap_row_block * kTapRows * kernel_w;
  const int taps = min(kernel_h - first_tap_row_block * kTapRows, plan.taps.tap_row_blocks * kTapRows) * kernel_w;
  for (int tap = thread; tap < taps; tap += 32 * plan.warps) {
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
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kBounds.threads, Traits::kBounds.min_ctas)
    depthwise_wgrad_mma_kernel(const __grid_constant__ WgradParams params, const __grid_constant__ WgradMmaPlan plan,
                               const __grid_constant__ WgradShare share) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char smem[];
  uint16_t* const x_tile = reinterpret_cast<uint16_t*>(smem);
  uint16_t* const gy_tile = x_tile + plan.x.map.elements;
  float* const diagonals = reinterpret_cast<float*>(gy_tile + plan.gy.map.elements);
  float* const scratch = diagonals + plan.warps * Traits::kTapRows * kWgradDiagonals;
  const WgradWarp<Traits> warp(params, plan);
  const int first = static_cast<int>(share.first_tile(blockIdx.x));
  const int count = static_cast<int>(share.first_tile(blockIdx.x + 1)) - first;
  WorkTile tile{first / plan.tiles_per_channel, first % plan.tiles_per_channel};

  // Zeros for the implicit padding, once: nothing else writes there, except for tiles, which bring their own zeros.
  for (int i = threadIdx.x; i < (plan.x.map.elements + plan.gy.map.elements) / 8; i += 32 * plan.warps)
    reinterpret_cast<uint4*>(smem)[i] = make_uint4(0, 0, 0, 0);
  using XReader = WgradOperandReader<Traits::kLoader, 8>;    // behind a border of 4 columns
  using GyReader = WgradOperandReader<Traits::kLoader, 16>;  // there is none
  XReader x(params, plan, params.x, params.x_stride, plan.x, tile, x_tile);
  GyReader gy(params, plan, params.gy, params.gy_stride, plan.gy, tile, gy_tile);
  if constexpr (XReader::kAhead) {
    x.load(params, plan, params.x_stride, plan.x, tile);
    gy.load(params, plan, params.gy_stride, plan.gy, tile);
  }
  const auto addresses_of = [&](int m_block) {
    return WgradLaneAddresses(plan, m_block, warp.tap_row_block, warp.k_step, shared_address(x_tile),
                              shared_address(gy_tile));
  };
  WgradLaneAddresses addresses = addresses_of(warp.split);
  WgradAccumulators<Traits> acc;
  acc.clear();
  int tiles_in_chain = 0;  // whose products are in the accumulators
  bool is_first_chain = true;
  __syncthreads();
  for (int remaining = count; remaining > 0; remaining--) {
    x.write(params, plan, params.x_stride, plan.x, Traits::x_pitch(plan), tile);
    gy.write(params, plan, params.gy_stride, plan.gy, Traits::gy_pitch(plan), tile);
    __syncthreads();

    const WorkTile following = tile.following(plan, 1);
    if constexpr (XReader::kAhead)
      if (remaining > 1) {
        x.load(params, plan, params.x_stride, plan.x, following);
        gy.load(params, plan, params.gy_stride, plan.gy, following);
      }
    for (int m_block = warp.split; m_block < plan.shape.m_blocks; m_block += plan.splits) {
      if (plan.shape.m_blocks > plan.splits) addresses = addresses_of(m_block);
      accumulate<Traits>(plan, addresses, warp.sums_gy, acc);
    }
    const bool is_last_of_channel = following.index == 0 || remaining == 1;
    tiles_in_chain++;
    if (is_last_of_channel || tiles_in_chain == plan.tiles_per_chain) {
      add_to_diagonals<Traits>(acc, is_first_chain, diagonals, scratch);
      acc.clear();
      tiles_in_chain = 0;
      is_first_chain = is_last_of_channel;
    }
    if (is_last_of_channel) {
      __syncthreads();
      write_partial<Traits>(params, plan, share, warp.first_tap_row_block, tile.channel, diagonals);
    }
    tile = following;
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
  const auto launch = [&](auto tap_rows, auto loader) {
    constexpr auto kernel = depthwise_wgrad_mma_kernel<WgradTraits<T, tap_rows(), loader()>>;
    if (const cudaError_t status = prepare_shared_memory<kernel>(); status != cudaSuccess) return status;
    const dim3 grid(share.ctas, plan.taps.passes);
    kernel<<<grid, 32 * plan.warps, plan.smem_bytes(), stream>>>(params, plan, share);
    return cudaGetLastError();
  };
  const auto with_tap_rows = [&](auto loader) {
    switch (plan.taps.tap_rows) {
      case 3: return launch(Int<3>{}, loader);
      case 5: return launch(Int<5>{}, loader);
      case 7: return launch(Int<7>{}, loader);
      default: return launch(Int<9>{}, loader);
    }
  };
  constexpr LoaderConstant<Loader::kAlignedRows> aligned;
  constexpr LoaderConstant<Loader::kUnalignedRows> unaligned;
  constexpr LoaderConstant<Loader::kTiles> tiles;
  if (plan.loader == Loader::kUnalignedRows) return with_tap_rows(unaligned);
  if (plan.loader == Loader::kAlignedRows)
    return plan.taps.unrolled ? with_tap_rows(aligned) : launch(Int<0>{}, aligned);
  return plan.taps.unrolled ? with_tap_rows(tiles) : launch(Int<0>{}, tiles);
}

}  // namespace convmixer_fast::cuda
