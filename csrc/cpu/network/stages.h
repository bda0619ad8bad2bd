// A whole ConvMixer in eval mode, stage by stage, on the matrix product of gemm/ and the microkernel of depthwise/.
//
// Two buffers take turns. Blocked maps are activations as (image, channel vector, row, column), each row with its zero
// padding left and right, so that the depthwise convolution reads them as they stand. Panels are the packed left
// operand of a matrix product (gemm/pack.h), which reads them from end to end. A stage reads one and writes the
// other, applies bias, activation and BatchNorm while its results are in registers or in the L1 cache, and ends at a
// barrier:
//   patches: images -> panels   project: panels -> maps   depthwise: maps -> panels   conv1x1: panels -> maps
//   pool: maps -> panels        head: panels -> logits
// Every output is one thread's sum in one order: any number of threads gives the same bits.
//
// Terms: docs/glossary.md.
#pragma once
#include <utility>

#include "../compensated_sum.h"
#include "../depthwise/microkernel.h"
#include "../gemm/macrokernel.h"
#include "../gemm/pack.h"
#include "layout.h"

namespace convmixer_fast::cpu {
namespace {

template <class S, class Element>
class Network {
  static constexpr int64_t kLanes = cpu::kLanes<float>;
  static constexpr int64_t kWantedTasks = 64;  // per depthwise convolution, for the threads to share
  static constexpr int64_t kMinBandRows = 8;   // per such task
  static constexpr int64_t kFewPixels = 4;     // per map
  using PackedVec = typename Element::PackedVec;

 public:
  explicit Network(const MixerParams& p)
      : p_(p),
        s_(p.sizes),
        layout_(p),
        packed_(static_cast<const Element*>(p.packed)),
        maps_(static_cast<Element*>(p.workspace)),
        panels_(maps_ + layout_.panels),
        pooled_(maps_ + layout_.pooled) {
    const int64_t wanted_bands =
        max(ceil_div(p.threads, max(1, p.batch)),
            ceil_div(kWantedTasks, max(1, p.batch * layout_.weights.scheme.halves * layout_.weights.dim_vectors)));
    row_plan_ = RowPlan(max(1, layout_.width), layout_.weights.tap_rows, s_.kernel_w);
    input_lines_ = lines_per_strip(layout_.pitch);
    output_lines_ = lines_per_strip(layout_.width);
    band_rows_ = max(min(layout_.quadrant_height, kMinBandRows), ceil_div(layout_.quadrant_height, wanted_bands));
    bands_ = ceil_div(layout_.quadrant_height, band_rows_);
  }

  int64_t tasks(MixerStage stage) const {
    switch (stage.kind) {
      case MixerStage::kPackPatches: return patch_blocking().panels + p_.batch * layout_.weights.dim_vectors;
      case MixerStage::kPatchConv: return patch_blocking().tasks();
      case MixerStage::kDepthwise:
        return p_.batch * layout_.weights.scheme.quadrants() * layout_.weights.quadrant_vectors * bands_;
      case MixerStage::kConv1x1: return conv1x1_blocking().tasks();
      case MixerStage::kPool: return p_.batch * layout_.weights.dim_vectors;
      case MixerStage::kHead: return head_blocking().tasks();
    }
    __builtin_unreachable();
  }

  void run(MixerStage stage, int64_t begin, int64_t end, Scratch& scratch) const {
    switch (stage.kind) {
      case MixerStage::kPackPatches: return patches(begin, end, scratch);
      case MixerStage::kPatchConv: return conv1x1(patch_blocking(), packed_, 0, begin, end, scratch);
      case MixerStage::kDepthwise: return depthwise(stage.layer, begin, end, scratch);
      case MixerStage::kConv1x1: {
        const Element* weight = packed_ + layout_.weights.conv1x1 + stage.layer * layout_.weights.conv1x1_size;
        return conv1x1(conv1x1_blocking(), weight, 2 * stage.layer + 2, begin, end, scratch);
      }
      case MixerStage::kPool: return pool(begin, end);
      case MixerStage::kHead: return head(begin, end, scratch);
    }
  }

