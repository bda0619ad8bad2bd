// A whole ConvMixer on the CPU, from torch's side: for convmixer_fast/cpu_engine.py, which keeps the arguments right.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <chrono>
#include <cstring>
#include <vector>

#include "../cpu/mixer.h"
#include "../cpu/shared_steps.h"
#include "operators.h"

namespace convmixer_fast {
namespace {

constexpr uintptr_t kAlignment = 64;
constexpr uintptr_t kHugePage = 2 << 20;

constexpr uintptr_t round_up(uintptr_t value, uintptr_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

MixerSizes sizes_of(const Tensor& patch, const Tensor& depthwise, const Tensor& head_weight, int64_t activation) {
  check(patch.dim() == 4, "patch must be (dim, in_channels, ph, pw), got ", ShapeOf{patch});
  check(depthwise.dim() == 5 && depthwise.size(1) == patch.size(0) && depthwise.size(2) == 1,
        "depthwise must be (depth, dim, 1, kh, kw) with dim = ", patch.size(0), ", got ", ShapeOf{depthwise});
  check(head_weight.dim() == 2 && head_weight.size(1) == patch.size(0),
        "head_weight must be (n_classes, dim) with dim = ", patch.size(0), ", got ", ShapeOf{head_weight});
  MixerSizes sizes{};
  sizes.in_channels = patch.size(1), sizes.patch_h = patch.size(2), sizes.patch_w = patch.size(3);
  sizes.dim = depthwise.size(1), sizes.depth = depthwise.size(0);
  sizes.kernel_h = depthwise.size(3), sizes.kernel_w = depthwise.size(4);
  sizes.classes = head_weight.size(0);
  sizes.dtype = dtype_of("patch", patch);
  sizes.activation = activation_of(activation);
  check(sizes.dtype != DType::kFloat64, "patch must be float32, float16 or bfloat16, got float64");
  return sizes;
}

MixerParams params_of(const Tensor& x, const MixerSizes& sizes) {
  check_map("x", x);
  check(dtype_of("x", x) == sizes.dtype, "x must have the weights' dtype, got ", name_of(x.scalar_type()));
  check(x.size(1) == sizes.in_channels && x.size(2) >= sizes.patch_h && x.size(3) >= sizes.patch_w, "x must be (N, ",
        sizes.in_channels, ", H, W) with H >= ", sizes.patch_h, " and W >= ", sizes.patch_w, ", got ", ShapeOf{x});
  MixerParams params{};
  params.sizes = sizes;
  params.x = x.const_data_ptr();
  params.x_stride = strides_of(x);
  params.batch = x.size(0), params.height = x.size(2), params.width = x.size(3);
  params.threads = torch::stable::get_num_threads();
  return params;
}

// So many bytes on like's device, on huge pages where the system has them: a layer's weights and activations are more
// than the TLB covers with small ones.
Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  Tensor tensor = empty_workspace(like, bytes);
#if defined(__linux__)
  const uintptr_t first = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = round_up(first, kHugePage), end = (first + bytes) / kHugePage * kHugePage;
  if (begin < end) {  // refused, the pages stay small
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);  // small ones of an earlier owner
  }
#endif
  return tensor;
}

// Where the steps' memory begins in a workspace, which has a huge page more than they need.
void* aligned(const Tensor& workspace) {
  return reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr()), kHugePage));
}

void check_bytes(const char* argument, const Tensor& tensor, int64_t bytes) {
  check(tensor.scalar_type() == ScalarType::Byte && tensor.is_contiguous() && tensor.numel() >= bytes, argument,
        " must be contiguous uint8 of ", bytes, " bytes, got ", name_of(tensor.scalar_type()), ' ', ShapeOf{tensor});
  check(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0, argument, " must be aligned to ",
        kAlignment, " bytes");
}

void check_shape(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType type) {
  bool fits = tensor.scalar_type() == type && tensor.is_contiguous() && tensor.dim() == int64_t(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) fits = fits && tensor.size(d++) == size;
  check(fits, argument, " must be contiguous, ", name_of(type), " and fit the other weights, got ",
        name_of(tensor.scalar_type()), ' ', ShapeOf{tensor});
}

