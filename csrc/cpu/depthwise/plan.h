// How a depthwise convolution and its gradients are cut into tasks.
#pragma once
#include "microkernel.h"

namespace convmixer_fast::cpu {
namespace {

constexpr int64_t kFewTaps = 4;  // up to so many, the sums start from the bias

// How a depthwise convolution is cut into tasks, and a task into steps. Depends on nothing but the parameters.
template <class Real>
struct Plan {
  static constexpr int64_t kChannels = 64;             // of a block, at most: 256 bytes of float32 at a time
  static constexpr int64_t kChannelsInPlace = 256;     // the same, of pixels read in place: sums that fit the L1 cache
  static constexpr int64_t kScratchBytes = 512 << 10;  // of the ring: half of a usual L2 cache
  static constexpr int64_t kPixels = 128;              // at least so many in a step, or in a band
  static constexpr int64_t kTasks = 64;                // wanted, for the threads to share
  static constexpr int64_t kGroupPixels = 1024;        // of the images that use a block's weights one after another

  bool in_place = false;            // whether pixels are read where they lie
  int64_t first_tap = 0, taps = 0;  // the kernel's columns that meet the map at all
  bool few_taps = false;
  int64_t band_width = 0, width_bands = 0, pitch = 0;
  int64_t step_rows = 0, ring_rows = 0;
  int64_t vectors = 0, blocks = 0;
  int64_t block_channels = 0;  // in every block but the last, which has the rest
  int64_t band_height = 0, height_bands = 0;
  int64_t images = 0;  // that run through a block before the next block's turn
  int64_t tasks = 0;

  explicit Plan(const DepthwiseParams& p) {
    constexpr int64_t n = kLanes<Real>;
    if (p.batch == 0 || p.channels == 0 || p.height == 0 || p.width == 0) return;
    first_tap = max(0, p.pad_left - p.width + 1);
    taps = min(p.kernel_w, p.pad_left + p.width) - first_tap;
    few_taps = min(p.kernel_h, p.height) * min(taps, p.width) <= kFewTaps;
    in_place = !p.has_prologue && p.x_stride.c == 1 && p.y_stride.c == 1 && p.channels >= n && !few_taps &&
               taps % 2 == 1 && taps > 1 && taps <= longest_in_place(p.dtype);
    width_bands = ceil_div(p.width, 128);
    band_width = ceil_div(p.width, width_bands);
    width_bands = ceil_div(p.width, band_width);
    pitch = band_width + taps - 1;
    const int64_t least_rows = min(p.height, ceil_div(kPixels, band_width));
    step_rows = in_place ? 1 : least_rows;
    ring_rows = min(p.height, step_rows + p.kernel_h - 1);
    const int64_t fitting = max(1, kScratchBytes / (ring_rows * pitch * CMF_VECTOR_BYTES));
    if (in_place) {  // channels that fill no vector join the last block, whose last vector overlaps the one before
      vectors = equal_share(p.channels / n, min(kChannelsInPlace / n, fitting));
      blocks = ceil_div(p.channels / n, vectors);
      block_channels = vectors * n;
      vectors += p.channels % n > 0;
    } else {
      vectors = min(kChannels / n, min(fitting, ceil_div(p.channels, n)));
      blocks = ceil_div(p.channels, vectors * n);
      block_channels = vectors * n;
    }
    const int64_t wanted = ceil_div(kTasks, p.batch * blocks * width_bands);
    band_height = max(least_rows, ceil_div(p.height, wanted));
    height_bands = ceil_div(p.height, band_height);
    images = min(p.batch, ceil_div(kGroupPixels, p.height * p.width));
    tasks = p.batch * blocks * height_bands * width_bands;
  }

  // Vectors of memory.
  int64_t ring() const {
    return in_place ? ceil_div(ring_rows * pitch * sizeof(void*), CMF_VECTOR_BYTES) : vectors * ring_rows * pitch;
  }
  int64_t sums() const { return in_place ? vectors * kMaxColumns : step_rows * band_width; }
};

template <class Real>
struct WgradPlan {
  static constexpr int64_t kColumns = 64;              // of a band, at most
  static constexpr int64_t kPixels = 128;              // of a step, at least: 8 KiB of gy, which stay in the L1 cache
  static constexpr int64_t kScratchBytes = 512 << 10;  // half of a usual L2 cache
  static constexpr int64_t kChannels = 64;             // of a block, at most: 256 bytes of float32 at a time
  static constexpr int64_t kTasks = 32;                // wanted, for the threads to share

  int64_t first_tap = 0, taps = 0;  // the kernel's columns that meet the map at all
  int64_t sums = 0;                 // of a channel: kernel_h x taps, and the bias
  int64_t chain = 16;               // products are summed before they are added to the rest: about the root of all
  int64_t band_width = 0, pitch = 0;
  int64_t step_rows = 0, ring_rows = 0;
  int64_t vectors = 0;  // of all channels
  int64_t block = 0, blocks = 0;
  int64_t part = 0, parts = 0;  // images
  int64_t tasks = 0;
  int64_t workspace = 0;  // bytes

  explicit WgradPlan(const WgradParams& p) {
    if (p.channels == 0) return;
    vectors = ceil_div(p.channels, kLanes<Real>);
    if (p.batch == 0 || p.height == 0 || p.width == 0) return;
    first_tap = max(0, p.pad_left - p.width + 1);
    taps = min(p.kernel_w, p.pad_left + p.width) - first_tap;
    sums = p.kernel_h * taps + 1;
    while (chain < 128 && chain * chain < p.batch * p.height * p.width) chain *= 2;
    band_width = ceil_div(p.width, ceil_div(p.width, kColumns));
    pitch = band_width + taps - 1;
    step_rows = min(p.height, ceil_div(kPixels, band_width));
    ring_rows = min(p.height, step_rows + p.kernel_h - 1);
    const int64_t bytes = (ring_rows * pitch + step_rows * band_width + 2 * sums) * CMF_VECTOR_BYTES;
    block = min(kChannels / kLanes<Real>, min(kScratchBytes / bytes, vectors / kTasks));
    block = max(1, block);
    blocks = ceil_div(vectors, block);
    part = ceil_div(p.batch, ceil_div(kTasks, blocks));
    parts = ceil_div(p.batch, part);
    tasks = parts * blocks;
    workspace = parts * vectors * sums * CMF_VECTOR_BYTES;
  }
};

}  // namespace
}  // namespace convmixer_fast::cpu
