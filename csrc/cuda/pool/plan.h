// How the pooling kernel reads the maps. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "../../common/math.h"
#include "../../params.h"
#include "../common/dtype_bytes.h"
#include "../common/host_device.h"

namespace convmixer_fast::cuda {

// What one load brings.
enum class PoolAccess : int32_t {
  kRun,       // 16 bytes of a map, which is one run of memory: every map starts on 16 bytes
  kPixel,     // one pixel of a map of any strides
  kOctet,     // an octet of a pixel, in channels_last of 16-bit types: every octet starts on 16 bytes
  kChannels,  // one pixel of a map, neighbouring lanes those of neighbouring channels; any strides otherwise
};

// How the threads of a CTA share the maps of an image.
struct PoolShape {
  int threads;   // per CTA
  int team;      // threads that share the pixels of a map
  int channels;  // per thread

  CMF_HOST_DEVICE constexpr int maps() const { return threads / team * channels; }  // per CTA
};

// Along maps, a team is part of a warp: few lanes have few sums to add across, many have short loops. Along channels, a
// CTA reads 32 channels of 8 pixels, or whole lines of 128 bytes, which are 64 channels, of 32 pixels.
constexpr PoolShape pool_shape(PoolAccess access, bool small_maps) {
  switch (access) {
    case PoolAccess::kOctet: return {256, 32, 8};
    case PoolAccess::kChannels: return {256, 8, 1};
    default: return {128, small_maps ? 8 : 32, 1};
  }
}

struct PoolPlan {
  PoolAccess access;
  bool small_maps;
  float weight;            // pixels are summed times this power of two, so that no sum exceeds the largest of them
  int64_t channel_blocks;  // sets of `maps()` channels
  int64_t pixels;          // per map
  int width;               // pixels per row; rows without a gap between them are one
  int64_t row_stride;
  int64_t col_stride;
  int step_cols;        // from a thread's pixel to its next: columns, less than `width`,
  int64_t step_offset;  // elements,
  int64_t wrap_offset;  // and elements more if that crosses the end of a row
};

constexpr int64_t kPoolMostPixels = int64_t{1} << 30;  // pixels, of a row or a run, that 32 bits count

// Sets the rows of a map. If their pixels are more than 32 bits count, columns take their place. A mean has no order.
inline void set_pool_rows(const PoolParams& params, PoolPlan& plan) {
  const Strides& stride = params.x_stride;
  int64_t width = params.width;
  plan.pixels = params.height * params.width;
  plan.row_stride = stride.h;
  plan.col_stride = stride.w;
  const bool one_row = params.height == 1 || stride.h == params.width * stride.w;
  const bool one_column = params.width == 1;
  if (one_column || (width > kPoolMostPixels && !one_row)) {
    std::swap(plan.row_stride, plan.col_stride);
    width = params.height;
  }
  if (one_row || one_column) {
    width = std::min(plan.pixels, kPoolMostPixels);
    plan.row_stride = width * plan.col_stride;
  }
  plan.width = static_cast<int>(std::max<int64_t>(width, 1));
}

// A dimension of size 1 may have any stride.
inline bool starts_on_16_bytes(const PoolParams& params, int64_t size, int64_t stride) {
  return size <= 1 || stride * bytes_of(params.dtype) % 16 == 0;
}

inline PoolAccess choose_pool_access(const PoolParams& params, const PoolPlan& plan) {
  const Strides& stride = params.x_stride;
  const bool aligned =
      reinterpret_cast<uintptr_t>(params.x) % 16 == 0 && starts_on_16_bytes(params, params.batch, stride.n);
  if (stride.c == 1 && params.channels > 1) {
    const bool octets = bytes_of(params.dtype) == 2 && params.channels % 8 == 0 && aligned &&
                        starts_on_16_bytes(params, params.height, stride.h) &&
                        starts_on_16_bytes(params, params.width, stride.w);
    return octets ? PoolAccess::kOctet : PoolAccess::kChannels;
  }
  const bool is_run = plan.width == plan.pixels && (plan.col_stride == 1 || plan.pixels == 1);
  // float64 is for tests: no instantiation with 16-byte loads.
  const bool run =
      is_run && aligned && params.dtype != DType::kFloat64 && starts_on_16_bytes(params, params.channels, stride.c);
  return run ? PoolAccess::kRun : PoolAccess::kPixel;
}

inline PoolPlan choose_pool_plan(const PoolParams& params) {
  PoolPlan plan{};
  set_pool_rows(params, plan);
  plan.access = choose_pool_access(params, plan);
  // A run of 32 x 32 pixels is 16 or 32 loads of a small team's threads. Single pixels take more of them.
  constexpr int64_t kSmallRun = 4096;  // bytes
  constexpr int64_t kSmallMap = 256;   // pixels
  plan.small_maps = (plan.access == PoolAccess::kRun && plan.pixels * bytes_of(params.dtype) <= kSmallRun) ||
                    (plan.access == PoolAccess::kPixel && plan.pixels <= kSmallMap);
  const PoolShape shape = pool_shape(plan.access, plan.small_maps);
  plan.channel_blocks = ceil_div(params.channels, shape.maps());
  plan.step_cols = shape.team % plan.width;
  plan.step_offset = shape.team / plan.width * plan.row_stride + plan.step_cols * plan.col_stride;
  plan.wrap_offset = plan.row_stride - plan.width * plan.col_stride;
  plan.weight = 1;
  for (int64_t left = plan.pixels - 1; left > 0; left /= 2) plan.weight /= 2;
  return plan;
}

}  // namespace convmixer_fast::cuda
