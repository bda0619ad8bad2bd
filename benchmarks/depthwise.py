"""The depthwise convolution alone: ours beside PyTorch's (cuDNN, ATen), over kernel sizes and the paper's maps.

Each row says how close it comes to what the machine can do, measured in the same rounds: a copy of the same tensor
(its bandwidth is the ceiling of an operator that reads and writes each element once) and, on a CPU, a loop of
independent fused multiply-adds on all threads (fma_peak.cpp). Inputs and results take turns in more memory than the
caches hold, so a layer comes from main memory and goes back there.

GB/s counts the necessary bytes, x once and y once, and GFLOP/s 2 operations a tap and output, taps on the padding
included. Every variant is first compared with float64, without TF32, on one image of the very batch that is timed.
"ms / k3's" is a row's time over that of the same operator, layout and map with a 3x3 kernel, "speed / NCHW's" how many
times as fast channels_last is as NCHW; kernel sizes are timed one after another, layouts in the same rounds.
"""

import argparse
import ctypes
import functools
import hashlib
import itertools
import shutil
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import accuracy
import report
import sweep
import timing
import torch
import torch.nn.functional as F
from report import positive
from throughput import cudnn_depthwise, failure, no_cudnn_depthwise
from torch import Tensor
from tqdm import tqdm

import convmixer_fast
from convmixer_fast import reference

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def convolution(x: Tensor, weight: Tensor, vectors: Tensor) -> Tensor:
    return reference.depthwise_conv2d(x, weight)


def aten(x: Tensor, weight: Tensor, vectors: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding="same", groups=x.shape[1])


def cudnn(x: Tensor, weight: Tensor, vectors: Tensor) -> Tensor:
    with cudnn_depthwise():
        return aten(x, weight, vectors)


def layer(x: Tensor, weight: Tensor, vectors: Tensor) -> Tensor:
    """The convolution with all that stands around it in a ConvMixer: prologue, GELU, BatchNorm, residual."""
    return reference.fused_depthwise(x, weight, *vectors[:3], prologue=tuple(vectors[3:]))


# Name: what is timed, and its definition in plain PyTorch, both of x, the weight and six vectors of (C,): bias, scale
# and shift of the epilogue and of the prologue.
OPERATORS: dict[str, tuple[Callable, Callable]] = {
    "aten": (aten, convolution),
    "cudnn": (cudnn, convolution),
    "ours": (lambda x, weight, vectors: convmixer_fast.depthwise_conv2d(x, weight), convolution),
    "fused": (
        lambda x, weight, vectors: convmixer_fast.fused_depthwise(x, weight, *vectors[:3], prologue=tuple(vectors[3:])),
        layer,
    ),
    "compile": (
        torch.compile(lambda x, weight, vectors: layer(x, weight, vectors.to(x.dtype)), dynamic=False),
        layer,
    ),
}
OURS = ("ours", "fused")
PEER, CUDNN = "aten", "cudnn"
OPERATORS_BY_DEFAULT = [PEER, *OURS]  # torch.compile takes seconds for each shape and layout
COPY, FMA = "copy", "fma"  # the yardsticks

SHARED_DEFAULTS = {  # the gradients' benchmark has the same options, all but the operators
    "cuda": dict(
        maps=["1536x32x32", "768x32x32", "1536x16x16", "1024x16x16"],
        kernels=[3, 5, 7, 9, 11, 13, 15, 21, 31],
        batch=64,
        dtype="float16",
        rounds=20,
    ),
    "cpu": dict(
        maps=["1536x32x32"],
        kernels=[3, 7, 9, 15],
        batch=4,
        dtype="float32",
        rounds=7,
    ),
}
DEFAULTS = {
    "cuda": SHARED_DEFAULTS["cuda"]
    | dict(operators=OPERATORS_BY_DEFAULT + ([] if no_cudnn_depthwise(torch.device("cuda")) else [CUDNN])),
    "cpu": SHARED_DEFAULTS["cpu"] | dict(operators=OPERATORS_BY_DEFAULT),
}


# Compiler's options for the instruction sets of our CPU kernels; the peak's arithmetic is float32.
AVX512 = ("-mavx512f", "-mfma")
PEAK_FLAGS = {"generic": (), "avx2": ("-mavx2", "-mfma"), "avx512": AVX512, "avx512_bf16": AVX512}


def peak_library(isa: str) -> Path:
    """fma_peak.cpp, compiled for an instruction set into build/, once for each version of it.

    Raises FileNotFoundError where there is no g++.
    """
    source = Path(__file__).parent / "fma_peak.cpp"
    flags = ["-O3", *PEAK_FLAGS[isa], "-shared", "-fPIC", "-pthread"]
    key = hashlib.sha256(source.read_bytes() + " ".join(flags).encode()).hexdigest()[:12]
    library = report.ROOT / "build" / "benchmarks" / f"fma_peak-{key}.so"
    if not library.exists():
        compiler = shutil.which("g++")
        if compiler is None:
            raise FileNotFoundError("g++ is needed to measure the processor's peak, and is not on PATH")
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
    return library


