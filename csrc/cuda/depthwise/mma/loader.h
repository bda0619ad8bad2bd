// How the threads of the tensor-core kernels divide what they load and store. Host code, no CUDA.
#pragma once
#include <cstdint>

#include "../../../params.h"

namespace convmixer_fast::cuda {

constexpr int kPrefetch = 4;  // 16-byte pieces of the next item that a thread holds in registers
// channels_last: a block works on 16 channels, 32 bytes of a pixel and so a whole sector, or on 8; each of its warps on
// one of them. Threads move an octet of channels at a time. Kernels of two k-steps need more than 128 registers.
constexpr int kOctet = 8;
constexpr int max_channels(int k_steps) { return k_steps == 1 ? 2 * kOctet : kOctet; }
constexpr int kMaxChannelsLastKSteps = 2;

namespace tiles {

// Of dimensions of one element any stride will do: 0 is a multiple of everything.
inline Strides used_strides(const DepthwiseParams& params, Strides stride) {
  if (params.batch == 1) stride.n = 0;
  if (params.channels == 1) stride.c = 0;
  if (params.height == 1) stride.h = 0;
  if (params.width == 1) stride.w = 0;
  return stride;
}

// Elements that one access may move: what base address, the extent of the contiguous dimension and all strides are
// multiples of.
inline int vector_width(const void* base, int64_t extent, const Strides& stride, bool channels_last) {
  const int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) / 2) | extent | stride.n | stride.h |
                       (channels_last ? stride.w : stride.c);
  return bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

inline int lanes_for(int64_t pieces) {
  int lanes = 1;
  while (lanes < pieces && lanes < 32) lanes *= 2;
  return lanes;
}

}  // namespace tiles

}  // namespace convmixer_fast::cuda
