"""Everything that needs a GPU, in one command and under ten minutes: `make gpu`.

Builds in place for the GPU that is there, then runs the CUDA tests, the benchmarks of inference (with the paper's
protocol) and of training, the operators' tests under compute-sanitizer, and as much of the paper's tables and figures
(paper.py --full) as the time allows: the same command again, or more --minutes, goes on with them. --steps runs some of
it and leaves the other steps' results as they are. It uses the active python3 and downloads nothing. After each step
the results so far are in benchmarks/results/<device>/: README.md, JSON files, charts and the steps' logs; also when a
step fails, runs out of its time, or the whole is stopped.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import report
import torch

# The steps that write a table.
BENCHMARKS = (
    *("throughput", "engine", "latency", "peers", "depthwise", "compiled"),
    *("gradients", "training", "training-compiled"),
)
MINUTES = 9  # for everything
GRACE = 10  # seconds between asking a step to end and killing it


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived."""


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: float  # kept for it, whatever the steps before take; it may also use what they left
    environment: dict[str, str] = field(default_factory=dict)
    needed: bool = False  # by all that follow
    missing: str = ""  # why it cannot run here


def plan(
    out: Path, capability: tuple[int, int], seconds: float = MINUTES * 60, names: Collection[str] = ()
) -> list[Step]:
    """The steps, the most valuable first. The ConvMixers' peers go without torch.compile, which takes minutes; the
    paper's tables, too, and they get what the others leave of the seconds. names: only these, and the build."""
    target = "{}.{}".format(*capability) + ("a" if capability == (9, 0) else "")
    results = os.path.relpath(out, report.ROOT)
    pytest = [sys.executable, "-m", "pytest", "-q", "tests", "-m"]
    table1 = [name for name, row in report.paper_rows().items() if row["in_table1"] == "yes"]
    convmixers = [name for name in table1 if name.startswith("convmixer")]
    peers = [name for name in table1 if name not in convmixers]

    operators = ["--operators", "aten", "fused", "compile"]
    largest = ["convmixer_1536_20_k9_p7", "convmixer_768_32_k7_p7", "convmixer_1024_20_k9_p14"]
    ours = ["fused", "fused-graphs", "fused-one-chunk"]
    in_both_types = ["--dtypes", "float16", "bfloat16"]

    def benchmark(name: str, script: str, seconds: float, *options: str) -> Step:
        output = ["--device", "cuda", "--json", f"{results}/{name}.json"]
        return Step(name, [sys.executable, f"benchmarks/{script}.py", *output, *options], seconds)

    def sanitizer(tool: str) -> Step:
        program = shutil.which("compute-sanitizer")
        options = ["--tool", tool, "--error-exitcode", "1", "--kernel-name", "kernel_substring=convmixer_fast"]
        return Step(
            tool,
            [program or "compute-sanitizer", *options, *pytest, "cuda and sanitize"],
            40,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else an overrun stays inside torch's own block
            missing="" if program else "compute-sanitizer is not on PATH",
        )

    steps = [
        Step(
            "build",
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            110,
            {"TORCH_CUDA_ARCH_LIST": target, "MAX_JOBS": str(os.cpu_count())},
            needed=True,
        ),
        Step("tests", [*pytest, "cuda"], 90),
        benchmark("throughput", "throughput", 130, "--plot", f"{results}/throughput.png", "--models", *convmixers),
        benchmark("engine", "throughput", 40, "--models", *largest, "--backends", *ours, "--breakdown"),
        benchmark("latency", "throughput", 50, "--models", *largest, "--batch", "1", "--backends", "eager", *ours),
        benchmark("depthwise", "depthwise", 50),
        benchmark("gradients", "gradients", 30, "--kernels", "3", "7", "9", "--maps", "1536x32x32", "768x32x32"),
        benchmark("training", "training", 50, *in_both_types, "--backends", "eager", "ours"),
        benchmark("compiled", "depthwise", 40, "--maps", "1536x32x32", "--kernels", "3", "9", *operators),
        benchmark("peers", "throughput", 30, "--models", *peers, "--backends", "eager", "channels_last"),
        benchmark("training-compiled", "training", 60, "--models", "convmixer_768_32"),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
    ]
    steps = [step for step in steps if step.needed or not names or step.name in names]
    left = max(seconds - sum(step.seconds for step in steps), 50)
    paper = [sys.executable, "benchmarks/paper.py", "--full", "--device", "cuda", "--out", f"{results}/paper"]
    # The row that is being measured when its minutes are over, and the figures, take a while longer.
    paper += ["--minutes", f"{(left - max(20, left / 10)) / 60:.2f}"]
    paper += ["--backends", "eager", "channels_last", "fused"]
    return [*steps, *([Step("paper", paper, left)] if not names or "paper" in names else [])]


