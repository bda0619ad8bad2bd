// Kernels with host launch code, as in a PyTorch extension: plain parameter structs, raw device pointers, a stream.
#include "program.h"

#include <cstring>

__constant__ float bias[4];
__device__ int calls;

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
  return cudaGetLastError();
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

// A launch with an attribute that is not emulated.
extern "C" int in_clusters(const float* x, float* y, int n) {
  cudaLaunchAttribute pairs[1];
  pairs[0].id = cudaLaunchAttributeClusterDimension;
  pairs[0].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = 2;
  config.blockDim = 64;
  config.attrs = pairs;
  config.numAttrs = 1;
  cudaError_t e = cudaLaunchKernelEx(&config, row_sums, x, y, n);
  cudaGetLastError();
  return e;
}
extern "C" int allow_large_clusters() {
  cudaError_t e = cudaFuncSetAttribute(row_sums, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaGetLastError();
  return e;
}

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
