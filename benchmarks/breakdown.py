"""Where the time of an optimized ConvMixer goes, and the floor of each part: a roofline of the model.

A part's floor is the longer of two times: its operations at the machine's peak, and its necessary bytes at the speed
of a copy. All ceilings are measured beside the model. On a CPU the peak by fma_peak.cpp, the matrix products' by the
best of the library calls for that size, the memory's by a copy of the activations. On a GPU the products' by a large
square one; it stands for the peak, too, since the depthwise convolution runs on tensor cores. What a GPU's run takes
beyond its kernels, the gaps between them, is the rest.

A matrix product counts 2 m n k operations. On a CPU our own large ones take fewer multiplications
(csrc/cpu/gemm/strassen.h), so they, and the whole, can be faster than their floor.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import report
import timing
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from convmixer_fast import gpu_engine
from convmixer_fast.cpu_engine import CpuEngine
from convmixer_fast.cpu_library_engine import CpuLibraryEngine

PARTS = ("patchify", "GEMM", "depthwise", "pool + head")
PROFILED = 5  # passes on a GPU: the profiler takes much longer than they do


@dataclass(frozen=True)
class Part:
    """A part of a run: its median time, its floor, and which ceiling that is."""

    name: str
    seconds: float
    flops: float
    floor_seconds: float
    bound: str


@dataclass(frozen=True)
class Ceilings:
    """Of the machine, per second: operations outside and inside of matrix products, and bytes."""

    flops: float
    product_flops: float
    bytes: float


def work(module: torch.nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
    """Operations (2 a multiply-add, taps on the padding included) and necessary bytes of every part of a run.

    Bytes: each weight once, and what a part reads and writes of images, maps and logits.
    """
    dim, in_channels, *patch = module.patch.shape
    depth, _, _, *kernel = module.depthwise.shape
    classes, images, size = len(module.head_bias), x.shape[0], x.element_size()
    pixels = images * (x.shape[2] // patch[0]) * (x.shape[3] // patch[1])
    maps = pixels * dim * size
    taps = kernel[0] * kernel[1]
    values = in_channels * patch[0] * patch[1]
    return {
        "patchify": (2.0 * pixels * dim * values, (pixels + dim) * values * size + maps),
        "GEMM": (2.0 * depth * pixels * dim * dim, depth * (dim * dim * size + 2 * maps)),
        "depthwise": (2.0 * depth * pixels * dim * taps, depth * (dim * taps * size + 2 * maps)),
        "pool + head": (pixels * dim + 2.0 * images * dim * classes, maps + (dim + images) * classes * size),
    }


def cpu_seconds(module: torch.nn.Module, x: Tensor, rounds: int) -> dict[str, float]:
    """The median time of every part, and of the whole call ("total"), by whichever engine runs x."""
    return (library_seconds if module.engine_kind(x) is CpuLibraryEngine else own_seconds)(module, x, rounds)


def library_seconds(module: torch.nn.Module, x: Tensor, rounds: int) -> dict[str, float]:
    """As the host sees the steps. The time of preparing them is part of the total alone, and so of its rest."""
    steps, samples = schedule(module.engine(CpuLibraryEngine), x), []

    def run():
        spent = Counter()
        for part, step in steps():
            start = time.perf_counter()
            step()
            spent[part] += time.perf_counter() - start
        samples.append(spent)

    total = timing.measure({"total": run}, rounds, timing.HostClock, settle=timing.settle_for(x.device))["total"]
    medians = {name: statistics.median(sample[name] for sample in samples[-rounds:]) for name in PARTS}
    return medians | {"total": statistics.median(total)}


def schedule(run: gpu_engine.GpuEngine, x: Tensor) -> Callable[[], Iterator[gpu_engine.Step]]:
    """Gives, at each call, the steps of a pass over x, in memory of its own."""
    geometry, logits = run.geometry(x), run.weights.empty_result(x)
    arena = gpu_engine.Arena(run.weights, geometry)
    return lambda: gpu_engine.steps(run.weights, x, logits, geometry, arena)


def own_seconds(module: torch.nn.Module, x: Tensor, rounds: int) -> dict[str, float]:
    """As the operator itself measures them."""
    depth = len(module.depthwise)
    steps, samples = torch.zeros(2 * depth + 4, dtype=torch.float64), []
    run_steps = module.engine(CpuEngine)

    def run():
        run_steps(x, steps)
        samples.append(steps.clone())

    total = timing.measure({"total": run}, rounds, timing.HostClock, settle=timing.settle_for(x.device))["total"]
    samples = torch.stack(samples[-rounds:])
    layers = samples[:, 2:-2]
    parts = {
        "patchify": samples[:, :2],
        "depthwise": layers[:, ::2],
        "GEMM": layers[:, 1::2],
        "pool + head": samples[:, -2:],
    }
    medians = {name: seconds.sum(1).median().item() for name, seconds in parts.items()}
    return medians | {"total": statistics.median(total)}


def cpu_ceilings(module: torch.nn.Module, x: Tensor, rounds: int) -> Ceilings:
    """Measured with the sizes of the module's layers for these images."""
    from depthwise import FmaPeak

    dim, _, *patch = module.patch.shape
    height, width = x.shape[2] // patch[0], x.shape[3] // patch[1]
    maps = torch.randn(x.shape[0], dim, height, width).to(x.dtype).to(memory_format=torch.channels_last)
    rows, weight = maps.permute(0, 2, 3, 1).reshape(-1, dim), module.pointwise[0]
    peak = FmaPeak()
    functions: dict[str, Callable[[], object]] = {
        "fma": peak,
        "copy": lambda: maps.clone(memory_format=torch.preserve_format),
        "convolution": lambda: F.conv2d(maps, weight[:, :, None, None]),
        "linear": lambda: F.linear(rows, weight),
        "matrix product": lambda: rows @ weight.T,
    }
    mkldnn = torch.ops.mkldnn
    narrow = {torch.bfloat16: mkldnn._is_mkldnn_bf16_supported, torch.float16: mkldnn._is_mkldnn_fp16_supported}
    if x.dtype not in narrow or narrow[x.dtype]():
        geometry = [0, 0], [1, 1], [1, 1], 1
        packed = mkldnn._reorder_convolution_weight(weight[:, :, None, None], *geometry, list(maps.shape))
        convolution = mkldnn._convolution_pointwise
        functions["packed convolution"] = lambda: convolution(maps, packed, None, *geometry, "none", [], "")
    measured = timing.measure(functions, rounds, timing.HostClock, settle=timing.settle_for(x.device))
    seconds = {name: statistics.median(samples) for name, samples in measured.items()}
    product = min(seconds[name] for name in seconds if name not in ("fma", "copy"))
    return Ceilings(
        flops=peak.flops / statistics.median(peak.seconds[-rounds:]),
        product_flops=2 * rows.shape[0] * dim**2 / product,
        bytes=2 * maps.numel() * maps.element_size() / seconds["copy"],
    )


