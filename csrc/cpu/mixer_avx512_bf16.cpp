#include "isa_avx512_bf16.h"

#include "mixer_kernel.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx512_bf16_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
