"""Setting up and building: what setup.py and the Makefile print, what they do a second time, and a clone that is moved.
The sources are stubs here, or nothing is compiled."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, *command, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CMF_", "MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def clone(tmp_path):
    """A copy of what builds the project, in which each source is an empty file."""
    folder = tmp_path / "clone"
    (folder / "convmixer_fast").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "Makefile", "requirements.txt", "requirements-test.txt"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "convmixer_fast" / "_version.py", folder / "convmixer_fast")
    shutil.copytree(ROOT / "tools", folder / "tools")
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    for source in (folder / "csrc").rglob("*.c*"):
        source.write_text("")
    return folder


# ------------------------------------------------------------------------------------------------ setup.py


def build(clone, **environment):
    command = sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"
    return run(clone, *command, **({"CMF_CUDA": "0"} | environment))


def test_a_line_for_each_source_and_the_log_in_a_file(clone):
    built = build(clone)
    assert built.returncode == 0, built.stderr
    assert built.stderr == "convmixer_fast: building CPU kernels alone: CMF_CUDA=0 was set\n"
    lines = built.stdout.splitlines()
    sources = {line.partition("] ")[2] for line in lines}
    assert all(re.fullmatch(rf"\[\d+/{len(lines)}\] csrc(/\w+)+\.cpp", line) for line in lines)
    assert "csrc/cpu/dispatch.cpp" in sources and len(sources) == len(lines) > 5
    assert (clone / "build" / "build.log").read_text().count(" -c ") >= len(lines)
    assert (clone / "convmixer_fast" / "_C.so").exists()


def test_a_failure_shows_the_compilers_message_and_names_the_log(clone):
    (clone / "csrc" / "cpu" / "dispatch.cpp").write_text("int f() { return nothing; }\n")
    built = build(clone)
    log = clone / "build" / "build.log"
    assert built.returncode != 0
    assert built.stderr.splitlines()[-1] == f"convmixer_fast: the build failed; all that was printed is in {log}"
    assert "dispatch.cpp:1:18: error: " in built.stderr and "dispatch.cpp:1:18: error: " in log.read_text()
    assert max(map(len, built.stderr.splitlines())) <= 200


@pytest.mark.parametrize(
    "environment, said",
    [
        (dict(CXX="no-such-compiler"), "no C++ compiler: 'no-such-compiler' is not on PATH"),
        (dict(CMF_CUDA="yes"), "CMF_CUDA must be one of auto, 0, 1, got 'yes'"),
    ],
    ids=str,
)
def test_what_is_missing_or_wrong_is_said_in_a_line(clone, environment, said):
    built = build(clone, **environment)
    assert built.returncode != 0
    (line,) = built.stderr.splitlines()
    assert said in line


@pytest.mark.parametrize(
    "wanted, targets",
    [("8.0;9.0a+PTX", "sm_80 sm_90a+ptx"), ("8.6 12.0", "sm_86 sm_120"), ("all", "sm_75 sm_80 .*sm_120+ptx")],
)
def test_targets(clone, wanted, targets):
    """What is announced; the front end of the compiler runs once for targets with the same PTX."""
    torch_with_cuda(clone)
    announced = run(clone, sys.executable, "announce.py", TORCH_CUDA_ARCH_LIST=wanted)
    assert re.search(f"CUDA kernels for {targets.replace('+', '[+]')} ", announced.stdout), announced
    flags = re.findall(r"-gencode=arch=compute_(\w+),code=(\w+)", announced.stdout)
    assert {"sm_86": "80", "sm_120": "100"}.items() & {(code, arch) for arch, code in flags} or wanted == "8.0;9.0a+PTX"
    assert ("90a", "compute_90a") in flags or wanted != "8.0;9.0a+PTX"


def test_targets_that_are_none(clone):
    torch_with_cuda(clone)
    announced = run(clone, sys.executable, "announce.py", TORCH_CUDA_ARCH_LIST="Hopper")
    (line,) = announced.stderr.splitlines()
    assert line == 'TORCH_CUDA_ARCH_LIST must be "all" or targets such as "8.0;9.0a+PTX", got \'Hopper\''


def torch_with_cuda(clone):
    """announce.py: what setup.py would build with an nvcc, which is a stand-in; the build itself is left out."""
    toolkit = clone / "toolkit"
    for folder in ("bin", "include", "lib64"):
        (toolkit / folder).mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    known = " ".join(f"compute_{target}" for target in (75, 80, 86, 89, 90, 100, 103, 120))
    nvcc.write_text(f"#!/bin/sh\ncase $1 in --dryrun) echo '#$ TOP={toolkit}' >&2 ;; *) echo {known} ;; esac\n")
    nvcc.chmod(0o755)
    (clone / "announce.py").write_text(
        f"""
