// The choice among the instruction sets, once a process.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "mixer.h"

namespace convmixer_fast::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool available;
  const Kernels& (*kernels)();
  const MixerKernels& (*mixer)();
};

const InstructionSet& choose() {
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  static const InstructionSet widest_first[] = {
#if defined(__x86_64__)
      {"avx512_bf16", avx512_bf16, avx512_kernels, avx512_bf16_mixer},
      {"avx512", avx512, avx512_kernels, avx512_mixer},
      {"avx2", avx2, avx2_kernels, avx2_mixer},
#endif
      {"generic", true, generic_kernels, generic_mixer},
  };
  const char* variable = std::getenv("CMF_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  std::string available;
  for (const InstructionSet& set : widest_first) {
    if (!set.available) continue;
    if (wanted.empty() || wanted == set.name) return set;
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
const MixerKernels& mixer_kernels() { return chosen().mixer(); }

}  // namespace convmixer_fast::cpu
