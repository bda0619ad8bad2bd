// Memory for what a kernel works on, kept from call to call by each thread.
#pragma once
#include <cstdint>
#include <new>

namespace convmixer_fast::cpu {

// Its members are compiled once, in scratch.cpp: so that none of them is of a wider instruction set than its caller.
struct OutOfScratch : std::bad_alloc {
  int64_t bytes;

  explicit OutOfScratch(int64_t bytes);
  const char* what() const noexcept override;
};

// The thread's memory, lent to one of these at a time; a second one has its own. On return a thread keeps what is no
// larger than kKept.
class Scratch {
 public:
  static constexpr int64_t kKept = 16 << 20;  // most kernels need less than 1 MiB, a network of 1536 channels 3 MiB

  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `bytes` bytes, aligned to vectors; what they held before is lost. Throws OutOfScratch, and can be asked
  // for less then.
  void* reserve(int64_t bytes);

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace convmixer_fast::cpu
