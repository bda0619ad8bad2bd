// Depthwise convolution on tensor cores: float16 and bfloat16, kernels up to 57 columns wide, sm_80 and up.
//
// Along a row the convolution is a product with a banded Toeplitz matrix, and the rows of the kernel add up:
//
//   out[s][o][j] = sum over dy, i of  in[s][o + dy][i] * taps[dy][i - j - lead]
//
// s is a subtile, o and j its output row and column. in[s][r][i] is row r and column i of its stored window: column 0
// lies `left` columns left of the subtile, row 0 `pad_top` rows above it; lead = left - pad_left.
//
// One mma adds one tap row to one output row of 16 subtiles (M; shape.h): 8 output columns (N), over 16 stored input
// columns (K). The Toeplitz fragment of a tap row is the B operand: two registers per lane and k-step. A stored input
// row is the A operand: loaded once by ldmatrix, it serves the up to 8 output rows of the subtile whose taps meet it.
//
// A CTA keeps to consecutive work tiles (a channel's images, then the next channel's), so that taps, bias, scale and
// shift are fetched into shared memory once per channel. The Toeplitz fragments of kernels 3, 5, 7 and 9 high (in
// channels_last 7 and 9) and up to 9 wide stay in registers, except for unaligned rows of several warps; all others are
// read again for each M block (the ring). For each work tile the CTA
//   1. writes the inputs, through the prologue, into shared memory, whose zero border is the implicit padding
//      (mover.cuh),
//   2. loads the next work tile into registers, in flight during all that follows, if the loader works ahead,
//   3. sums the taps (main_loop.cuh),
//   4. applies the epilogue in registers, with the residual as one more product, and writes the outputs to shared
//      memory (epilogue.cuh),
//   5. copies them to memory.
// That is for contiguous rows. In channels_last a work tile has 8 neighbouring channels, each computed by one warp.
//
// A structural zero of the Toeplitz matrix times Inf is NaN: a pixel that is not finite makes NaN of every output whose
// stored window holds it, up to 11 columns away for kernels up to 9 wide, not only of those its taps reach.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>

#include "../../common/activation.cuh"
#include "../../common/occupancy.h"
#include "../../common/shared_memory.h"
#include "epilogue.cuh"
#include "main_loop.cuh"
#include "mover.cuh"
#include "plan.h"
#include "toeplitz.cuh"
#include "work_tile.cuh"

namespace convmixer_fast::cuda {

template <class T_, int kUnrolled_, int kKSteps_, Activation kActivation, Loader kLoader_, bool kOneWarp_>
struct MmaTraits {
  using T = T_;
  using Fast = FastElementwise<T, kActivation>;
  static constexpr int kUnrolled = kUnrolled_;  // MmaPlan::unrolled
  static constexpr int kKSteps = kKSteps_;
  static constexpr Loader kLoader = kLoader_;
  static constexpr bool kOneWarp = kOneWarp_;  // MmaPlan::one_warp
  static constexpr bool kChannelsLast = is_channels_last(kLoader);
  static constexpr LaunchBounds kBounds = mma_launch_bounds(kLoader, kKSteps, kOneWarp);
  static_assert(kUnrolled == 0 || (kKSteps == 1 && kUnrolled <= 9), "all Toeplitz fragments stay in registers");
  static_assert(kKSteps <= kMaxKSteps, "the ring takes 16 registers per k-step");
  static_assert(!kOneWarp || (kUnrolled > 0 && !kChannelsLast), "there are no other instantiations for one warp");
  static_assert(2 * sizeof(Fast) == kElementwiseBytes);

  static constexpr bool kFixedPitches = has_fixed_pitches(kOneWarp, kLoader);

  // Pitches of the stored inputs and outputs.
  static __device__ __forceinline__ int in_pitch(const MmaPlan& plan) {
    return kFixedPitches ? kFixedPitch : plan.x.maps.pitch;
  }
  static __device__ __forceinline__ int out_pitch(const MmaPlan& plan) {
    return kFixedPitches ? kFixedOutPitch : plan.y.maps.pitch;
  }
};

// The threads that compute one channel: a warp in channels_last, else the CTA.
template <class Traits>
struct Team {
  int channel;  // in the work tile
  int thread;
  int threads;
  int warp;
  int warps;

