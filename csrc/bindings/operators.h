// The operators from torch's side: arguments checked, output allocated, params filled, a backend's kernels run.
// One implementation for every backend; a backend is a type with
//   static void depthwise(const DepthwiseParams&, const Tensor& x);
//   static void depthwise_wgrad(WgradParams&, const Tensor& x);  // which sets the workspace
//   static void activate_pool(const PoolParams&, const Tensor& x);
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../params.h"

namespace convmixer_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool condition, const Parts&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

template <class Value>
std::ostream& print_list(std::ostream& out, int64_t count, Value value) {
  out << '(';
  for (int64_t i = 0; i < count; i++) out << (i ? ", " : "") << value(i);
  return out << ')';
}

struct Listed {  // prints as (2, 3)
  const int64_t* values;
  size_t count;
};
inline std::ostream& operator<<(std::ostream& out, Listed list) {
  return print_list(out, list.count, [&](int64_t i) { return list.values[i]; });
}

struct ShapeOf {  // prints as (2, 3)
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, ShapeOf shape) {
  return print_list(out, shape.tensor.dim(), [&](int64_t d) { return shape.tensor.size(d); });
}

struct StridesOf {  // prints as (3, 1)
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, StridesOf strides) {
  return print_list(out, strides.tensor.dim(), [&](int64_t d) { return strides.tensor.stride(d); });
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another type";
  }
}

inline DType dtype_of(const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  check(false, argument, " must be float64, float32, float16 or bfloat16, got ", name_of(tensor.scalar_type()));
  __builtin_unreachable();
}

inline Activation activation_of(int64_t value) {
  check(0 <= value && value <= 2, "activation must be 0 (none), 1 (gelu) or 2 (relu), got ", value);
  return static_cast<Activation>(value);
}

inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// torch's own rule (c10::is_channels_last_strides_2d), which the stable ABI does not offer.
inline bool is_channels_last(const Tensor& t) {
  int64_t least = 0;
  if (t.stride(1) == 0) return false;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;  // N1HW and the like: ambiguous, taken as contiguous
    least = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

// convmixer_fast/_library.py turns such errors into torch.OutOfMemoryError.
constexpr const char* kAllocationFailed = "out of memory: could not allocate ";

// On x's device; null if there is no memory for it.
inline AtenTensorHandle allocate(const Tensor& x, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                 int32_t dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status =
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle);
  return status == AOTI_TORCH_SUCCESS ? handle : nullptr;
}

// what: for the message if there is no memory for it.
template <size_t kDims>
Tensor empty_strided_like(const Tensor& x, std::array<int64_t, kDims> sizes, std::array<int64_t, kDims> strides,
                          const char* what = "the output") {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const AtenTensorHandle handle = allocate(x, kDims, sizes.data(), strides.data(), dtype);
  check(handle != nullptr, kAllocationFailed, what, ", ", Listed{sizes.data(), kDims}, " of ",
        name_of(x.scalar_type()));
  return Tensor(handle);
}

// The tensor itself, or a copy where it is not contiguous.
template <size_t kDims>
Tensor contiguous(const char* argument, const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  std::array<int64_t, kDims> sizes, strides;
  int64_t stride = 1;
  for (size_t d = kDims; d-- > 0;) {
    sizes[d] = tensor.size(d);
    strides[d] = stride;
    stride *= sizes[d];
  }
  const std::string what = std::string("a contiguous copy of ") + argument;
  Tensor copy = empty_strided_like<kDims>(tensor, sizes, strides, what.c_str());
  return torch::stable::copy_(copy, tensor);
}

inline Tensor empty_workspace(const Tensor& x, int64_t bytes) {
  const int64_t stride = 1;
  const AtenTensorHandle handle = allocate(x, 1, &bytes, &stride, aoti_torch_dtype_uint8());
  check(handle != nullptr, kAllocationFailed, "a workspace of ", bytes, " bytes");
  return Tensor(handle);
}

