// A whole ConvMixer on the CPU, one source for every instruction set: each mixer_<isa>.cpp includes this file once.
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
#include "depthwise_kernel.h"
#include "mixer.h"

namespace convmixer_fast::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------- schemes

// How a product of matrices is made of `products` products of their parts: each multiplies the left operand's parts,
// summed with these signs, by the right one's, and is added to the result's parts with its signs. A matrix has
// halves x halves parts; part halves i + j is half i of its rows and half j of its columns.
struct Scheme {
  static constexpr int kMostProducts = 7, kMostParts = 4;
  using Signs = int8_t[kMostProducts][kMostParts];

  int products, halves;
  Signs left, right, result;

  constexpr int parts() const { return halves * halves; }

  // Whether each product of a left and a right part ends up where it belongs, once, and nowhere else.
  constexpr bool is_right() const {
    for (int l = 0; l < parts(); ++l)
      for (int r = 0; r < parts(); ++r)
        for (int p = 0; p < parts(); ++p) {
          int times = 0;
          for (int m = 0; m < products; ++m) times += left[m][l] * right[m][r] * result[m][p];
          const bool meet = l % halves == r / halves, here = p == l / halves * halves + r % halves;
          if (times != (meet && here)) return false;
        }
    return true;
  }
};

constexpr Scheme kPlain = {1, 1, {{1}}, {{1}}, {{1}}};
static_assert(kPlain.is_right());

// Seven products of half the size in place of eight (V. Strassen, "Gaussian elimination is not optimal", 1969).
constexpr Scheme kStrassen = {
    7,
    2,
    {{1, 0, 0, 1}, {0, 0, 1, 1}, {1, 0, 0, 0}, {0, 0, 0, 1}, {1, 1, 0, 0}, {-1, 0, 1, 0}, {0, 1, 0, -1}},
    {{1, 0, 0, 1}, {1, 0, 0, 0}, {0, 1, 0, -1}, {-1, 0, 1, 0}, {0, 0, 0, 1}, {1, 1, 0, 0}, {0, 0, 1, 1}},
    {{1, 0, 0, 1}, {0, 0, 1, -1}, {0, 1, 0, 1}, {1, 0, 1, 0}, {-1, 1, 0, 0}, {0, 0, 0, 1}, {1, 0, 0, 0}}};
static_assert(kStrassen.is_right());

// ---------------------------------------------------------------------------------------------------- operands

// An operand type is a storage type with which the convolutions multiply: weights, panels and planes are made of it.
// They take kDepth neighbouring values at once, as one Group: the product those of channels, the depthwise convolution
// those of rows, for which `interleave` makes vectors of groups from two rows' vectors.
struct FloatOperand : Native<float> {
  using Group = float;
  using Groups = Vec<float>;
  static constexpr int kDepth = 1;
  // Rows of the left operand that AVX-512's multiplications broadcast themselves: more loads, but fewer instructions.
  static constexpr int kRowsLoadedTwice = CMF_VECTOR_BYTES == 64 ? 8 : 0;
  // Channels whose weights stay in the nearest cache while panels pass by. Strassen's results, of which each product
  // changes up to two, had better be read and written more rarely.
  static constexpr int64_t chunk(const Scheme& scheme) { return scheme.products > 1 ? 384 : 128; }
  // Channels to sum before they are added to the rest. Without FMA each product is rounded; Strassen's results are
  // differences of larger sums.
  static constexpr int64_t summed_at_once(const Scheme& scheme) {
    return scheme.products > 1 ? 64 : CMF_VECTOR_BYTES > 16 ? 128 : 64;
  }
  static CMF_INLINE Groups broadcast(Group group) { return group - Groups{}; }  // (+ would turn -0 into 0)
  static CMF_INLINE FloatOperand from(float value) { return {value}; }
  CMF_INLINE void add(float v) { value += v; }
  template <class F>
  static CMF_INLINE void apply(const Pointwise<float>& pointwise, const Vec<float>* v, int64_t n, F emit) {
    pointwise.apply(v, n, emit);
  }
};

