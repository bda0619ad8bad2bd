// How the gradient of the weight cuts its work: which kernel, its geometry, and where the partial sums go. Host code,
// no CUDA.
//
// Items (some images or a tile of one channel, or of some channels) are numbered group by group of channels. Each block
// takes consecutive ones and sums over those of one group; a block that meets a new group first writes its sums away.
// So the sums of (block b, group g) are partial number b + g: along the items either a block or a group ends between
// two.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../params.h"
#include "depthwise_direct_tiles.h"
#include "depthwise_tiles.h"

#ifdef __CUDACC__
#define CMF_HOST_DEVICE __host__ __device__
#else
#define CMF_HOST_DEVICE
#endif

namespace convmixer_fast::cuda {

struct WgradDevice {
  int major;  // of the compute capability
  int multiprocessors;
  int block_smem, multiprocessor_smem;  // bytes that a block may have, that an SM has
};

// How blocks share the items, and the partial sums that they leave.
struct WgradShare {
  int64_t items;
  int64_t items_a_group;
  int64_t groups;  // of channels
  int channels;    // of a group
  int blocks;
  int64_t items_a_block;  // the first items % blocks of them have one more
  int64_t rest;           // items % blocks
  int64_t sums;           // of a channel in one partial: a tap each, and gy's

  CMF_HOST_DEVICE int64_t first_item(int64_t block) const {
    return block * items_a_block + (block < rest ? block : rest);
  }
  CMF_HOST_DEVICE int64_t block_of(int64_t item) const {
    const int64_t of_larger = rest * (items_a_block + 1);
    return item < of_larger ? item / (items_a_block + 1) : rest + (item - of_larger) / items_a_block;
  }
  CMF_HOST_DEVICE int64_t partial(int64_t block, int64_t group, int channel) const {  // its first element
    return ((block + group) * channels + channel) * sums;
  }
  int64_t partial_elements() const { return blocks == 0 ? 0 : (blocks + groups - 1) * channels * sums; }
};

// ------------------------------------------------------------------------------------------------ tensor cores

constexpr int kWgradRows = 8;          // tap rows of a warp where no instantiation has all of them
constexpr int kWgradMaxWarps = 16;     // of a block; and of an SM, by the registers
constexpr int kWgradFixedWarps = 4;    // of a block in which every warp has all taps
constexpr int kWgradDiagonals = 24;    // of a 16 x 8 product there are 23; the last is the sum of gy
constexpr int kWgradScratchPitch = 9;  // of a product in shared memory, so that neither rows nor diagonals share banks

// One of the two tensors in shared memory.
struct WgradOperand {
  int rows, cols;                    // loaded of one image: the map, or a tile with its halo
  int top, left;                     // stored rows above and columns left of the map or tile
  int pitch, band_gap, image_pitch;  // in elements
  int zero_unit;                     // where a unit that does not exist lies: zeros
  int elements;
  int load_step, store_step;  // of a prefetched item: from one piece of a thread to its next, in memory and here
};

struct WgradTile {
  bool fixed;                  // all tap rows in the registers of each warp, pitches kFixedPitch and kFixedOutPitch
  int tap_rows;                // of a warp
  int k_steps;                 // products of 16 stored columns that one row of taps needs
  int row_groups, passes;      // a pass takes this many groups of tap rows: one unless there are more than warps
  int images, bands, windows;  // of an item
  int tiles_h, tiles_w;        // of a map
  bool tiled;
  int units, groups;  // of an item, 16 units a group
  int splits;         // warps with the same taps share the groups
  int warps;          // splits x row_groups x k_steps
  WgradOperand x, gy;
  int lead;                                  // stored columns before the first tap of a window
  int load_vector, load_lanes, rows_a_step;  // as in MmaTile
  bool prefetch;
  int items_a_channel;

  CMF_HOST_DEVICE int tap_groups() const { return row_groups * k_steps; }
  int smem_bytes() const {
    return 2 * (x.elements + gy.elements) + 4 * warps * (tap_rows * kWgradDiagonals + kMmaDepth * kWgradScratchPitch);
  }
};

// The geometry for these params; false where the tensor-core kernel does not apply: float32 and float64, rows that are
// not contiguous, kernels over 240 wide.
inline bool choose_wgrad_tile(const WgradParams& params, WgradTile& tile) {
  using namespace tiles;
  constexpr int64_t kMaxOffset = int64_t{1} << 31;
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) return false;
  if (params.width > 1 && (params.x_stride.w != 1 || params.gy_stride.w != 1)) return false;
  // Indices and the offsets inside one item are 32-bit.
  for (const Strides& stride : {params.x_stride, params.gy_stride})
    if (std::max(kGroupUnits * stride.n, params.height * stride.h) >= kMaxOffset) return false;
  if (std::max({params.batch, params.channels, params.height, params.width}) >= kMaxOffset) return false;
  if (std::max(params.kernel_h, params.kernel_w) > kMmaDepth * kWgradMaxWarps) return false;