// An output of x's shape in x's memory format.
inline Tensor empty_output(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const auto or_one = [](int64_t size) { return size > 0 ? size : 1; };
  if (is_channels_last(x)) return empty_strided_like<4>(x, {n, c, h, w}, {h * w * c, 1, w * c, c});
  return empty_strided_like<4>(x, {n, c, h, w},
                               {or_one(c) * or_one(h) * or_one(w), or_one(h) * or_one(w), or_one(w), 1});
}

inline bool is_kernel_size(int64_t size) { return 1 <= size && size <= kLargestKernel; }

inline void check_map(const char* argument, const Tensor& x) {
  check(x.dim() == 4, argument, " must be (N, C, H, W), got ", x.dim(), " dimensions: ", ShapeOf{x});
}

struct DeviceOf {  // prints as cuda:0
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, DeviceOf device) {
  switch (device.tensor.device().type()) {
    case torch::headeronly::DeviceType::CPU: return out << "cpu";
    case torch::headeronly::DeviceType::CUDA: return out << "cuda:" << device.tensor.get_device_index();
    case torch::headeronly::DeviceType::Meta: return out << "meta";
    default: return out << "another device";
  }
}

inline void check_beside(const char* argument, const Tensor& tensor, const Tensor& x, const char* x_name = "x") {
  check(tensor.device() == x.device(), argument, " must be on ", x_name, "'s device ", DeviceOf{x}, ", got ",
        DeviceOf{tensor});
}

inline Tensor checked_weight(const Tensor& weight, const Tensor& x, const char* x_name = "x") {
  check_beside("weight", weight, x, x_name);
  check(weight.scalar_type() == x.scalar_type(), "weight must have ", x_name, "'s dtype ", name_of(x.scalar_type()),
        ", got ", name_of(weight.scalar_type()));
  check(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 && is_kernel_size(weight.size(2)) &&
            is_kernel_size(weight.size(3)),
        "weight must be (C, 1, kh, kw) with C = ", x.size(1), " channels as ", x_name, " and kh, kw from 1 to ",
        kLargestKernel, ", got ", ShapeOf{weight});
  return contiguous<4>("weight", weight);
}

inline Tensor checked_vector(const char* argument, const Tensor& vector, const Tensor& x, ScalarType type) {
  check_beside(argument, vector, x);
  check(vector.scalar_type() == type, argument, " must be ", name_of(type), " for ", name_of(x.scalar_type()),
        " x, got ", name_of(vector.scalar_type()));
  check(vector.dim() == 1 && vector.size(0) == x.size(1), argument, " must be (C,) with C = ", x.size(1),
        " channels as x, got ", ShapeOf{vector});
  return contiguous<1>(argument, vector);
}

constexpr const char* kPrologueBias = "prologue[0] (bias)";
constexpr const char* kPrologueScale = "prologue[1] (scale)";
constexpr const char* kPrologueShift = "prologue[2] (shift)";

// bias, scale and shift of one pointwise step, checked; owns contiguous copies where they were needed.
struct Pointwise {
  Tensor bias, scale, shift;
  PointwiseParams params;

  Pointwise(const Tensor& x, const Tensor& bias_, const char* bias_name, const Tensor& scale_, const char* scale_name,
            const Tensor& shift_, const char* shift_name, Activation activation) {
    const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    bias = checked_vector(bias_name, bias_, x, type);
    scale = checked_vector(scale_name, scale_, x, type);
    shift = checked_vector(shift_name, shift_, x, type);
    params = {bias.const_data_ptr(), scale.const_data_ptr(), shift.const_data_ptr(),
              type == ScalarType::Double ? DType::kFloat64 : DType::kFloat32, activation};
  }
};

// An argument by its name.
struct Input {
  const char* name;
  const Tensor& tensor;
};

// Whether no two elements may share memory: true only where each dimension strides over all that the nearer ones span.
inline bool is_injective(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (int64_t d = 0; d < tensor.dim(); d++) {
    if (tensor.size(d) == 0) return true;
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t span = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= span) return false;
    span += (size - 1) * stride;
  }
  return true;
}

