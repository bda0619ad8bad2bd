// Any CPU: 16-byte vectors (SSE2, NEON).
#define CMF_ISA "generic"
#define CMF_VECTOR_BYTES 16
#if defined(__aarch64__)
#define CMF_VECTOR_REGISTERS 32
#else
#define CMF_VECTOR_REGISTERS 16
#endif
#include "mixer_kernel.h"

namespace convmixer_fast::cpu {

const MixerKernels& generic_mixer() { return kMixerKernels; }

}  // namespace convmixer_fast::cpu
