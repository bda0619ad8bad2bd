// Packs a network's weights.
//
// Terms: docs/glossary.md.
#pragma once
#include "../scratch.h"
#include "layout.h"

namespace convmixer_fast::cpu {
namespace {

template <class S, class Element>
class WeightPacking {
  static constexpr int64_t kLanes = cpu::kLanes<float>;
  static constexpr int64_t kPack = Element::kPack;

 public:
  WeightPacking(const MixerSizes& sizes, const MixerWeights& weights, void* packed)
      : layout_(sizes), weights_(weights), packed_(static_cast<Element*>(packed)) {
    memset(packed, 0, bytes<Element>(layout_.end));
  }

  void run() {
    const MixerSizes& s = layout_.sizes;
    pack_b(kPlain, weights_.patch, s.dim, layout_.patch, packed_);
    for (int64_t l = 0; l < s.depth; ++l) {
      const S* conv1x1 = static_cast<const S*>(weights_.conv1x1) + l * s.dim * s.dim;
      pack_b(layout_.scheme, conv1x1, s.dim, s.dim, packed_ + layout_.conv1x1 + l * layout_.conv1x1_size);
      pack_taps(l);
    }
    pack_b(kPlain, weights_.head, s.classes, s.dim, packed_ + layout_.head);
    for (int64_t c = 0; c < 2 * s.depth + 1; ++c) pack_affine(c);
    memcpy(packed_ + layout_.head_bias, row(weights_.head_bias, 0, s.classes), s.classes * sizeof(float));
  }

 private:
  // A row of weights in float32.
  const float* row(const void* from, int64_t offset, int64_t values) {
    float* to = static_cast<float*>(scratch_.reserve(ceil_div(values, kLanes) * kLanes * sizeof(float)));
    for (int64_t i = 0; i < values; i += kLanes) {
      Vec<float> v;
      load_pixels(static_cast<const S*>(from) + offset + i, 1, 0, min(kLanes, values - i), 1, &v);
      memcpy(to + i, &v, sizeof v);
    }
    return to;
  }

  // Packs the right operand of a matrix product: (packed B tile, sub-product, K / kPack, column, value of a pack). A
  // sub-product's B is a sum of quadrants, with the signs of its scheme.
  void pack_b(const BilinearScheme& scheme, const void* weight, int64_t columns, int64_t depth, Element* to) {
    const int64_t quadrant_depth = ceil_div(ceil_div(depth, kLanes), scheme.halves) * kLanes;
    const int64_t quadrant_columns = ceil_div(ceil_div(columns, kNr), scheme.halves) * kNr;
    for (int64_t column = 0; column < columns; ++column) {
      const float* from = row(weight, column * depth, depth);
      const int64_t c = column % quadrant_columns;
      for (int64_t value = 0; value < depth; ++value) {
        const int64_t k = value % quadrant_depth;
        const int64_t quadrant = value / quadrant_depth * scheme.halves + column / quadrant_columns;
        for (int64_t product = 0; product < scheme.products; ++product) {
          const int sign = scheme.v[product][quadrant];
          const int64_t pack = (c / kNr * scheme.products + product) * (quadrant_depth / kPack) + k / kPack;
          if (sign != 0) to[(pack * kNr + c % kNr) * kPack + k % kPack].add(float(sign) * from[value]);
        }
      }
    }
  }

  void pack_affine(int64_t convolution) {
    const int64_t dim = layout_.sizes.dim;
    const double* from = weights_.epilogues + convolution * 3 * dim;
    for (int64_t c = 0; c < dim; ++c) {
      const float shift = float(from[2 * dim + c]);
      const float values[layout_.kAffine] = {float(from[c]), float(from[dim + c]), shift,
                                             float(from[2 * dim + c] - shift)};
      for (int which = 0; which < layout_.kAffine; ++which)
        memcpy(packed_ + layout_.affine_of(convolution, which) + c * layout_.kFloat, &values[which], sizeof(float));
    }
  }

  // Packs a layer's depthwise weights: (channel vector, pack of rows, column, channel, row of a pack).
  void pack_taps(int64_t layer) {
    const MixerSizes& s = layout_.sizes;
    Element* to = packed_ + layout_.depthwise + layer * layout_.depthwise_size;
    const int64_t taps = s.kernel_h * s.kernel_w;
    for (int64_t c = 0; c < s.dim; ++c) {
      const float* from = row(weights_.depthwise, (layer * s.dim + c) * taps, taps);
      Element* channel = to + c / kLanes * layout_.tap_rows * s.kernel_w * kLanes * kPack + c % kLanes * kPack;
      for (int64_t i = 0; i < s.kernel_h; ++i)
        for (int64_t j = 0; j < s.kernel_w; ++j)
          channel[(i / kPack * s.kernel_w + j) * kLanes * kPack + i % kPack] = Element::from(from[i * s.kernel_w + j]);
    }
  }

  const WeightLayout<Element> layout_;
  const MixerWeights& weights_;
  Element* packed_;
  Scratch scratch_;
};

}  // namespace
}  // namespace convmixer_fast::cpu