 private:
  Blocking<Element> patch_blocking() const {
    return {kPlain, layout_.pixels, layout_.weights.dim_tiles, layout_.weights.patch_vectors, p_.threads};
  }
  Blocking<Element> conv1x1_blocking() const {
    return {layout_.weights.scheme, layout_.quadrant_pixels, layout_.weights.quadrant_tiles,
            layout_.weights.quadrant_vectors, p_.threads};
  }
  Blocking<Element> head_blocking() const {
    return {kPlain, p_.batch, layout_.weights.class_tiles, layout_.weights.dim_vectors, p_.threads};
  }
  Element* map_of(int64_t image, int64_t vector) const {
    return maps_ + (image * layout_.weights.dim_vectors + vector) * layout_.map;
  }

  // What each strip of a row prefetches of `vectors` channel vectors: its share.
  PrefetchLines lines_per_strip(int64_t vectors) const {
    const int64_t bytes = vectors * kLanes * int64_t(sizeof(Element));
    return {nullptr, kCacheLine, ceil_div(bytes, kCacheLine * row_plan_.strips), bytes / max(1, layout_.width)};
  }

  // The elementwise step after a convolution. BatchNorm's shift is stored as an unevaluated sum hi + lo (double-float).
  // The FMA adds lo, then hi is added: lo survives, at the cost of one more rounding per pixel, which pooling averages
  // out. Maps of fewer than kFewPixels pixels use the opposite order.
  struct Epilogue {
    Elementwise<float> elementwise;  // whose shift is the half that the FMA adds
    Vec<float> late_shift;           // the other half
  };

  Epilogue epilogue_of(int64_t convolution, int64_t vector) const {
    Epilogue result;
    Vec<float>* const all[layout_.weights.kAffine] = {&result.elementwise.bias, &result.elementwise.scale,
                                                      &result.late_shift, &result.elementwise.shift};
    for (int which = 0; which < layout_.weights.kAffine; ++which)
      memcpy(all[which],
             packed_ + layout_.weights.affine_of(convolution, which) + vector * kLanes * layout_.weights.kFloat,
             sizeof(Vec<float>));
    result.elementwise.activation = s_.activation;
    if (layout_.height * layout_.width < kFewPixels) {
      const Vec<float> lo = result.elementwise.shift;
      result.elementwise.shift = result.late_shift;
      result.late_shift = lo;
    }
    return result;
  }

  // The images' patches -> panels; and zeros -> the padding of the blocked maps.
  void patches(int64_t begin, int64_t end, Scratch& scratch) const {
    int64_t* offset = static_cast<int64_t*>(scratch.reserve(layout_.weights.patch * sizeof(int64_t)));
    for (int64_t k = 0; k < layout_.weights.patch; ++k)
      offset[k] = k / (s_.patch_h * s_.patch_w) * p_.x_stride.c + k / s_.patch_w % s_.patch_h * p_.x_stride.h +
                  k % s_.patch_w * p_.x_stride.w;
    const Blocking<Element> blocking = patch_blocking();
    for (int64_t task = begin; task < end; ++task) {
      if (task < blocking.panels) {
        for (int64_t r = 0; r < blocking.mr; ++r) pack_patch(blocking, task * blocking.mr + r, offset);
      } else {
        Element* row = maps_ + (task - blocking.panels) * layout_.map;
        for (int64_t h = 0; h < layout_.height; ++h, row += layout_.pitch * kLanes) {
          memset(row, 0, layout_.pad_left * kLanes * sizeof(Element));
          const int64_t right = layout_.pad_left + layout_.width;
          memset(row + right * kLanes, 0, (layout_.pitch - right) * kLanes * sizeof(Element));
        }
      }
    }
  }

  void pack_patch(const Blocking<Element>& blocking, int64_t pixel, const int64_t* offset) const {
    const int64_t h = pixel / layout_.width % layout_.height;
    const int64_t w = pixel % layout_.width;
    const S* x = static_cast<const S*>(p_.x) + pixel / (layout_.width * layout_.height) * p_.x_stride.n +
                 h * s_.patch_h * p_.x_stride.h + w * s_.patch_w * p_.x_stride.w;
    for (int64_t k = 0; k < layout_.weights.patch_vectors; ++k) {
      S lanes[kLanes] = {};
      if (pixel < layout_.pixels)
        for (int64_t i = k * kLanes; i < min(layout_.weights.patch, k * kLanes + kLanes); ++i)
          lanes[i - k * kLanes] = x[offset[i]];
      Element::store(PanelCursor<Element>(blocking, panels_, k, pixel)[pixel], S::load(lanes));
    }
  }

