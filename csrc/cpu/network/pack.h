// The weights of a network, as its steps want them.
#pragma once
#include "../scratch.h"
#include "layout.h"

namespace convmixer_fast::cpu {
namespace {

template <class S, class Operand>
class Packing {
  static constexpr int64_t n = kLanes<float>, kDepth = Operand::kDepth;

 public:
  Packing(const MixerSizes& sizes, const MixerWeights& weights, void* packed)
      : layout_(sizes), weights_(weights), packed_(static_cast<Operand*>(packed)) {
    memset(packed, 0, bytes<Operand>(layout_.end));
  }

  void run() {
    const MixerSizes& s = layout_.sizes;
    pack_right(kPlain, weights_.patch, s.dim, layout_.patch, packed_);
    for (int64_t l = 0; l < s.depth; ++l) {
      const S* pointwise = static_cast<const S*>(weights_.pointwise) + l * s.dim * s.dim;
      pack_right(layout_.scheme, pointwise, s.dim, s.dim, packed_ + layout_.pointwise + l * layout_.pointwise_layer);
      pack_taps(l);
    }
    pack_right(kPlain, weights_.head, s.classes, s.dim, packed_ + layout_.head);
    for (int64_t c = 0; c < 2 * s.depth + 1; ++c) pack_vectors(c);
    memcpy(packed_ + layout_.head_bias, row(weights_.head_bias, 0, s.classes), s.classes * sizeof(float));
  }

 private:
  // `values` values in float32.
  const float* row(const void* from, int64_t offset, int64_t values) {
    float* to = static_cast<float*>(scratch_.reserve(ceil_div(values, n) * n * sizeof(float)));
    for (int64_t i = 0; i < values; i += n) {
      Vec<float> v;
      load_pixels(static_cast<const S*>(from) + offset + i, 1, 0, min(n, values - i), 1, &v);
      memcpy(to + i, &v, sizeof v);
    }
    return to;
  }

  // The right operand of a product: by tiles of columns, then by the scheme's products, then by groups of kDepth
  // values.
  void pack_right(const Scheme& scheme, const void* weight, int64_t columns, int64_t depth, Operand* to) {
    const int64_t part_depth = ceil_div(ceil_div(depth, n), scheme.halves) * n;
    const int64_t part_columns = ceil_div(ceil_div(columns, kColumns), scheme.halves) * kColumns;
    for (int64_t column = 0; column < columns; ++column) {
      const float* from = row(weight, column * depth, depth);
      const int64_t c = column % part_columns;
      for (int64_t value = 0; value < depth; ++value) {
        const int64_t k = value % part_depth, part = value / part_depth * scheme.halves + column / part_columns;
        for (int64_t product = 0; product < scheme.products; ++product) {
          const int sign = scheme.right[product][part];
          const int64_t group = (c / kColumns * scheme.products + product) * (part_depth / kDepth) + k / kDepth;
          if (sign != 0) to[(group * kColumns + c % kColumns) * kDepth + k % kDepth].add(float(sign) * from[value]);
        }
      }
    }
  }

  void pack_vectors(int64_t convolution) {
    const int64_t dim = layout_.sizes.dim;
    const double* from = weights_.vectors + convolution * 3 * dim;
    for (int64_t c = 0; c < dim; ++c) {
      const float shift = float(from[2 * dim + c]);
      const float values[layout_.kVectorsAfter] = {float(from[c]), float(from[dim + c]), shift,
                                                   float(from[2 * dim + c] - shift)};
      for (int which = 0; which < layout_.kVectorsAfter; ++which)
        memcpy(packed_ + layout_.vector(convolution, which) + c * layout_.kFloat, &values[which], sizeof(float));
    }
  }

  void pack_taps(int64_t layer) {
    const MixerSizes& s = layout_.sizes;
    Operand* to = packed_ + layout_.depthwise + layer * layout_.depthwise_layer;
    const int64_t taps = s.kernel_h * s.kernel_w;
    for (int64_t c = 0; c < s.dim; ++c) {
      const float* from = row(weights_.depthwise, (layer * s.dim + c) * taps, taps);
      Operand* channel = to + c / n * layout_.tap_rows * s.kernel_w * n * kDepth + c % n * kDepth;
      for (int64_t i = 0; i < s.kernel_h; ++i)
        for (int64_t j = 0; j < s.kernel_w; ++j)
          channel[(i / kDepth * s.kernel_w + j) * n * kDepth + i % kDepth] = Operand::from(from[i * s.kernel_w + j]);
    }
  }

  const Layout<Operand> layout_;
  const MixerWeights& weights_;
  Operand* packed_;
  Scratch scratch_;
};

}  // namespace
}  // namespace convmixer_fast::cpu
