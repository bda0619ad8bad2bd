// sm_90: mbarrier, bulk and tensor copies (TMA), wgmma.
//
// Asynchronous copies into shared memory land as late as possible: when no thread can run, or (random
// order) at random points.  Until then their bytes are SH_PENDING and reading them is an error.
#include "runtime.h"

#include <algorithm>

constexpr int LOAD_AGENT = 0, STORE_AGENT = 11;

// ---- mbarrier ----------------------------------------------------------------------------------

static MBar& find_mbar(TS* t, u64 a, u32 access, u32 pc, Block** blk, u32* off) {
  *blk = shared_block(t, a, 8, pc, off);
  mem_shared(t, a, 8, access, pc);
  auto it = (*blk)->mbars.find(*off);
  if (it == (*blk)->mbars.end()) fail(t, pc, "mbarrier", WIN_SHARED + a, "the mbarrier is not initialised");
  return it->second;
}

static u64 addr_of(u64 a, bool generic) { return generic ? a - WIN_SHARED : a; }

extern "C" void mbar_init(Thread* T, u64 a, u32 count, bool generic, u32 pc) {
  TS* t = ts(T);
  a = addr_of(a, generic);
  u32 off;
  Block* b = shared_block(t, a, 8, pc, &off);
  if (!count || count >= 1u << 20) fail(t, pc, "mbarrier", WIN_SHARED + a, "mbarrier.init with count %u", count);
  memset(mem_shared(t, a, 8, AC_WRITE, pc), 0, 8);
  MBar m;
  m.expected = m.pending = count;
  m.pc = pc;
  b->mbars[off] = m;
}

extern "C" void mbar_inval(Thread* T, u64 a, bool generic, u32 pc) {
  TS* t = ts(T);
  Block* b;
  u32 off;
  find_mbar(t, addr_of(a, generic), AC_ATOMIC | 8, pc, &b, &off);
  b->mbars.erase(off);
}

static void check_tx(TS* t, const MBar& m, u64 a, u32 pc) {
  if (m.tx >= 1 << 20 || m.tx <= -(1 << 20)) fail(t, pc, "mbarrier", WIN_SHARED + a, "transaction count out of range");
}

static void mbar_check(Group* g, MBar& m) {  // complete the phase if everything has arrived
  if (m.pending || m.tx) return;
  m.phase++;
  m.pending = m.expected;
  m.done = std::move(m.clock);
  m.clock = SyncClock();
  g->progress++;
  std::vector<TS*> w;
  w.swap(m.waiting);
  for (TS* t : w) {
    auto& v = g->timed;
    v.erase(std::remove(v.begin(), v.end(), t), v.end());
    wake(t);
  }
}

extern "C" u64 mbar_arrive(Thread* T, u64 a, u32 count, u32 tx, u32 flags, u32 pc) {
  TS* t = ts(T);
  a = addr_of(a, flags & 1);
  Block* b;
  u32 off;
  MBar& m = find_mbar(t, a, AC_ATOMIC | 8, pc, &b, &off);
  u64 token = m.phase << 20 | m.pending;
  if (flags & 2) m.tx += tx;
  check_tx(t, m, a, pc);
  if (count > m.pending)
    fail(t, pc, "mbarrier", WIN_SHARED + a, "arrival of %u exceeds the pending count %u (of %u) of the phase", count,
         m.pending, m.expected);
  if (!(flags & 4)) release_to(t, m.clock);
  m.pending -= count;
  if (flags & 16) m.expected -= count;
  t->g->progress++;
  mbar_check(t->g, m);
  return token;
}

extern "C" u32 mbar_pending(u64 state) { return state & 0xfffff; }

extern "C" void mbar_tx(Thread* T, u64 a, u32 tx, bool expect, bool generic, u32 pc) {
  TS* t = ts(T);
  Block* b;
  u32 off;
  MBar& m = find_mbar(t, addr_of(a, generic), AC_ATOMIC | 8, pc, &b, &off);
  m.tx += expect ? s64(tx) : -s64(tx);
  mbar_check(t->g, m);
}

