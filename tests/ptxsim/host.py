"""Runs host launch code unmodified: .cu files built against a stand-in for the CUDA runtime (cudart.cpp)."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor

from . import toolchain
from .codegen import UnsupportedInstruction
from .device import (
    CODE_NAME,
    CONTEXT_DESTROYED,
    INVALID_DEVICE,
    INVALID_FUNCTION,
    INVALID_PTX,
    INVALID_SYMBOL,
    INVALID_VALUE,
    LAUNCH_FAILURE,
    NO_KERNEL_IMAGE,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    Device,
    _LaunchFailed,
)
from .module import DeviceError
from .parser import ParseError
from .toolchain import CXX, HERE, cache_dir, check_sizes, find_nvcc, install, making

# symbols of the stand-in stay inside each library, so that it does not meet a real libcudart
VERSION_SCRIPT = "{ local: cuda[A-Z]*; __cuda*; };\n"


class _Limits(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_int)
        for n in (
            "major",
            "minor",
            "sm_count",
            "threads_sm",
            "shared_block",
            "shared_optin",
            "shared_sm",
            "blocks_sm",
            "l2_bytes",
            "clock_khz",
        )
    ] + [("memory", ctypes.c_uint64), ("name", ctypes.c_char * 64)]


class _KernelEntry(ctypes.Structure):
    _fields_ = [("stub", ctypes.c_void_p), ("name", ctypes.c_char_p), ("image", ctypes.c_int)]


class _VariableEntry(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("image", ctypes.c_int),
        ("size", ctypes.c_uint64),
    ]


_Bridge = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_int)


# ---- building ------------------------------------------------------------------------------------


def _digest(*parts):
    h = hashlib.sha256()
    for p in parts:
        h.update(p if isinstance(p, bytes) else str(p).encode())
        h.update(b"\0")
    return h.hexdigest()[:32]


def _file_digest(path):
    try:
        with open(path, "rb") as f:
            return _digest(f.read())
    except OSError:
        return None


def _dependencies(path):
    with open(path) as f:
        text = f.read().replace("\\\n", " ")
    return sorted(
        {os.path.realpath(d.replace("\\ ", " ")) for d in re.split(r"(?<!\\)\s+", text.split(":", 1)[1].strip())}
    )


def _known_object(manifest):
    """The object that a manifest names, if no file that went into it has changed."""
    try:
        with open(manifest) as f:
            known = json.load(f)
        unchanged = os.path.exists(known["object"]) and all(_file_digest(p) == d for p, d in known["files"].items())
        return known["object"] if unchanged else None
    except (OSError, ValueError, KeyError):
        return None


def _compile_object(source, command, compiling=lambda source: None):
    """The object file of a source, from the cache if no file it includes has changed."""
    nvcc = os.path.realpath(command[0])
    key = _digest(source, os.path.getmtime(nvcc), *command)
    manifest = os.path.join(cache_dir(), f"host-{key}.json")
    with making(f"host-{key}"):
        if known := _known_object(manifest):
            return known
        compiling(source)
        with tempfile.TemporaryDirectory() as tmp:
            out, dep = os.path.join(tmp, "out.o"), os.path.join(tmp, "out.d")
            toolchain.run([*command, "-MD", "-MF", dep, source, "-o", out])
            files = {p: _file_digest(p) for p in _dependencies(dep)}
            path = os.path.join(cache_dir(), f"host-{_digest(key, json.dumps(files, sort_keys=True))}.o")
            install(out, path)
            text = os.path.join(tmp, "manifest")
            with open(text, "w") as f:
                json.dump({"object": path, "files": files}, f)
            install(text, manifest)
    return path


def build(sources, arches, flags=(), include_dirs=(), compiling=lambda source: None) -> str:
    """Build the host library; returns its path in the cache. compiling(source) is called for each source that is not
    in the cache.

    One nvcc run per source gives the host object with the PTX of each arch inside (no SASS: ptxas does not run).
    """
    nvcc = find_nvcc()
    common = [nvcc, "-c", "-cudart", "none", "-Xcompiler", "-fPIC", *flags]
    common += [x for d in include_dirs for x in ("-I", os.path.abspath(d))]
    images = []
    for a in arches:
        virtual = "compute_" + a.split("_", 1)[1]
        images.append(f"-gencode=arch={virtual},code={virtual}")
    jobs = []
    for s in map(os.path.abspath, map(os.fspath, sources)):
        jobs.append((s, common + (["-lineinfo", "-no-compress", *images] if s.endswith(".cu") else [])))
    jobs.append((os.path.join(HERE, "cudart.cpp"), [nvcc, "-c", "-cudart", "none", "-Xcompiler", "-fPIC,-O1"]))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(lambda j: _compile_object(*j, compiling), jobs))
    path = os.path.join(cache_dir(), f"host-{_digest(VERSION_SCRIPT, *objects)}.so")
    if not os.path.exists(path):
        with tempfile.TemporaryDirectory() as tmp:
            script, out = os.path.join(tmp, "map"), os.path.join(tmp, "out.so")
            with open(script, "w") as f:
                f.write(VERSION_SCRIPT)
            toolchain.run([CXX, "-shared", *objects, f"-Wl,--version-script={script}", "-o", out])
            _check_complete(out)
            install(out, path)
    return path


def _check_complete(library):
    """No runtime call may be left to a real CUDA runtime, which the process may have loaded (PyTorch does)."""
    undefined = toolchain.run(["nm", "-D", "--undefined-only", "--format=posix", library])
    missing = re.findall(r"^((?:__cuda|cuda[A-Z]|cu[A-Z])\w*)", undefined, re.M)
    if missing:
        raise RuntimeError(
            f"the host code uses {', '.join(missing)}, which ptxsim's stand-in for the CUDA runtime (cudart.cpp) lacks"
        )


def read_fatbin(address) -> list:
    """PTX texts of an uncompressed fat binary in memory."""
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != 0xBA55ED50:
        raise RuntimeError("ptxsim: unknown fat binary format")
    data, at, out = ctypes.string_at(address + header, size), 0, []
    while at + 16 <= size:
        kind, _, entry, length = struct.unpack_from("<HHIQ", data, at)
        if kind == 1:
            out.append(data[at + entry : at + entry + length].rstrip(b"\0").decode())
        if entry + length == 0:
            break
        at += entry + length
    return out


def _image_for(texts, arch):
    """The PTX for a device: its own arch-specific code, else the newest not above it; None if there is none."""
    best, device = None, int(re.search(r"\d+", arch)[0])
    for text in texts:
        target = re.search(r"^\.target\s+sm_(\d+)([af]?)", text, re.M)
        cc, suffix = int(target[1]), target[2]
        if suffix == "a" and cc != device or suffix == "f" and cc // 10 != device // 10:
            continue
        if cc <= device and (best is None or (cc, suffix) > best[:2]):
            best = (cc, suffix, text)
    return best and best[2]


# ---- programs ------------------------------------------------------------------------------------


class HostProgram:
    """A library of kernels and their host launch code, running on an emulated Device.

    sources: .cu (and host-only .cpp) files.  device: a Device, or None to bind() one later.  arches: compile for these
    instead of the device's arch.  flags, include_dirs: for nvcc.

    Functions with C linkage are attributes, ctypes functions that raise the DeviceError of a launch once they return:
    program.dwconv(ctypes.byref(params), None).  import_module(name) imports the library as a Python extension.

    device_number: what cudaGetDevice says.  Under another number the device is another GPU to launchers that keep
    something for each.
    """

    def __init__(self, sources, device: Device = None, flags=(), include_dirs=(), arches=None):
        if isinstance(sources, (str, os.PathLike)):
            sources = [sources]
        if arches is None and device is None:
            raise ValueError("HostProgram needs a device or arches")
        self.path = build(sources, arches or [device.arch], flags, include_dirs)
        self._tmp = tempfile.TemporaryDirectory()  # a library of its own, with its own runtime state
        self._file = os.path.join(self._tmp.name, "program.so")
        shutil.copyfile(self.path, self._file)
        self.lib = ctypes.CDLL(self._file, mode=os.RTLD_NOW | os.RTLD_LOCAL)
        lib = self.lib
        mirrored = {"kernel": _KernelEntry, "variable": _VariableEntry, "limits": _Limits}
        check_sizes(lib, {f"ptxsim_size_of_{name}": structure for name, structure in mirrored.items()})
        lib.ptxsim_image.restype = ctypes.c_void_p
        lib.ptxsim_kernel.restype = ctypes.POINTER(_KernelEntry)
        lib.ptxsim_variable.restype = ctypes.POINTER(_VariableEntry)
        self._images = [read_fatbin(lib.ptxsim_image(i)) for i in range(lib.ptxsim_images())]
        entries = [lib.ptxsim_kernel(i).contents for i in range(lib.ptxsim_kernels())]
        self._stubs = {e.stub: (e.image, e.name.decode()) for e in entries}
        entries = [lib.ptxsim_variable(i).contents for i in range(lib.ptxsim_variables())]
        self._variables = {e.host: (e.image, e.name.decode(), e.size) for e in entries}
        self._bridge = _Bridge(self._call)
        self.device, self.device_number = None, 0
        if device is not None:
            self.bind(device)

    def bind(self, device: Device):
        """Run on this device from now on (attributes set by cudaFuncSetAttribute are forgotten)."""
        self.device = device
        self._attributes = {}
        texts = [_image_for(t, device.arch) for t in self._images]
        self._modules = [t and device._load(t, f"image {i}") for i, t in enumerate(texts)]
        limits = _Limits(
            device.capability // 10,
            device.capability % 10,
            device.sm_count,
            device.threads_per_sm,
            device.shared_per_block,
            device.shared_per_block_optin,
            device.shared_per_sm,
            device.blocks_per_sm,
            device.l2_bytes,
            device.clock_khz,
            device.memory,
            device.name.encode()[:63],
        )
        self.lib.ptxsim_bind(self._bridge, ctypes.byref(limits))
        return self

    @property
    def kernels(self) -> list:
        """C++ names of the registered kernels."""
        out = []
        for image, name in self._stubs.values():
            mod = self._modules[image]
            out.append(mod.demangled.get(name, name) if mod else name)
        return out

    @property
    def last_error(self) -> int:
        """What cudaPeekAtLastError would return: a launcher that fails should not leave it set."""
        return self.lib.ptxsim_last()

    def __getattr__(self, name):
        if name.startswith("_") or "lib" not in self.__dict__:
            raise AttributeError(name)
        fn = getattr(self.lib, name)
        fn.errcheck = self._after
        setattr(self, name, fn)
        return fn

    def _after(self, result, *_):
        self.check()
        return result

    def check(self):
        """Raise the first fault since the last check, or an error of a <<< >>> launch that nobody looked at."""
        code = self.lib.ptxsim_unchecked()
        if self.device._pending is not None:
            self.lib.ptxsim_reset()
        self.device.check()
        if code and self.device.strict:
            self.lib.ptxsim_reset()
            bad = next((x for x in reversed(self.device.launches) if x.error), None)
            raise DeviceError(
                "unchecked launch error",
                bad.kernel if bad else "?",
                f"{CODE_NAME.get(code, code)}, which the host code did not check: {bad.reason if bad else ''}",
            )

    def import_module(self, name: str):
        """Import the library as the Python extension module `name` (PyInit_<name>, e.g. of pybind11).

        Its functions do not raise faults by themselves: call check() after them.
        """
        loader = importlib.machinery.ExtensionFileLoader(name, self._file)
        spec = importlib.util.spec_from_loader(name, loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    # -- calls from the library
    def _resolve(self, stub):
        if stub not in self._stubs:
            raise _LaunchFailed(INVALID_FUNCTION, "the function is not a kernel of this program")
        image, name = self._stubs[stub]
        mod = self._modules[image]
        if mod is None:
            targets = re.findall(r"^\.target\s+(\w+)", "\n".join(self._images[image]), re.M)
            raise _LaunchFailed(
                NO_KERNEL_IMAGE,
                f"{name} was compiled for {', '.join(targets) or 'no PTX target'}, not {self.device.arch}",
            )
        return mod, mod._kernels[name]

    def _call(self, op, args, n):
        if self.device._data is None:
            self.device._log_error(op.decode(), CONTEXT_DESTROYED, "the device was closed")
            return CONTEXT_DESTROYED
        try:
            return getattr(self, "_op_" + op.decode())(args, *args[:n]) or 0
        except _LaunchFailed as e:
            code, reason = e.code, e.reason
        except (DeviceError, UnsupportedInstruction, ParseError) as e:
            code, reason = (INVALID_VALUE if isinstance(e, DeviceError) else INVALID_PTX), str(e)
            self.device._fault(e)
        except MemoryError as e:
            code, reason = OUT_OF_MEMORY, str(e)
        except BaseException as e:  # e.g. KeyboardInterrupt: must not unwind through C
            code, reason = LAUNCH_FAILURE, repr(e)
            self.device._fault(e)
        self.device._log_error(op.decode(), code, reason)
        return code

    def _op_launch(self, _, stub, gx, gy, gz, bx, by, bz, args, shared, stream, cooperative):
        return self.device._launch(self, stub, (gx, gy, gz), (bx, by, bz), args, shared, stream, bool(cooperative))

    def _op_device_number(self, out, _):
        out[0] = self.device_number

    def _op_device_attribute(self, _, device, __):
        if device != self.device_number:
            raise _LaunchFailed(INVALID_DEVICE, "there is one device")

    def _op_malloc(self, out, size, _):
        out[1] = self.device.alloc(size, _from_host=True) if size else 0

    def _op_free(self, _, address):
        if address:
            self.device.free(address)

    def _op_memset(self, _, address, value, size):
        if size:
            off = self.device._range(address, size, "cudaMemset")
            self.device._data[off : off + size] = value
            self.device._shadow[off : off + size] |= 2
        return self.device.sticky

    def _op_memcpy(self, _, dst, src, size, kind):
        for address, device_side, what in ((dst, kind in (1, 3), "destination"), (src, kind in (2, 3), "source")):
            if kind < 4 and device_side != self.device.is_device(address):
                raise DeviceError(
                    "wrong memory",
                    "host code",
                    f"cudaMemcpy: the {what} {address:#x} is "
                    f"{'host' if device_side else 'device'} memory, the copy kind says otherwise",
                    address=address,
                )
        self.device._copy(dst, src, size)
        return self.device.sticky

    def _op_sync(self, _):
        return self.device.sticky

    def _op_is_device(self, out, address, _):
        out[1] = int(self.device.is_device(address))

    def _op_symbol(self, out, host, *_):
        if host not in self._variables:
            raise _LaunchFailed(INVALID_SYMBOL, "not a __device__ or __constant__ variable of this program")
        image, name, size = self._variables[host]
        mod = self._modules[image]
        if mod is None or name not in mod.global_addr:
            raise _LaunchFailed(INVALID_SYMBOL, f"{name} is not in the PTX (unused?)")
        out[1], out[2] = mod.global_addr[name], size

    def _op_func_set(self, _, stub, attribute, value):
        value = ctypes.c_int32(value & 0xFFFFFFFF).value
        mod, k = self._resolve(stub)
        attributes = self._attributes.setdefault(stub, {})
        if attribute == 8:
            most = self.device.shared_per_block_optin - mod._translate(k).static_shared
            if not 0 <= value <= most:
                raise _LaunchFailed(INVALID_VALUE, f"MaxDynamicSharedMemorySize {value}: at most {most} on this device")
            attributes["max_dynamic_shared"] = value
        elif attribute == 9:
            attributes["carveout"] = value
        else:
            raise _LaunchFailed(NOT_SUPPORTED, f"ptxsim: cudaFuncAttribute {attribute}")

    def _op_func_get(self, out, stub, *_):
        mod, k = self._resolve(stub)
        unit = mod._translate(k)
        bound = mod.ast.functions[k.name].directives.get(".maxntid")
        threads = 1
        for b in bound or [1024]:
            threads *= b
        out[1], out[2], out[3], out[4] = unit.static_shared, threads, self.device.registers, self.device.capability
        out[5] = self._attributes.get(stub, {}).get(
            "max_dynamic_shared", self.device.shared_per_block - unit.static_shared
        )

    def _op_occupancy(self, out, stub, threads, shared, _):
        mod, k = self._resolve(stub)
        unit = mod._translate(k)
        allowed = self._attributes.get(stub, {}).get(
            "max_dynamic_shared", self.device.shared_per_block - unit.static_shared
        )
        out[3] = self.device.occupancy(unit, threads, shared) if shared <= allowed else 0

    def _op_log_error(self, _, code, call, reason):
        self.device._log_error(ctypes.string_at(call).decode(), code, ctypes.string_at(reason).decode())
