"""Public API: load PTX, compile its kernels for the CPU, launch them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass

import numpy as np

from . import parser as ptx
from .codegen import WIN_GLOBAL, WIN_SHARED, EntryCodegen, align_up
from .profile import Profile, ProfileStruct, Recorder
from .toolchain import CXX, HERE, cache_dir, check_sizes, find_nvcc, making, run

CK_MEM, CK_RACE, CK_EXIT, CK_UNINIT = 1, 2, 4, 8
SH_VALID, SH_INIT, SH_RO, SH_ONCE = 1, 3, 4, 8
MAX_REDZONE = 64 << 20  # between buffers: as large as they are, up to this (untouched pages cost nothing)
REDZONE = 512
RUNTIME_SOURCES = ("runtime.cpp", "warp.cpp", "mma.cpp", "profile.cpp")


# ---- errors and small helpers --------------------------------------------------------------------


class DeviceError(RuntimeError):
    """A fault of the simulated kernel.

    Attributes: what (kind of fault), kernel, ptx_line, source ("file.cu:line" or None), block, thread,
    address, buffer (description of the nearest buffer), detail, other (the earlier access of a race).
    """

    def __init__(
        self,
        what,
        kernel,
        detail,
        ptx_line=None,
        source=None,
        block=None,
        thread=None,
        address=None,
        buffer=None,
        other=None,
        instruction=None,
    ):
        self.what, self.kernel, self.detail = what, kernel, detail
        self.ptx_line, self.source, self.block, self.thread = ptx_line, source, block, thread
        self.address, self.buffer, self.other, self.instruction = address, buffer, other, instruction
        lines = [f"{what}: {detail}", f"  kernel {kernel}"]
        if ptx_line:
            lines.append(
                f"  at PTX line {ptx_line} ({instruction}), source {source or 'unknown (compile with -lineinfo)'}"
            )
        if block is not None:
            lines.append(f"  block {tuple(block)}, thread {tuple(thread)}")
        if address:
            lines.append(f"  address {address:#x}" + (f": {buffer}" if buffer else ""))
        if other:
            lines.append(f"  earlier access at {other}")
        super().__init__("\n".join(lines))


def to_bf16(x) -> np.ndarray:
    """float array -> uint16 array of bf16 bits, rounded to nearest even."""
    b = np.ascontiguousarray(x, np.float32).view(np.uint32)
    r = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(np.asarray(x, np.float32)), np.uint16(0x7FFF), r).astype(np.uint16)


def from_bf16(x) -> np.ndarray:
    """uint16 array of bf16 bits -> float32 array."""
    return (np.asarray(x, np.uint16).astype(np.uint32) << 16).view(np.float32)


class Out:
    """An output array: uninitialised at launch.

    complete: every element must be written.  once: no byte may be written twice.
    """

    def __init__(self, array: np.ndarray, complete: bool = True, once: bool = False):
        self.array, self.complete, self.once = array, complete, once


@dataclass
class LaunchResult:
    """instructions: PTX instructions executed by all threads; seconds: wall time of the run;
    profile: a Profile, when asked for."""

    instructions: int
    seconds: float
    profile: Profile | None = None

    @property
    def rate(self):
        return self.instructions / max(self.seconds, 1e-9)


# ---- compiling -------------------------------------------------------------------------------------


class _ErrorInfo(ctypes.Structure):
    _fields_ = [
        ("set", ctypes.c_uint32),
        ("pc", ctypes.c_uint32),
        ("pc2", ctypes.c_uint32),
        ("has_pc2", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("tid", ctypes.c_uint32 * 3),
        ("tid2", ctypes.c_uint32 * 3),
        ("pad", ctypes.c_uint32),
        ("addr", ctypes.c_uint64),
        ("kind", ctypes.c_char * 64),
        ("msg", ctypes.c_char * 2048),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("fn", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("arena", ctypes.c_void_p),
        ("gshadow", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_uint64),
        ("shared_ranges", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("timeout", ctypes.c_double),
        ("gwriter", ctypes.c_void_p),
        ("greader", ctypes.c_void_p),
        ("icount", ctypes.c_uint64),
        ("param_bytes", ctypes.c_uint32),
        ("n_shared_ranges", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dyn_offset", ctypes.c_uint32),
        ("dyn_bytes", ctypes.c_uint32),
        ("local_bytes", ctypes.c_uint32),
        ("stack_bytes", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("checks", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("coresident", ctypes.c_uint32),
        ("capability", ctypes.c_uint32),
        ("profile", ctypes.c_void_p),
        ("err", _ErrorInfo),
    ]


def _cpu_tag():
    try:
        with open("/proc/cpuinfo") as f:
            text = f.read()
        m = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
        return m.group(1) if m else ""
    except OSError:
        return ""


_FLAGS = [
    "-std=c++17",
    "-march=native",
    "-fPIC",
    "-shared",
    "-w",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fno-math-errno",
]
_runtime = None


def _compile(key_text, sources, out_prefix, opt):
    key = hashlib.sha256("\0".join([key_text, _cpu_tag(), CXX, *_FLAGS, *opt]).encode()).hexdigest()[:24]
    path = os.path.join(cache_dir(), f"{out_prefix}-{key}.so")
    if not os.path.exists(path):
        with making(f"{out_prefix}-{key}"):
            if not os.path.exists(path):
                tmp = f"{path}.{os.getpid()}.tmp"
                run([CXX, *_FLAGS, *opt, "-I", HERE, *sources, "-o", tmp])
                os.replace(tmp, path)
    return path


def _headers():
    out = []
    for name in ("alu.h", "device.h"):
        with open(os.path.join(HERE, name)) as f:
            out.append(f.read())
    return "".join(out)


def _load_runtime():
    global _runtime
    if _runtime is None:
        text = _headers()
        sources = [os.path.join(HERE, n) for n in ("runtime.h",) + RUNTIME_SOURCES]
        for s in sources:
            with open(s) as f:
                text += f.read()
        path = _compile(text, sources[1:], "runtime", ["-O3", "-pthread"])
        runtime = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        check_sizes(runtime, {"ptxsim_size_of_launch": _Launch, "ptxsim_size_of_profile": ProfileStruct})
        runtime.ptxsim_run.argtypes = [ctypes.c_void_p]
        _runtime = runtime
    return _runtime


@dataclass
class _Kernel:
    name: str
    unit: EntryCodegen
    lib: object = None
    code: str = ""
    profiled: object = None  # the _Kernel with profile counters


# ---- modules ---------------------------------------------------------------------------------------


class Module:
    """A PTX module.  Kernels are translated at load and compiled for the host at first launch."""

    def __init__(self, text: str, name: str = "module", only=None, base: int = 0, lazy: bool = False):
        """base: offset of the module variables in global memory.  lazy: translate kernels at first use."""
        self.name = name
        self.ast = ptx.parse(text)
        self._layout_globals(base)
        self._kernels, self._demangled = {}, None
        for fn in self.ast.functions.values():
            if fn.is_entry and not fn.declared_only and (only is None or any(o in fn.name for o in only)):
                kernel = self._kernels[fn.name] = _Kernel(fn.name, None)
                if not lazy:
                    self._translate(kernel)

    @classmethod
    def from_ptx(cls, text: str, only=None) -> Module:
        """Load a module from PTX text.  only: translate just the kernels whose name contains one of these."""
        return cls(text, only=only)

    @classmethod
    def from_cu(cls, path: str, arch: str = "sm_80", flags=(), only=None) -> Module:
        """Compile a .cu file with nvcc -ptx (with -lineinfo) and load it."""
        with tempfile.TemporaryDirectory() as tmp:
            out = os.path.join(tmp, "out.ptx")
            run([find_nvcc(), "-ptx", f"-arch={arch}", "-lineinfo", *flags, os.fspath(path), "-o", out])
            with open(out) as f:
                return cls(f.read(), os.path.basename(os.fspath(path)), only)

    @property
    def capability(self) -> int:
        """Compute capability that the PTX was compiled for: 80 of sm_80."""
        return int(re.search(r"\d+", self.ast.target)[0])

    @property
    def kernels(self) -> list:
        """Names of the kernels (as in the PTX)."""
        return list(self._kernels)

    @property
    def demangled(self) -> dict:
        """PTX name -> C++ name, through c++filt where it is installed."""
        if self._demangled is None:
            self._demangled = {k: k for k in self._kernels}
            try:
                r = subprocess.run(["c++filt"], input="\n".join(self._kernels), capture_output=True, text=True)
                self._demangled = dict(zip(self._kernels, r.stdout.splitlines()))
            except OSError:
                pass
        return self._demangled

    def find(self, name: str) -> _Kernel:
        """The kernel with this name, or the only one whose (demangled) name contains it."""
        if name in self._kernels:
            return self._kernels[name]
        names = self.demangled
        hits = [k for k in self._kernels if name in k or name in names.get(k, k)]
        exact = [k for k in hits if re.search(rf"\b{re.escape(name)}\b(?!\w)", names.get(k, k).split("(")[0])]
        for found in (hits, exact):
            if len(found) == 1:
                return self._kernels[found[0]]
        raise KeyError(f"{len(hits)} kernels match {name!r}: " + ", ".join(names.get(k, k) for k in hits or names))

    # -- module variables
    def _layout_globals(self, base):
        self.global_addr, self._globals, off = {}, [], base + REDZONE
        for v in self.ast.vars.values():
            if v.space not in ("global", "const"):
                continue
            off = align_up(off, max(v.align, 16))
            self.global_addr[v.name] = WIN_GLOBAL + off
            self._globals.append((v, off))
            off += v.size + 64
        self._globals_bytes = align_up(off + REDZONE, 4096)
        self._global_data = {}
        for v, _ in self._globals:
            self._global_data[v.name] = self._initial_value(v)

    def _initial_value(self, v):
        data = np.zeros(v.size, np.uint8)
        if v.init is None:
            return data
        es = ptx.TYPE_SIZE[v.type]
        raw = bytearray()
        for item in v.init:
            if isinstance(item, tuple):
                raw += (self.global_addr[item[0]] + item[1]).to_bytes(8, "little")[:es]
            elif isinstance(item, ptx.FImm):
                raw += np.array(item.value, np.float32 if es == 4 else np.float64).tobytes()
            else:
                raw += (item.value & (1 << 8 * es) - 1).to_bytes(es, "little")
        data[: len(raw)] = np.frombuffer(bytes(raw), np.uint8)[: v.size]
        return data

    def symbol(self, name: str) -> np.ndarray:
        """Bytes of a __device__ or __constant__ variable; write them to set it (cudaMemcpyToSymbol)."""
        hits = [n for n in self._global_data if n == name] or [n for n in self._global_data if name in n]
        if len(hits) != 1:
            raise KeyError(f"{len(hits)} variables match {name!r}")
        return self._global_data[hits[0]]

    # -- compiling
    def compile(self, name: str):
        """Compile a kernel for the host now (launch does it when needed)."""
        self._compile_kernel(self.find(name))

    def _translate(self, k: _Kernel) -> EntryCodegen:
        if k.unit is None:
            unit = EntryCodegen(self.ast, k.name, self.global_addr)
            k.code = unit.generate()  # raises UnsupportedInstruction
            k.unit = unit
        return k.unit

    def _profiled(self, k: _Kernel) -> _Kernel:
        if k.profiled is None:
            unit = EntryCodegen(self.ast, k.name, self.global_addr, profile=True)
            k.profiled = _Kernel(k.name, unit, code=unit.generate())
        return k.profiled

    def _compile_kernel(self, k: _Kernel) -> _Kernel:
        if k.lib is None:
            self._translate(k)
            _load_runtime()
            with tempfile.TemporaryDirectory() as tmp:
                src = os.path.join(tmp, "kernel.cpp")
                with open(src, "w") as f:
                    f.write(k.code)
                path = _compile(k.code + _headers(), [src], "kernel", ["-O1"])
            k.lib = ctypes.CDLL(path)
        return k

    # -- launching
    def launch(
        self,
        name: str,
        grid,
        block,
        args=(),
        shared_bytes: int = 0,
        order="forward",
        checks=True,
        buffers=(),
        timeout: float = 0,
        workers: int = 1,
        coresident: bool = False,
        allow_exited: bool = False,
        uninit_shared: bool = False,
        profile: bool = False,
    ) -> LaunchResult:
        """Run a kernel.

        name: PTX name, or a unique part of the (demangled) name.  grid, block: int or tuple.
        args: one per kernel parameter; see the README.  order: 'forward', 'reverse' or an int seed.
        checks: True (all), False (none but bounds of the address space), or a set out of
        {'memory', 'race', 'global'}; 'global' (not part of True) also reports plain accesses of different
        blocks to one byte of global memory, at least one a write.  buffers: further arrays reachable through pointers.
        timeout: seconds, 0 = none.  workers: OS threads that share the blocks.
        coresident: run all blocks at once (grid-wide synchronisation).  allow_exited: exited threads
        count as arrived at block barriers (as the hardware does).  profile: count instructions and
        memory traffic (result.profile).  uninit_shared: reads of never-written shared memory are allowed
        and give 0xff bytes (NaN); for kernels that load tiles with unused rows.
        """
        k = self.find(name)
        fn = self.ast.functions[k.name]
        grid, block = _dim3(grid), _dim3(block)
        if len(args) != len(fn.params):
            raise TypeError(f"{k.name} takes {len(fn.params)} arguments, {len(args)} given")
        self._check_config(fn, grid, block, shared_bytes, coresident)
        arena = _Arena(self, args, buffers)
        self._translate(k)
        params = np.zeros(max(k.unit.param_bytes, 1), np.uint8)
        for p, a in zip(fn.params, args):
            raw = arena.param_bytes(a, p)
            off = k.unit.param_addr[p.name]
            params[off : off + len(raw)] = np.frombuffer(raw, np.uint8)
        try:
            result = self._execute(
                k,
                self.capability,
                params,
                arena,
                grid,
                block,
                shared_bytes,
                order,
                checks,
                timeout,
                workers,
                coresident,
                allow_exited,
                profile,
                uninit_shared,
            )
        finally:
            arena.copy_back()
        if checks is True or checks and "memory" in checks:
            arena.check_outputs(k.name)
        return result

    def _execute(
        self,
        k,
        capability,
        params,
        arena,
        grid,
        block,
        shared_bytes,
        order="forward",
        checks=True,
        timeout=0,
        workers=1,
        coresident=False,
        allow_exited=False,
        profile=False,
        uninit_shared=False,
    ) -> LaunchResult:
        """Run kernel k, as on this compute capability, on the parameter bytes and an arena (data, shadow, regions)."""
        k = self._compile_kernel(self._profiled(k) if profile else k)
        ranges = np.array([x for v in k.unit.shared_vars for x in v[1:]] or [0], np.uint32)
        L = _Launch()
        L.fn = ctypes.cast(k.lib.ptxsim_entry, ctypes.c_void_p).value
        L.params, L.param_bytes = params.ctypes.data, k.unit.param_bytes
        L.arena, L.gshadow, L.arena_bytes = arena.data.ctypes.data, arena.shadow.ctypes.data, arena.data.size
        L.shared_ranges, L.n_shared_ranges = ranges.ctypes.data, len(k.unit.shared_vars)
        L.grid, L.block = (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block)
        L.dyn_offset, L.dyn_bytes = k.unit.dyn_offset, shared_bytes
        L.local_bytes = 65536
        regs = sum(len(f.regs) for f in k.unit.functions)
        L.stack_bytes = 131072 + 32 * regs
        L.order = {"forward": 0, "reverse": 1}.get(order, 2)
        L.seed = order if isinstance(order, int) else 0
        if checks is True:
            checks = {"memory", "race"}
        checks = checks or set()
        L.checks = (CK_MEM if "memory" in checks else 0) | (CK_RACE if "race" in checks else 0)
        if "global" in checks and not coresident:
            owners = np.zeros((2, arena.data.size), np.uint32)
            L.gwriter, L.greader = owners[0].ctypes.data, owners[1].ctypes.data
        if checks and not allow_exited:
            L.checks |= CK_EXIT
        if not uninit_shared:
            L.checks |= CK_UNINIT
        L.timeout, L.workers, L.coresident, L.capability = timeout, workers, int(coresident), capability
        recorder = None
        if profile:
            recorder = Recorder(k.unit, arena.data.size)
            L.profile = ctypes.addressof(recorder.struct)
        start = time.time()
        failed = _runtime.ptxsim_run(ctypes.byref(L))
        seconds = time.time() - start
        if failed:
            raise self._device_error(k, L.err, arena, shared_bytes)
        counters = recorder and Profile(recorder, self.demangled.get(k.name, k.name), lambda pc: self._user_line(k, pc))
        return LaunchResult(L.icount, seconds, counters)

    def _check_config(self, fn, grid, block, shared_bytes, coresident):
        n = block[0] * block[1] * block[2]
        if not 1 <= n <= 1024 or block[2] > 64:
            raise ValueError(f"block of {n} threads")
        limit = fn.directives.get(".maxntid")
        if limit and n > int(np.prod(limit)):
            raise ValueError(f"block of {n} threads exceeds __launch_bounds__ {limit}")
        required = fn.directives.get(".reqntid")
        if required and _dim3(required) != block:
            raise ValueError(f"block {block}, the kernel requires {tuple(required)}")
        if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise ValueError(f"grid {grid}")
        if shared_bytes > 227 * 1024:
            raise ValueError("more than 227 KiB of dynamic shared memory")
        if coresident and int(np.prod(grid)) * n > 16000:
            raise ValueError("more than 16000 threads run together (coresident)")

    def _site(self, k, pc):
        if pc >= len(k.unit.sites):
            return None, None, None
        func, line, loc, opcode = k.unit.sites[pc]
        source = None
        if loc >= 0:
            f, ln, inl = self.ast.locs[loc]
            source = f"{os.path.basename(self.ast.files.get(f, '?'))}:{ln}"
            if inl:
                source += f" inlined at {os.path.basename(self.ast.files.get(inl[0], '?'))}:{inl[1]}"
        return line, source, opcode

    def _user_line(self, k, pc):
        """ "file:line" of an instruction; code inlined from CUDA's headers counts at its call."""
        _, line, loc, _ = k.unit.sites[pc]
        if loc < 0:
            return f"PTX line {line}"
        f, ln, inl = self.ast.locs[loc]
        while inl and re.search(r"/(cuda[^/]*|targets)/.*include/", self.ast.files.get(f, "")):
            f, ln = inl
            loc = self.ast.loc_parents[loc]
            inl = self.ast.locs[loc][2] if loc >= 0 else None
        return f"{os.path.basename(self.ast.files.get(f, '?'))}:{ln}"

    def _device_error(self, k, e, arena, shared_bytes):
        line, source, opcode = self._site(k, e.pc)
        detail = re.sub(
            r"@pc(\d+)",
            lambda m: "at {1} (PTX line {0}, {2})".format(*self._site(k, int(m[1]))),
            e.msg.decode(errors="replace"),
        )
        other = None
        if e.has_pc2:
            l2, s2, o2 = self._site(k, e.pc2)
            other = f"PTX line {l2} ({o2}), source {s2}"
        return DeviceError(
            e.kind.decode(),
            self.demangled.get(k.name, k.name),
            detail,
            line,
            source,
            tuple(e.block),
            tuple(e.tid),
            e.addr,
            self._nearest(k, e.addr, arena, shared_bytes),
            other,
            opcode,
        )

    def _nearest(self, k, addr, arena, shared_bytes):
        if not addr:
            return None
        space = addr >> 44
        if space == 5:
            regions = arena.regions
        elif space == 1:
            addr -= WIN_SHARED
            regions = [(f"shared {n}", o, s) for n, o, s in k.unit.shared_vars]
            if shared_bytes:
                regions.append(("dynamic shared memory", k.unit.dyn_offset, shared_bytes))
        else:
            return {2: "local memory", 3: "kernel parameters"}.get(space)
        best = None
        for name, start, size in regions:
            dist = start - addr if addr < start else max(0, addr - (start + size) + 1)
            if best is None or dist < best[0]:
                best = (dist, name, start, size)
        if best is None:
            return None
        dist, name, start, size = best
        if dist == 0:
            return f"byte {addr - start} of {name} ({size} bytes)"
        return f"{dist} byte(s) {'before' if addr < start else 'past the end of'} {name} ({size} bytes)"