class FmaPeak:
    """The processor's peak by fma_peak.cpp, with the instruction set of our kernels.

    Attributes:
        flops: floating-point operations per call.
        seconds: that each call so far took for them, without the start of its threads.

    Raises as peak_library.
    """

    ITERATIONS = 40_000_000  # a tenth of a second: torch's threads, which spin after a call, are asleep by then

    def __init__(self):
        library = peak_library(convmixer_fast.build_info()["cpu_isa"])
        self._loop = ctypes.CDLL(str(library)).fma_loop
        self._loop.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_double)]
        self._loop.restype = ctypes.c_double
        self.seconds: list[float] = []
        self.flops = self()

    def __call__(self) -> float:
        """Runs the loop on as many threads as torch uses; returns the floating-point operations done."""
        seconds = ctypes.c_double()
        flops = self._loop(torch.get_num_threads(), self.ITERATIONS, ctypes.byref(seconds))
        self.seconds.append(seconds.value)
        return flops


def run_case(sizes: tuple[int, int, int], kernel: int, peak, args: argparse.Namespace, progress: tqdm) -> list[dict]:
    """A row for every operator and layout: checked, then timed in rounds with the others and the yardsticks."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    channels, height, width = sizes
    variants = list(itertools.product(args.operators, args.layouts))
    elements = args.batch * channels * height * width
    facts = dict(
        map="x".join(map(str, sizes)),
        kernel=kernel,
        bytes=2 * elements * dtype.itemsize,
        flops=2 * elements * kernel * kernel,
    )
    rows = {(operator, layout): facts | dict(operator=operator, layout=layout) for operator, layout in variants}
    try:
        torch.manual_seed(0)
        x = torch.randn(args.batch, *sizes, device=device, dtype=dtype)
        weight = torch.randn(channels, 1, kernel, kernel, device=device, dtype=dtype) / kernel
        vectors = torch.rand(6, channels, device=device, dtype=torch.promote_types(dtype, torch.float32)) + 0.5
        copies = {layout: timing.cold_copies(x.to(memory_format=LAYOUTS[layout])) for layout in args.layouts}
        expected, eager_errors = {}, {}
        for definition in {OPERATORS[operator][1] for operator in args.operators}:
            with accuracy.no_tf32():
                expected[definition] = definition(x[:1].double(), weight.double(), vectors.double())
                eager = definition(x[:1], weight, vectors.to(dtype))
            eager_errors[definition] = accuracy.relative_error(eager, expected[definition])
    except Exception as error:  # whatever ails one case, the others go on
        for row in rows.values():
            row.update(failure(error))
        return list(rows.values())

    inputs = {layout: itertools.cycle(batches) for layout, batches in copies.items()}
    results = deque(maxlen=len(copies[args.layouts[0]]))  # held for a while, so that the next one lands elsewhere

    def call(function: Callable, layout: str) -> Tensor:
        results.append(function(next(inputs[layout])))
        return results[-1]

    functions = {}
    for (operator, layout), row in rows.items():
        run, definition = OPERATORS[operator]
        function = functools.partial(call, functools.partial(run, weight=weight, vectors=vectors), layout)
        if operator == CUDNN and (reason := no_cudnn_depthwise(device)):
            row.update(status="skipped", message=reason)
            continue
        try:
            with accuracy.no_tf32():
                row["error"] = accuracy.relative_error(function()[:1], expected[definition])
            row.update(accuracy.verdict(row["error"], eager_errors[definition], dtype))
        except Exception as error:
            row.update(failure(error))
        if row["status"] == "right":
            functions[operator, layout] = function
            if operator != PEER:
                row["message"] = accuracy.remark(row["error"], eager_errors[definition])

    yardsticks = {COPY: functools.partial(call, torch.clone, args.layouts[0])} | ({FMA: peak} if peak else {})
    time_variants(rows, functions, yardsticks, args.rounds, device, progress, peak)
    return list(rows.values())


def time_variants(
    rows: dict[tuple, dict],
    functions: dict[tuple, Callable[[], object]],
    yardsticks: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: tqdm,
    peak: FmaPeak | None,
) -> None:
    """Times the functions and yardsticks in rounds, into the rows of the functions."""
    try:
        seconds = timing.measure(functions | yardsticks, rounds, timing.clock_for(device), progress.update)
    except Exception as error:
        for variant in functions:
            rows[variant].update(failure(error))
        return
    for variant in functions:
        rows[variant].update(status="timed", seconds=seconds[variant], copy_seconds=seconds[COPY])
        if peak:
            rows[variant].update(fma_seconds=peak.seconds[-rounds:], fma_flops=peak.flops)


def summarise(rows: list[dict]) -> None:
    """Derives the figures of the timed rows, of the median call: gigabytes_per_second, gigaflops_per_second,
    of_copy and of_fma_peak (fractions), over_{peer}_{layout} of all but the peer (how many times as fast),
    over_kernel_3 (how many times as long as with kernel size 3) and, of channels_last, over_nchw (how many times as
    fast)."""
    timed = [row for row in rows if row["status"] == "timed"]
    for row in timed:
        row["median_seconds"] = statistics.median(row["seconds"])
        row["gigabytes_per_second"] = row["bytes"] / row["median_seconds"] / 1e9
        row["gigaflops_per_second"] = row["flops"] / row["median_seconds"] / 1e9
        row["of_copy"] = statistics.median(row["copy_seconds"]) / row["median_seconds"]
        if "fma_seconds" in row:
            peak = row["fma_flops"] / statistics.median(row["fma_seconds"]) / 1e9
            row["of_fma_peak"] = row["gigaflops_per_second"] / peak
    peers = [row for row in timed if row["operator"] == PEER]
    for row in timed:
        for peer in peers:
            if row["operator"] != PEER and (row["map"], row["kernel"]) == (peer["map"], peer["kernel"]):
                row[f"over_{PEER}_{peer['layout']}"] = peer["median_seconds"] / row["median_seconds"]
    seconds = {(row["map"], row["operator"], row["layout"], row["kernel"]): row["median_seconds"] for row in timed}
    for row in timed:
        with_kernel_3 = seconds.get((row["map"], row["operator"], row["layout"], 3))
        if with_kernel_3 and row["kernel"] != 3:
            row["over_kernel_3"] = row["median_seconds"] / with_kernel_3
        in_nchw = seconds.get((row["map"], row["operator"], "nchw", row["kernel"]))
        if in_nchw and row["layout"] == "channels_last":
            row["over_nchw"] = in_nchw / row["median_seconds"]


def table(rows: list[dict]) -> str:
    """The rows as text."""

    def percent(fraction: float | None) -> str:
        return "" if fraction is None else f"{fraction:.0%}"

    header = ["C x H x W", "operator", "layout", "k", "ms", "GB/s", "GFLOP/s", "of copy", "of FMA peak"]
    header += ["ms / k3's", "speed / NCHW's", *(f"x {PEER} {layout}" for layout in LAYOUTS), "error", "remark"]
    lines = []
    for row in rows:
        milliseconds = row["median_seconds"] * 1e3 if "median_seconds" in row else None
        lines.append(
            [
                *(row["map"], row["operator"], row["layout"], str(row["kernel"]), report.number(milliseconds)),
                *(report.number(row.get(name)) for name in ("gigabytes_per_second", "gigaflops_per_second")),
                *(percent(row.get(name)) for name in ("of_copy", "of_fma_peak")),
                *(report.number(row.get(name)) for name in ("over_kernel_3", "over_nchw")),
                *(report.number(row.get(f"over_{PEER}_{layout}")) for layout in LAYOUTS),
                *(f"{row['error']:.1e}" if "error" in row else "", row["message"]),
            ]
        )
    return sweep.filled_table(header, lines)


map_sizes = report.three_sizes("CxHxW", "1536x32x32")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """It knows the options that this benchmark and that of the gradients share; settle() uses it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = functools.partial(report.both_defaults, SHARED_DEFAULTS)
    parser.add_argument("--maps", nargs="+", type=map_sizes, metavar="CxHxW", help=f"channels, size {both('maps')}")
    parser.add_argument("--kernels", nargs="+", type=positive, metavar="K", help=f"kernel sizes {both('kernels')}")
    parser.add_argument("--batch", type=positive, help=f"images {both('batch')}")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help=both("dtype"))
    parser.add_argument("--rounds", type=positive, help=f"timed calls of each {both('rounds')}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--json", type=Path, help="file for the results; a table goes beside it, as .md")
    return parser


def settle(parser: argparse.ArgumentParser, argv: list[str] | None, defaults: dict[str, dict]) -> argparse.Namespace:
    """The arguments, with the device's defaults for what is not given."""
    args = parser.parse_args(argv)
    report.resolve_device(parser, args, defaults)
    args.maps = [map_sizes(sizes) if isinstance(sizes, str) else sizes for sizes in args.maps]
    return args


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, help=report.both_defaults(DEFAULTS, "operators"))
    return settle(parser, argv, DEFAULTS)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if ours is wrong or failed anywhere, else 0."""
    args = parse(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # PyTorch at its best
    peak = None
    if device.type == "cpu":
        timing.keep_freed_memory()
        peak = FmaPeak() if args.dtype != "float64" else None  # the loop's arithmetic is float32
    settings = f"{args.device}, batches of {args.batch}, {args.dtype}, median of {args.rounds} calls"
    cases = list(itertools.product(args.maps, args.kernels, [peak]))
    rows = sweep.run(args, settings, cases, run_case, summarise, table)
    return int(any(row["operator"] in OURS and row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
