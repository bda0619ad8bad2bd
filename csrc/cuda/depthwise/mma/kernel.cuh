// Depthwise convolution on tensor cores: float16 and bfloat16, kernels up to 41 columns wide, sm_80 and up.
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
// shift are fetched into shared memory once per channel. The Toeplitz fragments of kernels 3, 5, 7 and 9 high stay in
// registers; those of other kernels are read again for each M block (the ring). For each work tile it
//   1. writes the inputs, through the prologue, into shared memory, whose zero border is the implicit padding,
//   2. loads the next work tile into registers, in flight during all that follows (maps in one tile whose memory allows
//      16-byte accesses; others are loaded in 1, row by row),
//   3. sums the taps,
//   4. adds the residual as one more product, with a shifted identity,
//   5. applies the epilogue in registers and writes the outputs to shared memory,
//   6. copies them to memory, up to 16 bytes per thread and access.
// That is for contiguous rows. In channels_last a work tile has 8 or 16 neighbouring channels, each computed by one
// warp; 1 and 6 transpose in registers, 8 channels of two neighbouring pixels per thread.
//
// A structural zero of the Toeplitz matrix times Inf is NaN: a pixel that is not finite makes NaN of every output whose
// stored window holds it, up to 11 columns away for kernels up to 9 wide, not only of those its taps reach.
//
// Terms: docs/glossary.md.
#pragma once
#include <climits>

#include "../../common/access_vector.cuh"
#include "../../common/activation.cuh"
#include "../../common/launch.h"
#include "../../common/occupancy.h"
#include "../../common/shared_memory.h"
#include "plan.h"
#include "work_tile.cuh"

namespace convmixer_fast::cuda {

template <class T_, int kKernelH_, int kKSteps_, Activation kActivation_, bool kPrologue_, bool kChannelsLast_>
struct MmaTraits {
  using T = T_;
  // 0: any number of rows, whose Toeplitz fragments pass through a ring of registers.
  static constexpr int kKernelH = kKernelH_;
  static constexpr int kKSteps = kKSteps_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr bool kPrologue = kPrologue_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr bool kUnalignedRows = !kChannelsLast && has_unaligned_rows(kActivation, kKernelH);
  static constexpr LaunchBounds kBounds = mma_launch_bounds(kChannelsLast, kKSteps);
  static_assert(kKernelH == 0 || (kKSteps == 1 && kKernelH <= 9), "all Toeplitz fragments stay in registers");
  static_assert(kKSteps <= kMaxKSteps, "the ring takes 16 registers per k-step");
};

// An optimization barrier: dependent addresses are computed again instead of being kept in registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Channel c of two neighbouring pixels, whose octets of channels are a and b.
__device__ __forceinline__ AccessVector<2> pick(const AccessVector<8>& a, const AccessVector<8>& b, int c) {
  const uint32_t bits = __byte_perm(reinterpret_cast<const uint32_t*>(a.values)[c / 2],
                                    reinterpret_cast<const uint32_t*>(b.values)[c / 2], c % 2 ? 0x7632 : 0x5410);
  return reinterpret_cast<const AccessVector<2>&>(bits);
}

// The octets of two neighbouring pixels: the first channel's pair lies at `from`, the others `pitch_bytes` apart.
__device__ __forceinline__ void load_octets(AccessVector<8> (&octets)[2], const char* from, int pitch_bytes) {
#pragma unroll
  for (int c = 0; c < kOctet; c += 2) {
    const uint32_t even = *reinterpret_cast<const uint32_t*>(from + c * pitch_bytes);
    const uint32_t odd = *reinterpret_cast<const uint32_t*>(from + (c + 1) * pitch_bytes);
    reinterpret_cast<uint32_t*>(octets[0].values)[c / 2] = __byte_perm(even, odd, 0x5410);
    reinterpret_cast<uint32_t*>(octets[1].values)[c / 2] = __byte_perm(even, odd, 0x7632);
  }
}

// Where one lane reads and writes the 16 subtiles of an M block.
struct LaneAddresses {
  uint32_t inputs;  // shared address of the row that this lane hands to ldmatrix
  int outputs[2];   // elements from a channel's outputs to the lane's, in subtiles g and g + 8; negative: no such
                    // subtile