extern "C" bool mbar_wait(Thread* T, u64 a, u64 phase, u32 flags, u32 pc) {
  TS* t = ts(T);
  Group* g = t->g;
  a = addr_of(a, flags & 1);
  Block* b;
  u32 off;
  MBar& m = find_mbar(t, a, AC_ATOMIC | 4, pc, &b, &off);
  auto done = [&] { return flags & 32 ? (m.phase & 1) != (phase & 1) : m.phase != phase >> 20; };
  bool ok = done();
  if (!ok) {
    if (flags & 64) m.waiting.push_back(t);
    g->timed.push_back(t);
    t->timed_out = false;
    block_thread(t, W_MBAR, pc);
    if (t->timed_out) {
      auto it = b->mbars.find(off);
      if (it == b->mbars.end()) return false;
      auto& v = it->second.waiting;
      v.erase(std::remove(v.begin(), v.end(), t), v.end());
      t->timed_out = false;
      ok = done();
    } else {
      ok = true;
    }
  }
  if (ok && !(flags & 4)) acquire_from(t, m.done);
  return ok;
}

extern "C" void cp_async_mbar_arrive(Thread* T, u64 bar, bool noinc, bool generic, u32 pc) {
  TS* t = ts(T);
  bar = addr_of(bar, generic);
  Block* b;
  u32 off;
  MBar& m = find_mbar(t, bar, AC_ATOMIC | 8, pc, &b, &off);
  if (!noinc) m.pending++;
  PendingCopy c{};
  c.kind = 2;
  c.t = t;
  c.bar_blk = b;
  c.bar = off;
  c.pc = pc;
  for (auto& grp : t->cp_groups) {
    c.cp.insert(c.cp.end(), grp.begin(), grp.end());
    grp.clear();
  }
  c.cp.insert(c.cp.end(), t->cp_open.begin(), t->cp_open.end());
  t->cp_open.clear();
  t->g->copies.push_back(std::move(c));
}

// ---- tensor maps -------------------------------------------------------------------------------

struct TensorDesc {  // see TensorMap.encode in module.py
  u32 magic, info;
  u64 base;
  u32 shape[5], box[5], est[5], kind;
  u64 strides[4];
  u32 pad[4];
  u32 rank() const { return info & 0xff; }
  u32 esize() const { return info >> 8 & 0xff; }
  u32 swizzle() const { return info >> 16 & 0xfff; }
  bool nan() const { return info >> 28 & 1; }
  u32 count(u32 d) const { return d ? (box[d] + est[d] - 1) / est[d] : box[0]; }
};
static_assert(sizeof(TensorDesc) == 128, "tensor map layout");

static u32 swizzle_addr(u32 a, u32 span) {
  switch (span) {
    case 128: return a ^ (a >> 3 & 0x70);
    case 64: return a ^ (a >> 3 & 0x30);
    case 32: return a ^ (a >> 3 & 0x10);
  }
  return a;
}

static const TensorDesc* get_desc(TS* t, u64 map, u32 rank, u32 pc) {
  const TensorDesc* d = (const TensorDesc*)mem_generic(t, map, 1, AC_READ, pc);
  if (map & 63) fail(t, pc, "misaligned", map, "the tensor map is not 64-byte aligned");
  if (d->magic != 0x7074786d) fail(t, pc, "tensor map", map, "the address holds no ptxsim.TensorMap");
  if (d->rank() != rank)
    fail(t, pc, "tensor map", map, "the instruction is %u-d, the tensor map %u-d", rank, d->rank());
  return d;
}

static u32 box_bytes(const TensorDesc* d) {
  u32 n = d->esize();
  for (u32 i = 0; i < d->rank(); i++) n *= d->count(i);
  return n;
}

