// Facts about the build that setup.py writes down; convmixer_fast._library reads them through ctypes. Compiled into
// both libraries, so that each tells which sources it was compiled from.
#include "build_facts.h"  // written by setup.py into the folder of the objects

#define CMF_EXPORT extern "C" __attribute__((visibility("default")))

// The digest of the sources, as csrc/fingerprint.py computes it.
CMF_EXPORT const char* convmixer_fast_sources() { return CMF_SOURCES; }

// CUDA targets such as "sm_80 sm_90a", or the reason why the CUDA kernels were not built.
CMF_EXPORT const char* convmixer_fast_cuda_build() { return CMF_CUDA_BUILD; }
