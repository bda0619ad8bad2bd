"""What the hardware counts while the main kernels run once each: launches.py under Nsight Compute's ncu.

Per plane, a map of one image and channel: warp instructions, and the extra wavefronts of shared memory that bank
conflicts cost. Beside them how often a scheduler issues, what its warps wait for, the DRAM's bytes over the necessary
ones, the clock, and the shared memory that the driver gave an SM. ncu flushes the caches before each launch and replays
it for every group of counters; clocks are left as they are. The .csv beside the JSON file holds all that ncu counted.
"""

import argparse
import csv
import io
import math
import shutil
import subprocess
import sys
from pathlib import Path

import launches
import report
import torch

SECTIONS = (
    *("SpeedOfLight", "SchedulerStats", "WarpStateStats", "InstructionStats", "Occupancy", "LaunchStats"),
    *("MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables"),
)
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "imc_miss", "lg_throttle", "long_scoreboard"),
    *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard"),
    *("sleeping", "tex_throttle", "wait"),
)
# By what they are called here. Of an SM's four schedulers (smsp), of all SMs.
METRICS = {
    "time": "gpu__time_duration.sum",
    "cycles": "smsp__cycles_elapsed.max",
    "instructions": "smsp__inst_executed.sum",
    "issue_active": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps_active": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
    "load_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "store_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "smem_configured": "launch__shared_mem_config_size",
    "registers": "launch__registers_per_thread",
}
# What ncu writes below the names of its columns, in seconds and bytes.
UNITS = dict(nsecond=1e-9, ns=1e-9, usecond=1e-6, us=1e-6, msecond=1e-3, ms=1e-3, second=1.0, s=1.0)
UNITS |= dict(byte=1.0, Kbyte=1e3, Mbyte=1e6, Gbyte=1e9)
MOST_STALLS = 4  # that a row of the table names


def command(program: str, output: Path, args: argparse.Namespace, metrics: bool) -> list[str]:
    """ncu's command line; metrics: whether to ask for single ones beside the sections."""
    options = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    options += ["--kernel-name-base", "demangled", "--kernel-name", "regex:convmixer_fast"]
    options += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(output)]
    for section in SECTIONS:
        options += ["--section", section]
    if metrics:
        options += ["--metrics", ",".join([*METRICS.values(), *map(STALLED.format, STALLS)])]
    sizes = ["--device", args.device, "--batch", str(args.batch), "--channels", str(args.channels)]
    return [program, *options, sys.executable, launches.__file__, *sizes]


def read(text: str) -> list[dict[str, str | float]]:
    """A row per kernel from ncu's raw page: its name as "Kernel Name", and what was counted in seconds, bytes and
    numbers by ncu's names. Lines of ncu's own that begin with == are left out."""
    lines = list(csv.reader(io.StringIO("\n".join(line for line in text.splitlines() if not line.startswith("==")))))
    if len(lines) < 3:
        return []
    names, units, *rows = lines
    result = []
    for row in rows:
        kernel = {}
        for name, unit, value in zip(names, units, row):
            try:
                kernel[name] = float(value.replace(",", "")) * UNITS.get(unit, 1.0)
            except ValueError:
                kernel[name] = value
        result.append(kernel)
    return result


