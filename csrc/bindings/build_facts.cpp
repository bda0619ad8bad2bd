// What setup.py knows of this build, for convmixer_fast._library through ctypes. Compiled into either library, so that
// a library tells by itself which sources it is of.
#include "build_facts.h"  // written by setup.py into the folder of the objects

#define CMF_EXPORT extern "C" __attribute__((visibility("default")))

// The digest of csrc/fingerprint.py.
CMF_EXPORT const char* convmixer_fast_sources() { return CMF_SOURCES; }

// CUDA targets such as "sm_80 sm_90a", or the reason why the CUDA kernels were not built.
CMF_EXPORT const char* convmixer_fast_cuda_build() { return CMF_CUDA_BUILD; }
