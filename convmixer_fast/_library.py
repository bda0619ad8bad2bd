"""Loads the two compiled libraries, and tells what they contain and why a part is missing."""

import ctypes
import os
import re
import runpy
import struct
import sys
from pathlib import Path

import torch

from . import cpu_gemm
from ._version import __version__
from .files import open_regular, printable

ALLOCATION_FAILED = "out of memory: could not allocate"  # csrc/bindings/allocation.h

_OLDEST_TORCH = (2, 10)  # the stable ABI that setup.py builds against, TORCH_TARGET_VERSION
_NEEDS = f"convmixer_fast needs torch {'.'.join(map(str, _OLDEST_TORCH))} or newer"
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
_FOLDER = Path(__file__).parent
_CPU, _CUDA = _FOLDER / "_C.so", _FOLDER / "_C_cuda.so"


def _text(library: ctypes.CDLL, function: str) -> str:
    """What a function of the library without arguments returns."""
    call = library[function]
    call.restype = ctypes.c_char_p
    return call().decode()


def _require_torch(version: str) -> None:
    """Raises ImportError for a torch that lacks functions which the libraries call: the linker would name only them."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) < _OLDEST_TORCH:
        raise ImportError(f"{_NEEDS}, and this is torch {version}")


def _not_built() -> str:
    """What to do where this folder has no library. A clone on the path hides an installed package that has one."""
    others = (Path(entry, _FOLDER.name).resolve() for entry in sys.path)
    installed = next((folder for folder in others if (folder / _CPU.name).exists()), None)
    if installed is None:
        return f"{_CPU} is not built: run `make build` in a clone, or `pip install --no-build-isolation .`"
    return (
        f"{_FOLDER} has no {_CPU.name} and hides {installed}, which has one: run `make build` in {_FOLDER.parent}, or "
        "run python from another folder"
    )


def _sources(library: ctypes.CDLL) -> str:
    """The digest of those that it was compiled from."""
    return _text(library, "convmixer_fast_sources")


def _of_other_sources(path: Path, library: ctypes.CDLL, expected: str) -> str | None:
    """What to do with a library whose sources do not have the expected digest, or None."""
    found = _sources(library)
    if found == expected:
        return None
    return f"{path} was built from other sources ({found}) than are there now ({expected}): rebuild it by `make build`"


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library with its operators; raises ImportError with the linker's reason, in one line."""
    try:
        _check_file(path)
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
        if not hasattr(library, "convmixer_fast_sources"):
            raise OSError("it has no convmixer_fast_sources, so it is another library or one of an older version")
    except OSError as error:
        cause = printable(error.__cause__ or error)  # torch's own words are no reason, and have the linker's as cause
        raise ImportError(f"{path} does not load with torch {torch.__version__} ({_NEEDS}): {cause}") from None
    return library


def _check_file(path: Path) -> None:
    """Raises OSError for a library whose end is missing: the linker would map it, and the process die by a signal; and
    for one of another processor, which the linker calls a missing file."""
    with open_regular(path) as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return  # it is no 64-bit library, which the linker says
    machine, table, entry_size, entries = struct.unpack_from("<18xH20xQ10xHH", header)
    if machine != _ELF_MACHINES.get(os.uname().machine, machine):
        raise OSError(f"it is for another processor (ELF machine {machine}) than this one, {os.uname().machine}")
    end = table + entry_size * entries  # the table of sections ends the file
    if size < end:
        raise OSError(f"the file is truncated: {size} bytes of {end}")


def _load_cpu() -> ctypes.CDLL:
    """The library with the schemas and the CPU kernels; raises ImportError with what to do where it cannot be used."""
    _require_torch(torch.__version__)
    if not _CPU.exists():
        raise ImportError(_not_built())
    library = _load(_CPU)
    digest = _FOLDER.parent / "csrc" / "fingerprint.py"
    if digest.exists():  # in a clone; an installed package has no sources beside it
        outdated = _of_other_sources(_CPU, library, runpy.run_path(str(digest))["fingerprint"]())
        if outdated:
            raise ImportError(outdated)
    return library


