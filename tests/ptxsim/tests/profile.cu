// Kernels with known profile counters.
#include <cuda_fp16.h>
#include <cstdint>

__global__ void copy1(const float* x, float* y) {  // coalesced
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];
}
__global__ void copy_strided(const float* x, float* y) {  // every other element
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[2 * i];
}
__global__ void copy16(const float4* x, float4* y) {  // 16 bytes per thread
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];
}
__global__ void reread(const float* x, float* y) {  // the same bytes four times
  float s = 0;
#pragma unroll 1
  for (int k = 0; k < 4; k++) s += __ldcg(x + ((threadIdx.x + k) & 31));
  y[threadIdx.x] = s;
}
__global__ void half_warp(const __half* x, __half* y, int n) {  // 2-byte accesses, lanes off
  if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x];
}
template <int STRIDE>
__global__ void bank(float* y) {  // STRIDE-way conflicts on the store
  __shared__ float s[32 * STRIDE];
  s[threadIdx.x * STRIDE] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[(threadIdx.x * STRIDE) ^ STRIDE];
}
template __global__ void bank<1>(float*);
template __global__ void bank<2>(float*);
template __global__ void bank<4>(float*);
template __global__ void bank<32>(float*);
__global__ void bank_broadcast(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x / 16];
}
__global__ void bank_wide(float4* y, int pitch) {  // 16-byte accesses, quarter warps
  __shared__ __align__(16) float s[32 * 36];
  *(float4*)&s[threadIdx.x * pitch] = make_float4(1, 2, 3, 4);
  __syncthreads();
  y[threadIdx.x] = *(float4*)&s[(31 - threadIdx.x) * pitch];
}
__global__ void bank_wide8(float2* y) {
  __shared__ __align__(16) float s[64];
  *(float2*)&s[threadIdx.x * 2] = make_float2(1, 2);
  __syncthreads();
  y[threadIdx.x] = *(float2*)&s[62 - threadIdx.x * 2];
}
__global__ void ldm(uint4* y, int pitch) {  // ldmatrix.x4 with a row pitch in bytes
  __shared__ __align__(16) unsigned char s[32 * 144];
  uint4 z = {1, 2, 3, 4}, v;
  for (int i = threadIdx.x; i < 32 * 144 / 16; i += 32) *(uint4*)&s[16 * i] = z;
  __syncwarp();
  uint32_t a = (uint32_t)__cvta_generic_to_shared(s + threadIdx.x * pitch);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(a));
  y[threadIdx.x] = v;
}
// Lane i goes round i + 1 times: 32 issues of the loop body, whatever order the lanes run in.
__global__ void divergent(float* y, float a) {
  float s = a;
  int n = threadIdx.x + 1;
#pragma unroll 1
  for (int k = 0; k < n; k++) s = __fmaf_rn(s, a, 1.0f);
  y[threadIdx.x] = s;
}
// Inner trip counts differ per lane and outer step: the warp runs max over the lanes each time: 3 x 8.
__global__ void nested(float* y, float a) {
  float s = a;
#pragma unroll 1
  for (int j = 0; j < 3; j++) {
    int n = 1 + (threadIdx.x + 3 * j) % 8;
#pragma unroll 1
    for (int k = 0; k < n; k++) s = __fmaf_rn(s, a, 1.0f);
    __syncwarp();
  }
  y[threadIdx.x] = s;
}
// Both sides of a branch: a load in each, half the lanes each, then together again.
__global__ void sides(const float* x, float* y, float a) {
  float s;
  if (threadIdx.x & 1) {
    s = x[threadIdx.x];
#pragma unroll 1
    for (int k = 0; k < 4; k++) s = __fsqrt_rn(s);
  } else {
    s = x[threadIdx.x + 32];
#pragma unroll 1
    for (int k = 0; k < 4; k++) s = s * a;
  }
  y[threadIdx.x] = s;
}
__device__ __noinline__ float helper(float x, int n) {
  if (n == 3) return x;
  return x * x + 1.0f;
}
__global__ void calls(float* y, float a) {
  float s = helper(a, threadIdx.x % 5);
  y[threadIdx.x] = __expf(s) + rsqrtf(s);
}
__global__ void mma_one(float* y) {
  float d[4] = {};
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4}, {%4}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(0x3c003c00));
  y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
// Break, continue, switch, early return and a divergent call in nested loops.
__global__ void tangled(const int* x, int* y, int n) {
  int t = threadIdx.x, s = 0;
  if (t >= n) return;
#pragma unroll 1
  for (int i = 0; i < 6; i++) {
    int v = x[(t + i) & 31];
    if (v == 5) continue;
    if (v == 9 && i > 2) break;
    switch (v & 3) {
      case 0: s += v; break;
      case 1: s ^= 77; break;
      case 2:
#pragma unroll 1
        for (int k = 0; k < v; k++) s = s * 3 + k;
        break;
      default:
        if (v > 20) s += int(helper(float(s), v & 3));
    }
    __syncwarp(__activemask());
  }
  y[t] = s;
}
