// The CPU kernels of one instruction set, and the choice among the instruction sets.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>

#include "../params.h"

namespace convmixer_fast::cpu {

// The operators on tensors. Work is cut into independent tasks; any split of [0, tasks) over any number of threads
// gives the same bits.
struct OperatorKernels {
  int64_t (*depthwise_tasks)(const DepthwiseParams&);
  void (*depthwise)(const DepthwiseParams&, int64_t begin, int64_t end);
  // The gradients of weight and bias: partial sums to the workspace (bytes, aligned to 64), which are then added up.
  int64_t (*depthwise_wgrad_workspace)(const WgradParams&);
  int64_t (*depthwise_wgrad_tasks)(const WgradParams&);
  void (*depthwise_wgrad)(const WgradParams&, int64_t begin, int64_t end);
  int64_t (*depthwise_wgrad_reduce_tasks)(const WgradParams&);
  void (*depthwise_wgrad_reduce)(const WgradParams&, int64_t begin, int64_t end);
  int64_t (*activate_pool_tasks)(const PoolParams&);
  void (*activate_pool)(const PoolParams&, int64_t begin, int64_t end);
};

// A whole ConvMixer. Its stages run in order, each a number of independent tasks; any split of [0, tasks) over any
// number of threads gives the same bits. The sizes in bytes are multiples of 64, and the memory must be aligned to 64.
struct NetworkKernels {
  int64_t (*packed_bytes)(const MixerSizes&);
  void (*pack)(const MixerSizes&, const MixerWeights&, void* packed);
  int64_t (*workspace_bytes)(const MixerParams&);
  int64_t (*tasks)(const MixerParams&, MixerStage);
  void (*run)(const MixerParams&, MixerStage, int64_t begin, int64_t end);
};

// What an instruction set's translation units in isa/ define.
extern const OperatorKernels kGenericOperators;
extern const NetworkKernels kGenericNetwork;
#if defined(__x86_64__)
extern const OperatorKernels kAvx2Operators;
extern const NetworkKernels kAvx2Network;
extern const OperatorKernels kAvx512Operators;
extern const NetworkKernels kAvx512Network;
extern const NetworkKernels kAvx512Bf16Network;  // for bfloat16 alone
#endif

struct KernelTable {
  const char* name;  // the instruction set: generic, avx2, avx512 or avx512_bf16
  const OperatorKernels& operators;
  const NetworkKernels& float_network;  // for all types but bfloat16
  const NetworkKernels& bfloat16_network;

  const NetworkKernels& network(DType dtype) const {
    return dtype == DType::kBFloat16 ? bfloat16_network : float_network;
  }
};

// The kernels of the widest instruction set that this CPU has and gains by, or of the one that the environment variable
// CMF_CPU_ISA names. Throws std::runtime_error if that name is unknown or the CPU lacks it.
const KernelTable& kernels();

}  // namespace convmixer_fast::cpu
