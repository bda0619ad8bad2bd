// Warp collectives: shfl, vote, match, redux, ldmatrix, stmatrix, movmatrix; the arithmetic of mma is in mma.cpp.
#include "runtime.h"

#include <algorithm>

// Wait until every live lane of `mask` has arrived with the same op; the last one runs fn for all.
static void complete(Warp* w, Coll c, TS* self) {
  c.fn(w, c.arrived, c.aux, c.pc);
  join_warp(w, c.arrived);
  if (w->blk->g->L->order == 1) {
    for (int i = 31; i >= 0; i--)
      if ((c.arrived >> i & 1) && w->lane[i] != self) wake(w->lane[i]);
  } else {
    for (int i = 0; i < 32; i++)
      if ((c.arrived >> i & 1) && w->lane[i] != self) wake(w->lane[i]);
  }
}

static void collective(TS* t, u32 op, u32 mask, u32 pc, CollFn fn, u64 aux, bool aligned) {
  Warp* w = t->warp;
  u32 bit = 1u << t->lane;
  if (!(mask & bit))
    fail(t, pc, "warp mask", 0, "the executing lane %u is not in its member mask 0x%08x", t->lane, mask);
  if (aligned && (w->exited & mask & w->exist))
    fail(t, pc, "warp divergence", 0, "lanes 0x%08x of the warp have exited", w->exited);
  Coll* c = nullptr;
  for (Coll& x : w->colls)
    if (x.op == op && x.mask == mask && !(x.arrived & bit)) {
      c = &x;
      break;
    }
  if (!c) {
    w->colls.push_back({op, mask, 0, pc, fn, aux});
    c = &w->colls.back();
  }
  c->arrived |= bit;
  u32 need = mask & w->exist & ~w->exited;
  if ((c->arrived & need) == need) {
    Coll done = *c;
    w->colls.erase(w->colls.begin() + (c - w->colls.data()));
    complete(w, done, t);
    return;
  }
  block_thread(t, W_COLL, pc, op);
}

void coll_check_exit(Warp* w) {
  for (size_t i = 0; i < w->colls.size(); i++) {
    Coll c = w->colls[i];
    u32 need = c.mask & w->exist & ~w->exited;
    if ((c.arrived & need) != need) continue;
    w->colls.erase(w->colls.begin() + i);
    complete(w, c, nullptr);
    return;
  }
}

#define EACH(i, lanes)         \
  for (u32 i = 0; i < 32; i++) \
    if ((lanes) >> i & 1)
template <typename X>
static const X& arg(Warp* w, u32 i) {
  return *(const X*)w->lane[i]->in;
}
template <typename X>
static X& res(Warp* w, u32 i) {
  return *(X*)w->lane[i]->out;
}
constexpr u32 ALIGNED = 0x80000000u;

// ---- shfl --------------------------------------------------------------------------------------

struct ShflIn {
  u32 a, b, c;
};
struct ShflOut {
  u32 v;
  bool p;
};

static void do_shfl(Warp* w, u32 lanes, u64 mode, u32 pc) {
  EACH(i, lanes) {
    const ShflIn& s = arg<ShflIn>(w, i);
    u32 bval = s.b & 31, cval = s.c & 31, seg = s.c >> 8 & 31;
    u32 maxl = (i & seg) | (cval & ~seg), minl = i & seg;
    u32 j = i;
    bool p = false;
    s32 k;
    switch (mode) {
      case 0:
        k = minl | (bval & ~seg);
        p = k <= (s32)maxl;
        break;
      case 1:
        k = s32(i) - s32(bval);
        p = k >= (s32)maxl;
        break;
      case 2:
        k = i + bval;
        p = k <= (s32)maxl;
        break;
      default:
        k = i ^ bval;
        p = k <= (s32)maxl;
        break;
    }
    if (p) j = k;
    if (!(lanes >> j & 1)) {
      TS* t = w->lane[i];
      if (checks(t, CK_MEM))
        fail(t, pc, "warp shuffle", 0, "lane %u reads from lane %u, which does not take part (mask 0x%08x)", i, j,
             lanes);
      j = i;
    }
    res<ShflOut>(w, i) = {arg<ShflIn>(w, j).a, p};
  }
}