// Call f(shared offset from the box start, global address or 0 if out of bounds) for each element.
template <typename Fn>
static void for_box(const TensorDesc* d, const s32* c, Fn f) {
  u32 n[5] = {1, 1, 1, 1, 1}, rank = d->rank(), es = d->esize();
  for (u32 i = 0; i < rank; i++) n[i] = d->count(i);
  u32 at = 0;
  for (u32 i4 = 0; i4 < n[4]; i4++)
    for (u32 i3 = 0; i3 < n[3]; i3++)
      for (u32 i2 = 0; i2 < n[2]; i2++)
        for (u32 i1 = 0; i1 < n[1]; i1++) {
          u32 idx[5] = {0, i1, i2, i3, i4};
          bool in = true;
          u64 row = d->base;
          for (u32 k = 1; k < rank; k++) {
            s64 x = s64(c[k]) + s64(idx[k]) * d->est[k];
            in &= x >= 0 && x < d->shape[k];
            row += u64(x) * d->strides[k - 1];
          }
          for (u32 i0 = 0; i0 < n[0]; i0++, at += es) {
            s64 x = s64(c[0]) + i0;
            f(at, in && x >= 0 && x < d->shape[0] ? row + u64(x) * es : 0);
          }
        }
}

// Contiguous pieces of the box in global memory, for the profile.
static void profile_box(TS* t, const TensorDesc* d, const s32* c, bool store, u32 pc) {
  if (!t->g->prof) return;
  std::vector<std::pair<u64, u32>> runs;
  for_box(d, c, [&](u32, u64 g) {
    if (!g) return;
    if (runs.empty() || runs.back().first + runs.back().second != g) runs.push_back({g, 0});
    runs.back().second += d->esize();
  });
  prof_bulk(t, pc, store, runs);
}

static const u32 oob_pattern[][2] = {{0x7fff, 2}, {0x7fff, 2}, {0x7fffffff, 4}};

// ---- copies into shared memory -----------------------------------------------------------------

static void check_proxy(TS* t, Block* b, u32 off, u32 size, bool write, u32 pc);

static void issue_copy(TS* t, PendingCopy& c, u64 dst, u64 bar, u32 bytes, u32 mask, u32 pc) {
  Group* g = t->g;
  for (u32 r = 0; r < g->nblocks; r++) {
    if (mask ? !(mask >> r & 1) : r != (u32(dst) >> 24)) continue;
    u64 d = mask ? (dst & 0xffffff) | u64(r) << 24 : dst;
    u64 br = mask ? (bar & 0xffffff) | u64(r) << 24 : bar;
    PendingCopy p = c;
    p.t = t;
    p.pc = pc;
    p.bytes = bytes;
    p.dst_blk = shared_block(t, d, bytes, pc, &p.dst);
    find_mbar(t, br, AC_ATOMIC | 8, pc, &p.bar_blk, &p.bar);
    check_shared_state(t, p.dst_blk, p.dst, bytes, AC_WRITE, pc);
    if (checks(t, CK_RACE)) check_proxy(t, p.dst_blk, p.dst, bytes, true, pc);
    race_access(t, p.dst_blk, p.dst, bytes, AC_WRITE, pc, LOAD_AGENT);
    if (checks(t, CK_MEM)) set_state(p.dst_blk, p.dst, bytes, SH_PENDING);
    g->copies.push_back(p);
  }
  if (mask && mask >> g->nblocks)
    fail(t, pc, "out-of-bounds", dst, "multicast mask 0x%x in a cluster of %u", mask, g->nblocks);
}

static void check_bulk(TS* t, u64 shared, u64 other, u32 size, u32 pc) {
  if (size % 16 || shared % 16 || other % 16)
    fail(t, pc, "misaligned", other, "cp.async.bulk: size %u and addresses must be multiples of 16", size);
}

