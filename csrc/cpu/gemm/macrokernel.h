// The product of two matrices: the loops around the innermost part.
#pragma once
#include "../scratch.h"
#include "blocking.h"

namespace convmixer_fast::cpu {
namespace {

// The tasks [begin, end): on_group(first pixel, pixels) before the first tile of a group, on_tile(pixel, part, column
// tile, tile of results) for each, pixel counted in the group. Sums of `at_once` channel vectors are added up. All
// panels of a group pass by a chunk of the weights before the next one.
template <class Operand, class OnGroup, class OnTile>
void multiply_tasks(const ProductPlan<Operand>& plan, const Operand* left, const Operand* right, int64_t at_once,
                    int64_t begin, int64_t end, Scratch& scratch, OnGroup on_group, OnTile on_tile) {
  constexpr int64_t n = kLanes<float>, kLines = kColumns * n * int64_t(sizeof(Operand)) / 64;
  const Scheme& scheme = plan.scheme;
  const int64_t parts = scheme.parts(), chunk = Operand::chunk(scheme) / n, chunks = ceil_div(plan.depth, chunk);
  const int64_t tile_count = plan.kMaxPanels * plan.block * parts;
  const int64_t sums = scheme.products > 1 ? plan.kMaxPanels * kMaxRows * plan.depth * n : 0;
  Tile* tiles = static_cast<Tile*>(scratch.reserve(tile_count * sizeof(Tile) + sums * sizeof(Operand)));
  Operand* sum = reinterpret_cast<Operand*>(tiles + tile_count);
  const auto multiply = multiply_for<Operand>(plan.rows, std::make_integer_sequence<int, kMaxRows - kMinRows + 1>());
  Tile partial;  // its memory
  int first_product[Scheme::kMostParts] = {};
  for (int part = 0; part < parts; ++part)
    while (scheme.result[first_product[part]][part] == 0) ++first_product[part];

  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / plan.blocks, first_column = task % plan.blocks * plan.block;
    const int64_t columns = min(plan.block, plan.tiles - first_column);
    const int64_t first = plan.first_panel(group), panels = plan.first_panel(group + 1) - first;
    const int64_t pitch = plan.pitch(group);
    const Operand* from = left + first * plan.rows * plan.left_depth() * n;
    if (task == begin || first_column == 0) on_group(first * plan.rows, panels * plan.rows);

    const int64_t steps = scheme.products * columns * chunks;  // chunk by chunk, tile by tile, product by product
    const auto weights_at = [&](int64_t step) {
      const int64_t product = step / chunks / columns, column = first_column + step / chunks % columns;
      const int64_t vector = product * plan.depth + step % chunks * chunk;
      return right + (column * plan.right_depth() + vector) * kColumns * n;
    };
    const Operand* of_next_task = right + (first_column + columns) % plan.tiles * plan.right_depth() * kColumns * n;
    const Operand* operand = nullptr;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t product = step / chunks / columns, column = step / chunks % columns;
      const int64_t i = step % chunks * chunk, vectors = min(chunk, plan.depth - i);
      if (step % (columns * chunks) == 0)
        operand = signed_sum(scheme.left[product], parts, from, plan.depth * pitch, sum);
      const Operand* weight = weights_at(step);
      const Operand* later = step + 1 < steps ? weights_at(step + 1) : of_next_task;
      for (int64_t p = 0; p < panels; ++p) {
        Tile* results = tiles + (column * panels + p) * parts;
        Target targets[Scheme::kMostParts];
        int64_t target_count = 0;
        for (int part = 0; part < parts; ++part)
          if (const int sign = scheme.result[product][part])
            targets[target_count++] = {results + part, i == 0 && product == first_product[part] ? Target::kSet
                                                       : sign > 0                               ? Target::kAdd
                                                                                                : Target::kSubtract};
        const int64_t line = p * kLines / panels;
        const Ahead ahead{reinterpret_cast<const char*>(later) + line * 64, (p + 1) * kLines / panels - line};
        multiply(operand + i * pitch + p * plan.rows * n, pitch, weight, vectors, at_once, ahead, targets, target_count,
                 partial);
        if (product + 1 < scheme.products || i + vectors < plan.depth) continue;
        for (int part = 0; part < parts; ++part) on_tile(p * plan.rows, part, first_column + column, results[part]);
      }
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
