// Bilinear matrix-multiplication algorithms: the plain product, and Strassen's. The macrokernel combines A's quadrants
// and adds the sub-products to C's; B's quadrants are combined when the weights are packed (network/pack.h);
// network/layout.h says which products follow Strassen.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>

#include "../simd.h"

namespace convmixer_fast::cpu {
namespace {

// A bilinear matrix-multiplication algorithm: M_m = (sum_i u[m][i] A_i) (sum_j v[m][j] B_j), C_p = sum_m w[m][p] M_m.
// A, B and C are cut into halves x halves quadrants; quadrant halves i + j is half i of the rows and half j of the
// columns.
struct BilinearScheme {
  static constexpr int kMaxProducts = 7;
  static constexpr int kMaxQuadrants = 4;
  using Signs = int8_t[kMaxProducts][kMaxQuadrants];

  int products;  // sub-products M_m
  int halves;    // 1: the matrices are not cut
  Signs u, v, w;

  constexpr int quadrants() const { return halves * halves; }

  // Whether the product of A_a and B_b is in C_c once if it belongs there, and otherwise not at all.
  constexpr bool satisfies_brent_equations() const {
    for (int a = 0; a < quadrants(); ++a)
      for (int b = 0; b < quadrants(); ++b)
        for (int c = 0; c < quadrants(); ++c) {
          int times = 0;
          for (int m = 0; m < products; ++m) times += u[m][a] * v[m][b] * w[m][c];
          const bool meet = a % halves == b / halves;
          const bool here = c == a / halves * halves + b % halves;
          if (times != (meet && here)) return false;
        }
    return true;
  }

  // Whether the first sub-product that reaches a quadrant of C is added, so that a result tile may be set to it.
  constexpr bool starts_by_adding() const {
    for (int c = 0; c < quadrants(); ++c) {
      int first = 0;
      while (w[first][c] == 0) ++first;
      if (w[first][c] < 0) return false;
    }
    return true;
  }
};

constexpr BilinearScheme kPlain = {1, 1, {{1}}, {{1}}, {{1}}};
static_assert(kPlain.satisfies_brent_equations() && kPlain.starts_by_adding());

// Seven products of half the size in place of eight (V. Strassen, "Gaussian elimination is not optimal", 1969).
constexpr BilinearScheme kStrassen = {
    7,
    2,
    {{1, 0, 0, 1}, {0, 0, 1, 1}, {1, 0, 0, 0}, {0, 0, 0, 1}, {1, 1, 0, 0}, {-1, 0, 1, 0}, {0, 1, 0, -1}},
    {{1, 0, 0, 1}, {1, 0, 0, 0}, {0, 1, 0, -1}, {-1, 0, 1, 0}, {0, 0, 0, 1}, {1, 1, 0, 0}, {0, 0, 1, 1}},
    {{1, 0, 0, 1}, {0, 0, 1, -1}, {0, 1, 0, 1}, {1, 0, 1, 0}, {-1, 1, 0, 0}, {0, 0, 0, 1}, {1, 0, 0, 0}}};
static_assert(kStrassen.satisfies_brent_equations() && kStrassen.starts_by_adding());

// The left operand of one sub-product: A_i or A_i +- A_j, from the quadrants' signs; each quadrant has `values` values,
// one quadrant after the other. Returns A_i itself if only one quadrant takes part, else materializes the sum in
// `scratch`.
template <class Element>
const Element* combine_quadrants(const int8_t* signs, int64_t quadrants, const Element* quadrant, int64_t values,
                                 Element* scratch) {
  const Element *positive = nullptr, *other = nullptr;
  bool adds = true;
  for (int64_t q = 0; q < quadrants; ++q, quadrant += values) {
    if (signs[q] == 0) continue;
    if (signs[q] > 0 && !positive) {
      positive = quadrant;
    } else {
      other = quadrant;
      adds = signs[q] > 0;
    }
  }
  if (!other) return positive;
  for (int64_t i = 0; i < values; i += kLanes<float>) {
    const Vec<float> a = Element::load(positive + i);
    const Vec<float> b = Element::load(other + i);
    Element::store(scratch + i, adds ? a + b : a - b);
  }
  return scratch;
}

}  // namespace
}  // namespace convmixer_fast::cpu