  __device__ LaneAddresses(const MmaPlan& plan, int m_block, uint32_t inputs_address) {
    const int lane = threadIdx.x % 32;
    const int subtiles_per_image = plan.subtile_rows * plan.subtile_cols;
    const auto offset = [&](int subtile, int image_pitch, int pitch, int gap) {
      const int image = subtile / subtiles_per_image;
      const int subtile_row = subtile % subtiles_per_image / plan.subtile_cols;
      const int subtile_col = subtile % plan.subtile_cols;
      return image * image_pitch + subtile_row * (kSubtile * pitch + gap) + subtile_col * kSubtile;
    };
    // ldmatrix: matrices (subtiles 0-7, columns 0-7), (subtiles 8-15, columns 0-7), then columns 8-15. A subtile beyond
    // the last repeats subtile 0.
    const int subtile = m_block * kSubtilesPerMma + lane % 16;
    inputs =
        inputs_address +
        2 * (offset(subtile < plan.subtiles ? subtile : 0, plan.image_pitch, plan.pitch, plan.gap) + lane / 16 * 8);
    for (int half = 0; half < 2; half++) {
      const int owned = m_block * kSubtilesPerMma + lane / 4 + 8 * half;
      outputs[half] =
          owned < plan.subtiles ? offset(owned, plan.out_image_pitch, plan.out_pitch, plan.out_gap) + lane % 4 * 2 : -1;
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kBounds.threads, Traits::kBounds.min_ctas)
    depthwise_mma_kernel(const __grid_constant__ DepthwiseParams params, const __grid_constant__ MmaPlan plan) {
#if __CUDA_ARCH__ >= 800
  using T = typename Traits::T;
  constexpr int kKSteps = Traits::kKSteps;
  constexpr int kKernelH = Traits::kKernelH;
  extern __shared__ __align__(128) unsigned char smem[];
  T* const inputs = reinterpret_cast<T*>(smem);
  T* const outputs = inputs + plan.input_elements;
  T* const taps = outputs + plan.output_elements;
  using Fast = FastElementwise<T, Traits::kActivation>;
  Fast* const elementwise = reinterpret_cast<Fast*>(taps + plan.tap_elements);  // [2i]: channel i's prologue, [2i + 1]:
                                                                                // its epilogue
  static_assert(2 * sizeof(Fast) == kElementwiseBytes);
  const int threads = 32 * plan.warps;
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const int lane = thread % 32;
  // A team computes a channel: a warp in channels_last, else the CTA.
  constexpr bool kChannelsLast = Traits::kChannelsLast;
  const int channels = kChannelsLast ? plan.channels : 1;
  const int team = kChannelsLast ? warp : 0;
  const int team_thread = kChannelsLast ? lane : thread;
  const int team_threads = kChannelsLast ? 32 : threads;
  const int team_warp = kChannelsLast ? 0 : warp;
  const int team_warps = kChannelsLast ? 1 : plan.warps;
  const int kernel_h = kKernelH ? kKernelH : static_cast<int>(params.kernel_h);
  const int kernel_w = static_cast<int>(params.kernel_w);
  const int pad_top = kKernelH ? (kKernelH - 1) / 2 : static_cast<int>(params.pad_top);
  const int pitch = kKernelH ? kFixedPitch : plan.pitch;
  const int out_pitch = kKernelH ? kFixedOutPitch : plan.out_pitch;
  const int left = kKSteps == 1 ? kFixedLeft : plan.left;
  const int lead = left - static_cast<int>(params.pad_left);  // stored columns of a window before its first tap
  const int height = static_cast<int>(params.height);
  const int width = static_cast<int>(params.width);

  // CTAs share the work tiles evenly. Siblings have the same share, each of them its own octet of channels.
  const int siblings = kChannelsLast ? plan.siblings : 1;
  const int channel_step = channels * siblings;
  const int cta = static_cast<int>(blockIdx.x);
  const int share = cta / siblings;
  const int shares = gridDim.x / siblings;
  const int64_t first = plan.work_tiles / siblings * share / shares;
  const int count = static_cast<int>(plan.work_tiles / siblings * (share + 1) / shares - first);
  WorkTile work_tile{static_cast<int>(first / plan.tiles_per_channel) * channel_step + cta % siblings * channels,
                     static_cast<int>(first % plan.tiles_per_channel)};
  const auto has_channel = [&](const WorkTile& work_tile, int i) {
    return !kChannelsLast || work_tile.channel + i < static_cast<int>(params.channels);
  };

  // In channels_last registers are short: what is cheap to compute again is not kept.
  const auto opaque_if_channels_last = [](int value) { return kChannelsLast ? opaque(value) : value; };
  const auto inputs_of = [&](int i) { return inputs + i * plan.input_channel_pitch + i / kOctet * kOctetGap; };
  const auto outputs_of = [&](int i) { return outputs + i * plan.output_channel_pitch + i / kOctet * kOctetGap; };
  const auto input_offset = [&](int image, int row, int col) {
    return image * plan.image_pitch + row * pitch + row / kSubtile * plan.gap + col;
  };
  const auto output_offset = [&](int image, int row, int col) {
    return image * plan.out_image_pitch + row * out_pitch + row / kSubtile * plan.out_gap + col;
  };

  // A thread's share of a prefetched work tile, at equal distances: vectors, or in channels_last pairs of octets.
  constexpr int kVectors = kChannelsLast ? 2 : 1;
  constexpr int kSteps = kPrefetch / kVectors;
  const auto loader_lane_now = [&] {
    return kChannelsLast ? opaque_if_channels_last(thread) / plan.channel_lanes : thread;
  };
  const int loader_lane = loader_lane_now();
  const int loader_channel = kChannelsLast ? thread % plan.channel_lanes * plan.load_vector : 0;
  const int loader_row = loader_lane / plan.load_lanes;
  const int loader_col = loader_lane % plan.load_lanes * (kChannelsLast ? 2 : 8);
  const auto offset = [&](const Strides& stride, int image, int row, int col) {
    return image * stride.n + row * stride.h + (kChannelsLast ? col * stride.w + loader_channel : col);
  };
  const int loader_image = loader_row / height;
  const int loader_image_row = loader_row % height;
  const int x_pixel_stride = static_cast<int>(params.x_stride.w);
  const int y_pixel_stride = static_cast<int>(params.y_stride.w);
  const int load_offset = static_cast<int>(offset(params.x_stride, loader_image, loader_image_row, loader_col));
  const int store_offset = static_cast<int>(offset(params.y_stride, loader_image, loader_image_row, loader_col));
  T* const loader_input =
      inputs_of(loader_channel) + input_offset(loader_image, loader_image_row + pad_top, loader_col + left);
  const T* const loader_output = outputs_of(loader_channel) + output_offset(loader_image, loader_image_row, loader_col);
  // A thread whose column lies beyond the width moves nothing: its first row exceeds every number of rows, and does not
  // overflow when steps are added.
  const int first_loaded_row = loader_col < width ? loader_row : INT_MAX - kPrefetch * plan.rows_per_step;
  const auto has_vector = [&](const TilePosition& position, int step) {
    return first_loaded_row + step * plan.rows_per_step < position.images * height;
  };

  AccessVector<8> prefetched[kPrefetch];
  // The next two serve unaligned rows: vectors of whole maps, cut into rows between registers and shared memory. This
  // one calls f(image, first element of the map) for a vector that exists.
  const auto with_map_vector = [&](const TilePosition& position, int vector, const auto& f) {
    const int image = plan.map_vectors.divide(vector);
    if (image < position.images) f(image, 8 * (vector - image * plan.map_vectors.value));
  };
  // This one calls f(address, i, elements) for those elements first + i of the 8 from `first` on that the map has, two
  // at a time if the width is even. `top`: stored rows above the map.
  const auto cut_into_rows = [&](T* at, int first, int top, int row_pitch, int gap, const auto& f) {
    const auto cut = [&](auto elements) {
      constexpr int kElements = decltype(elements)::value;
      int row = plan.row_elements.divide(first);
      int col = first - row * width;
      at += (row + top) * row_pitch + (row + top) / kSubtile * gap + col;
#pragma unroll
      for (int i = 0; i < 8; i += kElements) {
        if (first + i < plan.map_elements) f(at, i, elements);
        at += kElements;
        col += kElements;
        if (col == width) {
          col = 0;
          row++;
          at += row_pitch - width + ((row + top) % kSubtile == 0 ? gap : 0);
        }
      }
    };
    if (width % 2 == 0) cut(Int<2>{});
    else cut(Int<1>{});
  };

  const auto prefetch = [&](const WorkTile& work_tile) {
    if (!has_channel(work_tile, loader_channel)) return;
    const TilePosition position(params, plan, work_tile.index);
    if constexpr (Traits::kUnalignedRows) {
      if (plan.unaligned_rows) {
        const T* const x = static_cast<const T*>(params.x) + work_tile.channel * params.x_stride.c +
                           position.image * params.x_stride.n;
#pragma unroll
        for (int step = 0; step < kPrefetch; step++)
          with_map_vector(position, thread + step * threads, [&](int image, int first) {
            const T* const from = x + image * params.x_stride.n + first;
            if (first + 8 <= plan.map_elements) {
              prefetched[step] = load_global<8>(from);
            } else {
#pragma unroll
              for (int i = 0; i < 7; i++)
                if (first + i < plan.map_elements) prefetched[step].values[i] = load_global<1>(from + i).values[0];
            }
          });
        return;
      }
    }
    const T* const x = static_cast<const T*>(params.x) + work_tile.channel * params.x_stride.c +
                       position.image * params.x_stride.n + load_offset;
#pragma unroll
    for (int step = 0; step < kSteps; step++)
      if (has_vector(position, step))
#pragma unroll
        for (int i = 0; i < kVectors; i++)
          prefetched[kVectors * step + i] = load_global<8>(x + step * plan.load_step + i * x_pixel_stride);
  };

  const auto write_prefetched_inputs = [&] {
    if (!has_channel(work_tile, loader_channel)) return;
    const TilePosition position(params, plan, work_tile.index);
    if constexpr (Traits::kUnalignedRows) {
      if (plan.unaligned_rows) {
        const Fast prologue = elementwise[0];
#pragma unroll
        for (int step = 0; step < kPrefetch; step++)
          with_map_vector(position, thread + step * threads, [&](int image, int first) {
            if constexpr (Traits::kPrologue) prologue.apply(prefetched[step]);
            cut_into_rows(inputs + image * plan.image_pitch + left, first, pad_top, pitch, plan.gap,
                          [&](T* to, int i, auto elements) {
                            constexpr int kElements = decltype(elements)::value;
                            store_inputs(to,
                                         reinterpret_cast<const AccessVector<kElements>&>(prefetched[step].values[i]));
                          });
          });
        return;
      }
    }
    if constexpr (kChannelsLast) {
      const int channel_pitch = opaque_if_channels_last(2 * plan.input_channel_pitch);
      char* const to = reinterpret_cast<char*>(loader_input);
#pragma unroll
      for (int i = 0; i < kOctet; i++) {
        const Fast prologue = elementwise[2 * (loader_channel + i)];
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          AccessVector<2> pair = pick(prefetched[2 * step], prefetched[2 * step + 1], i);
          if constexpr (Traits::kPrologue) prologue.apply(pair);
          if (has_vector(position, step)) store_inputs(to + i * channel_pitch + step * (2 * plan.input_step), pair);
        }
      }
    } else {
      const Fast prologue = elementwise[0];
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        if constexpr (Traits::kPrologue) prologue.apply(prefetched[step]);
        if (has_vector(position, step)) store_inputs(loader_input + step * plan.input_step, prefetched[step]);
      }
    }
  };

