"""The instruction set of a CPU that a benchmark is held to, each library by a setting of its own.

Each is read once a process, when the library is loaded or first used, so they go into a child's environment.
"""

import os
import sys
from pathlib import Path

# By the name that CMF_CPU_ISA knows. ATEN_CPU_CAPABILITY holds PyTorch's kernels and the vectors of torch.compile,
# MKL_ENABLE_INSTRUCTIONS PyTorch's MKL, ONEDNN_MAX_CPU_ISA the oneDNN of PyTorch and that of OpenVINO, and
# OV_CPU_MAX_ISA OpenVINO's own kernels: with oneDNN's alone, OpenVINO cannot compile a network in bfloat16 for AVX2.
_PEERS = {
    "generic": dict(
        ATEN_CPU_CAPABILITY="default",
        ONEDNN_MAX_CPU_ISA="SSE41",
        OV_CPU_MAX_ISA="SSE41",
        MKL_ENABLE_INSTRUCTIONS="SSE4_2",
    ),
    "avx2": dict(
        ATEN_CPU_CAPABILITY="avx2",
        ONEDNN_MAX_CPU_ISA="AVX2",
        OV_CPU_MAX_ISA="AVX2",
        MKL_ENABLE_INSTRUCTIONS="AVX2",
    ),
    "avx512": dict(
        ATEN_CPU_CAPABILITY="avx512",
        ONEDNN_MAX_CPU_ISA="AVX512_CORE",
        OV_CPU_MAX_ISA="AVX512_CORE",
        MKL_ENABLE_INSTRUCTIONS="AVX512",
    ),
    "avx512_bf16": dict(
        ATEN_CPU_CAPABILITY="avx512",
        ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16",
        OV_CPU_MAX_ISA="AVX512_CORE_BF16",
        MKL_ENABLE_INSTRUCTIONS="AVX512",
    ),
}
NAMES = tuple(_PEERS)
NOT_HELD = ("onnxruntime",)  # its MLAS takes what the processor has, and knows no setting


def settings(isa: str) -> dict[str, str]:
    """What holds ours and its peers, all but NOT_HELD, to an instruction set, by environment variable.

    Raises KeyError for one that is not in NAMES.
    """
    return _PEERS[isa] | {"CMF_CPU_ISA": isa}


def held_to(isa: str) -> dict[str, str]:
    """The environment that holds them: the settings, and a cache for torch.compile alone.

    The usual cache does not tell instruction sets apart: a network that it has kept, with weights packed for AVX2,
    corrupts memory under another one.

    Raises KeyError for one that is not in NAMES.
    """
    cache = Path(__file__).resolve().parent.parent / "build" / "benchmarks" / f"inductor-{isa}"
    return settings(isa) | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}


def not_held() -> tuple[str, ...]:
    """The backends that are not held to what CMF_CPU_ISA holds ours to; none where it is not set."""
    return NOT_HELD if os.environ.get("CMF_CPU_ISA") else ()


def facts() -> dict[str, str]:
    """The instruction set of our kernels in this process, and the settings above that its environment has."""
    held_by = [f"{name}={os.environ[name]}" for name in settings(NAMES[0]) if name in os.environ]
    # Not imported here: a rehearsal asks before it has built the package.
    package = sys.modules.get("convmixer_fast")
    found = {"instruction set": package.build_info()["cpu_isa"]} if package else {}
    return found | ({"held by": " ".join(held_by)} if held_by else {})
