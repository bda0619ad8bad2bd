// The network's entry points: each picks the kernel for the network's type. Every isa/network_<isa>.cpp includes this
// file and exports its table.
#pragma once
#include "../dispatch.h"
#include "pack.h"
#include "stages.h"

namespace convmixer_fast::cpu {
namespace {

// f(storage type, operand type): float32 arithmetic but for bfloat16 where the processor has dot products of it. There
// these are all that differs, and the kernels of the other types are those of AVX-512 without BF16.
template <class F>
CMF_INLINE auto with_mixer_types([[maybe_unused]] DType dtype, F f) {
#if CMF_HAS_BF16_DOT
  return f(BFloat16(), BFloat16Operand());
#else
  switch (dtype) {
    case DType::kFloat16: return f(Float16(), FloatOperand());
    case DType::kBFloat16: return f(BFloat16(), FloatOperand());
    default: return f(Native<float>(), FloatOperand());
  }
#endif
}

int64_t packed_bytes(const MixerSizes& s) {
  return with_mixer_types(
      s.dtype, [&](auto, auto operand) { return bytes<decltype(operand)>(Layout<decltype(operand)>(s).end); });
}

void pack(const MixerSizes& s, const MixerWeights& weights, void* packed) {
  with_mixer_types(s.dtype, [&](auto storage, auto operand) {
    Packing<decltype(storage), decltype(operand)>(s, weights, packed).run();
  });
}

int64_t workspace_bytes(const MixerParams& p) {
  return with_mixer_types(
      p.sizes.dtype, [&](auto, auto operand) { return bytes<decltype(operand)>(Workspace<decltype(operand)>(p).end); });
}

int64_t mixer_tasks(const MixerParams& p, MixerStep step) {
  return with_mixer_types(p.sizes.dtype, [&](auto storage, auto operand) {
    return Mixer<decltype(storage), decltype(operand)>(p).tasks(step);
  });
}

void run_mixer(const MixerParams& p, MixerStep step, int64_t begin, int64_t end) {
  Scratch scratch;
  with_mixer_types(p.sizes.dtype, [&](auto storage, auto operand) {
    Mixer<decltype(storage), decltype(operand)>(p).run(step, begin, end, scratch);
  });
}

constexpr NetworkKernels kNetwork = {packed_bytes, pack, workspace_bytes, mixer_tasks, run_mixer};

}  // namespace
}  // namespace convmixer_fast::cpu
