// What a kernel is asked to do: plain structs that the bindings fill and the CPU and CUDA kernels read.
// No torch, no CUDA. Strides are in elements; every index into a tensor is 64-bit.
#pragma once
#include <cstdint>

namespace convmixer_fast {

enum class DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// The values are those of the operators' integer argument `activation`.
enum class Activation : int32_t { kNone = 0, kGelu = 1, kRelu = 2 };  // kGelu: the erf form
constexpr const char* kActivationNames[] = {"none", "gelu", "relu"};  // by value

constexpr int64_t kLargestKernel = 1 << 24;  // rows or columns, which every plan can count with in 32 bits

struct Strides {
  int64_t n, c, h, w;
};

// activation(v + bias) * scale + shift, one value a channel. A null pointer stands for 0, 1 and 0.
struct PointwiseParams {
  const void* bias;
  const void* scale;
  const void* shift;
  DType vector_dtype;  // of the three vectors: float32 (float64 for float64 tensors), or the tensor's own
  Activation activation;
};

// y = epilogue(conv(z)) (+ z if residual), where z is x, or prologue(x) rounded to `dtype`.
// The padding is implicit and zero; with a prologue it is z, not x, that is zero there.
// Output (h, w) sees z at (h + i - pad_top, w + j - pad_left), i < kernel_h, j < kernel_w, through weight[i][j], or
// with flip_taps (the gradient of the input) through weight[kernel_h - 1 - i][kernel_w - 1 - j].
struct DepthwiseParams {
  const void* x;
  const void* weight;  // contiguous (channels, kernel_h, kernel_w), of type `dtype`
  void* y;
  int64_t batch, channels, height, width;
  Strides x_stride, y_stride;
  int64_t kernel_h, kernel_w;
  int64_t pad_top, pad_left;
  DType dtype;  // of x, weight and y; sums are float32 (float64 for float64)
  bool has_prologue;
  bool residual;
  bool flip_taps;
  PointwiseParams prologue;
  PointwiseParams epilogue;
};

// The gradients of a plain depthwise convolution's weight and bias, given that of its output:
//   gweight[c][i][j] = sum over n, h, w of x[n, c, h + i - pad_top, w + j - pad_left] * gy[n, c, h, w]
//   gbias[c] = sum over n, h, w of gy[n, c, h, w]
// with x zero outside its map. Partial sums are float32 (float64 for float64); CUDA adds them up in float64, the CPU
// with compensation, in an order that depends on nothing but the params and the device. The result is rounded once.
struct WgradParams {
  const void* x;
  const void* gy;
  void* gweight;    // contiguous (channels, kernel_h, kernel_w), of type `dtype`; null: not wanted
  void* gbias;      // (channels), of type `dtype`; null: not wanted
  void* workspace;  // for partial sums, of as many bytes as the backend asks for
  int64_t batch, channels, height, width;
  Strides x_stride, gy_stride;
  int64_t kernel_h, kernel_w;
  int64_t pad_top, pad_left;
  DType dtype;
};

// y[n, c] = mean over h, w of prologue(x).
struct PoolParams {
  const void* x;
  void* y;  // contiguous (batch, channels)
  int64_t batch, channels, height, width;
  Strides x_stride;
  DType dtype;
  PointwiseParams prologue;
};

// A whole ConvMixer in eval mode, as three kinds of numbers: its own sizes, its weights, and one run of it.
struct MixerSizes {
  int64_t in_channels, patch_h, patch_w;
  int64_t dim, depth, kernel_h, kernel_w;
  int64_t classes;
  DType dtype;  // of the weights, the images and the logits: float32, float16 or bfloat16
  Activation activation;
  bool residual;  // whether the depthwise half of a layer adds its input
};

// Contiguous, of type `dtype` but for the vectors.
struct MixerWeights {
  const void* patch;      // (dim, in_channels, patch_h, patch_w)
  const void* depthwise;  // (depth, dim, kernel_h, kernel_w)
  const void* pointwise;  // (depth, dim, dim)
  const double* vectors;  // (2 depth + 1, 3, dim): bias, scale and shift after each convolution, as they run
  const void* head;       // (classes, dim)
  const void* head_bias;  // (classes)
};

// What happens between two barriers. Layers are numbered from 0.
struct MixerStep {
  enum Kind : int32_t { kPatches, kProject, kDepthwise, kPointwise, kPool, kHead } kind;
  int64_t layer;
};

struct MixerParams {
  MixerSizes sizes;
  const void* x;  // images (batch, in_channels, height, width)
  Strides x_stride;
  int64_t batch, height, width;
  int64_t threads;     // that share the work, the same in all steps of a run; decides nothing but how it is cut
  const void* packed;  // the weights as the kernels want them
  void* workspace;     // for what the layers hand on
  void* y;             // contiguous (batch, classes)
};

}  // namespace convmixer_fast
