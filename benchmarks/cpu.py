"""The README's table of CPU inference: ours beside PyTorch, ONNX Runtime and OpenVINO, by throughput.py.

A row is a model, a batch and a dtype. Each is a process of its own, first with all cores and all backends, then, for
the scaling, on one core with the runtimes alone. benchmarks/results/<device>/cpu/ gets the rows' files as they come,
each with its command, date and commit, and cpu.md beside it the table of all rows that are there. A backend that would
take longer than --limit has "> limit" in place of a figure, and no part in "best other". With --isa the processes are
those of a narrower processor, as far as each library lets itself be told (instructions.py).
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import instructions
import report
import throughput
import torch
from throughput import CPU_ONLY, OURS

MODELS = {  # name: batches of images, timed batches
    "convmixer_768_32_k7_p7": ((4, 1), 5),
    "convmixer_1536_20_k9_p7": ((2, 1), 5),
    "convmixer_256_8_k9_p2": ((16, 1), 20),
    "convmixer_256_8_k9_p1": ((16, 1), 20),
    "convmixer_256_8_k3_p2": ((16,), 20),
}
DTYPES = ("float32", "bfloat16")
BACKENDS = ("eager", "channels_last", "compile", *CPU_ONLY, OURS)
ON_ONE_CORE = (*CPU_ONLY, OURS)
FIGURES = ["x best other", "x own float32", "of FMA peak", "x one core", "error", "least other error"]
HEADER = ["model", "batch", "dtype", *BACKENDS, *FIGURES]
OVER_LIMIT = "> limit"


@dataclass(frozen=True)
class Row:
    model: str
    batch: int
    dtype: str
    batches: int  # timed

    def file(self, out: Path, threads: int) -> Path:
        return out / "cpu" / f"{self.model}-batch{self.batch}-{self.dtype}-{threads}threads.json"

    def measure(self, out: Path, threads: int, backends: Sequence[str], limit: int, isa: str | None) -> int:
        """Runs throughput.py; its exit status. limit: in seconds, as throughput.py's. isa: as summary's."""
        command = [sys.executable, "benchmarks/throughput.py", "--device", "cpu", "--breakdown"]
        command += ["--models", self.model, "--batch", str(self.batch), "--dtype", self.dtype]
        command += ["--batches", str(self.batches), "--limit", str(limit), "--backends", *backends]
        command += ["--json", os.path.relpath(self.file(out, threads), report.ROOT)]
        settings = {"OMP_NUM_THREADS": str(threads)} | (instructions.held_to(isa) if isa else {})
        return subprocess.run(command, cwd=report.ROOT, env=os.environ | settings).returncode

    def results(self, out: Path, threads: int) -> dict[str, dict]:
        """By backend; empty where it was not measured."""
        measured = report.read_results(self.file(out, threads)) or {"rows": []}
        return {row["backend"]: row for row in measured["rows"]}


def rows() -> list[Row]:
    return [
        Row(model, batch, dtype, batches)
        for model, (sizes, batches) in MODELS.items()
        for dtype in DTYPES
        for batch in sizes
    ]


def has(isa: str) -> bool:
    """Whether this CPU has an instruction set, for our kernels."""
    code = "import convmixer_fast; print(convmixer_fast.build_info()['cpu_isa'])"
    command, environment = [sys.executable, "-c", code], os.environ | {"CMF_CPU_ISA": isa}
    asked = subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True)
    return asked.stdout.strip() == isa


def rate(result: dict | None) -> str:
    """Images per second for a cell of the table; "> limit" where they would have taken too long."""
    if result is None:
        return ""
    return OVER_LIMIT if result.get("over_limit") else report.number(result.get("images_per_second"))


def summary(out: Path, threads: int, isa: str | None = None) -> str:
    """The table of all rows that are there, and the geometric mean over them of ours over the best other.

    Args:
        out: the folder of the results.
        threads: with which the rows were measured.
        isa: the instruction set that the rows were held to; None: to none.
    """
    lines, ratios = [], []
    for row in rows():
        results = row.results(out, threads)
        if not results:
            continue
        ours = results.get(OURS, {})
        our_rate = ours.get("images_per_second")
        one_core = row.results(out, 1).get(OURS, {}).get("images_per_second")
        in_float32 = replace(row, dtype="float32").results(out, threads).get(OURS, {}).get("images_per_second")
        errors = [result["error"] for name, result in results.items() if name != OURS and "error" in result]
        of_peak = None
        if row.dtype == "float32" and "breakdown" in ours:  # the peak's arithmetic
            of_peak = ours["images_per_second"] * ours["flops_per_image"] / ours["breakdown"]["ceilings"]["flops"]
        if "over_best_other" in ours:
            ratios.append(ours["over_best_other"])
        scaling = our_rate / one_core if one_core and our_rate and threads > 1 else None
        narrower = our_rate / in_float32 if in_float32 and our_rate and row.dtype != "float32" else None
        rates = [rate(results.get(name)) for name in BACKENDS]
        figures = [report.number(figure) for figure in (ours.get("over_best_other"), narrower, of_peak, scaling)]
        exactness = [f"{error:.1e}" if error else "" for error in (ours.get("error"), min(errors, default=None))]
        lines.append([row.model, str(row.batch), row.dtype, *rates, *figures, *exactness])
    free = instructions.NOT_HELD if isa else ()
    parts = [report.table([f"{name} *" if name in free else name for name in HEADER], lines)]
    if isa:
        parts.append(
            f"Held to {isa}; *: has no setting for that, uses all that the processor has, and is not compared."
        )
    if ratios:
        parts.append(f"geometric mean of x best other: {statistics.geometric_mean(ratios):.2f}")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Measures every row; 1 if ours is wrong or failed in any, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="folder for the results (benchmarks/results/<device>, with --isa <device>-<isa>)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument(
        "--isa",
        choices=instructions.NAMES,
        help="instruction set that ours is held to, and the others, by their own settings, where they have one",
    )
    seconds = throughput.DEFAULTS["cpu"]["limit"]
    parser.add_argument(
        "--limit", type=report.positive, default=seconds, metavar="SECONDS", help=f"as throughput.py's ({seconds})"
    )
    args = parser.parse_args(argv)
    if args.isa and not has(args.isa):
        parser.error(f"argument --isa: this CPU has no {args.isa}")
    out = args.out or report.results_folder("-".join(filter(None, [report.cpu_name(), args.isa])))
    threads = torch.get_num_threads()
    every = [row for row in rows() if row.model in args.models]
    alone = [backend for backend in args.backends if backend in ON_ONE_CORE]
    runs = [(row, threads, args.backends) for row in every]
    if threads > 1:
        runs += [(row, 1, alone) for row in every if row.batch > 1]
    status = 0
    with report.showing(lambda: print(summary(out, threads, args.isa))):
        for row, count, backends in runs:
            status |= row.measure(out, count, backends, args.limit, args.isa)
            text = f"Command, date and commit of each row: cpu/.\n\n{summary(out, threads, args.isa)}\n"
            report.write(out / "cpu.md", text)
    return status


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
