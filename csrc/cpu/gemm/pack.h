// Where the values of a product's left operand lie.
#pragma once
#include "blocking.h"

namespace convmixer_fast::cpu {
namespace {

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

}  // namespace
}  // namespace convmixer_fast::cpu
