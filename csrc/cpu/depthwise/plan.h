// How the depthwise convolution and its gradients are cut into tasks, and a task into steps down its band. A plan
// depends on nothing but the parameters.
//
// Terms: docs/glossary.md.
#pragma once
#include "microkernel.h"

namespace convmixer_fast::cpu {
namespace {

constexpr int64_t kMaxBlockChannels = 64;     // per task: 256 bytes of float32 at a time
constexpr int64_t kMaxTaskBytes = 512 << 10;  // scratch memory of a task: half of a usual L2 cache
constexpr int64_t kMinStepPixels = 128;       // per step

template <class Real>
struct ForwardPlan {
  static constexpr int64_t kMaxBlockChannelsInPlace = 256;  // channels whose accumulators fit the L1 cache
  static constexpr int64_t kMaxBandWidth = 128;
  static constexpr int64_t kWantedTasks = 64;    // tasks for the threads to share
  static constexpr int64_t kReusePixels = 1024;  // pixels per loading of a block's weights, at least
  static constexpr int64_t kFewTaps = 4;         // with so many or fewer, accumulators start from the bias

  bool in_place = false;       // whether pixels are read where they lie, instead of packed
  int64_t first_tap = 0;       // columns of the kernel before the first one that meets the map
  int64_t taps = 0;            // columns of the kernel that meet the map at all
  bool few_taps = false;       // whether accumulators start from the bias
  int64_t band_width = 0;      // outputs
  int64_t width_bands = 0;     // per map
  int64_t pitch = 0;           // pixels from row to row of the ring buffer
  int64_t step_rows = 0;       // rows of outputs per step
  int64_t ring_rows = 0;       // rows of inputs that a step needs
  int64_t vectors = 0;         // channel vectors per block
  int64_t blocks = 0;          // blocks of channels
  int64_t block_channels = 0;  // channels per block; the last block has the rest
  int64_t band_height = 0;     // outputs
  int64_t height_bands = 0;    // per map
  int64_t images = 0;          // images that use a block's weights before the next block is loaded
  int64_t tasks = 0;

  explicit ForwardPlan(const DepthwiseParams& p) {
    constexpr int64_t kLanes = cpu::kLanes<Real>;
    if (p.batch == 0 || p.channels == 0 || p.height == 0 || p.width == 0) return;
    first_tap = max(0, p.pad_left - p.width + 1);
    taps = min(p.kernel_w, p.pad_left + p.width) - first_tap;
    few_taps = min(p.kernel_h, p.height) * min(taps, p.width) <= kFewTaps;
    in_place = !p.has_prologue && p.x_stride.c == 1 && p.y_stride.c == 1 && p.channels >= kLanes && !few_taps &&
               is_held_as_a_whole(taps) && taps <= longest_in_place(p.dtype);
    width_bands = ceil_div(p.width, kMaxBandWidth);
    band_width = ceil_div(p.width, width_bands);
    width_bands = ceil_div(p.width, band_width);
    pitch = band_width + taps - 1;
    const int64_t min_rows = min(p.height, ceil_div(kMinStepPixels, band_width));
    step_rows = in_place ? 1 : min_rows;
    ring_rows = min(p.height, step_rows + p.kernel_h - 1);
    const int64_t fitting = max(1, kMaxTaskBytes / (ring_rows * pitch * CMF_VECTOR_BYTES));
    if (in_place) {  // channels that fill no vector join the last block, whose last vector overlaps the one before
      vectors = equal_share(p.channels / kLanes, min(kMaxBlockChannelsInPlace / kLanes, fitting));
      blocks = ceil_div(p.channels / kLanes, vectors);
      block_channels = vectors * kLanes;
      vectors += p.channels % kLanes > 0;
    } else {
      vectors = min(kMaxBlockChannels / kLanes, min(fitting, ceil_div(p.channels, kLanes)));
      blocks = ceil_div(p.channels, vectors * kLanes);
      block_channels = vectors * kLanes;
    }
    const int64_t wanted_bands = ceil_div(kWantedTasks, p.batch * blocks * width_bands);
    band_height = max(min_rows, ceil_div(p.height, wanted_bands));
    height_bands = ceil_div(p.height, band_height);
    images = min(p.batch, ceil_div(kReusePixels, p.height * p.width));
    tasks = p.batch * blocks * height_bands * width_bands;
  }

  // The sizes of the ring buffer and of the sums of a step, in vectors. Read in place, the ring buffer holds pointers.
  int64_t ring_size() const {
    return in_place ? ceil_div(ring_rows * pitch * sizeof(void*), CMF_VECTOR_BYTES) : vectors * ring_rows * pitch;
  }
  int64_t sums_size() const { return in_place ? vectors * kMaxColumns : step_rows * band_width; }
};

template <class Real>
struct WgradPlan {
  static constexpr int64_t kMaxBandWidth = 64;
  static constexpr int64_t kWantedTasks = 32;  // tasks for the threads to share
  static constexpr int64_t kMinChain = 16;
  static constexpr int64_t kMaxChain = 128;

  int64_t first_tap = 0;      // columns of the kernel before the first one that meets the map
  int64_t taps = 0;           // columns of the kernel that meet the map at all
  int64_t sums = 0;           // per channel: kernel_h x taps, and the bias
  int64_t chain = kMinChain;  // products that are summed before they are added to the rest: about the root of all
  int64_t band_width = 0;     // columns of gy
  int64_t pitch = 0;          // pixels from row to row of x's ring buffer
  int64_t step_rows = 0;      // rows of gy per step: with kMinStepPixels, 8 KiB, which stay in the L1 cache
  int64_t ring_rows = 0;      // rows of x that a step needs
  int64_t vectors = 0;        // channel vectors of all channels
  int64_t block = 0;          // channel vectors per block
  int64_t blocks = 0;         // blocks of channel vectors
  int64_t slice = 0;          // images per slice of the batch
  int64_t slices = 0;         // slices of the batch, each with its own partial sums
  int64_t tasks = 0;
  int64_t workspace = 0;  // bytes, for the partial sums of all slices

  explicit WgradPlan(const WgradParams& p) {
    if (p.channels == 0) return;
    vectors = ceil_div(p.channels, kLanes<Real>);
    if (p.batch == 0 || p.height == 0 || p.width == 0) return;
    first_tap = max(0, p.pad_left - p.width + 1);
    taps = min(p.kernel_w, p.pad_left + p.width) - first_tap;
    sums = p.kernel_h * taps + 1;
    while (chain < kMaxChain && chain * chain < p.batch * p.height * p.width) chain *= 2;
    band_width = ceil_div(p.width, ceil_div(p.width, kMaxBandWidth));
    pitch = band_width + taps - 1;
    step_rows = min(p.height, ceil_div(kMinStepPixels, band_width));
    ring_rows = min(p.height, step_rows + p.kernel_h - 1);
    const int64_t bytes = (ring_rows * pitch + step_rows * band_width + 2 * sums) * CMF_VECTOR_BYTES;
    block = min(kMaxBlockChannels / kLanes<Real>, min(kMaxTaskBytes / bytes, vectors / kWantedTasks));
    block = max(1, block);
    blocks = ceil_div(vectors, block);
    slice = ceil_div(p.batch, ceil_div(kWantedTasks, blocks));
    slices = ceil_div(p.batch, slice);
    tasks = slices * blocks;
    workspace = slices * vectors * sums * CMF_VECTOR_BYTES;
  }
};

}  // namespace
}  // namespace convmixer_fast::cpu
