// Registers the operators for CPU tensors. (The network's operators are in network_cpu.cpp.)
#include "../cpu/dispatch.h"

#include <stdexcept>
#include <string>

#include "operators.h"
#include "parallel.h"

namespace convmixer_fast {
namespace {

struct Cpu {
  static void depthwise(const DepthwiseParams& params, const Tensor&) {
    const cpu::OperatorKernels& kernels = cpu::kernels().operators;
    parallel_for(kernels.depthwise_tasks(params),
                 [&](int64_t begin, int64_t end) { kernels.depthwise(params, begin, end); });
  }
  static void depthwise_wgrad(WgradParams& params, const Tensor& x) {
    const cpu::OperatorKernels& kernels = cpu::kernels().operators;
    const Tensor workspace = empty_workspace(x, kernels.depthwise_wgrad_workspace(params));
    params.workspace = workspace.mutable_data_ptr();
    parallel_for(kernels.depthwise_wgrad_tasks(params),
                 [&](int64_t begin, int64_t end) { kernels.depthwise_wgrad(params, begin, end); });
    parallel_for(kernels.depthwise_wgrad_reduce_tasks(params),
                 [&](int64_t begin, int64_t end) { kernels.depthwise_wgrad_reduce(params, begin, end); });
  }
  static void activate_pool(const PoolParams& params, const Tensor&) {
    const cpu::OperatorKernels& kernels = cpu::kernels().operators;
    parallel_for(kernels.activate_pool_tasks(params),
                 [&](int64_t begin, int64_t end) { kernels.activate_pool(params, begin, end); });
  }
};

}  // namespace
}  // namespace convmixer_fast

CONVMIXER_FAST_IMPL(CPU, Cpu)

// The name of the instruction set in use, or why there is none; convmixer_fast._library calls it through ctypes, which
// cannot pass exceptions on.
extern "C" __attribute__((visibility("default"))) const char* convmixer_fast_cpu_isa() try {
  return convmixer_fast::cpu::kernels().name;
} catch (const std::runtime_error& error) {
  static const std::string message = error.what();
  return message.c_str();
}