  __device__ explicit Team(const MmaPlan& plan) {
    const int warp_of_cta = Traits::kOneWarp ? 0 : threadIdx.x / 32;
    channel = Traits::kChannelsLast ? warp_of_cta : 0;
    thread = Traits::kChannelsLast ? threadIdx.x % 32 : threadIdx.x;
    threads = Traits::kChannelsLast || Traits::kOneWarp ? 32 : 32 * plan.warps;
    warp = Traits::kChannelsLast ? 0 : warp_of_cta;
    warps = Traits::kChannelsLast || Traits::kOneWarp ? 1 : plan.warps;
  }
  // In channels_last the last work tile may have fewer channels; none, if they are octets.
  __device__ bool has_channel(const DepthwiseParams& params, const WorkTile& tile) const {
    const int channels = static_cast<int>(params.channels);
    if constexpr (Traits::kLoader == Loader::kChannelsLast) return tile.channel < channels;
    else return !Traits::kChannelsLast || tile.channel + channel < channels;
  }
};

// The parts of shared memory. Elementwise parameters: [2i] the prologue of the work tile's channel i, [2i + 1] its
// epilogue.
template <class Traits>
struct MmaSmem {
  uint16_t* inputs;
  uint16_t* outputs;
  uint16_t* taps;
  typename Traits::Fast* elementwise;

  __device__ MmaSmem(const MmaPlan& plan, unsigned char* start) {
    inputs = reinterpret_cast<uint16_t*>(start);
    outputs = inputs + plan.x.elements;
    taps = outputs + plan.y.elements;
    elementwise = reinterpret_cast<typename Traits::Fast*>(taps + plan.tap_elements);
  }
  // Zeros for the implicit padding and beside the taps, once: nothing else writes there, except for tiles, which bring
  // their own zeros.
  __device__ void clear(int threads) const {
    uint4* const vectors = reinterpret_cast<uint4*>(inputs);
    const int count = static_cast<int>(reinterpret_cast<uint4*>(elementwise) - vectors);
    for (int i = threadIdx.x; i < count; i += threads) vectors[i] = make_uint4(0, 0, 0, 0);
  }
};

template <class Traits>
__device__ __forceinline__ void sync_cta() {
  if constexpr (Traits::kOneWarp) __syncwarp();
  else __syncthreads();
}

// What a team's warps keep of the channel they compute.
template <class Traits>
class Channel {
 public:
  using T = typename Traits::T;
  using Fast = typename Traits::Fast;
  static constexpr int kTapRows = Traits::kUnrolled ? Traits::kUnrolled : 1;

  __device__ Channel(const DepthwiseParams& params, const MmaPlan& plan, const Team<Traits>& team,
                     const MmaSmem<Traits>& smem)
      : kernel_h_(Traits::kUnrolled ? Traits::kUnrolled : static_cast<int>(params.kernel_h)),
        left_(Traits::kKSteps == 1 ? kFixedLeft : plan.left),
        inputs_(shared_address(smem.inputs + offset(team, plan.x))),
        outputs_(smem.outputs + offset(team, plan.y)),
        taps_(smem.taps + team.channel * stored_taps(plan, kernel_h_)),
        elementwise_(smem.elementwise + 2 * team.channel),
        lane_taps_(plan, kernel_h_, taps_),
        addresses_(plan, left_, team.warp, inputs_) {}

  // Fetches taps and elementwise parameters into shared memory.
  __device__ __forceinline__ void fetch(const DepthwiseParams& params, const MmaPlan& plan, const Team<Traits>& team,
                                        const WorkTile& tile) {
    const int channel = tile.channel + team.channel;
    const uint16_t* const weight =
        static_cast<const uint16_t*>(params.weight) + int64_t{channel} * kernel_h_ * static_cast<int>(params.kernel_w);
    write_taps(params, plan, weight, left_ - static_cast<int>(params.pad_left), team.thread, team.threads, taps_);
    if (team.thread != 0) return;
    elementwise_[0] = Fast(params.prologue, channel);
    elementwise_[1] = Fast(params.epilogue, channel);
  }

