"""Profile counters of a launch: instruction issues, memory traffic, shared-memory wavefronts."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass, field

import numpy as np

from .codegen import FLOATS, mem_space

SITE = ["requests", "bytes", "sectors", "shared_requests", "wavefronts", "ideal", "kinds"]  # SiteCount
KIND = ["", "ld", "st", "atom", "ld", "st", "atom", "ldmatrix", "stmatrix"]
WIDTHS = (1, 2, 4, 8, 16, 32)

MUFU = {"ex2", "rcp", "rsqrt", "sqrt", "sin", "cos", "lg2", "tanh"}
BRANCH = {"bra", "brx", "call", "ret", "exit", "trap"}
SYNC = {"bar", "barrier", "fence", "membar", "nanosleep"}
SHUFFLE = {"shfl", "vote", "match", "redux", "activemask"}
FMA = {"add", "sub", "mul", "fma", "mad"}
ALU = {"min", "max", "abs", "neg", "copysign", "testp", "setp", "set", "selp", "slct", "cvt"}
INT = {
    "add",
    "sub",
    "addc",
    "subc",
    "mul",
    "mad",
    "mul24",
    "mad24",
    "madc",
    "div",
    "rem",
    "min",
    "max",
    "abs",
    "neg",
    "sad",
    "and",
    "or",
    "xor",
    "not",
    "cnot",
    "shl",
    "shr",
    "shf",
    "bfe",
    "bfi",
    "bfind",
    "bmsk",
    "szext",
    "fns",
    "lop3",
    "prmt",
    "dp4a",
    "dp2a",
    "popc",
    "clz",
    "brev",
}


def op_class(opcode: str) -> str:
    """Class of a PTX opcode; generic ld and st are resolved by what they touched."""
    base, *mods = opcode.split(".")
    is_float = any(m in FLOATS or m == "f32x2" for m in mods)
    if base in ("ld", "ldu", "st"):
        space = mem_space(mods)
        return f"{'st' if base == 'st' else 'ld'}.{space}" if space in ("global", "shared", "generic") else "other"
    if base in ("atom", "red"):
        return "atomic"
    if base == "mma":
        return "tensor"
    if base in ("ldmatrix", "stmatrix"):
        return base
    if base in BRANCH:
        return "branch"
    if base in SYNC:
        return "sync"
    if base in SHUFFLE:
        return "shuffle"
    if base in MUFU or base == "div" and is_float:
        return "mufu"
    if base in FMA and is_float:
        return "fma"
    if base in INT and not is_float:
        return "int"
    if base in ALU:
        return "alu"
    return "mov" if base in ("mov", "cvta") else "other"


# ---- control flow graph --------------------------------------------------------------------------


def successors(blocks) -> list:
    """Blocks that may follow each basic block within its function."""
    first = {(b.fn.name, name): i for i, b in enumerate(blocks) for name in b.labels}
    out = []
    for i, b in enumerate(blocks):
        last, to = b.last, []
        if last.base == "bra":
            to.append(first.get((b.fn.name, last.ops[0].name)))
        elif last.base == "brx":
            to += [first.get((b.fn.name, t)) for t in b.fn.tables[last.ops[1].name]]
        if last.guard is not None or last.base not in ("bra", "brx", "ret", "exit", "trap"):
            to.append(i + 1 if i + 1 < len(blocks) and blocks[i + 1].fn is b.fn else None)
        out.append([t for t in to if t is not None])
    return out


def components(nodes, succ) -> list:
    """Strongly connected components of a subgraph, in topological order (Tarjan, without recursion)."""
    inside, index, low, on_stack, stack, out = set(nodes), {}, {}, set(), [], []
    for root in nodes:
        if root in index:
            continue
        work = [(root, iter(succ[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, it = work[-1]
            for s in it:
                if s not in inside:
                    continue
                if s not in index:
                    index[s] = low[s] = len(index)
                    stack.append(s)
                    on_stack.add(s)
                    work.append((s, iter(succ[s])))
                    break
                if s in on_stack:
                    low[node] = min(low[node], index[s])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    part = []
                    while not part or part[-1] != node:
                        part.append(stack.pop())
                        on_stack.discard(part[-1])
                    out.append(sorted(part))
    return out[::-1]


def block_order(unit):
    """rank: an order of the basic blocks in which every loop is contiguous, its head first, and what follows a branch
    or loop comes later; called functions come before their callers.  loop_end: rank of a loop's last block, by head."""
    blocks = unit.blocks
    succ = successors(blocks)
    pred = [[] for _ in blocks]
    for i, to in enumerate(succ):
        for t in to:
            pred[t].append(i)
    order, heads = [], []

    def place(nodes, succ):
        for part in components(nodes, succ):
            if len(part) == 1:
                order.append(part[0])
                if part[0] in succ[part[0]]:
                    heads.append((part[0], len(order) - 1))
                continue
            inside = set(part)
            head = next((b for b in part if any(p not in inside for p in pred[b])), part[0])
            order.append(head)
            place([b for b in part if b != head], succ)
            heads.append((head, len(order) - 1))

    for fn in reversed(unit.functions):  # callees were found after their callers
        place([i for i, b in enumerate(blocks) if b.fn is fn], succ)
    rank, loop_end = np.zeros(len(blocks), np.int32), np.full(len(blocks), -1, np.int32)
    rank[order] = np.arange(len(blocks))
    for head, end in heads:
        loop_end[head] = end
    return rank, loop_end


