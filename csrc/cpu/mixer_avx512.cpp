// AVX-512 F, BW, DQ and VL.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define CMF_ISA "avx512"
#define CMF_VECTOR_BYTES 64
#define CMF_VECTOR_REGISTERS 32
#define CMF_F16C
#include "mixer_kernel.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx512_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
