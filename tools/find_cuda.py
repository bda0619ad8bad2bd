"""Finds nvcc for all that run it: setup.py, the Makefile, the emulator of the tests and the kernel report.

As a program it prints the path.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def find_tool(name: str) -> Path:
    """Path of nvcc or another tool of the CUDA toolkit.

    Searches $CMF_NVCC, which names an nvcc, and for other tools its folder; the toolkits $CUDA_HOME and $CUDA_PATH;
    PATH; the toolkit's PyPI packages in this Python environment; /usr/local/cuda; and the tools that triton brings.

    Raises:
        FileNotFoundError: there is none, or CMF_NVCC is not an executable file.
    """
    candidates: list[str | Path] = []
    if named := os.environ.get("CMF_NVCC"):
        nvcc = shutil.which(named)
        if nvcc is None:
            raise FileNotFoundError(f"CMF_NVCC is {named!r}, which is not an executable file")
        candidates.append(nvcc if name == "nvcc" else Path(nvcc).resolve().with_name(name))
    packages = Path(sysconfig.get_path("purelib"))
    homes = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(variable)]
    candidates += [Path(home, "bin", name) for home in homes]
    candidates.append(name)  # on PATH
    candidates += sorted(packages.glob(f"nvidia/cu*/bin/{name}"), reverse=True)  # the newest toolkit first
    candidates.append(Path("/usr/local/cuda/bin", name))
    candidates += packages.glob(f"triton/backends/nvidia/bin/{name}")
    for candidate in candidates:
        if path := shutil.which(candidate):
            return Path(path)
    raise FileNotFoundError(
        f"{name} was not found through CMF_NVCC, CUDA_HOME, CUDA_PATH, PATH, the nvidia packages of this Python "
        f"environment or /usr/local/cuda: `pip install nvidia-cuda-{name}`"
    )


if __name__ == "__main__":
    try:
        print(find_tool("nvcc"))
    except FileNotFoundError as error:
        sys.exit(f"find_cuda: {error}")