def cuda_seconds(module: torch.nn.Module, x: Tensor, rounds: int) -> dict[str, float]:
    """The median time of every part's kernels, by the profiler, in the order of the pass; and of the whole call."""
    steps, samples = schedule(module.engine(gpu_engine.GpuEngine), x), []
    profiled_rounds = min(rounds, PROFILED)
    for _ in range(timing.WARM_UP + profiled_rounds):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
            for part, step in steps():
                with record_function(part):
                    step()
            torch.cuda.synchronize(x.device)
        samples.append(kernel_seconds(profiled.events()))
    medians = {name: statistics.median(sample[name] for sample in samples[-profiled_rounds:]) for name in PARTS}
    total = timing.measure({"total": lambda: module(x)}, rounds, timing.CudaClock)["total"]
    return medians | {"total": statistics.median(total)}


def kernel_seconds(events: list) -> Counter:
    """Of the ranges named after parts: a range is listed on the host, with its kernels' time, and on the device."""
    spent = Counter()
    for event in events:
        if event.name in PARTS and event.device_type == DeviceType.CPU:
            spent[event.name] += event.device_time_total / 1e6
    return spent


def cuda_ceilings(module: torch.nn.Module, x: Tensor, rounds: int) -> Ceilings:
    size, elements = 8192, 1 << 29
    left, right, product = (torch.randn(size, size, device=x.device, dtype=x.dtype) for _ in range(3))
    source, target = (torch.empty(elements, device=x.device, dtype=torch.uint8) for _ in range(2))
    functions = {
        "product": lambda: torch.mm(left, right, out=product),
        "copy": lambda: target.copy_(source),
    }
    measured = timing.measure(functions, rounds, timing.CudaClock)
    seconds = {name: statistics.median(samples) for name, samples in measured.items()}
    flops = 2 * size**3 / seconds["product"]
    return Ceilings(flops=flops, product_flops=flops, bytes=2 * elements / seconds["copy"])