def limits(steps: list[Step], total: float) -> list[float]:
    """The seconds kept for each step: its own, shrunk in proportion where all together exceed the total."""
    scale = min(1.0, total / sum(step.seconds for step in steps))
    return [step.seconds * scale for step in steps]


def end(process: subprocess.Popen) -> None:
    """Ends a step and all that it started."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, request)
            process.wait(GRACE)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_step(step: Step, limit: float, log: Path, result: dict) -> None:
    """Runs a step for at most that many seconds and notes what became of it; ends it before Stopped goes on."""
    started = time.monotonic()
    path = os.pathsep.join(filter(None, [str(report.ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | step.environment
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=report.ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(limit)
            result.update(status="passed" if status == 0 else "failed", remark="" if status == 0 else f"exit {status}")
        except subprocess.TimeoutExpired:
            result.update(status="out of time", remark=f"ended after {limit:.0f} s")
            end(process)
        except BaseException:
            result.update(status="stopped")
            end(process)
            raise
        finally:
            result["seconds"] = round(time.monotonic() - started, 1)


def steps_table(results: list[dict]) -> str:
    lines = [[row["step"], row["status"], report.number(row.get("seconds")), row.get("remark", "")] for row in results]
    return report.table(["step", "status", "seconds", "remark"], lines)


def write(out: Path, facts: dict[str, str], results: list[dict]) -> None:
    """README.md and results.json, of what there is."""
    report.write(out / "results.json", json.dumps(dict(environment=facts, steps=results), indent=1) + "\n")
    parts = [f"# {facts['device']}", report.facts_list(facts), steps_table(results)]
    for benchmark in BENCHMARKS:
        text = out / f"{benchmark}.md"
        if text.exists():
            parts += [f"## {benchmark}", text.read_text().strip()]
    if (out / "paper" / "paper.html").exists():
        parts += ["## paper", "[The paper's tables](paper/paper.md), and [with figures](paper/paper.html)"]
    report.write(out / "README.md", "\n\n".join(parts) + "\n")


def run(steps: list[Step], out: Path, facts: dict[str, str], total: float) -> int:
    """Runs the steps within so many seconds, writing what there is after each; 0 if none failed."""
    deadline = time.monotonic() + total
    results = [dict(step=step.name, status="not run") for step in steps]
    kept = limits(steps, total)
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for benchmark in {step.name for step in steps}.intersection(BENCHMARKS):  # of an earlier run
        for suffix in (".json", ".md", ".png"):
            (out / benchmark).with_suffix(suffix).unlink(missing_ok=True)

    def on_signal(number, frame):
        raise Stopped(number)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    stopped = False
    try:
        for i, (step, result) in enumerate(zip(steps, results)):
            if step.missing:
                result.update(status="skipped", remark=step.missing)
                continue
            limit = deadline - time.monotonic() - sum(kept[i + 1 :])
            print(f"{step.name}: at most {limit:.0f} s ...", flush=True)
            run_step(step, limit, logs / f"{step.name}.log", result)
            print(f"{step.name}: {result['status']} in {result['seconds']} s", flush=True)
            write(out, facts, results)
            if step.needed and result["status"] != "passed":
                break
    except Stopped:
        stopped = True
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        write(out, facts, results)
    print(f"\n{steps_table(results)}\n\nresults: {os.path.relpath(out)}")
    for result in results:
        if result["status"] in ("failed", "out of time"):
            tail = (logs / f"{result['step']}.log").read_text(errors="replace").splitlines()[-20:]
            print(f"\n--- {result['step']}, end of its log ---", *tail, sep="\n")
    return int(stopped or any(result["status"] not in ("passed", "skipped") for result in results))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (%(default)s)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", default=(), help="only these, after the build (all)")
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        reason = "is a build without CUDA" if torch.version.cuda is None else "sees no CUDA device"
        parser.error(f"this command needs a GPU, and torch {torch.__version__} {reason}")
    facts = report.environment(torch.device("cuda", torch.cuda.current_device()))
    out = (args.out or report.results_folder(facts["device"])).resolve()
    seconds = args.minutes * 60
    capability = torch.cuda.get_device_capability()
    known = [step.name for step in plan(out, capability)]
    if unknown := set(args.steps).difference(known):
        parser.error(f"argument --steps: {', '.join(sorted(unknown))}, accepted: {', '.join(known)}")
    return run(plan(out, capability, seconds, args.steps), out, facts, seconds)


if __name__ == "__main__":
    sys.exit(main())
