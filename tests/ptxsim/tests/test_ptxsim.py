"""ptxsim tests: results against numpy, and planted bugs that must be reported."""

import math
import os
from pathlib import Path

import numpy as np
import ptxsim
import pytest
from ptxsim import DeviceError, Module, Out, from_bf16, to_bf16

HERE = os.path.dirname(os.path.abspath(__file__))

ORDERS = ["forward", "reverse", 7]
rng = np.random.default_rng(1)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    rng.bit_generator.state = np.random.default_rng(1).bit_generator.state


@pytest.fixture(scope="session")
def mod():
    return Module.from_cu(os.path.join(HERE, "kernels.cu"), arch="sm_80")


def f16_samples(n):
    """Random f16 values of many magnitudes, with zeros, subnormals, infinities and NaN."""
    x = rng.integers(0, 1 << 16, n).astype(np.uint16)
    x[: n // 2] = (rng.standard_normal(n // 2) * 4).astype(np.float16).view(np.uint16)
    x[-8:] = [0, 0x8000, 1, 0x8001, 0x7C00, 0xFC00, 0x7BFF, 0x3C00]
    return x.view(np.float16)


def same(a, b):
    """Equal bits up to NaN payloads."""
    a, b = np.asarray(a), np.asarray(b)
    return bool(np.all((a == b) & (np.signbit(a) == np.signbit(b)) | (np.isnan(a) & np.isnan(b))))


def round_odd_sum(p, c):
    """p + c in float64, rounded to odd (for a correctly rounded narrow fma)."""
    with np.errstate(all="ignore"):
        s = p + c
        bb = s - p
        err = (p - (s - bb)) + (c - bb)
        bits = s.view(np.int64).copy()
        fix = (err != 0) & np.isfinite(s) & (bits & 1 == 0) & (s != 0)
        bits[fix] += np.where((err > 0) == (s > 0), 1, -1)[fix]
        return bits.view(np.float64)


def f64_to_bf16(x):
    """float64 -> bf16 bits, one rounding (via round-to-odd float32)."""
    with np.errstate(all="ignore"):
        f = x.astype(np.float32)
        back = f.astype(np.float64)
        bits = f.view(np.int32).copy()
        fix = (back != x) & np.isfinite(f) & (bits & 1 == 0)
        bits[fix] += np.where(np.abs(back) < np.abs(x), 1, -1)[fix]
        return to_bf16(bits.view(np.float32))


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_vadd(mod, order):
    n = 1000
    a, b = rng.standard_normal((2, n)).astype(np.float32)
    c = np.zeros(n, np.float32)
    mod.launch("vadd", 4, 256, [a, b, Out(c), n], order=order)
    assert np.array_equal(c, a + b)


@pytest.mark.parametrize("order", ORDERS)
def test_reduction(mod, order):
    x = rng.integers(-8, 8, 5000).astype(np.float32)
    out = np.zeros(1, np.float32)
    mod.launch("block_sum", 3, 256, [x, out, x.size], order=order)
    assert out[0] == x.sum()


def test_workers(mod):
    x = rng.integers(-8, 8, 5000).astype(np.float32)
    out = np.zeros(1, np.float32)
    mod.launch("block_sum", 30, 128, [x, out, x.size], workers=2)
    assert out[0] == x.sum()


def test_half(mod):
    n = 4096
    a, b, c = f16_samples(n), f16_samples(n)[::-1].copy(), f16_samples(n)
    o = np.zeros((6, n), np.float16)
    mod.launch("half_ops", 16, 256, [a, b, c, Out(o), n])
    A, B, C = (v.astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        assert same(o[0], (A + B).astype(np.float16))
        assert same(o[1], (A * B).astype(np.float16))
        fma = round_odd_sum(A * B, C).astype(np.float16)
        assert same(o[2], fma)
        assert np.array_equal(np.fmax(a, b)[a != b], o[3][a != b], equal_nan=True)
        assert np.array_equal(o[3][a == b], a[a == b])  # either zero
        assert same(o[4], (a.astype(np.float32) / b.astype(np.float32)).astype(np.float16))
        assert same(o[5], np.where(np.isnan(fma), fma, np.where(fma > 0, fma, np.float16(0))))


def test_half2(mod):
    n = 1024
    a, b, c = f16_samples(2 * n), f16_samples(2 * n)[::-1].copy(), f16_samples(2 * n)
    o = np.zeros((4, 2 * n), np.float16)
    mod.launch("half2_ops", 4, 256, [a, b, c, Out(o), n])
    A, B, C = (v.astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        assert same(o[0], round_odd_sum(A * B, C).astype(np.float16))
        d = (A - B).astype(np.float16)
        e = np.fmin(d, np.abs(c))
        assert np.array_equal(o[1], e, equal_nan=True)
        assert same(o[2], (a > b).astype(np.float16))
        assert same(o[3], (a.astype(np.float32) * np.float32(3)).astype(np.float16))


def test_bf16(mod):
    n = 4096
    f = (rng.standard_normal(n) * np.exp2(rng.integers(-140, 120, n))).astype(np.float32)
    f[:4] = [np.inf, -np.inf, np.nan, 3.4e38]
    a, b, c = (to_bf16(rng.standard_normal(n) * np.exp2(rng.integers(-20, 20, n))) for _ in range(3))
    a[:100] = rng.integers(0, 1 << 16, 100)
    b[50:150] = rng.integers(0, 1 << 16, 100)
    o = np.zeros((5, n), np.uint16)
    mod.launch("bf16_ops", 16, 256, [a, b, c, Out(o), f, n])
    A, B, C = (from_bf16(v).astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        for got, want in (
            (o[0], f64_to_bf16(A + B)),
            (o[1], f64_to_bf16(A * B)),
            (o[2], f64_to_bf16(round_odd_sum(A * B, C))),
            (o[3], to_bf16(f)),
            (o[4], to_bf16(-f)),
        ):
            assert same(from_bf16(got), from_bf16(want))


def test_f32_rounding(mod):
    from fractions import Fraction

    n = 512
    a, b, c = ((rng.standard_normal(n) * np.exp2(rng.integers(-6, 6, n))).astype(np.float32) for _ in range(3))
    o = np.zeros((7, n), np.float32)
    mod.launch("f32_rounding", 2, 256, [a, b, c, Out(o), n])

    def directed(exact, mode):
        f = np.float32(float(exact))
        g = Fraction(float(f))
        toward = {"z": -math.copysign(1, float(exact)), "d": -1, "u": 1}[mode]
        if g > exact and toward < 0:
            f = np.nextafter(f, np.float32(-np.inf))
        elif g < exact and toward > 0:
            f = np.nextafter(f, np.float32(np.inf))
        return f

    for i in range(n):
        A, B, C = Fraction(float(a[i])), Fraction(float(b[i])), Fraction(float(c[i]))
        assert o[0, i] == directed(A + B, "z")
        assert o[1, i] == directed(A * B + C, "d")
        assert o[2, i] == directed(A * B, "u")
        assert o[5, i] == directed(A / B, "z")
    assert np.array_equal(o[3], a / b)
    assert np.array_equal(o[4], np.sqrt(np.abs(a)))
    want = (round_odd_sum(a.astype(np.float64) * b, c.astype(np.float64))).astype(np.float32)
    assert np.array_equal(o[6], want)


def test_conversions(mod):
    n = 256
    a = (rng.standard_normal(n) * np.exp2(rng.integers(0, 40, n))).astype(np.float32)
    a[:6] = [np.nan, np.inf, -np.inf, 2.5, -2.5, 3.5]
    d = rng.standard_normal(n) * np.exp2(rng.integers(0, 60, n))
    o = np.zeros((8, n), np.int32)
    longs = np.zeros((2, n), np.int64)
    mod.launch("conversions", 1, 256, [a, d, Out(o), Out(longs), n])

    def sat(v, lo, hi):
        v = np.where(np.isnan(v), 0, v)
        return np.array([int(min(max(x, lo), hi)) for x in v])

    A = a.astype(np.float64)
    i32 = (-(2**31), 2**31 - 1)
    with np.errstate(all="ignore"):
        assert np.array_equal(o[0], sat(np.rint(A), *i32))
        assert np.array_equal(o[1], sat(np.trunc(A), *i32))
        assert np.array_equal(o[2], sat(np.floor(A), *i32))
        assert np.array_equal(o[3].view(np.uint32), sat(np.ceil(A), 0, 2**32 - 1))
        assert np.array_equal(o[4].view(np.float32), d.astype(np.float32))
        rz = d.astype(np.float32)
        rz = np.where(np.abs(rz.astype(np.float64)) > np.abs(d), np.nextafter(rz, np.float32(0)), rz)
        assert np.array_equal(o[5].view(np.float32), rz)
        assert np.array_equal(o[6].view(np.float32), np.trunc(d).astype(np.int64).astype(np.float32))
        assert np.array_equal(o[7], sat(np.trunc(A), *i32).astype(np.int8))
        assert np.array_equal(longs[0], np.rint(d).astype(np.int64))
        assert np.array_equal(longs[1][3:], np.trunc(A[3:]).astype(np.int64))


def test_int_ops(mod):
    n = 256
    a, b = rng.integers(0, 2**32, (2, n), dtype=np.uint64).astype(np.uint32)
    a[:3], b[:3] = [0, 0xFFFFFFFF, 1], [0, 1, 0x80000000]
    o = np.zeros((20, n), np.uint32)
    mod.launch("int_ops", 1, 256, [a, b, Out(o), n])
    M = 0xFFFFFFFF

    def s(v):
        return v - (1 << 32) if v >> 31 else v

    def i8(v, k):
        return ((v >> 8 * k & 255) ^ 128) - 128

    for i in range(n):
        x, y = int(a[i]), int(b[i])
        perm, both = 0, x | y << 32
        for k in range(4):
            sel = (0x5410 + (y & 3)) >> (4 * k) & 7
            perm |= (both >> (8 * sel) & 255) << (8 * k)
        div = y | 1
        q = abs(s(x)) // abs(s(div)) * (1 if (s(x) < 0) == (s(div) < 0) else -1)
        bfe = (x >> 5) & 0x7FF
        bfe = bfe - 0x800 if bfe & 0x400 else bfe
        mask = 0x1FF << 7
        want = [
            bin(x).count("1"),
            int(f"{x:032b}"[::-1], 2),
            32 - x.bit_length(),
            perm,
            ((y << 32 | x) << (y & 31) >> 32) & M,
            ((y << 32 | x) >> (x & 31)) & M,
            x * y >> 32,
            (s(x) * s(y) >> 32) & M,
            (sum(i8(x, k) * i8(y, k) for k in range(4)) + 7) & M,
            x // div,
            (s(x) - q * s(div)) & M,
            x >> (y & 31 if y & 63 else 0),
            (s(x) >> (y & 31)) & M,
            ((x * y + 12345) >> 32) & M,
            ((x * y + 12345) % 2**64) % 1000003,
            (x & ~y) ^ (x | y),
            bfe & M,
            (y & ~mask) | (x << 7 & mask),
            (x + y) >> 32,
            1 if s(x) > s(y) else 2,
        ]
        assert [int(v) for v in o[:, i]] == want


@pytest.mark.parametrize("order", ORDERS)
def test_warp_ops(mod, order):
    x = rng.integers(0, 50, 64).astype(np.uint32)
    x[40] = 5
    o = np.zeros((9, 64), np.uint32)
    mod.launch("warp_ops", 1, 64, [x, Out(o)], order=order)
    for w in range(2):
        v = x[32 * w : 32 * w + 32]
        sl = slice(32 * w, 32 * w + 32)
        ballot = sum(int(b & 1) << i for i, b in enumerate(v))
        assert np.all(o[0, sl] == ballot)
        assert [int(q) for q in o[1, sl]] == [sum(int((p & 3) == (q & 3)) << i for i, p in enumerate(v)) for q in v]
        assert np.all(o[2, sl] == v.sum()) and np.all(o[3, sl] == v.max())
        assert np.array_equal(o[4, sl], [v[(i & 16) + (i * 7 & 15)] for i in range(32)])
        assert np.array_equal(o[5, sl], [v[i - 3] if i >= 3 else v[i] for i in range(32)])
        assert np.array_equal(o[6, sl], [(ballot & 0xFFF) + 0xFFF if i < 12 else 0 for i in range(32)])
        assert np.all(o[8, sl] == (int(np.any(v == 5)) | 2))
    assert np.all(o[7] == (x & 1).sum())


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(mod, order):
    n = 300
    x = rng.integers(0, 100, n).astype(np.int32)
    hist, fsum, hsum = np.zeros(8, np.uint32), np.zeros(1, np.float32), np.zeros(2, np.float16)
    mx, inc, cas = np.full(1, -5, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    mod.launch("atomics", 3, 128, [hist, x, n, fsum, hsum, mx, inc, cas], order=order)
    assert np.array_equal(hist, np.bincount(x & 7, minlength=8))
    assert fsum[0] == x.sum() and mx[0] == x.max() and cas[0] == 3 * n and inc[0] == n % 10
    assert list(hsum) == [300, 150]


def test_calls_and_symbols(mod, capfd):
    o, f = np.zeros(64, np.int32), np.zeros(64, np.float32)
    mod.symbol("counter").view(np.int32)[0] = 40
    mod.symbol("coef").view(np.float32)[:] = [1, 0, 0, 2]
    mod.launch("calls", 1, 64, [Out(o), Out(f), 3])
    t = np.arange(64)

    def sq(i):
        return (i & 15) ** 2

    want = np.select([(t + 3) % 7 == k for k in range(6)], [55, sq(t), -5, 1, t * 1000, sq(t * 3) + 3], 99)
    assert np.array_equal(o, want)
    assert np.array_equal(f, (t**3 + 2).astype(np.float32))
    assert mod.symbol("counter").view(np.int32)[0] == 104
    assert capfd.readouterr().out == "thread 5: text 127.00 1099511627776%\n"


def ulps(a, b):
    a, b = a.astype(np.float32), b.astype(np.float64)
    return np.abs(a.astype(np.float64) - b) / np.spacing(np.abs(b).astype(np.float32)).astype(np.float64)


def test_erf_gelu(mod):
    x = np.concatenate([np.linspace(-6, 6, 4000), [0, 1e-20, -1e-5]]).astype(np.float32)
    e, g = np.zeros_like(x), np.zeros_like(x)
    mod.launch("erf_gelu", 16, 256, [x, Out(e), Out(g), x.size])
    exact = np.array([math.erf(v) for v in x.astype(np.float64)])
    assert ulps(e, exact).max() <= 2
    gelu = np.array([0.5 * v * (1 + math.erf(v * math.sqrt(0.5))) for v in x.astype(np.float64)])
    assert np.abs(g - gelu).max() < 5e-7


def test_f64(mod):
    x = rng.standard_normal(500) * 5
    o = np.zeros((6, 500))
    mod.launch("f64_math", 2, 256, [x, Out(o), 500])
    want = [np.exp(x), x / (x * x + 1), np.sqrt(np.abs(x)), x * x - 1, np.sin(x), [math.erf(v) for v in x]]
    for got, w in zip(o, want):
        assert np.allclose(got, w, rtol=1e-15, atol=1e-15)
    assert np.array_equal(o[2], want[2])


def test_dynamic_shared(mod):
    n = 128
    x, o = rng.standard_normal(n).astype(np.float32), np.zeros(n, np.float32)
    mod.launch("reverse_dynamic", 1, n, [x, Out(o), n], shared_bytes=8 * n)
    assert np.array_equal(o, x[::-1] + 2 * x)
    with pytest.raises(DeviceError) as e:
        mod.launch("reverse_dynamic", 1, n, [x, Out(o), n], shared_bytes=8 * n - 4)
    assert e.value.what == "out-of-bounds" and e.value.thread == (127, 0, 0)
    assert "past the end of dynamic shared memory" in e.value.buffer


@pytest.mark.parametrize("order", ORDERS)
def test_mma_f16(mod, order):
    A, B = (rng.integers(-8, 9, shape).astype(np.float16) for shape in ((16, 16), (16, 8)))  # no sum is rounded
    C, Ch = np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float16)
    mod.launch("mma_f16", 1, 32, [A, B, Out(C), Out(Ch)], order=order)
    exact = A.astype(np.float64) @ B.astype(np.float64)
    assert np.array_equal(C, exact)
    assert np.array_equal(Ch, exact)


def test_mma_others(mod):
    def eighths(*shape):  # no sum of their products is rounded
        return (rng.integers(-32, 33, shape) / 8).astype(np.float32)

    af, bf = eighths(16, 32), eighths(32, 8)
    g, t = np.arange(32) // 4, np.arange(32) % 4

    def fragments(elem, ka):
        """Registers of A [16][ka] and B [ka][8] for `elem` values per 32-bit register."""
        a = np.zeros((32, 4, elem), int), np.zeros((32, 4, elem), int)
        b = np.zeros((32, 2, elem), int), np.zeros((32, 2, elem), int)
        for r in range(4):
            for j in range(elem):
                a[0][:, r, j], a[1][:, r, j] = g + 8 * (r & 1), elem * t + j + 4 * elem * (r >> 1)
        for r in range(2):
            for j in range(elem):
                b[0][:, r, j], b[1][:, r, j] = elem * t + j + 4 * elem * r, g
        return a, b

    def run(A, B):
        outs = [
            np.zeros((32, 4), np.float32),
            np.zeros((32, 4), np.float32),
            np.zeros((32, 4), np.int32),
            np.zeros((8, 8)),
        ]
        da, db = eighths(8, 4).astype(np.float64), eighths(4, 8).astype(np.float64)
        mod.launch("mma_others", 1, 32, [A, B] + [Out(o) for o in outs] + [da, db])
        assert np.array_equal(outs[3], da @ db)
        return outs

    def unpack(frag):
        C = np.zeros((16, 8))
        for i in range(4):
            C[g + 8 * (i >> 1), 2 * t + (i & 1)] = frag[:, i]
        return C

    add = unpack(np.tile([1.0, 2, 3, 4], (32, 1)))
    (ar, ac), (br, bc) = fragments(2, 16)
    ab, bb = to_bf16(af), to_bf16(bf)
    A, B = (np.ascontiguousarray(v).view(np.uint32).reshape(32, -1) for v in (ab[ar, ac], bb[br, bc]))
    with np.errstate(all="ignore"):
        out = run(A, B)[0]
    want = from_bf16(ab)[:, :16].astype(np.float64) @ from_bf16(bb)[:16].astype(np.float64) + add
    assert np.array_equal(unpack(out), want)
    (ar, ac), (br, bc) = fragments(1, 8)

    def with_lower_bits(v):  # which tf32 does not have
        return np.ascontiguousarray(v).view(np.uint32) | rng.integers(0, 1 << 13, v.shape, np.uint32)

    A, B = (with_lower_bits(v).reshape(32, -1) for v in (af[ar, ac], bf[br, bc]))
    out = run(A, B)[1]
    assert np.array_equal(unpack(out), af[:, :8].astype(np.float64) @ bf[:8].astype(np.float64))
    ai, bi = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (32, 8)).astype(np.int8)
    (ar, ac), (br, bc) = fragments(4, 32)
    A, B = (np.ascontiguousarray(v).view(np.uint32).reshape(32, -1) for v in (ai[ar, ac], bi[br, bc]))
    out = run(A, B)[2]
    assert np.array_equal(unpack(out), ai.astype(int) @ bi.astype(int) + add + 4)


def dwconv_reference(x, w):
    n, h, wd = x.shape
    xp = np.pad(x.astype(np.float64), ((0, 0), (4, 4), (4, 4)))
    wh = w.astype(np.float16).astype(np.float64)
    out = np.zeros((n, h, wd))
    for dy in range(9):
        for dx in range(9):
            out += xp[:, dy : dy + h, dx : dx + wd] * wh[np.arange(n) % len(w), dy, dx][:, None, None]
    return out


def dwconv_data(planes, channels):
    x = rng.standard_normal((planes, 32, 32)).astype(np.float16)
    w = (rng.standard_normal((channels, 9, 9)) / 9).astype(np.float32)
    return x, w, np.zeros_like(x)


@pytest.mark.parametrize("order", ORDERS)
def test_dwconv(mod, order):
    x, w, y = dwconv_data(6, 3)
    mod.launch("dwconv9", 6, 128, [x, w, Out(y), 3], order=order)
    assert np.abs(y - dwconv_reference(x, w)).max() < 4e-3


def test_dwconv_many_blocks(mod):
    x, w, y = dwconv_data(64 * 16, 16)
    mod.launch("dwconv9", 64 * 16, 128, [x, w, Out(y), 16])
    assert np.abs(y[:40] - dwconv_reference(x[:40], w)).max() < 4e-3


@pytest.mark.parametrize("order", ORDERS)
def test_grid_sync(mod, order):
    c, d, o = np.zeros(1, np.uint32), np.zeros(4 * 32, np.int32), np.zeros(4 * 32, np.int32)
    mod.launch("grid_sync", 4, 32, [c, d, Out(o)], coresident=True, order=order, timeout=20)
    assert np.array_equal(o.reshape(4, 32)[:, 0], [10, 20, 30, 0])


# ---- planted bugs --------------------------------------------------------------------------------


def fault(mod, *args, **kw):
    with pytest.raises(DeviceError) as e:
        mod.launch(*args, **kw)
    print(e.value)
    return e.value


def f32(n):
    return np.zeros(n, np.float32)


def test_bug_oob(mod):
    e = fault(mod, "bug_oob", 1, 64, [f32(64), f32(64), 64])
    assert e.what == "out-of-bounds" and e.thread == (63, 0, 0) and e.block == (0, 0, 0)
    assert "1 byte(s) past the end of argument 0" in e.buffer
    src = Path(HERE, "kernels.cu").read_text().splitlines()
    assert e.source.startswith("kernels.cu:")
    assert "a[i + 1]" in src[int(e.source.split(":")[1]) - 1]


def test_bug_misaligned(mod):
    e = fault(mod, "bug_misaligned", 1, 8, [f32(64), f32(64)])
    assert e.what == "misaligned" and "16-byte" in e.detail


@pytest.mark.parametrize("order", ORDERS)
def test_bug_missing_sync(mod, order):
    e = fault(mod, "bug_missing_sync", 1, 128, [f32(128), f32(128)], order=order)
    assert e.what in ("race", "uninitialised read")


def test_bug_missing_sync_is_race(mod):
    e = fault(mod, "bug_war", 1, 64, [f32(64), f32(64)])
    assert e.what == "race" and e.other and "shared" in e.buffer


def test_bug_dwconv(mod):
    x, w, y = dwconv_data(2, 1)
    assert fault(mod, "dwconv9_nosync", 2, 128, [x, w, y, 1]).what in ("race", "uninitialised read")


def test_bug_uninit(mod):
    e = fault(mod, "bug_uninit", 1, 32, [f32(32)])
    assert e.what == "uninitialised read" and e.thread == (31, 0, 0)


def test_bug_divergent(mod):
    assert fault(mod, "bug_divergent", 1, 64, [f32(64)]).what == "barrier divergence"
    assert fault(mod, "bug_named_barrier", 1, 64, [f32(64)]).what == "barrier divergence"
    o = f32(64)
    mod.launch("ok_named_barrier", 1, 64, [o])
    assert o[32:].sum() == 32
    mod.launch("bug_divergent", 1, 64, [f32(64)], allow_exited=True)


def test_bug_unwritten(mod):
    e = fault(mod, "bug_unwritten", 1, 32, [Out(f32(32)), 32])
    assert e.what == "unwritten output" and "index (7,)" in e.detail
    e = fault(mod, "bug_oob", 1, 32, [Out(f32(33)), f32(32), 32])
    assert e.what == "uninitialised read"


def test_bug_assert(mod):
    e = fault(mod, "bug_assert", 1, 32, [5])
    assert e.what == "assert" and "n < 3" in e.detail and e.thread == (4, 0, 0)
    mod.launch("bug_assert", 1, 32, [2])


def test_bug_hang(mod):
    assert fault(mod, "bug_hang", 1, 32, [np.zeros(1, np.int32)], timeout=1).what == "timeout"


def test_bug_recursion(mod):
    assert fault(mod, "bug_recursion", 1, 1, [np.zeros(2, np.int32)]).what == "stack overflow"


def test_failure_with_workers(mod):
    e = fault(mod, "bug_oob", 40, 64, [f32(64), f32(64), 64], workers=2)
    assert e.what == "out-of-bounds"
    mod.launch("vadd", 4, 256, [f32(1000), f32(1000), Out(f32(1000)), 1000], workers=2)


def test_bug_shared_overflow(mod):
    o = f32(32)
    mod.launch("bug_shared_overflow", 1, 32, [o])
    o[0] = 1
    assert fault(mod, "bug_shared_overflow", 1, 32, [o]).what == "out-of-bounds"


def test_bug_missing_syncwarp(mod):
    e = fault(mod, "bug_missing_syncwarp", 1, 32, [np.zeros(64, np.float16), np.zeros(32, np.uint32)])
    assert e.what == "race"


def test_bug_read_only(mod):
    o = f32(32)
    o.flags.writeable = False
    assert fault(mod, "bug_const_write", 1, 32, [o]).what == "read-only"


def test_bug_global_race(mod):
    """In-place stencil: a block reads what another block writes."""
    a = np.arange(257, dtype=np.float32)
    everything = {"memory", "race", "global"}
    for order in ORDERS:
        e = fault(mod, "inplace_shift", 2, 128, [a.copy(), 256], checks=everything, order=order)
        assert (
            e.what == "global race"
            and e.address == fault(mod, "inplace_shift", 2, 128, [a.copy(), 256], checks=everything).address
        )
    mod.launch("vadd", 2, 128, [a, a, np.zeros(256, np.float32), 256], checks=everything)


def test_null_pointer(mod):
    assert "null" in fault(mod, "bug_const_write", 1, 32, [None]).detail


def test_arguments(mod):
    with pytest.raises(TypeError):
        mod.launch("vadd", 1, 32, [f32(1)])
    with pytest.raises(TypeError):
        mod.launch("vadd", 1, 32, [f32(1), f32(1), f32(1), np.float64(3)])
    with pytest.raises(KeyError):
        mod.launch("bug_", 1, 32, [])


def test_unsupported():
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k() { .reg .b32 %r<3>; tex.1d.v4.f32.f32 %r1, %r2; ret; }"""
    with pytest.raises(ptxsim.UnsupportedInstruction, match="tex.1d"):
        Module.from_ptx(text)


def test_bodies_are_found_whatever_they_contain():
    """They are left out when a module is loaded. Braces of blocks, comments and strings, a declaration, a variable with
    an initial value and a debug section lie around them; an unknown instruction is named with its line."""
    text = """.version 8.0
.target sm_80
.address_size 64
.extern .func (.param .b32 r) vprintf(.param .b64 a, .param .b64 b);
.global .align 4 .b32 table[2] = {7, 8}; // }
.visible .entry first(.param .u64 p) .maxntid 32 .pragma "a {"; {
  .reg .b32 %r<3>; .reg .b64 %rd<3>; /* } */
  .loc 1 3 0
  ld.param.u64 %rd1, [p]; { // {
  .reg .b32 %r1;
  ld.global.u32 %r1, [table+4];
  st.global.u32 [%rd1], %r1; }
  ret; }
.section .debug_str { .b8 1 }
.visible .entry second() { ret; }
.visible .entry third() {

  nonsense.u32; }
.file 1 "a}.cu"
"""
    module = Module.from_ptx(text, only=["first", "second"])
    assert module.kernels == ["first", "second"]
    y = np.zeros(1, np.uint32)
    module.launch("first", 1, 1, [y])
    module.launch("second", 1, 1)
    assert y == [8]
    with pytest.raises(ptxsim.UnsupportedInstruction, match="PTX line 18: .*nonsense.u32"):
        Module.from_ptx(text)
    with pytest.raises(ptxsim.ParseError, match="PTX line 16: '{' without '}'"):
        Module.from_ptx(text.replace("nonsense.u32; }", ""))
    with pytest.raises(ptxsim.ParseError, match="PTX line 18: unexpected '}'"):
        Module.from_ptx(text.replace("nonsense.u32;", "}"))
    with pytest.raises(ptxsim.ParseError, match="PTX line 19: unexpected '.filed'"):
        Module.from_ptx(text.replace(".file 1", ".filed 1"))
    for _ in range(2):  # the module is kept, what was read of the body is not
        with pytest.raises(ptxsim.ParseError, match="PTX line 18: unexpected '='"):
            Module.from_ptx(text.replace("nonsense.u32;", "mov.u32 %r1, =;"))


def test_large_kernel():
    """A straight-line kernel of about 15000 instructions compiles and runs."""
    n = 3000
    body = [
        ".version 8.0",
        ".target sm_80",
        ".address_size 64",
        ".visible .entry big(.param .u64 p) {",
        f".reg .f32 %f<{4 * n + 9}>;",
        ".reg .b64 %rd<4>;",
        f".reg .pred %p<{n + 1}>;",
        "ld.param.u64 %rd1, [p];",
        "cvta.to.global.u64 %rd2, %rd1;",
        "mov.f32 %f0, 0f00000000;",
    ]
    for i in range(n):
        f = [f"%f{4 * i + k}" for k in range(5)]
        body += [
            f"ld.global.f32 {f[1]}, [%rd2+{4 * (i % 64)}];",
            f"setp.gt.f32 %p{i}, {f[1]}, 0f3F000000;",
            f"selp.f32 {f[2]}, {f[1]}, {f[0]}, %p{i};",
            f"mul.f32 {f[3]}, {f[2]}, 0f3F7F0000;",
            f"fma.rn.f32 {f[4]}, {f[1]}, {f[3]}, {f[0]};",
        ]
    body += [f"st.global.f32 [%rd2+256], %f{4 * n};", "ret;", "}"]
    m = Module.from_ptx("\n".join(body))
    a = np.linspace(0, 1e-3, 65).astype(np.float32)
    m.launch("big", 1, 1, [a])
    acc = np.float32(0)
    for i in range(n):
        v = a[i % 64]
        acc = np.float32(float(v) * float(np.float32((v if v > 0.5 else acc) * np.float32(0.99609375))) + float(acc))
    assert a[64] == acc
