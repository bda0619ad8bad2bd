#include "isa_generic.h"

#include "mixer_kernel.h"

namespace convmixer_fast::cpu {

const MixerKernels& generic_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
