// Kernels of the test suite, built for sm_80.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cassert>
#include <cstdint>
#include <cstdio>

extern "C" __global__ void vadd(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}

extern "C" __global__ void block_sum(const float* x, float* out, int n) {
  __shared__ float part[32];
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int d = 16; d; d >>= 1) v += __shfl_down_sync(0xffffffff, v, d);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.f;
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffff, v, d);
    if (threadIdx.x == 0) atomicAdd(out, v);
  }
}

extern "C" __global__ void half_ops(const __half* a, const __half* b, const __half* c, __half* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = __hadd_rn(a[i], b[i]);
  o[n + i] = __hmul_rn(a[i], b[i]);
  o[2 * n + i] = __hfma(a[i], b[i], c[i]);
  o[3 * n + i] = __hmax(a[i], b[i]);
  o[4 * n + i] = __float2half_rn(__half2float(a[i]) / __half2float(b[i]));
  o[5 * n + i] = __hfma_relu(a[i], b[i], c[i]);
}

extern "C" __global__ void half2_ops(const __half2* a, const __half2* b, const __half2* c, __half2* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = __hfma2(a[i], b[i], c[i]);
  o[n + i] = __hmin2(__hsub2(a[i], b[i]), __habs2(c[i]));
  o[2 * n + i] = __hgt2(a[i], b[i]);
  float2 f = __half22float2(a[i]);
  o[3 * n + i] = __floats2half2_rn(f.x * 3.f, f.y * 3.f);
}

extern "C" __global__ void bf16_ops(const __nv_bfloat16* a, const __nv_bfloat16* b, const __nv_bfloat16* c,
                                    __nv_bfloat16* o, const float* f, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = __hadd(a[i], b[i]);
  o[n + i] = __hmul(a[i], b[i]);
  o[2 * n + i] = __hfma(a[i], b[i], c[i]);
  o[3 * n + i] = __float2bfloat16_rn(f[i]);
  __nv_bfloat162 p = __floats2bfloat162_rn(f[i], -f[i]);
  o[4 * n + i] = p.y;
}

extern "C" __global__ void f32_rounding(const float* a, const float* b, const float* c, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = __fadd_rz(a[i], b[i]);
  o[n + i] = __fmaf_rd(a[i], b[i], c[i]);
  o[2 * n + i] = __fmul_ru(a[i], b[i]);
  o[3 * n + i] = __fdiv_rn(a[i], b[i]);
  o[4 * n + i] = sqrtf(fabsf(a[i]));
  o[5 * n + i] = __fdiv_rz(a[i], b[i]);
  o[6 * n + i] = fmaf(a[i], b[i], c[i]);
}

extern "C" __global__ void conversions(const float* a, const double* d, int* o, long long* l, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = __float2int_rn(a[i]);
  o[n + i] = __float2int_rz(a[i]);
  o[2 * n + i] = __float2int_rd(a[i]);
  o[3 * n + i] = (int)__float2uint_ru(a[i]);
  o[4 * n + i] = __float_as_int((float)d[i]);
  o[5 * n + i] = __float_as_int(__double2float_rz(d[i]));
  o[6 * n + i] = __float_as_int((float)(long long)d[i]);
  o[7 * n + i] = (int)(signed char)(int)a[i];
  l[i] = __double2ll_rn(d[i]);
  l[n + i] = (long long)a[i];
}

extern "C" __global__ void int_ops(const unsigned* a, const unsigned* b, unsigned* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned x = a[i], y = b[i];
  int k = 0;
  o[n * k++ + i] = __popc(x);
  o[n * k++ + i] = __brev(x);
  o[n * k++ + i] = __clz(x);
  o[n * k++ + i] = __byte_perm(x, y, 0x5410 + (y & 3));
  o[n * k++ + i] = __funnelshift_l(x, y, y & 31);
  o[n * k++ + i] = __funnelshift_r(x, y, x & 31);
  o[n * k++ + i] = __umulhi(x, y);
  o[n * k++ + i] = (unsigned)__mulhi((int)x, (int)y);
  o[n * k++ + i] = (unsigned)__dp4a((int)x, (int)y, 7);
  o[n * k++ + i] = x / (y | 1);
  o[n * k++ + i] = (unsigned)((int)x % (int)(y | 1));
  o[n * k++ + i] = x >> (y & 63 ? (y & 31) : 0);
  o[n * k++ + i] = (unsigned)((int)x >> (y & 31));
  unsigned long long p = (unsigned long long)x * y + 12345;
  o[n * k++ + i] = (unsigned)(p >> 32);
  o[n * k++ + i] = (unsigned)(p % 1000003u);
  o[n * k++ + i] = (x & ~y) ^ (x | y);
  unsigned r;
  asm("bfe.s32 %0, %1, 5, 11;" : "=r"(r) : "r"(x));
  o[n * k++ + i] = r;
  asm("bfi.b32 %0, %1, %2, 7, 9;" : "=r"(r) : "r"(x), "r"(y));
  o[n * k++ + i] = r;
  asm("{ .reg .u32 t; add.cc.u32 t, %1, %2; addc.u32 %0, 0, 0; }" : "=r"(r) : "r"(x), "r"(y));
  o[n * k++ + i] = r;
  asm("{ .reg .pred p; setp.gt.s32 p, %1, %2; selp.u32 %0, 1, 2, p; }" : "=r"(r) : "r"(x), "r"(y));
  o[n * k++ + i] = r;
}

