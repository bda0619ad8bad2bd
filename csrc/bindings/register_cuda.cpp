// Registers the operators for CUDA tensors.
#include "../cuda/common/launch.h"

#include <torch/csrc/stable/accelerator.h>

#include "operators.h"

// A weak symbol, so that this library also links and loads if torch has no CUDA and its registration can be tested
// there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace convmixer_fast {
namespace {

struct Cuda {
  static void depthwise(const DepthwiseParams& params, const Tensor& x) {
    launch(x, [&](cudaStream_t stream) { return cuda::depthwise(params, stream); });
  }
  static void depthwise_wgrad(WgradParams& params, const Tensor& x) {
    size_t bytes = 0;
    launch(x, [&](cudaStream_t) { return cuda::depthwise_wgrad_workspace(params, &bytes); });
    const Tensor workspace = empty_workspace(x, static_cast<int64_t>(bytes));
    params.workspace = workspace.mutable_data_ptr();
    launch(x, [&](cudaStream_t stream) { return cuda::depthwise_wgrad(params, stream); });
  }
  static void activate_pool(const PoolParams& params, const Tensor& x) {
    launch(x, [&](cudaStream_t stream) { return cuda::activate_pool(params, stream); });
  }

 private:
  // Calls launcher(stream) with the current stream of x's device.
  template <class Launcher>
  static void launch(const Tensor& x, const Launcher& launcher) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "x is on CUDA, but this build of torch has no CUDA");
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const cudaError_t status = launcher(static_cast<cudaStream_t>(stream));
    check(status == cudaSuccess, "CUDA error at the launch: ", cudaGetErrorString(status));
  }
};

}  // namespace
}  // namespace convmixer_fast

CONVMIXER_FAST_IMPL(CUDA, Cuda)

// The version of the CUDA runtime that is linked in, such as 13000 for 13.0; convmixer_fast._library reads it.
extern "C" __attribute__((visibility("default"))) int convmixer_fast_cuda_runtime() { return CUDART_VERSION; }
