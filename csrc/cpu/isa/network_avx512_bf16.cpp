#include "avx512_bf16.h"

#include "../network/entry_points.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx512_bf16_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