  // Row by row, whatever the map; a tile comes with its halo, with zeros beyond the map.
  const auto write_inputs = [&] {
    if (!has_channel(work_tile, loader_channel)) return;
    const TilePosition position(params, plan, work_tile.index);
    const int loader_lane = loader_lane_now();
    const Fast prologue = elementwise[0];  // for contiguous rows; in channels_last each channel has its own
    const int first_row = plan.tiled ? position.row - pad_top : 0;
    const int first_col = plan.tiled ? position.col - left : 0;
    const int rows = plan.tiled ? kSubtile * plan.subtile_rows + kernel_h - 1 : height;
    const int cols = plan.tiled ? pitch : width;
    const T* const x =
        static_cast<const T*>(params.x) + work_tile.channel * params.x_stride.c + position.image * params.x_stride.n;
    with_vector_width<kChannelsLast>(plan.load_vector, [&](auto width_constant) {
      constexpr int kVector = decltype(width_constant)::value;
      constexpr int kCols = kChannelsLast ? 1 : kVector;
      for (int line = loader_lane / plan.load_lanes; line < position.images * rows; line += plan.rows_per_step) {
        const int image = line / rows;
        const int row = first_row + line % rows;
        for (int i = loader_lane % plan.load_lanes * kCols; i < cols; i += plan.load_lanes * kCols) {
          const int col = first_col + i;
          AccessVector<kVector> vector{};
          const bool inside = row >= 0 && row < height && col >= 0 && col < width;
          if (inside) {
            vector = load_global<kVector>(x + offset(params.x_stride, image, row, col));
            if constexpr (Traits::kPrologue && !kChannelsLast) prologue.apply(vector);
          }
          T* const to =
              inputs_of(loader_channel) + input_offset(image, row - position.row + pad_top, col - position.col + left);
          if constexpr (kChannelsLast) {
#pragma unroll
            for (int c = 0; c < kVector; c++) {
              AccessVector<1> value{vector.values[c]};
              if constexpr (Traits::kPrologue)
                if (inside) elementwise[2 * (loader_channel + c)].apply(value);
              store_inputs(to + c * plan.input_channel_pitch, value);
            }
          } else {
            store_inputs(to, vector);
          }
        }
      }
    });
  };

