// AVX2, FMA and F16C.
#pragma GCC target("avx2,fma,f16c")
#define CMF_ISA "avx2"
#define CMF_VECTOR_BYTES 32
#define CMF_VECTOR_REGISTERS 16
#define CMF_F16C
#include "mixer_kernel.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx2_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
