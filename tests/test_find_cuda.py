"""The search for nvcc, tools/find_cuda.py, and those who ask it: setup.py, the emulator, the kernel report, make."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = """
import runpy, setuptools, torch
torch.version.cuda = "13.0"
setuptools.setup = lambda **_: None
print(runpy.run_path("setup.py")["toolkit"] / "bin" / "nvcc")
"""
EMULATOR = "import sys; sys.path.append('tests'); from ptxsim import toolchain; print(toolchain.find_nvcc())"
REPORT = "import sys; sys.path.append('benchmarks'); import sass; print(sass.find_tool('nvcc'))"
MAKE = ["make", f"PYTHON={sys.executable}", "VENV=no-such-folder", "--eval=found: ; @echo $(NVCC) [$(TOOLKIT)]"]
FINDERS = {
    "find_cuda.py": [sys.executable, "tools/find_cuda.py"],
    "setup.py": [sys.executable, "-c", SETUP],
    "emulator": [sys.executable, "-c", EMULATOR],
    "kernel report": [sys.executable, "-c", REPORT],
}


def run(command, **environment):
    """Of the variables that tell where nvcc is, only these."""
    unset = ("CMF_", "CUDA_", "MAKE", "MFLAGS", "TORCH_CUDA")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=300)


def toolkit(folder):
    """A stand-in, whose nvcc answers setup.py's questions."""
    for name in ("bin", "include", "lib64"):
        (folder / name).mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncase $1 in --dryrun) echo '#$ TOP={folder}' >&2 ;; *) echo compute_80 ;; esac\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture
def toolkits(tmp_path):
    """An nvcc for each variable, by its name in order of precedence, and the variables."""
    found = {name: toolkit(tmp_path / name) for name in ("CMF_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH")}
    environment = {name: str(nvcc.parent.parent) for name, nvcc in found.items()}
    environment["CMF_NVCC"] = str(found["CMF_NVCC"])
    environment["PATH"] = f"{found['PATH'].parent}{os.pathsep}{os.environ['PATH']}"
    return found, environment


@pytest.mark.parametrize("finder", FINDERS)
def test_everyone_takes_the_named_nvcc(finder, toolkits):
    nvccs, environment = toolkits
    found = run(FINDERS[finder], **environment)
    assert found.stdout.split() == [str(nvccs["CMF_NVCC"])], found


@pytest.mark.parametrize("finder", FINDERS)
def test_a_named_nvcc_that_is_missing_is_an_error(finder, toolkits, tmp_path):
    """Whatever else there is."""
    _, environment = toolkits
    found = run(FINDERS[finder], **environment | {"CMF_NVCC": str(tmp_path / "none")})
    assert found.returncode and not found.stdout
    assert f"CMF_NVCC is '{tmp_path / 'none'}', which is not an executable file" in found.stderr.splitlines()[-1]


def test_order(toolkits):
    nvccs, environment = toolkits
    for name, nvcc in nvccs.items():
        found = run(FINDERS["find_cuda.py"], **environment)
        assert found.stdout.split() == [str(nvcc)], found
        nvcc.unlink()
        environment.pop(name)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on PATH")
def test_make_installs_a_toolkit_only_where_none_is_found_or_named(toolkits, tmp_path):
    nvccs, environment = toolkits
    for given in (environment, {"CUDA_PATH": environment["CUDA_PATH"]}):
        expected = nvccs["CMF_NVCC" if "CMF_NVCC" in given else "CUDA_PATH"]
        assert run([*MAKE, "found"], **given).stdout.split() == [str(expected), "[]"]
    assert run([*MAKE, f"CMF_NVCC={nvccs['PATH']}", "found"]).stdout.split() == [str(nvccs["PATH"]), "[]"]
    assert run([*MAKE, "found"], CMF_NVCC=str(tmp_path / "none")).stdout.split() == ["[]"]
    no_python = "PYTHON=false"  # finds nothing
    assert run([*MAKE, no_python, "found"]).stdout.split() == ["[no-such-folder/.toolkit]"]


def test_none_at_all(monkeypatch):
    monkeypatch.delenv("CMF_NVCC", raising=False)
    find_tool = runpy.run_path(str(ROOT / "tools" / "find_cuda.py"))["find_tool"]
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for name in ("nvcc", "nvdisasm"):
        with pytest.raises(FileNotFoundError, match=f"{name} was not found through CMF_NVCC, CUDA_HOME, .*: `pip inst"):
            find_tool(name)


def test_other_tools_are_of_the_named_toolkit_first(toolkits, monkeypatch):
    nvccs, environment = toolkits
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for nvcc in nvccs.values():
        shutil.copy(nvcc, nvcc.with_name("nvdisasm"))
    find_tool = runpy.run_path(str(ROOT / "tools" / "find_cuda.py"))["find_tool"]
    assert find_tool("nvdisasm") == nvccs["CMF_NVCC"].with_name("nvdisasm")
    nvccs["CMF_NVCC"].with_name("nvdisasm").unlink()
    assert find_tool("nvdisasm") == nvccs["CUDA_HOME"].with_name("nvdisasm")
