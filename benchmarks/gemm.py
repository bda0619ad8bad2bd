"""The matrix product of a ConvMixer layer, by library and layout.

The product of a layer over all images is (M, K) times (K, N): M and K channels, N pixels of all images. The engine has
a channel in a row, and a row of 64 maps of 32x32 in float16 takes exactly 128 KiB, so that all rows start at the same
offset modulo 2^17. "padded" moves them apart, "transposed" has a pixel in a row, "cublaslt" asks another library for
the same, and "square", a large square product of the same dtype, is the ceiling.

Every result is first compared with float64 on some columns, without TF32; what is off by more than accuracy.limit() is
reported, and not timed. All are timed in the same rounds, with PyTorch's own setting and each on memory of its own: on
a GPU the others, the square one above all, move more than the L2 cache holds, so that a product finds nothing there. A
CPU only rehearses.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import accuracy
import report
import sweep
import torch
from report import positive
from throughput import failure
from torch import Tensor
from tqdm import tqdm

PAD = 64  # elements
CHECKED = 64  # columns of the result
SQUARE = "square"
SIDE = {"cuda": 8192, "cpu": 128}  # of the square product

DEFAULTS = {
    "cuda": dict(sizes=["1536x1536x65536"], dtype="float16", rounds=20),
    "cpu": dict(sizes=["64x64x1024"], dtype="float32", rounds=5),
}


def mm(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """As the engine calls it."""
    x, result = x.clone(), x.new_empty(weight.shape[0], x.shape[1])
    return functools.partial(torch.mm, weight, x, out=result)


def padded(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """With PAD elements between the rows of x, and of the result."""
    columns = x.shape[1]
    wide_x, wide_result = (x.new_empty(rows, columns + PAD) for rows in (x.shape[0], weight.shape[0]))
    return functools.partial(torch.mm, weight, wide_x[:, :columns].copy_(x), out=wide_result[:, :columns])


def transposed(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """With the channels of a pixel next to each other, in x and in the result."""
    pixels, result = x.T.contiguous(), x.new_empty(x.shape[1], weight.shape[0])
    return lambda: torch.mm(pixels, weight.T, out=result).T


def cublaslt(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    run = mm(weight, x)

    def by_cublaslt() -> Tensor:
        with blas_library("cublaslt"):
            return run()

    return by_cublaslt


@contextmanager
def blas_library(name: str) -> Iterator[None]:
    """Has PyTorch take its products from a library; where that lacks one, PyTorch takes another."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


# Each makes, for a weight (M, K) and x (K, N), what gives their product (M, N).
VARIANTS: dict[str, Callable[[Tensor, Tensor], Callable[[], Tensor]]] = {
    "mm": mm,
    "padded": padded,
    "transposed": transposed,
    "cublaslt": cublaslt,
    SQUARE: mm,
}
BASELINE = "mm"


def run_case(m: int, k: int, n: int, args: argparse.Namespace, progress: tqdm) -> list[dict]:
    """A row for every variant: checked, then timed in rounds with the others."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    case = "x".join(map(str, (m, k, n)))
    sizes = dict.fromkeys(VARIANTS, (m, k, n)) | {SQUARE: (SIDE[device.type],) * 3}
    rows, ready = {}, {}
    for variant, (height, inner, width) in sizes.items():
        flops = 2 * height * inner * width
        row = dict(case=case, sizes=f"{height}x{inner}x{width}", variant=variant, dtype=args.dtype, flops=flops)
        rows[variant] = row
        progress.set_postfix_str(f"{case}, checking {variant}")
        if variant == "cublaslt" and device.type != "cuda":
            row.update(status="skipped", message=f"not applicable: cuBLASLt needs a CUDA device, this is {device.type}")
            continue
        try:
            torch.manual_seed(0)
            weight = torch.randn(height, inner, device=device, dtype=dtype) / inner**0.5
            x = torch.randn(inner, width, device=device, dtype=dtype)
            run = VARIANTS[variant](weight, x)
            with accuracy.no_tf32():
                row.update(check(run(), weight, x))
            if row["status"] == "right":
                ready[variant] = run
        except Exception as error:  # whatever ails one variant, the others go on
            row.update(failure(error))

    progress.set_postfix_str(case)
    sweep.time_rows(rows, ready, args, progress)
    return list(rows.values())


def check(result: Tensor, weight: Tensor, x: Tensor) -> dict[str, object]:
    """The error of a product over some columns, that of PyTorch's own in the same dtype, and what follows from both."""
    columns = torch.linspace(0, x.shape[1] - 1, min(CHECKED, x.shape[1]), device=x.device).long()
    some = x[:, columns]
    expected = weight.double() @ some.double()
    eager_error = accuracy.relative_error(weight @ some, expected)
    error = accuracy.relative_error(result[:, columns], expected)
    return dict(error=error, eager_error=eager_error) | accuracy.verdict(error, eager_error, x.dtype)


def summarise(rows: list[dict]) -> None:
    """Derives the figures of the timed rows, of the median call: teraflops_per_second, of_ceiling (the fraction of the
    square product's) and over_mm (how many times as fast)."""
    timed = {(row["case"], row["variant"]): row for row in rows if row["status"] == "timed"}
    for row in timed.values():
        row["median_seconds"] = statistics.median(row["seconds"])
        row["teraflops_per_second"] = row["flops"] / row["median_seconds"] / 1e12
    for (case, variant), row in timed.items():
        square, baseline = timed.get((case, SQUARE)), timed.get((case, BASELINE))
        if square and variant != SQUARE:
            row["of_ceiling"] = row["teraflops_per_second"] / square["teraflops_per_second"]
        if baseline and variant not in (SQUARE, BASELINE):
            row["over_mm"] = baseline["median_seconds"] / row["median_seconds"]


def table(rows: list[dict]) -> str:
    """The rows as text. error: max |result - float64's| / max |float64's|."""
    header = ["M x K x N", "variant", "ms", "TFLOP/s", "of the ceiling", "x mm", "error", "remark"]
    lines = []
    for row in rows:
        milliseconds = row["median_seconds"] * 1e3 if "median_seconds" in row else None
        of_ceiling = f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else ""
        error = f"{row['error']:.1e}" if "error" in row else ""
        figures = [report.number(milliseconds), report.number(row.get("teraflops_per_second")), of_ceiling]
        lines.append([row["sizes"], row["variant"], *figures, report.number(row.get("over_mm")), error, row["message"]])
    return sweep.filled_table(header, lines)


product_sizes = report.three_sizes("MxKxN", "1536x1536x65536")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = functools.partial(report.both_defaults, DEFAULTS)
    parser.add_argument("--sizes", nargs="+", type=product_sizes, metavar="MxKxN", help=f"products {both('sizes')}")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help=both("dtype"))
    parser.add_argument("--rounds", type=positive, help=f"timed calls of each {both('rounds')}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    parser.add_argument("--json", type=Path, help="file for the results; a table goes beside it, as .md")
    args = parser.parse_args(argv)
    report.resolve_device(parser, args, DEFAULTS)
    args.sizes = [product_sizes(sizes) if isinstance(sizes, str) else sizes for sizes in args.sizes]
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if any variant is wrong or failed, else 0."""
    args = parse(argv)
    settings = f"{args.device}, {args.dtype}, median of {args.rounds} calls"
    rows = sweep.run(args, settings, args.sizes, run_case, summarise, table)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