# ---- counters ------------------------------------------------------------------------------------


class ProfileStruct(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("blocks", "sites", "read", "written", "rank", "loop_end")] + [
        ("nblocks", ctypes.c_uint32),
        ("nsites", ctypes.c_uint32),
        ("widths", ctypes.c_uint64 * 12),
    ]


class Recorder:
    """The arrays that a launch fills in."""

    def __init__(self, unit, arena_bytes):
        self.unit = unit
        self.blocks = np.zeros((len(unit.blocks), 2), np.uint64)
        self.sites = np.zeros((len(unit.sites), len(SITE)), np.uint64)
        self.touched = np.zeros((2, arena_bytes), np.uint8)
        if unit.order is None:
            unit.order = block_order(unit)
        s = self.struct = ProfileStruct()
        s.blocks, s.sites = self.blocks.ctypes.data, self.sites.ctypes.data
        s.read, s.written = self.touched[0].ctypes.data, self.touched[1].ctypes.data
        s.rank, s.loop_end = (a.ctypes.data for a in unit.order)
        s.nblocks, s.nsites = len(unit.blocks), len(unit.sites)


@dataclass
class GlobalTraffic:
    """requests: by warp instructions; bytes: asked for by the threads; unique_bytes: different bytes
    touched in the launch; sectors: 32-byte sectors summed over the requests; widths: bytes per thread -> accesses."""

    requests: int = 0
    bytes: int = 0
    unique_bytes: int = 0
    sectors: int = 0
    widths: dict = field(default_factory=dict)

    @property
    def ratio(self):
        """Bytes moved in sectors per unique byte (1: every byte once, no sector shared by two requests)."""
        return 32 * self.sectors / self.unique_bytes if self.unique_bytes else 0.0


@dataclass
class SharedTraffic:
    """wavefronts: passes over the banks; ideal: without bank conflicts."""

    requests: int = 0
    wavefronts: int = 0
    ideal: int = 0

    @property
    def per_request(self):
        return self.wavefronts / self.requests if self.requests else 0.0

    @property
    def conflict(self):
        """Wavefronts over the ideal: 1 = free of conflicts."""
        return self.wavefronts / self.ideal if self.ideal else 0.0


@dataclass
class LineProfile:
    """Counters of one source line ("file.cu:12"; without -lineinfo "PTX line 34")."""

    source: str
    issues: int = 0
    threads: int = 0
    classes: dict = field(default_factory=dict)
    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    shared_requests: int = 0
    wavefronts: int = 0
    ideal: int = 0


