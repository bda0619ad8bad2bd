"""Where the time of an optimized ConvMixer goes on a GPU: each part's time, measured or predicted, beside its floor.

The parts are those of convmixer_fast.engine. A part's floor is the longest of its arithmetic at the speed of the best
library GEMM and its necessary traffic, every activation read and written once, at the speed of a copy. "gaps" is what
the whole pass takes beyond its kernels: launches that come too late, and the kernels' ends.
"""

import statistics
from collections import Counter
from typing import NamedTuple

import report
import timing
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from convmixer_fast import engine
from convmixer_fast.explain import explain
from convmixer_fast.inference import OptimizedConvMixer

PARTS = ("patchify", "GEMM", "depthwise", "pool", "head")
ROUNDS = 10


class Hardware(NamedTuple):
    """A GPU's speeds in the dtype at hand."""

    name: str
    gb_per_s: float  # of a copy, read and written
    teraflops: float  # of the best library GEMM


# Measured elsewhere with cuBLAS and a device-to-device copy; for predictions only.
H200 = Hardware("H200", 4300, 790)


def measure_hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    size, elements = 8192, 1 << 29
    a, b, c = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    x, y = (torch.empty(elements, device=device, dtype=torch.uint8) for _ in range(2))
    work = {"gemm": lambda: torch.mm(a, b, out=c), "copy": lambda: y.copy_(x)}
    seconds = {name: min(samples) for name, samples in timing.measure(work, ROUNDS, timing.clock_for(device)).items()}
    name = torch.cuda.get_device_name(device)
    return Hardware(name, 2 * elements / seconds["copy"] / 1e9, 2 * size**3 / seconds["gemm"] / 1e12)


def floors(optimized: OptimizedConvMixer, shape: tuple[int, ...], hardware: Hardware) -> dict[str, float]:
    """Seconds of each part for images of that shape (N, C, H, W)."""
    depth, dim, *_ = optimized.depthwise.shape
    patch_height, patch_width = optimized.patch.shape[2:]
    batch, channels, height, width = shape
    maps = engine.Geometry(batch, height // patch_height, width // patch_width)
    element, columns = optimized.patch.element_size(), batch * maps.pitch
    patch = -(-channels * patch_height * patch_width // 8) * 8
    classes = len(optimized.head_bias)
    images, patches, activations = batch * channels * height * width, patch * columns, dim * columns
    traffic = {
        "patchify": images + patches,
        "GEMM": patches + activations + patch * dim + depth * (2 * activations + dim * dim),
        "depthwise": depth * 2 * activations,
        "pool": activations + batch * dim,
        "head": batch * dim + classes * dim + batch * classes,
    }
    flops = {"GEMM": 2 * columns * dim * (patch + depth * dim), "head": 2 * batch * dim * classes}
    return {
        part: max(traffic[part] * element / (hardware.gb_per_s * 1e9), flops.get(part, 0) / (hardware.teraflops * 1e12))
        for part in PARTS
    }


def measure(optimized: OptimizedConvMixer, images: Tensor) -> dict[str, float]:
    """Seconds of each part, of the gaps and of the whole, for one batch.

    The kernels' times are the profiler's, in the order in which the pass runs them.
    """
    run = optimized.engine()
    geometry = run.geometry(images)
    logits = images.new_empty(len(images), len(optimized.head_bias))
    arena = engine.Arena(run.weights, geometry)
    cuda = images.is_cuda
    samples = {part: [] for part in PARTS}
    with torch.no_grad():
        for attempt in range(ROUNDS + 1):
            with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], acc_events=True) as profiled:
                for part, step in engine.steps(run.weights, images, logits, geometry, arena):
                    with record_function(part):
                        step()
            spent = Counter()
            for event in profiled.events():
                # On a GPU a range is listed twice: on the host, with its kernels' time, and on the device.
                if event.name in PARTS and event.device_type == torch.autograd.DeviceType.CPU:
                    spent[event.name] += event.device_time_total if cuda else event.cpu_time_total
            if attempt:  # the first one warms up
                for part in PARTS:
                    samples[part].append(spent[part] / 1e6)
        whole = timing.measure({"whole": lambda: run(images)}, ROUNDS, timing.clock_for(images.device))["whole"]
    result = {part: statistics.median(several) for part, several in samples.items()}
    total = statistics.median(whole)
    return result | {"gaps": total - sum(result.values()), "whole": total}


def predict(optimized: OptimizedConvMixer, shape: tuple[int, ...], hardware: Hardware = H200) -> dict[str, float]:
    """Seconds of each part without a GPU: floors, but for the depthwise kernel, whose instructions are counted in the
    machine code (kernel_report.py) with GELU and a 32x32 map, and taken in proportion for others. No gaps: a CUDA
    graph."""
    import kernel_report

    depth, dim, _, kernel_size, _ = optimized.depthwise.shape
    batch, _, height, width = shape
    patch_height, patch_width = optimized.patch.shape[2:]
    dtype = optimized.patch.dtype
    layer_shape = (kernel_report.BATCH, kernel_report.CHANNELS, kernel_report.PLANE, kernel_report.PLANE)
    name = explain(layer_shape, kernel_size, dtype, prologue=True, device=hardware.name).name
    target = kernel_report.DEVICES[hardware.name].target
    source = f"depthwise_mma_{'f16' if dtype == torch.float16 else 'bf16'}_gelu"
    kernel = next(kernel for kernel in kernel_report.load_kernels([target], source) if kernel.name == name)
    layer = max(kernel_report.count_plane(kernel, kernel_size, dtype, True).predict(hardware.name).values()) / 1e6
    share = batch * dim * (height // patch_height) * (width // patch_width)
    share /= kernel_report.BATCH * kernel_report.CHANNELS * kernel_report.PLANE**2
    result = floors(optimized, shape, hardware) | {"depthwise": depth * layer * share}
    return result | {"gaps": 0.0, "whole": sum(result.values())}


def table(seconds: dict[str, float], floor: dict[str, float], batch: int) -> str:
    """A row a part, then the whole."""
    rows = []
    for part in (*PARTS, "gaps", "whole"):
        least = sum(floor.values()) if part == "whole" else floor.get(part)
        share = None if least is None else 100 * least / seconds[part]
        time = [f"{1e3 * seconds[part]:.3f}", f"{100 * seconds[part] / seconds['whole']:.1f}"]
        rows.append([part, *time, report.number(None if least is None else 1e3 * least), report.number(share)])
    text = report.table(["part", "ms", "% of the whole", "floor, ms", "floor, % of it"], rows)
    return f"{text}\n\n{batch / seconds['whole']:.0f} img/s; {batch / sum(floor.values()):.0f} at the floors"