extern "C" __global__ void warp_ops(const unsigned* in, unsigned* o) {
  unsigned lane = threadIdx.x & 31, x = in[threadIdx.x];
  o[threadIdx.x] = __ballot_sync(~0u, x & 1);
  o[64 + threadIdx.x] = __match_any_sync(~0u, x & 3);
  o[128 + threadIdx.x] = __reduce_add_sync(~0u, x);
  o[192 + threadIdx.x] = __reduce_max_sync(~0u, x);
  o[256 + threadIdx.x] = __shfl_sync(~0u, x, (lane * 7) & 31, 16);
  o[320 + threadIdx.x] = __shfl_up_sync(~0u, x, 3);
  unsigned v = 0;
  if (lane < 12) v = __ballot_sync(0xfff, x & 1) + __activemask();
  o[384 + threadIdx.x] = v;
  o[448 + threadIdx.x] = __syncthreads_count(x & 1);
  o[512 + threadIdx.x] = __any_sync(~0u, x == 5) | __all_sync(~0u, x < 1000) << 1;
}

extern "C" __global__ void atomics(unsigned* hist, const int* x, int n, float* fsum, __half2* hsum, int* mx,
                                   unsigned* inc, unsigned long long* cas) {
  __shared__ unsigned sh[8];
  if (threadIdx.x < 8) sh[threadIdx.x] = 0;
  __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    atomicAdd(&sh[x[i] & 7], 1u);
    atomicAdd(fsum, (float)x[i]);
    atomicAdd(hsum, __floats2half2_rn(1.f, 0.5f));
    atomicMax(mx, x[i]);
    atomicInc(inc, 9);
    unsigned long long old = *cas, want;
    do {
      want = old;
      old = atomicCAS(cas, want, want + 3);
    } while (old != want);
  }
  __syncthreads();
  if (threadIdx.x < 8) atomicAdd(&hist[threadIdx.x], sh[threadIdx.x]);
}

__device__ __noinline__ int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
__device__ __noinline__ float poly(float x, const float* c, int n) {
  float r = 0;
  for (int i = 0; i < n; i++) r = r * x + c[i];
  return r;
}
__constant__ float coef[4] = {1.f, -2.f, 3.f, 0.5f};
__device__ int counter;
extern "C" __global__ void calls(int* o, float* f, int sel) {
  int buf[16];
  for (int i = 0; i < 16; i++) buf[i] = i * i;
  int r;
  switch ((threadIdx.x + sel) % 7) {
    case 0: r = fib(10); break;
    case 1: r = buf[threadIdx.x & 15]; break;
    case 2: r = -5; break;
    case 3: r = clock64() >= 0; break;
    case 4: r = (int)threadIdx.x * 1000; break;
    case 5: r = buf[(threadIdx.x * 3) & 15] + sel; break;
    default: r = 99;
  }
  o[threadIdx.x] = r;
  f[threadIdx.x] = poly((float)threadIdx.x, coef, 4);
  atomicAdd(&counter, 1);
  if (threadIdx.x == 5) printf("thread %d: %s %.2f %llu%%\n", threadIdx.x, "text", f[5], 1ull << 40);
}

extern "C" __global__ void erf_gelu(const float* x, float* e, float* g, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  e[i] = erff(x[i]);
  g[i] = 0.5f * x[i] * (1.f + erff(x[i] * 0.70710678118654752f));
}

extern "C" __global__ void f64_math(const double* x, double* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = exp(x[i]);
  o[n + i] = x[i] / (x[i] * x[i] + 1.0);
  o[2 * n + i] = sqrt(fabs(x[i]));
  o[3 * n + i] = fma(x[i], x[i], -1.0);
  o[4 * n + i] = sin(x[i]);
  o[5 * n + i] = erf(x[i]);
}

