// Integer arithmetic of the CPU kernels. std::min and std::max would be instantiated with external linkage, which no
// source that is compiled for a wide instruction set may have (simd.h).
//
// Terms: docs/glossary.md.
#pragma once
#include "../common/math.h"

namespace convmixer_fast::cpu {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// The size of a share if n things are cut into as few shares as possible, of at most `most` things each and all about
// as large. A division takes as long as dozens of multiply-adds; most values of n need none.
constexpr int64_t equal_share(int64_t n, int64_t most) { return n <= most ? n : ceil_div(n, ceil_div(n, most)); }

}  // namespace
}  // namespace convmixer_fast::cpu
