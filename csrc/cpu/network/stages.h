// A whole ConvMixer on the CPU.
//
// Two buffers take turns. `planes` holds activations by channel vector: (image, vector, row, column), each row with its
// zero padding left and right, so that the depthwise convolution reads it as it stands. `panels` holds the left operand
// of a matrix product: (panel of pixels, channel vector, pixel), so that the product reads it from end to end. A
// step reads one and writes the other, applies bias, activation and BatchNorm while its results are in registers or in
// the L1 cache, and ends at a barrier:
//   patches: images -> panels   project: panels -> planes   depthwise: planes -> panels   pointwise: panels -> planes
//   pool: planes -> panels      head: panels -> logits
// Every output is one thread's sum in one order: any number of threads gives the same bits.
#pragma once
#include <utility>

#include "../compensated_sum.h"
#include "../depthwise/microkernel.h"
#include "../gemm/macrokernel.h"
#include "../gemm/pack.h"
#include "layout.h"

namespace convmixer_fast::cpu {
namespace {

template <class S, class Operand>
class Mixer {
  static constexpr int64_t n = kLanes<float>;
  static constexpr int64_t kTasks = 64;    // of a depthwise convolution, wanted, for the threads to share
  static constexpr int64_t kBandRows = 8;  // of such a task, at least
  static constexpr int64_t kFewPixels = 4;
  using Groups = typename Operand::Groups;

 public:
  explicit Mixer(const MixerParams& p)
      : p_(p),
        s_(p.sizes),
        w_(p),
        packed_(static_cast<const Operand*>(p.packed)),
        planes_(static_cast<Operand*>(p.workspace)),
        panels_(planes_ + w_.panels),
        pooled_(planes_ + w_.pooled) {
    const int64_t wanted =
        max(ceil_div(p.threads, max(1, p.batch)), ceil_div(kTasks, max(1, p.batch * w_.scheme.halves * w_.depth)));
    band_rows_ = max(min(w_.part_height, kBandRows), ceil_div(w_.part_height, wanted));
    bands_ = ceil_div(w_.part_height, band_rows_);
  }

  int64_t tasks(MixerStep step) const {
    switch (step.kind) {
      case MixerStep::kPatches: return patch_product().panels + p_.batch * w_.depth;
      case MixerStep::kProject: return patch_product().tasks();
      case MixerStep::kDepthwise: return p_.batch * w_.scheme.parts() * w_.part_depth * bands_;
      case MixerStep::kPointwise: return product().tasks();
      case MixerStep::kPool: return p_.batch * w_.depth;
      case MixerStep::kHead: return head_product().tasks();
    }
    __builtin_unreachable();
  }

  void run(MixerStep step, int64_t begin, int64_t end, Scratch& scratch) const {
    switch (step.kind) {
      case MixerStep::kPatches: return patches(begin, end, scratch);
      case MixerStep::kProject: return pointwise(patch_product(), packed_, 0, begin, end, scratch);
      case MixerStep::kDepthwise: return depthwise(step.layer, begin, end, scratch);
      case MixerStep::kPointwise: {
        const Operand* weight = packed_ + w_.pointwise + step.layer * w_.pointwise_layer;
        return pointwise(product(), weight, 2 * step.layer + 2, begin, end, scratch);
      }
      case MixerStep::kPool: return pool(begin, end);
      case MixerStep::kHead: return head(begin, end, scratch);
    }
  }

 private:
  ProductPlan<Operand> patch_product() const { return {kPlain, w_.pixels, w_.tiles, w_.patch_depth, p_.threads}; }
  ProductPlan<Operand> product() const { return {w_.scheme, w_.part_pixels, w_.part_tiles, w_.part_depth, p_.threads}; }
  ProductPlan<Operand> head_product() const { return {kPlain, p_.batch, w_.head_tiles, w_.depth, p_.threads}; }
  Operand* plane(int64_t image, int64_t vector) const { return planes_ + (image * w_.depth + vector) * w_.plane; }

  // What follows a convolution: the pointwise functions with the lesser part of their shift, then the rest is added. It
  // costs a rounding, which a mean over pixels makes up for: of a few, the lesser part comes last and all but goes.
  struct Epilogue {
    Elementwise<float> pointwise;
    Vec<float> shift;
  };

  Epilogue epilogue(int64_t convolution, int64_t vector) const {
    Epilogue result;
    Vec<float>* const all[w_.kVectorsAfter] = {&result.pointwise.bias, &result.pointwise.scale, &result.shift,
                                               &result.pointwise.shift};
    for (int which = 0; which < w_.kVectorsAfter; ++which)
      memcpy(all[which], packed_ + w_.vector(convolution, which) + vector * n * w_.kFloat, sizeof(Vec<float>));
    result.pointwise.activation = s_.activation;
    if (w_.height * w_.width < kFewPixels) {
      const Vec<float> lesser = result.pointwise.shift;
      result.pointwise.shift = result.shift, result.shift = lesser;
    }
    return result;
  }