  // A 1x1 convolution, or that of the patches: panels -> maps.
  void conv1x1(const Blocking<Element>& blocking, const Element* weight, int64_t convolution, int64_t begin,
               int64_t end, Scratch& scratch) const {
    const int64_t halves = blocking.scheme.halves;
    const int64_t height = ceil_div(layout_.height, halves);       // in a quadrant
    const int64_t all_pixels = p_.batch * height * layout_.width;  // in a quadrant
    constexpr int64_t kOutside = -1;
    constexpr int64_t kAhead = 4;  // panels from one that is stored to the one whose lines are fetched meanwhile
    // Where the M block's pixels go, in each half of the map. kAhead panels more repeat the last pixel's place, so that
    // the last panels have something to prefetch.
    int64_t offsets[2][(Blocking<Element>::kMaxPanels + kAhead) * kMaxMr];
    int64_t pixels = 0;  // in the M block, without those beyond the last one
    const auto find_offsets = [&](int64_t first, int64_t count) {
      pixels = min(count, all_pixels - first);
      int64_t image = first / (height * layout_.width);
      int64_t h = first / layout_.width % height;
      int64_t w = first % layout_.width;
      for (int64_t i = 0; i < count + kAhead * blocking.mr; ++i) {
        for (int64_t half = 0; half < halves; ++half) {
          const int64_t row = half * height + h;
          const int64_t offset =
              image * layout_.weights.dim_vectors * layout_.map + (row * layout_.pitch + layout_.pad_left + w) * kLanes;
          offsets[half][i] = row < layout_.height ? offset : kOutside;
        }
        if (i + 1 >= pixels || ++w < layout_.width) continue;
        w = 0;
        if (++h == height) {
          h = 0;
          ++image;
        }
      }
    };
    macrokernel(blocking, panels_, weight, Element::chain(blocking.scheme) / kLanes, begin, end, scratch, find_offsets,
                [&](int64_t quadrant, int64_t tile, int64_t first_panel, int64_t panels, AccumulatorTile* results) {
                  const int64_t first_pixel = first_panel * blocking.mr;
                  const int64_t first = (tile + quadrant % halves * blocking.tiles) * kNrVectors;
                  for (int64_t v = 0; v < min(kNrVectors, layout_.weights.dim_vectors - first); ++v) {
                    Element* map = maps_ + (first + v) * layout_.map;
                    const auto [elementwise, late_shift] = epilogue_of(convolution, first + v);
                    const int64_t* offset = offsets[quadrant / halves] + first_pixel;
                    for (int64_t p = 0; p < panels; ++p, offset += blocking.mr) {
                      Vec<float>* z = results[p * blocking.scheme.quadrants()][v];
                      const int64_t count = min(blocking.mr, pixels - first_pixel - p * blocking.mr);
                      elementwise.template apply<Element::kPrecision>(z, count);
                      for (int64_t r = 0; r < count; ++r) {
                        if (offset[r] != kOutside) Element::store(map + offset[r], z[r] + late_shift);
                        __builtin_prefetch(map + offset[kAhead * blocking.mr + r], 1, 2);
                      }
                    }
                  }
                });
  }

  // A channel vector of an image, and what the depthwise convolution of some of its rows needs.
  struct ChannelVector {
    const Element* map;
    const PackedVec* input;  // row 0 of the map
    const PackedVec* weight;
    Epilogue epilogue;
  };

