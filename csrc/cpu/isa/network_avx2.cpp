#include "avx2.h"

#include "../network/entry_points.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx2_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