extern "C" u32 warp_shfl(Thread* T, u32 op, u32 a, u32 b, u32 c, u32 mask, bool* pred, u32 mode, u32 pc) {
  TS* t = ts(T);
  ShflIn in = {a, b, c};
  ShflOut out;
  t->in = &in;
  t->out = &out;
  collective(t, op, mask, pc, do_shfl, mode, false);
  *pred = out.p;
  return out.v;
}

// ---- vote, match, redux ------------------------------------------------------------------------

static void do_vote(Warp* w, u32 lanes, u64 mode, u32) {
  u32 ballot = 0;
  EACH(i, lanes) ballot |= u32(arg<bool>(w, i)) << i;
  u32 v = mode == 0 ? ballot == lanes : mode == 1 ? ballot != 0 : mode == 2 ? ballot == 0 || ballot == lanes : ballot;
  EACH(i, lanes) res<u32>(w, i) = v;
}
extern "C" u32 warp_vote(Thread* T, u32 op, bool p, u32 mask, u32 mode, u32 pc) {
  TS* t = ts(T);
  u32 out;
  t->in = &p;
  t->out = &out;
  collective(t, op, mask, pc, do_vote, mode, false);
  return out;
}

static void do_match(Warp* w, u32 lanes, u64 all, u32) {
  u32 full = 0;
  EACH(i, lanes) {
    u32 m = 0;
    EACH(j, lanes) m |= u32(arg<u64>(w, i) == arg<u64>(w, j)) << j;
    res<u32>(w, i) = m;
    full += m == lanes;
  }
  if (all) EACH(i, lanes) res<u32>(w, i) = full ? lanes : 0;
}
extern "C" u32 warp_match(Thread* T, u32 op, u64 v, u32 mask, bool all, bool* pred, u32 pc) {
  TS* t = ts(T);
  u32 out;
  t->in = &v;
  t->out = &out;
  collective(t, op, mask, pc, do_match, all, false);
  *pred = out != 0;
  return out;
}

static void do_redux(Warp* w, u32 lanes, u64 mode, u32) {
  bool first = true, sgn = mode & 8;
  u32 r = 0;
  EACH(i, lanes) {
    u32 v = arg<u32>(w, i);
    if (first) {
      r = v;
      first = false;
      continue;
    }
    switch (mode & 7) {
      case 0: r += v; break;
      case 1: r = sgn ? std::min<s32>(r, v) : std::min(r, v); break;
      case 2: r = sgn ? std::max<s32>(r, v) : std::max(r, v); break;
      case 3: r &= v; break;
      case 4: r |= v; break;
      default: r ^= v;
    }
  }
  EACH(i, lanes) res<u32>(w, i) = r;
}
extern "C" u32 warp_redux(Thread* T, u32 op, u32 v, u32 mask, u32 mode, u32 pc) {
  TS* t = ts(T);
  u32 out;
  t->in = &v;
  t->out = &out;
  collective(t, op, mask, pc, do_redux, mode, false);
  return out;
}

static void do_nothing(Warp*, u32, u64, u32) {}
extern "C" void warp_sync(Thread* T, u32 op, u32 mask, u32 pc) {
  collective(ts(T), op, mask, pc, do_nothing, 0, false);
}

extern "C" u32 warp_activemask(Thread* T, u32 pc) {
  TS* t = ts(T);
  u32 out = 0;
  t->out = &out;
  t->warp->active_wait |= 1u << t->lane;
  block_thread(t, W_ACTIVE, pc);
  return out;
}

