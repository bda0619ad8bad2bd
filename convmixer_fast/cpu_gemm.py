"""Who multiplies the matrices of an optimized network on the CPU: the kernels of this package, or PyTorch's library."""

import os
from functools import cache

import torch

from ._types import NETWORK_DTYPES, either, name_of

OWN, LIBRARY = "own", "library"


@cache
def products() -> dict[torch.dtype, str]:
    """OWN or LIBRARY for every dtype of a CPU engine, chosen once per process.

    CMF_CPU_GEMM forces one of them on all dtypes. Without it the library multiplies bfloat16 where the processor has
    AMX, by which oneDNN is several times as fast as the vector instructions of our kernels can be; but not where
    CMF_CPU_ISA asks for one of our instruction sets.

    Raises:
        RuntimeError: CMF_CPU_GEMM is something else.
    """
    wanted = os.environ.get("CMF_CPU_GEMM", "")
    if wanted and wanted not in (OWN, LIBRARY):
        raise RuntimeError(f"CMF_CPU_GEMM must be {either((OWN, LIBRARY))}, or empty, got {wanted!r}")
    # The private name is in every supported version of torch; torch.cpu.get_capabilities() is not known to be.
    amx = torch.cpu._is_amx_tile_supported() and not os.environ.get("CMF_CPU_ISA")
    by_default = {torch.bfloat16: LIBRARY} if amx else {}
    return {dtype: wanted or by_default.get(dtype, OWN) for dtype in NETWORK_DTYPES}


def summary() -> str:
    """products() as text, such as "own" or "own; library for bfloat16"; or what is wrong with CMF_CPU_GEMM."""
    try:
        chosen = products()
    except RuntimeError as error:
        return str(error)
    by_library = [name_of(dtype) for dtype, product in chosen.items() if product == LIBRARY]
    if len(by_library) in (0, len(chosen)):
        return LIBRARY if by_library else OWN
    return f"{OWN}; {LIBRARY} for {either(by_library)}"