Tensor mixer_pack(const Tensor& patch, const Tensor& depthwise, const Tensor& pointwise, const Tensor& vectors,
                  const Tensor& head_weight, const Tensor& head_bias) {
  const MixerSizes s = sizes_of(patch, depthwise, head_weight, 0);
  const ScalarType type = patch.scalar_type();
  check_shape("patch", patch, {s.dim, s.in_channels, s.patch_h, s.patch_w}, type);
  check_shape("depthwise", depthwise, {s.depth, s.dim, 1, s.kernel_h, s.kernel_w}, type);
  check_shape("pointwise", pointwise, {s.depth, s.dim, s.dim}, type);
  check_shape("vectors", vectors, {2 * s.depth + 1, 3, s.dim}, ScalarType::Double);
  check_shape("head_weight", head_weight, {s.classes, s.dim}, type);
  check_shape("head_bias", head_bias, {s.classes}, type);
  const cpu::MixerKernels& kernels = cpu::mixer_kernels(s.dtype);
  Tensor packed = empty_bytes(patch, kernels.packed_bytes(s));
  const MixerWeights weights{patch.const_data_ptr(),       depthwise.const_data_ptr(),
                             pointwise.const_data_ptr(),   static_cast<const double*>(vectors.const_data_ptr()),
                             head_weight.const_data_ptr(), head_bias.const_data_ptr()};
  kernels.pack(s, weights, packed.mutable_data_ptr());
  return packed;
}

int64_t mixer_workspace_bytes(const Tensor& x, const Tensor& patch, const Tensor& depthwise,
                              const Tensor& head_weight) {
  const MixerParams params = params_of(x, sizes_of(patch, depthwise, head_weight, 0));
  return cpu::mixer_kernels(params.sizes.dtype).workspace_bytes(params) + kHugePage;
}

// Zeros, beside the weights that mixer_pack has packed.
Tensor mixer_workspace(const Tensor& packed, int64_t bytes) {
  check(packed.scalar_type() == ScalarType::Byte, "packed must be uint8, got ", name_of(packed.scalar_type()));
  check(bytes >= 0, "bytes must be at least 0, got ", bytes);
  Tensor workspace = empty_bytes(packed, bytes);
  std::memset(workspace.mutable_data_ptr(), 0, workspace.numel());
  return workspace;
}

// `seconds`, if it is given, float64 (2 depth + 4), receives the time of every step: patches, project, depthwise and
// pointwise of each layer, pool, head.
Tensor mixer(const Tensor& x, const Tensor& patch, const Tensor& depthwise, const Tensor& head_weight,
             const Tensor& packed, const Tensor& workspace, int64_t activation, bool residual,
             const std::optional<Tensor>& seconds) {
  MixerParams params = params_of(x, sizes_of(patch, depthwise, head_weight, activation));
  const cpu::MixerKernels& kernels = cpu::mixer_kernels(params.sizes.dtype);
  params.sizes.residual = residual;
  const MixerSizes& s = params.sizes;
  check_bytes("packed", packed, kernels.packed_bytes(s));
  check_bytes("workspace", workspace, kernels.workspace_bytes(params) + kHugePage);
  if (seconds) check_shape("seconds", *seconds, {2 * s.depth + 4}, ScalarType::Double);
  params.packed = packed.const_data_ptr();
  params.workspace = aligned(workspace);
  Tensor y = empty_strided_like<2>(x, {params.batch, s.classes}, {s.classes > 0 ? s.classes : 1, 1});
  params.y = y.mutable_data_ptr();
  if (y.numel() == 0) return y;

  std::vector<MixerStep> steps = {{MixerStep::kPatches, 0}, {MixerStep::kProject, 0}};
  for (int64_t layer = 0; layer < s.depth; ++layer) {
    steps.push_back({MixerStep::kDepthwise, layer});
    steps.push_back({MixerStep::kPointwise, layer});
  }
  steps.push_back({MixerStep::kPool, 0});
  steps.push_back({MixerStep::kHead, 0});
  std::vector<int64_t> tasks;
  for (const MixerStep& step : steps) tasks.push_back(kernels.tasks(params, step));

  cpu::SharedSteps shared(tasks, params.threads);
  auto start = cpu::SharedSteps::Clock::now();
  const auto run = [&](size_t step, int64_t begin, int64_t end) { kernels.run(params, steps[step], begin, end); };
  torch::stable::parallel_for(0, params.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) shared.work(thread, run);
  });
  for (size_t step = 0; seconds && step < steps.size(); ++step) {
    static_cast<double*>(seconds->mutable_data_ptr())[step] =
        std::chrono::duration<double>(shared.end(step) - start).count();
    start = shared.end(step);
  }
  return y;
}

}  // namespace
}  // namespace convmixer_fast

STABLE_TORCH_LIBRARY_IMPL(convmixer_fast, CPU, m) {
  m.impl("mixer_pack", TORCH_BOX(&convmixer_fast::mixer_pack));
  m.impl("mixer_workspace_bytes", TORCH_BOX(&convmixer_fast::mixer_workspace_bytes));
  m.impl("mixer_workspace", TORCH_BOX(&convmixer_fast::mixer_workspace));
  m.impl("mixer", TORCH_BOX(&convmixer_fast::mixer));
}
