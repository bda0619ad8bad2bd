"""The compilers that ptxsim runs, and the cache of what they made."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import runpy
import shutil
import subprocess

HERE = os.path.dirname(os.path.abspath(__file__))
CXX = os.environ.get("PTXSIM_CXX", "g++")
_find_tool = runpy.run_path(os.path.join(HERE, "..", "..", "tools", "find_cuda.py"))["find_tool"]


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
    """Path of nvcc, as tools/find_cuda.py finds it. Raises RuntimeError if there is none."""
    try:
        return str(_find_tool("nvcc"))
    except FileNotFoundError as error:
        raise RuntimeError(f"ptxsim needs nvcc: {error}") from None


def run(command: list) -> str:
    """Run a compiler; returns its output, raises RuntimeError with the command and its messages if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed\n{' '.join(command)}\n{(result.stderr or result.stdout)[:6000]}")
    return result.stdout


def check_sizes(library: ctypes.CDLL, sizes: dict[str, type[ctypes.Structure]]):
    """Raises RuntimeError unless each structure is as large as the library's own, which the named function tells."""
    for function, structure in sizes.items():
        size = getattr(library, function)()
        if size != ctypes.sizeof(structure):
            raise RuntimeError(f"{structure.__name__} has {size} bytes in C++, {ctypes.sizeof(structure)} in Python")


def install(source: str, target: str):
    """Copy a file into the cache so that other processes see all of it or nothing."""
    partial = f"{target}.{os.getpid()}.tmp"
    shutil.copyfile(source, partial)
    os.replace(partial, target)
