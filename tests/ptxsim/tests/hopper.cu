// sm_90a kernels of the test suite: mbarrier, TMA, wgmma, clusters.
#include <cuda.h>
#include <cuda_fp16.h>
#include <cstdint>

__device__ uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ void mbar_init(uint64_t* b, uint32_t n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(b)), "r"(n));
}
__device__ void mbar_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(b)), "r"(bytes) : "memory");
}
__device__ void mbar_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(b)) : "memory");
}
__device__ void mbar_wait(uint64_t* b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred P1;\nLAB_WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 P1, [%0], %1;\n@P1 bra DONE;\nbra LAB_WAIT;\nDONE:\n}" ::"r"(
          smem_u32(b)),
      "r"(parity)
      : "memory");
}
__device__ void tma_load2(void* dst, const CUtensorMap* m, int x, int y, uint64_t* b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          smem_u32(dst)),
      "l"(m), "r"(x), "r"(y), "r"(smem_u32(b))
      : "memory");
}
__device__ uint64_t desc(const void* p, uint32_t lbo, uint32_t sbo, uint32_t mode) {
  return (uint64_t)((smem_u32(p) & 0x3ffff) >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 |
         (uint64_t)mode << 62;
}
__device__ void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ void wg_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define D32(d)                                                                                                \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define DREGS                                               \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

template <int TRB>
__device__ void wgmma64(float* d, uint64_t da, uint64_t db, int scale) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " DREGS ", %32, %33, p, 1, 1, 0, %35;}"
      : D32(d)
      : "l"(da), "l"(db), "r"(scale), "n"(TRB));
}
__device__ void wgmma64_ra(float* d, const uint32_t* a, uint64_t db, int scale) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " DREGS ", {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"
      : D32(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(db), "r"(scale));
}