  __device__ __forceinline__ void load_fragments(const MmaPlan& plan) {
    if constexpr (Traits::kUnrolled > 0)
#pragma unroll
      for (int dy = 0; dy < kTapRows; dy++) lane_taps_.load(plan.tap_pitch, dy, toeplitz_[dy]);
  }

  // From the stored inputs to the stored outputs.
  __device__ __forceinline__ void compute(const DepthwiseParams& params, const MmaPlan& plan,
                                          const Team<Traits>& team) {
    if constexpr (Traits::kOneWarp) {
      compute_m_block(params, plan);
    } else {
      for (int m_block = team.warp; m_block < plan.shape.m_blocks; m_block += team.warps) {
        if (plan.shape.m_blocks > team.warps) addresses_ = LaneAddresses(plan, left_, m_block, inputs_);
        compute_m_block(params, plan);
      }
    }
  }

 private:
  __device__ static int offset(const Team<Traits>& team, const MapOperand& operand) {
    return team.channel * operand.channel_pitch;
  }

  __device__ __forceinline__ void compute_m_block(const DepthwiseParams& params, const MmaPlan& plan) {
    const int in_pitch = Traits::in_pitch(plan);
    const int out_pitch = Traits::out_pitch(plan);
    const Fast epilogue = elementwise_[1];
    Accumulators acc;
    if constexpr (Traits::kUnrolled > 0)
      accumulate_unrolled<T, kTapRows>(plan.x.maps, in_pitch, addresses_.inputs, epilogue.bias, toeplitz_, acc);
    else
      RingLoop<T, Traits::kKSteps>(plan, kernel_h_, static_cast<int>(params.pad_top), addresses_.inputs, lane_taps_)
          .run(epilogue.bias, acc);
    const int left = Traits::kUnrolled ? left_ : opaque(left_);  // the ring leaves no registers for what depends on it
    if (params.residual)
      apply_epilogue<T, Traits::kKSteps, true>(epilogue, acc, left, addresses_, in_pitch, out_pitch, outputs_);
    else apply_epilogue<T, Traits::kKSteps, false>(epilogue, acc, left, addresses_, in_pitch, out_pitch, outputs_);
  }

  int kernel_h_;
  int left_;
  uint32_t inputs_;
  uint16_t* outputs_;
  uint16_t* taps_;
  Fast* elementwise_;
  ToeplitzLane lane_taps_;
  LaneAddresses addresses_;
  uint32_t toeplitz_[kTapRows][Traits::kKSteps][2];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kBounds.threads, Traits::kBounds.min_ctas)
    depthwise_mma_kernel(const __grid_constant__ DepthwiseParams params, const __grid_constant__ MmaPlan plan) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(128) unsigned char smem_start[];
  const MmaSmem<Traits> smem(plan, smem_start);
  const Team<Traits> team(plan);
  const int siblings = Traits::kChannelsLast ? plan.siblings : 1;
  constexpr int channels = Traits::kChannelsLast ? kOctet : 1;
  const WorkShare share(plan, siblings, channels);
  WorkTile tile = share.first;

  smem.clear(Traits::kOneWarp ? 32 : 32 * plan.warps);
  Mover<Traits> mover(params, plan, tile, smem.inputs, smem.outputs);
  if constexpr (mover.kAhead) mover.load(params, plan, tile);
  Channel<Traits> channel(params, plan, team, smem);
  sync_cta<Traits>();
  for (int remaining = share.count; remaining > 0; remaining--) {
    const WorkTile following = tile.following(plan, siblings * channels);
    const bool is_new_channel = tile.index == 0 || remaining == share.count;
    const bool has_channel = team.has_channel(params, tile);
    if (is_new_channel) {
      if (has_channel) channel.fetch(params, plan, team, tile);
      sync_cta<Traits>();
    }
    mover.write_inputs(params, plan, tile, smem.elementwise);
    sync_cta<Traits>();

    if constexpr (mover.kAhead)
      if (remaining > 1) mover.load(params, plan, following);
    if (is_new_channel) channel.load_fragments(plan);
    if (has_channel) channel.compute(params, plan, team);
    sync_cta<Traits>();

    mover.store_outputs(params, plan, tile);
    tile = following;
  }
#else
  __trap();  // compiled for an older GPU, for which this kernel is not chosen
#endif
}

