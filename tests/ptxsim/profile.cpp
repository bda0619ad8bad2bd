// Profile counters (launch(..., profile=True)).
//
// Each lane logs the basic blocks it enters and its memory accesses.  The logs of a warp's lanes are merged
// as if the lanes had run in lockstep, parted at branches and met again as early as the control flow allows.
// One merged block is one issue of each of its instructions; the accesses its lanes made at one instruction
// are one request.
#include "runtime.h"

#include <algorithm>
#include <mutex>

enum {  // mirrored in profile.py
  EV_BLOCK,
  LD_GLOBAL,
  ST_GLOBAL,
  ATOM_GLOBAL,
  LD_SHARED,
  ST_SHARED,
  ATOM_SHARED,
  LDMATRIX,
  STMATRIX
};

struct Event {
  u64 addr;
  u32 id;
  u16 size, kind;
};

struct LaneTrace {
  std::vector<Event> log;
  size_t pos = 0, complete = 0;  // merged up to pos; blocks before complete are finished
  size_t next_merge = 8192;
  s32 last = -1;  // block issued last
  bool done = true;
};

struct WarpTrace {
  Profiler* p;
  LaneTrace lane[32];
};

struct Profiler {
  Profile* out;
  std::vector<BlockCount> blocks;
  std::vector<SiteCount> sites;
  u64 widths[2][6] = {};
  u64 arena_bytes;
  std::vector<WarpTrace> warps;
};

// ---- requests ----------------------------------------------------------------------------------

static void touch(Profiler* p, bool store, u64 addr, u64 size) {
  u64 off = addr - WIN_GLOBAL;
  if (off < p->arena_bytes && off + size <= p->arena_bytes)
    memset((store ? p->out->written : p->out->read) + off, 1, size);
}

static void global_request(Profiler* p, u32 pc, u32 kind, const Event** e, u32 n) {
  SiteCount& s = p->sites[pc];
  u64 sector[64];
  u32 ns = 0;
  bool store = kind == ST_GLOBAL || kind == ATOM_GLOBAL;
  for (u32 i = 0; i < n; i++) {
    u64 a = e[i]->addr;
    u32 size = e[i]->size;
    sector[ns++] = a / 32;
    if ((a + size - 1) / 32 != a / 32) sector[ns++] = (a + size - 1) / 32;
    s.bytes += size;
    p->widths[store][size <= 1 ? 0 : std::min(31 - __builtin_clz(size), 5)]++;
    touch(p, store, a, size);
  }
  std::sort(sector, sector + ns);
  s.sectors += std::unique(sector, sector + ns) - sector;
  s.requests++;
  s.kinds |= 1u << kind;
}

// Passes over the 32 four-byte banks: 32 lanes of up to 4 bytes, 16 of 8 or 8 of 16 each; a pass takes as
// many cycles (wavefronts) as the busiest bank has different words.
static void shared_request(Profiler* p, u32 pc, u32 kind, const Event** e, const u8* lane, u32 n) {
  SiteCount& s = p->sites[pc];
  u32 group = e[0]->size >= 16 ? 8 : e[0]->size == 8 ? 16 : 32;
  for (u32 first = 0, i = 0; first < 32 && i < n; first += group) {
    u32 words[64], nw = 0, per_bank[32] = {}, worst = 0;
    for (; i < n && lane[i] < first + group; i++)
      for (u64 a = e[i]->addr / 4; a <= (e[i]->addr + e[i]->size - 1) / 4; a++) words[nw++] = u32(a);
    if (!nw) continue;
    std::sort(words, words + nw);
    nw = std::unique(words, words + nw) - words;
    for (u32 k = 0; k < nw; k++) worst = std::max(worst, ++per_bank[words[k] & 31]);
    s.wavefronts += worst;
    s.ideal++;
  }
  s.shared_requests++;
  s.kinds |= 1u << kind;
}

// ---- merging the lanes -------------------------------------------------------------------------

static void issue(WarpTrace* w, u32 lanes, u32 block) {
  Profiler* p = w->p;
  p->blocks[block].issues++;
  p->blocks[block].threads += __builtin_popcount(lanes);
  auto more = [](LaneTrace& l) { return l.pos < l.log.size() && l.log[l.pos].kind != EV_BLOCK; };
  for (u32 i = 0; i < 32; i++)
    if (lanes >> i & 1) w->lane[i].pos++;
  while (true) {
    u64 key = ~0ull;  // the next instruction of the block that accessed memory
    for (u32 i = 0; i < 32; i++) {
      LaneTrace& l = w->lane[i];
      if ((lanes >> i & 1) && more(l)) key = std::min(key, u64(l.log[l.pos].id) << 16 | l.log[l.pos].kind);
    }
    if (key == ~0ull) return;
    u32 pc = key >> 16, kind = key & 0xffff, n = 0;
    const Event* e[32];
    u8 who[32];
    for (u32 i = 0; i < 32; i++) {
      LaneTrace& l = w->lane[i];
      if (!(lanes >> i & 1) || !more(l) || l.log[l.pos].id != pc || l.log[l.pos].kind != kind) continue;
      who[n] = i;
      e[n++] = &l.log[l.pos++];
    }
    if (kind <= ATOM_GLOBAL) global_request(p, pc, kind, e, n);
    else shared_request(p, pc, kind, e, who, n);
  }
}

