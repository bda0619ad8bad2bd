"""What the compiled CUDA kernels cost: registers, spills, occupancy, instructions per plane, and a predicted time.

Nothing here is measured: it is counted in nvcc's output, no GPU is needed.

Registers, stack, spills and static shared memory are what ptxas says of each kernel of csrc/cuda. For the launches of
CASES the report also has the instructions that the warps of a block issue for one plane: it executes the machine code
(warp_trace.py) of a block that gets some work tiles, then of one that gets twice as many, and takes the difference;
what a block does less often than that drops out, such as the fetch of a channel's weights. The kernel's arguments come
from the code that launches it.

A cycle model of an SM (cycle_model.py) tells how long as many warps as fit need for these instructions. A layer takes
that time, or that of the memory traffic (x read, y written once) if that is longer.

    python benchmarks/kernel_report.py --targets sm_90a --kernels 'depthwise_mma_f16*'
    python benchmarks/kernel_report.py --update docs/kernel_report.md
"""

import argparse
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import sass
import torch
import warp_trace
from cycle_model import DEVICES, simulate, steady_state
from report import ROOT, table, write
from sass import PIPE_OF, PIPES

from convmixer_fast.diagnostics import GPUS, Launch, depthwise_launch, pool_launch, short_name, wgrad_launch

CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "kernel_report"
FLAGS = ("-O3", "-std=c++17", "-lineinfo")  # as setup.py
MARKERS = "<!-- kernel_report.py: begin -->\n", "<!-- kernel_report.py: end -->\n"
FEWEST_TILES = 4  # work tiles in the shorter of the two traces; half as many for blocks of many warps
GPU_OF = {"sm_90a": "H200", "sm_80": "A100", "sm_89": "RTX 4090"}  # for which each target is traced


