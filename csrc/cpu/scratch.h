// Scratch memory of the kernels, which each thread keeps from call to call.
//
// Terms: docs/glossary.md.
#pragma once
#include <cstdint>
#include <new>

namespace convmixer_fast::cpu {

// Its members are compiled once, in scratch.cpp, so that none of them can be compiled for a wider instruction set than
// its caller's.
struct OutOfScratch : std::bad_alloc {
  int64_t bytes;

  explicit OutOfScratch(int64_t bytes);
  const char* what() const noexcept override;
};

// Borrows the thread's memory; a second Scratch at the same time has its own. On return a thread keeps what is no
// larger than kMaxKept.
class Scratch {
 public:
  static constexpr int64_t kMaxKept = 16 << 20;  // most kernels need less than 1 MiB, a network of 1536 channels 3 MiB

  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Returns at least `bytes` bytes, aligned to vectors; what they held before is lost. Throws OutOfScratch, after which
  // fewer bytes can be asked for.
  void* reserve(int64_t bytes);

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace convmixer_fast::cpu