  // Maps -> panels, row by row: the rows that sums share stay in the L1 cache, memory is read from end to end.
  void depthwise(int64_t layer, int64_t begin, int64_t end, Scratch& scratch) const {
    const int64_t packs = Element::kPack > 1 ? (band_rows_ + s_.kernel_h) * layout_.pitch : 0;
    PackedVec* memory =
        static_cast<PackedVec*>(scratch.reserve(packs * sizeof(PackedVec) + layout_.width * sizeof(Vec<float>)));
    Vec<float>* sums = reinterpret_cast<Vec<float>*>(memory + packs);
    const Blocking<Element> blocking = conv1x1_blocking();
    const int64_t halves = blocking.scheme.halves;
    const int64_t vectors = halves * blocking.k_vectors;
    for (int64_t task = begin; task < end; ++task) {
      // Bands first: a thread then finds most of what it reads, here and in the product, where it has written it.
      const int64_t vector = task % vectors;
      const int64_t half = task / vectors % halves;
      const int64_t band = task / (vectors * halves) % bands_;
      const int64_t image = task / (vectors * halves) / bands_;
      const int64_t first = band * band_rows_;
      const int64_t last = min(layout_.quadrant_height, first + band_rows_);
      const int64_t top = half * layout_.quadrant_height;
      const int64_t first_pixel = image * layout_.quadrant_height * layout_.width;
      const int64_t quadrant = half * halves + vector / blocking.k_vectors;
      const int64_t a_vector = quadrant * blocking.k_vectors + vector % blocking.k_vectors;
      PanelCursor<Element> cursor(blocking, panels_, a_vector, first_pixel + first * layout_.width);
      const ChannelVector channels =
          channel_vector(layer, image, min(vector, layout_.weights.dim_vectors - 1), top + first, top + last, memory);
      for (int64_t h = first; h < last; ++h) {
        const int64_t pixel = first_pixel + h * layout_.width;
        const auto destination = [&](int64_t w, int64_t& count) {
          Element* to = cursor[pixel + w];
          count = min(count, cursor.successive(pixel + w));
          return to;
        };
        if (vector < layout_.weights.dim_vectors && top + h < layout_.height) {
          depthwise_row(channels, top + h, sums, destination);
        } else {  // in a quadrant, but not in the network: sums of quadrants need zeros there
          for (int64_t w = 0, count; w < layout_.width; w += count) {
            count = layout_.width - w;
            Element* to = destination(w, count);
            memset(to, 0, count * kLanes * sizeof(Element));
          }
        }
      }
    }
  }

  ChannelVector channel_vector(int64_t layer, int64_t image, int64_t vector, int64_t first, int64_t last,
                               PackedVec* memory) const {
    ChannelVector channels;
    channels.map = map_of(image, vector);
    const int64_t top = first - layout_.pad_top;  // the map's row in row 0 of the input
    const PackedVec* rows = input_rows(channels.map, top, last - layout_.pad_top + s_.kernel_h - 1, memory);
    channels.input = rows - top * layout_.pitch;
    channels.weight = reinterpret_cast<const PackedVec*>(
        packed_ + layout_.weights.depthwise + layer * layout_.weights.depthwise_size +
        vector * layout_.weights.tap_rows * s_.kernel_w * kLanes * Element::kPack);
    channels.epilogue = epilogue_of(2 * layer + 1, vector);
    return channels;
  }

  // Stores row h, after the epilogue. destination(column, count) returns the address of the outputs from that column
  // on, and lowers `count` to those that follow each other there. `sums` is scratch memory for a row. The epilogue has
  // a pass of its own over them: on a short strip most of it would be latency.
  template <class Destination>
  void depthwise_row(const ChannelVector& channels, int64_t h, Vec<float>* sums, Destination destination) const {
    int64_t count = layout_.width;
    convolve(channels, h, destination(0, count), sums);
    channels.epilogue.elementwise.template apply<Element::kPrecision>(sums, layout_.width);
    const Vec<float> late_shift = channels.epilogue.late_shift;
    const Element* residual = channels.map + (h * layout_.pitch + layout_.pad_left) * kLanes;
    for (int64_t w = 0; w < layout_.width; w += count) {
      count = layout_.width - w;
      Element* to = destination(w, count);
      for (int64_t i = 0; i < count; ++i) {
        const Vec<float> z = sums[w + i] + late_shift;
        Element::store(to + i * kLanes, s_.residual ? z + Element::load(residual + (w + i) * kLanes) : z);
      }
    }
  }

  // Packs of kPack rows for each row from `begin` to `end` that meets the map, at its distance from row `begin`.
  const PackedVec* input_rows(const Element* from, int64_t begin, int64_t end, PackedVec* to) const {
    if constexpr (Element::kPack == 1) {
      return reinterpret_cast<const PackedVec*>(from) + begin * layout_.pitch;
    } else {
      for (int64_t h = max(-1, begin); h < min(layout_.height, end); ++h) {
        PackedVec* row = to + (h - begin) * layout_.pitch;
        const Element* first = from + h * layout_.pitch * kLanes;
        const Element zeros[kLanes] = {};
        for (int64_t w = 0; w < layout_.pitch; ++w, first += kLanes)
          row[w] = Element::interleave(h < 0 ? zeros : first,
                                       h + 1 == layout_.height ? zeros : first + layout_.pitch * kLanes);
      }
      return to;
    }
  }

