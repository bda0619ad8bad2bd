// Scheduler (fibers), memory checks, race detection, block barriers, printf and assert.
#include "runtime.h"

#include <sys/mman.h>
#include <atomic>
#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <string>
#include <thread>

// ---- fibers ------------------------------------------------------------------------------------

extern "C" void ptxsim_switch(void** save_sp, void* to_sp);
extern "C" void ptxsim_fiber_main(TS* t);

#if defined(__x86_64__)
asm(R"(
.text
.globl ptxsim_switch
.type ptxsim_switch,@function
ptxsim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.globl ptxsim_start
ptxsim_start:
  movq %r12, %rdi
  call ptxsim_fiber_main@PLT
  hlt
)");
extern "C" void ptxsim_start();
static void* fiber_init(u8* top, TS* t) {
  u64* s = (u64*)((u64)top & ~15ull);
  s -= 2;                    // keeps rsp 16-byte aligned at the call in ptxsim_start
  *--s = (u64)ptxsim_start;  // return address
  *--s = 0;                  // rbp
  *--s = 0;                  // rbx
  *--s = (u64)t;             // r12
  *--s = 0;
  *--s = 0;
  *--s = 0;  // r13 r14 r15
  return s;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl ptxsim_switch
.type ptxsim_switch,%function
ptxsim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.globl ptxsim_start
ptxsim_start:
  mov x0, x19
  bl ptxsim_fiber_main
  brk #1
)");
extern "C" void ptxsim_start();
static void* fiber_init(u8* top, TS* t) {
  u64* s = (u64*)((u64)top & ~15ull) - 20;
  memset(s, 0, 160);
  s[0] = (u64)t;              // x19
  s[11] = (u64)ptxsim_start;  // x30
  return s;
}
#else
#error "ptxsim: fibers are implemented for x86-64 and aarch64"
#endif

static double wall() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return ts.tv_sec + ts.tv_nsec * 1e-9;
}

// ---- errors ------------------------------------------------------------------------------------

static std::mutex error_mutex;

static void set_error(Launch* L, TS* t, u32 pc, const char* kind, u64 addr, const char* msg) {
  std::lock_guard<std::mutex> lock(error_mutex);
  ErrorInfo& e = L->err;
  if (e.set) return;
  e.pc = pc;
  e.addr = addr;
  snprintf(e.kind, sizeof e.kind, "%s", kind);
  snprintf(e.msg, sizeof e.msg, "%s", msg);
  if (t)
    for (int i = 0; i < 3; i++) e.block[i] = t->ctaid[i], e.tid[i] = t->tid[i];
  e.set = 1;
}

void fail(TS* t, u32 pc, const char* kind, u64 addr, const char* fmt, ...) {
  char msg[2048];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(msg, sizeof msg, fmt, ap);
  va_end(ap);
  set_error(t->L, t, pc, kind, addr, msg);
  t->g->failed = true;
  void* dead;
  ptxsim_switch(&dead, t->g->main_sp);  // never resumed
  abort();
}

// ---- scheduler ---------------------------------------------------------------------------------

static u64 next_random(u64& s) {
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return s * 0x2545f4914f6cdd1dull;
}

static void push_ready(Group* g, TS* t) {
  u32 n = g->ready.size();
  g->ready[(g->head + g->count++) % n] = t;
}

static TS* pop_ready(Group* g) {
  if (!g->count) return nullptr;
  u32 n = g->ready.size();
  if (g->L->order == 2) {
    u32 k = (g->head + next_random(g->rng) % g->count) % n;
    std::swap(g->ready[k], g->ready[g->head]);
  }
  TS* t = g->ready[g->head];
  g->head = (g->head + 1) % n;
  g->count--;
  return t;
}

static void schedule(TS* t) {
  TS* n = pop_ready(t->g);
  if (n == t) return;
  ptxsim_switch(&t->sp, n ? n->sp : t->g->main_sp);
}

static void resolve_activemask(Warp* w) {
  u32 waiting = w->active_wait;
  w->active_wait = 0;
  for (int i = 0; i < 32; i++)
    if (waiting >> i & 1) {
      u32 m = 0;
      for (int j = 0; j < 32; j++)
        if ((waiting >> j & 1) && w->lane[j]->wait_pc == w->lane[i]->wait_pc) m |= 1u << j;
      *(u32*)w->lane[i]->out = m;
    }
  for (int i = 0; i < 32; i++)
    if (waiting >> i & 1) wake(w->lane[i]);
}

void block_thread(TS* t, Wait w, u32 pc, u64 arg) {
  t->wait = w;
  t->wait_pc = pc;
  t->wait_arg = arg;
  Warp* wp = t->warp;
  if (--wp->runnable == 0 && wp->active_wait) resolve_activemask(wp);
  schedule(t);
}

void wake(TS* t) {
  t->wait = W_NONE;
  t->warp->runnable++;
  push_ready(t->g, t);
}

void yield_thread(TS* t) {
  push_ready(t->g, t);
  schedule(t);
}

