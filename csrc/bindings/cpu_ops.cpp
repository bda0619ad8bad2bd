#include "../cpu/kernels.h"
#include "operators.h"

namespace convmixer_fast {
namespace {

struct Cpu {
  static void depthwise(const DepthwiseParams& params, const Tensor&) {
    const cpu::Kernels& kernels = cpu::kernels();
    torch::stable::parallel_for(0, kernels.depthwise_tasks(params), 1,
                                [&](int64_t begin, int64_t end) { kernels.depthwise(params, begin, end); });
  }
  static void depthwise_wgrad(WgradParams& params, const Tensor& x) {
    const cpu::Kernels& kernels = cpu::kernels();
    const Tensor workspace = empty_workspace(x, kernels.depthwise_wgrad_workspace(params));
    params.workspace = workspace.mutable_data_ptr();
    torch::stable::parallel_for(0, kernels.depthwise_wgrad_tasks(params), 1,
                                [&](int64_t begin, int64_t end) { kernels.depthwise_wgrad(params, begin, end); });
    torch::stable::parallel_for(0, kernels.depthwise_wgrad_sum_tasks(params), 1,
                                [&](int64_t begin, int64_t end) { kernels.depthwise_wgrad_sum(params, begin, end); });
  }
  static void activate_pool(const PoolParams& params, const Tensor&) {
    const cpu::Kernels& kernels = cpu::kernels();
    torch::stable::parallel_for(0, kernels.activate_pool_tasks(params), 1,
                                [&](int64_t begin, int64_t end) { kernels.activate_pool(params, begin, end); });
  }
};

}  // namespace
}  // namespace convmixer_fast

CONVMIXER_FAST_IMPL(CPU, Cpu)
