// A stand-in for the CUDA runtime, linked into each HostProgram (host.py) in place of libcudart.
// Registration and marshalling happen here; memory, launches and limits live in the Python Device.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <vector>

typedef uint64_t u64;
typedef uint32_t u32;

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- bridge to Python --------------------------------------------------------------------------

struct Limits {  // mirrored in host.py
  int major, minor, sm_count, threads_sm, shared_block, shared_optin, shared_sm, blocks_sm, l2_bytes, clock_khz;
  u64 memory;
  char name[64];
};
typedef int (*Bridge)(const char* op, u64* args, int n);  // returns a cudaError_t; results go into args

struct Kernel {
  const void* stub;
  const char* name;
  int image;
};
struct Variable {
  const void* host;
  const char* name;
  int image;
  u64 size;
};

static Bridge bridge;
static Limits limits;
static std::vector<const void*>& images() {  // fat binaries
  static std::vector<const void*> v;
  return v;
}
static std::vector<Kernel>& kernels() {
  static std::vector<Kernel> v;
  return v;
}
static std::vector<Variable>& variables() {
  static std::vector<Variable> v;
  return v;
}
static cudaError_t last_error;
static bool unchecked;  // a <<< >>> launch failed and nobody has asked for the error

static cudaError_t call(const char* op, std::initializer_list<u64> in, u64* out = nullptr) {
  u64 a[24] = {};
  int n = 0;
  for (u64 x : in) a[n++] = x;
  cudaError_t e = bridge ? cudaError_t(bridge(op, a, n)) : cudaErrorInitializationError;
  if (out) memcpy(out, a, 8 * n);
  if (e) last_error = e;
  return e;
}

static cudaError_t failed(cudaError_t e, const char* where, const char* why) {
  call("log_error", {u64(e), u64(where), u64(why)});
  return last_error = e;
}

EXPORT int ptxsim_size_of_limits() { return int(sizeof(Limits)); }
EXPORT int ptxsim_size_of_kernel() { return int(sizeof(Kernel)); }
EXPORT int ptxsim_size_of_variable() { return int(sizeof(Variable)); }
EXPORT void ptxsim_bind(Bridge b, const Limits* l) {
  bridge = b;
  limits = *l;
  last_error = cudaSuccess;
  unchecked = false;
}
EXPORT int ptxsim_unchecked() {
  int e = unchecked ? last_error : 0;
  unchecked = false;
  return e;
}
EXPORT int ptxsim_last() { return last_error; }
EXPORT void ptxsim_reset() {
  last_error = cudaSuccess;
  unchecked = false;
}
EXPORT int ptxsim_images() { return int(images().size()); }
EXPORT const void* ptxsim_image(int i) { return images()[i]; }
EXPORT int ptxsim_kernels() { return int(kernels().size()); }
EXPORT const Kernel* ptxsim_kernel(int i) { return &kernels()[i]; }
EXPORT int ptxsim_variables() { return int(variables().size()); }
EXPORT const Variable* ptxsim_variable(int i) { return &variables()[i]; }

// ---- registration (called by nvcc's host code) -------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  const void* data;  // {magic, version, data, ...}
  memcpy(&data, (char*)wrapper + 8, 8);
  images().push_back(data);
  return (void**)(u64)images().size();
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** h, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels().push_back({stub, name, int((u64)h) - 1});
}
void __cudaRegisterVar(void** h, char* host, char*, const char* name, int, size_t size, int, int) {
  variables().push_back({host, name, int((u64)h) - 1, size});
}

// ---- launches ----------------------------------------------------------------------------------

struct Config {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local std::vector<Config> configs;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configs.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configs.empty()) return cudaErrorMissingConfiguration;
  Config& c = configs.back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *(cudaStream_t*)stream = c.stream;
  configs.pop_back();
  return cudaSuccess;
}

static cudaError_t launch(const void* f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t s,
                          bool cooperative = false) {
  return call("launch", {u64(f), g.x, g.y, g.z, b.x, b.y, b.z, u64(args), shared, u64(s), cooperative});
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* stub) {
  *k = (cudaKernel_t)stub;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t s) {
  cudaError_t e = launch((const void*)k, g, b, args, shared, s);
  if (e) unchecked = true;  // the host stub drops the error
  return e;
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t s) {
  return launch(f, g, b, args, shared, s);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** args, size_t shared, cudaStream_t s) {
  return launch(f, g, b, args, shared, s, true);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  bool cooperative = false;
  for (unsigned i = 0; i < c->numAttrs; i++) {
    const cudaLaunchAttribute& a = c->attrs[i];
    if (a.id != cudaLaunchAttributeCooperative)
      return failed(cudaErrorNotSupported, "cudaLaunchKernelExC", "ptxsim: launch attributes other than cooperative");
    cooperative = a.val.cooperative;
  }
  return launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, c->stream, cooperative);
}

