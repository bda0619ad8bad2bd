// Average pooling: the mean over each map, after the elementwise step. A task is (image, channel vector).
//
// Terms: docs/glossary.md.
#pragma once
#include "activation.h"
#include "compensated_sum.h"

namespace convmixer_fast::cpu {
namespace {

template <class Real>
int64_t pool_tasks(const PoolParams& p) {
  return p.batch * ceil_div(p.channels, kLanes<Real>);
}

template <class S, class Real = typename S::Real>
void pool(const PoolParams& p, int64_t begin, int64_t end) {
  constexpr int kLanes = cpu::kLanes<Real>;
  const Strides& stride = p.x_stride;
  const int64_t vectors = ceil_div(p.channels, kLanes);
  const bool joined = stride.h == p.width * stride.w;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / vectors;
    const int64_t channel = task % vectors * kLanes;
    const int64_t channels = min(kLanes, p.channels - channel);
    const S* x = static_cast<const S*>(p.x) + image * stride.n + channel * stride.c;
    const Elementwise<Real> prologue = load_elementwise<S>(p.prologue, p.dtype, channel, channels);
    CompensatedSum<Vec<Real>> sum;
    if (p.height * p.width > 0)
      for_pixel_runs<kLanes>(p.height, p.width, joined, [&](int64_t row, int64_t column, int64_t pixels) {
        Vec<Real> z[kLanes];
        load_pixels(x + row * stride.h + column * stride.w, stride.c, stride.w, channels, pixels, z);
        prologue.apply(z, pixels);
        for (int64_t i = pixels; i < kLanes; ++i) z[i] = Vec<Real>{};
        for (int half = kLanes / 2; half > 0; half /= 2)
          for (int i = 0; i < half; ++i) z[i] += z[i + half];
        sum.add(z[0]);
      });
    const Vec<Real> mean = sum.value() / Real(p.height * p.width);
    store_pixels(static_cast<S*>(p.y) + image * p.channels + channel, 1, 0, channels, 1, &mean);
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
