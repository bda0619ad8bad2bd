// The operators that run a whole ConvMixer on the CPU. convmixer_fast/cpu_engine.py calls them, but anyone may, with
// any arguments: everything is checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/work_stealing.h"
#include "allocation.h"
#include "error_text.h"
#include "huge_pages.h"
#include "parallel.h"
#include "tensor_checks.h"

namespace convmixer_fast {
namespace {

constexpr uintptr_t kAlignment = 64;  // bytes; what the kernels demand of their memory

// Sizes that need this many bytes or more are refused, so that no count overflows 64 bits.
constexpr double kTooManyBytes = 0x1p62;
constexpr int64_t kTooManyTasks = int64_t(1) << 32;

// Bounds what the kernels round a size up to: whole channel vectors, packed A panels, packed B tiles.
double padded(int64_t size) { return double(size) + 128; }

// An upper bound of the packed weights' size. It counts one layer more than there are, because the kernels compute the
// size of a layer even if depth is 0.
double bound_of_packed_bytes(const MixerSizes& s) {
  const double dim = padded(s.dim);
  const double classes = padded(s.classes);
  const double depth = double(s.depth) + 1;
  const double patch = padded(s.in_channels * s.patch_h * s.patch_w);
  const double taps = padded(s.kernel_h) * double(s.kernel_w);
  const double layer = 2 * dim * dim + dim * taps + 16 * dim;  // Strassen's sub-products have 7/4 dim^2 weights
  return sizeof(float) * (dim * patch + depth * layer + (classes + 16) * dim + classes);
}

// An upper bound of the workspace's size.
double bound_of_workspace_bytes(const MixerParams& p) {
  const MixerSizes& s = p.sizes;
  const double dim = padded(s.dim);
  const double patch = padded(s.in_channels * s.patch_h * s.patch_w);
  const double rows = double(p.batch) * double(p.height / s.patch_h);
  const double width = double(p.width / s.patch_w);
  const double blocked_maps = rows * (width + double(s.kernel_w)) * dim;
  const double packed_panels = (rows * width + 16) * (patch + 2 * dim);
  const double pooled = (double(p.batch) + 16) * dim;
  return sizeof(float) * (blocked_maps + packed_panels + pooled) + kHugePage;
}

// Weights must be contiguous, so that a shape as large as this is really in memory: strides of 0 allow for any shape.
void check_weight(const char* argument, const Tensor& tensor, ScalarType type) {
  check(tensor.scalar_type() == type && tensor.is_contiguous(), argument, " must be contiguous, ", name_of(type),
        " as patch, got ", tensor.is_contiguous() ? "" : "strided ", name_of(tensor.scalar_type()), ' ',
        ShapeOf{tensor});
}

MixerSizes sizes_of(const Tensor& patch, const Tensor& depthwise, const Tensor& head_weight, int64_t activation) {
  const auto none_empty = [](const Tensor& tensor, std::initializer_list<int64_t> dims) {
    bool holds = true;
    for (int64_t d : dims) holds = holds && tensor.size(d) >= 1;
    return holds;
  };
  check(patch.dim() == 4 && none_empty(patch, {0, 1, 2, 3}),
        "patch must be (dim, in_channels, ph, pw), each at least 1, got ", ShapeOf{patch});
  check(depthwise.dim() == 5 && depthwise.size(1) == patch.size(0) && depthwise.size(2) == 1 &&
            none_empty(depthwise, {3, 4}),
        "depthwise must be (depth, dim, 1, kh, kw) with dim = ", patch.size(0), " and kh, kw at least 1, got ",
        ShapeOf{depthwise});
  check(head_weight.dim() == 2 && head_weight.size(1) == patch.size(0),
        "head_weight must be (n_classes, dim) with dim = ", patch.size(0), ", got ", ShapeOf{head_weight});
  MixerSizes sizes{};
  sizes.dtype = dtype_of("patch", patch);
  check(sizes.dtype != DType::kFloat64, "patch must be float32, float16 or bfloat16, got float64");
  check_weight("patch", patch, patch.scalar_type());
  check_weight("depthwise", depthwise, patch.scalar_type());
  check_weight("head_weight", head_weight, patch.scalar_type());
  sizes.in_channels = patch.size(1);
  sizes.patch_h = patch.size(2);
  sizes.patch_w = patch.size(3);
  sizes.dim = depthwise.size(1);
  sizes.depth = depthwise.size(0);
  sizes.kernel_h = depthwise.size(3);
  sizes.kernel_w = depthwise.size(4);
  sizes.classes = head_weight.size(0);
  sizes.activation = activation_of(activation);
  check(bound_of_packed_bytes(sizes) < kTooManyBytes,
        "patch, depthwise and head_weight must take fewer than 2^62 bytes packed, got ", ShapeOf{patch}, ", ",
        ShapeOf{depthwise}, " and ", ShapeOf{head_weight});
  return sizes;
}

MixerParams params_of(const Tensor& x, const MixerSizes& sizes) {
  check_maps("x", x);
  check(dtype_of("x", x) == sizes.dtype, "x must have the weights' dtype, got ", name_of(x.scalar_type()));
  check(x.size(1) == sizes.in_channels && x.size(2) >= sizes.patch_h && x.size(3) >= sizes.patch_w, "x must be (N, ",
        sizes.in_channels, ", H, W) with H >= ", sizes.patch_h, " and W >= ", sizes.patch_w, ", got ", ShapeOf{x});
  MixerParams params{};
  params.sizes = sizes;
  params.x = x.const_data_ptr();
  params.x_stride = strides_of(x);
  params.batch = x.size(0);
  params.height = x.size(2);
  params.width = x.size(3);
  params.threads = torch::stable::get_num_threads();
  const double patches =
      double(params.batch) * double(params.height / sizes.patch_h) * double(params.width / sizes.patch_w);
  check(patches < double(kTooManyTasks) && bound_of_workspace_bytes(params) < kTooManyBytes,
        "x must have fewer than 2^32 patches, which take fewer than 2^62 bytes, got ", ShapeOf{x});
  return params;
}

void check_bytes(const char* argument, const Tensor& tensor, int64_t bytes) {
  check(tensor.scalar_type() == ScalarType::Byte && tensor.is_contiguous() && tensor.numel() >= bytes, argument,
        " must be contiguous uint8 of ", bytes, " bytes or more, got ", name_of(tensor.scalar_type()), ' ',
        ShapeOf{tensor});
  check(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0, argument, " must be aligned to ",
        kAlignment, " bytes");
}

void check_shape(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType type) {
  bool fits = tensor.scalar_type() == type && tensor.is_contiguous() && tensor.dim() == int64_t(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) fits = fits && tensor.size(d++) == size;
  check(fits, argument, " must be contiguous, ", name_of(type), ' ', Listed{shape.begin(), shape.size()}, ", got ",
        tensor.is_contiguous() ? "" : "strided ", name_of(tensor.scalar_type()), ' ', ShapeOf{tensor});
}

// The weights as the kernels read them.
Tensor mixer_pack(const Tensor& patch, const Tensor& depthwise, const Tensor& pointwise, const Tensor& vectors,
                  const Tensor& head_weight, const Tensor& head_bias) {
  const MixerSizes s = sizes_of(patch, depthwise, head_weight, 0);
  const ScalarType type = patch.scalar_type();
  check_shape("pointwise", pointwise, {s.depth, s.dim, s.dim}, type);
  check_shape("vectors", vectors, {2 * s.depth + 1, 3, s.dim}, ScalarType::Double);
  check_shape("head_bias", head_bias, {s.classes}, type);
  const cpu::NetworkKernels& kernels = cpu::kernels().network(s.dtype);
  Tensor packed = empty_on_huge_pages(patch, kernels.packed_bytes(s));
  MixerWeights weights{};
  weights.patch = patch.const_data_ptr();
  weights.depthwise = depthwise.const_data_ptr();
  weights.conv1x1 = pointwise.const_data_ptr();
  weights.epilogues = static_cast<const double*>(vectors.const_data_ptr());
  weights.head = head_weight.const_data_ptr();
  weights.head_bias = head_bias.const_data_ptr();
  reporting_no_memory([&] { kernels.pack(s, weights, packed.mutable_data_ptr()); });
  return packed;
}

// The bytes of workspace that a run on x needs.
int64_t mixer_workspace_bytes(const Tensor& x, const Tensor& patch, const Tensor& depthwise,
                              const Tensor& head_weight) {
  const MixerParams params = params_of(x, sizes_of(patch, depthwise, head_weight, 0));
  return cpu::kernels().network(params.sizes.dtype).workspace_bytes(params) + kHugePage;
}

// A workspace of zeros, on the device of the packed weights.
Tensor mixer_workspace(const Tensor& packed, int64_t bytes) {
  check(packed.scalar_type() == ScalarType::Byte, "packed must be uint8, got ", name_of(packed.scalar_type()));
  check(bytes >= 0, "bytes must be at least 0, got ", bytes);
  Tensor workspace = empty_on_huge_pages(packed, bytes);
  std::memset(workspace.mutable_data_ptr(), 0, workspace.numel());
  return workspace;
}

// Runs all stages. If `seconds` is not null, it receives the time of each.
void run_stages(const cpu::NetworkKernels& kernels, const MixerParams& params, double* seconds) {
  std::vector<MixerStage> stages = {{MixerStage::kPackPatches, 0}, {MixerStage::kPatchConv, 0}};
  for (int64_t layer = 0; layer < params.sizes.depth; ++layer) {
    stages.push_back({MixerStage::kDepthwise, layer});
    stages.push_back({MixerStage::kConv1x1, layer});
  }
  stages.push_back({MixerStage::kPool, 0});
  stages.push_back({MixerStage::kHead, 0});
  std::vector<int64_t> tasks;
  for (const MixerStage& stage : stages) {
    tasks.push_back(kernels.tasks(params, stage));
    check(tasks.back() < kTooManyTasks, "x must make fewer than 2^32 tasks of every step, got ", tasks.back(),
          " of one for ", params.batch, " images and ", params.sizes.dim, " channels");
  }

  cpu::WorkStealing shared(tasks, params.threads);
  auto start = cpu::WorkStealing::Clock::now();
  const auto run = [&](size_t stage, int64_t begin, int64_t end) { kernels.run(params, stages[stage], begin, end); };
  parallel_for(params.threads, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) shared.work(thread, run);
  });
  for (size_t stage = 0; seconds && stage < stages.size(); ++stage) {
    seconds[stage] = std::chrono::duration<double>(shared.end(stage) - start).count();
    start = shared.end(stage);
  }
}

