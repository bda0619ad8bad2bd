"""The time that one call of each operator takes the host, without what it computes: the tensors have no elements, so
that no kernel runs. The calls are interleaved with torch.mm on such tensors, which goes the shortest way that torch has
from Python.

"operator" is torch.ops.convmixer_fast.NAME.default (or .out), "function" is convmixer_fast.NAME. The microseconds are
medians; beside them, how many times as long as torch.mm, from which the machine's clock drops out.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import report
import timing
import torch
from report import positive

import convmixer_fast

CHANNELS = 16
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}  # in which it is measured


def calls_to_time(device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name; torch.mm first."""
    ops = torch.ops.convmixer_fast
    x = torch.empty(0, CHANNELS, 8, 8, device=device)
    weight = torch.rand(CHANNELS, 1, 3, 3, device=device)
    bias, scale, shift, *prologue = torch.rand(6, CHANNELS, device=device).unbind()
    vectors, out, pooled = (bias, scale, shift), torch.empty_like(x), torch.empty(0, CHANNELS, device=device)
    plain, fused = (x, weight, *vectors, 1, True, None, None, None), (x, weight, *vectors, 1, True, *prologue)
    row, square = torch.empty(0, 8, device=device), torch.empty(8, 8, device=device)
    return {
        "torch.mm": lambda: torch.mm(row, square),
        "operator depthwise_conv2d": lambda op=ops.depthwise_conv2d.default: op(x, weight, bias),
        "operator depthwise_conv2d_dgrad": lambda op=ops.depthwise_conv2d_dgrad.default: op(x, weight),
        "operator depthwise_conv2d_wgrad": lambda op=ops.depthwise_conv2d_wgrad.default: op(x, x, 3, 3, True),
        "operator fused_depthwise": lambda op=ops.fused_depthwise.default: op(*plain),
        "operator fused_depthwise, prologue": lambda op=ops.fused_depthwise.default: op(*fused),
        "operator fused_depthwise, prologue, out": lambda op=ops.fused_depthwise.out: op(*fused, out=out),
        "operator activate_pool": lambda op=ops.activate_pool.default: op(x, *vectors, 1),
        "operator activate_pool, out": lambda op=ops.activate_pool.out: op(x, *vectors, 1, out=pooled),
        "function depthwise_conv2d": lambda: convmixer_fast.depthwise_conv2d(x, weight, bias),
        "function fused_depthwise": lambda: convmixer_fast.fused_depthwise(x, weight, *vectors),
        "function fused_depthwise, prologue": lambda: convmixer_fast.fused_depthwise(
            x, weight, *vectors, prologue=tuple(prologue)
        ),
        "function activate_pool": lambda: convmixer_fast.activate_pool(x, *vectors),
    }


def repeated(call: Callable[[], object], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


def microseconds(device: str, rounds: int, calls: int, clock: type = timing.HostClock) -> dict[str, dict[str, float]]:
    """The median of a call, by mode and name."""
    result = {}
    for mode, enter in MODES.items():
        with enter():
            functions = {name: repeated(call, calls) for name, call in calls_to_time(device).items()}
            seconds = timing.measure(functions, rounds, clock)
        result[mode] = {name: statistics.median(times) / calls * 1e6 for name, times in seconds.items()}
    return result


def table(result: dict[str, dict[str, float]]) -> str:
    header = ["call"]
    for mode in result:
        header += [f"us, {mode}", "x torch.mm"]
    rows = []
    for name in next(iter(result.values())):
        rows.append([name])
        for by_name in result.values():
            rows[-1] += [report.number(by_name[name]), report.number(by_name[name] / by_name["torch.mm"])]
    return report.table(header, rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=1001, help="times that each is timed (%(default)s)")
    parser.add_argument(
        "--calls",
        type=positive,
        default=20,
        help="calls in a row: few, so that another process seldom interrupts them (%(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    args = parser.parse_args(argv)
    report.resolve_device(parser, args, {"cpu": {}, "cuda": {}})
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    result = microseconds(args.device, args.rounds, args.calls)
    print(report.facts_list(report.environment(torch.device(args.device))))
    print(f"\n{table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
