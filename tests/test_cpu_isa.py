"""The CPU kernels of every instruction set: each is chosen once a process, so the operators' tests run in others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convmixer_fast

pytestmark = pytest.mark.usefixtures("two_threads")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import instructions  # noqa: E402

PROGRAM = str(ROOT / "tests" / "mixer_program.cpp")
FILES = "tests/test_ops.py", "tests/test_autograd.py"
KERNEL_TESTS = "cpu and (conv2d or fused_depthwise or fusion or pool or gelu or finite or threads or wgrad or in_place)"


def run(isa, *command):
    # PyTorch, whose errors ours are compared with, gets no wider instructions: they would spare it roundings.
    settings = instructions.held_to(isa) if isa in instructions.NAMES else {"CMF_CPU_ISA": isa}
    environment = os.environ | settings
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.fixture(params=instructions.NAMES)
def isa(request):
    """One that this CPU has and that is not in use: of that, test_ops.py and test_cpu_engine.py are the tests."""
    if request.param == convmixer_fast.build_info()["cpu_isa"]:
        pytest.skip(f"{request.param} is in use: the tests themselves test it")
    info = run(request.param, "-m", "convmixer_fast", "info").stdout
    if "CMF_CPU_ISA must name" in info:
        pytest.skip(f"this CPU has no {request.param}")
    assert f" {request.param}\n" in info
    return request.param


def passed(isa, *arguments):
    """How many tests pass on an instruction set; all must."""
    tests = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    assert tests.returncode == 0, tests.stdout
    return int(tests.stdout.split(" passed")[0].split()[-1])


@pytest.mark.slow
def test_operators(isa):
    assert passed(isa, *FILES, "-k", KERNEL_TESTS) > 400


@pytest.mark.slow
def test_engine(isa):
    assert passed(isa, "tests/test_cpu_engine.py", "tests/test_cpu_gemm.py") > 90


def compiler(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH")
    return path


def emulator(architecture):
    names = [f"qemu-{architecture}-static", f"qemu-{architecture}"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"{' or '.join(names)} is not on PATH")
    return path


def build_program(compiler, sources, target):
    command = [compiler, "-O1", "-std=c++17", "-Wall", "-static", PROGRAM, *map(str, sources), "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def assert_right(output, isa):
    """What mixer_program.cpp prints: the instruction set, and errors for float32, float16 and bfloat16."""
    used, *errors = output.split()
    assert used == isa
    for error, limit in zip(map(float, errors), (2e-6, 2e-3, 2e-2), strict=True):
        assert error < limit, output


@pytest.fixture(scope="session")
def x86_program(tmp_path_factory):
    target = tmp_path_factory.mktemp("x86") / "mixer_program"
    build_program(compiler("g++"), (ROOT / "csrc" / "cpu").rglob("*.cpp"), target)
    return target


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="builds for this machine, which is not x86-64")
@pytest.mark.parametrize("cpu, isa", [("qemu64", "generic"), ("Nehalem", "generic"), ("Haswell", "avx2")])
def test_older_processors(x86_program, cpu, isa):
    """No illegal instruction on a processor without AVX2 or AVX-512: it would end the emulation."""
    command = [emulator("x86_64"), "-cpu", cpu, x86_program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert_right(done.stdout, isa)


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="cross-compiles")
def test_aarch64(tmp_path):
    """The sources without x86's build for AArch64; and give the right logits, where there is an emulator."""
    target = tmp_path / "mixer_program"
    sources = [path for path in (ROOT / "csrc" / "cpu").rglob("*.cpp") if "_avx" not in path.name]
    build_program(compiler("aarch64-linux-gnu-g++"), sources, target)
    done = subprocess.run([emulator("aarch64"), target], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert_right(done.stdout, "generic")


def test_unknown_instruction_set():
    """The message reaches both the one who asks and the one who calls."""
    message = r"CMF_CPU_ISA must name an instruction set that this CPU has (generic"
    assert message in run("sse9", "-m", "convmixer_fast", "info").stdout
    call = (
        "import torch, convmixer_fast; convmixer_fast.depthwise_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))"
    )
    called = run("sse9", "-c", call)
    assert called.returncode == 1 and message in called.stderr and "got 'sse9'" in called.stderr