static void wake_all(Group* g, std::vector<TS*>& v, TS* except = nullptr) {
  if (g->L->order == 1)
    for (size_t i = v.size(); i--;) {
      if (v[i] != except) wake(v[i]);
    }
  else
    for (TS* x : v)
      if (x != except) wake(x);
  v.clear();
}

extern "C" void refuel(Thread* T, u32 pc) {
  TS* t = ts(T);
  t->fuel = 20000;
  if (t->g->deadline && wall() > t->g->deadline)
    fail(t, pc, "timeout", 0, "the launch ran longer than %g s (endless loop?)", t->L->timeout);
  if (t->L->err.set) fail(t, pc, "stopped", 0, "another worker failed");
  yield_thread(t);
}

extern "C" void device_yield(Thread* T) {
  ts(T)->fuel -= 1000;
  yield_thread(ts(T));
}

extern "C" void mem_strong(Thread* T) {  // a spin loop on memory must let others run
  TS* t = ts(T);
  if (++t->spins >= 16) {
    t->spins = 0;
    device_yield(t);
  }
}

static void bar_check_exit(Block* b, TS* t);

extern "C" void thread_exit(Thread* T) {
  TS* t = ts(T);
  t->exited = true;
  t->g->live--;
  Warp* w = t->warp;
  w->exited |= 1u << t->lane;
  w->runnable--;
  t->blk->exited++;
  prof_exit(t);
  coll_check_exit(w);
  bar_check_exit(t->blk, t);
  if (!w->runnable && w->active_wait) resolve_activemask(w);
  TS* n = pop_ready(t->g);
  ptxsim_switch(&t->sp, n ? n->sp : t->g->main_sp);
  abort();
}

extern "C" void ptxsim_fiber_main(TS* t) {
  t->L->fn(t);
  thread_exit(t);
}

extern "C" void device_trap(Thread* T, u32 pc, const char* what) { fail(ts(T), pc, "trap", 0, "%s", what); }

// ---- happens-before ----------------------------------------------------------------------------

u32 new_epoch(Group* g) { return ++g->now; }

static u32 known(TS* t, TS* u) {  // t knows of u's accesses stamped below this
  if (u == t) return t->g->now + 1;
  u32 k = 0;
  if (u->blk == t->blk) {
    k = std::max(k, t->base);
    if (u->warp == t->warp) k = std::max(k, t->wbase);
  }
  if (t->has_ext) k = std::max(k, t->ext[u->gid]);
  return k;
}

void release_to(TS* t, SyncClock& c) {
  Group* g = t->g;
  if (!(g->L->checks & CK_RACE)) return;
  if (c.vc.size() != g->nthreads) c.vc.assign(g->nthreads, 0);
  u32 n = g->nthreads, *vc = c.vc.data();
  auto raise = [&](u32 first, u32 count, u32 to) {
    if (to)
      for (u32 i = first; i < first + count; i++) vc[i] = std::max(vc[i], to);
  };
  if (t->has_ext) {
    const u32* ext = t->ext.data();
    for (u32 i = 0; i < n; i++) vc[i] = std::max(vc[i], ext[i]);
  }
  u32 first = t->gid - t->linear;  // the block's threads have consecutive gids
  raise(first, t->blk->nthreads, t->base);
  raise(first + t->linear / 32 * 32, __builtin_popcount(t->warp->exist), t->wbase);
  c.vc[t->gid] = std::max(c.vc[t->gid], new_epoch(g));
}

void acquire_from(TS* t, const SyncClock& c) {
  if (!checks(t, CK_RACE)) return;
  if (!c.vc.empty()) {
    if (!t->has_ext) {
      t->ext.assign(t->g->nthreads, 0);
      t->has_ext = true;
    }
    u32 n = t->g->nthreads, *ext = t->ext.data();
    const u32* vc = c.vc.data();
    for (u32 i = 0; i < n; i++) ext[i] = std::max(ext[i], vc[i]);
    t->ext_dirty = true;
  }
}

// After a warp collective every participant knows what any participant knew.
void join_warp(Warp* w, u32 mask) {
  Group* g = w->blk->g;
  if (!(g->L->checks & CK_RACE)) return;
  u32 live = w->exist & ~w->exited, e = new_epoch(g);
  bool full = (mask & live) == live, dirty = false;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) dirty |= w->lane[i]->ext_dirty;
  if (full && !dirty) {
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) w->lane[i]->wbase = e;
    return;
  }
  SyncClock c;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) release_to(w->lane[i], c);
  e = new_epoch(g);
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) {
      acquire_from(w->lane[i], c);
      if (full) w->lane[i]->wbase = e, w->lane[i]->ext_dirty = false;
    }
}

// Does t know of the access recorded in w?
static bool ordered(TS* t, u64 w) {
  u32 tid = w & 0x3fff, stamp = w >> 32;
  return tid == t->gid || stamp < known(t, &t->g->threads[tid]);
}

