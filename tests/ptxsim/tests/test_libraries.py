"""CUB, cooperative groups, fp8 and the math library: right results, no false reports."""

import ctypes
import math
import os

import numpy as np
import pytest
from ptxsim import Module, Out

HERE = os.path.dirname(os.path.abspath(__file__))

ORDERS = ["forward", "reverse", 5]
rng = np.random.default_rng(3)


@pytest.fixture(scope="session", params=["sm_75", "sm_90"])
def mod(request):
    return Module.from_cu(os.path.join(HERE, "libraries.cu"), arch=request.param, flags=["-std=c++17"])


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_cub(mod, order):
    x, o = rng.integers(0, 1000, 512).astype(np.int32), np.zeros(800, np.int32)
    mod.launch("lib_cub", 1, 128, [x, o], order=order)
    assert o[0] == x[:128].sum()
    assert np.array_equal(o[1:129], np.cumsum(x[:128]) - x[:128])
    assert np.array_equal(o[200:712], np.sort(x))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_cooperative_groups(mod, order):
    x, o = rng.standard_normal(128).astype(np.float32), np.zeros(384, np.float32)
    mod.launch("lib_cg", 1, 128, [x, o], order=order)
    assert np.allclose(o[:128].reshape(16, 8)[:, 0], x.reshape(16, 8).sum(1), atol=1e-5)
    assert np.array_equal(o[128:256].reshape(4, 32)[:, 0], x.reshape(4, 32).max(1))
    assert list(o[256:268:3]) == [1100, 1101, 1102, 1103]


def test_fp8(mod):
    x, o, f = np.linspace(-500, 500, 64).astype(np.float32), np.zeros(64, np.uint8), np.zeros(64, np.float32)
    mod.launch("lib_fp8", 1, 64, [x, Out(o), Out(f)])
    assert np.all(np.abs(f - np.clip(x, -448, 448)) <= np.abs(x) / 16)


def test_math(mod):
    x, d = rng.standard_normal(64).astype(np.float32), rng.standard_normal(64)
    o, e = np.zeros(64, np.float32), np.zeros(64)
    mod.launch("lib_math", 1, 64, [x, Out(o), d, Out(e)])
    a, v = np.abs, d
    want = (
        a(v) ** 1.7
        + np.log(a(v) + 1)
        + np.tanh(v)
        + np.cos(v * 1e7)
        + np.cbrt(v)
        + np.fmod(v, 0.3)
        + 1 / np.sqrt(a(v) + 1)
        + np.array([math.lgamma(abs(q) + 1) for q in v])
    )
    assert a(e - want).max() < 1e-6
    v = x.astype(float)
    want = (
        np.sin(v)
        + np.cos(v) * np.tan(v)
        + np.log(a(v) + 1)
        + a(v) ** 1.3
        + np.tanh(v)
        + np.exp(v)
        + 1 / np.sqrt(a(v) + 0.1)
        + np.cbrt(v)
        + np.array([math.lgamma(abs(q) + 1) + math.erfc(q) + math.erfc(-q / 2**0.5) / 2 for q in v])
        + np.arctan2(v, 2)
        + np.fmod(v, np.float32(0.3))
        + np.exp(v)
        + np.log(a(v) + 1)
        + np.sin(v)
        + np.sin((x * np.float32(1e6)).astype(float))
    )
    assert a(o - want).max() < 3e-5


def test_struct_with_pointer(mod):
    class Big(ctypes.Structure):
        _fields_ = [("m", ctypes.c_float * 32), ("n", ctypes.c_int), ("p", ctypes.c_void_p)]

    p, o, i = np.arange(64, dtype=np.float32), np.zeros(64, np.float32), np.arange(64)

    def build(address):
        return Big((ctypes.c_float * 32)(*range(32)), 7, address(p))

    mod.launch("lib_struct", 1, 64, [build, Out(o), None], buffers=[p])
    assert np.array_equal(o, (i & 31) + 1 + 7 + i + ((i * 7) & 31) + i)
