"""The timer of every benchmark: interleaved rounds, medians, CUDA events or perf_counter."""

import ctypes
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

WARM_UP = 3  # untimed calls of each function
MOST_COPIES = 1024  # of a tensor; where more were needed, a call takes longer than its memory accesses anyway


class HostClock:
    """Marks are points in time of the host."""

    mark = staticmethod(time.perf_counter)

    @staticmethod
    def seconds(start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Marks are events in the current stream; reading a span waits for its end."""

    @staticmethod
    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device) -> type:
    return CudaClock if device.type == "cuda" else HostClock


def settle_for(device: torch.device, latency: bool = False) -> Callable[[], object]:
    """What to do before each call. On a CPU: wait until the last one's threads, which spin for a while, are asleep. On
    a GPU nothing: calls queue up, and the gaps between launches hide behind the kernels of the call before. With
    latency they are to show, so every call waits until the GPU is idle."""
    if device.type == "cuda":
        return torch.cuda.synchronize if latency else lambda: None
    return functools.partial(time.sleep, 0.02)


def measure(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: type,
    on_round: Callable[[], object] = lambda: None,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times every function once a round, in turn, so that what disturbs the machine disturbs all of them.

    A round's marks are read while the next round is queued: a GPU never waits for the host in between.

    Args:
        functions: what to time, by name. Each is called WARM_UP times first.
        rounds: timed calls of each function.
        clock: HostClock, CudaClock or alike.
        on_round: called after each round, for a progress bar.
        settle: called before each timed call.

    Returns:
        The seconds of each call, in order, by name.
    """
    for function in functions.values():
        for _ in range(WARM_UP):
            function()
    seconds = {name: [] for name in functions}
    queued = {}
    for round_ in range(rounds + 1):
        before, queued = queued, {}
        if round_ < rounds:
            for name, function in functions.items():
                settle()
                start = clock.mark()
                function()
                queued[name] = start, clock.mark()
        for name, (start, end) in before.items():
            seconds[name].append(clock.seconds(start, end))
        if before:
            on_round()
    return seconds


def last_level_cache(device: torch.device) -> int:
    """Its size in bytes; 32 MiB where the system does not tell a CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=32 * 2**20)


def cold_copies(x: Tensor) -> list[Tensor]:
    """x and as many copies of it (memory format kept) as make three last-level caches, but at most MOST_COPIES: used in
    turn, none is cached."""
    size = max(1, x.numel() * x.element_size())
    copies = min(math.ceil(3 * last_level_cache(x.device) / size), MOST_COPIES)
    return [x] + [x.clone() for _ in range(copies - 1)]


def keep_freed_memory() -> None:
    """Has glibc's malloc keep freed blocks for the next call, as torch does on CUDA.

    By default large blocks go back to the system and every result costs page faults, which then are a good part of
    what is measured, whatever the kernel.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)
