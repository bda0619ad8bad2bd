"""What the compiled libraries tell of themselves, and when the CUDA kernels are refused before a launch fails."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convmixer_fast
from convmixer_fast import _library

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(convmixer_fast.__file__).parent
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


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.9", "1.13.1", "2.1.0a0+git1234"])
def test_an_older_torch_is_refused(version):
    with pytest.raises(ImportError) as refused:
        _library._require_torch(version)
    assert str(refused.value) == f"convmixer_fast needs torch 2.10 or newer, and this is torch {version}"


@pytest.mark.parametrize("version", ["2.10.0a0+git", "2.10", "2.11.0+cu130", "3.0", "10.1.0", "built by hand"])
def test_a_newer_torch_is_taken(version):
    _library._require_torch(version)


def import_error(*before: str, cwd: Path, path: Path = ROOT) -> str:
    """The last line that a process prints which fails to import the package after some statements."""
    code = "\n".join([*before, "import convmixer_fast"])
    environment = os.environ | {"PYTHONPATH": str(path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.count("Traceback") == 1
    return ran.stderr.splitlines()[-1]


def test_the_import_names_an_older_torch(tmp_path):
    error = import_error("import torch", "torch.__version__ = '2.9.1+cu128'", cwd=tmp_path)
    assert error == "ImportError: convmixer_fast needs torch 2.10 or newer, and this is torch 2.9.1+cu128"


@pytest.fixture
def clone(tmp_path):
    """A clone that has the package without its libraries."""
    folder = tmp_path / "clone"
    shutil.copytree(PACKAGE, folder / "convmixer_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def test_a_clone_without_a_library_says_how_to_build(clone):
    """Nowhere on the path is another package of this name."""
    before = [
        "import sys, torch",
        "from pathlib import Path",
        "sys.path = ['', *(path for path in sys.path if path and not Path(path, 'convmixer_fast').exists())]",
    ]
    error = import_error(*before, cwd=clone)
    library = clone / "convmixer_fast" / "_C.so"
    build = "run `make build` in a clone, or `pip install --no-build-isolation .`"
    assert error == f"ImportError: {library} is not built: {build}"


def test_a_clone_without_a_library_names_the_installed_package_that_it_hides(clone, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(PACKAGE, site / "convmixer_fast")
    error = import_error(cwd=clone, path=site)
    folder = clone / "convmixer_fast"
    assert error == (
        f"ImportError: {folder} has no _C.so and hides {site / 'convmixer_fast'}, which has one: run `make build` in "
        f"{clone}, or run python from another folder"
    )


def test_a_library_of_other_sources_is_named(clone):
    """In a clone, whose sources tell; an installed package has none beside it."""
    shutil.copytree(ROOT / "csrc", clone / "csrc")
    shutil.copy(ROOT / "setup.py", clone)
    shutil.copytree(ROOT / "tools", clone / "tools")
    library = clone / "convmixer_fast" / "_C.so"
    library.symlink_to(PACKAGE / "_C.so")
    built_from = _library.build_info()["sources"]
    (clone / "csrc" / "params.h").write_text("// edited\n")
    error = import_error(cwd=clone, path=clone)
    found = rf"{library} was built from other sources \({built_from}\) than are there now \(\w{{12}}\)"
    assert re.fullmatch(f"ImportError: {found}: rebuild it by `make build`", error), error


@pytest.mark.skipif(not _library._cuda_library, reason="the CUDA kernels are not built")
def test_a_cuda_library_of_other_sources_is_a_reason(monkeypatch):
    sources = {_library._CPU.name: "aaa", _library._CUDA.name: "bbb"}
    real = _library._text

    def text(library, function):
        return sources[Path(library._name).name] if function == "convmixer_fast_sources" else real(library, function)

    monkeypatch.setattr(_library, "_text", text)
    _, reason = _library._load_cuda()
    built = f"{_library._CUDA} was built from other sources (bbb) than are there now (aaa)"
    assert reason == f"{built}: rebuild it by `make build`"


def with_field(library, offset, value):
    """The library's bytes with another 16-bit number in the header."""
    return library[:offset] + value.to_bytes(2, "little") + library[offset + 2 :]


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2159328\n" + bytes(64)
DAMAGED = {
    "no library": (lambda library: b"not a library", "file too short"),
    "a pointer of Git LFS": (lambda library: LFS_POINTER, "invalid ELF header"),
    "half of it": (lambda library: library[: len(library) // 2], r"the file is truncated: \d+ bytes of \d+"),
    "all but a byte": (lambda library: library[:-1], r"the file is truncated: \d+ bytes of \d+"),
    "another processor": (
        lambda library: with_field(library, 18, 8),
        r"it is for another processor \(ELF machine 8\) than this one, \w+",
    ),
    "a function that torch lacks": (
        lambda library: library.replace(b"torch_parallel_for\0", b"torch_parallel_fox\0"),
        "undefined symbol: torch_parallel_fox",
    ),
}


@pytest.mark.parametrize("damage, reason", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("name", ["_C.so", "_C_cuda.so"])
def test_a_library_that_does_not_load_says_why_in_a_line(name, damage, reason, tmp_path, monkeypatch):
    """The CPU's library as an error, the other as the reason for which CUDA is missing."""
    library = tmp_path / name
    library.write_bytes(damage((PACKAGE / "_C.so").read_bytes()))
    if name == "_C.so":
        with pytest.raises(ImportError) as refused:
            _library._load(library)
        message = str(refused.value)
    else:
        monkeypatch.setattr(_library, "_CUDA", library)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        loaded, message = _library._load_cuda()
        assert loaded is None
    needs = re.escape(
        f"{library} does not load with torch {torch.__version__} (convmixer_fast needs torch 2.10 or newer)"
    )
    assert re.fullmatch(f"{needs}: ({re.escape(str(library))}: )?{reason}", message), message


def test_a_library_that_is_not_ours_is_named(tmp_path):
    import _ctypes

    library = tmp_path / "_C.so"
    shutil.copy(_ctypes.__file__, library)
    with pytest.raises(
        ImportError, match="it has no convmixer_fast_sources, so it is another library or one of an older"
    ):
        _library._load(library)


def test_a_library_that_nobody_may_wait_for(tmp_path):
    os.mkfifo(tmp_path / "_C.so")
    with pytest.raises(ImportError, match="is a FIFO, accepted: a regular file"):
        _library._load(tmp_path / "_C.so")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_library_without_permission_is_named(tmp_path):
    library = tmp_path / "_C.so"
    shutil.copy(PACKAGE / "_C.so", library)
    library.chmod(0)
    with pytest.raises(ImportError, match=r"needs torch 2\.10 or newer\): .*Permission denied"):
        _library._load(library)


def test_the_import_names_both_versions_and_the_cause(clone):
    library = clone / "convmixer_fast" / "_C.so"
    whole = (PACKAGE / "_C.so").read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    error = import_error(cwd=clone, path=clone)
    found = f"{library} does not load with torch {torch.__version__} (convmixer_fast needs torch 2.10 or newer)"
    assert error == f"ImportError: {found}: the file is truncated: {len(whole) // 2} bytes of {len(whole)}"


def test_library_paths_are_those_in_use(monkeypatch):
    for missing, names in ((None, ["_C.so", "_C_cuda.so"]), ("it does not load", ["_C.so"])):
        monkeypatch.setattr(_library, "_cuda_missing", missing)
        assert convmixer_fast.library_paths() == [PACKAGE / name for name in names]


def test_a_library_brings_the_operators_without_our_python():
    code = """
import sys, torch
for path in sys.argv[1:]:
    torch.ops.load_library(path)
print(torch.ops.convmixer_fast.depthwise_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), None).sum().item())
"""
    command = [sys.executable, "-I", "-c", code, *map(str, convmixer_fast.library_paths())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "49.0\n"


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
