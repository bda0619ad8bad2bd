"""Host launch code on an emulated device: results, launch configuration errors, planted launcher bugs."""

import ctypes
import os
import sysconfig

import numpy as np
import pytest
from ptxsim import Device, DeviceError, HostProgram, Module, Out, toolchain

HERE = os.path.dirname(os.path.abspath(__file__))

SOURCE = os.path.join(HERE, "program.cu")
NONE, WRONG_GRID, NO_GRID, BIG_BLOCK, SWAPPED = range(5)
P, INT = ctypes.c_void_p, ctypes.c_int


class ScaleParams(ctypes.Structure):
    _fields_ = [("x", P), ("y", P), ("n", INT), ("half", INT), ("bug", INT)]


@pytest.fixture(scope="session")
def program():
    return HostProgram([SOURCE], arches=["sm_90a", "sm_80"])


@pytest.fixture
def dev(program):
    with Device("sm_90a", timeout=60) as d:
        program.bind(d)
        yield d


def f32(n):
    return np.arange(n, dtype=np.float32)


def scale(program, dev, x, n_out=None, bug=NONE):
    src, dst = dev.upload(x), dev.alloc(x.itemsize * (n_out or x.size), "result")
    r = program.scale(ctypes.byref(ScaleParams(src, dst, x.size, x.dtype == np.float16, bug)), None)
    return r, dev.download(dst, x, complete=True) if r == 0 else None


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["forward", "reverse", 3])
def test_templates(program, dev, order):
    dev.order = order
    assert np.array_equal(scale(program, dev, f32(1000))[1], 3 * f32(1000))
    assert np.array_equal(scale(program, dev, f32(100).astype(np.float16))[1], 5 * f32(100).astype(np.float16))
    a, b = dev.launches
    assert a.kernel.startswith("void scale_kernel<float, 3>") and b.kernel.startswith("void scale_kernel<__half, 5>")
    assert (a.grid, a.block, a.error) == ((8, 1, 1), (128, 1, 1), None) and a.instructions > 1000
    assert any("scale_kernel<float, 3>" in k for k in program.kernels)


def test_large_shared(program, dev):
    x = f32(3 * 20000).reshape(3, 20000) % 7
    src, dst = dev.upload(x), dev.alloc(12)
    assert program.sums(P(src), P(dst), 3, 20000, 1, None) == 0
    assert np.array_equal(dev.download(dst, 3, np.float32), x.sum(1))
    assert dev.launches[0].shared_bytes == 80000 and dev.launches[0].attributes == {"max_dynamic_shared": 80000}


def test_launches_that_are_not_executed(program, dev):
    """They are checked and recorded; memory stays as it was."""
    dev.execute = False
    x = f32(1000)
    src, dst = dev.upload(x), dev.upload(7 * x)
    assert program.scale(ctypes.byref(ScaleParams(src, dst, x.size, False, NONE)), None) == 0
    assert np.array_equal(dev.download(dst, x), 7 * x)
    assert (dev.launches[0].grid, dev.launches[0].instructions) == ((8, 1, 1), 0)
    assert program.sums(P(src), P(dst), 3, 200000, 1, None) != 0, "more shared memory than there is"


def test_profile_and_options(program, dev):
    dev.profile, dev.workers = True, 2
    scale(program, dev, f32(1024))
    assert dev.launches[0].profile.loads.unique_bytes >= 4096
    assert "program.cu:" in dev.launches[0].profile.report()


def test_runtime_calls(program, dev):
    out = np.zeros(300, np.float32)
    assert program.roundtrip(f32(300).ctypes.data_as(P), out.ctypes.data_as(P), 300, 0) == 0
    assert np.array_equal(out, 3 * f32(300) + 10)


def test_queries(program, dev):
    out = (INT * 6)()
    assert program.query(out) == 0
    assert list(out) == [90, 132, 232448, 5, 2, 1024]


def test_device_number(program, dev):
    """Launchers that ask for the current device go on; one that names device 0 does not find it."""
    out, src, dst = (INT * 6)(), dev.upload(f32(20000)), dev.alloc(4)
    program.device_number = 70
    try:
        assert program.sums(P(src), P(dst), 1, 20000, 1, None) == 0
        assert program.query(out) == -1 and dev.errors[-1].call == "cudaGetDeviceProperties"
    finally:
        program.device_number = 0
    assert program.query(out) == 0


