// Sums of which what each addition rounds away is kept, and added at the end.
//
// Terms: docs/glossary.md.
#pragma once
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

template <class V>
struct CompensatedSum {
  V sum = {};
  V lost = {};  // what the additions to `sum` rounded away; NaN once `sum` is infinite

  CMF_INLINE void add(V v) {
    const V total = sum + v;
    const V kept = total - sum;
    lost += (sum - (total - kept)) + (v - kept);
    sum = total;
  }
  CMF_INLINE void add(const CompensatedSum& other) {
    add(other.sum);
    lost += other.lost;
  }
  CMF_INLINE V value() const { return lost == lost ? sum + lost : sum; }
};

}  // namespace
}  // namespace convmixer_fast::cpu
