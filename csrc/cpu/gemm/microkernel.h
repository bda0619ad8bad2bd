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

// The largest MR that the registers allow. Blocking may take a smaller one, down to kMinMr, to balance the threads.
#if CMF_VECTOR_REGISTERS == 32  // 28 accumulators, 2 vectors of B, the value of A
constexpr int kMaxMr = 14;
constexpr int kMinMr = 12;
#else  // 16 registers: 12 accumulators, 2 vectors of B, the value of A
constexpr int kMaxMr = 6;
constexpr int kMinMr = 5;
#endif
constexpr int kNrVectors = 2;
constexpr int kNr = kNrVectors * kLanes<float>;
static_assert(kMinMr * kNrVectors >= 10,
              "two FMAs per cycle with a latency of up to five: fewer accumulators would stall");

using AccumulatorTile = Vec<float>[kNrVectors][kMaxMr];  // [vector of output channels][pixel]

// What a microkernel call prefetches of the next slice of B: for each channel vector of K, `count` cache lines from
// `next` on, which then advances by one channel vector. The panels of an M block share the lines of a slice.
struct PrefetchCursor {
  const char* next;
  int64_t count;
};

// A result tile, and how the product enters it.
struct Target {
  AccumulatorTile* tile;
  enum How { kSet, kAdd, kSubtract } how;
};

// Calls update(to[v][r], from[v][r]) for all vectors of output channels and kMr pixels.
template <int kMr, class Update>
CMF_INLINE void for_tile(AccumulatorTile& to, const AccumulatorTile& from, Update update) {
#pragma GCC unroll 2
  for (int v = 0; v < kNrVectors; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < kMr; ++r) update(to[v][r], from[v][r]);
}

// Computes an A panel (kMr pixels, `a_pitch` elements from channel vector to channel vector) times a slice of a B tile
// ([K / kPack][kNr][kPack]), over `k_vectors` channel vectors of K, and stores the product into each target, adds it,
// or subtracts it. After every `chain_vectors` channel vectors the accumulators are added to `chains` and start anew,
// which rounds less than one long chain; `chains` is scratch memory, undefined before and after. Not inline: its loop
// wants all vector registers.
template <int kMr, class Element>
__attribute__((noinline)) void microkernel(const Element* a, int64_t a_pitch, const Element* b, int64_t k_vectors,
                                           int64_t chain_vectors, PrefetchCursor prefetch, const Target* targets,
                                           int64_t target_count, AccumulatorTile& chains) {
  using PackedVec = typename Element::PackedVec;
  constexpr int kLanes = cpu::kLanes<float>;
  constexpr int kPack = Element::kPack;
  const auto set = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to = s; };
  const auto add = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to += s; };
  const auto subtract = [](Vec<float>& to, Vec<float> s) CMF_INLINE_LAMBDA { to -= s; };
  const auto clear = [](Vec<float>& to, const Vec<float>&) CMF_INLINE_LAMBDA { to = Vec<float>{}; };
  AccumulatorTile acc = {};
  // Through the second pointer values are loaded again, so that the FMA itself broadcasts them from memory
  // (kRowsLoadedTwice). The barrier hides that the pointers are equal: the compiler would merge the loads.
  const Element* opaque_a = a;
  asm("" : "+r"(opaque_a));
  for (int64_t i = 0, chain_end = chain_vectors; i < k_vectors; ++i) {
    if (i == chain_end) {  // the first chain is copied, later ones are added
      if (i == chain_vectors) for_tile<kMr>(chains, acc, set);
      else for_tile<kMr>(chains, acc, add);
      for_tile<kMr>(acc, acc, clear);
      chain_end += chain_vectors;
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
    // For reading, into the L2 cache: the current slice and the panels take up L1.
    for (int64_t l = 0; l < prefetch.count; ++l) __builtin_prefetch(prefetch.next + l * kCacheLine, 0, 2);
    prefetch.next += kNr * kLanes * sizeof(Element);
  }
  if (k_vectors > chain_vectors) for_tile<kMr>(acc, chains, add);
  for (const Target* target = targets; target < targets + target_count; ++target) {
    switch (target->how) {
      case Target::kSet: for_tile<kMr>(*target->tile, acc, set); break;
      case Target::kAdd: for_tile<kMr>(*target->tile, acc, add); break;
      case Target::kSubtract: for_tile<kMr>(*target->tile, acc, subtract);
    }
  }
}

// The instantiation for `mr` pixels, from kMinMr to kMaxMr.
template <class Element, int... kExtraRows>
constexpr auto microkernel_for(int64_t mr, std::integer_sequence<int, kExtraRows...>) {
  constexpr decltype(&microkernel<kMaxMr, Element>) kAll[] = {&microkernel<kMinMr + kExtraRows, Element>...};
  return kAll[mr - kMinMr];
}

}  // namespace
}  // namespace convmixer_fast::cpu