class Profile:
    """Counters of one launch (see the README): instructions, thread_instructions, by_class, by_opcode,
    loads and stores (GlobalTraffic), shared (SharedTraffic by ld st atom ldmatrix stmatrix), lines."""

    def __init__(self, recorder: Recorder, kernel: str, line_of):
        unit = recorder.unit
        self.kernel = kernel
        self.by_class, self.by_opcode, lines = {}, {}, {}
        self.instructions = self.thread_instructions = 0
        self.loads, self.stores, self.shared = GlobalTraffic(), GlobalTraffic(), {}
        sites = recorder.sites.astype(int)
        issues = np.zeros((len(unit.sites), 2), int)
        for b, n in zip(unit.blocks, recorder.blocks.astype(int)):
            issues[b.pcs] += n
        for pc, (site, (n, threads)) in enumerate(zip(unit.sites, issues)):
            if not n:
                continue
            n, threads = int(n), int(threads)
            opcode = site[3]
            count = dict(zip(SITE, map(int, sites[pc])))
            cls = op_class(opcode)
            if cls.endswith("generic"):
                cls = cls[:3] + ("shared" if count["shared_requests"] else "global" if count["requests"] else "other")
                cls = "other" if cls.endswith("other") else cls
            self.instructions += n
            self.thread_instructions += threads
            self.by_class[cls] = self.by_class.get(cls, 0) + n
            self.by_opcode[opcode] = self.by_opcode.get(opcode, 0) + n
            name = line_of(pc)
            line = lines.setdefault(name, LineProfile(name))
            line.issues += n
            line.threads += threads
            line.classes[cls] = line.classes.get(cls, 0) + n
            for key in SITE[:-1]:
                setattr(line, key, getattr(line, key) + count[key])
            kinds = [k for k in range(1, len(KIND)) if count["kinds"] >> k & 1]
            for k in kinds:
                if k <= 3:
                    traffic = self.stores if k in (2, 3) else self.loads
                    traffic.requests += count["requests"]
                    traffic.bytes += count["bytes"]
                    traffic.sectors += count["sectors"]
                else:
                    s = self.shared.setdefault(KIND[k], SharedTraffic())
                    s.requests += count["shared_requests"]
                    s.wavefronts += count["wavefronts"]
                    s.ideal += count["ideal"]
        for i, traffic in enumerate((self.loads, self.stores)):
            traffic.unique_bytes = int(np.count_nonzero(recorder.touched[i]))
            traffic.widths = {w: int(n) for w, n in zip(WIDTHS, recorder.struct.widths[6 * i : 6 * i + 6]) if n}
        self.by_class = dict(sorted(self.by_class.items(), key=lambda x: -x[1]))
        self.by_opcode = dict(sorted(self.by_opcode.items(), key=lambda x: -x[1]))
        self.lines = sorted(lines.values(), key=lambda x: -x.issues)

    def as_dict(self) -> dict:
        """Everything as plain dicts and numbers (for JSON)."""

        def traffic(t):
            return {**asdict(t), "ratio": t.ratio}

        return {
            "kernel": self.kernel,
            "instructions": self.instructions,
            "thread_instructions": self.thread_instructions,
            "by_class": self.by_class,
            "by_opcode": self.by_opcode,
            "global": {"loads": traffic(self.loads), "stores": traffic(self.stores)},
            "shared": {k: {**asdict(s), "conflict": s.conflict} for k, s in self.shared.items()},
            "lines": [asdict(x) for x in self.lines],
        }

    def report(self, top: int = 15) -> str:
        """A text table: totals, then the source lines that issue most, and lines with bank conflicts."""
        lanes = self.thread_instructions / max(self.instructions, 1)
        out = [
            f"{self.kernel}: {self.instructions} warp instructions, {lanes:.1f} lanes each",
            "  " + ", ".join(f"{c} {n}" for c, n in self.by_class.items()),
        ]
        for name, t in (("global loads", self.loads), ("global stores", self.stores)):
            if t.requests:
                widths = ", ".join(f"{n} of {w} B" for w, n in t.widths.items())
                out.append(
                    f"  {name}: {t.bytes} bytes ({t.unique_bytes} unique) in {t.requests} requests, "
                    f"{t.sectors} sectors, traffic ratio {t.ratio:.2f}; {widths}"
                )
        for name, s in self.shared.items():
            out.append(
                f"  shared {name}: {s.requests} requests, {s.wavefronts} wavefronts "
                f"(ideal {s.ideal}, {s.conflict:.2f}x)"
            )
        out += [
            "",
            f"  {'source line':<32}{'issues':>10}{'%':>6}{'lanes':>7}{'sectors':>10}{'per req':>8}{'wavefr.':>10}"
            f"{'ideal':>8}{'conflict':>9}  classes",
        ]
        shown = self.lines[:top]
        shown += [x for x in self.lines[top:] if x.wavefronts > x.ideal][:top]
        for x in shown:
            g = f"{x.sectors:>10}{x.sectors / x.requests:>8.1f}" if x.requests else " " * 18
            s = f"{x.wavefronts:>10}{x.ideal:>8}{x.wavefronts / x.ideal:>8.2f}x" if x.ideal else " " * 27
            classes = " ".join(f"{c} {n}" for c, n in sorted(x.classes.items(), key=lambda y: -y[1])[:4])
            out.append(
                f"  {x.source[-31:]:<32}{x.issues:>10}{100 * x.issues / max(self.instructions, 1):>6.1f}"
                f"{x.threads / x.issues:>7.1f}{g}{s}  {classes}"
            )
        return "\n".join(out)