extern "C" __global__ void reverse_dynamic(const float* x, float* o, int n) {
  extern __shared__ float s[];
  s[threadIdx.x] = x[threadIdx.x];
  s[n + threadIdx.x] = 2 * x[threadIdx.x];
  __syncthreads();
  o[threadIdx.x] = s[n - 1 - threadIdx.x] + s[n + threadIdx.x];
}

// ---- matrix instructions -------------------------------------------------------------------------

__device__ unsigned smem_u32(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// C[16][8] = A[16][16] B[16][8]; A row-major f16 in shared through ldmatrix, B through ldmatrix.trans
extern "C" __global__ void mma_f16(const __half* A, const __half* B, float* C, __half* Ch) {
  __shared__ __align__(16) __half sa[16 * 16], sb[16 * 8];
  int l = threadIdx.x;
  for (int i = l; i < 256; i += 32) sa[i] = A[i];
  for (int i = l; i < 128; i += 32) sb[i] = B[i];
  __syncwarp();
  unsigned a[4], b[2];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(smem_u32(&sa[(l % 16) * 16 + (l / 16) * 8])));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(smem_u32(&sb[(l % 16) * 8])));
  float c[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  unsigned h[2] = {0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
               : "+r"(h[0]), "+r"(h[1])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  int g = l / 4, t = l % 4;
  for (int i = 0; i < 4; i++) C[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
  for (int i = 0; i < 2; i++) ((unsigned*)Ch)[(g + 8 * i) * 4 + t] = h[i];
}

extern "C" __global__ void mma_others(const unsigned* A, const unsigned* B, float* bf, float* tf, int* s8, double* dd,
                                      const double* da, const double* db) {
  int l = threadIdx.x, g = l / 4, t = l % 4;
  unsigned a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = A[l * 4 + i];
  for (int i = 0; i < 2; i++) b[i] = B[l * 2 + i];
  float c[4] = {1, 2, 3, 4};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; i++) bf[l * 4 + i] = c[i];
  float d[4] = {0, 0, 0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; i++) tf[l * 4 + i] = d[i];
  int e[4] = {5, 6, 7, 8};
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(e[0]), "+r"(e[1]), "+r"(e[2]), "+r"(e[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; i++) s8[l * 4 + i] = e[i];
  double f[2] = {0, 0};
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(f[0]), "+d"(f[1])
               : "d"(da[g * 4 + t]), "d"(db[t * 8 + g]));
  dd[g * 8 + 2 * t] = f[0];
  dd[g * 8 + 2 * t + 1] = f[1];
}

// Depthwise 9x9 convolution of [planes][32][32] f16, one plane per block of 4 warps: the tile with its halo lies in
// shared memory; each 16x8 output patch is a sum over the 9 kernel rows of A (16 rows x 16 columns of input, ldmatrix)
// times a Toeplitz matrix of the kernel row (mma).
template <bool kSync>
__device__ void dwconv9_body(const __half* x, const float* w, __half* y, int channels) {
  constexpr int H = 32, W = 32, LD = 56;
  __shared__ __align__(16) __half tile[40 * LD];
  __shared__ __half ws[81];
  int plane = blockIdx.x, tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const __half* xp = x + (size_t)plane * H * W;
  for (int i = tid; i < 40 * 10; i += blockDim.x) {
    int r = i / 10, c = i % 10, yy = r - 4, xx = c * 4 - 4;
    bool in = yy >= 0 && yy < H && xx >= 0 && xx < W;
    *(uint2*)&tile[r * LD + c * 4] = in ? *(const uint2*)&xp[yy * W + xx] : make_uint2(0, 0);
  }
  for (int i = tid; i < 81; i += blockDim.x) ws[i] = __float2half_rn(w[(plane % channels) * 81 + i]);
  if (kSync) __syncthreads();
  int g = lane / 4, t = lane % 4;
  for (int patch = warp; patch < 8; patch += 4) {
    int y0 = patch / 4 * 16, x0 = patch % 4 * 8;
    float c[4] = {0, 0, 0, 0};
    for (int dy = 0; dy < 9; dy++) {
      unsigned a[4], b[2];
      const __half* row = &tile[(y0 + dy + lane % 16) * LD + x0 + lane / 16 * 8];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(smem_u32(row)));
      for (int r = 0; r < 2; r++) {
        __half2 v;
        int k = 2 * t + 8 * r - g;
        v.x = k >= 0 && k < 9 ? ws[dy * 9 + k] : __half(0.f);
        v.y = k + 1 >= 0 && k + 1 < 9 ? ws[dy * 9 + k + 1] : __half(0.f);
        b[r] = *(unsigned*)&v;
      }
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    for (int i = 0; i < 2; i++)
      *(__half2*)&y[(size_t)plane * H * W + (y0 + g + 8 * i) * W + x0 + 2 * t] =
          __floats2half2_rn(c[2 * i], c[2 * i + 1]);
  }
}
extern "C" __global__ void __launch_bounds__(128) dwconv9(const __half* x, const float* w, __half* y, int c) {
  dwconv9_body<true>(x, w, y, c);
}
extern "C" __global__ void __launch_bounds__(128) dwconv9_nosync(const __half* x, const float* w, __half* y, int c) {
  dwconv9_body<false>(x, w, y, c);
}

// ---- planted bugs --------------------------------------------------------------------------------

extern "C" __global__ void bug_oob(const float* a, float* o, int n) {
  int i = threadIdx.x;
  o[i] = a[i + 1];  // reads a[n]
}
extern "C" __global__ void bug_misaligned(const float* a, float4* o) {
  o[threadIdx.x] = *(const float4*)(a + 4 * threadIdx.x + 1);
}
extern "C" __global__ void bug_missing_sync(const float* a, float* o) {
  __shared__ float s[128];
  s[threadIdx.x] = a[threadIdx.x];
  o[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void bug_war(const float* a, float* o) {
  __shared__ float s[64];
  s[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  float v = s[63 - threadIdx.x];
  s[threadIdx.x] = v * 2;  // needs a barrier before
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void bug_uninit(float* o) {
  __shared__ float s[33];
  s[threadIdx.x] = 1.f;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x + 1];  // s[32] is never written
}
extern "C" __global__ void bug_divergent(float* o) {
  if (threadIdx.x < 40) __syncthreads();
  o[threadIdx.x] = 1.f;
}
extern "C" __global__ void bug_unwritten(float* o, int n) {
  if (threadIdx.x != 7) o[threadIdx.x] = 1.f;
}
extern "C" __global__ void bug_assert(int n) { assert(n < 3 || threadIdx.x != 4); }
__device__ __noinline__ int forever(int n, int k) { return k + forever(n + 1, k ^ n) * 3; }
extern "C" __global__ void bug_recursion(int* o) { o[0] = forever(0, o[1]); }
extern "C" __global__ void bug_hang(volatile int* flag) {
  while (*flag == 0) {
  }
}
extern "C" __global__ void bug_shared_overflow(float* o) {
  __shared__ float a[32], b[32];
  a[threadIdx.x + (o[0] > 0 ? 1 : 0)] = 1.f;
  b[threadIdx.x] = 2.f;
  __syncthreads();
  o[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x];
}
extern "C" __global__ void bug_missing_syncwarp(const __half* A, unsigned* o) {
  __shared__ __align__(16) __half s[64];
  ((unsigned*)s)[threadIdx.x] = ((const unsigned*)A)[threadIdx.x];
  unsigned d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(d)
               : "r"(smem_u32(&s[(threadIdx.x % 8) * 8])));
  o[threadIdx.x] = d;
}
extern "C" __global__ void inplace_shift(float* a, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) a[i] = a[i] + a[i + 1];
}
extern "C" __global__ void bug_const_write(float* o) { o[threadIdx.x] = 0; }
extern "C" __global__ void bug_named_barrier(float* o) {
  __shared__ float s[64];
  if (threadIdx.x < 32) {
    s[threadIdx.x] = 1.f;
    asm volatile("bar.arrive 1, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 64;" ::: "memory");  // wrong barrier id
    o[threadIdx.x] = s[threadIdx.x - 32];
  }
}
extern "C" __global__ void ok_named_barrier(float* o) {
  __shared__ float s[64];
  if (threadIdx.x < 32) {
    s[threadIdx.x] = 1.f;
    asm volatile("bar.arrive 1, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 64;" ::: "memory");
    o[threadIdx.x] = s[threadIdx.x - 32];
  }
}
// grid-wide barrier on a global counter: needs coresident=True
extern "C" __global__ void grid_sync(unsigned* counter, int* data, int* o) {
  data[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x * 10;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1);
    while (*(volatile unsigned*)counter < gridDim.x) {
    }
  }
  __syncthreads();
  o[blockIdx.x * blockDim.x + threadIdx.x] = data[((blockIdx.x + 1) % gridDim.x) * blockDim.x + threadIdx.x];
}
