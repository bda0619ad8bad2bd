// How the threads of the tensor-core kernels divide what they load and store. Host code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>

#include "../../../params.h"
#include "smem.h"

namespace convmixer_fast::cuda {

constexpr int kPrefetch =
    4;  // 16-byte vectors of the next work tile that a thread holds in registers, per input tensor

constexpr int64_t kMaxOffset = int64_t{1} << 31;  // indices and offsets inside a work tile are below it

// Sets to 0 the strides of dimensions of size 1: they are never applied, and 0 passes every test of divisibility.
inline Strides used_strides(const DepthwiseParams& params, Strides stride) {
  if (params.batch == 1) stride.n = 0;
  if (params.channels == 1) stride.c = 0;
  if (params.height == 1) stride.h = 0;
  if (params.width == 1) stride.w = 0;
  return stride;
}

// The widest access, in elements, that divides the base address, the extent of the contiguous dimension and all other
// strides.
inline int vector_width(const void* base, int64_t extent, const Strides& stride, bool channels_last) {
  const int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) / 2) | extent | stride.n | stride.h |
                       (channels_last ? stride.w : stride.c);
  return bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

// Threads that move `vectors` access vectors together: the smallest power of two that suffices, at most a warp.
inline int lanes_for(int64_t vectors) {
  int lanes = 1;
  while (lanes < vectors && lanes < 32) lanes *= 2;
  return lanes;
}

// What a thread advances by while it moves a whole work tile: rows of the only image, or whole images. Meaningful only
// if fits_registers holds.
struct LoaderStep {
  bool within_image;  // the step stays in an image
  int images;         // images per step
  int rows;           // rows per step
};

template <class Shape>
inline LoaderStep loader_step(const Shape& shape, int rows_per_step, int64_t height) {
  LoaderStep step{};
  step.within_image = shape.images == 1 && rows_per_step % kSubtile == 0;
  step.images = step.within_image ? 0 : static_cast<int>(rows_per_step / height);
  step.rows = step.within_image ? rows_per_step : 0;
  return step;
}

// Whether all steps of a thread are equally far apart, and so few that the work tile fits its registers.
template <class Shape>
inline bool fits_registers(const Shape& shape, const LoaderStep& step, int rows_per_step, int64_t height,
                           int max_steps) {
  return (step.within_image || rows_per_step % height == 0) &&
         ceil_div(shape.images * height, rows_per_step) <= max_steps;
}

// Elements from one step of a thread to its next: in a tensor, in shared memory.
inline int distance(const LoaderStep& step, const Strides& stride) {
  return static_cast<int>(step.images * stride.n + step.rows * stride.h);
}
inline int distance(const LoaderStep& step, const StoredMaps& maps) {
  return step.images * maps.image_pitch + step.rows * maps.pitch + step.rows / kSubtile * maps.gap;
}

}  // namespace convmixer_fast::cuda
