// The innermost part of a product of matrices: a tile of results, in registers.
#pragma once
#include <utility>

#include "element_types.h"

namespace convmixer_fast::cpu {
namespace {

#if CMF_VECTOR_REGISTERS == 32  // 28 sums, 2 weights, the left operand
constexpr int kMaxRows = 14, kMinRows = 12;
#else  // 16: 12 sums
constexpr int kMaxRows = 6, kMinRows = 5;
#endif
// Rows of a tile: the most, or a few less where all threads then get the same work.
static_assert(kMinRows * 2 >= 10, "fewer sums would wait for each other: two FMAs a cycle, of up to five cycles each");
constexpr int kVectors = 2;  // of output channels
constexpr int kColumns = kVectors * kLanes<float>;

using Tile = Vec<float>[kVectors][kMaxRows];

// The lines that a product of `depth` channel vectors has to prefetch: `count` at `first`, and as many in each of the
// next ones' columns.
struct Ahead {
  const char* first;
  int64_t count;
};

// Where a product goes.
struct Target {
  Tile* tile;
  enum How { kSet, kAdd, kSubtract } how;
};

// to[v][r] = or += or -= sum[v][r], by `update`.
template <int kRows, class Update>
CMF_INLINE void for_tile(Tile& to, const Tile& sum, Update update) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) update(to[v][r], sum[v][r]);
}

// Left (kRows pixels, `pitch` from channel vector to channel vector) times right (kColumns), to all targets. Sums of
// `at_once` channel vectors are added up in `memory`. Not inline: its loop wants all vector registers.
template <int kRows, class Operand>
__attribute__((noinline)) void multiply(const Operand* left, int64_t pitch, const Operand* right, int64_t depth,
                                        int64_t at_once, Ahead ahead, const Target* targets, int64_t target_count,
                                        Tile& memory) {
  using Groups = typename Operand::Groups;
  constexpr int n = kLanes<float>, kDepth = Operand::kDepth;
  const auto set = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to = s; };
  const auto add = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to += s; };
  const auto subtract = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to -= s; };
  Tile sum = {};
  const Operand* same = left;  // which the compiler is not to see, or it would load once
  asm("" : "+r"(same));
  for (int64_t i = 0, end = at_once; i < depth; ++i) {
    if (i == end) {
      if (i == at_once) for_tile<kRows>(memory, sum, set);
      else for_tile<kRows>(memory, sum, add);
      for_tile<kRows>(sum, sum, [](Vec<float>& to, const Vec<float>&) CMF_INLINE_LAMBDA { to = Vec<float>{}; });
      end += at_once;
    }
#pragma GCC unroll 1
    for (int k = 0; k < n; k += kDepth) {
      Groups weight[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) memcpy(&weight[v], right + v * n * kDepth, sizeof(Groups));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          typename Operand::Group group;
          memcpy(&group, (v > 0 && r < Operand::kRowsLoadedTwice ? same : left) + r * n + k, sizeof group);
          sum[v][r] = multiply_add(sum[v][r], Operand::broadcast(group), weight[v]);
        }
      }
      right += kColumns * kDepth;
    }
    left += pitch, same += pitch;
    for (int64_t l = 0; l < ahead.count; ++l) __builtin_prefetch(ahead.first + l * 64, 0, 2);
    ahead.first += kColumns * n * sizeof(Operand);
  }
  if (depth > at_once) for_tile<kRows>(sum, memory, add);
  for (const Target* target = targets; target < targets + target_count; ++target) {
    switch (target->how) {
      case Target::kSet: for_tile<kRows>(*target->tile, sum, set); break;
      case Target::kAdd: for_tile<kRows>(*target->tile, sum, add); break;
      case Target::kSubtract: for_tile<kRows>(*target->tile, sum, subtract);
    }
  }
}

// By rows, from kMinRows on.
template <class Operand, int... kMore>
constexpr auto multiply_for(int64_t rows, std::integer_sequence<int, kMore...>) {
  constexpr decltype(&multiply<kMaxRows, Operand>) all[] = {&multiply<kMinRows + kMore, Operand>...};
  return all[rows - kMinRows];
}

}  // namespace
}  // namespace convmixer_fast::cpu