  // Panels of the images' patches; and zeros into the planes' padding.
  void patches(int64_t begin, int64_t end, Scratch& scratch) const {
    int64_t* offset = static_cast<int64_t*>(scratch.reserve(w_.patch * sizeof(int64_t)));
    for (int64_t k = 0; k < w_.patch; ++k)
      offset[k] = k / (s_.patch_h * s_.patch_w) * p_.x_stride.c + k / s_.patch_w % s_.patch_h * p_.x_stride.h +
                  k % s_.patch_w * p_.x_stride.w;
    const ProductPlan<Operand> plan = patch_product();
    for (int64_t task = begin; task < end; ++task) {
      if (task < plan.panels) {
        for (int64_t r = 0; r < plan.rows; ++r) pack_patch(plan, task * plan.rows + r, offset);
      } else {
        Operand* row = planes_ + (task - plan.panels) * w_.plane;
        for (int64_t h = 0; h < w_.height; ++h, row += w_.pitch * n) {
          memset(row, 0, w_.pad_left * n * sizeof(Operand));
          const int64_t right = w_.pad_left + w_.width;
          memset(row + right * n, 0, (w_.pitch - right) * n * sizeof(Operand));
        }
      }
    }
  }

  void pack_patch(const ProductPlan<Operand>& plan, int64_t pixel, const int64_t* offset) const {
    const int64_t h = pixel / w_.width % w_.height, w = pixel % w_.width;
    const S* x = static_cast<const S*>(p_.x) + pixel / (w_.width * w_.height) * p_.x_stride.n +
                 h * s_.patch_h * p_.x_stride.h + w * s_.patch_w * p_.x_stride.w;
    for (int64_t k = 0; k < w_.patch_depth; ++k) {
      S lanes[n] = {};
      if (pixel < w_.pixels)
        for (int64_t i = k * n; i < min(w_.patch, k * n + n); ++i) lanes[i - k * n] = x[offset[i]];
      Operand::store(Slots<Operand>(plan, panels_, k, pixel)[pixel], S::load(lanes));
    }
  }

  // A 1x1 convolution, or that of the patches: panels -> planes.
  void pointwise(const ProductPlan<Operand>& plan, const Operand* weight, int64_t convolution, int64_t begin,
                 int64_t end, Scratch& scratch) const {
    const int64_t halves = plan.scheme.halves;
    const int64_t height = ceil_div(w_.height, halves), all = p_.batch * height * w_.width;  // of a part
    constexpr int64_t kOutside = -1;
    // Of the pixels of the group, and of a panel to prefetch, in each half of the map.
    int64_t slots[2][(ProductPlan<Operand>::kMaxPanels + 1) * kMaxRows];
    int64_t pixels = 0;  // of the group, and of the map
    const auto find_slots = [&](int64_t first, int64_t count) {
      pixels = min(count, all - first);
      int64_t image = first / (height * w_.width), h = first / w_.width % height, w = first % w_.width;
      for (int64_t i = 0; i < count + plan.rows; ++i) {
        for (int64_t half = 0; half < halves; ++half) {
          const int64_t row = half * height + h;
          const int64_t slot = image * w_.depth * w_.plane + (row * w_.pitch + w_.pad_left + w) * n;
          slots[half][i] = row < w_.height ? slot : kOutside;
        }
        if (i + 1 >= pixels || ++w < w_.width) continue;
        w = 0;
        if (++h == height) h = 0, ++image;
      }
    };
    multiply_tasks(plan, panels_, weight, Operand::summed_at_once(plan.scheme) / n, begin, end, scratch, find_slots,
                   [&](int64_t pixel, int64_t part, int64_t column, Tile& tile) {
                     const int64_t* slot = slots[part / halves] + pixel;
                     const int64_t first = (column + part % halves * plan.tiles) * kVectors;
                     for (int64_t v = 0; v < min(kVectors, w_.depth - first); ++v) {
                       Operand* map = planes_ + (first + v) * w_.plane;
                       const auto [pointwise, shift] = epilogue(convolution, first + v);
                       Operand::apply(pointwise, tile[v], min(plan.rows, pixels - pixel), [&](int64_t r, Vec<float> z) {
                         if (slot[r] != kOutside) Operand::store(map + slot[r], z + shift);
                         __builtin_prefetch(map + slot[plan.rows + r], 1, 2);  // of the next panel
                       });
                     }
                   });
  }

