// The main loop: sums the taps of 16 subtiles on tensor cores. Accumulator o holds output row o of each subtile.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../common/ptx.cuh"
#include "toeplitz.cuh"

namespace convmixer_fast::cuda {

using Accumulators = float[kSubtile][4];

// Where one lane reads and writes the 16 subtiles of an M block.
struct LaneAddresses {
  uint32_t inputs;  // shared address that this lane hands to ldmatrix for row 0 of the subtiles
  int outputs[2];   // elements from a channel's outputs to the lane's, in subtiles g and g + 8; negative: no such
                    // subtile

  // `inputs_address`: of a channel's inputs. left: stored columns left of a subtile.
  __device__ LaneAddresses(const MmaPlan& plan, int left, int m_block, uint32_t inputs_address) {
    const int lane = threadIdx.x % 32;
    // ldmatrix: matrices (subtiles 0-7, columns 0-7), (subtiles 8-15, columns 0-7), then columns 8-15. A subtile beyond
    // the last repeats subtile 0.
    const int subtile = m_block * kSubtilesPerMma + lane % 16;
    const int start = subtile_start(plan.shape, plan.x.maps, subtile < plan.shape.subtiles ? subtile : 0);
    inputs = inputs_address + 2 * (start - left + lane / 16 * 8);
    for (int half = 0; half < 2; half++) {
      const int owned = m_block * kSubtilesPerMma + lane / 4 + 8 * half;
      outputs[half] = owned < plan.shape.subtiles ? subtile_start(plan.shape, plan.y.maps, owned) + lane % 4 * 2 : -1;
    }
  }
};

// With the Toeplitz fragments of all kKernelH tap rows in registers. Row r of a window meets tap row r - o for output
// row o. `maps`: the inputs'; pitch: theirs.
template <class T, int kKernelH>
__device__ __forceinline__ void accumulate_unrolled(const StoredMaps& maps, int pitch, uint32_t inputs, float bias,
                                                    const uint32_t (&toeplitz)[kKernelH][1][2], Accumulators& acc) {
  constexpr int kPadTop = (kKernelH - 1) / 2;
  const float start[4] = {bias, bias, bias, bias};
#pragma unroll
  for (int r = 0; r < kSubtile + kKernelH - 1; r++) {
    constexpr auto gaps_before = [](int row) { return StoredMaps::floor_subtile(row - kPadTop); };
    uint32_t a[4];
    ldmatrix_x4(a, inputs + gaps_before(r) * 2 * maps.gap + (r - kPadTop) * 2 * pitch);
#pragma unroll
    for (int o = 0; o < kSubtile; o++)
      if (r - o >= 0 && r - o < kKernelH) mma_m16n8k16<T>(acc[o], a, toeplitz[r - o][0], r == o ? start : acc[o]);
  }
}

// With any number of tap rows, whose fragments pass through a ring of registers: those of the last 8 tap rows.
template <class T, int kKSteps>
class RingLoop {
 public:
  // inputs: LaneAddresses::inputs.
  __device__ RingLoop(const MmaPlan& plan, int kernel_h, int pad_top, uint32_t inputs, const ToeplitzLane& taps)
      : plan_(plan),
        kernel_h_(kernel_h),
        gap_before_(pad_top % kSubtile),
        row_address_(inputs + 2 * plan.x.maps.row(-pad_top)),
        taps_(taps) {}

  __device__ __forceinline__ void run(float bias, Accumulators& acc) {
#pragma unroll
    for (int o = 0; o < kSubtile; o++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[o][i] = bias;
    int first = 0;
    if (kernel_h_ >= kSubtile) {
      add_rows<Rows::kFirst>(0, acc);
      for (first = kSubtile; first + kSubtile <= kernel_h_; first += kSubtile) add_rows<Rows::kInner>(first, acc);
    }
    for (; first < kernel_h_ + kSubtile - 1; first += kSubtile) add_rows<Rows::kAny>(first, acc);
  }

 private:
  // Which eight rows of a window: the first ones, of which row r meets the tap rows of output rows up to r; those that
  // meet tap rows of all output rows; or any. All but the last know at compile time what they add.
  enum class Rows { kFirst, kInner, kAny };

  template <Rows kRows>
  __device__ __forceinline__ void add_rows(int first, Accumulators& acc) {
    constexpr bool kAny = kRows == Rows::kAny;
#pragma unroll
    for (int i = 0; i < kSubtile; i++) {
      const int r = first + i;
      if (i == gap_before_ && r > 0) row_address_ += 2 * plan_.x.maps.gap;
      if (!kAny || r < kernel_h_) taps_.load_in_place(plan_.tap_pitch, r, toeplitz_[i]);
      if (!kAny || r < kernel_h_ + kSubtile - 1) {
        uint32_t a[kKSteps][4];
#pragma unroll
        for (int s = 0; s < kKSteps; s++) ldmatrix_x4(a[s], row_address_ + 2 * kMmaK * s);
        const auto add = [&](int o, int s) {
          mma_m16n8k16<T>(acc[o], a[s], toeplitz_[(i - o + kSubtile) % kSubtile][s], acc[o]);
        };
        if constexpr (kAny) {
#pragma unroll
          for (int o = 0; o < kSubtile; o++)
            if (r - o >= 0 && r - o < kernel_h_)
#pragma unroll
              for (int s = 0; s < kKSteps; s++) add(o, s);
        } else {
          // All output rows before the next k-step: no mma waits for the sum of the one before.
#pragma unroll
          for (int s = 0; s < kKSteps; s++)
#pragma unroll
            for (int o = 0; o < kSubtile; o++)
              if (kRows == Rows::kInner || i >= o) add(o, s);
        }
      }
      row_address_ += 2 * plan_.x.maps.pitch;
    }
  }

  const MmaPlan& plan_;
  int kernel_h_;
  int gap_before_;  // the row of a window, modulo 8, before which there is a gap
  uint32_t row_address_;
  const ToeplitzLane& taps_;
  uint32_t toeplitz_[kSubtile][kKSteps][2];
};

}  // namespace convmixer_fast::cuda