  // Writes each tap row between zeros, which are there from the start and make the matrix banded; and all of them
  // twice: the second copy lies one element further, so that each lane finds its pairs aligned.
  T* const team_taps = taps + team * 2 * kernel_h * plan.tap_pitch;
  const auto write_taps = [&] {
    const T* const weight =
        static_cast<const T*>(params.weight) + int64_t{work_tile.channel + team} * kernel_h * kernel_w;
    const int kernel = kernel_h * kernel_w;
    for (int i = team_thread; i < kernel; i += team_threads) {
      const int tap = i / kernel_w * plan.tap_pitch + i % kernel_w + lead + kSubtile - 1;
      team_taps[tap] = team_taps[kernel_h * plan.tap_pitch + tap + 1] = weight[params.flip_taps ? kernel - 1 - i : i];
    }
  };
  // With g = lane / 4 and t = lane % 4, a lane of the B operand holds taps[dy][i - g - lead] for the stored columns
  // i = 2t, 2t + 1, 2t + 8, 2t + 9. They start at element 7 - g of a stored tap row, which is odd for even g: a 32-bit
  // load then needs the shifted copy.
  const int use_shifted_copy = (lane / 4 + 1) % 2;
  const T* const lane_taps =
      team_taps + use_shifted_copy * (kernel_h * plan.tap_pitch + 1) + lane % 4 * 2 + kSubtile - 1 - lane / 4;
  const auto load_toeplitz = [&](uint32_t (&b)[kKSteps][2], int dy) {
#pragma unroll
    for (int s = 0; s < kKSteps; s++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        b[s][half] = *reinterpret_cast<const uint32_t*>(lane_taps + dy * plan.tap_pitch + kMmaK * s + kSubtile * half);
  };
  uint32_t toeplitz[kKernelH ? kKernelH : 1][kKSteps][2];
  float acc[kSubtile][4];
  // Sums the taps, from the bias on. The input row `row` of a window meets tap row row - o for output row o.
  const auto accumulate = [&](const LaneAddresses& addresses) {
    const float bias = elementwise[2 * team + 1].bias;
    const float start[4] = {bias, bias, bias, bias};
    if constexpr (kKernelH > 0) {
      const uint32_t next_subtile_row = addresses.inputs + 2 * plan.gap;  // kernels up to 9 high reach no further gap
#pragma unroll
      for (int row = 0; row < kSubtile + kKernelH - 1; row++) {
        uint32_t a[4];
        ldmatrix_x4(a, (row < kSubtile ? addresses.inputs : next_subtile_row) + 2 * row * pitch);
#pragma unroll
        for (int o = 0; o < kSubtile; o++)
          if (row - o >= 0 && row - o < kKernelH)
            mma_m16n8k16<T>(acc[o], a, toeplitz[row - o][0], row == o ? start : acc[o]);
      }
    } else {
#pragma unroll
      for (int o = 0; o < kSubtile; o++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[o][i] = bias;
      uint32_t toeplitz_ring[kSubtile][kKSteps][2];  // fragments of the last 8 tap rows
      uint32_t row_address = addresses.inputs;
      for (int row0 = 0; row0 < kernel_h + kSubtile - 1; row0 += kSubtile) {
#pragma unroll
        for (int i = 0; i < kSubtile; i++) {
          const int row = row0 + i;
          if (row < kernel_h) load_toeplitz(toeplitz_ring[i], row);
          if (row < kernel_h + kSubtile - 1) {
            uint32_t a[kKSteps][4];
#pragma unroll
            for (int s = 0; s < kKSteps; s++) ldmatrix_x4(a[s], row_address + 2 * kMmaK * s);
#pragma unroll
            for (int o = 0; o < kSubtile; o++)
              if (row - o >= 0 && row - o < kernel_h)
#pragma unroll
                for (int s = 0; s < kKSteps; s++)
                  mma_m16n8k16<T>(acc[o], a[s], toeplitz_ring[(i - o + kSubtile) % kSubtile][s], acc[o]);
          }
          row_address += 2 * pitch;
        }
        row_address += 2 * plan.gap;
      }
    }
  };

  // Adds the residual, applies the epilogue (the bias is in the accumulators already) and writes to shared memory.
  const auto apply_epilogue = [&](const LaneAddresses& addresses) {
    const Fast epilogue = elementwise[2 * team + 1];
    const float shift[4] = {epilogue.shift, epilogue.shift, epilogue.shift, epilogue.shift};
    T* const to = outputs_of(team);
    // B[i][j] = 1 if stored column i is column j of the subtile; all zeros without a residual, which saves a branch. A
    // register holds rows i and i + 1 of a column: d = i - left - j.
    uint32_t identity[kKSteps][2];
#pragma unroll
    for (int s = 0; s < kKSteps; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int d = kMmaK * s + kSubtile * half + lane % 4 * 2 - left - lane / 4;
        identity[s][half] = params.residual ? Pair<T>::pack(d == 0, d == -1) : 0;
      }
#pragma unroll
    for (int o = 0; o < kSubtile; o++) {
      float shift_and_residual[4];
      const int row = o + pad_top;
#pragma unroll
      for (int s = 0; s < kKSteps; s++) {
        uint32_t a[4];
        ldmatrix_x4(a, addresses.inputs + 2 * (row * pitch + row / kSubtile * plan.gap + kMmaK * s));
        mma_m16n8k16<T>(shift_and_residual, a, identity[s], s == 0 ? shift : shift_and_residual);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const auto y = [&](int i) { return fmaf(epilogue.activate(acc[o][i]), epilogue.scale, shift_and_residual[i]); };
        const uint32_t bits = Pair<T>::pack(y(2 * half), y(2 * half + 1));
        if (addresses.outputs[half] >= 0)
          *reinterpret_cast<uint32_t*>(to + addresses.outputs[half] + o * out_pitch) = bits;
      }
    }
  };

  const auto store_outputs = [&] {
    if (!has_channel(work_tile, loader_channel)) return;
    const TilePosition position(params, plan, work_tile.index);
    T* const y = static_cast<T*>(params.y) + work_tile.channel * params.y_stride.c + position.image * params.y_stride.n;
    if constexpr (Traits::kUnalignedRows) {
      if (plan.unaligned_rows) {
#pragma unroll
        for (int step = 0; step < kPrefetch; step++)
          with_map_vector(position, thread + step * threads, [&](int image, int first) {
            AccessVector<8> vector;
            cut_into_rows(outputs + image * plan.out_image_pitch, first, 0, out_pitch, plan.out_gap,
                          [&](const T* from, int i, auto elements) {
                            constexpr int kElements = decltype(elements)::value;
                            using Some = AccessVector<kElements>;
                            reinterpret_cast<Some&>(vector.values[i]) = *reinterpret_cast<const Some*>(from);
                          });
            T* const to = y + image * params.y_stride.n + first;
            if (first + 8 <= plan.map_elements) {
              *reinterpret_cast<AccessVector<8>*>(to) = vector;
            } else {
#pragma unroll
              for (int i = 0; i < 7; i++)
                if (first + i < plan.map_elements) reinterpret_cast<uint16_t*>(to)[i] = vector.values[i];
            }
          });
        return;
      }
    }
    if (plan.prefetch) {
#pragma unroll
      for (int step = 0; step < kSteps; step++)
        if (has_vector(position, step)) {
          AccessVector<8> octets[kVectors];
          const T* const from = loader_output + step * plan.output_step;
          if constexpr (kChannelsLast) {
            load_octets(octets, reinterpret_cast<const char*>(from),
                        opaque_if_channels_last(2 * plan.output_channel_pitch));
          } else {
            octets[0] = *reinterpret_cast<const AccessVector<8>*>(from);
          }
#pragma unroll
          for (int i = 0; i < kVectors; i++)
            *reinterpret_cast<AccessVector<8>*>(y + store_offset + step * plan.store_step + i * y_pixel_stride) =
                octets[i];
        }
      return;
    }
    const int rows = min(kSubtile * plan.subtile_rows, height - position.row);
    const int cols = min(out_pitch, width - position.col);
    const int loader_lane = loader_lane_now();
    const int loader_lanes = kChannelsLast ? threads / plan.channel_lanes : threads;
    with_vector_width<kChannelsLast>(plan.store_vector, [&](auto width_constant) {
      constexpr int kVector = decltype(width_constant)::value;
      constexpr int kCols = kChannelsLast ? 1 : kVector;
      for (int line = loader_lane / plan.store_lanes; line < position.images * rows;
           line += loader_lanes / plan.store_lanes) {
        const int image = line / rows;
        const int row = line % rows;
        for (int col = loader_lane % plan.store_lanes * kCols; col < cols; col += plan.store_lanes * kCols) {
          const T* const from = outputs_of(loader_channel) + output_offset(image, row, col);
          AccessVector<kVector> vector;
          if constexpr (kChannelsLast) {
#pragma unroll
            for (int c = 0; c < kVector; c++)
              vector.values[c] = *reinterpret_cast<const uint16_t*>(from + c * plan.output_channel_pitch);
          } else {
            vector = *reinterpret_cast<const AccessVector<kVector>*>(from);
          }
          *reinterpret_cast<AccessVector<kVector>*>(
              y + offset(params.y_stride, image, position.row + row, position.col + col)) = vector;
        }
      }
    });
  };

  // Zeros for the implicit padding, once: nothing below writes there, except for tiles, which bring their own zeros.
  for (int i = thread; i < (plan.input_elements + plan.output_elements + plan.tap_elements) / 8; i += threads)
    reinterpret_cast<uint4*>(smem)[i] = make_uint4(0, 0, 0, 0);
  const bool prefetches = plan.prefetch || (Traits::kUnalignedRows && plan.unaligned_rows);
  if (prefetches) prefetch(work_tile);

  LaneAddresses addresses(plan, team_warp, shared_address(inputs_of(team)));
  bool new_channel = true;
  __syncthreads();
  for (int remaining = count; remaining > 0; remaining--) {
    if (new_channel) {
      if (has_channel(work_tile, team)) {
        write_taps();
        if (team_thread == 0) {
          elementwise[2 * team] = Fast(params.prologue, work_tile.channel + team);
          elementwise[2 * team + 1] = Fast(params.epilogue, work_tile.channel + team);
        }
      }
      __syncthreads();
    }
    if (prefetches) write_prefetched_inputs();
    else write_inputs();
    __syncthreads();

    if (prefetches && remaining > 1) prefetch(work_tile.following(plan, channel_step));
    if constexpr (kKernelH > 0)
      if (new_channel)
#pragma unroll
        for (int dy = 0; dy < kKernelH; dy++) load_toeplitz(toeplitz[dy], dy);

    if (has_channel(work_tile, team))
      for (int m_block = team_warp; m_block < plan.m_blocks; m_block += team_warps) {
        if (plan.m_blocks > team_warps) addresses = LaneAddresses(plan, m_block, shared_address(inputs_of(team)));
        accumulate(addresses);
        apply_epilogue(addresses);
      }
    __syncthreads();
    store_outputs();
    work_tile = work_tile.following(plan, channel_step);
    new_channel = work_tile.index == 0;
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
  const auto with_prologue = [&](auto has_prologue) {
    constexpr bool kPrologue = decltype(has_prologue)::value;
    const auto launch = [&](auto kernel_h, auto k_steps) {
      using Traits =
          MmaTraits<T, decltype(kernel_h)::value, decltype(k_steps)::value, kActivation, kPrologue, kChannelsLast>;
      return launch_mma<Traits>(params, plan, sms, stream);
    };
    constexpr Int<1> one;
    const int rows = unrolled_rows(params, plan);
    if constexpr (!kChannelsLast) {
      if (rows == 3) return launch(Int<3>{}, one);
      if (rows == 5) return launch(Int<5>{}, one);
    }
    if (rows == 7) return launch(Int<7>{}, one);
    if (rows == 9) return launch(Int<9>{}, one);
    if (plan.k_steps == 1) return launch(Int<0>{}, one);
    if constexpr (!kChannelsLast)
      if (plan.k_steps == 3) return launch(Int<0>{}, Int<3>{});
    return launch(Int<0>{}, Int<2>{});
  };
  return params.has_prologue ? with_prologue(std::true_type{}) : with_prologue(std::false_type{});
}

}  // namespace convmixer_fast::cuda