extern "C" void bulk_g2s(Thread* T, u64 dst, u64 src, u32 size, u64 bar, u32, u32 ctamask, u32 pc) {
  TS* t = ts(T);
  check_bulk(t, dst, src, size, pc);
  global_range(t, src, size, AC_READ, pc);
  PendingCopy c{};
  if (t->g->prof) prof_bulk(t, pc, false, {{src, size}});
  c.kind = 0;
  c.src = src;
  c.size = size;
  issue_copy(t, c, dst, bar, size, ctamask, pc);
}

extern "C" void bulk_s2s(Thread* T, u64 dst, u64 src, u32 size, u64 bar, u32 pc) {
  TS* t = ts(T);
  check_bulk(t, dst, src, size, pc);
  u32 off;
  Block* b = shared_block(t, src, size, pc, &off);
  async_shared_read(t, b, off, size, pc, STORE_AGENT);
  PendingCopy c{};
  c.kind = 3;
  c.src = src;
  c.size = size;
  issue_copy(t, c, dst, bar, size, 0, pc);
}

extern "C" void tensor_load(Thread* T, u64 dst, u64 map, u32 rank, const s32* co, u64 bar, u32 ctamask, u32, u32 pc) {
  TS* t = ts(T);
  const TensorDesc* d = get_desc(t, map, rank, pc);
  if (dst % 128)
    fail(t, pc, "misaligned", WIN_SHARED + dst, "tensor copy to a shared address that is not 128-byte aligned");
  if (checks(t, CK_MEM))
    for_box(d, co, [&](u32, u64 g) {
      if (g) global_range(t, g, d->esize(), AC_READ, pc);
    });
  profile_box(t, d, co, false, pc);
  PendingCopy c{};
  c.kind = 1;
  c.map = map;
  c.rank = rank;
  memcpy(c.c, co, 4 * rank);
  issue_copy(t, c, dst, bar, box_bytes(d), ctamask, pc);
}

void complete_copy(Group* g, size_t index) {
  PendingCopy c = std::move(g->copies[index]);
  g->copies.erase(g->copies.begin() + index);
  g->progress++;
  TS* t = c.t;
  auto it = c.bar_blk->mbars.find(c.bar);
  MBar* m = it == c.bar_blk->mbars.end() ? nullptr : &it->second;
  if (c.kind == 2) {
    for (CpOp& op : c.cp) copy_shared_write(t, t->blk, op.dst, op.data, op.size, op.pc, -1, 0);
    if (m) {
      if (!m->pending)
        fail(t, c.pc, "mbarrier", WIN_SHARED + c.bar, "cp.async.mbarrier.arrive exceeds the pending count");
      release_to(t, m->clock);
      m->pending--;
      mbar_check(g, *m);
    }
    return;
  }
  u8* smem = c.dst_blk->smem;
  const u8* arena = g->L->arena;
  if (c.kind == 0) {
    memcpy(smem + c.dst, arena + (c.src - WIN_GLOBAL), c.size);
  } else if (c.kind == 3) {
    memcpy(smem + c.dst, g->blocks[u32(c.src) >> 24].smem + (c.src & 0xffffff), c.size);
  } else {
    const TensorDesc* d = (const TensorDesc*)mem_generic(t, c.map, 1, AC_READ, c.pc);
    u32 es = d->esize(), span = d->swizzle();
    for_box(d, c.c, [&](u32 at, u64 ga) {
      u8* p = smem + swizzle_addr(c.dst + at, span);
      if (ga) memcpy(p, arena + (ga - WIN_GLOBAL), es);
      else if (d->nan() && d->kind <= 2) memcpy(p, &oob_pattern[d->kind][0], es);
      else memset(p, 0, es);
    });
  }
  if (g->L->checks & CK_MEM) set_state(c.dst_blk, c.dst, c.bytes, SH_INIT);
  u32 e = new_epoch(g);
  if (!m) return;
  m->clock.agents[LOAD_AGENT] = std::max(m->clock.agents[LOAD_AGENT], e);
  m->tx -= c.bytes;
  mbar_check(g, *m);
}

