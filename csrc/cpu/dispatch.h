// The CPU kernels of one instruction set, and the choice among them.
#pragma once
#include <cstdint>

#include "../params.h"

namespace convmixer_fast::cpu {

// Work is cut into independent tasks; any split of [0, tasks) over any number of threads gives the same bits.
struct Kernels {
  int64_t (*depthwise_tasks)(const DepthwiseParams&);
  void (*depthwise)(const DepthwiseParams&, int64_t begin, int64_t end);
  // The gradients of weight and bias: partial sums to the workspace (bytes, aligned to 64), which are then added up.
  int64_t (*depthwise_wgrad_workspace)(const WgradParams&);
  int64_t (*depthwise_wgrad_tasks)(const WgradParams&);
  void (*depthwise_wgrad)(const WgradParams&, int64_t begin, int64_t end);
  int64_t (*depthwise_wgrad_sum_tasks)(const WgradParams&);
  void (*depthwise_wgrad_sum)(const WgradParams&, int64_t begin, int64_t end);
  int64_t (*activate_pool_tasks)(const PoolParams&);
  void (*activate_pool)(const PoolParams&, int64_t begin, int64_t end);
};

// The steps of a run are in order, each a number of independent tasks; any split of [0, tasks) over any number of
// threads gives the same bits. The bytes are multiples of 64, and the memory must be aligned to 64.
struct MixerKernels {
  int64_t (*packed_bytes)(const MixerSizes&);
  void (*pack)(const MixerSizes&, const MixerWeights&, void* packed);
  int64_t (*workspace_bytes)(const MixerParams&);
  int64_t (*tasks)(const MixerParams&, MixerStep);
  void (*run)(const MixerParams&, MixerStep, int64_t begin, int64_t end);
};

const Kernels& generic_kernels();
const MixerKernels& generic_mixer();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const MixerKernels& avx2_mixer();
const MixerKernels& avx512_mixer();
const MixerKernels& avx512_bf16_mixer();  // for bfloat16 alone
#endif

// The widest instruction set that this CPU has and gains by, or the one that the environment variable CMF_CPU_ISA
// (generic, avx2, avx512, avx512_bf16) names. Throws std::runtime_error if that name is unknown or the CPU lacks it.
const Kernels& kernels();

// The name of the instruction set that kernels() has chosen; throws as that does.
const char* instruction_set();

// Those of the instruction set that kernels() has chosen, for networks of this type.
const MixerKernels& mixer_kernels(DType dtype);

}  // namespace convmixer_fast::cpu