  // A channel vector of an image, and what the depthwise convolution of some of its rows needs.
  struct Channels {
    const Operand* plane;
    const Groups* input;  // row 0 of the map
    const Groups* weight;
    Epilogue after;
  };

  // Planes -> panels, row by row: the rows that sums share stay in the L1 cache, memory is read from end to end.
  void depthwise(int64_t layer, int64_t begin, int64_t end, Scratch& scratch) const {
    const int64_t groups = Operand::kDepth > 1 ? (band_rows_ + s_.kernel_h) * w_.pitch : 0;
    Groups* memory = static_cast<Groups*>(scratch.reserve(groups * sizeof(Groups)));
    const ProductPlan<Operand> plan = product();
    const int64_t halves = plan.scheme.halves, vectors = halves * plan.depth;
    for (int64_t task = begin; task < end; ++task) {
      // Bands first: a thread then finds most of what it reads, here and in the product, where it has written it.
      const int64_t vector = task % vectors, half = task / vectors % halves;
      const int64_t band = task / (vectors * halves) % bands_, image = task / (vectors * halves) / bands_;
      const int64_t first = band * band_rows_, last = min(w_.part_height, first + band_rows_);
      const int64_t top = half * w_.part_height, first_pixel = image * w_.part_height * w_.width;
      const int64_t of_part = (half * halves + vector / plan.depth) * plan.depth + vector % plan.depth;
      Slots<Operand> slots(plan, panels_, of_part, first_pixel + first * w_.width);
      const Channels of = channels(layer, image, min(vector, w_.depth - 1), top + first, top + last, memory);
      for (int64_t h = first; h < last; ++h) {
        const int64_t pixel = first_pixel + h * w_.width;
        const auto place = [&](int64_t w, int64_t& count) {
          Operand* to = slots[pixel + w];
          count = min(count, slots.successive(pixel + w));
          return to;
        };
        if (vector < w_.depth && top + h < w_.height) {
          depthwise_row(of, top + h, place);
        } else {  // a part's, but not the network's: it goes into sums
          for (int64_t w = 0, count; w < w_.width; w += count) {
            count = w_.width - w;
            Operand* to = place(w, count);
            memset(to, 0, count * n * sizeof(Operand));
          }
        }
      }
    }
  }

  Channels channels(int64_t layer, int64_t image, int64_t vector, int64_t first, int64_t last, Groups* memory) const {
    Channels of;
    of.plane = plane(image, vector);
    const int64_t top = first - w_.pad_top;  // the map's row in row 0 of the input
    of.input = input_rows(of.plane, top, last - w_.pad_top + s_.kernel_h - 1, memory) - top * w_.pitch;
    of.weight = reinterpret_cast<const Groups*>(packed_ + w_.depthwise + layer * w_.depthwise_layer +
                                                vector * w_.tap_rows * s_.kernel_w * n * Operand::kDepth);
    of.after = epilogue(2 * layer + 1, vector);
    return of;
  }

  // Row h, with what follows the convolution, to place(column, count): where `count` or, by its choice, fewer values
  // from that column on go. Prefetches what the next row reads in addition, and where rows after it are written.
  template <class Place>
  void depthwise_row(const Channels& of, int64_t h, Place place) const {
    const int64_t next = h + s_.kernel_h - w_.pad_top;  // the row that the next output row adds
    const bool reads = Operand::kDepth == 1 && next < w_.height;
    for (int64_t w = 0, columns; w < w_.width; w += columns) {
      columns = ceil_div(w_.width - w, ceil_div(w_.width - w, kMaxColumns));
      const int64_t shared = w > 0 ? s_.kernel_w - 1 : 0;  // columns, with the strip before
      const int64_t unread = reads ? columns + s_.kernel_w - 1 - shared : 0;
      int64_t count = columns;
      const Operand* to = place(w, count);
      const PrefetchLines read = lines(of.plane + (next * w_.pitch + w + shared) * n, unread);
      const PrefetchLines write = lines(to + 2 * w_.width * n, columns);  // two rows ahead
      Vec<float> sums[kMaxColumns];
      convolve(of.input + w, of.weight, h, columns, read, write, sums);
      emit(of.after, of.plane + (h * w_.pitch + w_.pad_left + w) * n, sums, w, columns, place);
    }
  }

  // Groups of kDepth rows for each row from `begin` to `end` that meets the map, at its distance from row `begin`.
  const Groups* input_rows(const Operand* from, int64_t begin, int64_t end, Groups* to) const {
    if constexpr (Operand::kDepth == 1) {
      return reinterpret_cast<const Groups*>(from) + begin * w_.pitch;
    } else {
      for (int64_t h = max(-1, begin); h < min(w_.height, end); ++h) {
        Groups* row = to + (h - begin) * w_.pitch;
        const Operand* first = from + h * w_.pitch * n;
        const Operand zeros[n] = {};
        for (int64_t w = 0; w < w_.pitch; ++w, first += n)
          row[w] = Operand::interleave(h < 0 ? zeros : first, h + 1 == w_.height ? zeros : first + w_.pitch * n);
      }
      return to;
    }
  }

