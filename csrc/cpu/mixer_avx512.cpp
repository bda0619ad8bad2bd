#include "isa_avx512.h"

#include "mixer_kernel.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx512_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