#if defined(CMF_BF16_DOT)
struct BFloat16Operand : BFloat16 {
  using Group = int32_t;
  struct Groups {
    __m512bh pairs;
  };
  static constexpr int kDepth = 2;
  static constexpr int kRowsLoadedTwice = 0;
  static constexpr int64_t chunk(const Scheme&) { return 512; }
  static constexpr int64_t summed_at_once(const Scheme& scheme) { return chunk(scheme); }
  static CMF_INLINE Groups broadcast(Group group) { return {bit_cast<__m512bh>(group + Bits{})}; }
  static CMF_INLINE void store(BFloat16* to, Vec<float> v) {
    const __m256bh narrow = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
    memcpy(to, &narrow, sizeof narrow);
  }
  static CMF_INLINE BFloat16Operand from(float value) { return {uint16_t(bit_cast<uint32_t>(value) >> 16)}; }
  CMF_INLINE void add(float v) { value = from(bit_cast<float>(uint32_t(value) << 16) + v).value; }
  static CMF_INLINE Groups interleave(const BFloat16* first, const BFloat16* second) {
    return {bit_cast<__m512bh>(load_bits16(second) << 16 | load_bits16(first))};
  }
  template <class F>
  static CMF_INLINE void apply(const Pointwise<float>& pointwise, const Vec<float>* v, int64_t n, F emit) {
    if (pointwise.activation != Activation::kGelu) return pointwise.apply(v, n, emit);
    // Off by 1.5e-4 of t Phi(-t) for t < 3, by 1.2e-5 at most beyond: little beside the rounding that follows.
    constexpr GeluPolynomials<6, 4> kShort = {
        {-0.00034311707713641226f, 0.006076470948755741f, -0.04918081313371658f, -0.4626516103744507f,
         -1.1500352621078491f, 0.f},
        {0.05517122149467468f, 0.24261100590229034f, 0.6932610273361206f, 0.9999280571937561f}};
    pointwise.apply_in_step(v, n, [&](auto& z) CMF_INLINE_LAMBDA { gelu(z, kShort); }, emit);
  }
};

CMF_INLINE Vec<float> multiply_add(Vec<float> sum, BFloat16Operand::Groups a, BFloat16Operand::Groups b) {
  return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), a.pairs, b.pairs));
}
#endif

// ---------------------------------------------------------------------------------------------------- matrix product

#if CMF_VECTOR_REGISTERS == 32  // 28 sums, 2 weights, the left operand
constexpr int kMaxRows = 14, kMinRows = 12;
#else  // 16: 12 sums
constexpr int kMaxRows = 6, kMinRows = 5;
#endif
// Rows of a tile: the most, or a few less where all threads then get the same work.
static_assert(kMinRows * 2 >= 10, "fewer sums would wait for each other: two FMAs a cycle, of up to five cycles each");
constexpr int kVectors = 2;  // of output channels
constexpr int kColumns = kVectors * kLanes<float>;

using Tile = Vec<float>[kVectors][kMaxRows];

// The lines that a product of `depth` channel vectors has to prefetch: `count` at `first`, and as many in each of the
// next ones' columns.
struct Ahead {
  const char* first;
  int64_t count;
};

// Where a product goes.
struct Target {
  Tile* tile;
  enum How { kSet, kAdd, kSubtract } how;
};

// to[v][r] = or += or -= sum[v][r], by `update`.
template <int kRows, class Update>
CMF_INLINE void for_tile(Tile& to, const Tile& sum, Update update) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) update(to[v][r], sum[v][r]);
}

// Left (kRows pixels, `pitch` from channel vector to channel vector) times right (kColumns), to all targets. Sums of
// `at_once` channel vectors are added up in `memory`. Not inline: its loop wants all vector registers.
template <int kRows, class Operand>
__attribute__((noinline)) void multiply(const Operand* left, int64_t pitch, const Operand* right, int64_t depth,
                                        int64_t at_once, Ahead ahead, const Target* targets, int64_t target_count,
                                        Tile& memory) {
  using Groups = typename Operand::Groups;
  constexpr int n = kLanes<float>, kDepth = Operand::kDepth;
  const auto set = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to = s; };
  const auto add = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to += s; };
  const auto subtract = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to -= s; };
  Tile sum = {};
  const Operand* same = left;  // which the compiler is not to see, or it would load once
  asm("" : "+r"(same));
  for (int64_t i = 0, end = at_once; i < depth; ++i) {
    if (i == end) {
      if (i == at_once) for_tile<kRows>(memory, sum, set);
      else for_tile<kRows>(memory, sum, add);
      for_tile<kRows>(sum, sum, [](Vec<float>& to, const Vec<float>&) CMF_INLINE_LAMBDA { to = Vec<float>{}; });
      end += at_once;
    }
#pragma GCC unroll 1
    for (int k = 0; k < n; k += kDepth) {
      Groups weight[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) memcpy(&weight[v], right + v * n * kDepth, sizeof(Groups));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          typename Operand::Group group;
          memcpy(&group, (v > 0 && r < Operand::kRowsLoadedTwice ? same : left) + r * n + k, sizeof group);
          sum[v][r] = multiply_add(sum[v][r], Operand::broadcast(group), weight[v]);
        }
      }
      right += kColumns * kDepth;
    }
    left += pitch, same += pitch;
    for (int64_t l = 0; l < ahead.count; ++l) __builtin_prefetch(ahead.first + l * 64, 0, 2);
    ahead.first += kColumns * n * sizeof(Operand);
  }
  if (depth > at_once) for_tile<kRows>(sum, memory, add);
  for (const Target* target = targets; target < targets + target_count; ++target) {
    switch (target->how) {
      case Target::kSet: for_tile<kRows>(*target->tile, sum, set); break;
      case Target::kAdd: for_tile<kRows>(*target->tile, sum, add); break;
      case Target::kSubtract: for_tile<kRows>(*target->tile, sum, subtract);
    }
  }
}

