"""Who multiplies on the CPU: how it is chosen, and that own and library's products give the same network."""

import os
import subprocess
import sys

import pytest
import torch
from networks import float64_logits, randomize
from numerics import assert_error_at_most_peer

import convmixer_fast
from convmixer_fast import ConvMixer, cpu_gemm, optimize
from convmixer_fast._types import NETWORK_DTYPES
from convmixer_fast.cpu_engine import CpuEngine
from convmixer_fast.cpu_library_engine import CpuLibraryEngine

KINDS = {"own": CpuEngine, "library": CpuLibraryEngine}


def build(dim=48, depth=2, kernel_size=5, patch_size=2, n_classes=100):
    torch.manual_seed(0)
    return randomize(ConvMixer(dim, depth, kernel_size, patch_size, n_classes))


def images(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def choose(monkeypatch):
    """Has a value of CMF_CPU_GEMM, None for none, and a processor with or without AMX tell who multiplies."""

    def choose(variable, amx):
        monkeypatch.delenv("CMF_CPU_GEMM", raising=False)
        if variable is not None:
            monkeypatch.setenv("CMF_CPU_GEMM", variable)
        monkeypatch.delenv("CMF_CPU_ISA", raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        cpu_gemm.products.cache_clear()

    yield choose
    cpu_gemm.products.cache_clear()


@pytest.mark.parametrize("dtype", NETWORK_DTYPES, ids=str)
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("variable", [None, "", "own", "library"])
def test_choice(choose, variable, amx, dtype):
    choose(variable, amx)
    by_default = "library" if amx and dtype == torch.bfloat16 else "own"
    expected = variable or by_default
    assert cpu_gemm.products()[dtype] == expected
    x, optimized = images(1, 3, 8, 8, dtype=dtype), optimize(build(), dtype)
    assert optimized.engine_kind(x) is KINDS[expected]
    optimized(x)
    assert type(optimized._kept._engine) is KINDS[expected]


def test_an_instruction_set_of_ours_by_name_is_used_for_products_too(choose, monkeypatch):
    choose(None, True)
    monkeypatch.setenv("CMF_CPU_ISA", "avx2")
    assert set(cpu_gemm.products().values()) == {"own"}


@pytest.mark.parametrize(
    "variable, amx, summary",
    [
        (None, False, "own"),
        (None, True, "own; library for bfloat16"),
        ("own", True, "own"),
        ("library", False, "library"),
        ("mkl", True, "CMF_CPU_GEMM must be own or library, or empty, got 'mkl'"),
    ],
)
def test_build_info(choose, variable, amx, summary):
    choose(variable, amx)
    assert convmixer_fast.build_info()["cpu_gemm"] == summary


def test_read_once_a_process(choose, monkeypatch):
    choose("library", False)
    before = dict(cpu_gemm.products())
    monkeypatch.setenv("CMF_CPU_GEMM", "own")
    assert cpu_gemm.products() == before


def test_networks_without_a_cpu_engine(choose):
    """Run by the operators one by one, whatever is chosen."""
    choose("library", True)
    double = optimize(build(), torch.float64)
    assert double.engine_kind(images(1, 3, 8, 8, dtype=torch.float64)) is None
    features = optimize(build())
    features.head_weight = features.head_bias = None
    assert features.engine_kind(images(1, 3, 8, 8)) is None


def run(variables, *command):
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"} | variables
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


CALL = """
import torch, convmixer_fast
model = convmixer_fast.ConvMixer(8, 1, 3, 2, 5)
convmixer_fast.optimize(model.eval(), torch.bfloat16)(torch.ones(1, 3, 4, 4, dtype=torch.bfloat16))
"""


def test_unknown_product():
    """The message reaches both the one who asks and the one who calls."""
    message = "CMF_CPU_GEMM must be own or library, or empty, got 'mkl'"
    assert message in run({"CMF_CPU_GEMM": "mkl"}, "-m", "convmixer_fast", "info").stdout
    called = run({"CMF_CPU_GEMM": "mkl"}, "-c", CALL)
    assert called.returncode == 1 and f"RuntimeError: {message}" in called.stderr


NETWORKS = {
    "48/2": (dict(), (3, 3, 24, 20)),
    "400/2": (dict(dim=400, kernel_size=7), (2, 3, 30, 30)),  # ours by Strassen's algorithm in float32
    "256/8, k 9, p 2": (dict(dim=256, depth=8, kernel_size=9), (2, 3, 32, 32)),
    "map of one pixel": (dict(dim=64, kernel_size=3), (5, 3, 3, 3)),
}
EVERY_NETWORK = pytest.mark.parametrize("sizes, shape", NETWORKS.values(), ids=list(NETWORKS))


@pytest.mark.parametrize("dtype", NETWORK_DTYPES, ids=str)
@EVERY_NETWORK
def test_either_gives_the_same_logits(sizes, shape, dtype):
    """Up to rounding: both are off by a few units in the last place of the largest."""
    optimized, x = optimize(build(**sizes), dtype), images(*shape, dtype=dtype)
    with torch.no_grad():
        own, library = (optimized.engine(kind)(x).double() for kind in (CpuEngine, CpuLibraryEngine))
    limit = 4 * torch.finfo(dtype).eps * own.abs().max()
    assert own.std() > 0 and (own - library).abs().max() <= limit


def products_of(sizes, shape, dtype):
    """The library's products of that network's sizes, of random numbers."""
    dim, pixels = sizes.get("dim", 48), shape[0] * (shape[2] // 2) * (shape[3] // 2)
    for columns in (16, dim):  # patches and layers
        weight, x = images(dim, columns, dtype=dtype), images(pixels, columns, dtype=dtype)
        yield torch.mm(weight, x.t(), out=x.new_empty(pixels, dim).t())
    yield torch.addmm(images(100, dtype=dtype), images(shape[0], dim, dtype=dtype), images(100, dim, dtype=dtype).t())


@pytest.mark.parametrize("dtype", NETWORK_DTYPES, ids=str)
@EVERY_NETWORK
def test_threads_change_no_bits_where_they_change_none_of_the_librarys(two_threads, sizes, shape, dtype):
    run, x = optimize(build(**sizes), dtype).engine(CpuLibraryEngine), images(*shape, dtype=dtype)
    threads, logits, products = torch.get_num_threads(), [], []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                logits.append(run(x))
            products.append(list(products_of(sizes, shape, dtype)))
    finally:
        torch.set_num_threads(threads)
    if not all(map(torch.equal, *products)):
        pytest.skip("here the library's products depend on the number of threads")
    assert torch.equal(*logits)


BY_DEFAULT = """
import sys, torch, convmixer_fast
model, x = torch.load(sys.argv[1], weights_only=False)
optimized = convmixer_fast.optimize(model)
with torch.no_grad():
    torch.save((optimized(x), model(x), optimized.engine_kind(x).__name__), sys.argv[1])
"""


def test_bfloat16_with_all_that_the_processor_has(tmp_path):
    """In a process whose oneDNN is not kept from AMX, as the one of the tests is (conftest.py)."""
    model, x, file = build(dim=256, depth=4).bfloat16(), images(4, 3, 32, 32, dtype=torch.bfloat16), tmp_path / "file"
    torch.save((model, x), file)
    done = run({"CMF_CPU_GEMM": "", "CMF_CPU_ISA": ""}, "-c", BY_DEFAULT, file)
    assert done.returncode == 0, done.stderr
    logits, eager, kind = torch.load(file)
    assert kind == KINDS["library" if torch.cpu._is_amx_tile_supported() else "own"].__name__
    assert_error_at_most_peer(logits, eager, float64_logits(model, x), kind)
