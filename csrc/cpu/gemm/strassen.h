// How a product of matrices is made of products of their parts.
#pragma once
#include <cstdint>

#include "../simd.h"

namespace convmixer_fast::cpu {
namespace {

// How a product of matrices is made of `products` products of their parts: each multiplies the left operand's parts,
// summed with these signs, by the right one's, and is added to the result's parts with its signs. A matrix has
// halves x halves parts; part halves i + j is half i of its rows and half j of its columns.
struct Scheme {
  static constexpr int kMostProducts = 7, kMostParts = 4;
  using Signs = int8_t[kMostProducts][kMostParts];

  int products, halves;
  Signs left, right, result;

  constexpr int parts() const { return halves * halves; }

  // Whether each product of a left and a right part ends up where it belongs, once, and nowhere else.
  constexpr bool is_right() const {
    for (int l = 0; l < parts(); ++l)
      for (int r = 0; r < parts(); ++r)
        for (int p = 0; p < parts(); ++p) {
          int times = 0;
          for (int m = 0; m < products; ++m) times += left[m][l] * right[m][r] * result[m][p];
          const bool meet = l % halves == r / halves, here = p == l / halves * halves + r % halves;
          if (times != (meet && here)) return false;
        }
    return true;
  }
};

constexpr Scheme kPlain = {1, 1, {{1}}, {{1}}, {{1}}};
static_assert(kPlain.is_right());

// Seven products of half the size in place of eight (V. Strassen, "Gaussian elimination is not optimal", 1969).
constexpr Scheme kStrassen = {
    7,
    2,
    {{1, 0, 0, 1}, {0, 0, 1, 1}, {1, 0, 0, 0}, {0, 0, 0, 1}, {1, 1, 0, 0}, {-1, 0, 1, 0}, {0, 1, 0, -1}},
    {{1, 0, 0, 1}, {1, 0, 0, 0}, {0, 1, 0, -1}, {-1, 0, 1, 0}, {0, 0, 0, 1}, {1, 1, 0, 0}, {0, 0, 1, 1}},
    {{1, 0, 0, 1}, {0, 0, 1, -1}, {0, 1, 0, 1}, {1, 0, 1, 0}, {-1, 1, 0, 0}, {0, 0, 0, 1}, {1, 0, 0, 0}}};
static_assert(kStrassen.is_right());

// The sum of the parts that have a sign, at most two, each `values` values, one after another: where it lies, in memory
// of its own unless it is one of them.
template <class Operand>
const Operand* signed_sum(const int8_t* sign, int64_t parts, const Operand* part, int64_t values, Operand* memory) {
  const Operand *positive = nullptr, *other = nullptr;
  bool adds = true;
  for (int64_t p = 0; p < parts; ++p, part += values) {
    if (sign[p] == 0) continue;
    if (sign[p] > 0 && !positive) positive = part;
    else other = part, adds = sign[p] > 0;
  }
  if (!other) return positive;
  for (int64_t i = 0; i < values; i += kLanes<float>) {
    const Vec<float> a = Operand::load(positive + i), b = Operand::load(other + i);
    Operand::store(memory + i, adds ? a + b : a - b);
  }
  return memory;
}

}  // namespace
}  // namespace convmixer_fast::cpu
