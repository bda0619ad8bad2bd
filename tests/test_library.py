"""What the compiled libraries tell of themselves, and when the CUDA kernels are refused before a launch fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convmixer_fast
from convmixer_fast import _library

ROOT = Path(__file__).resolve().parent.parent
REASON = "_C_cuda.so has the CUDA 13.0 runtime, and the driver serves CUDA 12.8 at most: install a driver for CUDA 13"


@pytest.mark.parametrize(
    "runtime, driver, usable",
    [
        (13000, None, True),  # no driver: there is no GPU to launch on
        (13000, 13000, True),
        (13010, 13000, True),  # versions of one major version serve each other
        (13000, 14000, True),
        (13000, 12090, False),
        (13000, 11080, False),
    ],
)
def test_a_driver_serves_runtimes_up_to_its_major_version(runtime, driver, usable):
    assert (_library._why_unusable(runtime, driver) is None) == usable
    assert _library._why_unusable(13000, 12080).startswith(REASON)


@pytest.fixture
def old_driver(tmp_path):
    """A process's environment in which the driver is one for CUDA 12.8."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    source = tmp_path / "driver.cpp"
    source.write_text('extern "C" int cuDriverGetVersion(int* version) { *version = 12080; return 0; }\n')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", tmp_path / "libcuda.so.1"], check=True)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("LD_LIBRARY_PATH")]))
    return os.environ | {"LD_LIBRARY_PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(not _library._cuda_library, reason="the CUDA kernels are not built")
def test_an_old_driver_is_a_reason_not_a_failing_launch(old_driver):
    code = """
import convmixer_fast
info = convmixer_fast.build_info()
print(info["cuda_driver"], info["cuda_runtime"], info["cuda_missing"], sep="\\n")
try:
    convmixer_fast._library.require_cuda()
except RuntimeError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], env=old_driver, capture_output=True, text=True, check=True)
    driver, runtime, missing, refused = ran.stdout.splitlines()
    assert driver == "12.8" and runtime == convmixer_fast.build_info()["cuda_runtime"]
    major = runtime.partition(".")[0]
    assert missing.startswith(f"_C_cuda.so has the CUDA {runtime} runtime, and the driver serves CUDA 12.8 at most")
    assert f"a driver for CUDA {major}" in missing
    assert refused == f"x is on CUDA, but the CUDA kernels are missing: {missing}"


def test_build_info_names_the_sources_of_both_libraries(monkeypatch):
    info = convmixer_fast.build_info()
    assert len(info["sources"]) == 12 and int(info["sources"], 16) >= 0
    if torch.version.cuda and _library._cuda_library:
        assert info["cuda_targets"] and info["cuda_runtime"].count(".") == 1
    sources = {_library._cpu_library: "aaa", "other": "bbb"}
    real = _library._text

    def text(library, function):
        return sources[library] if function == "convmixer_fast_sources" else real(_library._cpu_library, function)

    class Other(str):
        def convmixer_fast_cuda_runtime(self):
            return 13010

    monkeypatch.setattr(_library, "_text", text)
    monkeypatch.setattr(_library, "_cuda_library", Other("other"))
    monkeypatch.setattr(_library, "_driver_version", lambda: 13020)
    info = convmixer_fast.build_info()
    assert (info["sources"], info["cuda_runtime"], info["cuda_driver"]) == ("aaa, bbb", "13.1", "13.2")
