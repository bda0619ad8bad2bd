// Depthwise convolution on tensor cores: float16 and bfloat16, kernels up to 41 columns wide, sm_80 and up.
//
// Along a row the convolution is a product with a banded Toeplitz matrix, and the rows of the kernel add up:
//
//   out[unit, o, j] = sum over dy, i of  in[unit, o + dy, i] * taps[dy][i - j]     (i: stored columns of a window)
//
// One mma takes 16 units (M; smem.h) times 8 output columns (N) over 16 stored input columns (K). The
// Toeplitz matrix of a tap row is the B operand: two registers a lane, built once a channel. A stored input row is the
// A operand: loaded once by ldmatrix, it serves every output row of the unit that it reaches.
//
// A block keeps to consecutive items (a channel's images, then the next channel's), so the Toeplitz matrices, bias,
// scale and shift stay in registers. Of an item it
//   1. writes the inputs, through the prologue, into shared memory, whose zero border is the implicit padding,
//   2. loads the next item into registers, in flight during all that follows,
//   3. sums the taps; applies the epilogue in registers; the residual comes through the tensor cores as well, as a
//      product with a shifted identity; lays the outputs down in shared memory,
//   4. writes them to memory, 16 bytes a thread.
// That is for contiguous rows. In channels_last an item is the same of 16 neighbouring channels, each computed by one
// warp; steps 1 and 4 transpose in registers, 8 channels of two neighbouring pixels a thread.
//
// A structural zero of the Toeplitz matrix times Inf is NaN: a pixel that is not finite makes NaN of every output whose
// stored window holds it, up to 15 columns away for kernels up to 9 wide, not only of those its taps reach.
#pragma once
#include <climits>

#include "../../common/access_vector.cuh"
#include "../../common/activation.cuh"
#include "../../common/launch.h"
#include "../../common/shared_memory.h"
#include "plan.h"
#include "work_tile.cuh"

namespace convmixer_fast::cuda {

template <class T_, int kKernelH_, int kKSteps_, bool kGelu_, bool kPrologue_, bool kChannelsLast_>
struct MmaTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_;  // 0: any, the Toeplitz matrices pass through a ring of registers
  static constexpr int kKSteps = kKSteps_;
  static constexpr bool kGelu = kGelu_;  // else ReLU or none: both are a maximum
  static constexpr bool kPrologue = kPrologue_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr bool kFlat = !kChannelsLast && has_flat(kGelu, kKernelH);
  static constexpr int kMaxThreads = 32 * (kChannelsLast ? max_channels(kKSteps) : kMaxWarps);
  // 16 warps of 128 registers an SM: 32 KB of prefetched inputs in flight. Wide kernels need 168: they are not
  // memory-bound.
  static constexpr int kMinBlocks = kChannelsLast ? 1 : kKSteps == 1 ? 4 : 3;
  static_assert(kKernelH == 0 || (kKSteps == 1 && kKernelH <= 9), "all Toeplitz matrices stay in registers");
  static_assert(kKSteps <= kMaxKSteps, "the ring is 16 registers a k-step");
};

template <class T>
struct Pair;  // two values in one register
template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __half2 pair = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
};
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t bits) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
  }
};

// The same value, but new to the compiler: what follows from it is computed again rather than kept in registers.
__device__ __forceinline__ int renew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Channel c of two neighbouring pixels, whose octets of channels are a and b.
__device__ __forceinline__ Piece<2> pick(const Piece<8>& a, const Piece<8>& b, int c) {
  const uint32_t bits = __byte_perm(reinterpret_cast<const uint32_t*>(a.values)[c / 2],
                                    reinterpret_cast<const uint32_t*>(b.values)[c / 2], c % 2 ? 0x7632 : 0x5410);
  return reinterpret_cast<const Piece<2>&>(bits);
}

