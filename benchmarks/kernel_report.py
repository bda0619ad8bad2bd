"""What the compiled CUDA kernels cost: registers, spills, occupancy, instructions of one plane, and a predicted time.

Nothing here is measured: it is counted in nvcc's output, no GPU is needed.

Registers, stack, spills and static shared memory are what ptxas says of each kernel of csrc/cuda. For the kernels of
the paper's shape (32x32 maps) it also counts the instructions that a warp issues for one plane: it executes the control
flow of the machine code (sass.py) of a block that owns 4, then of one that owns 8 images, and divides the difference;
what runs once a block or once a channel drops out. The kernel's arguments come from the code that launches it.

From that follows the time of a plane if everything overlaps: the longest of the memory traffic (x read, y written
once), the issue slots (one instruction a cycle for each quarter of an SM) and each pipe (PIPES, DEVICES). Latency, bank
conflicts and barriers are left out: a lower bound, made to compare kernels before a GPU can.

    python benchmarks/kernel_report.py --targets sm_90a --kernels 'depthwise_mma_f16*'
"""

import argparse
import fnmatch
import functools
import hashlib
import itertools
import json
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
from report import ROOT, table, write

from convmixer_fast.diagnostics import GPUS, explain, mma_arguments, short_name, wgrad_launch

CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "kernel_report"
FLAGS = ("-O3", "-std=c++17", "-lineinfo")  # as setup.py
PLANE = 32  # the paper's maps: 224 / 7, and CIFAR-10's
CHANNELS, BATCH = 1536, 64  # a layer of ConvMixer-1536/20
MARKERS = "<!-- kernel_report.py: begin -->\n", "<!-- kernel_report.py: end -->\n"


class Device(NamedTuple):
    """Clock and bandwidth, and the cycles for which a warp's instruction occupies a pipe of a quarter of an SM."""

    target: str
    ghz: float
    gb_per_s: float
    note: str
    tensor: float
    fma: float
    half: float
    alu: float = 2
    mufu: float = 8


# Throughputs: CUDA C++ Programming Guide, "Arithmetic Instructions". IMAD, at half of FFMA's rate on sm_89 and sm_90,
# is taken as FFMA: there are few. Tensor cores: the vendor's peak of dense float16 with float32 sums; on sm_90, whose
# peak takes wgmma, 62 % of it.
DEVICES = {
    "H200": Device("sm_90a", 1.755, 4300, "4.3 TB/s, measured copy; 60 MB L2", tensor=6.5, fma=1, half=1),
    "H100": Device("sm_90a", 1.755, 3000, "3.0 TB/s, measured copy; 50 MB L2", tensor=6.5, fma=1, half=1),
    "A100": Device("sm_80", 1.41, 2039, "80 GB, 2.039 TB/s by data sheet", tensor=8, fma=2, half=1),
    "RTX 4090": Device("sm_89", 2.52, 1008, "1.008 TB/s by data sheet", tensor=32, fma=1, half=2),
}