  // The sums of row h, without the tap rows outside the map. Prefetches the row that the next output row needs in
  // addition, and what is written two rows after `to`, where this row goes.
  void convolve(const ChannelVector& channels, int64_t h, const Element* to, Vec<float>* sums) const {
    constexpr int64_t kPack = Element::kPack;
    const int64_t top = h - layout_.pad_top;
    const int64_t first = max(0, -top / kPack);
    const int64_t last = min(layout_.weights.tap_rows, ceil_div(layout_.height - top, kPack));
    const int64_t next = top + s_.kernel_h;
    const bool reads = kPack == 1 && next < layout_.height;
    Strip<float, PackedVec> strip;  // not zeroed as a whole, which would take as long as some outputs
    strip.first = channels.input + (top + first * kPack) * layout_.pitch;
    strip.ring_begin = strip.first;
    strip.ring_end = channels.input + (layout_.height + kPack * (s_.kernel_h + 1)) * layout_.pitch;  // never reached
    strip.pitch = kPack * layout_.pitch;
    strip.weight = channels.weight + first * s_.kernel_w;
    strip.weight_pitch = s_.kernel_w;
    row_plan_.apply_to(strip, last - first);
    strip.start = Vec<float>{};
    strip.read = reads ? input_lines_ : PrefetchLines{};
    strip.read.first = reinterpret_cast<const char*>(channels.map + next * layout_.pitch * kLanes);
    strip.write = output_lines_;
    strip.write.first = reinterpret_cast<const char*>(to + 2 * layout_.width * kLanes);
    convolve_row(strip, row_plan_, sums);
  }

  // The mean over each map: maps -> panels.
  void pool(int64_t begin, int64_t end) const {
    const Blocking<Element> blocking = head_blocking();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / layout_.weights.dim_vectors;
      const int64_t vector = task % layout_.weights.dim_vectors;
      CompensatedSum<Vec<float>> sum;
      for (int64_t h = 0; h < layout_.height; ++h) {
        const Element* row = map_of(image, vector) + (h * layout_.pitch + layout_.pad_left) * kLanes;
        for (int64_t w = 0; w < layout_.width; ++w) sum.add(Element::load(row + w * kLanes));
      }
      const Vec<float> mean = sum.value() / float(layout_.height * layout_.width);
      Element::store(PanelCursor<Element>(blocking, pooled_, vector, image)[image], mean);
    }
  }

  // Panels -> logits.
  void head(int64_t begin, int64_t end, Scratch& scratch) const {
    const Element* weight = packed_ + layout_.weights.head;
    const Element* bias = packed_ + layout_.weights.head_bias;
    constexpr int64_t kKcSum = max(1, 16 / kLanes);  // nothing averages out what the logits' sums round away
    int64_t first_image = 0;
    const auto keep_first = [&](int64_t first, int64_t) { first_image = first; };
    const Blocking<Element> blocking = head_blocking();
    macrokernel(blocking, pooled_, weight, kKcSum, begin, end, scratch, keep_first,
                [&](int64_t, int64_t tile, int64_t first_panel, int64_t panels, AccumulatorTile* results) {
                  const int64_t image = first_image + first_panel * blocking.mr;
                  for (int64_t v = 0; v < kNrVectors; ++v) {
                    const int64_t first = tile * kNr + v * kLanes;
                    const int64_t columns = min(kLanes, s_.classes - first);
                    if (columns <= 0) continue;
                    Vec<float> biases;
                    memcpy(&biases, bias + first * layout_.weights.kFloat, sizeof biases);
                    for (int64_t i = 0; i < min(panels * blocking.mr, p_.batch - image); ++i) {
                      const Vec<float> logits = results[i / blocking.mr][v][i % blocking.mr] + biases;
                      S* to = static_cast<S*>(p_.y) + (image + i) * s_.classes + first;
                      store_pixels(to, 1, 0, columns, 1, &logits);
                    }
                  }
                });
  }

  const MixerParams& p_;
  const MixerSizes& s_;
  const RunLayout<Element> layout_;
  const Element* packed_;  // the weights
  Element* maps_;
  Element* panels_;
  Element* pooled_;             // panels: a pixel is an image
  RowPlan row_plan_;            // for a map's row
  PrefetchLines input_lines_;   // what a strip prefetches of a row of a blocked map
  PrefetchLines output_lines_;  // what a strip prefetches of a row of the packed A panels
  int64_t band_rows_;           // per task of the depthwise convolution
  int64_t bands_;               // per quadrant of an image
};

}  // namespace
}  // namespace convmixer_fast::cpu