// C[M][N] = A[M][K] B^T (B [N][K], or with TRB B [K][N]): one producer warp, one consumer warpgroup, a ring of
// STAGES TMA stages with full / empty mbarriers, wgmma from shared memory, TMA store of the result.
// BUG 1: no wait on full; 2: the producer does not wait on empty; 3: no proxy fence before the store;
// BUG 4: expect_tx too large; 5: no wgmma wait before releasing the stage.
constexpr int STAGES = 3, TILE = 64;
struct __align__(1024) Smem {
  __half a[STAGES][TILE * TILE], b[STAGES][TILE * TILE];
  float c[TILE * 32 * 2];
  uint64_t full[STAGES], empty[STAGES];
};
template <int TRB, int BUG>
__device__ void gemm_body(const CUtensorMap* ma, const CUtensorMap* mb, const CUtensorMap* mc, int K) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Smem& s = *(Smem*)raw;
  int tid = threadIdx.x, warp = tid / 32;
  if (tid == 0) {
    for (int i = 0; i < STAGES; i++) mbar_init(&s.full[i], 1), mbar_init(&s.empty[i], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  int m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE, steps = K / TILE;
  if (warp == 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (tid == 128) {
      for (int i = 0; i < steps; i++) {
        int st = i % STAGES, ph = i / STAGES & 1;
        if (BUG != 2) mbar_wait(&s.empty[st], ph ^ 1);
        mbar_expect(&s.full[st], 2 * TILE * TILE * 2 + (BUG == 4 ? 16 : 0));
        tma_load2(s.a[st], ma, i * TILE, m0, &s.full[st]);
        if (TRB) tma_load2(s.b[st], mb, n0, i * TILE, &s.full[st]);
        else tma_load2(s.b[st], mb, i * TILE, n0, &s.full[st]);
      }
    }
    return;
  }
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0;
  for (int i = 0; i < steps; i++) {
    int st = i % STAGES, ph = i / STAGES & 1;
    if (BUG != 1) mbar_wait(&s.full[st], ph);
    wg_fence();
    for (int k = 0; k < TILE / 16; k++)
      wgmma64<TRB>(d, desc(s.a[st] + k * 16, 16, 1024, 1), desc(s.b[st] + (TRB ? k * 16 * TILE : k * 16), 16, 1024, 1),
                   i + k > 0);
    wg_commit();
    if (BUG != 5) wg_wait<0>();
    if (tid == 0) mbar_arrive(&s.empty[st]);
  }
  wg_wait<0>();
  int g = tid % 32 / 4, t = tid % 4;
  for (int i = 0; i < 32; i++) {
    int row = warp * 16 + g + 8 * (i / 2 % 2), col = 8 * (i / 4) + 2 * t + i % 2;
    s.c[(col / 32) * TILE * 32 + row * 32 + col % 32] = d[i];
  }
  if (BUG != 3) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync 1, 128;" ::: "memory");
  if (tid == 0) {
    for (int h = 0; h < 2; h++)
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(mc),
                   "r"(n0 + 32 * h), "r"(m0), "r"(smem_u32(s.c + h * TILE * 32))
                   : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
#define GEMM(name, trb, bug)                                                             \
  extern "C" __global__ void __launch_bounds__(160)                                      \
      name(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, \
           const __grid_constant__ CUtensorMap c, int K) {                               \
    gemm_body<trb, bug>(&a, &b, &c, K);                                                  \
  }
GEMM(gemm_tn, 0, 0)
GEMM(gemm_nn, 1, 0)
GEMM(gemm_bug1, 0, 1)
GEMM(gemm_bug2, 0, 2)
GEMM(gemm_bug3, 0, 3)
GEMM(gemm_bug4, 0, 4)
GEMM(gemm_bug5, 0, 5)

// One 64x64x16 product with unswizzled core matrices written by the threads; A from shared or registers.
extern "C" __global__ void __launch_bounds__(128) wgmma_plain(const __half* A, const __half* B, float* C, int ra) {
  __shared__ __align__(128) __half sa[64 * 16], sb[64 * 16];
  int tid = threadIdx.x, warp = tid / 32, g = tid % 32 / 4, t = tid % 4;
  for (int i = tid; i < 1024; i += 128) {
    int r = i / 16, k = i % 16, at = (r / 8) * 128 + (k / 8) * 64 + (r % 8) * 8 + k % 8;  // LBO 128, SBO 256 bytes
    sa[at] = A[i];
    sb[at] = B[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0;
  uint64_t db = desc(sb, 128, 256, 0);
  wg_fence();
  if (ra) {
    uint32_t a[4];
    for (int r = 0; r < 4; r++) a[r] = *(const uint32_t*)&A[(warp * 16 + g + 8 * (r & 1)) * 16 + 2 * t + 8 * (r >> 1)];
    wgmma64_ra(d, a, db, 0);
  } else {
    wgmma64<0>(d, desc(sa, 128, 256, 0), db, 0);
  }
  wg_commit();
  wg_wait<0>();
  for (int i = 0; i < 32; i++) C[(warp * 16 + g + 8 * (i / 2 % 2)) * 64 + 8 * (i / 4) + 2 * t + i % 2] = d[i];
}

// 4-d tile with halo (out-of-bounds zero fill) copied out element by element.
extern "C" __global__ void tma_halo(const __grid_constant__ CUtensorMap m, float* o, int n, int x, int y) {
  __shared__ __align__(128) float tile[1024];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) mbar_init(&bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbar_expect(&bar, n * 4);
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(smem_u32(tile)),
        "l"(&m), "r"(x), "r"(y), "r"((int)blockIdx.x), "r"(1), "r"(smem_u32(&bar))
        : "memory");
  }
  mbar_wait(&bar, 0);
  for (int i = threadIdx.x; i < n; i += blockDim.x) o[blockIdx.x * n + i] = tile[i];
}

// Cluster of 2: rank 0 multicasts a bulk copy to both blocks; then each reads its peer's shared memory.
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_copy(const float* x, float* o, int bug) {
  __shared__ __align__(128) float s[128], mine[32];
  __shared__ uint64_t bar;
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    mbar_init(&bar, 1);
    mbar_expect(&bar, 512);
  }
  mine[threadIdx.x] = 100.f * rank + threadIdx.x;
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (rank == 0 && threadIdx.x == 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], 512, [%2], %3;" ::"r"(smem_u32(s)),
        "l"(x), "r"(smem_u32(&bar)), "h"((short)3)
        : "memory");
  mbar_wait(&bar, 0);
  uint32_t peer;
  float v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(smem_u32(&mine[threadIdx.x])), "r"(rank ^ 1));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(peer) : "memory");
  for (int i = 0; i < 4; i++) o[blockIdx.x * 128 + i * 32 + threadIdx.x] = s[i * 32 + threadIdx.x] + v;
  if (!bug) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// cp.async completing on an mbarrier; elect.sync and griddepcontrol
extern "C" __global__ void cp_mbar(const float4* x, float4* o, unsigned* leader) {
  __shared__ float4 s[64];
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) mbar_init(&bar, 64);
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_u32(&s[threadIdx.x])), "l"(x + threadIdx.x));
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_u32(&bar)) : "memory");
  mbar_wait(&bar, 0);
  o[threadIdx.x] = s[63 - threadIdx.x];
  unsigned who, p;
  asm volatile("{.reg .pred P; elect.sync %0|P, 0xffffffff; selp.u32 %1, 1, 0, P;}" : "=r"(who), "=r"(p));
  leader[threadIdx.x] = who + 10 * p;
}
