// The choice among the instruction sets, once per process.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace convmixer_fast::cpu {
namespace {

struct Candidate {
  bool available;  // on this CPU
  bool preferred;  // over the narrower ones; otherwise it must be asked for by name
  KernelTable table;
};

const KernelTable& choose() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // vdpbf16ps per cycle: as many as fused multiply-adds on Zen 4, a quarter of them on Emerald Rapids (measured).
  const bool fast_bf16 = __builtin_cpu_is("amd");
#endif
  static const Candidate widest_first[] = {
#if defined(__x86_64__)
      {avx512_bf16, fast_bf16, {"avx512_bf16", kAvx512Operators, kAvx512Network, kAvx512Bf16Network}},
      {avx512, true, {"avx512", kAvx512Operators, kAvx512Network, kAvx512Network}},
      {avx2, true, {"avx2", kAvx2Operators, kAvx2Network, kAvx2Network}},
#endif
      {true, true, {"generic", kGenericOperators, kGenericNetwork, kGenericNetwork}},
  };
  const char* variable = std::getenv("CMF_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string available;
  for (const Candidate& candidate : widest_first) {
    if (!candidate.available) continue;
    const std::string name = candidate.table.name;
    if (wanted.empty() ? candidate.preferred : wanted == name) return candidate.table;
    available = name + (available.empty() ? "" : ", " + available);
  }
  throw std::runtime_error("CMF_CPU_ISA must name an instruction set that this CPU has (" + available + "), got '" +
                           wanted + "'");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace convmixer_fast::cpu
