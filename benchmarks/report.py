"""What a benchmark's results need around them: the machine and code they belong to, a table, a file."""

import argparse
import csv
import datetime
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import instructions
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "convmixer_fast")
FIGURE = re.compile(r"[-+.e%\d]*|> \w+")  # or what a figure is beyond
SOURCE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}
# torch.compile imports it, and it warns of a CUDA toolkit on a machine without a GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
INTERRUPTED = 128 + signal.SIGINT  # the exit status of what Ctrl-C ended, as a shell gives it


def source_hash() -> str:
    """SHA-256 (first 12 digits) over the names and contents of the kernels' and the package's sources."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def commit() -> str:
    """The tree's commit, with "+changes" if it was edited; outside a repository $COMMIT, or "unknown"."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        described = _output("git", "-C", ROOT, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes")
        if described:
            return described
    return os.environ.get("COMMIT", "unknown")


def _output(*command: str | Path) -> str:
    """A command's standard output; empty if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """What figures depend on besides the settings, in the order in which it is shown."""
    facts = {
        "command": shlex.join(["python3", *(os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "sources": source_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        driver = _output(*query).partition("\n")[0] if shutil.which(query[0]) else ""
        return facts | {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "driver": driver or "unknown",
            "CUDA": str(torch.version.cuda),
        }
    return facts | {"device": cpu_name(), "threads": str(torch.get_num_threads())} | instructions.facts()


def results_folder(device: str) -> Path:
    """benchmarks/results/<device>, from the device's name."""
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def paper_rows() -> dict[str, dict[str, str]]:
    """The networks of the paper's Tables 1 and 2 with its figures, by our, timm's or peers.py's name."""
    with (Path(__file__).parent / "data" / "paper_imagenet.csv").open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def facts_list(facts: dict[str, object]) -> str:
    """Markdown: an item a fact."""
    return "\n".join(f"* {name}: {value}" for name, value in facts.items())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned as plain text: columns of figures to the right, others to the left."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines = [[] for _ in range(len(cells) + 1)]
    for title, *column in zip(*cells):
        width = max(3, *map(len, (title, *column)))
        figures = all(FIGURE.fullmatch(cell) for cell in column)
        rule = "-" * (width - 1) + ":" if figures else "-" * width
        for line, cell in zip(lines, (title, rule, *column)):
            line.append(cell.rjust(width) if figures else cell.ljust(width))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent from 0.001 up; empty for None."""
    if value is None:
        return ""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def one_line(error: BaseException) -> str:
    """An exception for a table's cell: its type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Has a file written as a whole or not at all: its content reaches the disk before its name does. As
    convmixer_fast.files.replacing, which only a built package lets one import."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def read_results(path: Path) -> Any | None:
    """What an earlier run has written as JSON, or None. Exits with the file's name if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        sys.exit(f"{path} cannot be read, remove it to begin anew: {one_line(error)}")


def write_results(path: Path, result: dict[str, object], text: str) -> None:
    """The result as JSON, and its text beside it as Markdown."""
    write(path, json.dumps(result, indent=1) + "\n")
    write(path.with_suffix(".md"), text + "\n")


def incomplete(done: int, total: int) -> dict[str, str]:
    """The fact that marks results which are written before all models or cases are measured."""
    return {} if done == total else {"incomplete": f"{done} of {total} measured"}


@contextmanager
def showing(show: Callable[[], object]) -> Iterator[None]:
    """Calls show(), which prints the finished rows, when the block ends; also where Ctrl-C ends it, which then goes on
    to end the program (exit_status)."""
    try:
        yield
    except KeyboardInterrupt:
        print("INCOMPLETE: stopped by Ctrl-C\n")
        show()
        raise
    show()


def exit_status(main: Callable[[], int]) -> int:
    """That of main(); INTERRUPTED, without a traceback, where Ctrl-C ended it.

    Within a second of a SIGINT another one is ignored: timeout(1) sends two, and finished rows are to be shown.
    """
    last = -1.0

    def interrupt(number, frame):
        nonlocal last
        now = time.monotonic()
        if now - last > 1:
            last = now
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started this has it ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        return main()
    except KeyboardInterrupt:
        return INTERRUPTED


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def three_sizes(shape: str, example: str) -> Callable[[str], tuple[int, int, int]]:
    """The type of an option such as 1536x32x32; shape: what the three are, such as CxHxW."""

    def sizes_of(text: str) -> tuple[int, int, int]:
        sizes = text.split("x")
        if len(sizes) != 3:
            raise argparse.ArgumentTypeError(f"{text!r} is not {shape}, such as {example}")
        return tuple(map(positive, sizes))

    return sizes_of


def both_defaults(defaults: dict[str, dict], name: str) -> str:
    """What an option's help says of its default, which depends on the device."""
    return f"({defaults['cuda'][name]} on a GPU, {defaults['cpu'][name]} on a CPU)"


def resolve_device(
    parser: argparse.ArgumentParser, args: argparse.Namespace, defaults: dict[str, dict], may_miss: bool = False
) -> None:
    """Fills in args.device (a GPU if there is one), and what depends on it and was not given; exits where the device is
    missing, unless it may."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not (torch.cuda.is_available() or may_miss):
        parser.error("argument --device: 'cuda', but torch sees no CUDA device")
    for name, value in defaults[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
