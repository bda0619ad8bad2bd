// Work on torch's threads. Exceptions of the CPU kernels reach the caller as they were thrown; torch's C interface
// alone would report only that there was one.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <new>

#include "../cpu/scratch.h"
#include "allocation.h"
#include "error_text.h"

namespace convmixer_fast {

// Returns f(). If f finds no memory, throws the error that convmixer_fast/_library.py turns into
// torch.OutOfMemoryError.
template <class F>
auto reporting_no_memory(F f) {
  try {
    return f();
  } catch (const cpu::OutOfScratch& error) {
    check(false, kAllocationFailed, error.bytes, " bytes of a thread's scratch memory");
  } catch (const std::bad_alloc&) {
    check(false, kAllocationFailed, "memory to plan the work in");
  }
  __builtin_unreachable();
}

// Calls f(begin, end) on torch's threads for ranges that make up [0, tasks). If calls throw, rethrows the first
// exception.
template <class F>
void parallel_for(int64_t tasks, F f) {
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr thrown;
  const auto keep_first = [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) thrown = std::current_exception();
    }
  };
  reporting_no_memory([&] {
    torch::stable::parallel_for(0, tasks, 1, keep_first);
    if (thrown) std::rethrow_exception(thrown);
  });
}

}  // namespace convmixer_fast
