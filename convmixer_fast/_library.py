"""Loads the two compiled libraries, and tells what they contain and why a part is missing."""

import ctypes
from pathlib import Path

import torch

from ._version import __version__

ALLOCATION_FAILED = "out of memory: could not allocate"  # csrc/bindings/operators.h

_FOLDER = Path(__file__).parent
_CPU, _CUDA = _FOLDER / "_C.so", _FOLDER / "_C_cuda.so"


def _load_cpu() -> ctypes.CDLL:
    if not _CPU.exists():
        raise ImportError(f"{_CPU.name} is not built: run `make` in a clone, or `pip install --no-build-isolation .`")
    torch.ops.load_library(_CPU)
    library = ctypes.CDLL(str(_CPU))
    library.convmixer_fast_cpu_isa.restype = ctypes.c_char_p
    library.convmixer_fast_cuda_build.restype = ctypes.c_char_p
    return library


def _load_cuda() -> str | None:
    """Loads the CUDA kernels; returns None, or the reason why there are none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not _CUDA.exists():
        return f"{_CUDA.name} was not built: {_cpu_library.convmixer_fast_cuda_build().decode()}"
    try:
        torch.ops.load_library(_CUDA)
    except OSError as error:
        return f"{_CUDA.name} does not load: {error}"
    return None


_cpu_library = _load_cpu()
_cuda_missing = _load_cuda()


def require_cuda() -> None:
    """Raises RuntimeError with the reason if the CUDA kernels are not loaded."""
    if _cuda_missing:
        raise RuntimeError(f"x is on CUDA, but the CUDA kernels are missing: {_cuda_missing}")


def build_info() -> dict[str, str | list[str] | None]:
    """What this installation can do.

    Returns:
        version: of this package.
        torch: its version.
        libraries: file names of the compiled libraries that are loaded.
        cpu_isa: instruction set of the CPU kernels in use: "generic", "avx2", "avx512" or "avx512_bf16"; or what is
            wrong with CMF_CPU_ISA.
        cuda_targets: the architectures that the CUDA kernels were compiled for, such as ["sm_80", "sm_90a"];
            empty if there are none.
        cuda_missing: why CUDA kernels are not loaded, or None.
    """
    built = _CUDA.exists() and not _cuda_missing
    return {
        "version": __version__,
        "torch": torch.__version__,
        "libraries": [_CPU.name] + ([_CUDA.name] if built else []),
        "cpu_isa": _cpu_library.convmixer_fast_cpu_isa().decode(),
        "cuda_targets": _cpu_library.convmixer_fast_cuda_build().decode().split() if built else [],
        "cuda_missing": _cuda_missing,
    }
