"""sm_90a: mbarrier, TMA, wgmma, clusters."""

import os

import numpy as np
import pytest
from ptxsim import DeviceError, Module, Out, TensorMap

HERE = os.path.dirname(os.path.abspath(__file__))

ORDERS = ["forward", "reverse", 3, 11]
rng = np.random.default_rng(2)
SMEM = 3 * 2 * 8192 + 16384 + 1024


@pytest.fixture(scope="session")
def mod():
    return Module.from_cu(os.path.join(HERE, "hopper.cu"), arch="sm_90a")


def gemm(mod, kernel, m, n, k, order="forward", trans_b=False):
    a = rng.standard_normal((m, k)).astype(np.float16)
    b = rng.standard_normal((k, n) if trans_b else (n, k)).astype(np.float16)
    c = np.zeros((m, n), np.float32)
    maps = [
        TensorMap(a, "f16", (k, m), (64, 64), swizzle=128),
        TensorMap(b, "f16", b.shape[::-1], (64, 64), swizzle=128),
        TensorMap(Out(c), "f32", (n, m), (32, 64)),
    ]
    r = mod.launch(kernel, (m // 64, n // 64), 160, maps + [k], shared_bytes=SMEM, order=order, timeout=60)
    want = a.astype(np.float64) @ (b if trans_b else b.T).astype(np.float64)
    assert np.allclose(c, want, rtol=1e-5, atol=1e-4)
    return r


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("trans_b", [False, True])
def test_gemm(mod, order, trans_b):
    gemm(mod, "gemm_nn" if trans_b else "gemm_tn", 128, 128, 512, order, trans_b)


def test_gemm_of_several_blocks(mod):
    gemm(mod, "gemm_tn", 256, 256, 512)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "bug,what",
    [
        (1, ("race", "uninitialised read")),
        (2, ("race", "mbarrier")),
        (3, ("proxy fence",)),
        (4, ("deadlock",)),
        (5, ("race",)),
    ],
)
def test_gemm_bugs(mod, bug, what, order):
    with pytest.raises(DeviceError) as e:
        gemm(mod, f"gemm_bug{bug}", 64, 64, 512, order)
    print(e.value)
    assert e.value.what in what


@pytest.mark.parametrize("ra", [0, 1])
def test_wgmma_plain(mod, ra):
    a, b = (rng.standard_normal((64, 16)).astype(np.float16) for _ in range(2))
    c = np.zeros((64, 64), np.float32)
    mod.launch("wgmma_plain", 1, 128, [a, b, Out(c), ra])
    assert np.allclose(c, a.astype(np.float64) @ b.astype(np.float64).T, rtol=1e-6, atol=1e-6)


WGMMA_PTX = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pd, .param .u32 scale) {
.reg .pred p<3>; .reg .b32 r<20>; .reg .b64 d<20>;
.shared .align 128 .b8 sa[2048]; .shared .align 128 .b8 sb[256];
ld.param.u64 d1, [pa]; ld.param.u64 d2, [pb]; ld.param.u64 d3, [pd]; ld.param.u32 r9, [scale];
mov.u32 r1, %tid.x; mul.wide.u32 d4, r1, 16; add.u64 d5, d1, d4; ld.global.v4.u32 {r2, r3, r4, r5}, [d5];
mov.u32 r6, sa; shl.b32 r7, r1, 4; add.u32 r8, r6, r7; st.shared.v4.u32 [r8], {r2, r3, r4, r5};
setp.lt.u32 p1, r1, 16; add.u64 d5, d2, d4; mov.u32 r10, sb; add.u32 r8, r10, r7;
@p1 ld.global.v4.u32 {r2, r3, r4, r5}, [d5];
@p1 st.shared.v4.u32 [r8], {r2, r3, r4, r5};
fence.proxy.async; bar.sync 0;
shr.u32 r6, r6, 4; cvt.u64.u32 d6, r6; or.b64 d6, d6, 0x1000080000;
shr.u32 r10, r10, 4; cvt.u64.u32 d7, r10; or.b64 d7, d7, 0x1000080000;
add.u64 d8, d3, d4; ld.global.v4.u32 {r11, r12, r13, r14}, [d8]; setp.ne.u32 p2, r9, 0;
wgmma.fence.sync.aligned;
INSTR;
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
st.global.v4.u32 [d8], {r11, r12, r13, r14}; ret; }
"""


@pytest.mark.parametrize("scale", [0, 1])
@pytest.mark.parametrize("kind", ["f16acc", "bf16", "tf32", "e4m3", "e5m2", "s8", "neg"])
def test_wgmma_types(kind, scale):
    """m64n8 with 32 bytes of K, no swizzle: LBO 128, SBO 256 bytes."""
    from ptxsim import from_bf16, to_bf16

    size = {"f16acc": 2, "neg": 2, "bf16": 2, "tf32": 4}.get(kind, 1)
    K = 32 // size

    def operand(rows):
        v = rng.standard_normal((rows, K)).astype(np.float32)
        if kind in ("f16acc", "neg"):
            h = v.astype(np.float16)
            return h, h.astype(np.float64)
        if kind == "bf16":
            h = to_bf16(v)
            return h, from_bf16(h).astype(np.float64)
        if kind == "tf32":
            return v, (v.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
        b = rng.integers(0, 256, (rows, K)).astype(np.uint8)
        if kind == "s8":
            return b, b.view(np.int8).astype(np.float64)
        b[(b & 0x7F) >= (0x7F if kind == "e4m3" else 0x7C)] = 0x11
        if kind == "e5m2":
            return b, (b.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
        e, m = (b >> 3 & 15).astype(int), (b & 7).astype(int)
        return b, np.where(b & 128, -1, 1) * np.where(e > 0, (8 + m) * 2.0 ** (e - 10), m * 2.0**-9)

    def layout(v):
        raw = np.ascontiguousarray(v).view(np.uint8).reshape(len(v) // 8, 8, 2, 16)
        return np.ascontiguousarray(raw.transpose(0, 2, 1, 3)).reshape(-1)

    (a, av), (b, bv) = operand(64), operand(8)
    regs = "{r11, r12, r13, r14}"
    instr = {
        "f16acc": "m64n8k16.f16.f16.f16 {r11, r12}, d6, d7, p2, 1, 1, 0, 0",
        "neg": f"m64n8k16.f32.f16.f16 {regs}, d6, d7, p2, -1, 1, 0, 0",
        "bf16": f"m64n8k16.f32.bf16.bf16 {regs}, d6, d7, p2, 1, 1, 0, 0",
        "tf32": f"m64n8k8.f32.tf32.tf32 {regs}, d6, d7, p2, 1, 1",
        "e4m3": f"m64n8k32.f32.e4m3.e4m3 {regs}, d6, d7, p2, 1, 1",
        "e5m2": f"m64n8k32.f32.e5m2.e5m2 {regs}, d6, d7, p2, 1, 1",
        "s8": f"m64n8k32.s32.s8.s8 {regs}, d6, d7, p2",
    }[kind]
    m = Module.from_ptx(WGMMA_PTX.replace("INSTR", "wgmma.mma_async.sync.aligned." + instr))
    dtype = {"f16acc": np.float16, "s8": np.int32}.get(kind, np.float32)
    per = 8 if kind == "f16acc" else 4
    d = rng.integers(-4, 5, (128, per)).astype(dtype)
    start = d.copy()
    m.launch("k", 1, 128, [layout(a), layout(b), d, scale])
    t = np.arange(128)
    want = av @ bv.T * (-1 if kind == "neg" else 1)
    for i in range(4):
        row, col = t // 32 * 16 + t % 32 // 4 + 8 * (i // 2), 2 * (t % 4) + i % 2
        exact = want[row, col] + scale * start[:, i].astype(np.float64)
        assert np.allclose(
            d[:, i], exact, rtol=1e-3 if kind == "f16acc" else 1e-6, atol=1e-2 if kind == "f16acc" else 1e-5
        )


def test_tma_halo(mod):
    x = rng.standard_normal((2, 3, 10, 12)).astype(np.float32)
    bx, by = 8, 6
    for x0, y0 in ((-3, -2), (9, 7), (2, 3), (40, 0)):
        o = np.zeros((3, by, bx), np.float32)
        mod.launch("tma_halo", 3, 64, [TensorMap(x, "f32", (12, 10, 3, 2), (bx, by, 1, 1)), Out(o), bx * by, x0, y0])
        pad = np.pad(x[1], ((0, 0), (64, 64), (64, 64)))
        assert np.array_equal(o, pad[:, 64 + y0 : 64 + y0 + by, 64 + x0 : 64 + x0 + bx])


def test_tma_element_strides(mod):
    x = np.arange(2 * 3 * 10 * 12, dtype=np.float32).reshape(2, 3, 10, 12)
    o = np.zeros((3, 3, 8), np.float32)
    mod.launch(
        "tma_halo",
        3,
        64,
        [TensorMap(x, "f32", (12, 10, 3, 2), (8, 6, 1, 1), element_strides=(1, 2, 1, 1)), Out(o), 24, 1, 1],
    )
    assert np.array_equal(o, x[1][:, 1:7:2, 1:9])


@pytest.mark.parametrize("order", ORDERS)
def test_cluster(mod, order):
    x, o = rng.standard_normal(128).astype(np.float32), np.zeros((4, 128), np.float32)
    mod.launch("cluster_copy", 4, 32, [x, Out(o), 0], cluster=2, order=order)
    peer = np.array([100, 0, 100, 0], np.float32)[:, None] + np.tile(np.arange(32, dtype=np.float32), 4)
    assert np.array_equal(o, x + peer)


def test_cluster_bug(mod):
    """Without the final cluster barrier a block reads shared memory of a block that has exited."""
    x, o = np.zeros(128, np.float32), np.zeros((4, 128), np.float32)
    found = []
    for order in ["forward", "reverse", *range(12)]:
        try:
            mod.launch("cluster_copy", 4, 32, [x, Out(o), 1], cluster=2, order=order)
        except DeviceError as e:
            found.append(e.what)
    assert "out-of-bounds" in found


@pytest.mark.parametrize("order", ORDERS)
def test_cp_async_mbarrier(mod, order):
    x, o, lead = rng.standard_normal((64, 4)).astype(np.float32), np.zeros((64, 4), np.float32), np.zeros(64, np.uint32)
    mod.launch("cp_mbar", 1, 64, [x, Out(o), Out(lead)], order=order)
    assert np.array_equal(o, x[::-1])
    assert list(lead) == ([10] + [0] * 31) * 2