def test_what_is_not_emulated_is_an_error(program, dev):
    assert program.in_clusters(P(dev.upload(f32(8))), P(dev.alloc(8)), 4) == 801
    assert "launch attributes" in dev.errors[-1].reason and not dev.launches
    assert program.allow_large_clusters() == 801
    assert dev.errors[-1].reason == "ptxsim: cudaFuncAttribute 14"


def test_two_devices_and_extension(program):
    flags = ["-I", sysconfig.get_paths()["include"]]
    ext = HostProgram([SOURCE, os.path.join(HERE, "extension.cpp")], arches=["sm_80"], flags=flags)
    with Device("sm_80") as a, Device("sm_90a") as b:
        ext.bind(a)
        program.bind(b)
        module = ext.import_module("program_ext")
        x, y = a.upload(f32(100)), a.alloc(400)
        assert module.scale(x, y, 100) == 0
        ext.check()
        assert np.array_equal(a.download(y, 100, np.float32), 3 * f32(100))
        assert module.scale(x, y, 150) == 700  # reads past x
        with pytest.raises(DeviceError):
            ext.check()
        assert len(a.launches) == 2 and not b.launches


# ---- launch configuration ------------------------------------------------------------------------


@pytest.mark.parametrize("bug,code,text", [(NO_GRID, 9, "grid (0, 1, 1)"), (BIG_BLOCK, 9, "2048 threads")])
def test_configuration(program, dev, bug, code, text):
    assert scale(program, dev, f32(100), bug=bug)[0] == code
    assert text in dev.launches[0].reason and dev.launches[0].error == "cudaErrorInvalidConfiguration"
    assert scale(program, dev, f32(100))[0] == 0  # not sticky


def test_missing_attribute(program, dev):
    src, dst = dev.upload(f32(20000)), dev.alloc(4)
    assert program.sums(P(src), P(dst), 1, 20000, 0, None) == 1
    assert "MaxDynamicSharedMemorySize) was not called" in dev.launches[0].reason
    assert program.sums(P(src), P(dst), 1, 12000, 0, None) == 0
    assert program.last_error == 1  # as in CUDA, until someone asks
    assert program.sums(P(src), P(dst), 1, 60000, 1, None) == -2


def test_other_arch(program):
    with Device("sm_80") as d:
        program.bind(d)
        assert np.array_equal(scale(program, d, f32(100))[1], 3 * f32(100))
    with Device("sm_75") as d:
        program.bind(d)
        assert scale(program, d, f32(100))[0] == 209
        assert "compiled for sm_90a, sm_80, not sm_75" in d.launches[0].reason
    with Device("sm_120") as d:  # takes the sm_80 code: sm_90a's runs on sm_90 only
        program.bind(d)
        assert scale(program, d, f32(100))[0] == 0
        assert program._modules[0].ast.target.startswith("sm_80")


def test_unchecked(program, dev):
    with pytest.raises(DeviceError, match="grid"):
        program.scale_unchecked(ctypes.byref(ScaleParams(0, 0, 0, 0, 0)))
    dev.strict = False
    assert program.scale_unchecked(ctypes.byref(ScaleParams(0, 0, 0, 0, 0))) == 0


# ---- launcher bugs -------------------------------------------------------------------------------


@pytest.mark.parametrize("bug,buffer", [(WRONG_GRID, "upload of float32[256]"), (SWAPPED, "result")])
def test_planted_bugs(program, dev, bug, buffer):
    with pytest.raises(DeviceError) as e:
        scale(program, dev, f32(256), n_out=128 if bug == SWAPPED else None, bug=bug)
    print(e.value)
    assert e.value.what in ("out-of-bounds", "uninitialised read") and buffer in e.value.buffer
    assert e.value.source.startswith("program.cu:") and dev.launches[0].error
    assert scale(program, dev, f32(10))[0] == 0  # usable again