[[noreturn]] static void race(TS* t, u32 off, u64 other, bool other_write, bool write, u32 pc) {
  ErrorInfo& e = t->L->err;
  const TS& u = t->g->threads[other & 0x3fff];
  if (!e.set) {
    for (int i = 0; i < 3; i++) e.tid2[i] = u.tid[i];
    e.pc2 = other >> 15 & 0x1ffff;
    e.has_pc2 = 1;
  }
  fail(t, pc, "race", WIN_SHARED + off, "shared memory race: %s after an unordered %s by thread (%u,%u,%u)",
       write ? "write" : "read", other_write ? "write" : "read", u.tid[0], u.tid[1], u.tid[2]);
}

static void refine_cells(Block* b, u32 shift) {
  u32 k = 1u << (b->shift - shift);
  std::vector<Cell> fine(b->cells.size() * k);
  for (size_t i = 0; i < fine.size(); i++) fine[i] = b->cells[i / k];
  b->cells.swap(fine);
  b->shift = shift;
}

static void race_access(TS* t, u32 off, u32 size, u32 access, u32 pc) {
  Block* b = t->blk;
  while ((off | size) & ((1u << b->shift) - 1)) refine_cells(b, b->shift - 1);
  bool write = access & 9, atomic = access & 2;
  u64 me = u64(t->g->now) << 32 | u64(pc & 0x1ffff) << 15 | u64(atomic) << 14 | t->gid;
  Cell* c = &b->cells[off >> b->shift];
  Cell* end = &b->cells[(off + size - 1) >> b->shift] + 1;
  Cell old_prev = {~0ull, 0, 0}, new_prev = {};
  constexpr u64 ATOMIC = 1 << 14;
  for (Cell* p = c; p < end; p++) {
    if (p->w == old_prev.w && p->r0 == old_prev.r0 && p->r1 == old_prev.r1) {
      *p = new_prev;
      continue;
    }
    old_prev = *p;
    u32 at = off + u32(p - c) * (1u << b->shift);
    if (p->w && !(atomic && (p->w & ATOMIC)) && !ordered(t, p->w)) race(t, at, p->w, true, write, pc);
    if (write) {
      if (p->r0 && !(atomic && (p->r0 & ATOMIC)) && !ordered(t, p->r0)) race(t, at, p->r0, false, true, pc);
      if (p->r1 && !(atomic && (p->r1 & ATOMIC)) && !ordered(t, p->r1)) race(t, at, p->r1, false, true, pc);
      p->w = me;
      p->r0 = p->r1 = 0;
    } else {
      u32 mine = me & 0x3fff;
      auto same_warp = [&](u64 r) { return t->g->threads[r & 0x3fff].warp == t->warp; };
      if (!p->r0 || (p->r0 & 0x3fff) == mine || ordered(t, p->r0)) p->r0 = me;
      else if (!p->r1 || (p->r1 & 0x3fff) == mine || ordered(t, p->r1)) p->r1 = me;
      else if (same_warp(p->r0)) p->r0 = me;
      else p->r1 = me;
    }
    new_prev = *p;
  }
}

// Acquire and release through memory: a release (or a fence and then a strong store) publishes the
// thread's knowledge at the location; an acquire (or a strong load and then a fence) takes it.
static void merge(SyncClock& to, const SyncClock& from) {
  if (to.vc.size() < from.vc.size()) to.vc.resize(from.vc.size(), 0);
  for (size_t i = 0; i < from.vc.size(); i++) to.vc[i] = std::max(to.vc[i], from.vc[i]);
}

extern "C" void mem_order(Thread* T, u64 addr, u32 kind, u32 sem) {
  TS* t = ts(T);
  Group* g = t->g;
  if (!(g->L->checks & CK_RACE)) return;
  if ((kind & 1) && !g->locations.empty()) {
    auto it = g->locations.find(addr);
    if (it != g->locations.end()) {
      if (sem & 1) acquire_from(t, it->second);
      else merge(t->acq_clock, it->second), t->has_acq = true;
    }
  }
  if (kind & 2) {
    if (sem & 2) release_to(t, g->locations[addr]);
    else if (t->has_fence) merge(g->locations[addr], t->fence_clock);
  }
}

extern "C" void mem_fence(Thread* T) {
  TS* t = ts(T);
  if (!checks(t, CK_RACE)) return;
  if (t->has_acq) {
    acquire_from(t, t->acq_clock);
    t->acq_clock = SyncClock();
    t->has_acq = false;
  }
  t->fence_clock = SyncClock();
  release_to(t, t->fence_clock);
  t->has_fence = true;
}

// ---- memory ------------------------------------------------------------------------------------

static bool all_bytes(const u8* s, u32 n, u8 mask, u8 want) {
  u64 m = mask * 0x0101010101010101ull, w = want * 0x0101010101010101ull;
  while (n >= 8) {
    if ((rd<u64>(s) & m) != w) return false;
    s += 8;
    n -= 8;
  }
  if (n >= 4) {
    if ((rd<u32>(s) & u32(m)) != u32(w)) return false;
    s += 4;
    n -= 4;
  }
  for (; n; n--, s++)
    if ((*s & mask) != want) return false;
  return true;
}

static const char* verb(u32 access) { return access & 16 ? "atomic" : access & 9 ? "write" : "read"; }

