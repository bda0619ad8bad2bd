// Runtime-private structures: fibers, blocks, shadow memory and happens-before state.
#pragma once
#include <unordered_map>
#include <vector>

#include "device.h"

// ---- launch description (mirrored by ctypes in module.py) --------------------------------------

struct BlockCount {  // of a basic block
  u64 issues, threads;
};
struct SiteCount {  // of an instruction: global requests, shared requests
  u64 requests, bytes, sectors, shared_requests, wavefronts, ideal, kinds;
};

struct Profile {  // see profile.cpp; filled by the launch
  BlockCount* blocks;
  SiteCount* sites;
  u8 *read, *written;   // per arena byte
  const s32* rank;      // per basic block: its place in the control flow, loops contiguous
  const s32* loop_end;  // per loop head: rank of the loop's last block; else -1
  u32 nblocks, nsites;
  u64 widths[2][6];  // thread accesses of 1 2 4 8 16 32 bytes: loads, stores
};

struct ErrorInfo {
  u32 set, pc, pc2, has_pc2;
  u32 block[3], tid[3], tid2[3];
  u32 pad;
  u64 addr;
  char kind[64];
  char msg[2048];
};

struct Launch {
  void (*fn)(Thread*);
  const u8* params;
  u8* arena;    // global memory; device address = WIN_GLOBAL + offset
  u8* gshadow;  // one byte per arena byte, see SH_*
  u64 arena_bytes;
  const u32* shared_ranges;  // (offset, size) of each static shared variable
  u64 seed;
  double timeout;          // seconds, 0 = none
  u32 *gwriter, *greader;  // per arena byte: block that wrote / read it (0 none), or null
  u64 icount;              // out: PTX instructions executed
  u32 param_bytes, n_shared_ranges;
  u32 grid[3], block[3];
  u32 dyn_offset, dyn_bytes, local_bytes, stack_bytes;
  u32 order;                            // 0 forward, 1 reverse, 2 random
  u32 checks;                           // CK_* bits
  u32 workers, coresident, capability;  // capability: 10 major + minor
  Profile* profile;                     // or null
  ErrorInfo err;
};

enum { CK_MEM = 1, CK_RACE = 2, CK_EXIT = 4, CK_UNINIT = 8 };             // Launch::checks; UNINIT: shared reads
enum { SH_NONE = 0, SH_VALID = 1, SH_INIT = 3, SH_RO = 4, SH_ONCE = 8 };  // shadow byte values
constexpr u32 SMEM_START = 1024;

// ---- happens-before ----------------------------------------------------------------------------
// Every access is stamped with the group's logical clock `now`, which advances at each
// synchronisation.  A thread knows of another thread's accesses up to some stamp.

struct Cell {     // shadow of 1, 2 or 4 shared bytes: last write and two concurrent reads
  u64 w, r0, r1;  // stamp << 32 | pc << 15 | atomic << 14 | thread
};

struct SyncClock {  // what a barrier object passes from arrivers to waiters
  std::vector<u32> vc;
};

// ---- threads -----------------------------------------------------------------------------------

struct Group;
struct Profiler;
struct WarpTrace;

enum Wait { W_NONE, W_COLL, W_BAR, W_ACTIVE };

struct TS : Thread {
  void* sp;
  Group* g;
  u32 gid;  // index in the group
  bool exited;
  Wait wait;
  u32 wait_pc;
  u64 wait_arg;
  // happens-before knowledge
  u32 base, wbase;
  bool has_ext, ext_dirty;
  std::vector<u32> ext;
  bool has_fence, has_acq;           // fence_clock: knowledge at the last fence, published by
  SyncClock fence_clock, acq_clock;  // strong stores; acq_clock: seen by strong loads, for a fence
  // collectives
  const void* in;
  void* out;
  u32 spins;
  u8 *local_mem, *stack_low;
  WarpTrace* trace;
};

typedef void (*CollFn)(Warp* w, u32 lanes, u64 aux, u32 pc);
struct Coll {
  u32 op, mask, arrived, pc;
  CollFn fn;
  u64 aux;
};

struct Warp {
  TS* lane[32];
  Block* blk;
  u32 exist, exited, runnable, index;
  u32 active_wait;  // lanes waiting in activemask
  std::vector<Coll> colls;
};

struct Bar {
  u32 arrived, expected, popc, conj, disj;
  bool is_all;
  u32 warp_pc[64];  // pc + 1 of each warp's arrival (for .aligned)
  std::vector<TS*> waiting, members;
  SyncClock clock;
};

struct Block {
  Group* g;
  u32 ctaid[3], nthreads, exited, id;  // id: linear block index + 1
  u8 *smem, *sinit;
  u32 smem_size;
  u32 shift;  // log2 of bytes per Cell
  std::vector<Cell> cells;
  std::vector<Warp> warps;
  std::vector<TS*> threads;
  Bar bars[16];
};

struct Group {  // blocks that run together: one block, or a co-resident grid
  Launch* L;
  void* main_sp;
  std::vector<TS> threads;
  std::vector<Block> blocks;
  u32 nthreads, nblocks, live;
  std::vector<TS*> ready;
  u32 head, count;
  u32 now;
  u64 rng;
  bool failed;
  std::unordered_map<u64, SyncClock> locations;  // released through strong accesses
  u8 *stacks, *locals;
  u64 stack_stride;
  double deadline;
  Profiler* prof;
};

// ---- runtime.cpp -------------------------------------------------------------------------------

[[noreturn]] void fail(TS* t, u32 pc, const char* kind, u64 addr, const char* fmt, ...)
    __attribute__((format(printf, 5, 6)));
void block_thread(TS* t, Wait w, u32 pc, u64 arg = 0);
void wake(TS* t);
void yield_thread(TS* t);
u32 new_epoch(Group* g);
void release_to(TS* t, SyncClock& c);
void acquire_from(TS* t, const SyncClock& c);
void join_warp(Warp* w, u32 mask);
void coll_check_exit(Warp* w);                   // warp.cpp: a lane exited
void mma(Warp* w, u32 lanes, u64 code, u32 pc);  // mma.cpp
const char* read_string(TS* t, u64 addr, u32 pc, char* buf, size_t n);
void prof_init(Group* g);  // profile.cpp; nothing unless Launch::profile is set
void prof_start(Group* g);
void prof_exit(TS* t);
void prof_finish(Group* g);
inline TS* ts(Thread* t) { return static_cast<TS*>(t); }
inline bool checks(TS* t, u32 bit) { return t->L->checks & bit; }
