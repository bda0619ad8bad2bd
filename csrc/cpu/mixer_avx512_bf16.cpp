// AVX-512 F, BW, DQ, VL and BF16.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define CMF_ISA "avx512_bf16"
#define CMF_VECTOR_BYTES 64
#define CMF_VECTOR_REGISTERS 32
#define CMF_F16C
#define CMF_BF16_DOT
#include "mixer_kernel.h"

namespace convmixer_fast::cpu {

const MixerKernels& avx512_bf16_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
