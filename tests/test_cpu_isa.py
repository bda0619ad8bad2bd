"""The CPU kernels of every instruction set: each is chosen once a process, so the operators' tests run again in another."""

import os
import subprocess
import sys

import pytest

import convmixer_fast

FILES = "tests/test_ops.py", "tests/test_autograd.py"
KERNEL_TESTS = "cpu and (conv2d or fused_depthwise or fusion or pool or gelu or finite or threads or wgrad)"


def run(isa, *command):
    environment = os.environ | {"CMF_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_operators(isa):
    if isa == convmixer_fast.build_info()["cpu_isa"]:
        pytest.skip(f"{isa} is in use: test_ops.py tests it")
    info = run(isa, "-m", "convmixer_fast", "info").stdout
    if "CMF_CPU_ISA must name" in info:
        pytest.skip(f"this CPU has no {isa}")
    assert isa in info
    tests = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", KERNEL_TESTS)
    assert tests.returncode == 0, tests.stdout
    assert int(tests.stdout.split(" passed")[0].split()[-1]) > 400


def test_unknown_instruction_set():
    """The message reaches both the one who asks and the one who calls."""
    message = r"CMF_CPU_ISA must name an instruction set that this CPU has (generic"
    assert message in run("sse9", "-m", "convmixer_fast", "info").stdout
    call = "import torch, convmixer_fast; convmixer_fast.depthwise_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1))"
    called = run("sse9", "-c", call)
    assert called.returncode == 1 and message in called.stderr and "got 'sse9'" in called.stderr