def _dim3(x):
    x = (x,) if isinstance(x, int) else tuple(int(v) for v in x)
    return x + (1,) * (3 - len(x))


class _Arena:
    """Global memory of one launch: module variables and buffers, separated by red zones."""

    def __init__(self, module, args, buffers):
        self.module = module
        self.regions = []  # (description, device address, bytes)
        self.arrays = {}  # id(array) -> (offset, array, Out | None)
        self.outs = []
        off = module._globals_bytes
        todo, previous = [], 0
        for i, a in enumerate(list(args) + list(buffers)):
            for obj in self._device_objects(a):
                out = obj if isinstance(obj, Out) else None
                arr = obj.array if out else obj
                if id(arr) in self.arrays:
                    continue
                if not isinstance(arr, np.ndarray):
                    raise TypeError(f"argument {i}: {type(arr).__name__} is not a numpy array")
                if not arr.flags.c_contiguous:
                    raise ValueError(f"argument {i}: the array is not C-contiguous")
                off += max(REDZONE, min(max(previous, arr.nbytes), MAX_REDZONE))
                off, previous = align_up(off, 256), arr.nbytes
                self.arrays[id(arr)] = (off, arr, out)
                todo.append((off, arr, out, f"argument {i}" if i < len(args) else f"buffers[{i - len(args)}]"))
                off += arr.nbytes
        size = align_up(off + max(REDZONE, min(previous, MAX_REDZONE)), 4096)
        self.data = np.zeros(size, np.uint8)
        self.shadow = np.zeros(size, np.uint8)
        for v, o in module._globals:
            self.data[o : o + v.size] = module._global_data[v.name]
            self.shadow[o : o + v.size] = SH_INIT | (SH_RO if v.space == "const" else 0)
            self.regions.append((f"{v.space} variable {v.name}", WIN_GLOBAL + o, v.size))
        for o, arr, out, desc in todo:
            n = arr.nbytes
            view = arr.reshape(-1).view(np.uint8)
            if out is None:
                self.data[o : o + n] = view
                self.shadow[o : o + n] = SH_INIT | (0 if arr.flags.writeable else SH_RO)
            else:
                self.data[o : o + n] = 0xCB
                self.shadow[o : o + n] = SH_VALID | (SH_ONCE if out.once else 0)
                self.outs.append((o, arr, out, desc))
            self.regions.append((f"{desc}, {arr.dtype}{list(arr.shape)}", WIN_GLOBAL + o, n))

    def _device_objects(self, a):
        return [a] if isinstance(a, Out) or isinstance(a, np.ndarray) and a.ndim else []

    def address(self, a):
        """Device address of an array of this launch."""
        arr = a.array if isinstance(a, Out) else a
        if id(arr) not in self.arrays:
            raise ValueError("the array is neither an argument nor in buffers=")
        return WIN_GLOBAL + self.arrays[id(arr)][0]

    def param_bytes(self, a, p):
        """Bytes of kernel parameter p for argument a."""
        if a is None:
            raw = bytes(8)
        elif isinstance(a, Out) or isinstance(a, np.ndarray) and a.ndim:
            raw = self.address(a).to_bytes(8, "little")
        elif isinstance(a, (bytes, bytearray)):
            raw = bytes(a)
        elif callable(a):  # struct builder: called with the address lookup
            raw = bytes(a(self.address))
        elif isinstance(a, (np.generic, np.ndarray)):
            raw = a.tobytes()
        elif isinstance(a, (ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._SimpleCData)):
            raw = bytes(a)
        elif isinstance(a, (bool, int)):
            if p.type in ("f32", "f64"):
                raw = np.array(a, np.float32 if p.size == 4 else np.float64).tobytes()
            else:
                raw = (int(a) & (1 << 8 * p.size) - 1).to_bytes(p.size, "little")
        elif isinstance(a, float):
            raw = np.array(a, {4: np.float32, 8: np.float64, 2: np.float16}[p.size]).tobytes()
        else:
            raise TypeError(f"parameter {p.name}: cannot pass a {type(a).__name__}")
        if len(raw) != p.size:
            raise TypeError(f"parameter {p.name} is {p.size} bytes, the argument has {len(raw)}")
        return raw

    def copy_back(self):
        for o, arr, _ in self.arrays.values():
            if arr.flags.writeable:
                arr.reshape(-1).view(np.uint8)[:] = self.data[o : o + arr.nbytes]
        for v, o in self.module._globals:
            if v.space == "global":
                self.module._global_data[v.name][:] = self.data[o : o + v.size]

    def check_outputs(self, kernel):
        for o, arr, out, desc in self.outs:
            if not out.complete:
                continue
            missing = np.flatnonzero((self.shadow[o : o + arr.nbytes] & 2) == 0)
            if missing.size:
                i = int(missing[0]) // arr.itemsize
                n = len(np.unique(missing // arr.itemsize))
                raise DeviceError(
                    "unwritten output",
                    kernel,
                    f"{n} of {arr.size} elements of {desc} were never written, the first at index "
                    f"{tuple(int(x) for x in np.unravel_index(i, arr.shape))}",
                    address=WIN_GLOBAL + o + int(missing[0]),
                )