bool complete_some_copies(Group* g, bool all) {
  bool any = false;
  while (!g->copies.empty()) {
    complete_copy(g, 0);
    any = true;
    if (!all) break;
  }
  return any;
}

// ---- copies out of shared memory ---------------------------------------------------------------

extern "C" void bulk_s2g(Thread* T, u64 dst, u64 src, u32 size, u32, u32 pc) {
  TS* t = ts(T);
  check_bulk(t, src, dst, size, pc);
  u32 off;
  Block* b = shared_block(t, src, size, pc, &off);
  async_shared_read(t, b, off, size, pc, STORE_AGENT);
  global_range(t, dst, size, AC_READ | 32, pc);  // bounds only
  if (t->g->prof) prof_bulk(t, pc, true, {{dst, size}});
  BulkStore s{};
  s.kind = 0;
  s.dst = dst;
  s.src = off;
  s.size = size;
  s.pc = pc;
  s.stamp = new_epoch(t->g);
  t->bulk_open.push_back(s);
}

// Call f(offset, bytes) for the runs of shared memory that a tensor store reads: the elements of the
// box that lie inside the tensor.
template <typename Fn>
static void store_runs(const TensorDesc* d, const s32* c, u32 src, Fn f) {
  u32 es = d->esize(), span = d->swizzle(), start = 0, n = 0;
  for_box(d, c, [&](u32 at, u64 ga) {
    if (!ga) return;
    u32 a = swizzle_addr(src + at, span);
    if (n && a == start + n) {
      n += es;
      return;
    }
    if (n) f(start, n);
    start = a;
    n = es;
  });
  if (n) f(start, n);
}

extern "C" void tensor_store(Thread* T, u64 map, u64 src, u32 rank, const s32* co, u32 red, u32 pc) {
  TS* t = ts(T);
  const TensorDesc* d = get_desc(t, map, rank, pc);
  if (src % 128)
    fail(t, pc, "misaligned", WIN_SHARED + src, "tensor copy from a shared address that is not 128-byte aligned");
  u32 off, bytes = box_bytes(d);
  Block* b = shared_block(t, src, bytes, pc, &off);
  if (t->L->checks & (CK_MEM | CK_RACE))
    store_runs(d, co, off, [&](u32 o, u32 n) { async_shared_read(t, b, o, n, pc, STORE_AGENT); });
  profile_box(t, d, co, true, pc);
  BulkStore s{};
  s.kind = 1;
  s.map = map;
  s.src = off;
  s.size = bytes;
  s.rank = rank;
  s.red = red;
  s.pc = pc;
  memcpy(s.c, co, 4 * rank);
  s.stamp = new_epoch(t->g);
  t->bulk_open.push_back(s);
}

static void reduce_elem(TS* t, const TensorDesc* d, u8* p, const u8* q, u32 op, u32 pc) {
  if (op == 1) {
    switch (d->kind) {
      case 0: wr<u16>(p, add_f16(rd<u16>(p), rd<u16>(q))); return;
      case 1: wr<u16>(p, add_bf16(rd<u16>(p), rd<u16>(q))); return;
      case 2: wr<u32>(p, add_f32(rd<u32>(p), rd<u32>(q))); return;
      case 4:
        if (d->esize() == 4) {
          wr<u32>(p, rd<u32>(p) + rd<u32>(q));
          return;
        }
    }
  }
  fail(t, pc, "unsupported", 0, "this cp.reduce.async.bulk.tensor operation");
}

