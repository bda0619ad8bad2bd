// Where a network's weights and activations lie in memory.
#pragma once
#include "../gemm/microkernel.h"

namespace convmixer_fast::cpu {
namespace {

// Where the weights lie, packed. Offsets and sizes count elements of the operand type.
template <class Operand>
struct Layout {
  static constexpr int64_t n = kLanes<float>;
  static constexpr int64_t kFloat = sizeof(float) / sizeof(Operand);
  // Of a convolution: bias, scale, shift, and what rounding to float32 took from the shift. All pixels would share that
  // error and no mean over them would lessen it: it was most of the logits' error.
  static constexpr int kVectorsAfter = 4;

  static constexpr int64_t kStrassenDim = 384;  // from here on it gains 5 % and more, of 256 channels 2 %

  const MixerSizes& sizes;
  const Scheme& scheme;                      // of the pointwise products
  int64_t patch;                             // values of a patch
  int64_t patch_depth, depth;                // channel vectors of a patch and of the network
  int64_t part_depth, part_tiles;            // channel vectors, tiles of output channels in a pointwise product's part
  int64_t tiles, head_tiles;                 // of output channels
  int64_t tap_rows;                          // of the depthwise kernel, kDepth of its rows in each
  int64_t pointwise_layer, depthwise_layer;  // sizes of a layer's weights
  int64_t pointwise, depthwise, head, vectors, head_bias, end;

  explicit Layout(const MixerSizes& s)
      : sizes(s), scheme(Operand::kDepth == 1 && s.dim >= kStrassenDim ? kStrassen : kPlain) {
    patch = s.in_channels * s.patch_h * s.patch_w;
    patch_depth = ceil_div(patch, n);
    depth = ceil_div(s.dim, n);
    tiles = ceil_div(s.dim, kColumns), head_tiles = ceil_div(s.classes, kColumns);
    part_depth = ceil_div(depth, scheme.halves), part_tiles = ceil_div(tiles, scheme.halves);
    tap_rows = ceil_div(s.kernel_h, Operand::kDepth);
    pointwise_layer = scheme.products * part_tiles * kColumns * part_depth * n;
    depthwise_layer = depth * tap_rows * s.kernel_w * n * Operand::kDepth;
    pointwise = tiles * kColumns * patch_depth * n;  // the patch convolution's come first
    depthwise = pointwise + s.depth * pointwise_layer;
    head = depthwise + s.depth * depthwise_layer;
    vectors = head + head_tiles * kColumns * depth * n;
    head_bias = vectors + (2 * s.depth + 1) * kVectorsAfter * tiles * kColumns * kFloat;
    end = head_bias + head_tiles * kColumns * kFloat;
  }

  int64_t vector(int64_t convolution, int which) const {
    return vectors + (convolution * kVectorsAfter + which) * tiles * kColumns * kFloat;
  }
};

// Where the activations of a run lie in its workspace.
template <class Operand>
struct Workspace : Layout<Operand> {
  using Layout<Operand>::n;
  using Layout<Operand>::depth;

  int64_t height, width, pixels;     // of a map; pixels: of all of them
  int64_t part_height, part_pixels;  // of a part: the upper or the lower half of every map
  int64_t pitch;                     // vectors from row to row of a plane, padding included
  int64_t pad_top, pad_left;
  int64_t plane;                // elements
  int64_t panels, pooled, end;  // offsets; the planes come first

  explicit Workspace(const MixerParams& p) : Layout<Operand>(p.sizes) {
    const MixerSizes& s = p.sizes;
    height = p.height / s.patch_h, width = p.width / s.patch_w, pixels = p.batch * height * width;
    part_height = ceil_div(height, this->scheme.halves), part_pixels = p.batch * part_height * width;
    pad_top = (s.kernel_h - 1) / 2, pad_left = (s.kernel_w - 1) / 2;
    pitch = width + s.kernel_w - 1;
    plane = height * pitch * n;
    panels = p.batch * depth * plane;
    constexpr int64_t more = kMaxRows - 1;  // rows of the last panel, beyond the pixels
    pooled = panels + n * max((pixels + more) * this->patch_depth,
                              (part_pixels + more) * this->scheme.parts() * this->part_depth);
    end = pooled + (p.batch + more) * n * depth;
  }
};

template <class Operand>
int64_t bytes(int64_t elements) {
  return ceil_div(elements * int64_t(sizeof(Operand)), 64) * 64;
}

}  // namespace
}  // namespace convmixer_fast::cpu
