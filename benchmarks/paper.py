"""The paper on this machine: the tables and figures of "Patches Are All You Need?" (arXiv 2201.09792), remade.

    python benchmarks/paper.py [--full] [--out DIR]

Parameters and images per second of every network in the paper's Tables 1 and 2, by each backend, beside the paper's
figures; Figure 1; throughput against kernel size; time against resolution. DIR gets paper.md, paper.csv, paper.html
(all in one file) and the figures as PNG. Measured as by throughput.py, whose protocol is the paper's on a GPU. On a CPU
the default is reduced to a few minutes, and says how; --full is not.

What is finished is kept in DIR/state.json, with all that a figure depends on: a run that was stopped, or ran out of
--minutes, goes on where it was when started again. At Ctrl-C it shows and writes what there is, as after --minutes.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import figures
import page
import peers
import report
import throughput
import torch
from torch import nn
from tqdm import tqdm

import convmixer_fast

KERNEL_SIZES = (3, 5, 7, 9, 11, 13, 15)
FULL = {
    "cuda": throughput.PAPERS_PROTOCOL,
    "cpu": throughput.PAPERS_PROTOCOL | dict(device="cpu", dtype="float32"),
}
REDUCED_MINUTES = 4  # a busy machine's; alone it takes two
REDUCED_BACKENDS = ["eager", "channels_last", "fused"]


@dataclass(frozen=True)
class Plan:
    """What is measured, and with which settings."""

    tables: dict[str, object]  # settings, as of throughput.py
    greatest_gflop: float  # an image, of a network that is timed
    kernel_model: str
    kernel: dict[str, object]  # settings
    resolution_model: str
    resolutions: tuple[int, ...]
    resolution: dict[str, object]  # settings


def full(device: str) -> Plan:
    settings = FULL[device]
    return Plan(
        tables=settings,
        greatest_gflop=float("inf"),
        kernel_model="convmixer_1536_20_k9_p7",
        kernel=settings,
        resolution_model="convmixer_768_32_k7_p7",
        resolutions=(112, 168, 224, 336, 448),
        resolution=settings,
    )


_SMALL = dict(device="cpu", dtype="float32", batches=3)
REDUCED = Plan(
    tables=_SMALL | dict(batch=2, image_size=224),
    greatest_gflop=12,
    kernel_model="convmixer_256_8_k9_p1",
    kernel=_SMALL | dict(batch=4, image_size=32),
    resolution_model="convmixer_512_12_k8_p7",
    resolutions=(56, 112, 168, 224),
    resolution=_SMALL | dict(batch=1, image_size=224),
)


def reductions(plan: Plan, backends: list[str]) -> list[str]:
    """What a reduced run leaves out, a phrase each."""
    whole, tables = full("cpu"), plan.tables
    left_out = [backend for backend in throughput.DEFAULTS["cpu"]["backends"] if backend not in backends]
    return [
        f"batches of {tables['batch']}, not {whole.tables['batch']}; {tables['batches']} of them, not "
        f"{whole.tables['batches']}",
        f"networks of more than {plan.greatest_gflop:g} GFLOP an image are not timed",
        f"kernel sizes with {plan.kernel_model} at {plan.kernel['image_size']} pixels, not {whole.kernel_model} at "
        f"{whole.kernel['image_size']}",
        f"resolutions up to {max(plan.resolutions)} with {plan.resolution_model}, not up to {max(whole.resolutions)} "
        f"with {whole.resolution_model}",
        *([f"backends without {', '.join(left_out)}"] if left_out else []),
    ]


@dataclass(frozen=True)
class Job:
    """One network to measure: a row of a table, or a point of a figure."""

    part: str  # "tables", "kernel" or "resolution"
    model: str
    settings: dict[str, object]
    backends: list[str]
    changes: dict[str, int] = field(default_factory=dict)  # arguments of ConvMixer in place of the model's own

    def make(self) -> nn.Module:
        if self.changes:
            return throughput.plain(convmixer_fast.create_model(self.model, **self.changes))
        return throughput.build(self.model)


def jobs(plan: Plan, backends: list[str], facts: dict[str, dict]) -> list[Job]:
    """In the order in which they run, the most telling first."""
    without_ours = [backend for backend in backends if backend != throughput.OURS]
    mixers, others = [], []
    for name, fact in facts.items():
        if fact["gflop"] is not None and fact["gflop"] <= plan.greatest_gflop:
            ours = name.startswith("convmixer")
            job = Job("tables", name, plan.tables, backends if ours else without_ours)
            (mixers if ours else others).append(job)
    kernels = [Job("kernel", plan.kernel_model, plan.kernel, backends, {"kernel_size": k}) for k in KERNEL_SIZES]
    resolutions = [
        Job("resolution", plan.resolution_model, plan.resolution | dict(image_size=size), backends)
        for size in plan.resolutions
    ]
    return mixers + kernels + resolutions + [job for job in others if job.backends]


def table_facts(progress: tqdm) -> dict[str, dict]:
    """For each network of the tables its exact parameters and GFLOP an image of 224x224, None and a remark if it cannot
    be built. Nothing is computed: meta device."""
    facts = {}
    for name in report.paper_rows():
        progress.set_postfix_str(f"counting {name}")
        fact = dict(parameters=None, gflop=None, remark="")
        if name in peers.EMPTY:
            fact["remark"] = peers.EMPTY[name]
        else:
            try:
                with torch.device("meta"):
                    model = throughput.build(name)
                fact["parameters"] = sum(parameter.numel() for parameter in model.parameters())
                fact["gflop"] = throughput.flops_per_image(model, 224) / 1e9
            except Exception as error:  # the other rows go on
                fact["remark"] = throughput.failure(error)["message"]
        facts[name] = fact
    return facts


class State:
    """The finished jobs' rows in a file, by all that they depend on."""

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        environment = report.environment(device)
        self._machine = {name: environment[name] for name in environment if name not in ("command", "date", "commit")}
        self._machine |= {name: _version(name) for name in ("timm", "openvino", "onnxruntime")}
        info = convmixer_fast.build_info()
        self._machine |= {name: info[name] for name in ("cpu_isa", "cpu_gemm")}
        self._machine["benchmark"] = _digest("throughput", "timing", "accuracy", "peers")
        self._done = report.read_results(path) or {}

    def _key(self, job: Job) -> str:
        return json.dumps(asdict(job) | self._machine, sort_keys=True)

    def get(self, job: Job) -> list[dict] | None:
        return self._done.get(self._key(job))

    def put(self, job: Job, rows: list[dict]) -> None:
        self._done[self._key(job)] = rows
        report.write(self.path, json.dumps(self._done, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(*modules: str) -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"\0".join((folder / f"{name}.py").read_bytes() for name in modules)).hexdigest()[:12]


def measure(todo: list[Job], state: State, deadline: float, progress: tqdm, on_done: Callable[[], object]) -> None:
    """Runs the jobs that are not in the state yet, until the deadline (time.monotonic)."""
    for job in todo:
        if state.get(job) is None:
            if time.monotonic() > deadline:
                return
            torch.compiler.reset()  # its limit of recompilations counts all models as one
            defaults = vars(throughput.parse(["--device", job.settings["device"]]))
            args = argparse.Namespace(**defaults | job.settings | dict(backends=job.backends))
            before = progress.n
            rows = throughput.run_model(job.model, args, progress, job.make)
            throughput.summarise(rows)
            progress.update(before + job.settings["batches"] - progress.n)
            state.put(job, rows)
            on_done()


def record(job: Job | None, rows: list[dict] | None, backends: list[str]) -> dict:
    """A job's rows as one: images per second by backend, ours over the best other, and a remark."""
    rates, remarks, over = {}, {}, None
    for row in rows or []:
        if row["status"] == "timed":
            rates[row["backend"]] = row["images_per_second"]
            over = row.get("over_best_other", over)
        if row["message"]:
            remarks.setdefault(row["message"], []).append(row["backend"])
    if job is not None and rows is None:
        remarks = {"not reached: run again to continue": job.backends}
    everywhere = job.backends if job else []
    remark = "; ".join(
        message if names == everywhere else f"{', '.join(names)}: {message}" for message, names in remarks.items()
    )
    failed = any(row["backend"] == throughput.OURS and row["status"] in ("wrong", "failed") for row in rows or [])
    rates = {backend: rates.get(backend) for backend in backends}
    return dict(rates=rates, over_best_other=over, remark=remark, failed=failed)


def collect(
    plan: Plan, todo: list[Job], state: State, facts: dict[str, dict], backends: list[str]
) -> dict[str, list[dict]]:
    """The records of the tables and of each figure."""
    found = {part: [] for part in ("tables", "kernel", "resolution")}
    of_tables = {job.model: job for job in todo if job.part == "tables"}
    for name, paper in report.paper_rows().items():
        job, fact = of_tables.get(name), facts[name]
        line = record(job, job and state.get(job), backends)
        if job is None and not fact["remark"]:
            large = fact["gflop"] > plan.greatest_gflop
            line["remark"] = f"over {plan.greatest_gflop:g} GFLOP: with --full" if large else "no backend for it"
        line["remark"] = fact["remark"] or line["remark"]
        found["tables"].append(dict(paper=paper, model=name, **fact | line))
    for job in todo:
        if job.part != "tables":
            x = job.changes.get("kernel_size") or job.settings["image_size"]
            found[job.part].append(dict(x=x, model=job.model, **record(job, state.get(job), backends)))
    return found


def top1(paper: dict[str, str]) -> str:
    """The paper's accuracies: without and with A1-style regularisation."""
    accuracies = [paper["top1_percent"], paper["top1_a1_percent"] and f"{paper['top1_a1_percent']} (A1)"]
    return ", ".join(filter(None, accuracies))


def text_table(records: list[dict], backends: list[str]) -> str:
    header = ["model", "parameters", "paper, M", "GFLOP", *(f"{backend}, img/s" for backend in backends)]
    header += ["x best other", "RTX 8000 (paper)", "top-1 % (paper)", "remark"]
    lines = []
    for line in records:
        paper = line["paper"]
        parameters = str(line["parameters"] or "")
        rates = [report.number(line["rates"][backend]) for backend in backends]
        figures_ = [parameters, paper["params_millions"], report.number(line["gflop"]), *rates]
        figures_.append(report.number(line["over_best_other"]))
        lines.append([line["model"], *figures_, paper["rtx8000_images_per_second"], top1(paper), line["remark"]])
    return report.table(header, lines)


def sweep_table(title: str, records: list[dict], backends: list[str]) -> str:
    lines = [
        [str(line["x"]), *(report.number(line["rates"][backend]) for backend in backends), line["remark"]]
        for line in records
    ]
    return report.table([title, *(f"{backend}, img/s" for backend in backends), "remark"], lines)


def csv_text(records: list[dict], backends: list[str]) -> str:
    """The table with all digits."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    of_paper = ["network", "in_table1", "params_millions", "rtx8000_images_per_second", "top1_percent"]
    of_paper += ["top1_a1_percent"]
    rates = [f"{backend}_images_per_second" for backend in backends]
    writer.writerow(["model", "parameters", "gflop", *rates, "over_best_other", "remark", *of_paper])
    for line in records:
        found = [line["parameters"], line["gflop"], *line["rates"].values(), line["over_best_other"], line["remark"]]
        writer.writerow([line["model"], *found, *(line["paper"][name] for name in of_paper)])
    return output.getvalue()


def write_tables(
    out: Path, facts: dict[str, str], plan: Plan, found: dict[str, list[dict]], backends: list[str]
) -> None:
    parts = [
        "# The paper on this machine",
        report.facts_list(facts),
        text_table(found["tables"], backends),
        f"## Kernel size, {plan.kernel_model}",
        sweep_table("kernel size", found["kernel"], backends),
        f"## Resolution, {plan.resolution_model}",
        sweep_table("pixels", found["resolution"], backends),
    ]
    report.write(out / "paper.md", "\n\n".join(parts) + "\n")
    report.write(out / "paper.csv", csv_text(found["tables"], backends))


def draw(out: Path, facts: dict[str, str], plan: Plan, found: dict[str, list[dict]]) -> list[page.Figure]:
    """The figures of what there is, as files and for the page."""
    pictures = []

    def add(name: str, caption: str, function: Callable, *arguments) -> None:
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier run
        if function(path, *arguments):
            pictures.append(page.Figure(path, caption))

    tables = found["tables"]
    add("figure1_paper", "Figure 1 with the paper's throughput", figures.accuracy_paper, tables)
    add("figure1_machine", "Figure 1 with this machine's", figures.accuracy_machine, tables, facts["device"])
    kernels = found["kernel"], plan.kernel_model, tables
    add("kernel_size", "Throughput against kernel size", figures.kernel_size, *kernels)
    batch = plan.resolution["batch"]
    add("resolution", "Time against resolution", figures.resolution, found["resolution"], plan.resolution_model, batch)
    return pictures


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything, also on a CPU (there: hours)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    parser.add_argument("--backends", nargs="+", choices=throughput.BACKENDS, help="(those of throughput.py)")
    parser.add_argument(
        "--minutes", type=float, help=f"start nothing new after ({REDUCED_MINUTES} for a reduced run, else no limit)"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (benchmarks/results/<device>/paper)")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: 'cuda', but torch sees no CUDA device")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs what is left of the benchmark; 1 if ours is wrong or failed anywhere, else 0."""
    args, started = parse(argv), time.monotonic()
    torch.backends.cudnn.benchmark = True  # PyTorch at its best
    reduced = args.device == "cpu" and not args.full
    plan = REDUCED if reduced else full(args.device)
    minutes = args.minutes if args.minutes is not None else REDUCED_MINUTES if reduced else float("inf")
    backends = args.backends or (REDUCED_BACKENDS if reduced else throughput.DEFAULTS[args.device]["backends"])
    facts = report.environment(torch.device(args.device))
    settings = throughput.describe(argparse.Namespace(latency=False, **plan.tables))
    facts["settings"] = settings + ("; REDUCED: " + "; ".join(reductions(plan, backends)) if reduced else "")
    out = args.out or report.results_folder(facts["device"]) / "paper"
    print(report.facts_list(facts), end="\n\n", flush=True)

    state = State(out / "state.json", torch.device(args.device))
    with tqdm(disable=None, leave=False) as progress:
        counted = table_facts(progress)
    todo = jobs(plan, backends, counted)
    done = [job for job in todo if state.get(job) is not None]
    if done:
        print(f"{len(done)} of {len(todo)} measurements are there already\n", flush=True)

    def write_collected() -> dict[str, list[dict]]:
        found = collect(plan, todo, state, counted, backends)
        write_tables(out, facts, plan, found, backends)
        return found

    def show() -> None:
        found = write_collected()
        pictures = draw(out, facts, plan, found)
        report.write(out / "paper.html", page.html(facts, found, backends, pictures))
        print(text_table(found["tables"], backends))
        print(f"\nresults: {out / 'paper.html'}, and beside it paper.md, paper.csv and the figures")

    total, initial = (sum(job.settings["batches"] for job in some) for some in (todo, done))
    bar = dict(total=total, initial=initial, unit="round", disable=None, leave=False)
    with report.showing(show), tqdm(**bar) as progress:
        measure(todo, state, started + 60 * minutes, progress, write_collected)
    found = collect(plan, todo, state, counted, backends)
    return int(any(line["failed"] for line in sum(found.values(), [])))


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