template <class Traits>
cudaError_t launch_mma(const DepthwiseParams& params, const MmaPlan& plan, int sms, cudaStream_t stream) {
  constexpr auto kernel = depthwise_mma_kernel<Traits>;
  const int smem = plan.smem_bytes();
  const int threads = 32 * plan.warps;
  int ctas_per_sm = 0;
  cudaError_t status = prepare_shared_memory<kernel>();
  if (status == cudaSuccess) status = query_ctas_per_sm<kernel>(threads, smem, ctas_per_sm);
  if (status != cudaSuccess) return status;
  const int64_t max_ctas = std::max(sms * ctas_per_sm / plan.siblings * plan.siblings, plan.siblings);
  const int ctas = static_cast<int>(std::min(plan.work_tiles, max_ctas));
  kernel<<<ctas, threads, smem, stream>>>(params, plan);
  return cudaGetLastError();
}

// Picks the instantiation. Instantiated in instantiations/depthwise_mma_<dtype>_<activation>[_nhwc].cu, which compile
// side by side.
template <class T, Activation kActivation, bool kChannelsLast>
cudaError_t depthwise_mma(const DepthwiseParams& params, const MmaPlan& plan, int sms, cudaStream_t stream) {
  const auto launch = [&](auto unrolled, auto k_steps, auto loader, auto one_warp) {
    using Traits = MmaTraits<T, unrolled(), k_steps(), kActivation, loader(), one_warp()>;
    return launch_mma<Traits>(params, plan, sms, stream);
  };
  const auto with_tap_rows = [&](auto loader, auto one_warp) {
    constexpr Int<1> one;
    if constexpr (!kChannelsLast) {
      if (plan.unrolled == 3) return launch(Int<3>{}, one, loader, one_warp);
      if (plan.unrolled == 5) return launch(Int<5>{}, one, loader, one_warp);
    }
    if (plan.unrolled == 7) return launch(Int<7>{}, one, loader, one_warp);
    if (plan.unrolled == 9) return launch(Int<9>{}, one, loader, one_warp);
    return cudaErrorInvalidValue;
  };
  const auto with_ring = [&](auto loader) {
    constexpr std::false_type not_one_warp;
    if (plan.k_steps == 1) return launch(Int<0>{}, Int<1>{}, loader, not_one_warp);
    if (plan.k_steps == 2) return launch(Int<0>{}, Int<2>{}, loader, not_one_warp);
    if constexpr (!kChannelsLast) {
      if (plan.k_steps == 3) return launch(Int<0>{}, Int<3>{}, loader, not_one_warp);
      if constexpr (loader() == Loader::kTiles)
        if (plan.k_steps == 4) return launch(Int<0>{}, Int<4>{}, loader, not_one_warp);
    }
    return cudaErrorInvalidValue;
  };
  const auto with_several_warps = [&](auto loader) {
    constexpr bool kOnlyRing = loader() == Loader::kUnalignedRows;
    if constexpr (!kOnlyRing)
      if (plan.unrolled > 0) return with_tap_rows(loader, std::false_type{});
    return with_ring(loader);
  };
  if constexpr (kChannelsLast) {
    if (plan.loader == Loader::kChannelsLast) return with_several_warps(LoaderConstant<Loader::kChannelsLast>{});
    return with_several_warps(LoaderConstant<Loader::kChannelsLastTiles>{});
  } else {
    constexpr LoaderConstant<Loader::kAlignedRows> aligned;
    constexpr LoaderConstant<Loader::kUnalignedRows> unaligned;
    if (plan.one_warp)
      return plan.loader == Loader::kAlignedRows ? with_tap_rows(aligned, std::true_type{})
                                                 : with_tap_rows(unaligned, std::true_type{});
    if (plan.loader == Loader::kAlignedRows) return with_several_warps(aligned);
    if (plan.loader == Loader::kUnalignedRows) return with_several_warps(unaligned);
    return with_several_warps(LoaderConstant<Loader::kTiles>{});
  }
}

}  // namespace convmixer_fast::cuda
