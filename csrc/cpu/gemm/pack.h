// How A is packed: where the elements of its panels lie. What makes A, a stage of the network, packs it as it stores;
// B, the weights, is packed once (network/pack.h).
//
// Terms: docs/glossary.md.
#pragma once
#include "blocking.h"

namespace convmixer_fast::cpu {
namespace {

// Packed A is (M block, quadrant, channel vector, pixel of the M block). A cursor stays in one channel vector of one
// quadrant, and is asked for pixels in rising order.
template <class Element>
class PanelCursor {
  static constexpr int64_t kLanes = cpu::kLanes<float>;

 public:
  PanelCursor(const Blocking<Element>& blocking, Element* panels, int64_t vector, int64_t pixel)
      : blocking_(blocking), panels_(panels), vector_(vector) {
    enter(blocking.m_block_of(pixel));
  }

  Element* operator[](int64_t pixel) {
    while (pixel >= end_) enter(m_block_ + 1);
    return pixel_0_ + pixel * kLanes;
  }

  // How many pixels, from the one last asked for on, follow each other in memory.
  int64_t successive(int64_t pixel) const { return end_ - pixel; }

 private:
  void enter(int64_t m_block) {
    const int64_t first = blocking_.first_pixel(m_block);
    m_block_ = m_block;
    end_ = blocking_.first_pixel(m_block + 1);
    pixel_0_ = panels_ + (first * blocking_.a_vectors() + vector_ * (end_ - first) - first) * kLanes;
  }

  const Blocking<Element>& blocking_;
  Element* panels_;
  int64_t vector_;  // counted over all quadrants
  int64_t m_block_;
  int64_t end_;       // the M block's last pixel + 1
  Element* pixel_0_;  // where pixel 0 would lie if it were in this M block
};

}  // namespace
}  // namespace convmixer_fast::cpu
