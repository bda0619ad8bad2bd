"""The README's table of CPU inference: ours beside PyTorch, ONNX Runtime and OpenVINO, by throughput.py.

A row is a model, a batch and a dtype. Each is a process of its own, first with all cores and all backends, then, for
the scaling, on one core with the runtimes alone. benchmarks/results/<device>/cpu/ gets the rows' files as they come,
each with its command, date and commit, and cpu.md beside it the table of all rows that are there.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import report
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
FIGURES = ["x best other", "of FMA peak", "x one core", "error", "least other error"]
HEADER = ["model", "batch", "dtype", *BACKENDS, *FIGURES]


@dataclass(frozen=True)
class Row:
    model: str
    batch: int
    dtype: str
    batches: int  # timed

    def file(self, out: Path, threads: int) -> Path:
        return out / "cpu" / f"{self.model}-batch{self.batch}-{self.dtype}-{threads}threads.json"

    def measure(self, out: Path, threads: int, backends: Sequence[str]) -> int:
        """Runs throughput.py; its exit status."""
        command = [sys.executable, "benchmarks/throughput.py", "--device", "cpu", "--breakdown"]
        command += ["--models", self.model, "--batch", str(self.batch), "--dtype", self.dtype]
        command += ["--batches", str(self.batches), "--backends", *backends]
        command += ["--json", os.path.relpath(self.file(out, threads), report.ROOT)]
        return subprocess.run(command, cwd=report.ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode

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


def summary(out: Path, threads: int) -> str:
    """The table of all rows that are there, and the geometric mean over them of ours over the best other."""
    lines, ratios = [], []
    for row in rows():
        results = row.results(out, threads)
        if not results:
            continue
        rate = {name: result.get("images_per_second") for name, result in results.items()}
        ours = results.get(OURS, {})
        one_core = row.results(out, 1).get(OURS, {}).get("images_per_second")
        errors = [result["error"] for name, result in results.items() if name != OURS and "error" in result]
        of_peak = None
        if row.dtype == "float32" and "breakdown" in ours:  # the peak's arithmetic
            of_peak = ours["images_per_second"] * ours["flops_per_image"] / ours["breakdown"]["ceilings"]["flops"]
        if "over_best_other" in ours:
            ratios.append(ours["over_best_other"])
        scaling = rate[OURS] / one_core if one_core and rate.get(OURS) and threads > 1 else None
        figures = [*(rate.get(name) for name in BACKENDS), ours.get("over_best_other"), of_peak, scaling]
        exactness = [f"{error:.1e}" if error else "" for error in (ours.get("error"), min(errors, default=None))]
        lines.append([row.model, str(row.batch), row.dtype, *map(report.number, figures), *exactness])
    text = report.table(HEADER, lines)
    return f"{text}\n\ngeometric mean of x best other: {statistics.geometric_mean(ratios):.2f}" if ratios else text


def main(argv: list[str] | None = None) -> int:
    """Measures every row; 1 if ours is wrong or failed in any, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = report.results_folder(report.cpu_name())
    parser.add_argument(
        "--out", type=Path, default=default, help="folder for the results (benchmarks/results/<device>)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    every = [row for row in rows() if row.model in args.models]
    alone = [backend for backend in args.backends if backend in ON_ONE_CORE]
    runs = [(row, threads, args.backends) for row in every]
    if threads > 1:
        runs += [(row, 1, alone) for row in every if row.batch > 1]
    status = 0
    with report.showing(lambda: print(summary(args.out, threads))):
        for row, count, backends in runs:
            status |= row.measure(args.out, count, backends)
            text = f"Command, date and commit of each row: cpu/.\n\n{summary(args.out, threads)}\n"
            report.write(args.out / "cpu.md", text)
    return status


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
