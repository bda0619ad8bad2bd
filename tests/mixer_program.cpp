// The CPU kernels without torch, for machines that an emulator stands in for: small ConvMixers in every dtype, once on
// the kernels that the processor gets and once in plain float64. Prints the instruction set and the relative errors.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../csrc/cpu/dispatch.h"

using namespace convmixer_fast;

namespace {

// Multiples of 1/64 in [-1, 1]: exact in bfloat16 and float16.
double pseudorandom(uint32_t& state) {
  state = state * 1664525 + 1013904223;
  return (int(state >> 16 & 127) - 64) / 64.0;
}

uint16_t half_bits(float value, DType dtype) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (dtype == DType::kBFloat16) return uint16_t(bits >> 16);
  if (value == 0) return 0;
  return uint16_t((bits >> 16 & 0x8000) | (((bits >> 13 & 0x3ffff) - (112 << 10)) & 0x7fff));
}

struct Values {
  std::vector<double> exact;
  std::vector<uint8_t> stored;

  Values(int64_t count, double scale, DType dtype, uint32_t& state) {
    for (int64_t i = 0; i < count; ++i) exact.push_back(pseudorandom(state) * scale);
    stored.resize(count * 4);
    for (int64_t i = 0; i < count; ++i) {
      const float value = float(exact[i]);
      const uint16_t half = half_bits(value, dtype);
      if (dtype == DType::kFloat32) memcpy(&stored[i * 4], &value, 4);
      else memcpy(&stored[i * 2], &half, 2);
    }
  }
};

double gelu(double x) { return 0.5 * x * std::erfc(-x * M_SQRT1_2); }

// scale: that of the 1x1 convolutions' weights.
double error_of(DType dtype, int64_t dim, double scale) {
  const int64_t in = 3, patch = 2, depth = 2, k = 5, classes = 7, batch = 3, h = 6, w = 4;
  uint32_t state = 1;
  const Values x(batch * in * h * patch * w * patch, 1, dtype, state),
      patches(dim * in * patch * patch, 0.5, dtype, state), depthwise(depth * dim * k * k, 0.25, dtype, state),
      conv1x1(depth * dim * dim, scale, dtype, state), head(classes * dim, 0.5, dtype, state),
      head_bias(classes, 1, dtype, state);
  const Values affine((2 * depth + 1) * 3 * dim, 1, DType::kFloat32, state);

  MixerSizes sizes{in, patch, patch, dim, depth, k, k, classes, dtype, Activation::kGelu, true};
  const MixerWeights weights{patches.stored.data(), depthwise.stored.data(), conv1x1.stored.data(),
                             affine.exact.data(),   head.stored.data(),      head_bias.stored.data()};
  const cpu::NetworkKernels& kernels = cpu::kernels().network(dtype);
  MixerParams params{};
  params.sizes = sizes;
  params.x = x.stored.data();
  params.batch = batch;
  params.height = h * patch;
  params.width = w * patch;
  params.threads = 1;
  params.x_stride = {in * h * patch * w * patch, h * patch * w * patch, w * patch, 1};
  void* packed = aligned_alloc(64, kernels.packed_bytes(sizes));
  kernels.pack(sizes, weights, packed);
  params.packed = packed;
  params.workspace = aligned_alloc(64, kernels.workspace_bytes(params));
  memset(params.workspace, 0xff, kernels.workspace_bytes(params));  // NaN
  std::vector<uint8_t> y(batch * classes * 4);
  params.y = y.data();
  const auto run = [&](MixerStage stage) { kernels.run(params, stage, 0, kernels.tasks(params, stage)); };
  run({MixerStage::kPackPatches, 0});
  run({MixerStage::kPatchConv, 0});
  for (int64_t l = 0; l < depth; ++l) {
    run({MixerStage::kDepthwise, l});
    run({MixerStage::kConv1x1, l});
  }
  run({MixerStage::kPool, 0});
  run({MixerStage::kHead, 0});
  free(packed);
  free(params.workspace);

  const auto activated = [&](double v, int64_t convolution, int64_t c) {
    const double* parameters = &affine.exact[convolution * 3 * dim + c];
    return gelu(v + parameters[0]) * parameters[dim] + parameters[2 * dim];
  };
  double error = 0, largest = 0;
  for (int64_t n = 0; n < batch; ++n) {
    std::vector<double> map(dim * h * w), next(dim * h * w);
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < w; ++j) {
          double sum = 0;
          for (int64_t d = 0; d < in; ++d)
            for (int64_t a = 0; a < patch; ++a)
              for (int64_t b = 0; b < patch; ++b)
                sum += x.exact[((n * in + d) * h * patch + i * patch + a) * w * patch + j * patch + b] *
                       patches.exact[((c * in + d) * patch + a) * patch + b];
          map[(c * h + i) * w + j] = activated(sum, 0, c);
        }
    for (int64_t l = 0; l < depth; ++l) {
      for (int64_t c = 0; c < dim; ++c)
        for (int64_t i = 0; i < h; ++i)
          for (int64_t j = 0; j < w; ++j) {
            double sum = 0;
            for (int64_t a = 0; a < k; ++a)
              for (int64_t b = 0; b < k; ++b) {
                const int64_t row = i + a - k / 2, column = j + b - k / 2;
                if (row >= 0 && row < h && column >= 0 && column < w)
                  sum += map[(c * h + row) * w + column] * depthwise.exact[((l * dim + c) * k + a) * k + b];
              }
            next[(c * h + i) * w + j] = activated(sum, 2 * l + 1, c) + map[(c * h + i) * w + j];
          }
      for (int64_t c = 0; c < dim; ++c)
        for (int64_t p = 0; p < h * w; ++p) {
          double sum = 0;
          for (int64_t d = 0; d < dim; ++d) sum += next[d * h * w + p] * conv1x1.exact[(l * dim + c) * dim + d];
          map[c * h * w + p] = activated(sum, 2 * l + 2, c);
        }
    }
    for (int64_t o = 0; o < classes; ++o) {
      double logit = head_bias.exact[o];
      for (int64_t c = 0; c < dim; ++c)
        for (int64_t p = 0; p < h * w; ++p) logit += map[c * h * w + p] / (h * w) * head.exact[o * dim + c];
      float actual;
      if (dtype == DType::kFloat32) {
        memcpy(&actual, &y[(n * classes + o) * 4], 4);
      } else {
        uint16_t half;
        memcpy(&half, &y[(n * classes + o) * 2], 2);
        const uint32_t magnitude = half & 0x7fff;
        const uint32_t bits = dtype == DType::kBFloat16 ? magnitude << 16 : (magnitude << 13) + (112u << 23);
        memcpy(&actual, &bits, 4);
        if (half & 0x8000) actual = -actual;
      }
      const double off = std::fabs(actual - logit);
      error = off > error || off != off ? off : error;
      largest = std::fmax(largest, std::fabs(logit));
    }
  }
  return error / largest;
}

// The larger error of two networks: one with few channels, and one with so many that Strassen's algorithm multiplies
// them if the elements are float32.
double error_of(DType dtype) {
  const double few = error_of(dtype, 19, 0.5), many = error_of(dtype, 390, 0.125);
  return few > many || few != few ? few : many;
}

}  // namespace

int main() {
  printf("%s %.3g %.3g %.3g\n", cpu::kernels().name, error_of(DType::kFloat32), error_of(DType::kFloat16),
         error_of(DType::kBFloat16));
}
