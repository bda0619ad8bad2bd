// The taps as banded Toeplitz matrices: from memory to shared memory once per channel, from there to fragments.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../common/ptx.cuh"
#include "plan.h"

namespace convmixer_fast::cuda {

// Elements of one channel's taps in shared memory: two copies of each tap row, the second one element further, so that
// each lane finds its pairs aligned. A stored tap row has zeros on both sides, which make the matrix banded.
__device__ __forceinline__ int stored_taps(const MmaPlan& plan, int kernel_h) { return 2 * kernel_h * plan.tap_pitch; }

// Writes a channel's taps between zeros that are there from the start. `weight`: the channel's; lead: stored columns of
// a window before its first tap; thread: number among the threads that write.
__device__ __forceinline__ void write_taps(const DepthwiseParams& params, const MmaPlan& plan, const uint16_t* weight,
                                           int lead, int thread, int threads, uint16_t* taps) {
  const int kernel_h = static_cast<int>(params.kernel_h);
  const int kernel_w = static_cast<int>(params.kernel_w);
  const int kernel = kernel_h * kernel_w;
  const int copy = kernel_h * plan.tap_pitch + 1;  // from an element to its copy
  for (int i = thread; i < kernel; i += threads) {
    const int tap = i / kernel_w * plan.tap_pitch + i % kernel_w + lead + kSubtile - 1;
    const uint16_t value = weight[params.flip_taps ? kernel - 1 - i : i];
    taps[tap] = value;
    taps[tap + copy] = value;
  }
}

// Reads one lane's registers of the B operands.
class ToeplitzLane {
 public:
  // With g = lane / 4 and t = lane % 4, a lane of the B operand holds taps[dy][i - g - lead] for the stored columns
  // i = 2t, 2t + 1, 2t + 8, 2t + 9. They start at element 7 - g of a stored tap row, which is odd for even g: a 32-bit
  // load then needs the shifted copy.
  __device__ ToeplitzLane(const MmaPlan& plan, int kernel_h, const uint16_t* taps) {
    const int lane = threadIdx.x % 32;
    const int use_shifted_copy = (lane / 4 + 1) % 2;
    taps_ = taps + use_shifted_copy * (kernel_h * plan.tap_pitch + 1) + lane % 4 * 2 + kSubtile - 1 - lane / 4;
  }

  template <int kKSteps>
  __device__ __forceinline__ void load(int tap_pitch, int dy, uint32_t (&b)[kKSteps][2]) const {
    load_by([](const uint16_t* from) { return *reinterpret_cast<const uint32_t*>(from); }, tap_pitch, dy, b);
  }
  // The same by volatile loads, for the ring: the compiler may not hoist them out of the loop over rows, where the
  // fragments of all rows would not fit the registers.
  template <int kKSteps>
  __device__ __forceinline__ void load_in_place(int tap_pitch, int dy, uint32_t (&b)[kKSteps][2]) const {
    load_by([](const uint16_t* from) { return load_shared(shared_address(from)); }, tap_pitch, dy, b);
  }

 private:
  template <class Read, int kKSteps>
  __device__ __forceinline__ void load_by(const Read& read, int tap_pitch, int dy, uint32_t (&b)[kKSteps][2]) const {
#pragma unroll
    for (int s = 0; s < kKSteps; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) b[s][half] = read(taps_ + dy * tap_pitch + kMmaK * s + kSubtile * half);
  }

  const uint16_t* taps_;
};

}  // namespace convmixer_fast::cuda
