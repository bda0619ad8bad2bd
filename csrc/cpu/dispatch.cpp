// The choice among the instruction sets, once a process.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace convmixer_fast::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool available, pays;  // one that does not pay must be asked for by name
  const Kernels& (*kernels)();
  const MixerKernels& (*mixer)();
  const MixerKernels& (*bfloat16_mixer)();
};

const InstructionSet& choose() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // vdpbf16ps: as many a cycle as fused multiply-adds on Zen 4, a quarter of them on Emerald Rapids (measured).
  const bool fast_bf16 = __builtin_cpu_is("amd");
#endif
  static const InstructionSet widest_first[] = {
#if defined(__x86_64__)
      {"avx512_bf16", avx512_bf16, fast_bf16, avx512_kernels, avx512_mixer, avx512_bf16_mixer},
      {"avx512", avx512, true, avx512_kernels, avx512_mixer, avx512_mixer},
      {"avx2", avx2, true, avx2_kernels, avx2_mixer, avx2_mixer},
#endif
      {"generic", true, true, generic_kernels, generic_mixer, generic_mixer},
  };
  const char* variable = std::getenv("CMF_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string available;
  for (const InstructionSet& set : widest_first) {
    if (!set.available) continue;
    if (wanted.empty() ? set.pays : wanted == set.name) return set;
    available = set.name + (available.empty() ? "" : ", " + available);
  }
  throw std::runtime_error("CMF_CPU_ISA must name an instruction set that this CPU has (" + available + "), got '" +
                           wanted + "'");
}

const InstructionSet& chosen() {
  static const InstructionSet& set = choose();
  return set;
}

}  // namespace

const Kernels& kernels() { return chosen().kernels(); }
const char* instruction_set() { return chosen().name; }
const MixerKernels& mixer_kernels(DType dtype) {
  return dtype == DType::kBFloat16 ? chosen().bfloat16_mixer() : chosen().mixer();
}

}  // namespace convmixer_fast::cpu
