// A whole ConvMixer on the CPU: its steps for one instruction set, and the choice among them.
#pragma once
#include <cstdint>

#include "../params.h"

namespace convmixer_fast::cpu {

// The steps of a run are in order, each a number of independent tasks; any split of [0, tasks) over any number of
// threads gives the same bits. The bytes are multiples of 64, and the memory must be aligned to 64.
struct MixerKernels {
  int64_t (*packed_bytes)(const MixerSizes&);
  void (*pack)(const MixerSizes&, const MixerWeights&, void* packed);
  int64_t (*workspace_bytes)(const MixerParams&);
  int64_t (*tasks)(const MixerParams&, MixerStep);
  void (*run)(const MixerParams&, MixerStep, int64_t begin, int64_t end);
};

const MixerKernels& generic_mixer();
#if defined(__x86_64__)
const MixerKernels& avx2_mixer();
const MixerKernels& avx512_mixer();
const MixerKernels& avx512_bf16_mixer();  // for bfloat16 alone
#endif

// The size of a core's L2 cache; 1 MiB where the system does not tell.
int64_t l2_bytes();

// Those of the instruction set that kernels() has chosen, for networks of this type.
const MixerKernels& mixer_kernels(DType dtype);

}  // namespace convmixer_fast::cpu