# Opcodes by pipe. The load/store unit is shared by the four quarters of an SM and moves 128 bytes a cycle.
PIPES = {
    "tensor": "HMMA",
    "fma": "FFMA FADD FMUL IMAD",
    "half": "HADD2 HFMA2 HMUL2 HMNMX2",
    "alu": "IADD3 VIADD VIADDMNMX VIMNMX IMNMX IABS LEA LOP3 SHF ISETP SEL PRMT MOV PLOP3 "
    "FMNMX FSEL FSETP F2FP P2R R2P BMSK",
    "mufu": "MUFU I2F F2I POPC FLO",
    "lsu": "LDS STS LDSM LDG STG",
    "uniform": "UIADD3 UIMAD ULEA ULOP3 USHF UISETP USEL UMOV ULDC R2UR S2UR UPLOP3 UP2UR UPRMT",
    "other": "LDC S2R CS2R BRA BAR BSSY BSYNC WARPSYNC NOP EXIT CALL RET",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


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


class Plane(NamedTuple):
    """What a kernel does for one plane of a shape."""

    kernel: Kernel
    kernel_size: int
    dtype: torch.dtype
    prologue: bool
    wgrad: bool  # the gradient of weight and bias, else the forward pass; that of x is the latter without prologue
    opcodes: Counter

    @property
    def pipes(self) -> Counter:
        result = Counter()
        for opcode, times in self.opcodes.items():
            result[PIPE_OF[opcode.partition(".")[0]]] += times
        return result

    def lsu_cycles(self) -> float:
        """Of one SM: lanes' bytes by 128."""
        bytes_a_lane = {"64": 8, "128": 16, "4": 16, "2": 8}
        return sum(
            times * max(bytes_a_lane.get(modifier, 4) for modifier in opcode.split(".")) * 32 / 128
            for opcode, times in self.opcodes.items()
            if PIPE_OF[opcode.partition(".")[0]] == "lsu"
        )

    def predict(self, name: str) -> dict[str, float]:
        """Microseconds of a layer on a device: by memory, by issue slots, by each pipe."""
        device, gpu, pipes = DEVICES[name], GPUS[name], self.pipes
        cycles = {pipe: pipes[pipe] * getattr(device, pipe) for pipe in ("tensor", "fma", "half", "alu", "mufu")}
        cycles |= {"issue": self.opcodes.total(), "lsu": 4 * self.lsu_cycles()}
        planes = CHANNELS * BATCH
        times = {pipe: planes * count / (4 * gpu.sm_count * device.ghz * 1e3) for pipe, count in cycles.items()}
        tensor_bytes = planes * PLANE**2 * self.dtype.itemsize
        return {"memory": 2 * tensor_bytes / (device.gb_per_s * 1e3)} | times


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


def count_plane(kernel: Kernel, kernel_size: int, dtype: torch.dtype, prologue: bool, wgrad: bool) -> Plane:
    """Instructions that the warps of a block issue for one plane, by opcode.

    Raises:
        sass.UndecidedError: the path hangs on what is not known; or an opcode belongs to no pipe.
    """

    def issued(images):
        shape = (images, 1, PLANE, PLANE)
        if wgrad:
            launch = wgrad_launch(shape, kernel_size, dtype)
            return sass.count(kernel.instructions, launch.arguments, architecture_of(kernel), launch.block // 32)
        warps = explain(shape, kernel_size, dtype, prologue=prologue).block // 32
        arguments = mma_arguments(shape, kernel_size, dtype, prologue=prologue)
        return sass.count(kernel.instructions, arguments, architecture_of(kernel), warps)

    few, many = issued(4), issued(8)
    opcodes = Counter({opcode: (times - few[opcode]) / 4 for opcode, times in many.items() if times != few[opcode]})
    if unknown := {opcode for opcode in opcodes if opcode.partition(".")[0] not in PIPE_OF}:
        raise sass.UndecidedError(f"{kernel.name}, {kernel.target}: no pipe is known for {', '.join(sorted(unknown))}")
    return Plane(kernel, kernel_size, dtype, prologue, wgrad, opcodes)


def count_planes(kernels: list[Kernel]) -> list[Plane]:
    """Of those kernels that the paper's shape runs, the forward pass with GELU; for the targets that sass.py covers."""
    by_name = {(kernel.name, kernel.target): kernel for kernel in kernels}
    result = []
    for target in sorted({kernel.target for kernel in kernels if sass.is_covered(architecture_of(kernel))}):
        for dtype, k, prologue in itertools.product((torch.float16, torch.bfloat16), (3, 5, 7, 9), (False, True)):
            name = explain((BATCH, CHANNELS, PLANE, PLANE), k, dtype, prologue=prologue).name
            if kernel := by_name.get((name, target)):
                result.append(count_plane(kernel, k, dtype, prologue, wgrad=False))
        for dtype, k in itertools.product((torch.float16, torch.bfloat16), (3, 5, 7, 9)):
            name = wgrad_launch((BATCH, CHANNELS, PLANE, PLANE), k, dtype).name
            if kernel := by_name.get((name, target)):
                result.append(count_plane(kernel, k, dtype, prologue=False, wgrad=True))
    return result


# ------------------------------------------------------------------------------------------------ tables


def predictions(plane: Plane) -> dict[str, dict[str, float]]:
    """By device of the plane's target."""
    return {name: plane.predict(name) for name, device in DEVICES.items() if device.target == plane.kernel.target}


def label(plane: Plane) -> list[str]:
    step = "wgrad" if plane.wgrad else "forward, prologue" if plane.prologue else "forward"
    return [str(plane.dtype)[6:], str(plane.kernel_size), step]


def resource_table(kernels: list[Kernel]) -> str:
    rows = [
        [kernel.name, kernel.target, *map(str, kernel.resources)]
        for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.target))
    ]
    return table(["kernel", "target", "registers", "stack B", "spills B", "static smem B"], rows)


