// Library code (CUB, cooperative groups, fp8, math) must run without false reports.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cub/cub.cuh>
namespace cg = cooperative_groups;
extern "C" __global__ void lib_cub(const int* x, int* o) {
  using R = cub::BlockReduce<int, 128>;
  using S = cub::BlockScan<int, 128>;
  using Q = cub::BlockRadixSort<int, 128, 4>;
  __shared__ typename R::TempStorage a;
  __shared__ typename S::TempStorage b;
  __shared__ typename Q::TempStorage q;
  int v = x[threadIdx.x];
  int s = R(a).Sum(v);
  if (!threadIdx.x) o[0] = s;
  int e;
  S(b).ExclusiveSum(v, e);
  o[1 + threadIdx.x] = e;
  int k[4];
  for (int i = 0; i < 4; i++) k[i] = x[threadIdx.x * 4 + i];
  Q(q).Sort(k);
  for (int i = 0; i < 4; i++) o[200 + threadIdx.x * 4 + i] = k[i];
}
extern "C" __global__ void lib_cg(const float* x, float* o) {
  auto blk = cg::this_thread_block();
  auto t = cg::tiled_partition<8>(blk);
  auto w = cg::tiled_partition<32>(blk);
  float v = x[threadIdx.x];
  o[threadIdx.x] = cg::reduce(t, v, cg::plus<float>());
  o[128 + threadIdx.x] = cg::reduce(w, v, cg::greater<float>());
  if (threadIdx.x % 3 == 0) {
    auto c = cg::coalesced_threads();
    o[256 + threadIdx.x] = c.size() * 100 + c.thread_rank();
  }
}
extern "C" __global__ void lib_fp8(const float* x, __nv_fp8_e4m3* o, float* f) {
  int i = threadIdx.x;
  o[i] = __nv_fp8_e4m3(x[i]);
  f[i] = float(o[i]);
}
extern "C" __global__ void lib_math(const float* x, float* o, const double* d, double* e) {
  int i = threadIdx.x;
  float v = x[i];
  o[i] = sinf(v) + cosf(v) * tanf(v) + logf(fabsf(v) + 1) + powf(fabsf(v), 1.3f) + tanhf(v) + expf(v) +
         rsqrtf(fabsf(v) + .1f) + cbrtf(v) + lgammaf(fabsf(v) + 1) + erfcf(v) + atan2f(v, 2.f) + fmodf(v, 0.3f) +
         normcdff(v) + __expf(v) + __logf(fabsf(v) + 1.f) + __sinf(v) + sinf(v * 1e6f);
  e[i] = pow(fabs(d[i]), 1.7) + log(fabs(d[i]) + 1) + tanh(d[i]) + cos(d[i] * 1e7) + cbrt(d[i]) + fmod(d[i], .3) +
         rsqrt(fabs(d[i]) + 1) + lgamma(fabs(d[i]) + 1);
}
struct Big {
  float m[32];
  int n;
  const float* p;
};
__device__ __noinline__ Big mk(Big b, int i) {
  b.m[i & 31] += 1;
  b.n += i;
  return b;
}
extern "C" __global__ void lib_struct(const __grid_constant__ Big b, float* o, int (*unused)[4]) {
  Big c = mk(b, threadIdx.x);
  o[threadIdx.x] = c.m[threadIdx.x & 31] + c.n + b.m[(threadIdx.x * 7) & 31] + (b.p ? b.p[threadIdx.x] : 0.f);
}
