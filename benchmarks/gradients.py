"""The gradients of the depthwise convolution alone: of its input (dgrad) and of its weight and bias (wgrad).

Ours beside PyTorch's (cuDNN, ATen), each against a copy of the same tensor in the same rounds. Both read or write two
tensors of the map's size, so a copy's bandwidth is the ceiling of either. Settings, cold tensors and figures are those
of depthwise.py, whose table this is; but results are compared with float64 over the whole batch that is timed, since a
weight's gradient is a sum over all images, and what a kernel loses in a long sum does not show in a short one.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import accuracy
import depthwise
import report
import sweep
import timing
import torch
from depthwise import COPY, FMA, LAYOUTS
from throughput import failure
from torch import Tensor
from tqdm import tqdm

import convmixer_fast  # noqa: F401 (registers the operators)


def aten(x: Tensor, gy: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    padding = [size // 2 for size in weight.shape[2:]]
    return torch.ops.aten.convolution_backward(
        gy, x, weight, [weight.shape[0]], [1, 1], padding, [1, 1], False, [0, 0], weight.shape[0], wanted
    )


_ours = torch.ops.convmixer_fast
# By gradient and operator, of x, gy and the weight.
GRADIENTS: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "dgrad": {
        "aten": lambda x, gy, weight: aten(x, gy, weight, [True, False, False])[0],
        "ours": lambda x, gy, weight: _ours.depthwise_conv2d_dgrad(gy, weight),
    },
    "wgrad": {
        "aten": lambda x, gy, weight: aten(x, gy, weight, [False, True, True])[1],
        "ours": lambda x, gy, weight: _ours.depthwise_conv2d_wgrad(x, gy, *weight.shape[2:], True)[0],
    },
}


def call(function: Callable, pairs: Iterator[tuple[Tensor, Tensor]], weight: Tensor) -> Tensor:
    """Of the next x and gy."""
    return function(*next(pairs), weight)


def check(
    rows: dict[tuple, dict],
    functions: dict[tuple, Callable[[], Tensor]],
    reference: Callable[[Tensor, Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
) -> dict[tuple, Callable[[], Tensor]]:
    """The functions whose results are right; the rows say what is wrong with the others.

    The float64 tensors are four times as large as the half-precision ones: they are freed on return, before the timing.

    Args:
        reference: the gradient by PyTorch, which gives the expected result and the accepted error.
        tensors: x, gy and the weight.
    """
    expected = reference(*(tensor.double() for tensor in tensors))
    eager_error = accuracy.relative_error(reference(*tensors), expected)
    right = {}
    for variant, function in functions.items():
        row = rows[variant]
        try:
            row["error"] = accuracy.relative_error(function(), expected)
            row.update(accuracy.verdict(row["error"], eager_error, tensors[0].dtype))
        except Exception as error:
            row.update(failure(error))
        if row["status"] == "right":
            row["message"] = accuracy.remark(row["error"], eager_error) if row["operator"] == "ours" else ""
            right[variant] = function
    return right


def run_case(
    gradient: str, sizes: tuple[int, int, int], kernel: int, peak, args: argparse.Namespace, progress: tqdm
) -> list[dict]:
    """A row for every operator and layout: checked, then timed in rounds with the others and the yardsticks."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    elements = args.batch * sizes[0] * sizes[1] * sizes[2]
    facts = dict(
        map=f"{gradient} {'x'.join(map(str, sizes))}",
        kernel=kernel,
        bytes=2 * elements * dtype.itemsize,
        flops=2 * elements * kernel * kernel,
    )
    operators = GRADIENTS[gradient]
    variants = itertools.product(operators, args.layouts)
    rows = {(operator, layout): facts | dict(operator=operator, layout=layout) for operator, layout in variants}
    try:
        torch.manual_seed(0)
        x, gy = (torch.randn(args.batch, *sizes, device=device, dtype=dtype) for _ in range(2))
        weight = torch.randn(sizes[0], 1, kernel, kernel, device=device, dtype=dtype) / kernel
        pairs = {
            layout: itertools.cycle(zip(*(timing.cold_copies(t.to(memory_format=LAYOUTS[layout])) for t in (x, gy))))
            for layout in args.layouts
        }
        functions = {
            (operator, layout): functools.partial(call, operators[operator], pairs[layout], weight)
            for operator, layout in rows
        }
        with accuracy.no_tf32():
            right = check(rows, functions, operators["aten"], (x, gy, weight))
    except Exception as error:  # whatever ails one case, the others go on
        for row in rows.values():
            row.update(failure(error))
        return list(rows.values())

    yardsticks = {COPY: lambda: next(pairs[args.layouts[0]])[0].clone()} | ({FMA: peak} if peak else {})
    depthwise.time_variants(rows, right, yardsticks, args.rounds, device, progress, peak)
    return list(rows.values())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = depthwise.argument_parser(__doc__)
    args = depthwise.settle(parser, argv, depthwise.SHARED_DEFAULTS)
    even = [kernel for kernel in args.kernels if kernel % 2 == 0]
    if even:
        parser.error(f"argument --kernels: got {even[0]}, accepted: odd sizes, PyTorch pads both sides alike")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if ours is wrong or failed anywhere, else 0."""
    args = parse(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # PyTorch at its best
    peak = None
    if device.type == "cpu":
        timing.keep_freed_memory()
        peak = depthwise.FmaPeak() if args.dtype != "float64" else None
    settings = f"{args.device}, batches of {args.batch}, {args.dtype}, median of {args.rounds} calls"
    cases = list(itertools.product(GRADIENTS, args.maps, args.kernels, [peak]))
    rows = sweep.run(args, settings, cases, run_case, depthwise.summarise, depthwise.table)
    return int(any(row["operator"] == "ours" and row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
