"""An emulated device: persistent memory, launch limits and a log of launches, for HostProgram (host.py)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass

import numpy as np

from .codegen import UnsupportedInstruction, align_up
from .module import MAX_REDZONE, REDZONE, SH_INIT, SH_ONCE, SH_RO, SH_VALID, WIN_GLOBAL, DeviceError, Module
from .parser import ParseError

# compute capability -> shared memory per SM, per block (opt-in), threads and blocks per SM
CAPABILITIES = {
    75: (65536, 65536, 1024, 16),
    80: (167936, 166912, 2048, 32),
    86: (102400, 101376, 1536, 16),
    87: (167936, 166912, 1536, 16),
    89: (102400, 101376, 1536, 24),
    90: (233472, 232448, 2048, 32),
    100: (233472, 232448, 2048, 32),
    103: (233472, 232448, 2048, 32),
    120: (102400, 101376, 1536, 24),
}

# the runtime's error codes
INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONFIGURATION, INVALID_SYMBOL = 1, 2, 9, 13
INVALID_FUNCTION, INVALID_DEVICE = 98, 101
NO_KERNEL_IMAGE, INVALID_PTX, ILLEGAL_ADDRESS, OUT_OF_RESOURCES, TIMEOUT = 209, 218, 700, 701, 702
CONTEXT_DESTROYED, ASSERT, MISALIGNED, LAUNCH_FAILURE = 709, 710, 716, 719
COOPERATIVE_TOO_LARGE, NOT_SUPPORTED = 720, 801
FAULT_CODE = {"out-of-bounds": ILLEGAL_ADDRESS, "misaligned": MISALIGNED, "assert": ASSERT, "timeout": TIMEOUT}
CODE_NAME = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    9: "cudaErrorInvalidConfiguration",
    13: "cudaErrorInvalidSymbol",
    98: "cudaErrorInvalidDeviceFunction",
    101: "cudaErrorInvalidDevice",
    209: "cudaErrorNoKernelImageForDevice",
    218: "cudaErrorInvalidPtx",
    700: "cudaErrorIllegalAddress",
    701: "cudaErrorLaunchOutOfResources",
    702: "cudaErrorLaunchTimeout",
    709: "cudaErrorContextIsDestroyed",
    710: "cudaErrorAssert",
    716: "cudaErrorMisalignedAddress",
    719: "cudaErrorLaunchFailure",
    720: "cudaErrorCooperativeLaunchTooLarge",
    801: "cudaErrorNotSupported",
}


@dataclass
class LaunchRecord:
    """One launch: kernel (C++ name), grid, block, shared_bytes (dynamic), stream, attributes (of the
    function), error (name of the runtime's code, or None) and reason; profile, instructions and seconds of the run."""

    kernel: str
    grid: tuple
    block: tuple
    shared_bytes: int
    stream: int
    attributes: dict
    error: str | None = None
    reason: str | None = None
    profile: object = None
    instructions: int = 0
    seconds: float = 0.0


@dataclass
class _Allocation:
    address: int
    size: int
    name: str
    from_host: bool = False  # by cudaMalloc
    freed: bool = False


@dataclass
class RuntimeErrorRecord:
    """A runtime call that returned an error: call, code, name, reason."""

    call: str
    code: int
    name: str
    reason: str


class _LaunchFailed(Exception):
    def __init__(self, code, reason):
        self.code, self.reason = code, reason


def _extent(array):
    """Bytes from an array's first element to the end of its last; strides are not negative."""
    if not array.size:
        return 0
    return sum((n - 1) * stride for n, stride in zip(array.shape, array.strides)) + array.itemsize


class _Memory:
    """What Module._execute needs of an arena: the used part of device memory."""

    def __init__(self, device):
        self.data, self.shadow = device._data[: device._high], device._shadow[: device._high]
        self.regions = [
            (a.name + (" (freed)" if a.freed else ""), a.address, a.size) for a in device._allocations.values()
        ]
        for m in device._modules:
            self.regions += [(f"{v.space} variable {v.name}", WIN_GLOBAL + o, v.size) for v, o in m._globals]


class Device:
    """An emulated GPU with its own memory.

    arch, sm_count, shared_per_block (without opt-in), shared_per_block_optin, shared_per_sm, threads_per_sm,
    blocks_per_sm, l2_bytes, name: what the runtime reports.  registers: per thread, for the occupancy (0: no limit).
    memory: bytes of address space; addresses are never reused, so that use after free is found.
    order, checks, profile, workers, timeout, allow_exited: options of every launch (see Module.launch); they may be
    changed between calls.  execute: False checks and records launches alone.
    strict: a failed <<< >>> launch whose error the host code never asked for raises.
    Use as a context manager, or call close(): it reports what the host code has not freed.
    """

    def __init__(
        self,
        arch="sm_90a",
        sm_count=132,
        shared_per_block=49152,
        shared_per_block_optin=None,
        shared_per_sm=None,
        threads_per_sm=None,
        blocks_per_sm=None,
        l2_bytes=50 << 20,
        clock_khz=1700000,
        registers=0,
        memory=16 << 30,
        name=None,
        order="forward",
        checks=True,
        profile=False,
        workers=1,
        timeout=0,
        allow_exited=False,
        strict=True,
        execute=True,
    ):
        self.arch = arch
        cc = self.capability = int("".join(c for c in arch if c.isdigit()))
        known = CAPABILITIES.get(cc) or CAPABILITIES[max((k for k in CAPABILITIES if k <= cc), default=75)]
        self.sm_count, self.l2_bytes, self.clock_khz = sm_count, l2_bytes, clock_khz
        self.shared_per_block = shared_per_block
        self.shared_per_sm = shared_per_sm or known[0]
        self.shared_per_block_optin = shared_per_block_optin or known[1]
        self.threads_per_sm, self.blocks_per_sm = threads_per_sm or known[2], blocks_per_sm or known[3]
        self.registers, self.name, self.memory = registers, name or f"ptxsim {arch}", memory
        self.order, self.checks, self.profile, self.workers, self.timeout = order, checks, profile, workers, timeout
        self.allow_exited, self.strict, self.execute = allow_exited, strict, execute
        self.launches, self.errors = [], []
        self._allocations, self._modules, self._pending, self.sticky = {}, [], None, 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._maps = [mmap.mmap(-1, memory, flags=flags) for _ in range(2)]
        self._data, self._shadow = (np.frombuffer(m, np.uint8) for m in self._maps)
        self._high = 4096
        self._count = 0

    # -- memory
    def _reserve(self, size, align, offset):
        redzone = max(REDZONE, min(size, MAX_REDZONE))
        start = align_up(self._high + redzone, align) + offset
        if start + size + redzone > self.memory:
            raise MemoryError(f"{size} bytes: the device has {self.memory} bytes of address space, never reused")
        self._high = align_up(start + size + redzone, 256)
        return start

    def _discard(self, start, end):
        """Make memory inaccessible and give its pages back."""
        first, last = align_up(start, mmap.PAGESIZE), end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            for pages in self._maps:
                pages.madvise(mmap.MADV_DONTNEED, first, last - first)
            self._shadow[start:first] = self._shadow[last:end] = 0
        else:
            self._shadow[start:end] = 0

    def alloc(self, nbytes, name=None, align=256, offset=0, once=False, _from_host=False) -> int:
        """Allocate uninitialised device memory; returns its address, `offset` bytes past a multiple of `align`.

        once: writing a byte twice is an error.
        """
        off = self._reserve(int(nbytes), align, offset)
        self._data[off : off + nbytes] = 0xCB
        self._shadow[off : off + nbytes] = SH_VALID | (SH_ONCE if once else 0)
        self._count += 1
        name = name or f"{'cudaMalloc' if _from_host else 'allocation'} {self._count}"
        self._allocations[WIN_GLOBAL + off] = _Allocation(WIN_GLOBAL + off, int(nbytes), name, _from_host)
        return WIN_GLOBAL + off

    def free(self, address: int):
        """Free an allocation; a double free or a wrong address raises DeviceError."""
        a = self._allocations.get(address)
        if a is None or a.freed:
            raise DeviceError(
                "double free" if a else "invalid free",
                "host code",
                f"{a.name} was freed before" if a else "the address was never allocated",
                address=address,
                buffer=self.describe(address),
            )
        a.freed = True
        self._discard(address - WIN_GLOBAL, address - WIN_GLOBAL + a.size)

    @contextlib.contextmanager
    def scope(self):
        """Memory allocated inside is gone afterwards, and its addresses are used again; reports leaks as close() does.

        For many short runs on one device.  Bind programs outside.
        """
        high, outside = self._high, set(self._allocations)
        try:
            yield
            self._check_leaks(a for a in self._allocations.values() if a.address not in outside)
        finally:
            if self._data is not None:
                self._discard(high, self._high)
                self._high = high
                self._allocations = {k: a for k, a in self._allocations.items() if k in outside}

    def upload(self, array: np.ndarray, to: int = None, name: str = None, readonly: bool = False) -> int:
        """Copy an array to the device (a new allocation, or the address `to`); returns the address."""
        array = np.ascontiguousarray(array)
        if to is None:
            to = self.alloc(array.nbytes, name or f"upload of {array.dtype}{list(array.shape)}")
        self._write(to, array.reshape(-1).view(np.uint8), readonly)
        return to

    def upload_view(self, array: np.ndarray, name: str = None, readonly: bool = False) -> int:
        """Copy an array as it lies in memory: with its strides (not negative), and its address modulo 16.

        What lies between its elements is not accessible.  Returns the address of the first element.
        """
        address = self._place(array, name, SH_INIT | (SH_RO if readonly else 0))
        np.ndarray(array.shape, array.dtype, self._data, address - WIN_GLOBAL, array.strides)[...] = array
        return address

    def alloc_view(self, array: np.ndarray, name: str = None, once: bool = False) -> int:
        """Like upload_view, but uninitialised. once: writing a byte twice is an error."""
        return self._place(array, name, SH_VALID | (SH_ONCE if once else 0))

    def _place(self, array, name, state) -> int:
        extent = _extent(array)
        address = self.alloc(extent, name or f"view of {array.dtype}{list(array.shape)}", offset=array.ctypes.data % 16)
        off = address - WIN_GLOBAL
        self._shadow[off : off + extent] = 0
        np.ndarray((*array.shape, array.itemsize), np.uint8, self._shadow, off, (*array.strides, 1))[...] = state
        return address

    def download(self, address: int, shape, dtype=None, complete: bool = False) -> np.ndarray:
        """Copy from the device: shape and dtype, or an array to take shape, dtype and strides from.

        complete: unwritten elements raise.
        """
        like = shape if isinstance(shape, np.ndarray) else np.empty(shape, dtype)
        off = self._range(address, _extent(like), "read", ((*like.shape, like.itemsize), (*like.strides, 1)))
        out = np.ndarray(like.shape, like.dtype, self._data, off, like.strides).copy()
        if complete:
            shadow = np.ndarray((*like.shape, like.itemsize), np.uint8, self._shadow, off, (*like.strides, 1))
            missing = np.argwhere(((shadow & 2) == 0).any(-1))
            if len(missing):
                at = tuple(int(i) for i in missing[0])
                where = address + sum(i * stride for i, stride in zip(at, like.strides))
                raise DeviceError(
                    "unwritten output",
                    "host code",
                    f"{len(missing)} of {out.size} elements were never written, the first at index {at}",
                    address=where,
                    buffer=self.describe(where),
                )
        return out

    def describe(self, address: int) -> str:
        """The nearest allocation to an address, in words."""
        best = None
        for a in self._allocations.values():
            dist = a.address - address if address < a.address else max(0, address - (a.address + a.size) + 1)
            if best is None or dist < best[0]:
                best = (dist, a)
        if best is None:
            return "no allocations"
        dist, a = best
        freed = ", freed" if a.freed else ""
        if not dist:
            return f"byte {address - a.address} of {a.name} ({a.size} bytes{freed})"
        return (
            f"{dist} byte(s) {'before' if address < a.address else 'past the end of'} {a.name} ({a.size} bytes{freed})"
        )

    def is_device(self, address: int) -> bool:
        return WIN_GLOBAL <= address < WIN_GLOBAL + self.memory

    def _range(self, address, size, what, layout=None):
        """The offset of memory that must be accessible: all bytes, or those of an array with (shape, strides)."""
        off = address - WIN_GLOBAL
        inside = off >= 0 and off + size <= self._high
        if inside:
            shape, strides = layout or ((size,), (1,))
            accessible = np.ndarray(shape, np.uint8, self._shadow, off, strides) & 1
        if not inside or not accessible.all():
            bad = address
            if inside:
                at = np.unravel_index(np.argmin(accessible), shape)
                bad += sum(int(i) * stride for i, stride in zip(at, strides))
            raise DeviceError(
                "out-of-bounds",
                "host code",
                f"{what} of {size} bytes at {address:#x}",
                address=bad,
                buffer=self.describe(bad),
            )
        return off

    def _write(self, address, data, readonly=False):
        off = self._range(address, data.size, "write")
        self._data[off : off + data.size] = data
        self._shadow[off : off + data.size] = SH_INIT | (SH_RO if readonly else 0)

    def _copy(self, dst, src, n):
        """cudaMemcpy: each side is device or host memory by its address."""
        if not n:
            return
        to, frm = self.is_device(dst), self.is_device(src)
        if to and frm:
            a, b = self._range(dst, n, "copy to"), self._range(src, n, "copy from")
            self._data[a : a + n] = self._data[b : b + n].copy()
            self._shadow[a : a + n] = SH_VALID | (self._shadow[b : b + n] & 2)
        elif to:
            self._write(dst, np.frombuffer((ctypes.c_uint8 * n).from_address(src), np.uint8))
        elif frm:
            off = self._range(src, n, "copy from")
            ctypes.memmove(dst, self._data[off:].ctypes.data, n)
        else:
            ctypes.memmove(dst, src, n)

    def _load(self, text, name):
        """Load a PTX module; its variables get addresses in device memory."""
        base = align_up(self._high, 4096)
        mod = Module(text, name, base=base, lazy=True)
        self._high = mod._globals_bytes
        for v, o in mod._globals:
            self._data[o : o + v.size] = mod._global_data[v.name]
            self._shadow[o : o + v.size] = SH_INIT | (SH_RO if v.space == "const" else 0)
        self._modules.append(mod)
        return mod

    # -- launches
    def _launch(self, program, stub, grid, block, args, shared, stream, cooperative) -> int:
        """A launch by host code; returns the runtime's error code."""
        record = LaunchRecord("?", grid, block, shared, stream, {})
        self.launches.append(record)
        try:
            if self.sticky:
                raise _LaunchFailed(self.sticky, "an earlier fault made the context unusable")
            mod, k = program._resolve(stub)
            record.kernel = mod.demangled.get(k.name, k.name)
            record.attributes = dict(program._attributes.get(stub, {}))
            self._check_launch(mod, k, record, cooperative)
            params = np.zeros(max(k.unit.param_bytes, 1), np.uint8)
            pointers = ctypes.cast(args, ctypes.POINTER(ctypes.c_void_p))
            for i, p in enumerate(mod.ast.functions[k.name].params):
                off = k.unit.param_addr[p.name]
                params[off : off + p.size] = np.frombuffer(ctypes.string_at(pointers[i], p.size), np.uint8)
            if not self.execute:
                return 0
            r = mod._execute(
                k,
                self.capability,
                params,
                _Memory(self),
                grid,
                block,
                shared,
                self.order,
                self.checks,
                self.timeout,
                self.workers,
                cooperative,
                self.allow_exited,
                self.profile,
            )
            record.profile, record.instructions, record.seconds = r.profile, r.instructions, r.seconds
            return 0
        except _LaunchFailed as e:
            code, record.reason = e.code, e.reason
        except DeviceError as e:
            code, record.reason = FAULT_CODE.get(e.what, LAUNCH_FAILURE), str(e)
            self.sticky = code
            self._fault(e)
        except (UnsupportedInstruction, ParseError) as e:
            code, record.reason = INVALID_PTX, str(e)
            self._fault(e)
        record.error = CODE_NAME.get(code, str(code))
        self._log_error(f"launch of {record.kernel}", code, record.reason)
        return code

    def _check_launch(self, mod, k, record, cooperative):
        """The checks of the runtime before a launch."""
        grid, block, shared = record.grid, record.block, record.shared_bytes
        threads = block[0] * block[1] * block[2]

        def fail(code, reason):
            raise _LaunchFailed(code, reason)

        if not 1 <= threads <= 1024 or block[0] > 1024 or block[1] > 1024 or block[2] > 64:
            fail(INVALID_CONFIGURATION, f"block {block}: {threads} threads, 1 to 1024 are possible (z at most 64)")
        if min(grid) < 1 or grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
            fail(INVALID_CONFIGURATION, f"grid {grid} is outside 1..(2^31-1, 65535, 65535)")
        unit, directives = mod._translate(k), mod.ast.functions[k.name].directives
        bound = directives.get(".maxntid") or directives.get(".reqntid")
        if bound and threads > int(np.prod(bound)):
            fail(OUT_OF_RESOURCES, f"block of {threads} threads exceeds __launch_bounds__ {bound}")
        static, allowed = unit.static_shared, record.attributes.get("max_dynamic_shared", 0)
        if shared + static > max(self.shared_per_block, allowed + static if allowed else 0):
            fail(
                INVALID_VALUE,
                f"{shared} bytes of dynamic and {static} of static shared memory exceed {self.shared_per_block}; "
                + (
                    f"cudaFuncSetAttribute allows {allowed} of dynamic memory"
                    if allowed
                    else "cudaFuncSetAttribute(MaxDynamicSharedMemorySize) was not called for this kernel"
                ),
            )
        if cooperative and np.prod(grid) > self.occupancy(unit, threads, shared) * self.sm_count:
            fail(COOPERATIVE_TOO_LARGE, f"{np.prod(grid)} blocks do not fit on the device at once")
        if cooperative and threads * np.prod(grid) > 16000:
            fail(NOT_SUPPORTED, "ptxsim: more than 16000 threads in a cooperative launch")

    def occupancy(self, unit, threads, shared) -> int:
        """Blocks per SM that threads, shared memory and (if given) registers allow."""
        if not 1 <= threads <= 1024:
            return 0
        warps = -(-threads // 32)
        per_block = align_up(shared + unit.static_shared + (1024 if self.capability >= 80 else 0), 128)
        n = min(self.blocks_per_sm, self.threads_per_sm // (32 * warps), self.shared_per_sm // max(per_block, 1))
        if self.registers:
            # Each quarter of an SM has registers of its own; a warp takes them 256 at a time.
            n = min(n, 4 * (16384 // align_up(self.registers * 32, 256)) // warps)
        return n

    # -- errors
    def _fault(self, error):
        if self._pending is None:
            self._pending = error

    def _log_error(self, call, code, reason):
        self.errors.append(RuntimeErrorRecord(call, code, CODE_NAME.get(code, str(code)), reason or ""))

    def check(self):
        """Raise the first fault since the last check; the device is usable again afterwards."""
        error, self._pending = self._pending, None
        if error is not None:
            self.sticky = 0
            raise error

    def close(self):
        """Raise pending faults, and DeviceError "leak" if host code has not freed its allocations."""
        allocations, self._allocations = self._allocations, {}
        self._data = self._shadow = None
        self._maps = []
        self.check()
        self._check_leaks(allocations.values())

    @staticmethod
    def _check_leaks(allocations):
        leaks = [a for a in allocations if a.from_host and not a.freed]
        if leaks:
            raise DeviceError(
                "leak",
                "host code",
                f"{len(leaks)} allocation(s), {sum(a.size for a in leaks)} bytes not freed: "
                + ", ".join(f"{a.name} ({a.size} bytes)" for a in leaks[:8]),
            )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