// The logits of x. `seconds`, if it is given, is float64 (2 depth + 4,) and receives the time of every stage: patches,
// project, depthwise and conv1x1 of each layer, pool, head.
Tensor mixer(const Tensor& x, const Tensor& patch, const Tensor& depthwise, const Tensor& head_weight,
             const Tensor& packed, const Tensor& workspace, int64_t activation, bool residual,
             const std::optional<Tensor>& seconds) {
  MixerParams params = params_of(x, sizes_of(patch, depthwise, head_weight, activation));
  const cpu::NetworkKernels& kernels = cpu::kernels().network(params.sizes.dtype);
  params.sizes.residual = residual;
  const MixerSizes& s = params.sizes;
  check_bytes("packed", packed, kernels.packed_bytes(s));
  check_bytes("workspace", workspace, kernels.workspace_bytes(params) + kHugePage);
  check_apart("workspace", workspace, "x", x);
  check_apart("workspace", workspace, "packed", packed);
  if (seconds) {
    check_shape("seconds", *seconds, {2 * s.depth + 4}, ScalarType::Double);
    check_apart("seconds", *seconds, "x", x);
    check_apart("seconds", *seconds, "packed", packed);
    check_apart("seconds", *seconds, "workspace", workspace);
  }
  params.packed = packed.const_data_ptr();
  params.workspace = huge_page_aligned(workspace);
  Tensor y = empty_strided_like<2>(x, {params.batch, s.classes}, {s.classes > 0 ? s.classes : 1, 1});
  params.y = y.mutable_data_ptr();
  double* const times = seconds ? static_cast<double*>(seconds->mutable_data_ptr()) : nullptr;
  if (y.numel() > 0) reporting_no_memory([&] { run_stages(kernels, params, times); });
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
