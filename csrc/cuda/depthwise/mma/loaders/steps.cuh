// How one thread goes through its steps of a work tile (LoaderSteps in loader.h).
//
// Terms: docs/glossary.md.
#pragma once
#include "../loader.h"

namespace convmixer_fast::cuda {

// How often 2 divides a positive number.
__device__ constexpr int trailing_zeros(int number) { return number % 2 != 0 ? 0 : 1 + trailing_zeros(number / 2); }

// From one step of a thread to its next; 0 after the last.
template <int kSteps>
__device__ __forceinline__ int distance_after(const StepDistances& distances, int step) {
  return step + 1 < kSteps ? distances.after[trailing_zeros(step + 1)] : 0;
}

static_assert(kUnalignedSteps <= 16 && kChannelsLastSteps <= 16, "StepsLane::steps has two bits per step");

// Which rows one thread moves.
struct StepsLane {
  int image;       // in step 0
  int row;         // in step 0
  int index;       // number among the threads of a row
  uint32_t steps;  // bit s: whether it has a row in step s; bit 16 + s: whether in the channel's last work tile, which
                   // may have fewer images

  __device__ __forceinline__ uint32_t steps_in(bool is_last) const { return is_last ? steps >> 16 : steps; }

  // `thread`: number among the threads that divide the rows.
  template <int kSteps, class Params>
  __device__ static StepsLane make(const Params& params, const TileShape& shape, const LoaderSteps& plan,
                                   int tiles_per_channel, int thread) {
    StepsLane lane{};
    const int height = static_cast<int>(params.height);
    const int row = thread / plan.threads_per_row;
    lane.index = thread % plan.threads_per_row;
    lane.image = row / height;
    lane.row = row % height;
    if (row >= plan.rows_per_step || lane.image >= plan.images_per_step) return lane;
    if (plan.steps_per_image > 1) {
      lane.image = 0;
      lane.row = row;
    }
    const int images_in_last = shape.images_in_last(static_cast<int>(params.batch), tiles_per_channel);
#pragma unroll 1
    for (int step = 0; step < kSteps; step++) {
      const int image = lane.image + plan.first_image(step);
      if (image >= shape.images || lane.row + plan.first_row(step) >= height) continue;
      lane.steps |= uint32_t{1} << step;
      if (image < images_in_last) lane.steps |= uint32_t{1} << (16 + step);
    }
    return lane;
  }
};

}  // namespace convmixer_fast::cuda