// ---- ldmatrix, stmatrix, movmatrix -------------------------------------------------------------
// The row accesses are checked with the clock of the lane that gave the address, before the
// collective orders the warp: an st.shared by another lane needs a barrier before ldmatrix.

struct MatIn {
  u64 addr;
  u32 v[4];
};
struct MatOut {
  u32 d[4];
};

static void do_ldmatrix(Warp* w, u32, u64 aux, u32 pc) {
  u32 num = aux & 7;
  bool trans = aux & 8;
  u16 m[8][8];
  for (u32 k = 0; k < num; k++) {
    for (u32 r = 0; r < 8; r++) {
      u32 src = 8 * k + r;
      memcpy(m[r], mem_shared(w->lane[src], arg<MatIn>(w, src).addr, 16, AC_READ, pc), 16);
    }
    for (u32 i = 0; i < 32; i++) {
      u32 r = i / 4, c = 2 * (i % 4);
      res<MatOut>(w, i).d[k] = trans ? pack2(m[c][r], m[c + 1][r]) : pack2(m[r][c], m[r][c + 1]);
    }
  }
}
extern "C" void warp_ldmatrix(Thread* T, u64 addr, u32* d, u32 num, bool trans, bool generic, u32 pc) {
  TS* t = ts(T);
  MatIn in = {generic ? addr - WIN_SHARED : addr, {}};
  MatOut out;
  t->in = &in;
  t->out = &out;
  collective(t, ALIGNED | pc, ~0u, pc, do_ldmatrix, num | trans << 3, true);
  memcpy(d, out.d, 16);
}

static void do_stmatrix(Warp* w, u32, u64 aux, u32 pc) {
  u32 num = aux & 7;
  bool trans = aux & 8;
  u16 m[8][8];
  for (u32 k = 0; k < num; k++) {
    for (u32 i = 0; i < 32; i++) {
      u32 r = i / 4, c = 2 * (i % 4), v = arg<MatIn>(w, i).v[k];
      if (trans) m[c][r] = lo(v), m[c + 1][r] = hi(v);
      else m[r][c] = lo(v), m[r][c + 1] = hi(v);
    }
    for (u32 r = 0; r < 8; r++) {
      u32 dst = 8 * k + r;
      memcpy(mem_shared(w->lane[dst], arg<MatIn>(w, dst).addr, 16, AC_WRITE, pc), m[r], 16);
    }
  }
}
extern "C" void warp_stmatrix(Thread* T, u64 addr, const u32* s, u32 num, bool trans, bool generic, u32 pc) {
  TS* t = ts(T);
  MatIn in = {generic ? addr - WIN_SHARED : addr, {s[0], s[1], s[2], s[3]}};
  t->in = &in;
  collective(t, ALIGNED | pc, ~0u, pc, do_stmatrix, num | trans << 3, true);
}

static void do_movmatrix(Warp* w, u32, u64, u32) {
  u16 m[8][8];
  for (u32 i = 0; i < 32; i++) {
    m[i / 4][2 * (i % 4)] = lo(arg<u32>(w, i));
    m[i / 4][2 * (i % 4) + 1] = hi(arg<u32>(w, i));
  }
  for (u32 i = 0; i < 32; i++) res<u32>(w, i) = pack2(m[2 * (i % 4)][i / 4], m[2 * (i % 4) + 1][i / 4]);
}
extern "C" u32 warp_movmatrix(Thread* T, u32 a, u32 pc) {
  TS* t = ts(T);
  u32 out;
  t->in = &a;
  t->out = &out;
  collective(t, ALIGNED | pc, ~0u, pc, do_movmatrix, 0, true);
  return out;
}

// ---- mma ---------------------------------------------------------------------------------------

extern "C" void warp_mma(Thread* T, u32 shape, const u32* abc, u32* d, u32 pc) {
  TS* t = ts(T);
  t->in = abc;
  t->out = d;
  collective(t, ALIGNED | pc, ~0u, pc, mma, shape, true);
}
