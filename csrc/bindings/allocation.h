// New tensors on a given one's device: outputs in its memory format, contiguous copies, workspaces.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "error_text.h"

namespace convmixer_fast {

// torch's own rule (c10::is_channels_last_strides_2d), which the stable ABI does not offer.
inline bool is_channels_last(const Tensor& t) {
  const int64_t* const sizes = t.sizes().data();
  const int64_t* const strides = t.strides().data();
  int64_t least = 0;
  if (strides[1] == 0) return false;
  for (int64_t d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;  // N1HW and the like: ambiguous, taken as contiguous
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

// convmixer_fast/_library.py turns errors that begin so into torch.OutOfMemoryError.
constexpr const char* kAllocationFailed = "out of memory: could not allocate ";

// An uninitialised tensor on x's device; null if there is no memory for it.
inline AtenTensorHandle allocate(const Tensor& x, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                 int32_t dtype) {
  int32_t device_type;
  int32_t device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status =
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle);
  return status == AOTI_TORCH_SUCCESS ? handle : nullptr;
}

// An uninitialised tensor with x's dtype and device. `what` names it in the error if there is no memory for it.
template <size_t kDims>
Tensor empty_strided_like(const Tensor& x, std::array<int64_t, kDims> sizes, std::array<int64_t, kDims> strides,
                          const char* what = "the output") {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const AtenTensorHandle handle = allocate(x, kDims, sizes.data(), strides.data(), dtype);
  check(handle != nullptr, kAllocationFailed, what, ", ", Listed{sizes.data(), kDims}, " of ", DtypeOf{x});
  return Tensor(handle);
}

// What torch::stable::copy_ and zero_ do, but these look their operator up by its name in every call.
inline void copy(const Tensor& to, const Tensor& from) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), /*non_blocking=*/0));
}
inline void zero(const Tensor& tensor) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor.get())); }

// The tensor itself if it is contiguous, else a copy that is.
template <size_t kDims>
Tensor contiguous(const char* argument, const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  std::array<int64_t, kDims> sizes;
  std::array<int64_t, kDims> strides;
  int64_t stride = 1;
  for (size_t d = kDims; d-- > 0;) {
    sizes[d] = tensor.size(d);
    strides[d] = stride;
    stride *= sizes[d];
  }
  const std::string what = std::string("a contiguous copy of ") + argument;
  const Tensor copied = empty_strided_like<kDims>(tensor, sizes, strides, what.c_str());
  copy(copied, tensor);
  return copied;
}

// Uninitialised bytes on x's device.
inline Tensor empty_workspace(const Tensor& x, int64_t bytes) {
  const int64_t stride = 1;
  const AtenTensorHandle handle = allocate(x, 1, &bytes, &stride, aoti_torch_dtype_uint8());
  check(handle != nullptr, kAllocationFailed, "a workspace of ", bytes, " bytes");
  return Tensor(handle);
}

// An output of x's shape in x's memory format.
inline Tensor empty_output(const Tensor& x) {
  const int64_t n = x.size(0);
  const int64_t c = x.size(1);
  const int64_t h = x.size(2);
  const int64_t w = x.size(3);
  const auto or_one = [](int64_t size) { return size > 0 ? size : 1; };
  if (is_channels_last(x)) return empty_strided_like<4>(x, {n, c, h, w}, {h * w * c, 1, w * c, c});
  return empty_strided_like<4>(x, {n, c, h, w},
                               {or_one(c) * or_one(h) * or_one(w), or_one(h) * or_one(w), or_one(w), 1});
}

}  // namespace convmixer_fast
