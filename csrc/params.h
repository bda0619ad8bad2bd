// What a kernel is asked to do: plain structs that the bindings fill and the CPU and CUDA kernels read.
// No torch, no CUDA. Strides are in elements; every index into a tensor is 64-bit.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>

namespace convmixer_fast {

enum class DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// The values are those of the operators' integer argument `activation`.
enum class Activation : int32_t { kNone = 0, kGelu = 1, kRelu = 2 };  // kGelu: the erf form
constexpr const char* kActivationNames[] = {"none", "gelu", "relu"};  // indexed by the values

constexpr int64_t kLargestKernel = 1 << 24;  // rows or columns, which every plan can count with in 32 bits

// Elements from one image, channel, row and column to the next.
struct Strides {
  int64_t n;
  int64_t c;
  int64_t h;
  int64_t w;
};

// The elementwise step activation(v + bias) * scale + shift, with one value of each per channel. A null pointer stands
// for 0, 1 and 0.
struct ElementwiseParams {
  const void* bias;   // (channels)
  const void* scale;  // (channels)
  const void* shift;  // (channels)
  DType param_dtype;  // dtype of these three: float32 (float64 for float64 tensors), or the tensor's own
  Activation activation;
};

// y = epilogue(conv(z)) (+ z if residual), where z is x, or prologue(x) rounded to `dtype`.
// The padding is implicit and zero; with a prologue it is z, not x, that is zero there.
// Output (h, w) sees z at (h + i - pad_top, w + j - pad_left), i < kernel_h, j < kernel_w, through weight[i][j], or
// with flip_taps (the gradient of the input) through weight[kernel_h - 1 - i][kernel_w - 1 - j].
struct DepthwiseParams {
  const void* x;
  const void* weight;  // contiguous (channels, kernel_h, kernel_w)
  void* y;
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  Strides x_stride;
  Strides y_stride;
  int64_t kernel_h;
  int64_t kernel_w;
  int64_t pad_top;   // rows above the map
  int64_t pad_left;  // columns left of the map
  DType dtype;       // dtype of x, weight and y; accumulators are float32 (float64 for float64)
  bool has_prologue;
  bool residual;
  bool flip_taps;
  ElementwiseParams prologue;
  ElementwiseParams epilogue;
};

// The gradients of a plain depthwise convolution's weight and bias, given that of its output:
//   gweight[c][i][j] = sum over n, h, w of x[n, c, h + i - pad_top, w + j - pad_left] * gy[n, c, h, w]
//   gbias[c] = sum over n, h, w of gy[n, c, h, w]
// with x zero outside its map. Partial sums are float32 (float64 for float64); CUDA adds them up in float64, the CPU
// with compensation, in an order that depends on nothing but the params and the device. The result is rounded once.
struct WgradParams {
  const void* x;
  const void* gy;
  void* gweight;    // contiguous (channels, kernel_h, kernel_w); null: not wanted
  void* gbias;      // (channels); null: not wanted
  void* workspace;  // memory for partial sums, as many bytes as the backend asks for
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  Strides x_stride;
  Strides gy_stride;
  int64_t kernel_h;
  int64_t kernel_w;
  int64_t pad_top;   // rows above the map
  int64_t pad_left;  // columns left of the map
  DType dtype;       // dtype of all tensors but the workspace
};

// y[n, c] = mean over h, w of prologue(x).
struct PoolParams {
  const void* x;
  void* y;  // contiguous (batch, channels)
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  Strides x_stride;
  DType dtype;  // dtype of x and y
  ElementwiseParams prologue;
};

// A whole ConvMixer in eval mode, as three kinds of numbers: its own sizes, its weights, and one run of it.
struct MixerSizes {
  int64_t in_channels;
  int64_t patch_h;
  int64_t patch_w;
  int64_t dim;    // channels of a layer
  int64_t depth;  // layers
  int64_t kernel_h;
  int64_t kernel_w;
  int64_t classes;
  DType dtype;  // dtype of weights, images and logits: float32, float16 or bfloat16
  Activation activation;
  bool residual;  // whether the depthwise half of a layer adds its input
};

// Contiguous, of type `dtype` but for the epilogues.
struct MixerWeights {
  const void* patch;        // (dim, in_channels, patch_h, patch_w)
  const void* depthwise;    // (depth, dim, kernel_h, kernel_w)
  const void* conv1x1;      // (depth, dim, dim)
  const double* epilogues;  // (2 depth + 1, 3, dim): bias, scale and shift after each convolution, in execution order
  const void* head;         // (classes, dim)
  const void* head_bias;    // (classes)
};

// One stage of the network; a barrier separates stages.
struct MixerStage {
  enum Kind : int32_t {
    kPackPatches,  // images -> packed A panels
    kPatchConv,    // the product of the patch convolution
    kDepthwise,
    kConv1x1,
    kPool,
    kHead,
  } kind;
  int64_t layer;  // counted from 0; kDepthwise and kConv1x1 only
};

struct MixerParams {
  MixerSizes sizes;
  const void* x;  // images (batch, in_channels, height, width)
  Strides x_stride;
  int64_t batch;
  int64_t height;      // rows of an image
  int64_t width;       // columns of an image
  int64_t threads;     // worker threads, the same in all stages of a run; affects partitioning only, never the result
  const void* packed;  // packed weights
  void* workspace;     // activations passed between stages
  void* y;             // contiguous (batch, classes)
};

}  // namespace convmixer_fast