// Whether the memory from one's first element to the end of its last overlaps the other's.
inline bool share_memory(const Tensor& one, const Tensor& other) {
  if (one.numel() == 0 || other.numel() == 0) return false;
  const auto begin = [](const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); };
  const auto end = [&](const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); d++) last += (tensor.size(d) - 1) * tensor.stride(d);
    return begin(tensor) + (last + 1) * tensor.element_size();
  };
  return begin(one) < end(other) && begin(other) < end(one);
}

inline void check_apart(const char* argument, const Tensor& tensor, const char* other_argument, const Tensor& other) {
  check(!share_memory(tensor, other), argument, " must not share memory with ", other_argument);
}

// The caller's own output. Kernels read their inputs while others write it, so that they must not overlap; of strided
// tensors the extents are compared. fakes.py has the same checks.
template <size_t kDims>
void check_output(const Tensor& out, std::array<int64_t, kDims> sizes, const std::vector<Input>& inputs) {
  const Tensor& x = inputs.front().tensor;
  check_beside("out", out, x);
  check(out.scalar_type() == x.scalar_type(), "out must have x's dtype ", name_of(x.scalar_type()), ", got ",
        name_of(out.scalar_type()));
  bool fits = out.dim() == static_cast<int64_t>(kDims);
  for (size_t d = 0; d < kDims && fits; d++) fits = out.size(d) == sizes[d];
  check(fits, "out must be ", Listed{sizes.data(), kDims}, ", got ", ShapeOf{out});
  check(is_injective(out), "out must have memory of its own for each element, got strides ", StridesOf{out});
  for (const Input& input : inputs) check_apart("out", out, input.name, input.tensor);
}

// Has autograd see that a tensor was written, by a write of none of its elements: its version counter is not part of
// the stable ABI.
inline void count_write(const Tensor& tensor) {
  Tensor nothing = torch::stable::narrow(const_cast<Tensor&>(tensor), 0, 0, 0);
  torch::stable::zero_(nothing);
}

inline DepthwiseParams depthwise_params(const Tensor& x, const Tensor& weight, const Tensor& y) {
  DepthwiseParams params{};
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.batch = x.size(0), params.channels = x.size(1), params.height = x.size(2), params.width = x.size(3);
  params.x_stride = strides_of(x), params.y_stride = strides_of(y);
  params.kernel_h = weight.size(2), params.kernel_w = weight.size(3);
  params.pad_top = (params.kernel_h - 1) / 2, params.pad_left = (params.kernel_w - 1) / 2;
  params.dtype = dtype_of("x", x);
  return params;
}

template <class Backend>
Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_map("x", x);
  dtype_of("x", x);
  const Tensor taps = checked_weight(weight, x);
  Tensor bias_vector;
  if (bias) bias_vector = checked_vector("bias", *bias, x, x.scalar_type());
  Tensor y = empty_output(x);
  DepthwiseParams params = depthwise_params(x, taps, y);
  params.epilogue.bias = bias ? bias_vector.const_data_ptr() : nullptr;
  params.epilogue.vector_dtype = params.dtype;
  if (y.numel() > 0) Backend::depthwise(params, x);
  return y;
}

// The gradient of depthwise_conv2d's x, given that of its output.
template <class Backend>
Tensor depthwise_conv2d_dgrad(const Tensor& gy, const Tensor& weight) {
  check_map("gy", gy);
  dtype_of("gy", gy);
  const Tensor taps = checked_weight(weight, gy, "gy");
  Tensor gx = empty_output(gy);
  DepthwiseParams params = depthwise_params(gy, taps, gx);
  params.flip_taps = true;
  params.pad_top = params.kernel_h / 2, params.pad_left = params.kernel_w / 2;
  params.epilogue.vector_dtype = params.dtype;
  if (gx.numel() > 0) Backend::depthwise(params, gy);
  return gx;
}