class Case(NamedTuple):
    """One launch. operator: "depthwise", with what is fused into it; "direct", the same by the direct kernel; "wgrad",
    of contiguous tensors; or "pool"."""

    shape: tuple[int, int, int, int]
    kernel_size: int | tuple[int, int]
    dtype: torch.dtype = torch.float16
    layout: str = "contiguous"
    activation: str = "gelu"
    prologue: bool = False
    residual: bool = True
    operator: str = "depthwise"

    def launch(self, target: str) -> Launch:
        if self.operator == "wgrad":
            return wgrad_launch(self.shape, self.kernel_size, self.dtype)
        if self.operator == "pool":
            return pool_launch(self.shape, self.dtype, self.layout, activation=self.activation)
        fused = dict(activation=self.activation, prologue=self.prologue, residual=self.residual)
        which = dict(device=GPU_OF[target], direct=self.operator == "direct")
        return depthwise_launch(self.shape, self.kernel_size, self.dtype, self.layout, **fused, **which)

    @property
    def planes(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def step(self) -> str:
        if self.operator in ("wgrad", "pool"):
            return self.operator
        parts = ["direct"] if self.operator == "direct" else []
        parts += [self.activation] if self.activation != "none" else []
        parts += ["residual"] * self.residual + ["prologue"] * self.prologue
        return ", ".join(parts) or "plain"

    @property
    def labels(self) -> list[str]:
        batch, channels, height, width = self.shape
        kernel = self.kernel_size if isinstance(self.kernel_size, int) else "x".join(map(str, self.kernel_size))
        layout = "NCHW" if self.layout == "contiguous" else "NHWC"
        return [str(self.dtype)[6:], layout, f"{batch}x{channels}x{height}x{width}", str(kernel), self.step]


PLAIN = dict(activation="none", residual=False)
PAPER = (64, 1536, 32, 32)  # a layer of ConvMixer-1536/20: maps of 224 / 7, and CIFAR-10's
EVERY_TARGET = [
    *(Case(PAPER, k, prologue=prologue) for k in (3, 5, 7, 9) for prologue in (False, True)),
    *(Case(PAPER, k, **PLAIN) for k in (3, 7, 9)),
    *(Case(PAPER, k, operator="wgrad") for k in (3, 5, 7, 9)),
]
NARROW = [  # kernels of few rows or few columns
    *(Case((64, 124, 56, 56), kernel, **PLAIN) for kernel in ((51, 5), (5, 51))),  # SLaK-T
    *(  # InceptionNeXt-T
        Case((64, 12, 56, 56), kernel, layout=layout, **PLAIN)
        for layout in ("contiguous", "channels_last")
        for kernel in ((11, 1), (1, 11))
    ),
]
CASES = {
    "sm_80": EVERY_TARGET,
    "sm_89": EVERY_TARGET,
    "sm_90a": [
        *EVERY_TARGET,
        Case(PAPER, 9, torch.bfloat16, prologue=True),
        Case(PAPER, 9, torch.bfloat16, operator="wgrad"),
        Case(PAPER, 7, layout="channels_last", prologue=True),
        Case(PAPER, 9, layout="channels_last", prologue=True),
        Case(PAPER, 9, layout="channels_last", **PLAIN),
        Case((64, 768, 32, 32), 7, activation="relu", prologue=True),  # ConvMixer-768/32
        Case((64, 1024, 16, 16), 9, prologue=True),  # ConvMixer-1024/20
        Case(PAPER, 31, prologue=True),
        *(  # ConvNeXt-T
            Case((64, channels, size, size), 7, layout=layout, **PLAIN)
            for layout in ("channels_last", "contiguous")
            for channels, size in ((96, 56), (192, 28), (384, 14), (768, 7))
        ),
        *(Case(PAPER, 1, layout=layout, operator="pool") for layout in ("contiguous", "channels_last")),
        Case((64, 256, 28, 28), 31, **PLAIN),  # RepLKNet-31B, whose later stages have slightly smaller kernels
        Case((64, 512, 14, 14), 31, **PLAIN),
        *NARROW,
        *(case._replace(operator="direct") for case in NARROW),
    ],
}


class Resources(NamedTuple):
    registers: int
    stack: int
    spills: int  # bytes stored and loaded
    smem: int  # static


class Kernel(NamedTuple):
    name: str
    target: str
    resources: Resources
    instructions: list[sass.Instruction]


class Prediction(NamedTuple):
    """The time of a case on a GPU; microseconds unless told otherwise."""

    warps: int  # on an SM
    memory: float
    model: float
    cycles: float  # of a quarter of an SM, per plane
    issue: float  # share of the issue slots in use
    reasons: dict[str, float]  # shares of the warps' time, the largest first

    @property
    def microseconds(self) -> float:
        return max(self.memory, self.model)


class Plane(NamedTuple):
    """What a block does in steady state."""

    kernel: Kernel
    case: Case
    launch: Launch
    tiles: int  # work tiles that the steps compute
    planes: float  # the same in planes
    steps: list[list[warp_trace.Step]]  # warp by warp

    @property
    def opcodes(self) -> Counter:
        """Instructions per plane."""
        issued = warp_trace.opcodes(self.kernel.instructions, self.steps)
        return Counter({opcode: times / self.planes for opcode, times in issued.items()})

    @property
    def pipes(self) -> Counter:
        result: Counter = Counter()
        for opcode, times in self.opcodes.items():
            result[PIPE_OF[opcode.partition(".")[0]]] += times
        return result

    @property
    def work_tiles(self) -> float:
        """How many the whole launch has."""
        return self.case.planes * self.tiles / self.planes

    @property
    def wavefronts(self) -> float:
        """A plane."""
        return sum(step.wavefronts for warp in self.steps for step in warp) / self.planes

    def predict(self, name: str) -> Prediction:
        device, gpu = DEVICES[name], GPUS[name]
        blocks = gpu.occupancy(self.launch.block, self.launch.smem_bytes, self.kernel.resources.registers)
        result = simulate(self.kernel.instructions, device, self.steps, blocks)
        tiles = math.ceil(self.work_tiles / (blocks * gpu.sm_count))  # of the block that has most
        model = tiles * result.cycles / self.tiles / (device.ghz * 1e3)
        elements = math.prod(self.case.shape)
        tensors = 1 if self.case.operator == "pool" else 2  # which are as large as x
        memory = tensors * elements * self.case.dtype.itemsize / (device.gb_per_s * 1e3)
        cycles = 4 * result.cycles / (blocks * self.planes)
        return Prediction(blocks * self.launch.block // 32, memory, model, cycles, result.issue, result.reasons)


# ------------------------------------------------------------------------------------------------ kernels


def compile_kernels(source: Path, target: str) -> tuple[Path, str]:
    """The cubin of a source and what ptxas said; from the cache if neither sources nor compiler have changed."""
    nvcc = sass.find_tool("nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("\0".join([version, target, source.name, *FLAGS]).encode())
    headers = [path for folder in ("common", "cuda") for path in sorted((CSRC / folder).rglob("*.*h"))]
    for path in [source, CSRC / "params.h", *headers]:
        digest.update(path.read_bytes() + b"\0")
    cubin = CACHE / f"{source.stem}-{target}-{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = cubin.with_suffix(f".{os.getpid()}.partial")
        command = [nvcc, "-cubin", f"-arch={target}", *FLAGS, "-Xptxas=-v", str(source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        partial.replace(cubin)
        write(log, result.stderr)
    return cubin, log.read_text()


def demangle(names: list[str]) -> list[str]:
    """C++ names of kernels with their template arguments, without namespaces and parameters."""
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in output.splitlines()]


def read_resources(log: str) -> dict[str, Resources]:
    """By mangled name, from ptxas -v."""
    pattern = (
        r"Function properties for (\S+)\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers([^\n]*)"
    )
    result = {}
    for name, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        smem = re.search(r"(\d+) bytes smem", rest)
        result[name] = Resources(int(registers), int(stack), int(stores) + int(loads), int(smem[1]) if smem else 0)
    return result


def kernels_of(source: Path, target: str) -> list[Kernel]:
    cubin, log = compile_kernels(source, target)
    resources, code = read_resources(log), sass.disassemble(cubin)
    mangled = [name for name in resources if name in code]
    if len(mangled) != log.count("Compiling entry function"):
        raise RuntimeError(f"{source.name}, {target}: {len(mangled)} of the kernels that ptxas names were read back")
    return [Kernel(short, target, resources[name], code[name]) for name, short in zip(mangled, demangle(mangled))]


def load_kernels(targets: list[str], pattern: str = "*") -> list[Kernel]:
    """All kernels of the sources whose names match the pattern."""
    sources = [path for path in sorted((CSRC / "cuda").rglob("*.cu")) if fnmatch.fnmatch(path.stem, pattern)]
    jobs = list(itertools.product(sources, targets))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [kernel for found in pool.map(lambda job: kernels_of(*job), jobs) for kernel in found]


def architecture_of(kernel: Kernel) -> int:
    """80 for sm_80."""
    return int(re.search(r"\d+", kernel.target)[0])


def trace_case(kernel: Kernel, case: Case) -> Plane:
    """What a block of the kernel does for the case in steady state; all that it does, for the direct kernel, whose
    blocks have a work tile each.

    Raises:
        UndecidedError: the path hangs on what is not known; or an opcode belongs to no pipe.
    """
    launch = case.launch(kernel.target)

    def trace(arguments: bytes, blocks: int) -> list[list[warp_trace.Step]]:
        return warp_trace.trace(kernel.instructions, arguments, architecture_of(kernel), launch.block // 32, blocks)

    if case.operator == "direct":
        tiles, planes = 1, case.planes / launch.work_tiles
        steps = trace(launch.arguments, launch.work_tiles)
    else:
        tiles, planes = fewest_tiles(case, launch)
        once, twice = (trace(*with_tiles(case, launch, kernel.target, times, tiles, planes)) for times in (1, 2))
        steps = [steady_state(few, many) for few, many in zip(once, twice)]
    plane = Plane(kernel, case, launch, tiles, planes, steps)
    if unknown := {opcode for opcode in plane.opcodes if opcode.partition(".")[0] not in PIPE_OF}:
        raise warp_trace.UndecidedError(f"{kernel.name}, {kernel.target}: no pipe for {', '.join(sorted(unknown))}")
    return plane


def fewest_tiles(case: Case, launch: Launch) -> tuple[int, int]:
    """The work tiles of the shorter trace, and how many planes they are."""
    maps, tile_h, tile_w = launch.tile
    tiles_per_map = math.ceil(case.shape[2] / tile_h) * math.ceil(case.shape[3] / tile_w)
    fewest = FEWEST_TILES if launch.block <= 128 else FEWEST_TILES // 2
    tiles = tiles_per_map * math.ceil(fewest / tiles_per_map)
    return tiles, tiles // tiles_per_map * maps


def with_tiles(case: Case, launch: Launch, target: str, times: int, tiles: int, planes: int) -> tuple[bytes, int]:
    """Arguments and number of blocks of a launch whose first block gets `times` as many work tiles as `tiles`, which
    are so many planes."""
    if case.operator == "depthwise":  # an even number of blocks: siblings come in pairs
        return launch.arguments, launch.work_tiles // (times * tiles) // 2 * 2
    shape = (times * planes, 1) if case.operator == "wgrad" else (times, planes)
    return case._replace(shape=shape + case.shape[2:]).launch(target).arguments, 1  # one block that does all the work


def trace_cases(kernels: list[Kernel]) -> list[Plane]:
    """Those cases whose kernels are there."""
    by_name = {(kernel.name, kernel.target): kernel for kernel in kernels}
    wanted = [
        (by_name.get((case.launch(target).name, target)), case) for target, cases in CASES.items() for case in cases
    ]
    return [trace_case(kernel, case) for kernel, case in wanted if kernel]


# ------------------------------------------------------------------------------------------------ tables


def resource_table(kernels: list[Kernel]) -> str:
    rows = [
        [kernel.name, kernel.target, *map(str, kernel.resources)]
        for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.target))
    ]
    return table(["kernel", "target", "registers", "stack B", "spills B", "static smem B"], rows)


LABELS = ["dtype", "layout", "shape", "k", "step"]


def plane_table(planes: list[Plane]) -> str:
    rows = []
    for plane in planes:
        pipes = plane.pipes
        counts = [f"{pipes[pipe]:.0f}" for pipe in PIPES]
        total, wavefronts = f"{plane.opcodes.total():.0f}", f"{plane.wavefronts:.0f}"
        rows.append([plane.kernel.target, *plane.case.labels, total, *counts, wavefronts])
    return table(["target", *LABELS, "instructions", *PIPES, "wavefronts"], rows)


def predict_all(planes: list[Plane]) -> list[tuple[str, Plane, Prediction]]:
    """Predictions for every GPU of a plane's target; for the H100 those of EVERY_TARGET only."""
    return [
        (name, plane, plane.predict(name))
        for name, device in DEVICES.items()
        for plane in planes
        if device.target == plane.kernel.target and (name == GPU_OF[device.target] or plane.case in EVERY_TARGET)
    ]


def prediction_table(predicted: list[tuple[str, Plane, Prediction]]) -> str:
    rows = []
    for name, plane, found in predicted:
        why = next(reason for reason in found.reasons if reason != "selected")
        rows.append(
            [name, *plane.case.labels, str(plane.kernel.resources.registers), str(found.warps)]
            + [f"{found.memory:.1f}", f"{found.cycles:.0f}", f"{found.model:.1f}", f"{found.microseconds:.1f}"]
            + [f"{100 * found.memory / found.microseconds:.0f}", f"{100 * found.issue:.0f}"]
            + [f"{why} ({100 * found.reasons[why]:.0f} %)"]
        )
    header = ["GPU", *LABELS, "registers", "warps/SM", "memory us", "cycles per plane", "model us", "predicted us"]
    return table(header + ["% of floor", "issue slots %", "warps wait for"], rows)


def pooling(plane: Plane) -> str:
    """Instructions for 32 pixels of a warp, which hardly depend on the size of the map."""
    pixels = plane.case.shape[2] * plane.case.shape[3]
    return f", {plane.case.labels[1]}: {32 * plane.opcodes.total() / pixels:.1f} instructions for 32 pixels of a warp"


def document(kernels: list[Kernel], planes: list[Plane], all_resources: bool) -> str:
    prose = functools.partial(textwrap.fill, width=118, break_on_hyphens=False, break_long_words=False)
    targets = sorted({kernel.target for kernel in kernels})
    spilling = sorted(f"{k.name} ({k.target}: {k.resources.spills} B)" for k in kernels if k.resources.spills)
    registers = [kernel.resources.registers for kernel in kernels]
    parts = [
        "## Predicted cost of the kernels (prediction, not measured)",
        prose(
            "Made by `benchmarks/kernel_report.py`, which says how; `--update` writes this section anew. Everything "
            "here is counted in nvcc's output. "
            f"{len(kernels)} kernels for {', '.join(targets)}: {min(registers)} to {max(registers)} registers, "
            + (f"**spills**: {'; '.join(spilling)}." if spilling else "no spills.")
        ),
    ]
    if all_resources:
        parts.append(resource_table(kernels))
    if planes:
        devices = "; ".join(f"{name}: {GPUS[name].sm_count} SMs, {d.ghz} GHz, {d.note}" for name, d in DEVICES.items())
        pooled = [plane for plane in planes if plane.case.operator == "pool"]
        parts += [
            prose(
                "SASS instructions that the warps of a block issue per plane, by pipe, and wavefronts of the "
                "load/store unit, bank conflicts included. What a step names is fused into the convolution (bias and, "
                "with an activation, scale and shift always are); direct: on CUDA cores, by the kernel that runs where "
                "the tensor-core kernel does not; wgrad: gradients of weight and bias; pool: activate_pool with "
                f"GELU{''.join(map(pooling, pooled))}."
            ),
            plane_table(planes),
            prose(
                "Time of a layer: the longer one of memory (two tensors, each once: x read and y written, or x and gy "
                "read; of pool x alone) and the cycle model of an SM (`benchmarks/cycle_model.py`), which has stall "
                "counts, scoreboards, pipes, bank conflicts and barriers, but no instruction cache and no contention "
                "for DRAM: expect 3 to 10 % more. Cycles per plane are those of a quarter of an SM. Reasons to wait "
                f"have Nsight Compute's names, in % of the warps' time. {devices}."
            ),
            prediction_table(predict_all(planes)),
        ]
    return "\n\n".join(parts)


def update(path: Path, text: str):
    """Puts the text between the markers in a file; at its end, with markers, where there are none."""
    before, begin, rest = path.read_text().partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if begin and not end:
        raise SystemExit(f"{path} has {MARKERS[0].strip()!r} without {MARKERS[1].strip()!r}")
    write(path, before.rstrip("\n") + "\n\n" + MARKERS[0] + text + "\n" + MARKERS[1] + after)


def as_json(kernels: list[Kernel], planes: list[Plane]) -> dict:
    return {
        "prediction": True,
        "kernels": [{"name": k.name, "target": k.target, **k.resources._asdict()} for k in kernels],
        "planes": [
            {
                **dict(zip(LABELS, plane.case.labels)),
                "target": plane.kernel.target,
                "kernel": plane.kernel.name,
                "instructions": plane.opcodes.total(),
                "wavefronts": plane.wavefronts,
                "pipes": dict(plane.pipes),
                "opcodes": dict(plane.opcodes),
                "predictions": {name: found._asdict() for name, other, found in predict_all([plane])},
            }
            for plane in planes
        ],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    targets = sorted({device.target for device in DEVICES.values()})
    parser.add_argument("--targets", nargs="+", default=targets, metavar="T", help=f"({' '.join(targets)})")
    parser.add_argument("--kernels", default="*", metavar="P", help="sources by name, without .cu (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write the report with all kernels' resources")
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--update", type=Path, metavar="F", help="rewrite the report's section in a Markdown file")
    args = parser.parse_args(argv)
    try:
        kernels = load_kernels(args.targets, args.kernels)
        if not kernels:
            parser.error(f"argument --kernels: no kernel in a source named {args.kernels!r}")
        planes = trace_cases(kernels)
    except (FileNotFoundError, warp_trace.UndecidedError) as error:
        print(f"kernel_report: {error}", file=sys.stderr)
        return 1
    text = document(kernels, planes, all_resources=True)
    print(text)
    if args.markdown:
        write(args.markdown, text + "\n")
    if args.json:
        write(args.json, json.dumps(as_json(kernels, planes), indent=1) + "\n")
    if args.update:
        update(args.update, document(kernels, planes, all_resources=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