  const int kernel_h = static_cast<int>(params.kernel_h), kernel_w = static_cast<int>(params.kernel_w);
  const int pad_top = static_cast<int>(params.pad_top), pad_left = static_cast<int>(params.pad_left);
  tile = {};
  tile.x.top = pad_top;
  tile.x.left = static_cast<int>(std::max<int64_t>(kFixedLeft, round_up(pad_left, 4)));
  tile.lead = tile.x.left - pad_left;
  tile.k_steps = static_cast<int>(ceil_div(tile.lead + kernel_w + kUnit - 1, kMmaDepth));
  if (tile.k_steps > kWgradMaxWarps) return false;

  const auto set_units = [&](int64_t bands, int64_t windows, int64_t images) {
    tile.bands = static_cast<int>(bands), tile.windows = static_cast<int>(windows);
    tile.images = static_cast<int>(images);
    tile.tiles_h = static_cast<int>(ceil_div(params.height, bands * kUnit));
    tile.tiles_w = static_cast<int>(ceil_div(params.width, windows * kUnit));
    tile.tiled = tile.tiles_h * tile.tiles_w > 1;
    tile.units = tile.images * tile.bands * tile.windows;
    tile.groups = static_cast<int>(ceil_div(tile.units, kGroupUnits));
    tile.fixed =
        tile.k_steps == 1 && tile.windows <= kFixedWindows && kernel_h % 2 == 1 && 3 <= kernel_h && kernel_h <= 9;
    tile.tap_rows = tile.fixed ? kernel_h : kWgradRows;
    const int row_groups = static_cast<int>(ceil_div(kernel_h, tile.tap_rows));
    tile.passes = static_cast<int>(ceil_div(row_groups, kWgradMaxWarps / tile.k_steps));
    tile.row_groups = static_cast<int>(ceil_div(row_groups, tile.passes));
    tile.splits = std::min(tile.groups, std::max(1, kWgradFixedWarps / tile.tap_groups()));
    tile.warps = tile.splits * tile.tap_groups();

    const auto set_operand = [&](WgradOperand& operand, int rows, int pitch, int zero_rows, int zero_cols) {
      operand.rows =
          static_cast<int>(tile.tiled ? kUnit * bands + (&operand == &tile.x ? kernel_h - 1 : 0) : params.height);
      operand.pitch = pitch;
      operand.cols = static_cast<int>(tile.tiled ? pitch : params.width);
      operand.band_gap = gap_to_slot(kUnit * pitch, tile.windows);
      operand.image_pitch = rows * pitch + (rows + kUnit - 1) / kUnit * operand.band_gap;
      operand.image_pitch += gap_to_slot(operand.image_pitch, tile.bands * tile.windows);
      operand.zero_unit = tile.images * operand.image_pitch;
      const int zeros = tile.units % kGroupUnits == 0 ? 0 : zero_rows * pitch + operand.band_gap + zero_cols;
      operand.elements = operand.zero_unit + static_cast<int>(round_up(zeros, kUnit));
    };
    set_operand(tile.x, kUnit * tile.bands + tile.passes * tile.row_groups * tile.tap_rows - 1,
                tile.fixed ? kFixedPitch : kUnit * (tile.windows - 1) + kMmaDepth * tile.k_steps,
                kUnit + tile.tap_rows - 2, kMmaDepth);
    set_operand(tile.gy, kUnit * tile.bands, tile.fixed ? kFixedOutPitch : kUnit * tile.windows, kUnit - 1, kUnit);
    return tile.smem_bytes() <= kMaxSmem;
  };

  // As in the forward pass: the whole map of as many images as fill a group, else a tile of 64 x 64 or 32 x 32.
  const int64_t bands = ceil_div(params.height, kUnit), windows = ceil_div(params.width, kUnit);
  const int64_t images = std::max<int64_t>(1, kGroupUnits / std::min<int64_t>(kGroupUnits, bands * windows));
  bool found = false;
  for (int64_t some = std::min(params.batch, images); some > 0 && !found; some /= 2)
    found = bands * windows <= 16 * kGroupUnits && set_units(bands, windows, some);
  for (const int64_t side : {8, 4, 2}) found = found || set_units(std::min(bands, side), std::min(windows, side), 1);
  if (!found) return false;