  // The sums of a strip of row h; tap rows outside the map are left out.
  void convolve(const Groups* input, const Groups* weight, int64_t h, int64_t columns, const PrefetchLines& read,
                const PrefetchLines& write, Vec<float>* sums) const {
    constexpr int64_t kDepth = Operand::kDepth;
    const int64_t top = h - w_.pad_top;
    const int64_t first = max(0, -top / kDepth), last = min(w_.tap_rows, ceil_div(w_.height - top, kDepth));
    Strip<float, Groups> strip = {};
    strip.first = input + (top + first * kDepth) * w_.pitch;
    strip.ring_end = input + (w_.height + kDepth * (s_.kernel_h + 1)) * w_.pitch;  // never reached
    strip.pitch = kDepth * w_.pitch;
    strip.weight = weight + first * s_.kernel_w;
    strip.weight_pitch = s_.kernel_w;
    strip.tap_rows = last - first;
    strip.taps = s_.kernel_w;
    strip.read = read, strip.write = write;
    convolve_row(strip, columns, sums);
  }

  static PrefetchLines lines(const Operand* first, int64_t vectors) {
    return {reinterpret_cast<const char*>(first), 64, ceil_div(vectors * n * int64_t(sizeof(Operand)), 64), 0};
  }

  // The epilogue, then the residual, if there is one; a strip from `column` on to where `place` wants it.
  template <class Place>
  void emit(const Epilogue& after, const Operand* residual, const Vec<float>* sums, int64_t column, int64_t columns,
            Place place) const {
    const bool adds = s_.residual;
    for (int64_t begin = 0, count; begin < columns; begin += count) {
      count = columns - begin;
      Operand* to = place(column + begin, count);
      Operand::apply(after.pointwise, sums + begin, count,
                     [=, shift = after.shift](int64_t w, Vec<float> z) CMF_INLINE_LAMBDA {
                       z += shift;
                       Operand::store(to + w * n, adds ? z + Operand::load(residual + (begin + w) * n) : z);
                     });
    }
  }

  // The mean over each map: planes -> panels.
  void pool(int64_t begin, int64_t end) const {
    const ProductPlan<Operand> plan = head_product();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / w_.depth, vector = task % w_.depth;
      CompensatedSum<Vec<float>> sum;
      for (int64_t h = 0; h < w_.height; ++h) {
        const Operand* row = plane(image, vector) + (h * w_.pitch + w_.pad_left) * n;
        for (int64_t w = 0; w < w_.width; ++w) sum.add(Operand::load(row + w * n));
      }
      const Vec<float> mean = sum.value() / float(w_.height * w_.width);
      Operand::store(Slots<Operand>(plan, pooled_, vector, image)[image], mean);
    }
  }

  // Panels -> logits.
  void head(int64_t begin, int64_t end, Scratch& scratch) const {
    const Operand *weight = packed_ + w_.head, *bias = packed_ + w_.head_bias;
    constexpr int64_t kAtOnce = max(1, 16 / n);  // nothing averages out what the logits' sums round away
    int64_t first_image = 0;
    const auto keep_first = [&](int64_t first, int64_t) { first_image = first; };
    const ProductPlan<Operand> plan = head_product();
    multiply_tasks(plan, pooled_, weight, kAtOnce, begin, end, scratch, keep_first,
                   [&](int64_t pixel, int64_t, int64_t column, Tile& tile) {
                     const int64_t image = first_image + pixel;
                     for (int64_t v = 0; v < kVectors; ++v) {
                       const int64_t first = column * kColumns + v * n, columns = min(n, s_.classes - first);
                       if (columns <= 0) continue;
                       Vec<float> biases;
                       memcpy(&biases, bias + first * w_.kFloat, sizeof biases);
                       for (int64_t r = 0; r < min(plan.rows, p_.batch - image); ++r) {
                         const Vec<float> logits = tile[v][r] + biases;
                         store_pixels(static_cast<S*>(p_.y) + (image + r) * s_.classes + first, 1, 0, columns, 1,
                                      &logits);
                       }
                     }
                   });
  }

  const MixerParams& p_;
  const MixerSizes& s_;
  const Workspace<Operand> w_;
  const Operand* packed_;
  Operand *planes_, *panels_, *pooled_;
  int64_t band_rows_, bands_;
};

}  // namespace
}  // namespace convmixer_fast::cpu
