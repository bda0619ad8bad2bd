// Moves whole maps in channels_last (Loader::kChannelsLast), one octet of channels of two neighbouring pixels at a
// time, which are transposed in registers: memory has the channels of a pixel next to each other, shared memory the
// pixels of a channel.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../../common/access_vector.cuh"
#include "../../../common/ptx.cuh"
#include "../plan.h"
#include "steps.cuh"

namespace convmixer_fast::cuda {

// Channel c of two neighbouring pixels, whose octets of channels are a and b.
__device__ __forceinline__ AccessVector<2> pick(const AccessVector<8>& a, const AccessVector<8>& b, int c) {
  const uint32_t bits = __byte_perm(reinterpret_cast<const uint32_t*>(a.values)[c / 2],
                                    reinterpret_cast<const uint32_t*>(b.values)[c / 2], c % 2 ? 0x7632 : 0x5410);
  return reinterpret_cast<const AccessVector<2>&>(bits);
}

// The octets of two neighbouring pixels: the first channel's pair lies at the shared address `from`, the others
// pitch_bytes apart.
__device__ __forceinline__ void load_octets(AccessVector<8> (&octets)[2], uint32_t from, int pitch_bytes) {
#pragma unroll
  for (int c = 0; c < kOctet; c += 2) {
    const uint32_t even = load_shared(from + c * pitch_bytes);
    const uint32_t odd = load_shared(from + (c + 1) * pitch_bytes);
    reinterpret_cast<uint32_t*>(octets[0].values)[c / 2] = __byte_perm(even, odd, 0x5410);
    reinterpret_cast<uint32_t*>(octets[1].values)[c / 2] = __byte_perm(even, odd, 0x7632);
  }
}

// Which row a thread has, given its number in order of rows: rows 8 apart lie half the banks apart if maps are 32 wide,
// so a warp that has two rows should have two such rows. rows_per_step: how many there are.
__device__ __forceinline__ int with_rows_apart(int row, int rows_per_step) {
  if (rows_per_step % 16 != 0) return row;
  return row / 16 * 16 + row % 2 * 8 + row / 2 % 8;
}

// What one thread moves: an octet of a pair of pixels in every step.
struct ChannelsLastLane {
  StepsLane steps;
  int col;          // the first pixel's
  bool has_second;  // whether there is a second pixel

  template <class Params>
  __device__ ChannelsLastLane(const Params& params, const MmaPlan& plan) {
    const int threads = plan.steps.threads_per_row;
    const int row = with_rows_apart(threadIdx.x / threads, plan.steps.rows_per_step);
    steps = StepsLane::make<kChannelsLastSteps>(params, plan.shape, plan.steps, plan.tiles_per_channel,
                                                row * threads + threadIdx.x % threads);
    col = 2 * steps.index;
    has_second = col + 1 < static_cast<int>(params.width);
  }
  __device__ int64_t offset(const Strides& stride) const {
    return steps.image * stride.n + steps.row * stride.h + col * stride.w;
  }
  __device__ int stored_offset(const StoredMaps& maps) const { return maps.at(steps.image, steps.row, col); }
};

// From memory through registers to shared memory. The functions' kPairs: whether all maps are of even width, so that
// every pair has its second pixel.
class ChannelsLastReader {
 public:
  // `tensor`: the first image and channel of the CTA's first work tile. `stored`: the first channel's maps in shared
  // memory.
  __device__ ChannelsLastReader(const ChannelsLastLane& lane, const uint16_t* tensor, const Strides& stride,
                                const MapOperand& operand, uint16_t* stored)
      : from_(tensor + lane.offset(stride)), to_(shared_address(stored + lane.stored_offset(operand.maps))) {}

  template <bool kPairs>
  __device__ __forceinline__ void load(const ChannelsLastLane& lane, const StepDistances& distances, int pixel_stride,
                                       bool is_last) {
    const uint32_t steps = lane.steps.steps_in(is_last);
    const uint16_t* from = from_;
#pragma unroll
    for (int step = 0; step < kChannelsLastSteps; step++) {
      if (steps >> step & 1) {
        octets_[step][0] = load_global<kOctet>(from);
        if (kPairs || lane.has_second) octets_[step][1] = load_global<kOctet>(from + pixel_stride);
      }
      from += distance_after<kChannelsLastSteps>(distances, step);
    }
  }
  __device__ __forceinline__ void advance(const TileDistances& tiles, bool is_last) { from_ += tiles.after(is_last); }

  // prologue(c) is the prologue of channel c of the octet: a function of a pair. If there is no second pixel, the pair
  // ends with a zero of the border.
  template <bool kPairs, class Prologue>
  __device__ __forceinline__ void write(const ChannelsLastLane& lane, const MapOperand& operand,
                                        const Prologue& prologue) const {
    const int pitch_bytes = opaque(2 * operand.channel_pitch);
    const uint32_t pixels = kPairs || lane.has_second ? 0xffffffff : 0xffff;
#pragma unroll
    for (int c = 0; c < kOctet; c++) {
      const auto apply = prologue(c);
      uint32_t to = to_ + c * pitch_bytes;
#pragma unroll
      for (int step = 0; step < kChannelsLastSteps; step++) {
        AccessVector<2> pair = pick(octets_[step][0], octets_[step][1], c);
        apply(pair);
        if (lane.steps.steps >> step & 1) store_shared(to, reinterpret_cast<const uint32_t&>(pair) & pixels);
        to += 2 * distance_after<kChannelsLastSteps>(operand.stored_steps, step);
      }
    }
  }

 private:
  const uint16_t* from_;
  uint32_t to_;  // shared address
  AccessVector<kOctet> octets_[kChannelsLastSteps][2];
};

// From shared memory to memory. The functions are the reader's.
class ChannelsLastWriter {
 public:
  __device__ ChannelsLastWriter(const ChannelsLastLane& lane, uint16_t* tensor, const Strides& stride,
                                const MapOperand& operand, const uint16_t* stored)
      : to_(tensor + lane.offset(stride)), from_(shared_address(stored + lane.stored_offset(operand.maps))) {}

  template <bool kPairs>
  __device__ __forceinline__ void store(const ChannelsLastLane& lane, const MapOperand& operand, int pixel_stride,
                                        bool is_last) const {
    const uint32_t steps = lane.steps.steps_in(is_last);
    uint32_t from = from_;
    uint16_t* to = to_;
#pragma unroll
    for (int step = 0; step < kChannelsLastSteps; step++) {
      if (steps >> step & 1) {
        AccessVector<kOctet> octets[2];
        load_octets(octets, from, opaque(2 * operand.channel_pitch));
        *reinterpret_cast<AccessVector<kOctet>*>(to) = octets[0];
        if (kPairs || lane.has_second) *reinterpret_cast<AccessVector<kOctet>*>(to + pixel_stride) = octets[1];
      }
      from += 2 * distance_after<kChannelsLastSteps>(operand.stored_steps, step);
      to += distance_after<kChannelsLastSteps>(operand.steps, step);
    }
  }
  __device__ __forceinline__ void advance(const TileDistances& tiles, bool is_last) { to_ += tiles.after(is_last); }

 private:
  uint16_t* to_;
  uint32_t from_;  // shared address
};

}  // namespace convmixer_fast::cuda