def test_launch_returns_the_code(program, dev):
    """The launcher's own error path sees the fault, and the exception comes after it returns."""
    seen = []
    inner = program.lib["scale"]  # without the check
    inner.restype = INT
    src = dev.upload(f32(64))
    seen.append(inner(ctypes.byref(ScaleParams(src, dev.alloc(100), 64, 0, 0)), None))
    seen.append(inner(ctypes.byref(ScaleParams(src, dev.alloc(256), 64, 0, 0)), None))
    assert seen == [700, 700]  # sticky until the exception is raised
    with pytest.raises(DeviceError, match="out-of-bounds"):
        program.check()


def test_leak_and_double_free(program):
    out = np.zeros(30, np.float32)
    d = Device()
    program.bind(d)
    assert program.roundtrip(f32(30).ctypes.data_as(P), out.ctypes.data_as(P), 30, 1) == 0
    with pytest.raises(DeviceError, match="120 bytes not freed"):
        d.close()
    with Device() as d:
        program.bind(d)
        with pytest.raises(DeviceError) as e:
            program.roundtrip(f32(30).ctypes.data_as(P), out.ctypes.data_as(P), 30, 2)
        assert e.value.what == "double free"
        a = d.alloc(16)
        d.free(a)
        with pytest.raises(DeviceError, match="double free"):
            d.free(a)
        with pytest.raises(DeviceError, match="freed"):
            d.download(a, 4, np.float32)


def test_closed_device(program):
    with Device() as d:
        program.bind(d)
    assert program.scale(ctypes.byref(ScaleParams(0, 0, 10, 0, 0)), None) == 709


def test_use_after_free(program, dev):
    src, dst = dev.upload(f32(64)), dev.alloc(256)
    dev.free(src)
    with pytest.raises(DeviceError) as e:
        program.scale(ctypes.byref(ScaleParams(src, dst, 64, 0, 0)), None)
    assert "(freed)" in e.value.buffer


def test_device_memory(dev):
    x = dev.upload(f32(10), readonly=True)
    assert np.array_equal(dev.download(x, f32(10)), f32(10))
    with pytest.raises(DeviceError, match="past the end"):
        dev.download(x, 11, np.float32)
    with pytest.raises(DeviceError, match="unwritten output"):
        dev.download(dev.alloc(40), 10, np.float32, complete=True)
    with pytest.raises(DeviceError):
        dev.upload(f32(11), to=x)


# ---- building ------------------------------------------------------------------------------------


def test_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PTXSIM_CACHE", str(tmp_path / "cache"))
    src, header = tmp_path / "a.cu", tmp_path / "a.h"
    src.write_text(
        '#include "a.h"\n__global__ void k(int* p) { *p = V; }\n'
        'extern "C" int go(int* p) { k<<<1, 1>>>(p); return cudaGetLastError(); }\n'
    )
    header.write_text("#define V 4\n")

    def build():
        with Device("sm_80") as d:
            program = HostProgram(src, d)
            y = d.alloc(4)
            assert program.go(P(y)) == 0
            return d.download(y, 1, np.int32)[0]

    assert build() == 4
    runs = []
    original = toolchain.run

    def recording_run(command):
        runs.append(command)
        return original(command)

    monkeypatch.setattr(toolchain, "run", recording_run)
    assert build() == 4 and not runs
    header.write_text("#define V 5\n")
    assert build() == 5 and len(runs) == 3  # nvcc, link, nm


def test_launch_bounds_and_cooperative(tmp_path):
    src = tmp_path / "c.cu"
    src.write_text("""
        #include <cuda_runtime.h>
        __global__ void __launch_bounds__(64) bounded(int* p) { *p = blockDim.x; }
        __global__ void meet(unsigned* n) {              // every block waits for all of them
          if (threadIdx.x == 0) { atomicAdd(n, 1); while (*(volatile unsigned*)n < gridDim.x); }
        }
        extern "C" int bound(int* p, int block) { bounded<<<1, block>>>(p); return cudaGetLastError(); }
        extern "C" int together(unsigned* n, int blocks) {
          void* args[] = {&n};
          cudaError_t e = cudaLaunchCooperativeKernel((void*)meet, dim3(blocks), dim3(32), args, 0, nullptr);
          cudaGetLastError();
          return e;
        }""")
    with Device("sm_90a", sm_count=1, timeout=20) as d:
        program = HostProgram(src, d)
        p = d.upload(np.zeros(1, np.uint32))
        assert program.together(P(p), 8) == 0 and d.download(p, 1, np.uint32)[0] == 8
        assert program.together(P(p), 33) == 720  # 32 blocks fit on the SM
        assert program.bound(P(p), 64) == 0 and program.bound(P(p), 65) != 0
        assert "__launch_bounds__" in d.launches[-1].reason


