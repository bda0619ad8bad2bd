"""Runs steps, each a process of its own with a limit of its own, and keeps what they found whatever becomes of them.

After each step the folder of the results holds README.md (all tables so far), results.json and the steps' logs, and one
archive holds the folder; also when a step fails, runs out of its time, or the whole is stopped. Standard output stays
short, since often only its end is seen: the tables come last, in few characters, the most telling at the very end.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import tarfile
import threading
import time
import xml.etree.ElementTree
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import report

GRACE = 5  # seconds between asking a step to end and killing it
SHORTEST = 15  # seconds: with less, a step of a longer limit is not started
OUTPUT_LIMIT = 10_000  # characters of standard output, all together
LOG_LINES, LOG_COLUMNS = 12, 140  # of a failed step's log on standard output


FAILED = ("failed", "out of time", "stopped")  # of the statuses; the others: passed, skipped, not run


class Stopped(BaseException):
    """SIGTERM or SIGINT, whose number it has, arrived."""


@dataclass(frozen=True)
class Step:
    """A command and the rules by which it runs.

    Attributes:
        name: also of its log and, where it writes a table, of that.
        command: the program and its arguments.
        seconds: its time limit, cut only by the deadline of the whole run.
        environment: variables beside those of this process.
        group: steps of one group stand together and run at the same time; nothing may be timed in them.
        required: without its success nothing that follows makes sense.
        needs: a step that must not have failed, or this one is skipped.
        in_place_of: a step after whose failure alone this one runs, to diagnose it.
        tests: the JUnit report that the command writes; the step has failed if no test in it ran.
        missing: why it cannot run here.
        rehearsal: options that the rehearsal appends, with which it ends soon on a CPU.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    group: str = ""
    required: bool = False
    needs: str = ""
    in_place_of: str = ""
    tests: Path | None = None
    missing: str = ""
    rehearsal: tuple[str, ...] = ()


class Speaker:
    """Standard output with a limit on the characters of all that is said."""

    def __init__(self, limit: int):
        self.left = limit

    def __call__(self, text: str) -> None:
        kept = text if len(text) < self.left else text[: max(self.left - 5, 0)] + " ..."
        if self.left > 0:
            print(kept, flush=True)
        self.left -= len(kept) + 1


class Clocks:
    """The GPU's clocks, power and temperature, sampled twice a second into a file: predictions hold for one clock."""

    FIELDS = "clocks.sm,clocks.mem,utilization.gpu,power.draw,temperature.gpu"
    BUSY = 50  # percent of utilization from which on a sample tells how fast kernels ran

    def __init__(self, path: Path):
        self._samples: list[tuple[float, float]] = []  # time, megahertz; of a busy GPU
        self._process = None
        program = shutil.which("nvidia-smi")
        if program:
            query = [program, f"--query-gpu={self.FIELDS}", "--format=csv,noheader,nounits", "--loop-ms=500"]
            self._process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._reader = threading.Thread(target=self._read, args=(path,), daemon=True)
            self._reader.start()

    def _read(self, path: Path) -> None:
        started = time.monotonic()
        with path.open("w", buffering=1) as file:
            file.write(f"seconds,{self.FIELDS}\n")
            for line in self._process.stdout:
                now = time.monotonic()
                file.write(f"{now - started:.1f},{line.strip()}\n")
                try:
                    megahertz, _, utilization = map(float, line.split(",")[:3])
                except ValueError:  # a field that this GPU or driver does not tell
                    continue
                if utilization >= self.BUSY:
                    self._samples.append((now, megahertz))

    def between(self, start: float, end: float) -> float | None:
        """The median clock of the multiprocessors in megahertz while the GPU was busy; None where it never was."""
        samples = [megahertz for moment, megahertz in self._samples if start <= moment <= end]
        return statistics.median(samples) if samples else None

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._reader.join()