def _load_cuda() -> tuple[ctypes.CDLL | None, str | None]:
    """The CUDA kernels' library where there is one, and why they cannot be used, or None."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a build without CUDA"
    if not _CUDA.exists():
        return None, f"{_CUDA.name} was not built: {_text(_cpu_library, 'convmixer_fast_cuda_build')}"
    try:
        library = _load(_CUDA)
    except ImportError as error:
        return None, str(error)
    outdated = _of_other_sources(_CUDA, library, _sources(_cpu_library))
    return library, outdated or _why_unusable(library.convmixer_fast_cuda_runtime(), _driver_version())


def _driver_version() -> int | None:
    """The newest CUDA version that the driver serves, such as 13000 for 13.0; None where there is no driver.

    The driver's own library is asked, not the CUDA runtime: nothing is initialised, and a process that imports this
    package may still choose its GPUs or fork.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _why_unusable(runtime: int, driver: int | None) -> str | None:
    """Why kernels with this CUDA runtime would fail at their launch, or None. A driver serves every runtime of its own
    major version and of older ones."""
    if driver is None or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"{_CUDA.name} has the CUDA {_dotted(runtime)} runtime, and the driver serves CUDA {_dotted(driver)} at most: "
        f"install a driver for CUDA {runtime // 1000}, or build with the driver's toolkit"
    )


def _dotted(version: int) -> str:
    """13.0 for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


_cpu_library = _load_cpu()
_cuda_library, _cuda_missing = _load_cuda()


def require_cuda() -> None:
    """Raises RuntimeError with the reason if the CUDA kernels are not loaded."""
    if _cuda_missing:
        raise RuntimeError(f"x is on CUDA, but the CUDA kernels are missing: {_cuda_missing}")


def library_paths() -> list[Path]:
    """The compiled libraries that this process uses, _C.so and, where its kernels can be used, _C_cuda.so.

    A process without this package that runs a program exported with its operators loads them first, in this order:
    ``torch.ops.load_library(path)`` in Python, ``dlopen(path, RTLD_NOW)`` in C++. They need no other file of this
    package; _C_cuda.so needs a torch built for CUDA.
    """
    return [_CPU] if _cuda_missing else [_CPU, _CUDA]


def build_info() -> dict[str, str | list[str] | None]:
    """What this installation can do.

    Returns:
        version: of this package.
        torch: its version.
        libraries: file names of the compiled libraries that are loaded.
        sources: digest of the sources that these were compiled from (csrc/fingerprint.py); where the two differ, that
            of the CUDA library after a comma.
        cpu_isa: instruction set of the CPU kernels in use: "generic", "avx2", "avx512" or "avx512_bf16"; or what is
            wrong with CMF_CPU_ISA.
        cpu_gemm: who multiplies the matrices of an optimized network on the CPU: "own", "library", that is PyTorch's,
            or "own; library for bfloat16"; or what is wrong with CMF_CPU_GEMM.
        cuda_targets: the architectures that the CUDA kernels were compiled for, such as ["sm_80", "sm_90a"];
            empty if there are none.
        cuda_runtime: the version of the CUDA runtime in the CUDA library, such as "13.0", or None.
        cuda_driver: the newest CUDA version that the driver serves, such as "13.1", or None.
        cuda_missing: why the CUDA kernels cannot be used, or None.
    """
    libraries = {_CPU.name: _cpu_library} | ({_CUDA.name: _cuda_library} if _cuda_library else {})
    sources = dict.fromkeys(map(_sources, libraries.values()))
    driver = _driver_version()
    return {
        "version": __version__,
        "torch": torch.__version__,
        "libraries": list(libraries),
        "sources": ", ".join(sources),
        "cpu_isa": _text(_cpu_library, "convmixer_fast_cpu_isa"),
        "cpu_gemm": cpu_gemm.summary(),
        "cuda_targets": _text(_cuda_library, "convmixer_fast_cuda_build").split() if _cuda_library else [],
        "cuda_runtime": _dotted(_cuda_library.convmixer_fast_cuda_runtime()) if _cuda_library else None,
        "cuda_driver": _dotted(driver) if driver else None,
        "cuda_missing": _cuda_missing,
    }