def summarise(kernels: list[dict[str, str | float]], batch: int, channels: int) -> list[dict]:
    """A row per launch of launches.py, in its order; a figure that was not counted is None.

    Raises ValueError where the kernels are not those of the launches.
    """
    planes, rows = batch * channels, []
    remaining = iter(kernels)
    for launch in launches.LAUNCHES:
        kernel = next((kernel for kernel in remaining if launch.kernel in str(kernel["Kernel Name"])), None)
        if kernel is None:
            seen = ", ".join(str(kernel["Kernel Name"]).partition("<")[0] for kernel in kernels)
            raise ValueError(f"no {launch.kernel} of {launch.name!r} among the kernels that ncu saw: {seen or 'none'}")
        found = {key: counted(kernel, metric) for key, metric in METRICS.items()}
        necessary = launch.maps * planes * launches.MAP**2 * 2  # float16
        stalls = {reason: counted(kernel, STALLED.format(reason)) for reason in STALLS}
        rows.append(
            dict(
                launch=launch.name,
                kernel=kernel["Kernel Name"],
                necessary_bytes=necessary,
                **found,
                gigahertz=ratio(found["cycles"], found["time"], 1e9),
                instructions_per_plane=ratio(found["instructions"], planes),
                store_conflicts_per_plane=ratio(found["store_conflicts"], planes),
                load_conflicts_per_plane=ratio(found["load_conflicts"], planes),
                dram_over_necessary=ratio(total(found["dram_read"], found["dram_write"]), necessary),
                stalls={reason: value for reason, value in stalls.items() if value is not None},
            )
        )
    return rows


def counted(kernel: dict[str, str | float], name: str) -> float | None:
    """A figure of ncu's; None where it has none, or writes that it does not apply."""
    value = kernel.get(name)
    return value if isinstance(value, float) and math.isfinite(value) else None


def ratio(value: float | None, *divisors: float | None) -> float | None:
    return None if value is None or None in divisors else value / math.prod(divisors)


def total(*values: float | None) -> float | None:
    return None if None in values else sum(values)


HEADER = ["launch", "us", "GHz", "instructions/plane", "issue %", "warps %", "DRAM/necessary"]
HEADER += [
    "smem store conflicts/plane",
    "smem load conflicts/plane",
    "smem KB/SM",
    "registers",
    "top stalls, warps per issue",
]


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        waits = sorted(row["stalls"].items(), key=lambda item: -item[1])[:MOST_STALLS]
        figures = [
            *(row["time"] and row["time"] * 1e6, row["gigahertz"], row["instructions_per_plane"], row["issue_active"]),
            *(row["warps_active"], row["dram_over_necessary"], row["store_conflicts_per_plane"]),
            *(row["load_conflicts_per_plane"], row["smem_configured"] and row["smem_configured"] / 1024),
        ]
        cells = [report.number(figure) for figure in figures] + [report.number(row["registers"])]
        lines.append([row["launch"], *cells, ", ".join(f"{reason} {value:.2f}" for reason, value in waits)])
    return report.table(HEADER, lines)


def count(program: str, output: Path, args: argparse.Namespace) -> list[dict[str, str | float]]:
    """Runs ncu, and once more with its sections alone if it knows one of the metrics by another name."""
    for metrics in (True, False):
        ran = subprocess.run(command(program, output, args, metrics))
        kernels = read(output.read_text()) if output.exists() else []
        if ran.returncode == 0 and kernels:
            return kernels
        print(f"ncu {'with' if metrics else 'without'} single metrics: exit {ran.returncode}, {len(kernels)} kernels")
    return []


def main(argv: list[str] | None = None) -> int:
    """Counts; 1 where ncu did not count every launch, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    launches.add_sizes(parser)
    parser.add_argument("--json", type=Path, required=True, help="file for the results; a table goes beside it, as .md")
    args = parser.parse_args(argv)
    program = shutil.which("ncu")
    if program is None:
        parser.error("ncu (Nsight Compute) is not on PATH")
    output = args.json.with_suffix(".csv")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    facts = report.environment(torch.device(args.device))
    facts["settings"] = (
        f"{args.device}, float16, {args.batch} x {args.channels} maps of {launches.MAP} x {launches.MAP}"
    )
    try:
        rows = summarise(count(program, output, args), args.batch, args.channels)
    except ValueError as error:
        print(f"counters: {error}")
        if output.exists():
            print(output.read_text()[-2000:])
        return 1
    report.write_results(args.json, dict(environment=facts, rows=rows), f"{report.facts_list(facts)}\n\n{table(rows)}")
    print(report.facts_list(facts), table(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