// Optional check: plain accesses to one byte by different blocks, at least one of them a write.
static void global_race(TS* t, u64 off, u32 size, bool write, u32 pc) {
  Launch* L = t->L;
  u32 me = t->blk->id, other = 0;
  bool was_write = true;
  for (u32 i = 0; i < size; i++) {
    u32 &w = L->gwriter[off + i], &r = L->greader[off + i];
    if (w && w != me) other = w;
    else if (write && r && r != me) other = r, was_write = false;
    if (other) {
      char who[64] = "several blocks";
      u32 k = other - 1;
      if (other != ~0u)
        snprintf(who, sizeof who, "block (%u,%u,%u)", k % L->grid[0], k / L->grid[0] % L->grid[1],
                 k / L->grid[0] / L->grid[1]);
      fail(t, pc, "global race", WIN_GLOBAL + off + i, "%s of global memory that %s %s in the same launch",
           write ? "write" : "read", who, was_write ? "wrote" : "read");
    }
    if (write) w = me;
    else r = !r || r == me ? me : ~0u;
  }
}

static u8* global_range(TS* t, u64 addr, u32 size, u32 access, u32 pc) {
  u64 off = addr - WIN_GLOBAL;
  if (off >= t->L->arena_bytes || off + size > t->L->arena_bytes)
    fail(t, pc, "out-of-bounds", addr, "%u-byte %s of global memory %s", size, verb(access),
         addr < 4096 ? "through a null pointer" : "outside every buffer");
  if (!(t->L->checks & CK_MEM)) return t->L->arena + off;
  u8* s = t->L->gshadow + off;
  if (access & 9) {
    if (!all_bytes(s, size, 0xff, SH_INIT)) {
      for (u32 i = 0; i < size; i++) {
        if (!(s[i] & 1))
          fail(t, pc, "out-of-bounds", addr + i, "%u-byte %s of global memory outside every buffer", size,
               verb(access));
        if (s[i] & SH_RO) fail(t, pc, "read-only", addr + i, "%u-byte %s to a read-only buffer", size, verb(access));
        if ((s[i] & SH_ONCE) && (s[i] & 2))
          fail(t, pc, "second write", addr + i, "%u-byte %s to bytes that are written once, and were", size,
               verb(access));
        if ((access & 16) && !(s[i] & 2))
          fail(t, pc, "uninitialised read", addr + i, "atomic on never-written global memory");
      }
      for (u32 i = 0; i < size; i++) s[i] |= 2;
    }
  } else if (!all_bytes(s, size, 3, 3)) {
    for (u32 i = 0; i < size; i++) {
      if (!(s[i] & 1))
        fail(t, pc, "out-of-bounds", addr + i, "%u-byte access of global memory outside every buffer", size);
      if (!(s[i] & 2)) fail(t, pc, "uninitialised read", addr + i, "%u-byte read of never-written global memory", size);
    }
  }
  if (t->L->gwriter && !(access & 2)) global_race(t, off, size, access & 9, pc);
  return t->L->arena + off;
}

extern "C" u8* mem_global(Thread* T, u64 addr, u32 size, u32 access, u32 pc) {
  TS* t = ts(T);
  u8* p = global_range(t, addr, size, access, pc);
  if ((t->L->checks & CK_MEM) && (addr & (size - 1)))
    fail(t, pc, "misaligned", addr, "%u-byte %s of global memory at a misaligned address", size, verb(access));
  return p;
}

static void check_shared_state(TS* t, u32 off, u32 size, u32 access, u32 pc) {
  u8* s = t->blk->sinit + off;
  if (all_bytes(s, size, 0xff, SH_INIT)) return;
  u64 base = WIN_SHARED + off;
  for (u32 i = 0; i < size; i++) {
    if (!(s[i] & 1))
      fail(t, pc, "out-of-bounds", base + i, "%u-byte %s outside every shared variable", size, verb(access));
    if (s[i] == SH_VALID && (!(access & 9) || (access & 16)) && checks(t, CK_UNINIT))
      fail(t, pc, "uninitialised read", base + i, "%u-byte read of never-written shared memory", size);
  }
  if (access & 9) memset(s, SH_INIT, size);
}

extern "C" u8* mem_shared(Thread* T, u64 addr, u32 size, u32 access, u32 pc) {
  TS* t = ts(T);
  Block* b = t->blk;
  if (addr < SMEM_START || addr > b->smem_size || size > b->smem_size - addr)
    fail(t, pc, "out-of-bounds", WIN_SHARED + addr, "%u-byte access outside the %u bytes of shared memory", size,
         b->smem_size - SMEM_START);
  const u32 off = u32(addr);
  if (t->L->checks & CK_MEM) {
    if (off & (size - 1))
      fail(t, pc, "misaligned", WIN_SHARED + addr, "%u-byte %s of shared memory at a misaligned address", size,
           verb(access));
    check_shared_state(t, off, size, access, pc);
  }
  if (t->L->checks & CK_RACE) race_access(t, off, size, access, pc);
  return b->smem + off;
}