// The octets of two neighbouring pixels: the first channel's pair lies at `from`, the others `pitch` bytes apart.
__device__ __forceinline__ void load_octets(Piece<8> (&pieces)[2], const char* from, int pitch) {
#pragma unroll
  for (int c = 0; c < kOctet; c += 2) {
    const uint32_t even = *reinterpret_cast<const uint32_t*>(from + c * pitch);
    const uint32_t odd = *reinterpret_cast<const uint32_t*>(from + (c + 1) * pitch);
    reinterpret_cast<uint32_t*>(pieces[0].values)[c / 2] = __byte_perm(even, odd, 0x5410);
    reinterpret_cast<uint32_t*>(pieces[1].values)[c / 2] = __byte_perm(even, odd, 0x7632);
  }
}

// activation(v + bias) * scale + shift of one channel, for results rounded to 16 bits.
template <class T, bool kGelu>
struct alignas(16) FastPointwise {
  float bias, scale, shift;
  float floor;  // ReLU or none is the maximum with this

  __device__ FastPointwise(const PointwiseParams& params, int channel) {
    const Pointwise<T> exact(params, channel);
    bias = exact.bias, scale = exact.scale, shift = exact.shift;
    floor = params.activation == Activation::kRelu ? 0.f : -INFINITY;
  }
  __device__ __forceinline__ float activate(float v) const { return kGelu ? gelu_16bit(v) : max_nan(v, floor); }

  template <int kCount>
  __device__ __forceinline__ void apply(Piece<kCount>& piece) const {
    const auto one = [&](float v) { return fmaf(activate(v + bias), scale, shift); };
    if constexpr (kCount == 1) {
      T& value = reinterpret_cast<T&>(piece.values[0]);
      value = narrow<T>(one(widen(value)));
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; i++) {
        uint32_t& bits = reinterpret_cast<uint32_t*>(piece.values)[i];
        const float2 v = Pair<T>::unpack(bits);
        bits = Pair<T>::pack(one(v.x), one(v.y));
      }
    }
  }
};

// What one lane has to do with the 16 units of a group.
struct MmaUnits {
  uint32_t inputs;  // shared address of the row that this lane hands to ldmatrix
  int outputs[2];   // where the lane's sums of units g and g + 8 go; negative: the unit does not exist

