// The epilogue of the tensor-core kernel: activation, scale, shift and residual in registers, then to shared memory.
//
// Terms: docs/glossary.md.
#pragma once
#include "../../common/activation.cuh"
#include "main_loop.cuh"

namespace convmixer_fast::cuda {

// The B operands that pick a subtile's own columns out of its window: B[i][j] = 1 if stored column i is column j. With
// them the residual is one more product. A register holds rows i and i + 1 of a column.
template <class T, int kKSteps>
struct ShiftedIdentity {
  uint32_t b[kKSteps][2];

  __device__ explicit ShiftedIdentity(int left) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < kKSteps; s++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int distance = kMmaK * s + kSubtile * half + lane % 4 * 2 - left - lane / 4;
        b[s][half] = Pair<T>::pack(distance == 0, distance == -1);
      }
  }
};

// Writes output row o of the lane's two subtiles. `summand`: shift, or shift + residual.
template <class T, class Fast>
__device__ __forceinline__ void write_outputs(const Fast& epilogue, const float (&acc)[4], const float (&summand)[4],
                                              const LaneAddresses& addresses, int row_offset, uint16_t* outputs) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const auto y = [&](int i) { return fmaf(epilogue.activate(acc[i]), epilogue.scale, summand[i]); };
    const uint32_t bits = Pair<T>::pack(y(2 * half), y(2 * half + 1));
    if (addresses.outputs[half] >= 0)
      *reinterpret_cast<uint32_t*>(outputs + addresses.outputs[half] + row_offset) = bits;
  }
}

// The bias is in the accumulators already. in_pitch, out_pitch: those of the stored inputs and outputs.
template <class T, int kKSteps, bool kResidual, class Fast>
__device__ __forceinline__ void apply_epilogue(const Fast& epilogue, const Accumulators& acc, int left,
                                               const LaneAddresses& addresses, int in_pitch, int out_pitch,
                                               uint16_t* outputs) {
  const float shift[4] = {epilogue.shift, epilogue.shift, epilogue.shift, epilogue.shift};
  if constexpr (kResidual) {
    const ShiftedIdentity<T, kKSteps> identity(left);
    const auto add_residual = [&](int row, float (&sum)[4]) {
#pragma unroll
      for (int s = 0; s < kKSteps; s++) {
        uint32_t a[4];
        ldmatrix_x4(a, addresses.inputs + 2 * (row * in_pitch + kMmaK * s));
        mma_m16n8k16<T>(sum, a, identity.b[s], s == 0 ? shift : sum);
      }
    };
    // One row ahead, so that no row waits for its product.
    float sums[2][4];
    add_residual(0, sums[0]);
#pragma unroll
    for (int o = 0; o < kSubtile; o++) {
      if (o + 1 < kSubtile) add_residual(o + 1, sums[(o + 1) % 2]);
      write_outputs<T>(epilogue, acc[o], sums[o % 2], addresses, o * out_pitch, outputs);
    }
  } else {
#pragma unroll
    for (int o = 0; o < kSubtile; o++) write_outputs<T>(epilogue, acc[o], shift, addresses, o * out_pitch, outputs);
  }
}

}  // namespace convmixer_fast::cuda
