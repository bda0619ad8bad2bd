// How a matrix product is cut into tasks: M blocks of packed A panels times N blocks of packed B tiles.
//
// Terms: docs/glossary.md.
#pragma once
#include "../cpu_info.h"
#include "microkernel.h"

namespace convmixer_fast::cpu {
namespace {

// The blocking of a product, or of each sub-product of its scheme: all sizes are those of a quadrant.
template <class Element>
struct Blocking {
  static constexpr int64_t kLanes = cpu::kLanes<float>;
  static constexpr int64_t kMaxPanels = 24;           // per M block
  static constexpr int64_t kMaxTiles = 384 / kNr;     // per N block
  static constexpr double kAcceptedImbalance = 1.03;  // the longest thread's share over the mean one

  const BilinearScheme& scheme;
  int64_t tiles;            // packed B tiles
  int64_t k_vectors;        // K, in channel vectors
  int64_t tiles_per_block;  // several only if the sums of A's quadrants are made for all of them
  int64_t n_blocks;
  int64_t mr;        // pixels per packed A panel
  int64_t panels;    // packed A panels
  int64_t m_blocks;  // equal to within one panel

  // The fewest M blocks for which the L2 cache holds what is used again (the panels; or the sums of their quadrants and
  // the accumulator tiles), because B streams through once per M block. More M blocks, or a smaller MR, if that
  // balances the threads.
  Blocking(const BilinearScheme& scheme, int64_t pixels, int64_t tiles, int64_t k_vectors, int64_t threads)
      : scheme(scheme), tiles(tiles), k_vectors(k_vectors) {
    const int64_t max_tiles = scheme.products == 1 ? 1 : max(1, min(kMaxTiles, tiles * pixels / (64 * threads)));
    n_blocks = ceil_div(tiles, max_tiles);
    tiles_per_block = ceil_div(tiles, max(1, n_blocks));
    const int64_t panel_bytes = kMaxMr * k_vectors * kLanes * int64_t(sizeof(Element));
    const int64_t bytes_per_panel =
        scheme.products == 1 ? 2 * panel_bytes
                             : panel_bytes + tiles_per_block * scheme.quadrants() * int64_t(sizeof(AccumulatorTile));
    const int64_t fitting = max(1, min(l2_bytes() / bytes_per_panel, kMaxPanels));
    double best = 0;  // imbalance; 0: none yet
    for (int64_t r = kMaxMr; r >= kMinMr; --r) {
      const int64_t p = ceil_div(pixels, r);
      for (int64_t m = ceil_div(p, fitting); m <= p && (best == 0 || best > kAcceptedImbalance); ++m) {
        const double imbalance = longest_share(r, p, m, threads) * double(threads) / double(n_blocks * pixels);
        if (best == 0 || imbalance < best) {
          mr = r;
          panels = p;
          m_blocks = m;
          best = imbalance;
        }
      }
    }
  }

  // Rows times N blocks of the thread that has most.
  int64_t longest_share(int64_t mr, int64_t panels, int64_t m_blocks, int64_t threads) const {
    return ceil_div(ceil_div(m_blocks * n_blocks, threads) * panels, m_blocks) * mr;
  }

  int64_t tasks() const { return m_blocks * n_blocks; }

  // Channel vectors per pixel of A, whose quadrants' channel vectors follow each other, and per column of B, where
  // those of the sub-products do.
  int64_t a_vectors() const { return scheme.quadrants() * k_vectors; }
  int64_t b_vectors() const { return scheme.products * k_vectors; }

  // The M blocks' sizes are symmetric about the middle.
  int64_t first_panel(int64_t m_block) const { return (2 * m_block * panels + m_blocks) / (2 * m_blocks); }
  int64_t first_pixel(int64_t m_block) const { return first_panel(m_block) * mr; }
  int64_t m_block_of(int64_t pixel) const { return ((2 * (pixel / mr) + 1) * m_blocks - 1) / (2 * panels); }
  // Elements from channel vector to channel vector of an M block's panels.
  int64_t pitch(int64_t m_block) const { return (first_pixel(m_block + 1) - first_pixel(m_block)) * kLanes; }
};

}  // namespace
}  // namespace convmixer_fast::cpu