  __device__ MmaUnits(const MmaTile& tile, int group, uint32_t inputs_address) {
    const int lane = threadIdx.x % 32, units_an_image = tile.bands * tile.windows;
    const auto place = [&](int unit, int image_pitch, int pitch, int band_gap) {
      const int image = unit / units_an_image;
      const int band = unit % units_an_image / tile.windows, window = unit % tile.windows;
      return image * image_pitch + band * (kUnit * pitch + band_gap) + window * kUnit;
    };
    // ldmatrix: matrices (units 0-7, columns 0-7), (units 8-15, columns 0-7), then columns 8-15. A unit beyond the last
    // repeats unit 0.
    const int unit = group * kGroupUnits + lane % 16;
    inputs = inputs_address +
             2 * (place(unit < tile.units ? unit : 0, tile.image_pitch, tile.pitch, tile.band_gap) + lane / 16 * 8);
    for (int half = 0; half < 2; half++) {
      const int owned = group * kGroupUnits + lane / 4 + 8 * half;
      outputs[half] = owned < tile.units
                          ? place(owned, tile.out_image_pitch, tile.out_pitch, tile.out_band_gap) + lane % 4 * 2
                          : -1;
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kMinBlocks)
    depthwise_mma_kernel(const __grid_constant__ DepthwiseParams params, const __grid_constant__ MmaTile tile) {
#if __CUDA_ARCH__ >= 800
  using T = typename Traits::T;
  constexpr int kKSteps = Traits::kKSteps, kKernelH = Traits::kKernelH;
  extern __shared__ __align__(128) unsigned char smem[];
  T* const inputs = reinterpret_cast<T*>(smem);
  T* const outputs = inputs + tile.input_elements;
  T* const taps = outputs + tile.output_elements;
  using Fast = FastPointwise<T, Traits::kGelu>;
  Fast* const pointwise = reinterpret_cast<Fast*>(taps + tile.tap_elements);  // each channel's prologue and epilogue
  static_assert(2 * sizeof(Fast) == kPointwiseBytes);
  const int threads = 32 * tile.warps, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  // A team computes a channel: a warp in channels_last, else the block.
  constexpr bool kChannelsLast = Traits::kChannelsLast;
  const int channels = kChannelsLast ? tile.channels : 1, team = kChannelsLast ? warp : 0;
  const int team_thread = kChannelsLast ? lane : thread, team_threads = kChannelsLast ? 32 : threads;
  const int team_warp = kChannelsLast ? 0 : warp, team_warps = kChannelsLast ? 1 : tile.warps;
  const int kernel_h = kKernelH ? kKernelH : static_cast<int>(params.kernel_h);
  const int kernel_w = static_cast<int>(params.kernel_w);
  const int pad_top = kKernelH ? (kKernelH - 1) / 2 : static_cast<int>(params.pad_top);
  const int pitch = kKernelH ? kFixedPitch : tile.pitch, out_pitch = kKernelH ? kFixedOutPitch : tile.out_pitch;
  const int left = kKSteps == 1 ? kFixedLeft : tile.left;
  const int lead = left - static_cast<int>(params.pad_left);  // stored columns before the first tap of a window
  const int height = static_cast<int>(params.height), width = static_cast<int>(params.width);

  // Blocks share the items evenly. Two that work on the octets of the same sectors do so at the same time.
  const int partners = kChannelsLast ? tile.partners : 1, channel_step = channels * partners;
  const int index = static_cast<int>(blockIdx.x), block = index / partners, blocks = gridDim.x / partners;
  const int64_t first = tile.items / partners * block / blocks;
  const int count = static_cast<int>(tile.items / partners * (block + 1) / blocks - first);
  MmaItem item{static_cast<int>(first / tile.items_a_channel) * channel_step + index % partners * channels,
               static_cast<int>(first % tile.items_a_channel)};
  const auto has_channel = [&](const MmaItem& item, int i) {
    return !kChannelsLast || item.channel + i < static_cast<int>(params.channels);
  };

  const auto anew = [](int value) { return kChannelsLast ? renew(value) : value; };
  const auto inputs_of = [&](int i) { return inputs + i * tile.input_channel + i / kOctet * kOctetGap; };
  const auto outputs_of = [&](int i) { return outputs + i * tile.output_channel + i / kOctet * kOctetGap; };
  const auto input_offset = [&](int image, int row, int col) {
    return image * tile.image_pitch + row * pitch + row / kUnit * tile.band_gap + col;
  };
  const auto output_offset = [&](int image, int row, int col) {
    return image * tile.out_image_pitch + row * out_pitch + row / kUnit * tile.out_band_gap + col;
  };

  // What a thread moves of a prefetched item, at equal distances: pieces, or in channels_last pairs of them.
  constexpr int kPieces = kChannelsLast ? 2 : 1, kSteps = kPrefetch / kPieces;
  const auto mover_now = [&] { return kChannelsLast ? anew(thread) / tile.channel_lanes : thread; };
  const int mover = mover_now();
  const int my_channel = kChannelsLast ? thread % tile.channel_lanes * tile.load_vector : 0;
  const int my_row = mover / tile.load_lanes, my_col = mover % tile.load_lanes * (kChannelsLast ? 2 : 8);
  const auto offset = [&](const Strides& stride, int image, int row, int col) {
    return image * stride.n + row * stride.h + (kChannelsLast ? col * stride.w + my_channel : col);
  };
  const int my_image = my_row / height, my_image_row = my_row % height;
  const int x_next = static_cast<int>(params.x_stride.w), y_next = static_cast<int>(params.y_stride.w);
  const int my_load = static_cast<int>(offset(params.x_stride, my_image, my_image_row, my_col));
  const int my_store = static_cast<int>(offset(params.y_stride, my_image, my_image_row, my_col));
  T* const my_input = inputs_of(my_channel) + input_offset(my_image, my_image_row + pad_top, my_col + left);
  const T* const my_output = outputs_of(my_channel) + output_offset(my_image, my_image_row, my_col);
  const int my_first_row = my_col < width ? my_row : INT_MAX - kPrefetch * tile.rows_a_step;
  const auto has_piece = [&](const MmaPlace& place, int step) {
    return my_first_row + step * tile.rows_a_step < place.images * height;
  };

  Piece<8> next[kPrefetch];
  // Of flat planes: pieces of the whole plane, cut into rows between registers and shared memory.
  const auto with_flat_piece = [&](const MmaPlace& place, int piece, const auto& f) {  // f(image, element)
    const int image = tile.plane_pieces.divide(piece);
    if (image < place.images) f(image, 8 * (piece - image * tile.plane_pieces.value));
  };
  // f(address, i) for elements first + i of a plane, two at a time where rows are even, first at `at`.
  const auto cut_into_rows = [&](T* at, int first, int top, int row_pitch, int band_gap, const auto& f) {
    const auto cut = [&](auto elements) {
      constexpr int kElements = decltype(elements)::value;
      int row = tile.row.divide(first), col = first - row * width;
      at += (row + top) * row_pitch + (row + top) / kUnit * band_gap + col;
#pragma unroll
      for (int i = 0; i < 8; i += kElements) {
        if (first + i < tile.plane) f(at, i, elements);
        at += kElements, col += kElements;
        if (col == width) {
          col = 0, row++;
          at += row_pitch - width + ((row + top) % kUnit == 0 ? band_gap : 0);
        }
      }
    };
    if (width % 2 == 0) cut(Int<2>{});
    else cut(Int<1>{});
  };

  const auto prefetch = [&](const MmaItem& item) {
    if (!has_channel(item, my_channel)) return;
    const MmaPlace place(params, tile, item.index);
    if constexpr (Traits::kFlat) {
      if (tile.flat) {
        const T* const x =
            static_cast<const T*>(params.x) + item.channel * params.x_stride.c + place.image * params.x_stride.n;
#pragma unroll
        for (int step = 0; step < kPrefetch; step++)
          with_flat_piece(place, thread + step * threads, [&](int image, int first) {
            const T* const from = x + image * params.x_stride.n + first;
            if (first + 8 <= tile.plane) {
              next[step] = load_global<8>(from);
            } else {
#pragma unroll
              for (int i = 0; i < 7; i++)
                if (first + i < tile.plane) next[step].values[i] = load_global<1>(from + i).values[0];
            }
          });
        return;
      }
    }
    const T* const x =
        static_cast<const T*>(params.x) + item.channel * params.x_stride.c + place.image * params.x_stride.n + my_load;
#pragma unroll
    for (int step = 0; step < kSteps; step++)
      if (has_piece(place, step))
#pragma unroll
        for (int i = 0; i < kPieces; i++)
          next[kPieces * step + i] = load_global<8>(x + step * tile.load_step + i * x_next);
  };

  const auto write_prefetched_inputs = [&] {
    if (!has_channel(item, my_channel)) return;
    const MmaPlace place(params, tile, item.index);
    if constexpr (Traits::kFlat) {
      if (tile.flat) {
        const Fast prologue = pointwise[0];
#pragma unroll
        for (int step = 0; step < kPrefetch; step++)
          with_flat_piece(place, thread + step * threads, [&](int image, int first) {
            if constexpr (Traits::kPrologue) prologue.apply(next[step]);
            cut_into_rows(inputs + image * tile.image_pitch + left, first, pad_top, pitch, tile.band_gap,
                          [&](T* to, int i, auto elements) {
                            constexpr int kElements = decltype(elements)::value;
                            store_inputs(to, reinterpret_cast<const Piece<kElements>&>(next[step].values[i]));
                          });
          });
        return;
      }
    }
    if constexpr (kChannelsLast) {
      const int channel_pitch = anew(2 * tile.input_channel);
      char* const to = reinterpret_cast<char*>(my_input);
#pragma unroll
      for (int i = 0; i < kOctet; i++) {
        const Fast prologue = pointwise[2 * (my_channel + i)];
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          Piece<2> pair = pick(next[2 * step], next[2 * step + 1], i);
          if constexpr (Traits::kPrologue) prologue.apply(pair);
          if (has_piece(place, step)) store_inputs(to + i * channel_pitch + step * (2 * tile.input_step), pair);
        }
      }
    } else {
      const Fast prologue = pointwise[0];
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        if constexpr (Traits::kPrologue) prologue.apply(next[step]);
        if (has_piece(place, step)) store_inputs(my_input + step * tile.input_step, next[step]);
      }
    }
  };

