#include "avx512.h"

#include "../network/entry_points.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx512_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
