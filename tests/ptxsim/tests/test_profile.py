"""Profile counters of small kernels, compared with hand counts."""

import json
import os

import numpy as np
import pytest
from ptxsim import Module, Out

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope="session")
def mod():
    return Module.from_cu(os.path.join(HERE, "profile.cu"), arch="sm_80")


def run(mod, name, args, grid=1, block=32, **options):
    r = mod.launch(name, grid, block, args, profile=True, **options)
    assert r.profile.thread_instructions == r.instructions  # no lane's block is lost in the merge
    return r.profile


def f32(n):
    return np.arange(n, dtype=np.float32)


def out(n):
    return Out(np.zeros(n, np.float32))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("order", ["forward", "reverse", 5])
def test_coalesced(mod, order, workers):
    p = run(mod, "copy1", [f32(512), out(512)], 4, 128, order=order, workers=workers)
    for t in (p.loads, p.stores):
        assert (t.requests, t.bytes, t.unique_bytes, t.sectors) == (16, 2048, 2048, 64)
        assert t.ratio == 1 and t.widths == {4: 512}
    assert p.by_class["ld.global"] == p.by_class["st.global"] == 16
    assert p.thread_instructions == 32 * p.instructions


def test_strided(mod):
    p = run(mod, "copy_strided", [f32(1024), out(512)], 4, 128)
    assert (p.loads.sectors, p.loads.unique_bytes, p.loads.ratio) == (128, 2048, 2)
    assert p.stores.ratio == 1


def test_vector(mod):
    p = run(mod, "copy16", [f32(512), out(512)], 1, 128)
    assert (p.loads.requests, p.loads.sectors, p.loads.bytes) == (4, 64, 2048)
    assert p.loads.widths == p.stores.widths == {16: 128}


def test_reread(mod):
    p = run(mod, "reread", [f32(32), out(32)])
    assert (p.loads.requests, p.loads.bytes, p.loads.unique_bytes, p.loads.sectors, p.loads.ratio) == (
        4,
        512,
        128,
        16,
        4,
    )


def test_lanes_off(mod):
    p = run(mod, "half_warp", [np.ones(32, np.float16), np.zeros(32, np.float16), 16])
    assert p.loads.widths == {2: 16} and (p.loads.requests, p.loads.sectors) == (1, 1)
    assert p.thread_instructions < 32 * p.instructions


@pytest.mark.parametrize("ways", [1, 2, 4, 32])
def test_banks(mod, ways):
    p = run(mod, f"bank<{ways}>", [out(32)])
    for kind in ("ld", "st"):
        s = p.shared[kind]
        assert (s.requests, s.wavefronts, s.ideal, s.conflict) == (1, ways, 1, ways)


def test_broadcast(mod):
    assert run(mod, "bank_broadcast", [out(32)]).shared["ld"].wavefronts == 1


@pytest.mark.parametrize("pitch,wavefronts", [(4, 4), (8, 8), (32, 32), (36, 4)])
def test_banks_16_bytes(mod, pitch, wavefronts):
    s = run(mod, "bank_wide(", [out(128), pitch]).shared
    assert (s["st"].wavefronts, s["st"].ideal, s["ld"].wavefronts) == (wavefronts, 4, wavefronts)


def test_banks_8_bytes(mod):
    s = run(mod, "bank_wide8", [out(64)]).shared["ld"]
    assert (s.requests, s.wavefronts, s.ideal) == (1, 2, 2)


@pytest.mark.parametrize("pitch,wavefronts", [(80, 4), (128, 32), (64, 16), (144, 4)])
def test_ldmatrix(mod, pitch, wavefronts):
    p = run(mod, "ldm", [Out(np.zeros(128, np.uint32)), pitch])
    s = p.shared["ldmatrix"]
    assert (s.requests, s.wavefronts, s.ideal) == (1, wavefronts, 4)
    line = next(x for x in p.lines if "ldmatrix" in x.classes)
    assert line.source.startswith("profile.cu:") and line.wavefronts == wavefronts


def count(p, opcode):
    return sum(n for op, n in p.by_opcode.items() if op.startswith(opcode))


@pytest.mark.parametrize("order", ["forward", "reverse", 9])
def test_divergence(mod, order):
    assert count(run(mod, "divergent", [out(32), 0.5], order=order), "fma.rn") == 32
    assert count(run(mod, "nested", [out(32), 0.5], order=order), "fma.rn") == 24
    p = run(mod, "sides", [f32(64), out(32), 0.5], order=order)
    assert count(p, "sqrt") == 4 and p.by_class["mufu"] == 4 and count(p, "mul.") >= 4
    assert p.loads.requests == 2 and p.stores.requests == 1  # together again at the store
    assert (p.loads.sectors, p.loads.bytes, p.loads.ratio) == (8, 128, 2)


@pytest.mark.parametrize("order", ["forward", "reverse", 1, 2])
@pytest.mark.parametrize("n", [32, 20])
def test_tangled(mod, order, n):
    x = np.random.default_rng(3).integers(0, 32, 32).astype(np.int32)
    p = run(mod, "tangled", [x, np.zeros(32, np.int32), n], order=order)
    assert p.stores.requests == 1 and p.stores.widths == {4: n}  # all lanes meet again at the store
    assert p.loads.requests == 6 and p.thread_instructions <= 32 * p.instructions
    assert p.instructions == run(mod, "tangled", [x, np.zeros(32, np.int32), n]).instructions


def test_block_collectives():
    mod = Module.from_cu(os.path.join(HERE, "kernels.cu"), arch="sm_80")
    x = np.ones(5000, np.float32)
    p = run(mod, "block_sum", [x, np.zeros(1, np.float32), x.size], 3, 256)
    assert p.loads.unique_bytes == 20000 and p.by_class["shuffle"] > 0 and p.by_class["atomic"] > 0


def test_calls(mod):
    p = run(mod, "calls", [out(32), 0.5])
    assert p.by_class["mufu"] == 2 and p.stores.requests == 1 and count(p, "call") == 1


def test_many_blocks_and_steps(mod):
    p = run(mod, "divergent", [out(32), 0.5], 100)
    assert p.by_class["fma"] == 3200


def test_tensor(mod):
    assert run(mod, "mma_one", [out(32)]).by_class["tensor"] == 1


def test_report(mod):
    p = run(mod, "bank<4>", [out(32)])
    text = p.report()
    print("\n" + text)
    assert "profile.cu:" in text and "4.00x" in text
    assert json.loads(json.dumps(p.as_dict()))["shared"]["st"]["wavefronts"] == 4


def test_off(mod):
    assert mod.launch("copy1", 1, 32, [f32(32), out(32)]).profile is None
    assert "prof_" not in mod.find("copy1").code