  // Any map: row by row; of a tile with its halo, zeros where that leaves the map.
  const auto write_inputs = [&] {
    if (!has_channel(item, my_channel)) return;
    const MmaPlace place(params, tile, item.index);
    const int mover = mover_now();
    const Fast prologue = pointwise[0];  // of rows
    const int first_row = tile.tiled ? place.row - pad_top : 0, first_col = tile.tiled ? place.col - left : 0;
    const int rows = tile.tiled ? kUnit * tile.bands + kernel_h - 1 : height;
    const int cols = tile.tiled ? pitch : width;
    const T* const x =
        static_cast<const T*>(params.x) + item.channel * params.x_stride.c + place.image * params.x_stride.n;
    with_vector<kChannelsLast>(tile.load_vector, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value, kCols = kChannelsLast ? 1 : kVector;
      for (int line = mover / tile.load_lanes; line < place.images * rows; line += tile.rows_a_step) {
        const int image = line / rows, row = first_row + line % rows;
        for (int i = mover % tile.load_lanes * kCols; i < cols; i += tile.load_lanes * kCols) {
          const int col = first_col + i;
          Piece<kVector> piece{};
          const bool inside = row >= 0 && row < height && col >= 0 && col < width;
          if (inside) {
            piece = load_global<kVector>(x + offset(params.x_stride, image, row, col));
            if constexpr (Traits::kPrologue && !kChannelsLast) prologue.apply(piece);
          }
          T* const to = inputs_of(my_channel) + input_offset(image, row - place.row + pad_top, col - place.col + left);
          if constexpr (kChannelsLast) {
#pragma unroll
            for (int c = 0; c < kVector; c++) {
              Piece<1> value{piece.values[c]};
              if constexpr (Traits::kPrologue)
                if (inside) pointwise[2 * (my_channel + c)].apply(value);
              store_inputs(to + c * tile.input_channel, value);
            }
          } else {
            store_inputs(to, piece);
          }
        }
      }
    });
  };

  // Tap rows between zeros, twice: the second copy one element further, so that each lane finds its pairs aligned.
  T* const team_taps = taps + team * 2 * kernel_h * tile.tap_pitch;
  const auto write_taps = [&] {
    const T* const weight = static_cast<const T*>(params.weight) + int64_t{item.channel + team} * kernel_h * kernel_w;
    const int kernel = kernel_h * kernel_w;
    for (int i = team_thread; i < kernel; i += team_threads) {
      const int place = i / kernel_w * tile.tap_pitch + i % kernel_w + lead + kUnit - 1;
      team_taps[place] = team_taps[kernel_h * tile.tap_pitch + place + 1] =
          weight[params.flip_taps ? kernel - 1 - i : i];
    }
  };
  // Lane (g, t) of the B operand holds taps[dy][i - g - lead] for stored columns i = 2t, 2t + 1, 2t + 8, 2t + 9.
  const int odd = (lane / 4 + 1) % 2;
  const T* const lane_taps = team_taps + odd * (kernel_h * tile.tap_pitch + 1) + lane % 4 * 2 + kUnit - 1 - lane / 4;
  const auto load_toeplitz = [&](uint32_t (&b)[kKSteps][2], int dy) {
#pragma unroll
    for (int s = 0; s < kKSteps; s++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        b[s][half] = *reinterpret_cast<const uint32_t*>(lane_taps + dy * tile.tap_pitch + kMmaDepth * s + kUnit * half);
  };
  uint32_t toeplitz[kKernelH ? kKernelH : 1][kKSteps][2];
  float sums[kUnit][4];
  const auto accumulate = [&](const MmaUnits& units) {
    const float bias = pointwise[2 * team + 1].bias;
    const float start[4] = {bias, bias, bias, bias};
    if constexpr (kKernelH > 0) {
      const uint32_t next_band = units.inputs + 2 * tile.band_gap;
#pragma unroll
      for (int row = 0; row < kUnit + kKernelH - 1; row++) {
        uint32_t a[4];
        ldmatrix_x4(a, (row < kUnit ? units.inputs : next_band) + 2 * row * pitch);
#pragma unroll
        for (int o = 0; o < kUnit; o++)
          if (row - o >= 0 && row - o < kKernelH)
            mma_m16n8k16<T>(sums[o], a, toeplitz[row - o][0], row == o ? start : sums[o]);
      }
    } else {
#pragma unroll
      for (int o = 0; o < kUnit; o++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[o][i] = bias;
      uint32_t ring[kUnit][kKSteps][2];  // of the last 8 tap rows
      uint32_t row_address = units.inputs;
      for (int row0 = 0; row0 < kernel_h + kUnit - 1; row0 += kUnit) {
#pragma unroll
        for (int i = 0; i < kUnit; i++) {
          const int row = row0 + i;
          if (row < kernel_h) load_toeplitz(ring[i], row);
          if (row < kernel_h + kUnit - 1) {
            uint32_t a[kKSteps][4];
#pragma unroll
            for (int s = 0; s < kKSteps; s++) ldmatrix_x4(a[s], row_address + 2 * kMmaDepth * s);
#pragma unroll
            for (int o = 0; o < kUnit; o++)
              if (row - o >= 0 && row - o < kernel_h)
#pragma unroll
                for (int s = 0; s < kKSteps; s++)
                  mma_m16n8k16<T>(sums[o], a[s], ring[(i - o + kUnit) % kUnit][s], sums[o]);
          }
          row_address += 2 * pitch;
        }
        row_address += 2 * tile.band_gap;
      }
    }
  };

  const auto finish = [&](const MmaUnits& units) {
    const Fast epilogue = pointwise[2 * team + 1];
    const float shift[4] = {epilogue.shift, epilogue.shift, epilogue.shift, epilogue.shift};
    T* const to = outputs_of(team);
    // B[i][j] = 1 where stored column i is column j of the window; all zeros without a residual.
    uint32_t identity[kKSteps][2];
#pragma unroll
    for (int s = 0; s < kKSteps; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int d = kMmaDepth * s + kUnit * half + lane % 4 * 2 - left - lane / 4;
        identity[s][half] = params.residual ? Pair<T>::pack(d == 0, d == -1) : 0;
      }
#pragma unroll
    for (int o = 0; o < kUnit; o++) {
      float rest[4];  // shift + residual
      const int row = o + pad_top;
#pragma unroll
      for (int s = 0; s < kKSteps; s++) {
        uint32_t a[4];
        ldmatrix_x4(a, units.inputs + 2 * (row * pitch + row / kUnit * tile.band_gap + kMmaDepth * s));
        mma_m16n8k16<T>(rest, a, identity[s], s == 0 ? shift : rest);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const auto y = [&](int i) { return fmaf(epilogue.activate(sums[o][i]), epilogue.scale, rest[i]); };
        const uint32_t bits = Pair<T>::pack(y(2 * half), y(2 * half + 1));
        if (units.outputs[half] >= 0) *reinterpret_cast<uint32_t*>(to + units.outputs[half] + o * out_pitch) = bits;
      }
    }
  };

  const auto store_outputs = [&] {
    if (!has_channel(item, my_channel)) return;
    const MmaPlace place(params, tile, item.index);
    T* const y = static_cast<T*>(params.y) + item.channel * params.y_stride.c + place.image * params.y_stride.n;
    if constexpr (Traits::kFlat) {
      if (tile.flat) {
#pragma unroll
        for (int step = 0; step < kPrefetch; step++)
          with_flat_piece(place, thread + step * threads, [&](int image, int first) {
            Piece<8> piece;
            cut_into_rows(outputs + image * tile.out_image_pitch, first, 0, out_pitch, tile.out_band_gap,
                          [&](const T* from, int i, auto elements) {
                            constexpr int kElements = decltype(elements)::value;
                            using Some = Piece<kElements>;
                            reinterpret_cast<Some&>(piece.values[i]) = *reinterpret_cast<const Some*>(from);
                          });
            T* const to = y + image * params.y_stride.n + first;
            if (first + 8 <= tile.plane) {
              *reinterpret_cast<Piece<8>*>(to) = piece;
            } else {
#pragma unroll
              for (int i = 0; i < 7; i++)
                if (first + i < tile.plane) reinterpret_cast<uint16_t*>(to)[i] = piece.values[i];
            }
          });
        return;
      }
    }
    if (tile.prefetch) {
#pragma unroll
      for (int step = 0; step < kSteps; step++)
        if (has_piece(place, step)) {
          Piece<8> pieces[kPieces];
          const T* const from = my_output + step * tile.output_step;
          if constexpr (kChannelsLast) {
            load_octets(pieces, reinterpret_cast<const char*>(from), anew(2 * tile.output_channel));
          } else {
            pieces[0] = *reinterpret_cast<const Piece<8>*>(from);
          }
#pragma unroll
          for (int i = 0; i < kPieces; i++)
            *reinterpret_cast<Piece<8>*>(y + my_store + step * tile.store_step + i * y_next) = pieces[i];
        }
      return;
    }
    const int rows = min(kUnit * tile.bands, height - place.row), cols = min(out_pitch, width - place.col);
    const int mover = mover_now(), movers = kChannelsLast ? threads / tile.channel_lanes : threads;
    with_vector<kChannelsLast>(tile.store_vector, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value, kCols = kChannelsLast ? 1 : kVector;
      for (int line = mover / tile.store_lanes; line < place.images * rows; line += movers / tile.store_lanes) {
        const int image = line / rows, row = line % rows;
        for (int col = mover % tile.store_lanes * kCols; col < cols; col += tile.store_lanes * kCols) {
          const T* const from = outputs_of(my_channel) + output_offset(image, row, col);
          Piece<kVector> piece;
          if constexpr (kChannelsLast) {
#pragma unroll
            for (int c = 0; c < kVector; c++)
              piece.values[c] = *reinterpret_cast<const uint16_t*>(from + c * tile.output_channel);
          } else {
            piece = *reinterpret_cast<const Piece<kVector>*>(from);
          }
          *reinterpret_cast<Piece<kVector>*>(y + offset(params.y_stride, image, place.row + row, place.col + col)) =
              piece;
        }
      }
    });
  };

  // The implicit padding, once: nothing below writes there, but for tiles, which bring their own zeros.
  for (int i = thread; i < (tile.input_elements + tile.output_elements + tile.tap_elements) / 8; i += threads)
    reinterpret_cast<uint4*>(smem)[i] = make_uint4(0, 0, 0, 0);
  const bool ahead = tile.prefetch || (Traits::kFlat && tile.flat);
  if (ahead) prefetch(item);

  MmaUnits units(tile, team_warp, shared_address(inputs_of(team)));
  bool new_channel = true;
  __syncthreads();
  for (int remaining = count; remaining > 0; remaining--) {
    if (new_channel) {
      if (has_channel(item, team)) {
        write_taps();
        if (team_thread == 0) {
          pointwise[2 * team] = Fast(params.prologue, item.channel + team);
          pointwise[2 * team + 1] = Fast(params.epilogue, item.channel + team);
        }
      }
      __syncthreads();
    }
    if (ahead) write_prefetched_inputs();
    else write_inputs();
    __syncthreads();

    if (ahead && remaining > 1) prefetch(item.following(tile, channel_step));
    if constexpr (kKernelH > 0)
      if (new_channel)
#pragma unroll
        for (int dy = 0; dy < kKernelH; dy++) load_toeplitz(toeplitz[dy], dy);

    if (has_channel(item, team))
      for (int group = team_warp; group < tile.groups; group += team_warps) {
        if (tile.groups > team_warps) units = MmaUnits(tile, group, shared_address(inputs_of(team)));
        accumulate(units);
        finish(units);
      }
    __syncthreads();
    store_outputs();
    item = item.following(tile, channel_step);
    new_channel = item.index == 0;
  }
#else
  __trap();  // compiled for an older GPU: depthwise.cu does not choose this kernel there
#endif
}

