"""Stand-ins for the programs that need a GPU, by which `gpu.py --rehearse` runs on a machine without one.

They accept the options that the steps use, with values that the real programs accept, and refuse everything else, as
those would: ncu 2025.3 and compute-sanitizer 2025.3 by their manuals, and the metrics of GH100. Then they run the
program that they are given. What they print are not measurements: ncu's figures are all 1.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("ncu", "compute-sanitizer", "nvidia-smi")
NVIDIA_SMI_FIELDS = {
    *("clocks.sm", "clocks.mem", "utilization.gpu", "power.draw", "temperature.gpu", "driver_version", "timestamp"),
}
NCU_SECTIONS = {
    *("SpeedOfLight", "SchedulerStats", "WarpStateStats", "InstructionStats", "Occupancy", "LaunchStats"),
    *("MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables", "ComputeWorkloadAnalysis", "SourceCounters"),
}
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# Those that ncu --query-metrics names for gh100, with the suffixes of their kind, and what it knows of a launch.
NCU_METRICS = {
    *("gpu__time_duration.sum", "smsp__cycles_elapsed.max", "smsp__inst_executed.sum"),
    *("smsp__issue_active.avg.pct_of_peak_sustained_active", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    *("dram__bytes_read.sum", "dram__bytes_write.sum"),
    *(f"l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_{op}.sum" for op in ("ld", "st")),
    *("launch__shared_mem_config_size", "launch__registers_per_thread"),
    *map(
        STALL.format,
        (
            *("barrier", "branch_resolving", "dispatch_stall", "drain", "imc_miss", "lg_throttle", "long_scoreboard"),
            *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected"),
            *("short_scoreboard", "sleeping", "tex_throttle", "wait"),
        ),
    ),
}


@contextmanager
def stand_ins(folder: Path) -> Iterator[None]:
    """The programs in a folder that comes first on PATH."""
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{Path(__file__).resolve()}' {name} \"$@\"\n")
        program.chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


class Parser(argparse.ArgumentParser):
    """The options up to the first argument that is none, which begins the command line to run."""

    def __init__(self, program: str):
        super().__init__(prog=program, allow_abbrev=False)

    def split(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        self.add_argument("command", nargs=argparse.REMAINDER)
        options = self.parse_args(arguments)
        if not options.command:
            self.error("no program to run")
        return options, options.command


def all_of(accepted: set[str]):
    """The type of an option that takes names from a set, with commas between them."""

    def check(text: str) -> list[str]:
        unknown = sorted(set(text.split(",")) - accepted)
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
        return text.split(",")

    return check


def ncu(arguments: list[str]) -> int:
    """Runs the program, and writes a raw page as if its kernels had been profiled."""
    parser = Parser("ncu")
    parser.add_argument("--clock-control", choices=("base", "none"), required=True)
    parser.add_argument("--profile-from-start", choices=("on", "off"))
    parser.add_argument("--target-processes", choices=("application-only", "all"))
    parser.add_argument("--kernel-name-base", choices=("function", "demangled", "mangled"))
    parser.add_argument("--kernel-name")
    parser.add_argument("--csv", action="store_true", required=True)
    parser.add_argument("--page", choices=("details", "raw", "source"))
    parser.add_argument("--print-units", choices=("auto", "base"))
    parser.add_argument("--log-file", type=Path, required=True)
    parser.add_argument("--section", action="append", choices=sorted(NCU_SECTIONS))
    parser.add_argument("--metrics", type=all_of(NCU_METRICS), default=[])
    options, command = parser.split(arguments)
    status = subprocess.run(command).returncode
    import launches

    with options.log_file.open("w", newline="") as file:
        file.write(f"==PROF== Connected to process {os.getpid()}\n")
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        rows.writerow(["ID", "Kernel Name", *options.metrics])
        rows.writerow(["", "", *("ns" if "time" in name else "" for name in options.metrics)])
        for number, launch in enumerate(launches.LAUNCHES):
            name = f"void convmixer_fast::cuda::{launch.kernel}<stand_in>(convmixer_fast::DepthwiseParams)"
            rows.writerow([number, name, *("1" for _ in options.metrics)])
    return status


def compute_sanitizer(arguments: list[str]) -> int:
    """Runs the program, and finds nothing."""
    parser = Parser("compute-sanitizer")
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "initcheck", "synccheck"), required=True)
    parser.add_argument("--report-api-errors", choices=("all", "explicit", "no"))
    parser.add_argument("--padding", type=int)
    parser.add_argument("--error-exitcode", type=int, required=True)
    parser.add_argument("--kernel-name")
    options, command = parser.split(arguments)
    if options.padding is not None and options.tool != "memcheck":
        parser.error("--padding is an option of memcheck")
    if options.kernel_name and options.kernel_name.partition("=")[0] not in ("kernel_name", "kernel_substring"):
        parser.error("--kernel-name takes kernel_name=TEXT or kernel_substring=TEXT")
    status = subprocess.run(command).returncode
    print("========= ERROR SUMMARY: 0 errors")
    return status


def nvidia_smi(arguments: list[str]) -> int:
    """Prints a busy GPU's fields, again and again if it is asked to."""
    parser = argparse.ArgumentParser(prog="nvidia-smi", allow_abbrev=False)
    parser.add_argument("--query-gpu", type=all_of(NVIDIA_SMI_FIELDS), required=True)
    parser.add_argument("--format", type=all_of({"csv", "noheader", "nounits"}), required=True)
    parser.add_argument("--loop-ms", type=int)
    options = parser.parse_args(arguments)
    while True:
        print(", ".join("100" for _ in options.query_gpu), flush=True)
        if options.loop_ms is None:
            return 0
        time.sleep(options.loop_ms / 1e3)


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    sys.exit({"ncu": ncu, "compute-sanitizer": compute_sanitizer, "nvidia-smi": nvidia_smi}[program](rest))