  tile.load_vector = std::min(vector_width(params.x, params.width, params.x_stride, false),
                              vector_width(params.gy, params.width, params.gy_stride, false));
  if (tile.tiled) tile.load_vector = std::min(tile.load_vector, 4);  // as the halo is aligned
  tile.load_lanes = lanes_for(ceil_div(tile.x.cols, tile.load_vector));
  tile.rows_a_step = 32 * tile.warps / tile.load_lanes;
  const bool within_image = tile.images == 1 && tile.rows_a_step % kUnit == 0;
  tile.prefetch = !tile.tiled && tile.load_vector == 8 && tile.load_lanes * 8 >= params.width &&
                  (within_image || tile.rows_a_step % params.height == 0) &&
                  ceil_div(tile.images * params.height, tile.rows_a_step) <= kPrefetch;
  const int step_rows = within_image ? tile.rows_a_step : 0;
  const int step_images = within_image ? 0 : static_cast<int>(tile.rows_a_step / params.height);
  const auto set_steps = [&](WgradOperand& operand, const Strides& stride) {
    operand.load_step = static_cast<int>(step_images * stride.n + step_rows * stride.h);
    operand.store_step =
        step_images * operand.image_pitch + step_rows * operand.pitch + step_rows / kUnit * operand.band_gap;
  };
  set_steps(tile.x, params.x_stride);
  set_steps(tile.gy, params.gy_stride);

  const int64_t items = ceil_div(params.batch, tile.images) * tile.tiles_h * tile.tiles_w;
  tile.items_a_channel = static_cast<int>(items);
  return items * params.channels < kMaxOffset;
}

// ------------------------------------------------------------------------------------------------ CUDA cores

constexpr int kWgradPairs = 2;  // tap rows of a thread
constexpr int kWgradMaxThreads = 256;

struct WgradDirectTile {
  int channels;                   // of an item: one, or in channels_last a sector of them, along which the lanes run
  int images;                     // of an item
  int height, width;              // of its tile of gy, whole strips of 8 columns
  int tiles_h, tiles_w;           // of a map
  int taps;                       // tap columns of a thread
  int row_pairs, col_blocks;      // tap rows by kWgradPairs and tap columns by `taps` that a block sums at once,
  int passes_h, passes_w;         // and how often it takes all
  int strip_rows;                 // of gy, which a thread goes down at a time
  int partners;                   // threads with the same taps of the same channel
  int x_rows, x_pitch, gy_pitch;  // of a stored image, in elements
  int x_image, gy_image;          // from one image or channel to the next: whole vectors, but in different banks
  int lanes;                      // threads that fill one row together
  int threads;

  CMF_HOST_DEVICE int tap_groups() const { return row_pairs * col_blocks; }
  CMF_HOST_DEVICE int strips() const { return width / kDirectStripW; }
  CMF_HOST_DEVICE int tasks() const { return images * strips() * ((height + strip_rows - 1) / strip_rows); }
  int smem_bytes(int element, int real) const {
    return std::max(channels * images * (x_image + gy_image) * element, threads * (kWgradPairs * taps + 1) * real);
  }
};

inline bool wgrad_is_channels_last(const WgradParams& params) {
  return params.channels > 1 && params.x_stride.c == 1 && params.gy_stride.c == 1;
}

// The tap columns if the kernel is compiled for just as many, else 0.
inline int wgrad_exact_taps(const WgradParams& params) {
  const int64_t taps = params.kernel_w;
  return params.dtype != DType::kFloat64 && taps % 2 == 1 && 3 <= taps && taps <= 9 ? static_cast<int>(taps) : 0;
}