static void run_store(TS* t, BulkStore& s) {
  Block* b = t->blk;
  auto check = [&](u32 off, u32 n) {  // was the source overwritten before the copy read it?
    for (u32 i = off >> b->shift; i <= (off + n - 1) >> b->shift; i++)
      if (b->cells[i].w >> 32 > s.stamp - 1)
        fail(t, s.pc, "race", WIN_SHARED + (u64(b->rank) << 24) + (i << b->shift),
             "the source of a bulk store was overwritten before cp.async.bulk.wait_group");
  };
  if (checks(t, CK_RACE)) {
    if (s.kind == 0) check(s.src, s.size);
    else store_runs(get_desc(t, s.map, s.rank, s.pc), s.c, s.src, check);
  }
  if (s.kind == 0) {
    memcpy(global_range(t, s.dst, s.size, AC_WRITE, s.pc), b->smem + s.src, s.size);
  } else {
    const TensorDesc* d = get_desc(t, s.map, s.rank, s.pc);
    u32 es = d->esize(), span = d->swizzle();
    for_box(d, s.c, [&](u32 at, u64 ga) {
      if (!ga) return;
      u8* p = global_range(t, ga, es, AC_WRITE, s.pc);
      const u8* q = b->smem + swizzle_addr(s.src + at, span);
      if (s.red) reduce_elem(t, d, p, q, s.red, s.pc);
      else memcpy(p, q, es);
    });
  }
  t->agents[STORE_AGENT] = std::max(t->agents[STORE_AGENT], s.stamp + 1);
  t->ext_dirty = true;
}

extern "C" void bulk_commit(Thread* T) {
  TS* t = ts(T);
  t->bulk_groups.emplace_back();
  t->bulk_groups.back().swap(t->bulk_open);
}

extern "C" void bulk_wait(Thread* T, u32 keep, bool, u32) {
  TS* t = ts(T);
  while (t->bulk_groups.size() > keep) {
    for (BulkStore& s : t->bulk_groups.front()) run_store(t, s);
    t->bulk_groups.pop_front();
  }
}

extern "C" void fence_proxy_async(Thread* T) { ts(T)->pfence = new_epoch(ts(T)->g); }

// The async proxy reads or writes bytes that a thread wrote: a proxy fence must lie between.
static void check_proxy(TS* t, Block* b, u32 off, u32 size, bool write, u32 pc) {
  for (u32 i = off >> b->shift; i <= (off + size - 1) >> b->shift; i++) {
    u64 w = b->cells[i].w;
    u32 tid = w & 0x3fff, stamp = w >> 32;
    if (w && tid < AGENT0 && t->g->threads[tid].pfence <= stamp && t->pfence <= stamp)
      fail(t, pc, "proxy fence", WIN_SHARED + (u64(b->rank) << 24) + (i << b->shift),
           "the async proxy %s shared memory that thread (%u,%u,%u) wrote without a later fence.proxy.async",
           write ? "overwrites" : "reads", t->g->threads[tid].tid[0], t->g->threads[tid].tid[1],
           t->g->threads[tid].tid[2]);
  }
}

// A read by the async proxy: initialised, ordered, and past a proxy fence if written by a thread.
const u8* async_shared_read(TS* t, Block* b, u32 off, u32 size, u32 pc, int agent) {
  check_shared_state(t, b, off, size, AC_READ, pc);
  if (checks(t, CK_RACE)) {
    race_access(t, b, off, size, AC_READ, pc, agent);
    check_proxy(t, b, off, size, false, pc);
  }
  return b->smem + off;
}

// ---- wgmma -------------------------------------------------------------------------------------

enum { T_F16, T_BF16, T_TF32, T_E4M3, T_E5M2, T_S8, T_U8 };

struct WgArgs {
  u32 n, types, neg, tra, trb;
  bool scale_d, a_regs;
  u64 da, db;
  const u32* a;
  u32* d;
};

static u32 type_size(u32 ty) { return ty <= T_BF16 ? 2 : ty == T_TF32 ? 4 : 1; }