extern "C" u8* mem_local(Thread* T, u64 addr, u32 size, u32 access, u32 pc) {
  TS* t = ts(T);
  if (addr + size > t->local_sp || addr + size < addr)
    fail(t, pc, "out-of-bounds", WIN_LOCAL + addr, "%u-byte %s outside local memory", size, verb(access));
  if ((t->L->checks & CK_MEM) && (addr & (size - 1)))
    fail(t, pc, "misaligned", WIN_LOCAL + addr, "%u-byte %s of local memory at a misaligned address", size,
         verb(access));
  return t->local_mem + addr;
}

extern "C" u8* mem_generic(Thread* T, u64 addr, u32 size, u32 access, u32 pc) {
  TS* t = ts(T);
  switch (addr >> 44) {
    case 5: return mem_global(T, addr, size, access, pc);
    case 1: return mem_shared(T, addr - WIN_SHARED, size, access, pc);
    case 2: return mem_local(T, addr - WIN_LOCAL, size, access, pc);
    case 3: {
      u64 off = addr - WIN_PARAM;
      if (off + size > t->L->param_bytes || (access & 9))
        fail(t, pc, "out-of-bounds", addr, "%u-byte %s of kernel parameters", size, verb(access));
      return const_cast<u8*>(t->L->params) + off;
    }
    default:
      fail(t, pc, "out-of-bounds", addr, "%u-byte %s at %s", size, verb(access),
           addr < 4096 ? "a null pointer" : "an address in no memory window");
  }
}

extern "C" u32 local_enter(Thread* T, u32 bytes, u32 pc) {
  TS* t = ts(T);
  u32 at = t->local_sp;
  if (at + bytes > t->L->local_bytes || (u8*)__builtin_frame_address(0) < t->stack_low + 24576 + t->L->stack_bytes / 8)
    fail(t, pc, "stack overflow", 0, "local memory or stack exhausted (recursion?)");
  t->local_sp += bytes;
  return at;
}

static std::mutex atom_mutex;

extern "C" u8* atom_begin(Thread* T, int space, u64 addr, u32 size, u32 pc) {
  u32 acc = 1 | 2 | 16;
  u8* p = space == SP_GLOBAL   ? mem_global(T, addr, size, acc, pc)
          : space == SP_SHARED ? mem_shared(T, addr, size, acc, pc)
                               : mem_generic(T, addr, size, acc, pc);
  if (T->L->workers > 1) atom_mutex.lock();
  return p;
}

extern "C" void atom_end(Thread* T) {
  if (T->L->workers > 1) atom_mutex.unlock();
  mem_strong(T);
}

// ---- block barriers ----------------------------------------------------------------------------

static void bar_complete(Group* g, Bar& bar, TS* self) {
  u32 e = new_epoch(g);
  if (g->L->checks & CK_RACE) {
    if (bar.is_all) {
      bool ext = false;
      for (TS* u : bar.members) ext |= u->has_ext && g->nblocks > 1;
      if (ext) {
        SyncClock c;
        for (TS* u : bar.members) release_to(u, c);
        for (TS* u : bar.members) acquire_from(u, c);
        e = new_epoch(g);
      }
      for (TS* u : bar.members) {
        u->base = u->wbase = e;
        if (g->nblocks == 1) u->has_ext = false;
        u->ext_dirty = u->has_ext;
      }
    } else {
      for (TS* u : bar.waiting) acquire_from(u, bar.clock);
    }
  }
  bar.clock = SyncClock();
  bar.arrived = 0;
  bar.expected = 0;
  memset(bar.warp_pc, 0, sizeof bar.warp_pc);
  bar.members.clear();
  std::vector<TS*> w;
  w.swap(bar.waiting);
  wake_all(g, w, self);
}

static void bar_exit_error(Block* b, Bar& bar, u32 id, TS* t, u32 pc) {
  fail(t, pc, "barrier divergence", 0, "%u of the %u threads wait at barrier %u, and the other %u have exited",
       bar.arrived, b->nthreads, id, b->exited);
}

static void bar_check_exit(Block* b, TS* t) {
  for (u32 id = 0; id < 16; id++) {
    Bar& bar = b->bars[id];
    if (!bar.arrived || !bar.is_all) continue;
    if (bar.arrived + b->exited < b->nthreads) continue;
    TS* w = bar.waiting.empty() ? t : bar.waiting[0];
    if (b->g->L->checks & CK_EXIT) bar_exit_error(b, bar, id, w, w->wait_pc);
    bar_complete(b->g, bar, nullptr);
  }
}

