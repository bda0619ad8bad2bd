// The network's entry points: each picks the kernels for the network's type. Every isa/network_<isa>.cpp includes this
// file and exports its table.
//
// Terms: docs/glossary.md.
#pragma once
#include "../dispatch.h"
#include "pack.h"
#include "stages.h"

namespace convmixer_fast::cpu {
namespace {

// Calls f(storage type, element type). The elements are float32, or bfloat16 if the processor has its dot product; then
// only bfloat16 networks differ from those of AVX-512 without BF16, so that all others are left to that.
template <class F>
CMF_INLINE auto with_types([[maybe_unused]] DType dtype, F f) {
#if CMF_HAS_BF16_DOT
  return f(BFloat16(), BFloat16Element());
#else
  switch (dtype) {
    case DType::kFloat16: return f(Float16(), FloatElement());
    case DType::kBFloat16: return f(BFloat16(), FloatElement());
    default: return f(Native<float>(), FloatElement());
  }
#endif
}

int64_t packed_bytes(const MixerSizes& s) {
  return with_types(s.dtype, [&](auto, auto element) {
    using Element = decltype(element);
    return bytes<Element>(WeightLayout<Element>(s).end);
  });
}

void pack(const MixerSizes& s, const MixerWeights& weights, void* packed) {
  with_types(s.dtype, [&](auto storage, auto element) {
    WeightPacking<decltype(storage), decltype(element)>(s, weights, packed).run();
  });
}

int64_t workspace_bytes(const MixerParams& p) {
  return with_types(p.sizes.dtype, [&](auto, auto element) {
    using Element = decltype(element);
    return bytes<Element>(RunLayout<Element>(p).end);
  });
}

int64_t stage_tasks(const MixerParams& p, MixerStage stage) {
  return with_types(p.sizes.dtype, [&](auto storage, auto element) {
    return Network<decltype(storage), decltype(element)>(p).tasks(stage);
  });
}

void run_stage(const MixerParams& p, MixerStage stage, int64_t begin, int64_t end) {
  Scratch scratch;
  with_types(p.sizes.dtype, [&](auto storage, auto element) {
    Network<decltype(storage), decltype(element)>(p).run(stage, begin, end, scratch);
  });
}

constexpr NetworkKernels kNetwork = {packed_bytes, pack, workspace_bytes, stage_tasks, run_stage};

}  // namespace
}  // namespace convmixer_fast::cpu