template <class Traits>
cudaError_t launch_mma(const DepthwiseParams& params, const MmaTile& tile, cudaStream_t stream) {
  constexpr auto kernel = depthwise_mma_kernel<Traits>;
  const int smem = tile.smem_bytes(), threads = 32 * tile.warps;
  int device = 0, multiprocessors = 0, blocks_each = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = prepare_shared_memory<kernel>();
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, threads, smem);
  if (status != cudaSuccess) return status;
  const int64_t most = std::max(multiprocessors * blocks_each / tile.partners * tile.partners, tile.partners);
  const int blocks = static_cast<int>(std::min(tile.items, most));
  kernel<<<blocks, threads, smem, stream>>>(params, tile);
  return cudaGetLastError();
}

// Instantiated in depthwise_mma_<dtype>_<activation>[_nhwc].cu, so that they compile side by side.
template <class T, bool kGelu, bool kChannelsLast>
cudaError_t depthwise_mma(const DepthwiseParams& params, const MmaTile& tile, cudaStream_t stream) {
  const auto with_prologue = [&](auto has_prologue) {
    constexpr bool kPrologue = decltype(has_prologue)::value;
    const auto launch = [&](auto kernel_h, auto k_steps) {
      using Traits = MmaTraits<T, decltype(kernel_h)::value, decltype(k_steps)::value, kGelu, kPrologue, kChannelsLast>;
      return launch_mma<Traits>(params, tile, stream);
    };
    constexpr Int<1> one;
    const int rows = unrolled_rows(params, tile);
    if constexpr (!kChannelsLast) {
      if (rows == 3) return launch(Int<3>{}, one);
      if (rows == 5) return launch(Int<5>{}, one);
    }
    if (rows == 7) return launch(Int<7>{}, one);
    if (rows == 9) return launch(Int<9>{}, one);
    if (tile.k_steps == 1) return launch(Int<0>{}, one);
    if constexpr (!kChannelsLast)
      if (tile.k_steps == 3) return launch(Int<0>{}, Int<3>{});
    return launch(Int<0>{}, Int<2>{});
  };
  return params.has_prologue ? with_prologue(std::true_type{}) : with_prologue(std::false_type{});
}

}  // namespace convmixer_fast::cuda
