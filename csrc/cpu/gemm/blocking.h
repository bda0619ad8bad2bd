// How a product is cut into tasks.
#pragma once
#include "../cpu_info.h"
#include "microkernel.h"

namespace convmixer_fast::cpu {
namespace {

// How a product is cut into tasks, each a group of panels times a block of column tiles; and where the panels' elements
// lie. All sizes are those of a part.
template <class Operand>
struct ProductPlan {
  static constexpr int64_t n = kLanes<float>;
  static constexpr int64_t kMaxPanels = 24;  // of a group
  static constexpr int64_t kMaxTiles = 12;   // of a block
  static constexpr double kUneven = 1.03;    // the longest thread's share over the mean one, accepted

  const Scheme& scheme;
  int64_t tiles, depth;
  int64_t block, blocks;  // tiles of a block: of many, where sums of the panels' parts are made for all of them
  int64_t rows, panels, groups;

  // The fewest groups for which the L2 cache holds what is used again, the panels or the sums of their parts and the
  // results, for the weights pass by once for each group; more of them, or of fewer rows, where that busies all
  // threads.
  ProductPlan(const Scheme& scheme, int64_t pixels, int64_t tiles, int64_t depth, int64_t threads)
      : scheme(scheme), tiles(tiles), depth(depth) {
    const int64_t most = scheme.products == 1 ? 1 : max(1, min(kMaxTiles, tiles * pixels / (64 * threads)));
    blocks = ceil_div(tiles, most), block = ceil_div(tiles, max(1, blocks));
    const int64_t left = kMaxRows * depth * n * int64_t(sizeof(Operand));
    const int64_t panel = scheme.products == 1 ? 2 * left : left + block * scheme.parts() * int64_t(sizeof(Tile));
    const int64_t fitting = max(1, min(l2_bytes() / panel, kMaxPanels));
    double least = 0;
    for (int64_t r = kMaxRows; r >= kMinRows; --r) {
      const int64_t of_rows = ceil_div(pixels, r);
      for (int64_t g = ceil_div(of_rows, fitting); g <= of_rows && (least == 0 || least > kUneven); ++g) {
        const double uneven = longest_share(r, of_rows, g, threads) * double(threads) / double(blocks * pixels);
        if (least == 0 || uneven < least) rows = r, panels = of_rows, groups = g, least = uneven;
      }
    }
  }

  // The rows times tiles of the thread that has most.
  int64_t longest_share(int64_t rows, int64_t panels, int64_t groups, int64_t threads) const {
    return ceil_div(ceil_div(groups * blocks, threads) * panels, groups) * rows;
  }

  int64_t tasks() const { return groups * blocks; }
  int64_t left_depth() const { return scheme.parts() * depth; }  // the parts' channel vectors follow each other
  int64_t right_depth() const { return scheme.products * depth; }
  // Groups are equal to within a panel, and to both sides of the middle alike.
  int64_t first_panel(int64_t group) const { return (2 * group * panels + groups) / (2 * groups); }
  int64_t first_pixel(int64_t group) const { return first_panel(group) * rows; }
  int64_t group_of(int64_t pixel) const { return ((2 * (pixel / rows) + 1) * groups - 1) / (2 * panels); }
  int64_t pitch(int64_t group) const { return (first_pixel(group + 1) - first_pixel(group)) * n; }
};

}  // namespace
}  // namespace convmixer_fast::cpu