// The first of these that fits shared memory: all taps at once, or some tap columns, or some of both; in channels_last
// a sector of channels before some; large tiles before small ones.
inline WgradDirectTile choose_wgrad_direct_tile(const WgradParams& params, int block_smem) {
  using namespace tiles;
  constexpr int kSmem = 48 << 10, kSmemChannelsLast = 113 << 10;  // on sm_90 four and two blocks an SM
  constexpr int kStrip = kDirectStripW;
  const bool channels_last = wgrad_is_channels_last(params);
  const int element = bytes_of(params.dtype), real = params.dtype == DType::kFloat64 ? 8 : 4;
  const int exact_taps = wgrad_exact_taps(params);
  const auto ceil = [](int64_t a, int64_t b) { return static_cast<int>(ceil_div(a, b)); };

  WgradDirectTile tile{};
  tile.taps = exact_taps ? exact_taps : kDirectTapBlock;
  const int row_pairs = ceil(params.kernel_h, kWgradPairs), col_blocks = ceil(params.kernel_w, tile.taps);
  const int window = static_cast<int>(round_up(kStrip + tile.taps - 1, 8));
  const auto fits = [&](int pairs, int blocks, int channels, int most_height, int most_width, int images, int smem) {
    tile.row_pairs = pairs, tile.col_blocks = blocks, tile.channels = channels, tile.images = images;
    tile.passes_h = ceil(row_pairs, pairs), tile.passes_w = ceil(col_blocks, blocks);
    tile.tiles_h = ceil(params.height, most_height), tile.tiles_w = ceil(params.width, most_width);
    tile.height = ceil(params.height, tile.tiles_h);
    tile.width = static_cast<int>(round_up(ceil(params.width, tile.tiles_w), kStrip));
    tile.tiles_w = ceil(params.width, tile.width);
    tile.x_rows = tile.height + kWgradPairs * pairs - 1;
    const auto pitch = [&](int cols) { return static_cast<int>(round_up(cols * element, 32) + 16) / element; };
    tile.x_pitch = pitch(tile.width - kStrip + (blocks - 1) * tile.taps + window);
    tile.gy_pitch = pitch(tile.width);
    const auto image_pitch = [&](int elements) {
      return static_cast<int>(round_up(elements * element, 128) + 16) / element;
    };
    tile.x_image = image_pitch(tile.x_rows * tile.x_pitch);
    tile.gy_image = image_pitch(tile.height * tile.gy_pitch);
    if (channels * tile.tap_groups() > kWgradMaxThreads) return false;
    tile.partners = kWgradMaxThreads / (channels * tile.tap_groups());
    tile.strip_rows = std::min(tile.height, 16);  // a bound on the chain of additions, too
    while (tile.strip_rows > 2 && tile.tasks() < 2 * tile.partners) tile.strip_rows = (tile.strip_rows + 1) / 2;
    tile.partners = std::min(tile.partners, tile.tasks());
    tile.threads = static_cast<int>(round_up(channels * tile.tap_groups() * tile.partners, 32));
    const int col_lanes = lanes_for(tile.x_pitch);
    tile.lanes = std::min(32, col_lanes * channels);
    return tile.smem_bytes(element, real) <= smem;
  };

  constexpr int kTiles[][2] = {{32, 64}, {32, 32}, {16, 32}, {16, 16}, {8, 16}, {8, 8}, {4, 8}, {2, 8}};
  const int sector = channels_last ? 32 / element : 1;
  const bool small = params.height * params.width <= 256;
  const int most_images = !channels_last ? 8 : small ? 4 : 1;
  const int smem = channels_last ? std::min(block_smem, kSmemChannelsLast) : kSmem;
  for (const auto& [pairs, blocks] : {std::pair{row_pairs, col_blocks}, std::pair{row_pairs, 1},
                                      std::pair{std::min(row_pairs, 8), 1}, std::pair{1, 1}})
    for (int channels = sector; channels > 0; channels /= 2)
      for (const auto& [height, width] : kTiles)
        for (int images = most_images; images > 0; images /= 2)
          if (images <= params.batch && fits(pairs, blocks, channels, height, width, images, smem)) return tile;
  tile.threads = 0;  // not reached: one channel, 2 x 8 outputs and 2 tap rows fit
  return tile;
}

// ------------------------------------------------------------------------------------------------ the choice

struct WgradPlan {
  bool tensor_cores;
  WgradTile mma;
  WgradDirectTile direct;
  WgradShare share;
  int smem_bytes;
};

inline WgradPlan plan_wgrad(const WgradParams& params, const WgradDevice& device) {
  using namespace tiles;
  WgradPlan plan{};
  WgradShare& share = plan.share;
  share.channels = 1;
  share.sums = params.kernel_h * params.kernel_w + 1;
  if (params.batch * params.channels * params.height * params.width == 0) return plan;  // no items: the sums are zero
  int warps = 0;
  plan.tensor_cores = device.major >= 8 && choose_wgrad_tile(params, plan.mma);
  if (plan.tensor_cores) {
    warps = plan.mma.warps;
    plan.smem_bytes = plan.mma.smem_bytes();
    share.items_a_group = plan.mma.items_a_channel;
  } else {
    const WgradDirectTile& tile = plan.direct = choose_wgrad_direct_tile(params, device.block_smem);
    warps = tile.threads / 32;
    plan.smem_bytes = tile.smem_bytes(bytes_of(params.dtype), params.dtype == DType::kFloat64 ? 8 : 4);
    share.channels = tile.channels;
    share.items_a_group = ceil_div(params.batch, tile.images) * tile.tiles_h * tile.tiles_w;
  }
  share.groups = ceil_div(params.channels, share.channels);
  share.items = share.items_a_group * share.groups;
  // Blocks that an SM holds at once: by the registers that the launch bounds allow, and by shared memory.
  constexpr int kSystemSmem = 1024;  // of each block
  const int by_smem = device.multiprocessor_smem / (plan.smem_bytes + kSystemSmem);
  const int64_t each = std::max(1, std::min(kWgradMaxWarps / std::max(warps, 1), by_smem));
  share.blocks = static_cast<int>(std::min(share.items, device.multiprocessors * each));
  share.items_a_block = share.items / share.blocks;
  share.rest = share.items % share.blocks;
  return plan;
}

#undef CMF_HOST_DEVICE

}  // namespace convmixer_fast::cuda