static double load_elem(u32 ty, const u8* p) {
  switch (ty) {
    case T_F16: return h2f(rd<u16>(p));
    case T_BF16: return b2f(rd<u16>(p));
    case T_TF32: return F(rd<u32>(p) & ~0x1fffu);
    case T_E4M3: return e4m3_f(*p);
    case T_E5M2: return e5m2_f(*p);
    case T_S8: return s8(*p);
    default: return *p;
  }
}

// Read rows [m0, m0+rows) x K of a matrix given by a shared-memory descriptor into out[k * ld + m].
static void read_matrix(TS* t, u64 desc, bool mn_major, u32 ty, u32 m0, u32 rows, u32 K, double* out, u32 ld,
                        bool k_first, int agent, u32 pc) {
  Block* b = t->blk;
  u32 start = (desc & 0x3fff) << 4, lbo = (desc >> 16 & 0x3fff) << 4, sbo = (desc >> 32 & 0x3fff) << 4;
  u32 mode = desc >> 62, span = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32, es = type_size(ty);
  if (desc >> 49 & 7) fail(t, pc, "unsupported", 0, "matrix descriptor with a base offset");
  u32 sw = mode ? span : 0;
  auto chunk = [&](u32 addr) {  // 16 bytes, checked
    addr = swizzle_addr(addr, sw);
    if (addr < SMEM_START || addr + 16 > b->smem_size)
      fail(t, pc, "out-of-bounds", WIN_SHARED + addr, "wgmma descriptor reads outside shared memory");
    return async_shared_read(t, b, addr, 16, pc, agent);
  };
  u32 per = 16 / es;
  if (!mn_major) {
    for (u32 m = m0; m < m0 + rows; m++)
      for (u32 k = 0; k < K; k += per) {
        u32 kb = k * es;
        u32 a = mode ? start + m / 8 * sbo + m % 8 * span + kb : start + m / 8 * sbo + kb / 16 * lbo + m % 8 * 16;
        const u8* p = chunk(a);
        for (u32 j = 0; j < per; j++)
          out[k_first ? (k + j) * ld + m - m0 : (m - m0) * ld + k + j] = load_elem(ty, p + j * es);
      }
  } else {
    u32 C = span / 16;
    for (u32 c = m0 / per; c < (m0 + rows) / per; c++)
      for (u32 k = 0; k < K; k++) {
        u32 a = mode ? start + c % C * 16 + c / C * lbo + k % 8 * span + k / 8 * sbo
                     : start + c * sbo + k % 8 * 16 + k / 8 * lbo;
        const u8* p = chunk(a);
        for (u32 j = 0; j < per; j++) {
          u32 m = c * per + j - m0;
          out[k_first ? k * ld + m : m * ld + k] = load_elem(ty, p + j * es);
        }
      }
  }
}