// By rows, from kMinRows on.
template <class Operand, int... kMore>
constexpr auto multiply_for(int64_t rows, std::integer_sequence<int, kMore...>) {
  constexpr decltype(&multiply<kMaxRows, Operand>) all[] = {&multiply<kMinRows + kMore, Operand>...};
  return all[rows - kMinRows];
}

// How a product is cut into tasks, each a group of panels times a block of column tiles; and where the panels' elements
// lie. All sizes are those of a part.
template <class Operand>
struct ProductPlan {
  static constexpr int64_t n = kLanes<float>;
  static constexpr int64_t kMaxPanels = 24;  // of a group
  static constexpr int64_t kMaxTiles = 12;   // of a block
  static constexpr double kUneven = 1.03;    // the longest thread's share over the mean one, accepted

  const Scheme& scheme;
  int64_t tiles, depth;
  int64_t block, blocks;  // tiles of a block: of many, where sums of the panels' parts are made for all of them
  int64_t rows, panels, groups;

  // The fewest groups for which the L2 cache holds what is used again, the panels or the sums of their parts and the
  // results, for the weights pass by once for each group; more of them, or of fewer rows, where that busies all
  // threads.
  ProductPlan(const Scheme& scheme, int64_t pixels, int64_t tiles, int64_t depth, int64_t threads)
      : scheme(scheme), tiles(tiles), depth(depth) {
    const int64_t most = scheme.products == 1 ? 1 : max(1, min(kMaxTiles, tiles * pixels / (64 * threads)));
    blocks = ceil_div(tiles, most), block = ceil_div(tiles, max(1, blocks));
    const int64_t left = kMaxRows * depth * n * int64_t(sizeof(Operand));
    const int64_t panel = scheme.products == 1 ? 2 * left : left + block * scheme.parts() * int64_t(sizeof(Tile));
    const int64_t fitting = max(1, min(l2_bytes() / panel, kMaxPanels));
    double least = 0;
    for (int64_t r = kMaxRows; r >= kMinRows; --r) {
      const int64_t of_rows = ceil_div(pixels, r);
      for (int64_t g = ceil_div(of_rows, fitting); g <= of_rows && (least == 0 || least > kUneven); ++g) {
        const double uneven = longest_share(r, of_rows, g, threads) * double(threads) / double(blocks * pixels);
        if (least == 0 || uneven < least) rows = r, panels = of_rows, groups = g, least = uneven;
      }
    }
  }

  // The rows times tiles of the thread that has most.
  int64_t longest_share(int64_t rows, int64_t panels, int64_t groups, int64_t threads) const {
    return ceil_div(ceil_div(groups * blocks, threads) * panels, groups) * rows;
  }

  int64_t tasks() const { return groups * blocks; }
  int64_t left_depth() const { return scheme.parts() * depth; }  // the parts' channel vectors follow each other
  int64_t right_depth() const { return scheme.products * depth; }
  // Groups are equal to within a panel, and to both sides of the middle alike.
  int64_t first_panel(int64_t group) const { return (2 * group * panels + groups) / (2 * groups); }
  int64_t first_pixel(int64_t group) const { return first_panel(group) * rows; }
  int64_t group_of(int64_t pixel) const { return ((2 * (pixel / rows) + 1) * groups - 1) / (2 * panels); }
  int64_t pitch(int64_t group) const { return (first_pixel(group + 1) - first_pixel(group)) * n; }
};