// kind: bit 0 arrive only, bit 2 aligned.  Returns the barrier for bar.red.
static void bar_arrive(TS* t, u32 kind, u32 id, u32 count, u32 pc, bool p, int red, u32* result) {
  Block* b = t->blk;
  Group* g = t->g;
  if (id > 15) fail(t, pc, "barrier", 0, "barrier id %u is not in 0..15", id);
  if (count % 32) fail(t, pc, "barrier", 0, "barrier thread count %u is not a multiple of the warp size", count);
  Bar& bar = b->bars[id];
  if (!bar.arrived) {
    bar.is_all = !count;
    bar.expected = count ? count : b->nthreads;
    bar.popc = bar.disj = 0;
    bar.conj = 1;
  } else if (bar.expected != (count ? count : b->nthreads)) {
    fail(t, pc, "barrier divergence", 0, "barrier %u: thread count %u differs from the %u of earlier arrivals", id,
         count ? count : b->nthreads, bar.expected);
  } else if (bar.is_all && count) {  // `bar.sync a` and `bar.sync a, all` mixed
    for (TS* u : bar.members) release_to(u, bar.clock);
    bar.is_all = false;
  }
  if (count > b->nthreads + 31)
    fail(t, pc, "barrier divergence", 0, "barrier %u expects %u threads, the block has %u", id, count, b->nthreads);
  if (kind & 4) {
    u32& wpc = bar.warp_pc[t->warp_id & 63];
    if (wpc && wpc != pc + 1)
      fail(t, pc, "barrier divergence", 0,
           "lanes of one warp reach barrier %u at different instructions (divergent code)", id);
    wpc = pc + 1;
  }
  bar.popc += p;
  bar.conj &= p;
  bar.disj |= p;
  bar.arrived++;
  // lanes missing from a partial last warp count as arrived when a count is given
  if (count && t->lane == 0) bar.arrived += 32 - __builtin_popcount(t->warp->exist);
  bar.members.push_back(t);
  if (!bar.is_all) release_to(t, bar.clock);
  bool wait = !(kind & 1);
  if (wait) bar.waiting.push_back(t);
  auto value = [&] { return red == 0 ? bar.popc : red == 1 ? bar.conj : bar.disj; };
  t->out = result;
  bool full = bar.arrived >= bar.expected;
  if (!full && bar.is_all && bar.arrived + b->exited >= b->nthreads) {
    if (checks(t, CK_EXIT)) bar_exit_error(b, bar, id, t, pc);
    full = true;
  }
  if (full) {
    u32 v = value();
    for (TS* u : bar.waiting)
      if (u->out) *(u32*)u->out = v;
    bar_complete(g, bar, t);
    // let the other threads go first from time to time: the completing thread queues too
    if (wait) yield_thread(t);
  } else if (wait) {
    block_thread(t, W_BAR, pc, id);
  }
}

extern "C" void bar_op(Thread* T, u32 kind, u32 id, u32 count, u32 pc) {
  bar_arrive(ts(T), kind, id, count, pc, false, 0, nullptr);
}

extern "C" u32 bar_red(Thread* T, u32 op, bool p, u32 id, u32 count, u32 pc) {
  u32 r = 0;
  bar_arrive(ts(T), (op >> 2) & 4, id, count, pc, p, op & 3, &r);
  return r;
}

extern "C" u32 shared_bytes(Thread* T, bool dynamic) { return dynamic ? T->L->dyn_bytes : T->blk->smem_size; }

extern "C" u64 clock_ticks(Thread* T) { return T->icount; }

// ---- printf and assert -------------------------------------------------------------------------

const char* read_string(TS* t, u64 addr, u32 pc, char* buf, size_t n) {
  size_t i = 0;
  for (; i + 1 < n; i++) {
    char c = *(const char*)mem_generic(t, addr + i, 1, AC_READ, pc);
    if (!c) break;
    buf[i] = c;
  }
  buf[i] = 0;
  return buf;
}

extern "C" u32 call_vprintf(Thread* T, u64 fmt, u64 args, u32 pc) {
  TS* t = ts(T);
  char f[1024], spec[64], str[1024];
  read_string(t, fmt, pc, f, sizeof f);
  std::string out;
  u64 at = args;
  u32 n = 0;
  auto arg = [&](u32 size) {
    at = (at + size - 1) / size * size;
    const u8* p = mem_generic(t, at, size, AC_READ, pc);
    at += size;
    n++;
    return size == 8 ? rd<u64>(p) : u64(rd<u32>(p));
  };
  for (const char* p = f; *p; p++) {
    if (*p != '%') {
      out += *p;
      continue;
    }
    if (p[1] == '%') {
      out += '%';
      p++;
      continue;
    }
    const char* q = p + 1;
    bool wide = false;
    while (*q && !strchr("diouxXcsfFeEgGaAp", *q)) {
      if (*q == 'l' || *q == 'z' || *q == 'j') wide = true;
      q++;
    }
    if (!*q) break;
    snprintf(spec, sizeof spec, "%.*s", int(q - p + 1), p);
    char buf[1200];
    if (strchr("fFeEgGaA", *q)) snprintf(buf, sizeof buf, spec, D(arg(8)));
    else if (*q == 's') snprintf(buf, sizeof buf, spec, read_string(t, arg(8), pc, str, sizeof str));
    else if (*q == 'p') snprintf(buf, sizeof buf, spec, (void*)arg(8));
    else if (wide) snprintf(buf, sizeof buf, spec, arg(8));
    else snprintf(buf, sizeof buf, spec, u32(arg(4)));
    out += buf;
    p = q;
  }
  fputs(out.c_str(), stdout);
  fflush(stdout);
  return n;
}

