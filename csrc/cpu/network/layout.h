// Where a network's packed weights and its activations lie in memory. Offsets and sizes count elements, unless they say
// bytes.
//
// Terms: docs/glossary.md.
#pragma once
#include "../gemm/microkernel.h"

namespace convmixer_fast::cpu {
namespace {

template <class Element>
int64_t bytes(int64_t elements) {
  return round_up(elements * int64_t(sizeof(Element)), 64);
}

// The packed weights.
template <class Element>
struct WeightLayout {
  static constexpr int64_t kLanes = cpu::kLanes<float>;
  static constexpr int64_t kFloat = sizeof(float) / sizeof(Element);
  // The affine parameters of a convolution: bias, scale, shift, and what rounding to float32 took from the shift. All
  // pixels would share that error and no mean over them would lessen it: it was most of the logits' error.
  static constexpr int kAffine = 4;

  // From here on Strassen's products are at least 5 % faster: at 256 channels by 6 % with AVX2, 0 to 2 % with AVX-512.
  static constexpr int64_t kStrassenDim = CMF_VECTOR_REGISTERS == 32 ? 384 : 256;

  const MixerSizes& sizes;
  const BilinearScheme& scheme;  // for the 1x1 convolutions
  int64_t patch;                 // values per patch
  int64_t patch_vectors;         // channel vectors per patch
  int64_t dim_vectors;           // channel vectors of the network
  int64_t quadrant_vectors;      // channel vectors per quadrant of a 1x1 convolution
  int64_t quadrant_tiles;        // packed B tiles per quadrant of a 1x1 convolution
  int64_t dim_tiles;             // packed B tiles for all channels of the network
  int64_t class_tiles;           // packed B tiles for all classes
  int64_t tap_rows;              // packs of kPack rows of the depthwise kernel
  int64_t conv1x1_size;          // per layer
  int64_t depthwise_size;        // per layer
  int64_t conv1x1;               // offset; the weights of the patch convolution come first
  int64_t depthwise;             // offset
  int64_t head;                  // offset
  int64_t affine;                // offset
  int64_t head_bias;             // offset
  int64_t end;                   // size of all

  explicit WeightLayout(const MixerSizes& s)
      : sizes(s), scheme(Element::kPack == 1 && s.dim >= kStrassenDim ? kStrassen : kPlain) {
    patch = s.in_channels * s.patch_h * s.patch_w;
    patch_vectors = ceil_div(patch, kLanes);
    dim_vectors = ceil_div(s.dim, kLanes);
    dim_tiles = ceil_div(s.dim, kNr);
    class_tiles = ceil_div(s.classes, kNr);
    quadrant_vectors = ceil_div(dim_vectors, scheme.halves);
    quadrant_tiles = ceil_div(dim_tiles, scheme.halves);
    tap_rows = ceil_div(s.kernel_h, Element::kPack);
    conv1x1_size = scheme.products * quadrant_tiles * kNr * quadrant_vectors * kLanes;
    depthwise_size = dim_vectors * tap_rows * s.kernel_w * kLanes * Element::kPack;
    conv1x1 = dim_tiles * kNr * patch_vectors * kLanes;
    depthwise = conv1x1 + s.depth * conv1x1_size;
    head = depthwise + s.depth * depthwise_size;
    affine = head + class_tiles * kNr * dim_vectors * kLanes;
    head_bias = affine + (2 * s.depth + 1) * kAffine * dim_tiles * kNr * kFloat;
    end = head_bias + class_tiles * kNr * kFloat;
  }

  // The offset of one of the kAffine parameters of a convolution, for all channels.
  int64_t affine_of(int64_t convolution, int which) const {
    return affine + (convolution * kAffine + which) * dim_tiles * kNr * kFloat;
  }
};

// All that a run works on: the packed weights; and in its workspace the activations, that is the blocked maps, the
// packed A panels, and the panels of the pooled channels.
template <class Element>
struct RunLayout {
  static constexpr int64_t kLanes = cpu::kLanes<float>;

  WeightLayout<Element> weights;

  int64_t height;           // rows of a map
  int64_t width;            // columns of a map
  int64_t pixels;           // in all maps
  int64_t quadrant_height;  // rows of a map in a quadrant, which has every map's upper or lower half
  int64_t quadrant_pixels;  // in all maps
  int64_t pitch;            // channel vectors from row to row of a blocked map, padding included
  int64_t pad_top;
  int64_t pad_left;
  int64_t map;     // size of a blocked map
  int64_t panels;  // offset; the blocked maps come first
  int64_t pooled;  // offset
  int64_t end;     // size of all

  explicit RunLayout(const MixerParams& p) : weights(p.sizes) {
    const MixerSizes& s = p.sizes;
    height = p.height / s.patch_h;
    width = p.width / s.patch_w;
    pixels = p.batch * height * width;
    quadrant_height = ceil_div(height, weights.scheme.halves);
    quadrant_pixels = p.batch * quadrant_height * width;
    pad_top = (s.kernel_h - 1) / 2;
    pad_left = (s.kernel_w - 1) / 2;
    pitch = width + s.kernel_w - 1;
    map = height * pitch * kLanes;
    panels = p.batch * weights.dim_vectors * map;
    constexpr int64_t kMore = kMaxMr - 1;  // rows of the last panel, beyond the pixels
    pooled = panels + kLanes * max((pixels + kMore) * weights.patch_vectors,
                                   (quadrant_pixels + kMore) * weights.scheme.quadrants() * weights.quadrant_vectors);
    end = pooled + (p.batch + kMore) * kLanes * weights.dim_vectors;
  }
};

}  // namespace
}  // namespace convmixer_fast::cpu
