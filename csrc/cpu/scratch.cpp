#include "scratch.h"

#include <stdlib.h>

#include "../common/math.h"

namespace convmixer_fast::cpu {
namespace {

constexpr int64_t kAlignment = 64;

struct Kept {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Kept() { free(memory); }
};

thread_local Kept kept;

}  // namespace

OutOfScratch::OutOfScratch(int64_t bytes) : bytes(bytes) {}
const char* OutOfScratch::what() const noexcept { return "no memory for a kernel's scratch"; }

Scratch::Scratch() : memory_(kept.memory), bytes_(kept.bytes) {
  kept.memory = nullptr;
  kept.bytes = 0;
}

Scratch::~Scratch() {
  const bool keep = bytes_ <= kMaxKept && bytes_ > kept.bytes;
  free(keep ? kept.memory : memory_);
  if (keep) {
    kept.memory = memory_;
    kept.bytes = bytes_;
  }
}

void* Scratch::reserve(int64_t bytes) {
  if (bytes > bytes_) {
    free(memory_);
    bytes_ = 0;
    memory_ = aligned_alloc(kAlignment, round_up(bytes, kAlignment));
    if (!memory_) throw OutOfScratch(bytes);
    bytes_ = bytes;
  }
  return memory_;
}

}  // namespace convmixer_fast::cpu
