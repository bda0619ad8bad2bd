// What a kernel promises to the compiler. Host and device code, no CUDA.
//
// Terms: docs/glossary.md.
#pragma once

namespace convmixer_fast::cuda {

struct LaunchBounds {
  int threads;   // threads per CTA, at most
  int min_ctas;  // CTAs that an SM must hold at once

  // Registers per thread that the compiler may use: an SM has 65,536, which are allocated in steps of 8 per thread.
  constexpr int registers() const {
    const int share = 65536 / (threads * min_ctas) / 8 * 8;
    return share < 255 ? share : 255;
  }
};

}  // namespace convmixer_fast::cuda
