// The launchers under C names, and the sizes of their parameters, for ctypes (emulated.py).
#include "cuda/common/launch.h"
#include "cuda/pool/plan.h"

using namespace convmixer_fast;

extern "C" {

size_t size_of_depthwise_params() { return sizeof(DepthwiseParams); }
size_t size_of_wgrad_params() { return sizeof(WgradParams); }
size_t size_of_pool_params() { return sizeof(PoolParams); }
size_t size_of_pool_plan() { return sizeof(cuda::PoolPlan); }

int depthwise(const DepthwiseParams* params, cudaStream_t stream) { return cuda::depthwise(*params, stream); }
int depthwise_direct(const DepthwiseParams* params, cudaStream_t stream) {
  return cuda::depthwise_direct(*params, stream);
}
int depthwise_wgrad_workspace(const WgradParams* params, size_t* bytes) {
  return cuda::depthwise_wgrad_workspace(*params, bytes);
}
int depthwise_wgrad(const WgradParams* params, cudaStream_t stream) { return cuda::depthwise_wgrad(*params, stream); }
void choose_pool_plan(const PoolParams* params, cuda::PoolPlan* plan) { *plan = cuda::choose_pool_plan(*params); }
int activate_pool(const PoolParams* params, cudaStream_t stream) { return cuda::activate_pool(*params, stream); }
}