def start(step: Step, log: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(report.ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | step.environment
    with log.open("w") as output:
        return subprocess.Popen(
            step.command, cwd=report.ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )


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
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver may not hold up the rest
        process.wait(GRACE)


def judge(step: Step, status: int) -> tuple[str, str]:
    """What became of a step that ended by itself: its status and a remark."""
    remark = f"exit {status}" if status else ""
    if step.tests is None:
        return ("failed" if status else "passed"), remark
    try:
        suites = list(xml.etree.ElementTree.parse(step.tests).getroot().iter("testsuite"))
        total, failed, errors, skipped = (
            sum(int(suite.get(name)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
        )
    except (OSError, xml.etree.ElementTree.ParseError):
        return "failed", f"{remark or 'exit 0'}, and no report of its tests"
    counts = f"{total - skipped} tests ran, {failed + errors} failed, {skipped} skipped"
    if total == skipped:
        return "failed", f"no test ran, {skipped} skipped"
    return ("failed" if status or failed + errors else "passed"), "; ".join(filter(None, [counts, remark]))


def run_together(steps: Sequence[Step], results: Sequence[dict], left: float, logs: Path) -> None:
    """Runs steps at the same time, each for its own limit and none for longer than what is left, and notes what became
    of them; ends them before Stopped goes on."""
    begun, running = time.monotonic(), {}

    def close(result: dict, status: str, remark: str) -> None:
        result.update(status=status, remark=remark, seconds=round(time.monotonic() - begun, 1))

    try:
        for step, result in zip(steps, results):
            if step.tests:
                step.tests.unlink(missing_ok=True)
            running[start(step, logs / f"{step.name}.log")] = step, result
        while running:
            for process, (step, result) in list(running.items()):
                limit = min(step.seconds, left)
                if process.poll() is not None:
                    close(result, *judge(step, process.returncode))
                elif time.monotonic() - begun > limit:
                    close(result, "out of time", f"ended after {limit:.0f} s")
                    end(process)
                else:
                    continue
                del running[process]
            time.sleep(0.05)
    except BaseException:
        for process, (_, result) in running.items():
            close(result, "stopped", "")
            end(process)
        raise


def why_not(step: Step, results: Sequence[dict]) -> str:
    """Why a step is skipped, by what became of the others; empty if it is to run."""
    status = {result["step"]: result["status"] for result in results}
    if step.missing:
        return step.missing
    if step.needs and status.get(step.needs) == "failed":
        return f"{step.needs} failed"
    if step.in_place_of and status.get(step.in_place_of) != "failed":
        return f"{step.in_place_of} did not fail"
    return ""


def run(
    steps: Sequence[Step],
    out: Path,
    facts: dict[str, str],
    total: float,
    archive: Path | None = None,
    say: Speaker | None = None,
) -> int:
    """Runs the steps within so many seconds, writing what there is after each.

    Args:
        steps: in their order; those of one group stand together.
        out: folder of the results.
        facts: of the machine, for README.md and results.json.
        total: seconds for everything.
        archive: a .tar.gz of the folder, written anew after each step.
        say: prints; by default OUTPUT_LIMIT characters.

    Returns:
        0 if all that ran passed, else 1; 128 and the signal's number where one stopped it.
    """
    deadline, say = time.monotonic() + total, say or Speaker(OUTPUT_LIMIT)
    results = [dict(step=step.name, status="not run") for step in steps]
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for step in steps:  # what an earlier run left
        for suffix in (".json", ".md", ".png"):
            (out / step.name).with_suffix(suffix).unlink(missing_ok=True)

    def on_signal(number, frame):
        for other in handlers:  # timeout(1) sends the signal twice, and what follows has to be written
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, on_signal)
    stopped, clocks = 0, Clocks(logs / "clocks.csv")
    try:
        for _, group in itertools.groupby(zip(steps, results), lambda pair: pair[0].group or pair[0].name):
            if not run_group(list(group), results, deadline, logs, clocks, say):
                continue
            write(out, facts, steps, results)
            pack(out, archive)
            if any(step.required and result["status"] in FAILED for step, result in zip(steps, results)):
                break
    except Stopped as stop:
        stopped = 128 + stop.args[0]
    finally:
        clocks.stop()
        write(out, facts, steps, results)
        pack(out, archive)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    show(out, steps, results, say)
    return stopped or int(any(result["status"] in FAILED for result in results))


def run_group(
    pairs: list[tuple[Step, dict]], results: list[dict], deadline: float, logs: Path, clocks: Clocks, say: Speaker
) -> bool:
    """Runs the steps of a group that are to run and have time; whether there was one."""
    left, ready = deadline - time.monotonic() - GRACE, []
    for step, result in pairs:
        if reason := why_not(step, results):
            result.update(status="skipped", remark=reason)
        elif left < min(step.seconds, SHORTEST):
            result.update(remark="no time left")
        else:
            ready.append((step, result))
    if not ready:
        return False
    begun = time.monotonic()
    run_together([step for step, _ in ready], [result for _, result in ready], left, logs)
    for _, result in ready:
        clock = clocks.between(begun, begun + result["seconds"])
        if clock:
            result["megahertz"] = clock
        say(f"{result['step']}: {result['status']} in {result['seconds']:.0f} s")
    return True


# ------------------------------------------------------------------------------------------------ what is written


def steps_table(results: Sequence[dict]) -> str:
    """One row per step. MHz: the median clock of the multiprocessors while the GPU was busy."""
    lines = [
        [row["step"], row["status"], report.number(row.get("seconds")), report.number(row.get("megahertz"), 4)]
        + [row.get("remark", "")]
        for row in results
    ]
    return report.table(["step", "status", "seconds", "MHz", "remark"], lines)


def of_earlier_runs(out: Path, names: Collection[str]) -> list[dict]:
    """What results.json says of steps that are not run now, but ran before into the same folder."""
    earlier = report.read_results(out / "results.json") or {"steps": []}
    return [row for row in earlier["steps"] if row["step"] not in names and row["status"] != "not run"]


def write(out: Path, facts: dict[str, str], steps: Sequence[Step], results: Sequence[dict]) -> None:
    """README.md and results.json, of what there is: these steps, then those of earlier runs."""
    names = [step.name for step in steps]
    rows = [*results, *of_earlier_runs(out, names)]
    report.write(out / "results.json", json.dumps(dict(environment=facts, steps=rows), indent=1) + "\n")
    parts = [f"# {facts['device']}", report.facts_list(facts), steps_table(rows)]
    for row in rows:
        table = out / f"{row['step']}.md"
        if table.exists():
            parts += [f"## {row['step']}", table.read_text().strip()]
    if (out / "paper" / "paper.html").exists():
        parts += ["## paper", "[The paper's tables](paper/paper.md), and [with figures](paper/paper.html)"]
    report.write(out / "README.md", "\n\n".join(parts) + "\n")


def pack(out: Path, archive: Path | None) -> None:
    """The whole folder in one file: from a machine that is rented, few files may come back."""
    if archive is None:
        return
    with report.replacing(archive) as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(out, out.name)


def compact(text: str) -> list[str]:
    """The lines of a table's file without the machine's facts, the rules and the alignment."""
    lines = [line for line in text.splitlines() if line and not line.startswith("* ")]
    return [re.sub(r" *\| *", "|", line) for line in lines if not re.fullmatch(r"[-|: ]+", line)]


def show(out: Path, steps: Sequence[Step], results: Sequence[dict], say: Speaker) -> None:
    """Prints what happened. The first steps are the most telling: their tables come last, before that of the steps."""
    parts = ["\n".join(compact(steps_table(results)) + [f"results: {os.path.relpath(out)}"])]
    for result in results:
        name = result["step"]
        log, table = out / "logs" / f"{name}.log", out / f"{name}.md"
        if result["status"] in ("failed", "out of time") and log.exists():
            tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            parts.append("\n".join([f"--- {name}, end of its log ---", *(line[:LOG_COLUMNS] for line in tail)]))
        if result["status"] not in ("not run", "skipped") and table.exists():
            parts.append("\n".join([f"--- {name} ---", *compact(table.read_text())]))
    kept, room = [], say.left - 80  # for the line that says what did not fit
    for number, part in enumerate(parts):
        room -= len(part) + 2
        if room < 0:
            kept.append(f"({len(parts) - number} more parts are in the folder)")
            break
        kept.append(part)
    say("\n\n".join(reversed(kept)))
