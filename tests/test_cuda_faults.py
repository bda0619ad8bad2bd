"""A CUDA fault ends one test worker, not the tests. The fault is imitated: torch.cuda's two functions are replaced."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_faults import EXIT_STATUS

CONFTEST = """
import torch
from cuda_faults import pytest_runtest_logfinish

spoilt = []


def synchronize():
    if spoilt:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
"""
TESTS = """
import pytest
from conftest import spoilt


@pytest.mark.parametrize("number", range(12))
def test_kernel(number):
    assert not spoilt, "CUDA is unusable in this process"
    if number == 5:
        spoilt.append(number)  # a kernel that is still running; the test itself sees nothing of it
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_kernels.py").write_text(TESTS)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", folder, *options, folder]
    command += ["-o", f"pythonpath={here} {folder}"]
    # These tests may run in a worker themselves, which is not to count.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, env=environment)


@pytest.mark.slow
def test_a_fault_ends_one_worker(tmp_path):
    pytest.importorskip("xdist")
    ran = run(tmp_path, "-n", "2")
    assert ran.returncode == 1, ran.stdout
    passed = set(re.findall(r"PASSED \S+test_kernel\[(\d+)\]", ran.stdout))
    assert passed >= set(map(str, range(12))) - {"5"}
    assert re.search(r"worker 'gw\d' crashed while running '\S+test_kernel\[5\]'", ran.stdout)
    assert re.findall(r"^FAILED \S+test_kernel\[(\d+)\]", ran.stdout, re.MULTILINE) == ["5"]


def test_without_workers_a_fault_ends_the_run(tmp_path):
    ran = run(tmp_path, "-p", "no:xdist")
    assert ran.returncode == EXIT_STATUS, ran.stdout
    assert "CUDA is unusable after test_kernels.py::test_kernel[5]: CUDA error: an illegal memory" in ran.stdout
    assert "test_kernel[6]" not in ran.stdout
