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

}  // namespace convmixer_fast