# Device type: the parts' times and the ceilings, both of the module, the images and the number of rounds.
DEVICES = {"cpu": (cpu_seconds, cpu_ceilings), "cuda": (cuda_seconds, cuda_ceilings)}


@torch.no_grad()
def measure(module: torch.nn.Module, x: Tensor, rounds: int) -> dict[str, object]:
    """The breakdown of module (an OptimizedConvMixer) on x, as plain values.

    Raises ValueError for a device that no breakdown is written for.
    """
    if x.device.type not in DEVICES:
        raise ValueError(f"there is no breakdown for {x.device.type}, only for {', '.join(DEVICES)}")
    times, ceilings_of = DEVICES[x.device.type]
    seconds, ceilings = times(module, x, rounds), ceilings_of(module, x, rounds)
    return combine(floors(module, x, ceilings), seconds, ceilings)


def floors(module: torch.nn.Module, x: Tensor, ceilings: Ceilings) -> list[Part]:
    """Every part at its floor. x: images, or a meta tensor of their shape and dtype."""
    parts = []
    for name, (flops, necessary_bytes) in work(module, x).items():
        products = name in ("GEMM", "patchify")
        compute = flops / (ceilings.product_flops if products else ceilings.flops)
        memory = necessary_bytes / ceilings.bytes
        bound = "memory" if memory > compute else "library GEMM" if products else "FMA peak"
        parts.append(Part(name, max(compute, memory), flops, max(compute, memory), bound))
    return parts


def combine(parts: list[Part], seconds: dict[str, float], ceilings: Ceilings) -> dict[str, object]:
    """The parts with their times; seconds: of each and of the total, the rest of which has a row of its own."""
    parts = [replace(part, seconds=seconds[part.name]) for part in parts]
    rest = seconds["total"] - sum(part.seconds for part in parts)
    parts.append(Part("rest", rest, 0.0, 0.0, ""))
    return dict(parts=[asdict(part) for part in parts], total_seconds=seconds["total"], ceilings=asdict(ceilings))


def table(breakdown: dict[str, object]) -> str:
    """The breakdown as text, the ceilings below it."""
    total, lines = breakdown["total_seconds"], []
    everything = dict(
        name="total",
        seconds=total,
        flops=sum(part["flops"] for part in breakdown["parts"]),
        floor_seconds=sum(part["floor_seconds"] for part in breakdown["parts"]),
        bound="",
    )
    for part in [*breakdown["parts"], everything]:
        seconds, floor = part["seconds"], part["floor_seconds"]
        rate = report.number(part["flops"] / seconds / 1e9) if part["flops"] and seconds else ""
        floors = [report.number(floor * 1e3), f"{floor / seconds:.0%}"] if floor and seconds else ["", ""]
        lines.append(
            [part["name"], report.number(seconds * 1e3), f"{seconds / total:.1%}", rate, *floors, part["bound"]]
        )
    ceilings = breakdown["ceilings"]
    rates = (
        f"FMA peak {ceilings['flops'] / 1e9:.0f} GFLOP/s, library GEMM {ceilings['product_flops'] / 1e9:.0f} GFLOP/s, "
        f"copy {ceilings['bytes'] / 1e9:.0f} GB/s"
    )
    return report.table(["part", "ms", "share", "GFLOP/s", "floor ms", "of floor", "bound"], lines) + f"\n\n{rates}"