def plane_table(planes: list[Plane]) -> str:
    rows = []
    for plane in planes:
        pipes = plane.pipes
        counts = [f"{pipes[pipe]:.0f}" for pipe in PIPES]
        rows.append([plane.kernel.target, *label(plane), f"{plane.opcodes.total():.0f}", *counts])
    return table(["target", "dtype", "k", "step", "instructions", *PIPES], rows)


def prediction_table(planes: list[Plane]) -> str:
    rows = []
    for name, plane in itertools.product(DEVICES, planes):
        if name not in predictions(plane):
            continue
        gpu, registers = GPUS[name], plane.kernel.resources.registers
        shape, k = (BATCH, CHANNELS, PLANE, PLANE), plane.kernel_size
        forward = functools.partial(explain, shape, k, plane.dtype, prologue=plane.prologue)
        launch = wgrad_launch(shape, k, plane.dtype) if plane.wgrad else forward()
        blocks = gpu.occupancy(launch.block, launch.smem_bytes, registers)
        times = predictions(plane)[name]
        pipe = max(times.keys() - {"memory", "issue"}, key=times.get)
        bound = max(times.values())
        rows.append(
            [name, *label(plane), str(registers), str(launch.smem_bytes), f"{blocks}", f"{blocks * launch.block // 32}"]
            + [f"{times['memory']:.0f}", f"{times['issue']:.0f}", f"{times[pipe]:.0f} ({pipe})"]
            + [f"{bound:.0f}", f"{1e3 * bound / (CHANNELS * BATCH):.2f}", f"{100 * times['memory'] / bound:.0f}"]
        )
    header = ["GPU", "dtype", "k", "step", "registers", "smem B", "blocks/SM", "warps/SM", "memory us", "issue us"]
    return table(header + ["busiest pipe us", "predicted us", "ns a plane", "% of floor"], rows)


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
        parts += [
            prose(
                f"SASS instructions that the warps of a block issue for one {PLANE}x{PLANE} plane. Forward: "
                "convolution, bias, GELU, scale and shift, residual, with and without the prologue; wgrad: gradients "
                "of weight and bias."
            ),
            plane_table(planes),
        ]
    if predicted := [plane for plane in planes if predictions(plane)]:
        devices = "; ".join(f"{name}: {GPUS[name].sm_count} SMs, {d.ghz} GHz, {d.note}" for name, d in DEVICES.items())
        parts += [
            prose(
                f"A layer of C = {CHANNELS}, batch {BATCH} ({CHANNELS * BATCH:,} planes): the longest of memory (two "
                "tensors, each once: x read and y written, or x and gy read), issue slots and the busiest pipe, if all "
                "overlap; latency and bank conflicts are "
                f"left out. {devices}."
            ),
            prediction_table(predicted),
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
                **dict(zip(("dtype", "kernel_size", "step"), label(plane))),
                "target": plane.kernel.target,
                "instructions": plane.opcodes.total(),
                "pipes": dict(plane.pipes),
                "opcodes": dict(plane.opcodes),
                "microseconds": predictions(plane),
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
        planes = count_planes(kernels)
    except (FileNotFoundError, sass.UndecidedError) as error:
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
