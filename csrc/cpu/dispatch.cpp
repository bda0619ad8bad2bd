// The choice among the instruction sets, once a process.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace convmixer_fast::cpu {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

const Kernels& choose() {
  const char* variable = std::getenv("CMF_CPU_ISA");
  const std::string wanted = variable ? variable : "";
#if defined(__x86_64__)
  if (has_avx512() && (wanted.empty() || wanted == "avx512")) return avx512_kernels();
  if (has_avx2() && (wanted.empty() || wanted == "avx2")) return avx2_kernels();
#endif
  if (wanted.empty() || wanted == "generic") return generic_kernels();
  throw std::runtime_error("CMF_CPU_ISA must name an instruction set that this CPU has (generic" +
                           std::string(has_avx2() ? ", avx2" : "") + (has_avx512() ? ", avx512" : "") + "), got '" +
                           wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace convmixer_fast::cpu
