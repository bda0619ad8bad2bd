// The operators' entry points: each picks the kernel for the tensors' type. Every isa/operators_<isa>.cpp includes this
// file and exports its table.
//
// Terms: docs/glossary.md.
#pragma once
#include "depthwise/forward.h"
#include "depthwise/wgrad.h"
#include "dispatch.h"
#include "pool.h"

namespace convmixer_fast::cpu {
namespace {

template <class F>
CMF_INLINE auto with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat64: return f(Native<double>());
    case DType::kFloat32: return f(Native<float>());
    case DType::kFloat16: return f(Float16());
    case DType::kBFloat16: return f(BFloat16());
  }
  __builtin_unreachable();
}

int64_t depthwise_tasks(const DepthwiseParams& p) {
  return with_storage(p.dtype, [&](auto storage) { return ForwardPlan<typename decltype(storage)::Real>(p).tasks; });
}

void depthwise(const DepthwiseParams& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  Scratch scratch;
  with_storage(p.dtype, [&](auto storage) { Depthwise<decltype(storage)>(p, scratch).run(begin, end); });
}

int64_t depthwise_wgrad_workspace(const WgradParams& p) {
  return with_storage(p.dtype, [&](auto storage) { return WgradPlan<typename decltype(storage)::Real>(p).workspace; });
}

int64_t depthwise_wgrad_tasks(const WgradParams& p) {
  return with_storage(p.dtype, [&](auto storage) { return WgradPlan<typename decltype(storage)::Real>(p).tasks; });
}

void depthwise_wgrad(const WgradParams& p, int64_t begin, int64_t end) {
  if (begin == end) return;
  Scratch scratch;
  with_storage(p.dtype, [&](auto storage) { DepthwiseWgrad<decltype(storage)>(p, scratch).run(begin, end); });
}

int64_t depthwise_wgrad_reduce_tasks(const WgradParams& p) {
  return with_storage(p.dtype, [&](auto storage) { return WgradPlan<typename decltype(storage)::Real>(p).vectors; });
}

void depthwise_wgrad_reduce(const WgradParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto storage) { reduce_partials<decltype(storage)>(p, begin, end); });
}

int64_t activate_pool_tasks(const PoolParams& p) {
  return with_storage(p.dtype, [&](auto storage) { return pool_tasks<typename decltype(storage)::Real>(p); });
}

void activate_pool(const PoolParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, [&](auto storage) { pool<decltype(storage)>(p, begin, end); });
}

constexpr OperatorKernels kOperators = {depthwise_tasks,        depthwise,           depthwise_wgrad_workspace,
                                        depthwise_wgrad_tasks,  depthwise_wgrad,     depthwise_wgrad_reduce_tasks,
                                        depthwise_wgrad_reduce, activate_pool_tasks, activate_pool};

}  // namespace
}  // namespace convmixer_fast::cpu
