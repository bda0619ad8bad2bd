#include "cpu_info.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace convmixer_fast::cpu {
namespace {

int64_t ask_l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

}  // namespace

int64_t l2_bytes() {
  static const int64_t bytes = ask_l2_bytes();
  return bytes;
}

}  // namespace convmixer_fast::cpu