extern "C" void call_assertfail(Thread* T, u64 msg, u64 file, u32 line, u64 func, u32 pc) {
  TS* t = ts(T);
  char a[600], b[300], c[300];
  fail(t, pc, "assert", 0, "%s:%u: %s: assertion `%s' failed", read_string(t, file, pc, b, sizeof b), line,
       read_string(t, func, pc, c, sizeof c), read_string(t, msg, pc, a, sizeof a));
}

// ---- directed rounding of double ---------------------------------------------------------------

extern "C" __attribute__((noinline)) u64 f64_dir(int op, u64 a, u64 b, u64 c, int mode) {
  static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
  volatile double x = D(a), y = D(b), z = D(c), r;
  fesetround(modes[mode]);
  switch (op) {
    case 0: r = x + y; break;
    case 1: r = x * y; break;
    case 2: r = fma(x, y, z); break;
    case 3: r = x / y; break;
    default: r = sqrt(x);
  }
  fesetround(FE_TONEAREST);
  return U64(r);
}

// ---- launch ------------------------------------------------------------------------------------

static void setup_block(Group* g, Block& b, const u32 ctaid[3], u32 first) {
  Launch* L = g->L;
  b.g = g;
  b.exited = 0;
  memcpy(b.ctaid, ctaid, 12);
  b.id = (ctaid[2] * L->grid[1] + ctaid[1]) * L->grid[0] + ctaid[0] + 1;
  memset(b.sinit, SH_NONE, b.smem_size);
  for (u32 i = 0; i < L->n_shared_ranges; i++)
    memset(b.sinit + L->shared_ranges[2 * i], SH_VALID, L->shared_ranges[2 * i + 1]);
  memset(b.sinit + L->dyn_offset, SH_VALID, L->dyn_bytes);
  memset(b.smem, 0xff, b.smem_size);  // NaN as f16, bf16, f32
  if (L->checks & CK_RACE) {
    if (b.cells.empty()) {
      b.shift = 2;
      b.cells.assign((b.smem_size >> 2) + 4, Cell{});
    } else {
      memset((void*)b.cells.data(), 0, b.cells.size() * sizeof(Cell));
    }
  }
  for (Bar& bar : b.bars) {
    bar.arrived = bar.expected = 0;
    bar.waiting.clear();
    bar.members.clear();
    bar.clock = SyncClock();
    memset(bar.warp_pc, 0, sizeof bar.warp_pc);
  }
  u32 nx = L->block[0], ny = L->block[1], n = b.nthreads;
  b.threads.resize(n);
  b.warps.resize((n + 31) / 32);
  for (Warp& w : b.warps) {
    memset(w.lane, 0, sizeof w.lane);
    w.blk = &b;
    w.exist = w.exited = w.runnable = w.active_wait = 0;
    w.colls.clear();
    w.index = &w - &b.warps[0];
  }
  for (u32 i = 0; i < n; i++) {
    TS& t = g->threads[first + i];
    t.tid[0] = i % nx;
    t.tid[1] = i / nx % ny;
    t.tid[2] = i / nx / ny;
    memcpy(t.ntid, L->block, 12);
    memcpy(t.ctaid, ctaid, 12);
    memcpy(t.nctaid, L->grid, 12);
    t.lane = i % 32;
    t.warp_id = i / 32;
    t.linear = i;
    t.params = L->params;
    t.icount = 0;
    t.fuel = 20000;
    t.local_sp = 0;
    t.L = L;
    t.blk = &b;
    t.warp = &b.warps[i / 32];
    t.g = g;
    t.gid = first + i;
    t.exited = false;
    t.wait = W_NONE;
    t.base = t.wbase = 0;
    t.has_ext = t.ext_dirty = t.has_fence = t.has_acq = false;
    t.fence_clock = t.acq_clock = SyncClock();
    t.in = nullptr;
    t.out = nullptr;
    t.spins = 0;
    t.local_mem = g->locals + u64(t.gid) * L->local_bytes;
    t.warp->lane[t.lane] = &t;
    t.warp->exist |= 1u << t.lane;
    t.warp->runnable++;
    b.threads[i] = &t;
    t.stack_low = g->stacks + g->stack_stride * t.gid + 4096;
    t.sp = fiber_init(g->stacks + g->stack_stride * (t.gid + 1), &t);
  }
}

static void describe_deadlock(Group* g) {
  struct Key {
    Wait w;
    u32 pc;
    u64 arg;
  };
  std::vector<std::pair<Key, std::vector<TS*>>> groups;
  for (u32 i = 0; i < g->nthreads; i++) {
    TS* t = &g->threads[i];
    if (t->exited) continue;
    bool found = false;
    for (auto& [k, v] : groups)
      if (k.w == t->wait && k.pc == t->wait_pc) {
        v.push_back(t);
        found = true;
        break;
      }
    if (!found) groups.push_back({{t->wait, t->wait_pc, t->wait_arg}, {t}});
  }
  std::string msg = "no thread can run:";
  static const char* names[] = {"nothing", "a warp collective", "barrier", "activemask"};
  bool bars = true;
  size_t shown = 0;
  TS* first = nullptr;
  for (auto& [k, v] : groups) {
    if (!first) first = v[0];
    bars &= k.w == W_BAR || k.w == W_COLL;
    if (++shown > 8) continue;
    char line[200];
    snprintf(line, sizeof line, " %zu thread(s) from (%u,%u,%u) wait for %s", v.size(), v[0]->tid[0], v[0]->tid[1],
             v[0]->tid[2], names[k.w]);
    msg += line;
    if (k.w == W_BAR) msg += " " + std::to_string(k.arg);
    msg += " @pc" + std::to_string(k.pc) + ";";
  }
  u32 ex = g->nthreads - g->live;
  if (ex) msg += " " + std::to_string(ex) + " thread(s) have exited;";
  set_error(g->L, first, first ? first->wait_pc : 0, bars ? "barrier divergence" : "deadlock", 0, msg.c_str());
}