// ---- functions: attributes, occupancy ----------------------------------------------------------

cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int value) {
  return call("func_set", {u64(f), u64(a), u64(int64_t(value))});
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* f) {
  u64 r[8];
  cudaError_t e = call("func_get", {u64(f), 0, 0, 0, 0, 0, 0, 0}, r);
  if (e) return e;
  memset(out, 0, sizeof *out);
  out->sharedSizeBytes = r[1];
  out->maxThreadsPerBlock = int(r[2]);
  out->numRegs = int(r[3]);
  out->ptxVersion = out->binaryVersion = int(r[4]);
  out->maxDynamicSharedSizeBytes = int(r[5]);
  out->localSizeBytes = r[6];
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int threads, size_t shared,
                                                                   unsigned) {
  u64 r[4];
  cudaError_t e = call("occupancy", {u64(f), u64(threads), shared, 0}, r);
  *n = e ? 0 : int(r[3]);
  return e;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, threads, shared, 0);
}

// ---- device ------------------------------------------------------------------------------------

cudaError_t cudaGetDevice(int* d) {
  u64 r[1];
  cudaError_t e = call("device_number", {0}, r);
  *d = e ? 0 : int(r[0]);
  return e;
}
static cudaError_t only_current(int device, const char* where) {
  int current = 0;
  if (cudaError_t e = cudaGetDevice(&current)) return e;
  return device == current ? cudaSuccess : failed(cudaErrorInvalidDevice, where, "there is one device");
}
cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) { return only_current(d, "cudaSetDevice"); }
cudaError_t cudaDriverGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return call("sync", {}); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = 0;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = limits.memory;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int device) {
  if (cudaError_t e = call("device_attribute", {u64(int64_t(device)), u64(a)})) return e;
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *v = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *v = 64; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *v = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = limits.shared_block; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = limits.shared_optin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = limits.shared_sm; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *v = limits.major >= 8 ? 1024 : 0; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *v = limits.blocks_sm; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = limits.threads_sm; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
    case cudaDevAttrTotalConstantMemory: *v = 65536; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMultiProcessorCount: *v = limits.sm_count; break;
    case cudaDevAttrComputeCapabilityMajor: *v = limits.major; break;
    case cudaDevAttrComputeCapabilityMinor: *v = limits.minor; break;
    case cudaDevAttrL2CacheSize: *v = limits.l2_bytes; break;
    case cudaDevAttrClockRate: *v = limits.clock_khz; break;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported: *v = 1; break;
    default: *v = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (cudaError_t e = only_current(device, "cudaGetDeviceProperties")) return e;
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", limits.name);
  p->totalGlobalMem = limits.memory;
  p->sharedMemPerBlock = limits.shared_block;
  p->sharedMemPerBlockOptin = limits.shared_optin;
  p->sharedMemPerMultiprocessor = limits.shared_sm;
  p->reservedSharedMemPerBlock = limits.major >= 8 ? 1024 : 0;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = limits.major;
  p->minor = limits.minor;
  p->multiProcessorCount = limits.sm_count;
  p->maxThreadsPerMultiProcessor = limits.threads_sm;
  p->maxBlocksPerMultiProcessor = limits.blocks_sm;
  p->l2CacheSize = limits.l2_bytes;
  p->concurrentKernels = p->unifiedAddressing = p->cooperativeLaunch = 1;
  return cudaSuccess;
}

