// The units that the tensor-core kernels compute, and how they lie in shared memory. Host code, no CUDA.
#pragma once

namespace convmixer_fast::cuda {

// A unit is 8 x 8 outputs: band b holds rows 8b .. 8b + 7, window q columns 8q .. 8q + 7. The M = 16 rows of an mma are
// 16 units, of one image or of several images of the same channel; one group of 16 units is what a warp computes at
// once.
constexpr int kUnit = 8;
constexpr int kGroupUnits = 16;
constexpr int kMmaDepth = 16;  // K of an mma: input columns
constexpr int kMaxKSteps = 3;  // kernel widths up to 41
constexpr int kMaxWarps = 4;   // a block that works on one channel
// Maps or tiles up to 32 wide under kernels up to 9 wide have one shape in shared memory, so that the addresses are
// constants of the kernel.
constexpr int kFixedWindows = 4;
constexpr int kFixedPitch = 40;      // pitch of the inputs
constexpr int kFixedLeft = 4;        // columns left of the map
constexpr int kFixedOutPitch = 32;   // pitch of the outputs
constexpr int kPointwiseBytes = 32;  // bias, scale, shift of prologue and epilogue
constexpr int kMaxSmem = 96 << 10;   // a block that works on one channel; every GPU since sm_80 gives 99 KB
constexpr int kOctetGap = 32;  // elements after each octet in shared memory, so that two octets lie in different banks

namespace tiles {

// The smallest gap that makes a stride in elements a multiple `slot` of 16 bytes modulo 128: then any 8 consecutive
// units lie in different banks, for ldmatrix and for the stores of the outputs.
constexpr int gap_to_slot(int stride, int slot) { return ((8 * slot - stride) % 64 + 64) % 64; }

}  // namespace tiles

}  // namespace convmixer_fast::cuda