static void run_group(Group* g) {
  while (TS* n = pop_ready(g)) {
    ptxsim_switch(&g->main_sp, n->sp);
    if (g->failed) return;
  }
  if (!g->live) return;
  describe_deadlock(g);
  g->failed = true;
}

static void init_group(Group* g, Launch* L, u32 nblocks, u32 nthreads) {
  g->L = L;
  g->nblocks = nblocks;
  g->nthreads = nblocks * nthreads;
  g->threads.resize(g->nthreads);
  g->blocks.resize(nblocks);
  g->ready.resize(g->nthreads + 1);
  g->failed = false;
  u64 page = 4096;
  g->stack_stride = (L->stack_bytes + page - 1) / page * page + page;
  auto map = [](u64 n) {
    return (u8*)mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  g->stacks = map(g->stack_stride * g->nthreads);
  for (u32 i = 0; i < g->nthreads; i++) mprotect(g->stacks + g->stack_stride * i, page, PROT_NONE);
  g->locals = map(u64(L->local_bytes) * g->nthreads + page);
  u32 smem = L->dyn_offset + L->dyn_bytes + 64;
  for (Block& b : g->blocks) {
    b.nthreads = nthreads;
    b.smem_size = smem;
    b.smem = map(smem);
    b.sinit = map(smem);
  }
}

static void free_group(Group* g) {
  munmap(g->stacks, g->stack_stride * g->nthreads);
  munmap(g->locals, u64(g->L->local_bytes) * g->nthreads + 4096);
  for (Block& b : g->blocks) {
    munmap(b.smem, b.smem_size);
    munmap(b.sinit, b.smem_size);
  }
}

static void worker(Launch* L, std::atomic<u64>* next, u64 total, double deadline) {
  u32 nthreads = L->block[0] * L->block[1] * L->block[2];
  u32 nblocks = L->coresident ? L->grid[0] * L->grid[1] * L->grid[2] : 1;
  Group* g = new Group();
  init_group(g, L, nblocks, nthreads);
  prof_init(g);
  g->deadline = deadline;
  u64 icount = 0;
  while (!L->err.set) {
    u64 k = next->fetch_add(1);
    if (k >= total) break;
    if (L->order == 1) k = total - 1 - k;
    g->head = g->count = 0;
    g->now = 1;
    g->rng = (L->seed * 0x9e3779b97f4a7c15ull + k * 0xd1342543de82ef95ull) | 1;
    g->live = g->nthreads;
    g->locations.clear();
    for (u32 r = 0; r < nblocks; r++) {
      u64 linear = k * nblocks + r;
      u32 id[3] = {u32(linear % L->grid[0]), u32(linear / L->grid[0] % L->grid[1]),
                   u32(linear / L->grid[0] / L->grid[1])};
      setup_block(g, g->blocks[r], id, r * nthreads);
    }
    prof_start(g);
    for (u32 i = 0; i < g->nthreads; i++) push_ready(g, &g->threads[L->order == 1 ? g->nthreads - 1 - i : i]);
    run_group(g);
    for (u32 i = 0; i < g->nthreads; i++) icount += g->threads[i].icount;
    if (g->failed) break;
    if (deadline && wall() > deadline) {
      set_error(L, &g->threads[0], 0, "timeout", 0, "the launch exceeded its time limit");
      break;
    }
  }
  prof_finish(g);
  free_group(g);
  delete g;
  std::lock_guard<std::mutex> lock(error_mutex);
  L->icount += icount;
}

extern "C" int ptxsim_size_of_launch() { return int(sizeof(Launch)); }
extern "C" int ptxsim_size_of_profile() { return int(sizeof(Profile)); }

extern "C" int ptxsim_run(Launch* L) {
  double deadline = L->timeout > 0 ? wall() + L->timeout : 0;
  u64 total = L->coresident ? 1 : u64(L->grid[0]) * L->grid[1] * L->grid[2];
  std::atomic<u64> next(0);
  fenv_t env;
  fegetenv(&env);
  fesetenv(FE_DFL_ENV);
  if (L->workers <= 1) {
    worker(L, &next, total, deadline);
  } else {
    std::vector<std::thread> pool;
    for (u32 i = 0; i < L->workers; i++) pool.emplace_back(worker, L, &next, total, deadline);
    for (auto& th : pool) th.join();
  }
  fesetenv(&env);
  return L->err.set;
}