// ---- memory ------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** p, size_t n) {
  u64 r[2];
  cudaError_t e = call("malloc", {n, 0}, r);
  *p = e ? nullptr : (void*)r[1];
  return e;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void* p) { return call("free", {u64(p)}); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaMallocHost(void** p, size_t n) {
  *p = operator new(n);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return cudaMallocHost(p, n); }
cudaError_t cudaFreeHost(void* p) {
  operator delete(p);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int v, size_t n) { return call("memset", {u64(p), u64(v & 0xff), n}); }
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { return cudaMemset(p, v, n); }
cudaError_t cudaMemset2DAsync(void* p, size_t pitch, int v, size_t w, size_t h, cudaStream_t) {
  cudaError_t e = cudaSuccess;
  for (size_t i = 0; i < h && !e; i++) e = cudaMemset((char*)p + i * pitch, v, w);
  return e;
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  return call("memcpy", {u64(d), u64(s), n, u64(k)});
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t) {
  return cudaMemcpy(d, s, n, k);
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind k,
                              cudaStream_t) {
  cudaError_t e = cudaSuccess;
  for (size_t i = 0; i < h && !e; i++) e = cudaMemcpy((char*)d + i * dp, (const char*)s + i * sp, w, k);
  return e;
}
cudaError_t cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind k) {
  return cudaMemcpy2DAsync(d, dp, s, sp, w, h, k, nullptr);
}
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  u64 r[3];
  cudaError_t e = call("symbol", {u64(symbol), 0, 0}, r);
  *p = (void*)r[1];
  return e;
}
cudaError_t cudaGetSymbolSize(size_t* n, const void* symbol) {
  u64 r[3];
  cudaError_t e = call("symbol", {u64(symbol), 0, 0}, r);
  *n = r[2];
  return e;
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* s, size_t n, size_t off, cudaMemcpyKind k,
                                    cudaStream_t) {
  void* p;
  cudaError_t e = cudaGetSymbolAddress(&p, symbol);
  return e ? e : cudaMemcpy((char*)p + off, s, n, k);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* s, size_t n, size_t off, cudaMemcpyKind k) {
  return cudaMemcpyToSymbolAsync(symbol, s, n, off, k, nullptr);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* d, const void* symbol, size_t n, size_t off, cudaMemcpyKind k,
                                      cudaStream_t) {
  void* p;
  cudaError_t e = cudaGetSymbolAddress(&p, symbol);
  return e ? e : cudaMemcpy(d, (char*)p + off, n, k);
}
cudaError_t cudaMemcpyFromSymbol(void* d, const void* symbol, size_t n, size_t off, cudaMemcpyKind k) {
  return cudaMemcpyFromSymbolAsync(d, symbol, n, off, k, nullptr);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  u64 r[2];
  call("is_device", {u64(p), 0}, r);
  memset(a, 0, sizeof *a);
  a->type = r[1] ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->devicePointer = r[1] ? (void*)p : nullptr;
  return cudaSuccess;
}

// ---- streams and events: everything runs at once, in order ------------------------------------

static u64 next_handle = 0x1000;
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  *s = (cudaStream_t)(next_handle += 16);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return call("sync", {}); }
cudaError_t cudaStreamQuery(cudaStream_t) { return call("sync", {}); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  *s = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t)(next_handle += 16);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return call("sync", {}); }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 0.001f;
  return cudaSuccess;
}

// ---- errors ------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  cudaError_t e = last_error;
  last_error = cudaSuccess;
  unchecked = false;
  return e;
}
cudaError_t cudaPeekAtLastError() {
  unchecked = false;
  return last_error;
}

#define ERRORS(X)                                                                                \
  X(cudaSuccess, "no error")                                                                     \
  X(cudaErrorInvalidValue, "invalid argument")                                                   \
  X(cudaErrorMemoryAllocation, "out of memory")                                                  \
  X(cudaErrorInitializationError, "initialization error")                                        \
  X(cudaErrorInvalidConfiguration, "invalid configuration argument")                             \
  X(cudaErrorMissingConfiguration, "__global__ function call is not configured")                 \
  X(cudaErrorInvalidDeviceFunction, "invalid device function")                                   \
  X(cudaErrorInvalidDevice, "invalid device ordinal")                                            \
  X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device") \
  X(cudaErrorInvalidSymbol, "invalid device symbol")                                             \
  X(cudaErrorIllegalAddress, "an illegal memory access was encountered")                         \
  X(cudaErrorLaunchOutOfResources, "too many resources requested for launch")                    \
  X(cudaErrorContextIsDestroyed, "context is destroyed")                                         \
  X(cudaErrorAssert, "device-side assert triggered")                                             \
  X(cudaErrorLaunchTimeout, "the launch timed out and was terminated")                           \
  X(cudaErrorMisalignedAddress, "misaligned address")                                            \
  X(cudaErrorLaunchFailure, "unspecified launch failure")                                        \
  X(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch")                 \
  X(cudaErrorNotSupported, "operation not supported")                                            \
  X(cudaErrorInvalidPtx, "a PTX JIT compilation failed")                                         \
  X(cudaErrorUnknown, "unknown error")

const char* cudaGetErrorName(cudaError_t e) {
#define NAME(x, s) \
  if (e == x) return #x;
  ERRORS(NAME)
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t e) {
#define TEXT(x, s) \
  if (e == x) return s;
  ERRORS(TEXT)
  return "unrecognized error code";
}

}  // extern "C"
