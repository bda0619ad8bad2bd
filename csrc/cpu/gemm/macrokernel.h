// The GEMM macrokernel: the loops around the microkernel.
//
// Terms: docs/glossary.md.
#pragma once
#include "../scratch.h"
#include "blocking.h"

namespace convmixer_fast::cpu {
namespace {

// Tasks [begin, end) of a blocking, each an M block times an N block. Loop order: sub-product, B tile, K block, A
// panel: a KC x NR slice of packed B stays in the L1 cache (with Strassen and 32 registers in L2) while the M block's A
// panels stream from the L2 cache. Sums at most `chain_vectors` channel vectors per chain, then adds the chains
// (accuracy).
//
// Calls on_m_block(first pixel, pixels), which include those that fill up the last panel, before the first of these
// tasks of an M block, and on_results(quadrant, B tile, first panel, panels, results) when these panels' results are
// finished: the i-th one's are results[i * quadrants]. Several panels at a time, because an epilogue between two
// microkernels would mostly be latency; but no more than stay in the L1 cache.
template <class Element, class OnMBlock, class OnResults>
void macrokernel(const Blocking<Element>& blocking, const Element* a, const Element* b, int64_t chain_vectors,
                 int64_t begin, int64_t end, Scratch& scratch, OnMBlock on_m_block, OnResults on_results) {
  constexpr int64_t kLanes = cpu::kLanes<float>;
  constexpr int64_t kLines = kNr * kLanes * int64_t(sizeof(Element)) / kCacheLine;  // per channel vector of a B tile
  constexpr int64_t kEpiloguePanels = max(1, (8 << 10) / int64_t(sizeof(AccumulatorTile)));
  const BilinearScheme& scheme = blocking.scheme;
  const int64_t quadrants = scheme.quadrants();
  const int64_t kc_vectors = Element::kc(scheme) / kLanes;
  const int64_t k_blocks = ceil_div(blocking.k_vectors, kc_vectors);
  const int64_t accumulator_tiles = blocking.kMaxPanels * blocking.tiles_per_block * quadrants;
  const int64_t combined_size = scheme.products > 1 ? blocking.kMaxPanels * kMaxMr * blocking.k_vectors * kLanes : 0;
  AccumulatorTile* accumulators = static_cast<AccumulatorTile*>(
      scratch.reserve(accumulator_tiles * sizeof(AccumulatorTile) + combined_size * sizeof(Element)));
  Element* combined = reinterpret_cast<Element*>(accumulators + accumulator_tiles);
  const auto microkernel =
      microkernel_for<Element>(blocking.mr, std::make_integer_sequence<int, kMaxMr - kMinMr + 1>());
  AccumulatorTile chains;
  int first_product[BilinearScheme::kMaxQuadrants] = {};
  int last_product[BilinearScheme::kMaxQuadrants] = {};
  for (int quadrant = 0; quadrant < quadrants; ++quadrant) {
    while (scheme.w[first_product[quadrant]][quadrant] == 0) ++first_product[quadrant];
    for (int product = 0; product < scheme.products; ++product)
      if (scheme.w[product][quadrant] != 0) last_product[quadrant] = product;
  }

  for (int64_t task = begin; task < end; ++task) {
    const int64_t m_block = task / blocking.n_blocks;
    const int64_t first_b_tile = task % blocking.n_blocks * blocking.tiles_per_block;
    const int64_t task_b_tiles = min(blocking.tiles_per_block, blocking.tiles - first_b_tile);
    const int64_t first_panel = blocking.first_panel(m_block);
    const int64_t panels = blocking.first_panel(m_block + 1) - first_panel;
    const int64_t pitch = blocking.pitch(m_block);
    const Element* block_a = a + first_panel * blocking.mr * blocking.a_vectors() * kLanes;
    if (task == begin || first_b_tile == 0) on_m_block(first_panel * blocking.mr, panels * blocking.mr);

    // One loop over (sub-product, B tile, K block), the last one fastest, which knows where its next slice of B begins.
    const int64_t steps = scheme.products * task_b_tiles * k_blocks;
    const auto b_at = [&](int64_t step) {
      const int64_t product = step / k_blocks / task_b_tiles;
      const int64_t tile = first_b_tile + step / k_blocks % task_b_tiles;
      const int64_t vector = product * blocking.k_vectors + step % k_blocks * kc_vectors;
      return b + (tile * blocking.b_vectors() + vector) * kNr * kLanes;
    };
    const Element* next_task_b =
        b + (first_b_tile + task_b_tiles) % blocking.tiles * blocking.b_vectors() * kNr * kLanes;
    const int64_t lines_per_panel = kLines / panels;  // to prefetch; the first `extra_lines` panels fetch one more
    const int64_t extra_lines = kLines % panels;
    const Element* product_a = nullptr;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t product = step / k_blocks / task_b_tiles;
      const int64_t tile = step / k_blocks % task_b_tiles;
      const int64_t k = step % k_blocks * kc_vectors;
      const int64_t vectors = min(kc_vectors, blocking.k_vectors - k);
      if (step % (task_b_tiles * k_blocks) == 0)
        product_a = combine_quadrants(scheme.u[product], quadrants, block_a, blocking.k_vectors * pitch, combined);
      const Element* step_b = b_at(step);
      const char* next_line = reinterpret_cast<const char*>(step + 1 < steps ? b_at(step + 1) : next_task_b);
      for (int64_t p = 0; p < panels; ++p) {
        AccumulatorTile* results = accumulators + (tile * panels + p) * quadrants;
        Target targets[BilinearScheme::kMaxQuadrants];
        int64_t target_count = 0;
        for (int quadrant = 0; quadrant < quadrants; ++quadrant)
          if (const int sign = scheme.w[product][quadrant])
            targets[target_count++] = {results + quadrant, k == 0 && product == first_product[quadrant] ? Target::kSet
                                                           : sign > 0 ? Target::kAdd
                                                                      : Target::kSubtract};
        const PrefetchCursor prefetch{next_line, lines_per_panel + (p < extra_lines)};
        next_line += prefetch.count * kCacheLine;
        microkernel(product_a + k * pitch + p * blocking.mr * kLanes, pitch, step_b, vectors, chain_vectors, prefetch,
                    targets, target_count, chains);
        const int64_t finished = p % kEpiloguePanels + 1;
        if (k + vectors < blocking.k_vectors || (finished < kEpiloguePanels && p + 1 < panels)) continue;
        for (int quadrant = 0; quadrant < quadrants; ++quadrant)
          if (product == last_product[quadrant])
            on_results(quadrant, first_b_tile + tile, p + 1 - finished, finished,
                       results + quadrant - (finished - 1) * quadrants);
      }
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