// Where the elements of a channel vector lie, for pixels in rising order: those of a group follow each other.
template <class Operand>
class Slots {
  static constexpr int64_t n = kLanes<float>;

 public:
  Slots(const ProductPlan<Operand>& plan, Operand* panels, int64_t vector, int64_t pixel)
      : plan_(plan), panels_(panels), vector_(vector) {
    enter(plan.group_of(pixel));
  }

  Operand* operator[](int64_t pixel) {
    while (pixel >= end_) enter(group_ + 1);
    return pixel_0_ + pixel * n;
  }

  // How many pixels from the one last asked for on follow each other.
  int64_t successive(int64_t pixel) const { return end_ - pixel; }

 private:
  void enter(int64_t group) {
    const int64_t first = plan_.first_pixel(group);
    group_ = group, end_ = plan_.first_pixel(group + 1);
    pixel_0_ = panels_ + (first * plan_.left_depth() + vector_ * (end_ - first) - first) * n;
  }

  const ProductPlan<Operand>& plan_;
  Operand* panels_;
  int64_t vector_, group_, end_;
  Operand* pixel_0_;  // where pixel 0 would lie if it were of this group
};

// The sum of the parts that have a sign, at most two, each `values` values, one after another: where it lies, in memory
// of its own unless it is one of them.
template <class Operand>
const Operand* signed_sum(const int8_t* sign, int64_t parts, const Operand* part, int64_t values, Operand* memory) {
  const Operand *positive = nullptr, *other = nullptr;
  bool adds = true;
  for (int64_t p = 0; p < parts; ++p, part += values) {
    if (sign[p] == 0) continue;
    if (sign[p] > 0 && !positive) positive = part;
    else other = part, adds = sign[p] > 0;
  }
  if (!other) return positive;
  for (int64_t i = 0; i < values; i += kLanes<float>) {
    const Vec<float> a = Operand::load(positive + i), b = Operand::load(other + i);
    Operand::store(memory + i, adds ? a + b : a - b);
  }
  return memory;
}