import os, runpy, sys
import setuptools, torch
os.environ["CMF_NVCC"] = {str(nvcc)!r}
torch.version.cuda = "13.0"
setuptools.setup = lambda **_: None
names = runpy.run_path("setup.py")
print(names["announcement"], *names["nvcc_flags"])
"""
    )


# ------------------------------------------------------------------------------------------------ make


make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not on PATH")


@pytest.fixture
def stubs(clone):
    """The clone with an environment that has no packages: its pip does nothing, and its setup.py notes that it ran."""
    (clone / "setup.py").write_text(
        "import pathlib\n"
        "pathlib.Path('convmixer_fast/_C.so').touch()\n"
        "with open('ran', 'a') as file:\n    file.write('x')\n"
    )
    python = clone / "python.sh"
    python.write_text(
        f"#!/bin/sh\n[ $1 = -m ] || exec {sys.executable} $*\n{sys.executable} -m venv --without-pip .venv\n"
        "for site in .venv/lib/python*/site-packages; do mkdir $site/pip; touch $site/pip/__main__.py; done\n"
    )
    python.chmod(0o755)
    return clone


def times(clone):
    """How often setup.py ran."""
    return len((clone / "ran").read_text())


@make
def test_help_is_the_default(clone):
    shown = run(clone, "make")
    assert shown.returncode == 0 and not shown.stderr
    targets = re.findall(r"^make ([\w-]+)  ", shown.stdout, re.MULTILINE)
    assert {"throughput", "test", "micro", "gpu", "lint", "build", "clean"} <= set(targets)
    for target in [*targets, "test-all"]:
        assert run(clone, "make", "-n", target).returncode == 0, target


@make
def test_the_second_build_does_and_prints_nothing(stubs):
    build = "make", "build", "PYTHON=./python.sh"
    assert run(stubs, *build).returncode == 0 and times(stubs) == 1
    again = run(stubs, *build)
    assert (again.returncode, again.stdout, again.stderr, times(stubs)) == (0, "", "", 1)
    os.utime(stubs / "csrc" / "params.h")
    assert run(stubs, *build).returncode == 0 and times(stubs) == 2
    assert run(stubs, *build, TORCH_CUDA_ARCH_LIST="8.0").returncode == 0 and times(stubs) == 3
    (stubs / "convmixer_fast" / "_C.so").unlink()
    assert run(stubs, *build, TORCH_CUDA_ARCH_LIST="8.0").returncode == 0 and times(stubs) == 4


@make
def test_a_copied_clone_runs_its_own_code(stubs, tmp_path):
    assert run(stubs, "make", "build", "PYTHON=./python.sh").returncode == 0
    (stubs / "convmixer_fast" / "__init__.py").write_text("")
    copy = tmp_path / "copy"
    shutil.copytree(stubs, copy, symlinks=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in (stubs, copy):
        code = "import convmixer_fast; print(convmixer_fast.__file__)"
        imported = run(tmp_path / "elsewhere", folder / ".venv" / "bin" / "python", "-c", code)
        assert imported.stdout.strip() == str(folder / "convmixer_fast" / "__init__.py"), imported.stderr


@make
def test_another_torch_is_quoted_and_has_an_environment_of_its_own(clone):
    shown = run(clone, "make", "-n", "build", "TORCH=torch>=2.12,<3")
    assert "'torch>=2.12,<3'" in shown.stdout
    (folder,) = set(re.findall(r"-m venv (\S+)", shown.stdout))
    assert re.fullmatch(r"\.venv-[\w.-]+", folder) and "2.12" in folder
    assert not list(clone.glob("=*"))
