// Kernels with host launch code, as in a PyTorch extension: plain parameter structs, raw device pointers, a stream.
#include "program.h"

#include <cstring>

__constant__ float bias[4];
__device__ int calls;
static __device__ int hidden = 7;

// y[i] = K x[i] + bias[0]
template <typename T, int K>
__global__ void scale_kernel(const T* x, T* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = T(float(x[i]) * K + bias[0]);
  if (i == 0) atomicAdd(&calls, 1);
}
// The same without the guard on i.
template <typename T, int K>
__global__ void scale_unguarded(const T* x, T* y, int) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = T(float(x[i]) * K);
}

// Row sums through a tile in dynamic shared memory (more than 48 KB for long rows).
static __global__ void row_sums(const float* x, float* y, int n) {
  extern __shared__ float tile[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = x[size_t(blockIdx.x) * n + i];
  __syncthreads();
  if (threadIdx.x == 0) {
    float s = 0;
    for (int i = 0; i < n; i++) s += tile[i];
    y[blockIdx.x] = s;
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PAIRS __cluster_dims__(2, 1, 1)
#else
#define PAIRS
#endif
__global__ void PAIRS fixed_cluster(int* y) { y[blockIdx.x] = hidden; }
__global__ void free_cluster(int* y) {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  if (threadIdx.x == 0) y[blockIdx.x] = rank;
}

#if !defined(NO_TMA)
// Copies a box of 8 x 32 floats by TMA; out-of-bounds elements arrive as zeros.
__global__ void tma_copy(const __grid_constant__ CUtensorMap map, float* y, int x0, int y0) {
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(128) float tile[8 * 32];
  __shared__ uint64_t bar;
  uint32_t b = (uint32_t)__cvta_generic_to_shared(&bar), t = (uint32_t)__cvta_generic_to_shared(tile);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(b) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 1024;" ::"r"(b) : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(t),
        "l"(&map), "r"(x0), "r"(y0), "r"(b)
        : "memory");
  }
  __syncthreads();
  asm volatile("{\n.reg .pred p;\nW:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra W;\n}" ::"r"(b)
               : "memory");
  for (int i = threadIdx.x; i < 256; i += blockDim.x) y[i] = tile[i];
#endif
}
#endif

typedef CUresult (*Encode)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                           const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

extern "C" int scale(const ScaleParams* p, cudaStream_t stream) {
  int block = 128, grid = (p->n + block - 1) / block;
  if (p->bug == WRONG_GRID) grid++;
  if (p->bug == NO_GRID) grid = 0;
  if (p->bug == BIG_BLOCK) block = 2048;
  if (p->bug == SWAPPED) {  // pointers swapped: y is only n / 2 long
    scale_kernel<float, 3><<<grid, block, 0, stream>>>((float*)p->y, (float*)p->x, p->n);
  } else if (p->bug == WRONG_GRID) {
    scale_unguarded<float, 3><<<grid, block, 0, stream>>>((const float*)p->x, (float*)p->y, p->n);
  } else if (p->half) {
    scale_kernel<__half, 5><<<grid, block, 0, stream>>>((const __half*)p->x, (__half*)p->y, p->n);
  } else {
    scale_kernel<float, 3><<<grid, block, 0, stream>>>((const float*)p->x, (float*)p->y, p->n);
  }
  return p->bug == UNCHECKED ? 0 : cudaGetLastError();
}

extern "C" int scale_unchecked(const ScaleParams* p) {
  scale_kernel<float, 3><<<0, 128>>>((const float*)p->x, (float*)p->y, p->n);
  return 0;
}

extern "C" int sums(const float* x, float* y, int rows, int n, int set_attribute, cudaStream_t stream) {
  size_t shared = n * sizeof(float);
  if (set_attribute) {
    int device, most;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
      return -1;
    if (shared > size_t(most)) return -2;
    if (cudaError_t e = cudaFuncSetAttribute(row_sums, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)))
      return e;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = rows;
  config.blockDim = 64;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, row_sums, x, y, n);  // leaves the error for the next cudaGetLastError
}

extern "C" int clusters(int* y, int blocks, int size, int fixed) {
  if (fixed) {
    fixed_cluster<<<blocks, 32>>>(y);
    return cudaGetLastError();
  }
  cudaLaunchAttribute a[1];
  a[0].id = cudaLaunchAttributeClusterDimension;
  a[0].val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = 32;
  config.attrs = a;
  config.numAttrs = 1;
  void* args[] = {&y};
  cudaError_t e = cudaLaunchKernelExC(&config, (const void*)free_cluster, args);
  cudaGetLastError();
  return e;
}

#if !defined(NO_TMA)
extern "C" int tma(const TmaParams* p, cudaStream_t stream) {
  void* fn = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &found) || !fn)
    return -1;
  CUtensorMap map;
  cuuint64_t dims[] = {cuuint64_t(p->width), cuuint64_t(p->height)}, strides[] = {cuuint64_t(p->pitch)};
  cuuint32_t box[] = {cuuint32_t(p->box), 8}, steps[] = {1, 1};
  CUresult r = ((Encode)fn)(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, p->x, dims, strides, box, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(p->swizzle),
                            CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r) return r;
  tma_copy<<<1, 64, 0, stream>>>(map, (float*)p->y, p->x0, p->y0);
  return cudaPeekAtLastError();
}
#endif

// Host code that works with the runtime on its own: allocation, copies, symbols, events; bug: leaves out a free, or
// frees twice.
extern "C" int roundtrip(const float* in, float* out, int n, int bug) {
  float *x, *y, b[4] = {10, 0, 0, 0};
  int zero = 0, count = 0;
  cudaStream_t s;
  cudaEvent_t start, stop;
  cudaStreamCaptureStatus capture;
  if (cudaStreamCreate(&s) || cudaEventCreate(&start) || cudaEventCreate(&stop) || cudaStreamIsCapturing(s, &capture))
    return -1;
  if (cudaMalloc(&x, n * 4) || cudaMallocAsync((void**)&y, n * 4, s)) return -2;
  cudaMemcpyToSymbol(bias, b, sizeof b);
  cudaMemcpyToSymbol(calls, &zero, sizeof zero);
  cudaMemcpyAsync(x, in, n * 4, cudaMemcpyHostToDevice, s);
  cudaMemsetAsync(y, 0xff, n * 4, s);
  cudaEventRecord(start, s);
  ScaleParams p = {x, y, n, 0, 0};
  if (int e = scale(&p, s)) return e;
  cudaEventRecord(stop, s);
  cudaMemcpyAsync(out, y, n * 4, cudaMemcpyDeviceToHost, s);
  cudaMemcpyFromSymbol(&count, calls, sizeof count);
  if (cudaStreamSynchronize(s)) return -3;
  cudaFree(x);
  if (bug != 1) cudaFreeAsync(y, s);
  if (bug == 2) cudaFree(x);
  b[0] = 0;
  cudaMemcpyToSymbol(bias, b, sizeof b);
  return count == 1 ? 0 : -4;
}

extern "C" int query(int* out) {
  cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, 0)) return -1;
  cudaFuncAttributes a;
  if (cudaFuncGetAttributes(&a, row_sums)) return -2;
  out[0] = p.major * 10 + p.minor;
  out[1] = p.multiProcessorCount;
  out[2] = int(p.sharedMemPerBlockOptin);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&out[3], row_sums, 256, 40000);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&out[4], scale_kernel<float, 3>, 1024, 0);
  out[5] = a.maxThreadsPerBlock;
  return strcmp(cudaGetErrorName(cudaErrorInvalidValue), "cudaErrorInvalidValue");
}
