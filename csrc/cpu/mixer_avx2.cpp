#include "isa_avx2.h"

#include "mixer_kernel.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx2_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