static void do_wgmma(TS* t, u32 wg, u32 pc) {
  Block* b = t->blk;
  Warp* warps = &b->warps[wg * 4];
  const WgArgs& w0 = *(const WgArgs*)warps[0].lane[0]->in;
  u32 N = w0.n, K = w0.types >> 16, ta = w0.types >> 4 & 15, tb = w0.types >> 8 & 15, td = w0.types & 15;
  int agent = 1 + wg;
  static thread_local double A[16 * 32], B[32 * 256], acc[256];
  read_matrix(warps[0].lane[0], w0.db, w0.trb, tb, 0, N, K, B, 256, true, agent, pc);
  u32 e = 4 / type_size(ta);
  for (u32 q = 0; q < 4; q++) {
    Warp& w = warps[q];
    const WgArgs& a0 = *(const WgArgs*)w.lane[0]->in;
    if (a0.da != w0.da || a0.db != w0.db || a0.scale_d != w0.scale_d)
      fail(w.lane[0], pc, "wgmma", 0, "the warps of the warpgroup pass different descriptors");
    if (w0.a_regs) {
      for (u32 i = 0; i < 32; i++) {
        const u32* r = ((const WgArgs*)w.lane[i]->in)->a;
        for (u32 k = 0; k < 4; k++)
          for (u32 j = 0; j < e; j++) {
            u32 v = r[k];
            u8 bytes[4];
            memcpy(bytes, &v, 4);
            A[(i / 4 + 8 * (k & 1)) * 32 + e * (i % 4) + j + 4 * e * (k >> 1)] = load_elem(ta, bytes + j * (4 / e));
          }
      }
    } else {
      read_matrix(w.lane[0], w0.da, w0.tra, ta, 16 * q, 16, K, A, 32, false, agent, pc);
    }
    double sign = (w0.neg & 1) != (w0.neg >> 1 & 1) ? -1 : 1;
    for (u32 m = 0; m < 16; m++) {
      for (u32 n = 0; n < N; n++) acc[n] = 0;
      for (u32 k = 0; k < K; k++) {
        double a = sign * A[m * 32 + k];
        const double* Bk = B + k * 256;
        for (u32 n = 0; n < N; n++) acc[n] += a * Bk[n];
      }
      for (u32 n = 0; n < N; n++) {
        u32 lane = m % 8 * 4 + n % 8 / 2;
        u32* d = ((const WgArgs*)w.lane[lane]->in)->d;
        u32 i = n / 8 * 4 + (m / 8) * 2 + n % 2;
        if (td == 0) {
          u32 r = i / 2, sh = 16 * (i & 1);
          double c = w0.scale_d ? h2f(u16(d[r] >> sh)) : 0;
          d[r] = (d[r] & ~(0xffffu << sh)) | u32(d2h(acc[n] + c)) << sh;
        } else if (td == 1) {
          d[i] = U((float)(acc[n] + (w0.scale_d ? F(d[i]) : 0.f)));
        } else {
          d[i] = u32(s64(acc[n])) + (w0.scale_d ? d[i] : 0);
        }
      }
    }
  }
}

extern "C" void wgmma_mma(Thread* T, u32 n, u32 types, const u32* a, u64 da, u64 db, u32 scale_d, u32 neg, u32 tra,
                          u32 trb, u32* d, u32 pc) {
  TS* t = ts(T);
  Block* b = t->blk;
  WgArgs args = {n, types, neg, tra, trb, scale_d != 0, a != nullptr, da, db, a, d};
  t->in = &args;
  u32 wg = t->warp_id / 4;
  if ((wg + 1) * 128 > b->nthreads || wg > 8) fail(t, pc, "wgmma", 0, "the warpgroup is incomplete");
  WgRendezvous& r = b->wg[wg];
  if (!r.waiting.empty() && r.pc != pc)
    fail(t, pc, "warp divergence", 0, "threads of the warpgroup are at different wgmma instructions");
  r.pc = pc;
  if (r.waiting.size() < 127) {
    r.waiting.push_back(t);
    block_thread(t, W_COLL, pc);
    return;
  }
  std::vector<TS*> w;
  w.swap(r.waiting);
  do_wgmma(t, wg, pc);
  t->g->progress++;
  for (u32 q = 0; q < 4; q++) join_warp(&b->warps[wg * 4 + q], ~0u);
  for (TS* x : w) wake(x);
}

extern "C" void wgmma_fence(Thread*, u32) {}

extern "C" void wgmma_commit(Thread* T, u32) {
  TS* t = ts(T);
  t->wg_stamps.push_back(new_epoch(t->g));
}

extern "C" void wgmma_wait(Thread* T, u32 keep, u32) {
  TS* t = ts(T);
  u32 agent = 1 + t->warp_id / 4;
  while (t->wg_stamps.size() > keep) {
    t->agents[agent] = std::max(t->agents[agent], t->wg_stamps.front());
    t->wg_stamps.pop_front();
    t->ext_dirty = true;
  }
}
