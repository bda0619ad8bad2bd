"""The compilers that ptxsim runs, and the cache of what they made."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import subprocess
import sysconfig

HERE = os.path.dirname(os.path.abspath(__file__))
CXX = os.environ.get("PTXSIM_CXX", "g++")


def cache_dir() -> str:
    """Directory of compiled kernels: $PTXSIM_CACHE, else ~/.cache/ptxsim."""
    base = os.environ.get("PTXSIM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptxsim"
    )
    os.makedirs(base, exist_ok=True)
    return base


@contextlib.contextmanager
def making(name: str):
    """Held by the one process that makes a file of the cache, while others that want it wait."""
    locks = os.path.join(cache_dir(), "locks")
    os.makedirs(locks, exist_ok=True)
    with open(os.path.join(locks, name), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_nvcc() -> str:
    """Path of nvcc: $CMF_NVCC, $CUDA_HOME or $CUDA_PATH, PATH, the toolkit's PyPI packages, /usr/local/cuda.

    Raises RuntimeError if there is none, or if $CMF_NVCC names a file that is not there.
    """
    named = os.environ.get("CMF_NVCC")
    if named:
        if not shutil.which(named):
            raise RuntimeError(f"CMF_NVCC is {named!r}, which is not an executable file")
        return shutil.which(named)
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    packages = sorted(glob.glob(os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu*")), reverse=True)
    found = [os.path.join(home, "bin", "nvcc") for home in homes]
    found += [shutil.which("nvcc") or ""]
    found += [os.path.join(home, "bin", "nvcc") for home in [*packages, "/usr/local/cuda"]]
    for path in found:
        if os.access(path, os.X_OK):
            return path
    raise RuntimeError(
        "ptxsim needs nvcc: none found through CMF_NVCC, CUDA_HOME, CUDA_PATH, PATH, the nvidia packages of this "
        "Python environment or /usr/local/cuda"
    )


def run(command: list) -> str:
    """Run a compiler; returns its output, raises RuntimeError with the command and its messages if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed\n{' '.join(command)}\n{(result.stderr or result.stdout)[:6000]}")
    return result.stdout


def install(source: str, target: str):
    """Copy a file into the cache so that other processes see all of it or nothing."""
    partial = f"{target}.{os.getpid()}.tmp"
    shutil.copyfile(source, partial)
    os.replace(partial, target)