// Lanes at the earliest block run first, so that they meet again as soon as they can.  A lane that goes back
// to the head of a loop waits at the end of the loop for the lanes still in it.
static void merge(WarpTrace* w) {
  const s32 *rank = w->p->out->rank, *end = w->p->out->loop_end;
  while (true) {
    u64 best = ~0ull;
    u32 lanes = 0, block = 0;
    for (u32 i = 0; i < 32; i++) {
      LaneTrace& l = w->lane[i];
      if (l.pos >= l.complete) {
        if (l.done) continue;
        return;  // the lane's next block is not known yet
      }
      u32 b = l.log[l.pos].id;
      bool back = l.last >= 0 && rank[l.last] >= rank[b] && rank[l.last] <= end[b];
      u64 key = u64(back ? 2 * end[b] + 1 : 2 * rank[b]) << 32 | (0x7fffffffu - rank[b]);  // inner loops first
      if (key < best) best = key, block = b, lanes = 0;
      if (key == best) lanes |= 1u << i;
    }
    if (!lanes) return;
    issue(w, lanes, block);
    for (u32 i = 0; i < 32; i++)
      if (lanes >> i & 1) w->lane[i].last = block;
  }
}

static void merge_and_trim(WarpTrace* w) {
  merge(w);
  for (LaneTrace& l : w->lane) {
    l.log.erase(l.log.begin(), l.log.begin() + l.pos);
    l.complete -= l.pos;
    l.pos = 0;
    l.next_merge = l.log.size() + 8192;
  }
}

// ---- called by the generated code --------------------------------------------------------------

extern "C" void prof_block(Thread* T, u32 id) {
  WarpTrace* w = ts(T)->trace;
  LaneTrace& l = w->lane[T->lane];
  l.complete = l.log.size();
  l.log.push_back({0, id, 0, EV_BLOCK});
  if (l.log.size() >= l.next_merge) merge_and_trim(w);
}

extern "C" void prof_mem(Thread* T, u64 addr, u32 size, u32 kind, u32 pc) {
  ts(T)->trace->lane[T->lane].log.push_back({addr, pc, u16(size), u16(kind)});
}

// kind: of an access to global memory; generic addresses may be shared, local or parameters
extern "C" void prof_generic(Thread* T, u64 addr, u32 size, u32 kind, u32 pc) {
  if (in_win(addr, WIN_GLOBAL)) prof_mem(T, addr, size, kind, pc);
  else if (in_win(addr, WIN_SHARED)) prof_mem(T, addr - WIN_SHARED, size, kind + (LD_SHARED - LD_GLOBAL), pc);
}

// ---- life cycle --------------------------------------------------------------------------------

void prof_init(Group* g) {
  Profile* out = g->L->profile;
  if (!out) return;
  Profiler* p = g->prof = new Profiler;
  p->out = out;
  p->blocks.resize(out->nblocks);
  p->sites.resize(out->nsites);
  p->arena_bytes = g->L->arena_bytes;
  p->warps.resize((g->nthreads / g->nblocks + 31) / 32 * g->nblocks);
}

void prof_start(Group* g) {
  if (!g->prof) return;
  WarpTrace* w = g->prof->warps.data();
  for (Block& b : g->blocks)
    for (Warp& warp : b.warps) {
      w->p = g->prof;
      for (u32 i = 0; i < 32; i++) {
        LaneTrace& l = w->lane[i];
        l.log.clear();
        l.pos = l.complete = 0;
        l.next_merge = 8192;
        l.last = -1;
        l.done = !warp.lane[i];
        if (warp.lane[i]) warp.lane[i]->trace = w;
      }
      w++;
    }
}

void prof_exit(TS* t) {
  if (!t->g->prof) return;
  LaneTrace& l = t->trace->lane[t->lane];
  l.complete = l.log.size();
  l.done = true;
  if (t->warp->exited == t->warp->exist) merge(t->trace);
}

void prof_finish(Group* g) {
  static std::mutex mutex;
  if (!g->prof) return;
  std::lock_guard<std::mutex> lock(mutex);
  Profile* out = g->L->profile;
  auto add = [](void* to, const void* from, size_t bytes) {
    for (size_t i = 0; i < bytes / 8; i++) ((u64*)to)[i] += ((const u64*)from)[i];
  };
  add(out->blocks, g->prof->blocks.data(), out->nblocks * sizeof(BlockCount));
  for (u32 i = 0; i < out->nsites; i++) {
    u64 kinds = out->sites[i].kinds | g->prof->sites[i].kinds;
    add(&out->sites[i], &g->prof->sites[i], sizeof(SiteCount));
    out->sites[i].kinds = kinds;
  }
  add(out->widths, g->prof->widths, sizeof out->widths);
  delete g->prof;
  g->prof = nullptr;
}
