// cp.async: the bytes land in shared memory only when the issuing thread waits for them.
#include "runtime.h"

extern "C" void cp_async(Thread* T, u64 dst, u64 src, u32 size, u32 src_size, u32 pc) {
  TS* t = ts(T);
  u32 off;
  Block* b = shared_block(t, dst, size, pc, &off);
  if (src_size > size) fail(t, pc, "cp.async", src, "src-size %u exceeds cp-size %u", src_size, size);
  if (checks(t, CK_MEM)) {
    if (off & (size - 1))
      fail(t, pc, "misaligned", WIN_SHARED + dst, "%u-byte cp.async to a misaligned shared address", size);
    if (src & (size - 1)) fail(t, pc, "misaligned", src, "%u-byte cp.async from a misaligned global address", size);
  }
  CpOp op;
  op.dst = off;
  op.size = size;
  op.pc = pc;
  memset(op.data, 0, sizeof op.data);
  for (u32 i = 0; i < src_size;) {  // the source in naturally aligned pieces (src-size may be any)
    u32 n = src_size - i >= 16 ? 16 : src_size - i >= 8 ? 8 : src_size - i >= 4 ? 4 : src_size - i >= 2 ? 2 : 1;
    memcpy(op.data + i, mem_global(T, src + i, n, AC_READ, pc), n);
    i += n;
  }
  if (checks(t, CK_MEM)) {
    mem_shared(T, dst, size, AC_WRITE, pc);  // bounds, hazards with other accesses
    set_state(b, off, size, SH_PENDING);
  }
  t->cp_open.push_back(op);
}

static void land(TS* t, std::vector<CpOp>& ops) {
  for (CpOp& op : ops) copy_shared_write(t, t->blk, op.dst, op.data, op.size, op.pc, -1, 0);
  ops.clear();
}

extern "C" void cp_async_commit(Thread* T) {
  TS* t = ts(T);
  t->cp_groups.emplace_back();
  t->cp_groups.back().swap(t->cp_open);
}

extern "C" void cp_async_wait(Thread* T, u32 keep, bool all, u32) {
  TS* t = ts(T);
  while (t->cp_groups.size() > keep) {
    land(t, t->cp_groups.front());
    t->cp_groups.pop_front();
  }
  if (all) land(t, t->cp_open);
  // copies handed to an mbarrier (cp.async.mbarrier.arrive) complete as well
  for (size_t i = 0; i < t->g->copies.size();) {
    if (t->g->copies[i].kind == 2 && t->g->copies[i].t == t) complete_copy(t->g, i);
    else i++;
  }
}

// Write bytes that were SH_PENDING and mark them initialised.
void copy_shared_write(TS* t, Block* b, u32 off, const u8* data, u32 size, u32 pc, int agent, u32) {
  memcpy(b->smem + off, data, size);
  if (checks(t, CK_MEM)) set_state(b, off, size, SH_INIT);
  race_access(t, b, off, size, AC_WRITE, pc, agent);
}