// The gradients of depthwise_conv2d's weight and, if `bias`, of its bias (else of no elements).
template <class Backend>
std::tuple<Tensor, Tensor> depthwise_conv2d_wgrad(const Tensor& x, const Tensor& gy, int64_t kernel_h, int64_t kernel_w,
                                                  bool bias) {
  check_map("x", x);
  const DType dtype = dtype_of("x", x);
  check_beside("gy", gy, x);
  check(gy.scalar_type() == x.scalar_type(), "gy must have x's dtype ", name_of(x.scalar_type()), ", got ",
        name_of(gy.scalar_type()));
  check_map("gy", gy);
  bool same_shape = true;
  for (int64_t d = 0; d < 4; d++) same_shape = same_shape && gy.size(d) == x.size(d);
  check(same_shape, "gy must have x's shape ", ShapeOf{x}, ", got ", ShapeOf{gy});
  check(is_kernel_size(kernel_h) && is_kernel_size(kernel_w), "kernel_h and kernel_w must be from 1 to ",
        kLargestKernel, ", got ", kernel_h, " and ", kernel_w);
  const int64_t channels = x.size(1);
  Tensor gweight = empty_strided_like<4>(x, {channels, 1, kernel_h, kernel_w},
                                         {kernel_h * kernel_w, kernel_h * kernel_w, kernel_w, 1});
  Tensor gbias = empty_strided_like<1>(x, {bias ? channels : 0}, {1});
  if (x.numel() == 0) {
    torch::stable::zero_(gweight);
    torch::stable::zero_(gbias);
    return {gweight, gbias};
  }
  WgradParams params{};
  params.x = x.const_data_ptr(), params.gy = gy.const_data_ptr();
  params.gweight = gweight.mutable_data_ptr();
  params.gbias = bias ? gbias.mutable_data_ptr() : nullptr;
  params.batch = x.size(0), params.channels = channels, params.height = x.size(2), params.width = x.size(3);
  params.x_stride = strides_of(x), params.gy_stride = strides_of(gy);
  params.kernel_h = kernel_h, params.kernel_w = kernel_w;
  params.pad_top = (kernel_h - 1) / 2, params.pad_left = (kernel_w - 1) / 2;
  params.dtype = dtype;
  Backend::depthwise_wgrad(params, x);
  return {gweight, gbias};
}

template <class Backend>
Tensor fused_depthwise_into(const Tensor* out, const Tensor& x, const Tensor& weight, const Tensor& bias,
                            const Tensor& scale, const Tensor& shift, int64_t activation, bool residual,
                            const std::optional<Tensor>& prologue_bias, const std::optional<Tensor>& prologue_scale,
                            const std::optional<Tensor>& prologue_shift) {
  check_map("x", x);
  dtype_of("x", x);
  const Tensor taps = checked_weight(weight, x);
  const Pointwise epilogue(x, bias, "bias", scale, "scale", shift, "shift", activation_of(activation));
  check(prologue_bias.has_value() == prologue_scale.has_value() &&
            prologue_bias.has_value() == prologue_shift.has_value(),
        "prologue must give all of bias, scale and shift, or none");
  std::optional<Pointwise> prologue;
  if (prologue_bias)
    prologue.emplace(x, *prologue_bias, kPrologueBias, *prologue_scale, kPrologueScale, *prologue_shift, kPrologueShift,
                     activation_of(activation));
  if (out) {
    std::vector<Input> inputs = {{"x", x}, {"weight", weight}, {"bias", bias}, {"scale", scale}, {"shift", shift}};
    if (prologue_bias) {
      inputs.push_back({kPrologueBias, *prologue_bias});
      inputs.push_back({kPrologueScale, *prologue_scale});
      inputs.push_back({kPrologueShift, *prologue_shift});
    }
    check_output<4>(*out, {x.size(0), x.size(1), x.size(2), x.size(3)}, inputs);
    count_write(*out);
  }
  Tensor y = out ? *out : empty_output(x);
  DepthwiseParams params = depthwise_params(x, taps, y);
  params.residual = residual;
  params.epilogue = epilogue.params;
  params.has_prologue = prologue.has_value();
  if (prologue) params.prologue = prologue->params;
  if (y.numel() > 0) Backend::depthwise(params, x);
  return y;
}