// The tasks [begin, end): on_group(first pixel, pixels) before the first tile of a group, on_tile(pixel, part, column
// tile, tile of results) for each, pixel counted in the group. Sums of `at_once` channel vectors are added up. All
// panels of a group pass by a chunk of the weights before the next one.
template <class Operand, class OnGroup, class OnTile>
void multiply_tasks(const ProductPlan<Operand>& plan, const Operand* left, const Operand* right, int64_t at_once,
                    int64_t begin, int64_t end, Scratch& scratch, OnGroup on_group, OnTile on_tile) {
  constexpr int64_t n = kLanes<float>, kLines = kColumns * n * int64_t(sizeof(Operand)) / 64;
  const Scheme& scheme = plan.scheme;
  const int64_t parts = scheme.parts(), chunk = Operand::chunk(scheme) / n, chunks = ceil_div(plan.depth, chunk);
  const int64_t tile_count = plan.kMaxPanels * plan.block * parts;
  const int64_t sums = scheme.products > 1 ? plan.kMaxPanels * kMaxRows * plan.depth * n : 0;
  Tile* tiles = static_cast<Tile*>(scratch.reserve(tile_count * sizeof(Tile) + sums * sizeof(Operand)));
  Operand* sum = reinterpret_cast<Operand*>(tiles + tile_count);
  const auto multiply = multiply_for<Operand>(plan.rows, std::make_integer_sequence<int, kMaxRows - kMinRows + 1>());
  Tile partial;  // its memory
  int first_product[Scheme::kMostParts] = {};
  for (int part = 0; part < parts; ++part)
    while (scheme.result[first_product[part]][part] == 0) ++first_product[part];

  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / plan.blocks, first_column = task % plan.blocks * plan.block;
    const int64_t columns = min(plan.block, plan.tiles - first_column);
    const int64_t first = plan.first_panel(group), panels = plan.first_panel(group + 1) - first;
    const int64_t pitch = plan.pitch(group);
    const Operand* from = left + first * plan.rows * plan.left_depth() * n;
    if (task == begin || first_column == 0) on_group(first * plan.rows, panels * plan.rows);

    const int64_t steps = scheme.products * columns * chunks;  // chunk by chunk, tile by tile, product by product
    const auto weights_at = [&](int64_t step) {
      const int64_t product = step / chunks / columns, column = first_column + step / chunks % columns;
      const int64_t vector = product * plan.depth + step % chunks * chunk;
      return right + (column * plan.right_depth() + vector) * kColumns * n;
    };
    const Operand* of_next_task = right + (first_column + columns) % plan.tiles * plan.right_depth() * kColumns * n;
    const Operand* operand = nullptr;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t product = step / chunks / columns, column = step / chunks % columns;
      const int64_t i = step % chunks * chunk, vectors = min(chunk, plan.depth - i);
      if (step % (columns * chunks) == 0)
        operand = signed_sum(scheme.left[product], parts, from, plan.depth * pitch, sum);
      const Operand* weight = weights_at(step);
      const Operand* later = step + 1 < steps ? weights_at(step + 1) : of_next_task;
      for (int64_t p = 0; p < panels; ++p) {
        Tile* results = tiles + (column * panels + p) * parts;
        Target targets[Scheme::kMostParts];
        int64_t target_count = 0;
        for (int part = 0; part < parts; ++part)
          if (const int sign = scheme.result[product][part])
            targets[target_count++] = {results + part, i == 0 && product == first_product[part] ? Target::kSet
                                                       : sign > 0                               ? Target::kAdd
                                                                                                : Target::kSubtract};
        const int64_t line = p * kLines / panels;
        const Ahead ahead{reinterpret_cast<const char*>(later) + line * 64, (p + 1) * kLines / panels - line};
        multiply(operand + i * pitch + p * plan.rows * n, pitch, weight, vectors, at_once, ahead, targets, target_count,
                 partial);
        if (product + 1 < scheme.products || i + vectors < plan.depth) continue;
        for (int part = 0; part < parts; ++part) on_tile(p * plan.rows, part, first_column + column, results[part]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- layouts

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

// ---------------------------------------------------------------------------------------------------- packing

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

// ---------------------------------------------------------------------------------------------------- steps

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
    Pointwise<float> pointwise;
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
      const Lines read = lines(of.plane + (next * w_.pitch + w + shared) * n, unread);
      const Lines write = lines(to + 2 * w_.width * n, columns);  // two rows ahead
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
  void convolve(const Groups* input, const Groups* weight, int64_t h, int64_t columns, const Lines& read,
                const Lines& write, Vec<float>* sums) const {
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

  static Lines lines(const Operand* first, int64_t vectors) {
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

// ---------------------------------------------------------------------------------------------------- entry points

// f(storage type, operand type): float32 arithmetic but for bfloat16 where the processor has dot products of it. There
// these are all that differs, and the kernels of the other types are those of AVX-512 without BF16.
template <class F>
CMF_INLINE auto with_mixer_types([[maybe_unused]] DType dtype, F f) {
#if defined(CMF_BF16_DOT)
  return f(BFloat16(), BFloat16Operand());
#else
  switch (dtype) {
    case DType::kFloat16: return f(Float16(), FloatOperand());
    case DType::kBFloat16: return f(BFloat16(), FloatOperand());
    default: return f(Native<float>(), FloatOperand());
  }
#endif
}

int64_t packed_bytes(const MixerSizes& s) {
  return with_mixer_types(
      s.dtype, [&](auto, auto operand) { return bytes<decltype(operand)>(Layout<decltype(operand)>(s).end); });
}

void pack(const MixerSizes& s, const MixerWeights& weights, void* packed) {
  with_mixer_types(s.dtype, [&](auto storage, auto operand) {
    Packing<decltype(storage), decltype(operand)>(s, weights, packed).run();
  });
}

int64_t workspace_bytes(const MixerParams& p) {
  return with_mixer_types(
      p.sizes.dtype, [&](auto, auto operand) { return bytes<decltype(operand)>(Workspace<decltype(operand)>(p).end); });
}

int64_t mixer_tasks(const MixerParams& p, MixerStep step) {
  return with_mixer_types(p.sizes.dtype, [&](auto storage, auto operand) {
    return Mixer<decltype(storage), decltype(operand)>(p).tasks(step);
  });
}

void run_mixer(const MixerParams& p, MixerStep step, int64_t begin, int64_t end) {
  Scratch scratch;
  with_mixer_types(p.sizes.dtype, [&](auto storage, auto operand) {
    Mixer<decltype(storage), decltype(operand)>(p).run(step, begin, end, scratch);
  });
}

constexpr MixerKernels kMixerKernels = {packed_bytes, pack, workspace_bytes, mixer_tasks, run_mixer};

}  // namespace
}  // namespace convmixer_fast::cpu
