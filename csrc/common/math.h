// Integer arithmetic of the host code of both backends.
//
// Everything here is `static constexpr`: a CPU source that is compiled for a wide instruction set must not leave a
// function with external linkage behind, which the linker could then choose for the path of a narrower one.
#pragma once
#include <cstdint>

namespace convmixer_fast {

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least multiple that is not below `value`.
static constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Consecutive rows or columns of taps.
struct TapRange {
  int first;
  int count;
};

// The taps that can reach a map of `size` rows or columns: if the map is smaller than the kernel, the others only ever
// meet padding.
static constexpr TapRange clip_taps(int64_t size, int64_t taps, int64_t pad) {
  const int64_t begin = pad - (size - 1) > 0 ? pad - (size - 1) : 0;
  const int64_t end = pad + size < taps ? pad + size : taps;
  return {static_cast<int>(begin), static_cast<int>(end - begin)};
}

}  // namespace convmixer_fast
