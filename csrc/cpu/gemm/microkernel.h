// The GEMM microkernel: an MR x NR tile of accumulators. A's rows are pixels, B's columns output channels, and K runs
// over input channels.
//
// Terms: docs/glossary.md.
#pragma once
#include <utility>

#include "../cpu_info.h"
#include "element_types.h"

namespace convmixer_fast::cpu {
namespace {

// MR is as large as the registers allow, or a little less if all threads then get the same work.
#if CMF_VECTOR_REGISTERS == 32  // 28 accumulators, 2 vectors of B, the value of A
constexpr int kMaxMr = 14;
constexpr int kMinMr = 12;
#else  // 16 registers: 12 accumulators, 2 vectors of B, the value of A
constexpr int kMaxMr = 6;
constexpr int kMinMr = 5;
#endif
static_assert(kMinMr * 2 >= 10, "fewer sums would wait for each other: two FMAs per cycle, of up to five cycles each");
constexpr int kNrVectors = 2;
constexpr int kNr = kNrVectors * kLanes<float>;

using AccumulatorTile = Vec<float>[kNrVectors][kMaxMr];

// The lines of the next B tile that a microkernel call prefetches: `count` per channel vector of K, the first time from
// `next` on.
struct PrefetchCursor {
  const char* next;
  int64_t count;
};

// What a microkernel call does with its accumulators.
struct Target {
  AccumulatorTile* tile;
  enum How { kSet, kAdd, kSubtract } how;
};

// Calls update(to[v][r], from[v][r]) for kMr rows.
template <int kMr, class Update>
CMF_INLINE void for_tile(AccumulatorTile& to, const AccumulatorTile& from, Update update) {
#pragma GCC unroll 2
  for (int v = 0; v < kNrVectors; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < kMr; ++r) update(to[v][r], from[v][r]);
}

// Multiplies a packed A panel (kMr pixels, `a_pitch` elements from channel vector to channel vector) by a packed B
// tile, and sets all targets to the product, or adds it to or subtracts it from them. Every `kc_sum` channel vectors
// the accumulators are added to `chains` and start from zero (accuracy). Not inline: its loop wants all vector
// registers.
template <int kMr, class Element>
__attribute__((noinline)) void microkernel(const Element* a, int64_t a_pitch, const Element* b, int64_t k_vectors,
                                           int64_t kc_sum, PrefetchCursor prefetch, const Target* targets,
                                           int64_t target_count, AccumulatorTile& chains) {
  using PackedVec = typename Element::PackedVec;
  constexpr int kLanes = cpu::kLanes<float>;
  constexpr int kPack = Element::kPack;
  const auto set = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to = s; };
  const auto add = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to += s; };
  const auto subtract = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to -= s; };
  AccumulatorTile acc = {};
  // An optimization barrier: the compiler is not to see that both pointers are the same, or it would load once.
  const Element* opaque_a = a;
  asm("" : "+r"(opaque_a));
  for (int64_t i = 0, end = kc_sum; i < k_vectors; ++i) {
    if (i == end) {
      if (i == kc_sum) for_tile<kMr>(chains, acc, set);
      else for_tile<kMr>(chains, acc, add);
      for_tile<kMr>(acc, acc, [](Vec<float>& to, const Vec<float>&) CMF_INLINE_LAMBDA { to = Vec<float>{}; });
      end += kc_sum;
    }
#pragma GCC unroll 1
    for (int k = 0; k < kLanes; k += kPack) {
      PackedVec b_vectors[kNrVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kNrVectors; ++v) memcpy(&b_vectors[v], b + v * kLanes * kPack, sizeof(PackedVec));
#pragma GCC unroll 16
      for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kNrVectors; ++v) {
          typename Element::Packed packed;
          memcpy(&packed, (v > 0 && r < Element::kRowsLoadedTwice ? opaque_a : a) + r * kLanes + k, sizeof packed);
          acc[v][r] = multiply_add(acc[v][r], Element::broadcast(packed), b_vectors[v]);
        }
      }
      b += kNr * kPack;
    }
    a += a_pitch;
    opaque_a += a_pitch;
    for (int64_t l = 0; l < prefetch.count; ++l) __builtin_prefetch(prefetch.next + l * kCacheLine, 0, 2);
    prefetch.next += kNr * kLanes * sizeof(Element);
  }
  if (k_vectors > kc_sum) for_tile<kMr>(acc, chains, add);
  for (const Target* target = targets; target < targets + target_count; ++target) {
    switch (target->how) {
      case Target::kSet: for_tile<kMr>(*target->tile, acc, set); break;
      case Target::kAdd: for_tile<kMr>(*target->tile, acc, add); break;
      case Target::kSubtract: for_tile<kMr>(*target->tile, acc, subtract);
    }
  }
}

// The microkernel of a tile height from kMinMr to kMaxMr.
template <class Element, int... kMore>
constexpr auto microkernel_for(int64_t mr, std::integer_sequence<int, kMore...>) {
  constexpr decltype(&microkernel<kMaxMr, Element>) kAll[] = {&microkernel<kMinMr + kMore, Element>...};
  return kAll[mr - kMinMr];
}

}  // namespace
}  // namespace convmixer_fast::cpu
