// The operators as torch calls them. Each checks its arguments, allocates its output, fills the params and has a
// backend run its kernels. There is one implementation for all backends; a backend is a type with
//   static void depthwise(const DepthwiseParams&, const Tensor& x);
//   static void depthwise_wgrad(WgradParams&, const Tensor& x);  // allocates the workspace
//   static void activate_pool(const PoolParams&, const Tensor& x);
// in which x tells the device.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../params.h"
#include "allocation.h"
#include "error_text.h"
#include "tensor_checks.h"

namespace convmixer_fast {

constexpr const char* kPrologueBias = "prologue[0] (bias)";
constexpr const char* kPrologueScale = "prologue[1] (scale)";
constexpr const char* kPrologueShift = "prologue[2] (shift)";

// Checked bias, scale and shift of one elementwise step, and contiguous copies of those that were strided.
struct Elementwise {
  Tensor bias;
  Tensor scale;
  Tensor shift;
  ElementwiseParams params;  // points into the three tensors

  Elementwise(const Tensor& x, DType type, const Tensor& bias_, const char* bias_name, const Tensor& scale_,
              const char* scale_name, const Tensor& shift_, const char* shift_name, Activation activation)
      : bias(checked_per_channel(bias_name, bias_, x, type)),
        scale(checked_per_channel(scale_name, scale_, x, type)),
        shift(checked_per_channel(shift_name, shift_, x, type)),
        params{bias.const_data_ptr(), scale.const_data_ptr(), shift.const_data_ptr(), type, activation} {}
};

// The dtype of an Elementwise's tensors for an x of the given dtype.
inline DType elementwise_dtype(DType x) { return x == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

inline DepthwiseParams depthwise_params(const Tensor& x, DType dtype, const Tensor& weight, const Tensor& y) {
  DepthwiseParams params{};
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.batch = x.size(0);
  params.channels = x.size(1);
  params.height = x.size(2);
  params.width = x.size(3);
  params.x_stride = strides_of(x);
  params.y_stride = strides_of(y);
  params.kernel_h = weight.size(2);
  params.kernel_w = weight.size(3);
  params.pad_top = (params.kernel_h - 1) / 2;
  params.pad_left = (params.kernel_w - 1) / 2;
  params.dtype = dtype;
  return params;
}

template <class Backend>
Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_maps("x", x);
  const DType dtype = dtype_of("x", x);
  const Tensor taps = checked_weight(weight, x);
  std::optional<Tensor> contiguous_bias;
  if (bias) contiguous_bias = checked_per_channel("bias", *bias, x, dtype);
  Tensor y = empty_output(x);
  DepthwiseParams params = depthwise_params(x, dtype, taps, y);
  params.epilogue.bias = contiguous_bias ? contiguous_bias->const_data_ptr() : nullptr;
  params.epilogue.param_dtype = params.dtype;
  if (y.numel() > 0) Backend::depthwise(params, x);
  return y;
}

// The gradient of depthwise_conv2d's x, given that of its output: the convolution of gy with the mirrored taps.
template <class Backend>
Tensor depthwise_conv2d_dgrad(const Tensor& gy, const Tensor& weight) {
  check_maps("gy", gy);
  const DType dtype = dtype_of("gy", gy);
  const Tensor taps = checked_weight(weight, gy, "gy");
  Tensor gx = empty_output(gy);
  DepthwiseParams params = depthwise_params(gy, dtype, taps, gx);
  params.flip_taps = true;
  params.pad_top = params.kernel_h / 2;
  params.pad_left = params.kernel_w / 2;
  params.epilogue.param_dtype = params.dtype;
  if (gx.numel() > 0) Backend::depthwise(params, gy);
  return gx;
}

// The gradients of depthwise_conv2d's weight and bias; without `bias` the second has no elements.
template <class Backend>
std::tuple<Tensor, Tensor> depthwise_conv2d_wgrad(const Tensor& x, const Tensor& gy, int64_t kernel_h, int64_t kernel_w,
                                                  bool bias) {
  check_maps("x", x);
  const DType dtype = dtype_of("x", x);
  check_same_device("gy", gy, x);
  check_same_dtype("gy", gy, x);
  check_maps("gy", gy);
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
    zero(gweight);
    zero(gbias);
    return {gweight, gbias};
  }
  WgradParams params{};
  params.x = x.const_data_ptr();
  params.gy = gy.const_data_ptr();
  params.gweight = gweight.mutable_data_ptr();
  params.gbias = bias ? gbias.mutable_data_ptr() : nullptr;
  params.batch = x.size(0);
  params.channels = channels;
  params.height = x.size(2);
  params.width = x.size(3);
  params.x_stride = strides_of(x);
  params.gy_stride = strides_of(gy);
  params.kernel_h = kernel_h;
  params.kernel_w = kernel_w;
  params.pad_top = (kernel_h - 1) / 2;
  params.pad_left = (kernel_w - 1) / 2;
  params.dtype = dtype;
  Backend::depthwise_wgrad(params, x);
  return {gweight, gbias};
}

// `out` receives the result; if it is null, a new tensor does.
template <class Backend>
Tensor fused_depthwise_into(const Tensor* out, const Tensor& x, const Tensor& weight, const Tensor& bias,
                            const Tensor& scale, const Tensor& shift, int64_t activation, bool residual,
                            const std::optional<Tensor>& prologue_bias, const std::optional<Tensor>& prologue_scale,
                            const std::optional<Tensor>& prologue_shift) {
  check_maps("x", x);
  const DType dtype = dtype_of("x", x);
  const DType vector_dtype = elementwise_dtype(dtype);
  const Tensor taps = checked_weight(weight, x);
  const Elementwise epilogue(x, vector_dtype, bias, "bias", scale, "scale", shift, "shift", activation_of(activation));
  check(prologue_bias.has_value() == prologue_scale.has_value() &&
            prologue_bias.has_value() == prologue_shift.has_value(),
        "prologue must give all of bias, scale and shift, or none");
  std::optional<Elementwise> prologue;
  if (prologue_bias)
    prologue.emplace(x, vector_dtype, *prologue_bias, kPrologueBias, *prologue_scale, kPrologueScale, *prologue_shift,
                     kPrologueShift, activation_of(activation));
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
  DepthwiseParams params = depthwise_params(x, dtype, taps, y);
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
  check_maps("x", x);
  const DType dtype = dtype_of("x", x);
  const Elementwise prologue(x, elementwise_dtype(dtype), bias, "bias", scale, "scale", shift, "shift",
                             activation_of(activation));
  const int64_t channels = x.size(1);
  if (out) {
    check_output<2>(*out, {x.size(0), channels}, {{"x", x}, {"bias", bias}, {"scale", scale}, {"shift", shift}});
    check(out->is_contiguous(), "out must be contiguous, got strides ", StridesOf{*out});
    count_write(*out);
  }
  Tensor y = out ? *out : empty_strided_like<2>(x, {x.size(0), channels}, {channels > 0 ? channels : 1, 1});
  PoolParams params{};
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.batch = x.size(0);
  params.channels = channels;
  params.height = x.size(2);
  params.width = x.size(3);
  params.x_stride = strides_of(x);
  params.dtype = dtype;
  params.prologue = prologue.params;
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

// Registers the operators above for a dispatch key of torch, as BACKEND runs them.
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
