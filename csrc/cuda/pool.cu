// The launcher of global average pooling.
#include "common/dtypes.cuh"
#include "common/launch.h"
#include "pool/kernel.cuh"

namespace convmixer_fast::cuda {

cudaError_t activate_pool(const PoolParams& params, cudaStream_t stream) {
  const PoolPlan plan = choose_pool_plan(params);
  return without_last_error(
      dispatch_dtype(params.dtype, [&](auto type) { return activate_pool<decltype(type)>(params, plan, stream); }));
}

}  // namespace convmixer_fast::cuda
