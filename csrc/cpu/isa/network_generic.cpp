#include "generic.h"

#include "../network/entry_points.h"

namespace convmixer_fast::cpu {

const MixerKernels& generic_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
