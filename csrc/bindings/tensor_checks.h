// Checks of the operators' arguments: dtypes, shapes, devices, and that an output shares no memory with an input.
// convmixer_fast/fakes.py has the same checks for tensors without data.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <ostream>
#include <utility>
#include <vector>

#include "../params.h"
#include "allocation.h"
#include "error_text.h"

namespace convmixer_fast {

// torch's number for a dtype. To compare these takes a fraction of the time of Tensor::scalar_type().
inline int32_t dtype_number(const Tensor& tensor) {
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number;
}

inline int32_t dtype_number(DType type) {
  switch (type) {
    case DType::kFloat64: return aoti_torch_dtype_float64();
    case DType::kFloat32: return aoti_torch_dtype_float32();
    case DType::kFloat16: return aoti_torch_dtype_float16();
    case DType::kBFloat16: return aoti_torch_dtype_bfloat16();
  }
  __builtin_unreachable();
}

inline DType dtype_of(const char* argument, const Tensor& tensor) {
  const int32_t number = dtype_number(tensor);
  for (DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64})
    if (number == dtype_number(type)) return type;
  check(false, argument, " must be float64, float32, float16 or bfloat16, got ", DtypeOf{tensor});
  __builtin_unreachable();
}

struct EveryActivation {};  // prints as 0 (none), 1 (gelu) or 2 (relu)
inline std::ostream& operator<<(std::ostream& out, EveryActivation) {
  constexpr size_t kCount = std::size(kActivationNames);
  for (size_t i = 0; i < kCount; i++) {
    const char* const separator = i == 0 ? "" : i + 1 < kCount ? ", " : " or ";
    out << separator << i << " (" << kActivationNames[i] << ')';
  }
  return out;
}

inline Activation activation_of(int64_t value) {
  check(0 <= value && value < int64_t(std::size(kActivationNames)), "activation must be ", EveryActivation{}, ", got ",
        value);
  return static_cast<Activation>(value);
}

inline Strides strides_of(const Tensor& t) {
  const int64_t* const strides = t.strides().data();
  return {strides[0], strides[1], strides[2], strides[3]};
}

inline bool is_kernel_size(int64_t size) { return 1 <= size && size <= kLargestKernel; }

inline void check_maps(const char* argument, const Tensor& x) {
  check(x.dim() == 4, argument, " must be (N, C, H, W), got ", x.dim(), " dimensions: ", ShapeOf{x});
}

// As torch numbers devices, which takes a fraction of the time of comparing Tensor::device().
inline bool on_same_device(const Tensor& one, const Tensor& other) {
  int32_t types[2];
  int32_t indices[2];
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(one.get(), &types[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &types[1]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(one.get(), &indices[0]));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(other.get(), &indices[1]));
  return types[0] == types[1] && indices[0] == indices[1];
}

inline void check_same_device(const char* argument, const Tensor& tensor, const Tensor& x, const char* x_name = "x") {
  check(on_same_device(tensor, x), argument, " must be on ", x_name, "'s device ", DeviceOf{x}, ", got ",
        DeviceOf{tensor});
}

inline void check_same_dtype(const char* argument, const Tensor& tensor, const Tensor& x, const char* x_name = "x") {
  check(dtype_number(tensor) == dtype_number(x), argument, " must have ", x_name, "'s dtype ", DtypeOf{x}, ", got ",
        DtypeOf{tensor});
}

// The weight, contiguous, for the convolution of x.
inline Tensor checked_weight(const Tensor& weight, const Tensor& x, const char* x_name = "x") {
  check_same_device("weight", weight, x, x_name);
  check_same_dtype("weight", weight, x, x_name);
  check(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 && is_kernel_size(weight.size(2)) &&
            is_kernel_size(weight.size(3)),
        "weight must be (C, 1, kh, kw) with C = ", x.size(1), " channels as ", x_name, " and kh, kw from 1 to ",
        kLargestKernel, ", got ", ShapeOf{weight});
  return contiguous<4>("weight", weight);
}

// A bias, scale or shift, contiguous, with one value per channel of x.
inline Tensor checked_per_channel(const char* argument, const Tensor& values, const Tensor& x, DType type) {
  check_same_device(argument, values, x);
  check(dtype_number(values) == dtype_number(type), argument, " must be ", name_of(type), " for ", DtypeOf{x},
        " x, got ", DtypeOf{values});
  check(values.dim() == 1 && values.size(0) == x.size(1), argument, " must be (C,) with C = ", x.size(1),
        " channels as x, got ", ShapeOf{values});
  return contiguous<1>(argument, values);
}

// An argument and its name.
struct Input {
  const char* name;
  const Tensor& tensor;
};

// Whether no two elements can share memory: true only if the stride of each dimension exceeds all that the dimensions
// with smaller strides span.
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

// Checks an output that the caller has allocated. Threads write it while others still read the inputs, so it must not
// overlap these; extents are compared, also those of strided tensors.
template <size_t kDims>
void check_output(const Tensor& out, std::array<int64_t, kDims> sizes, const std::vector<Input>& inputs) {
  const Tensor& x = inputs.front().tensor;
  check_same_device("out", out, x);
  check_same_dtype("out", out, x);
  bool fits = out.dim() == static_cast<int64_t>(kDims);
  for (size_t d = 0; d < kDims && fits; d++) fits = out.size(d) == sizes[d];
  check(fits, "out must be ", Listed{sizes.data(), kDims}, ", got ", ShapeOf{out});
  check(is_injective(out), "out must have memory of its own for each element, got strides ", StridesOf{out});
  for (const Input& input : inputs) check_apart("out", out, input.name, input.tensor);
}

// Tells autograd that a tensor is written. Its version counter is not part of the stable ABI, but a copy of the tensor
// to itself advances it, and moves no data.
inline void count_write(const Tensor& tensor) { copy(tensor, tensor); }

}  // namespace convmixer_fast
