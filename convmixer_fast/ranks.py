"""Several processes that share a job, on torch.distributed: what `torchrun --nproc-per-node N` starts.

Without torchrun there is one process, its rank is 0, and each function is that of a group of one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")

TIMEOUT = timedelta(minutes=30)  # for the slowest rank to arrive; one that has died is noticed at once


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins the group that torchrun's environment describes; on CUDA takes GPU LOCAL_RANK. The ranks leave it together.

    The group is gloo's: only results travel through it. Raises as barrier where another rank has died before the end.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
        # A rank that ended right after its last message could meet gloo's thread still letting go of it, and abort.
        barrier()
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all ranks. Raises RuntimeError where one has died; on rank 0 it names the rank."""
    if dist.is_initialized():
        try:
            dist.monitored_barrier(timeout=TIMEOUT)
        except RuntimeError as error:
            raise RuntimeError(f"a process has died, or is {TIMEOUT} late: {error}") from None


def gather(part: _T) -> list[_T] | None:
    """All ranks' parts, in the order of the ranks, on rank 0; None on the others. Raises as barrier."""
    if not dist.is_initialized():
        return [part]
    barrier()
    parts: list[Any] | None = [None] * count() if rank() == 0 else None
    dist.gather_object(part, parts)
    return parts


def of_first(value: _T) -> _T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