template <class Backend>
Tensor fused_depthwise(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& scale,
                       const Tensor& shift, int64_t activation, bool residual,
                       const std::optional<Tensor>& prologue_bias, const std::optional<Tensor>& prologue_scale,
                       const std::optional<Tensor>& prologue_shift) {
  return fused_depthwise_into<Backend>(nullptr, x, weight, bias, scale, shift, activation, residual, prologue_bias,
                                       prologue_scale, prologue_shift);
}

template <class Backend>
void fused_depthwise_out(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& scale,
                         const Tensor& shift, int64_t activation, bool residual,
                         const std::optional<Tensor>& prologue_bias, const std::optional<Tensor>& prologue_scale,
                         const std::optional<Tensor>& prologue_shift, const Tensor& out) {
  fused_depthwise_into<Backend>(&out, x, weight, bias, scale, shift, activation, residual, prologue_bias,
                                prologue_scale, prologue_shift);
}

template <class Backend>
Tensor activate_pool_into(const Tensor* out, const Tensor& x, const Tensor& bias, const Tensor& scale,
                          const Tensor& shift, int64_t activation) {
  check_map("x", x);
  const DType dtype = dtype_of("x", x);
  const Pointwise prologue(x, bias, "bias", scale, "scale", shift, "shift", activation_of(activation));
  const int64_t channels = x.size(1);
  if (out) {
    check_output<2>(*out, {x.size(0), channels}, {{"x", x}, {"bias", bias}, {"scale", scale}, {"shift", shift}});
    check(out->is_contiguous(), "out must be contiguous, got strides ", StridesOf{*out});
    count_write(*out);
  }
  Tensor y = out ? *out : empty_strided_like<2>(x, {x.size(0), channels}, {channels > 0 ? channels : 1, 1});
  PoolParams params{x.const_data_ptr(), y.mutable_data_ptr(), x.size(0), channels,       x.size(2),
                    x.size(3),          strides_of(x),        dtype,     prologue.params};
  if (y.numel() > 0) Backend::activate_pool(params, x);
  return y;
}

template <class Backend>
Tensor activate_pool(const Tensor& x, const Tensor& bias, const Tensor& scale, const Tensor& shift,
                     int64_t activation) {
  return activate_pool_into<Backend>(nullptr, x, bias, scale, shift, activation);
}

template <class Backend>
void activate_pool_out(const Tensor& x, const Tensor& bias, const Tensor& scale, const Tensor& shift,
                       int64_t activation, const Tensor& out) {
  activate_pool_into<Backend>(&out, x, bias, scale, shift, activation);
}

}  // namespace convmixer_fast

#define CONVMIXER_FAST_IMPL(DISPATCH_KEY, BACKEND)                                 \
  STABLE_TORCH_LIBRARY_IMPL(convmixer_fast, DISPATCH_KEY, m) {                     \
    using namespace convmixer_fast;                                                \
    m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d<BACKEND>));             \
    m.impl("depthwise_conv2d_dgrad", TORCH_BOX(&depthwise_conv2d_dgrad<BACKEND>)); \
    m.impl("depthwise_conv2d_wgrad", TORCH_BOX(&depthwise_conv2d_wgrad<BACKEND>)); \
    m.impl("fused_depthwise", TORCH_BOX(&fused_depthwise<BACKEND>));               \
    m.impl("fused_depthwise.out", TORCH_BOX(&fused_depthwise_out<BACKEND>));       \
    m.impl("activate_pool", TORCH_BOX(&activate_pool<BACKEND>));                   \
    m.impl("activate_pool.out", TORCH_BOX(&activate_pool_out<BACKEND>));           \
  }