def test_missing_runtime_function(tmp_path):
    src = tmp_path / "b.cu"
    src.write_text('#include <cuda_runtime.h>\nextern "C" int go() { cudaGraph_t g; return cudaGraphCreate(&g, 0); }\n')
    with pytest.raises(RuntimeError, match="cudaGraphCreate"):
        HostProgram(src, arches=["sm_80"])


# ---- memory of the device --------------------------------------------------------------------------


def test_second_write(program, dev, tmp_path):
    p = ScaleParams(dev.upload(f32(64)), dev.alloc(256, "result", once=True), 64, 0, 0)
    assert program.scale(ctypes.byref(p), None) == 0
    with pytest.raises(DeviceError) as e:
        program.scale(ctypes.byref(p), None)
    assert e.value.what == "second write" and "byte 0 of result" in e.value.buffer
    src = tmp_path / "twice.cu"
    src.write_text('extern "C" __global__ void twice(int* p) { p[threadIdx.x / 2] = 1; }\n')
    mod = Module.from_cu(src)
    out = np.zeros(16, np.int32)
    mod.launch("twice", 1, 32, [Out(out)])
    with pytest.raises(DeviceError, match="second write") as e:
        mod.launch("twice", 1, 32, [Out(out, once=True)])
    assert e.value.thread == (1, 0, 0)


def test_view(program, dev):
    storage = f32(65).astype(np.float16)
    x = storage[1:]
    address = dev.upload_view(x, "x", readonly=True)
    assert address % 256 == x.ctypes.data % 16 == 2
    dst = dev.alloc(128)
    assert program.scale(ctypes.byref(ScaleParams(address, dst, 64, 1, 0)), None) == 0
    assert np.array_equal(dev.download(dst, x), 5 * x)
    with pytest.raises(DeviceError, match="read-only"):
        program.scale(ctypes.byref(ScaleParams(dst, address, 64, 1, 0)), None)
    square = f32(64).reshape(8, 8)
    assert np.array_equal(dev.download(dev.upload_view(square.T), square.T), square.T)
    columns = dev.upload_view(square.T[:6])
    for n, fault in ((6, False), (7, True)):  # the columns 6 and 7 of each row lie between the elements
        p = ScaleParams(columns, dev.alloc(4 * n), n, 0, 0)
        if fault:
            with pytest.raises(DeviceError, match="out-of-bounds"):
                program.scale(ctypes.byref(p), None)
        else:
            assert program.scale(ctypes.byref(p), None) == 0


def test_scope(program, dev):
    outside = dev.upload(f32(4))
    with dev.scope():
        inside = dev.upload(f32(100000))
    with pytest.raises(DeviceError):
        dev.download(inside, 4, np.float32)
    with dev.scope():
        assert dev.alloc(400000) == inside
    assert np.array_equal(dev.download(outside, 4, np.float32), f32(4))
    out = np.zeros(30, np.float32)
    with pytest.raises(DeviceError, match="not freed"), dev.scope():
        program.roundtrip(f32(30).ctypes.data_as(P), out.ctypes.data_as(P), 30, 1)


def test_a_structure_of_another_size_is_refused(program):
    class Entry(ctypes.Structure):
        _fields_ = [("stub", ctypes.c_void_p)]

    with pytest.raises(RuntimeError, match=r"Entry has 24 bytes in C\+\+, 8 in Python"):
        toolchain.check_sizes(program.lib, {"ptxsim_size_of_kernel": Entry})


def test_find_nvcc(tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.delenv("CMF_NVCC", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert toolchain.find_nvcc() == str(fake)
    monkeypatch.setenv("CMF_NVCC", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="CMF_NVCC"):
        toolchain.find_nvcc()
    monkeypatch.setenv("CMF_NVCC", str(fake))
    assert toolchain.find_nvcc() == str(fake)
    monkeypatch.delenv("CMF_NVCC")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RuntimeError, match="ptxsim needs nvcc"):
        toolchain.find_nvcc()
