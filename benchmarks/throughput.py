"""Images per second of ConvMixer and its peers: ours beside PyTorch's.

The paper's protocol ("Patches Are All You Need?", appendix: batches of 64 images of 224x224 in fp16, averaged over 20
such batches) is the default on a GPU. Here a round times one batch of every backend in turn, there are 20 rounds, and
the median of a backend's 20 batches counts: the paper's 20 batches a model, made robust against a machine whose clock
and company change from one minute to the next. On a CPU the default is small, and said not to be the paper's protocol.

With `torchrun --nproc-per-node N` every rank times its own copy at the same time, on a GPU each or on its share of the
CPU; the figure is the sum over the ranks.

Before that, each backend's logits for the first images of the very batch that is timed are compared with those of the
same weights in float64. Whatever is off by more than accuracy.limit() is reported, and not timed. The tolerance of ours
comes from eager PyTorch's error with TF32 off; the other backends run with PyTorch's own setting, in which they are at
their best, and get the larger of eager's two errors.

A backend that takes longer than --limit to be prepared and checked, or whose batches would, by one that is timed after
the check, is skipped. Some have no fast kernel for a dtype, and take minutes.

On a GPU a model's rows are followed by what others have published of it (data/published.csv): not measured here, and no
part of "best other".
"""

import argparse
import copy
import csv
import difflib
import functools
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import accuracy
import breakdown
import instructions
import limit
import peers
import report
import runtimes
import timing
import torch
from report import positive
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import convmixer_fast
from convmixer_fast import cpu_gemm, gpu_engine, ranks
from convmixer_fast.model import ALIASES

CHECKED = 4  # images whose logits are compared
CALIBRATION = 8  # images that the BatchNorm statistics are taken from


@dataclass(frozen=True)
class Backend:
    """A way to run a model: what a copy of it becomes for a batch of images, and the images' memory format."""

    prepare: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
    memory_format: torch.memory_format = torch.contiguous_format


# For torch.compile: weights are constants, which it then packs for its matrix products; and it takes the vector
# instructions that the processor names, without compiling and running a program for each.
ON_CPU = {"freezing": True, "cpp.vec_isa_ok": True}


def compiled(model: nn.Module, images: Tensor, max_autotune: bool = False) -> Callable[[Tensor], Tensor]:
    """torch.compile as it is, and on a CPU at its best."""
    if images.device.type == "cpu":
        return torch.compile(model, options=ON_CPU | {"max_autotune": max_autotune})
    return torch.compile(model, mode="max-autotune" if max_autotune else None)


def compiled_nchw(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.compile that leaves the maps in NCHW."""
    # Inductor moves a network with convolutions to channels_last, where PyTorch's depthwise kernels are slow: in timm's
    # tables (RTX 5090, torch 2.9.1) ConvMixers with 9x9 kernels are 2.1 and 2.4 times as fast in eager mode.
    options = {"layout_optimization": False} | (ON_CPU if images.device.type == "cpu" else {})
    return torch.compile(model, options=options)


@contextmanager
def cudnn_depthwise() -> Iterator[None]:
    """Has cuDNN compute depthwise convolutions, also those for which PyTorch would choose kernels of its own."""
    before = torch.backends.cudnn.depthwise_kernel
    torch.backends.cudnn.depthwise_kernel = "cudnn"
    try:
        yield
    finally:
        torch.backends.cudnn.depthwise_kernel = before


def no_cudnn_depthwise(device: torch.device) -> str:
    """Why cudnn_depthwise() cannot be used on a device; empty where it can."""
    if device.type != "cuda":
        return f"not applicable: cuDNN needs a CUDA device, this is {device.type}"
    if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        return f"needs torch.backends.cudnn.depthwise_kernel, from torch 2.14 on; this is {torch.__version__}"
    return ""


def by_cudnn(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with cudnn_depthwise():
            return model(x)

    return run


def l2_chunks(model: nn.Module, images: Tensor) -> nn.Module:
    """Ours with as many images at a time going through the layers as stay within the GPU's L2 cache."""
    weights = gpu_engine.Weights.of(convmixer_fast.optimize(model))
    return convmixer_fast.optimize(model, chunk=gpu_engine.l2_chunk(images, weights))


OURS = "fused"
L2_CHUNKS = "fused-l2-chunks"
CUDNN = ("cudnn-depthwise", "cudnn-depthwise-channels_last")
BACKENDS = {
    "eager": Backend(lambda model, images: model),
    "channels_last": Backend(lambda model, images: model.to(memory_format=torch.channels_last), torch.channels_last),
    CUDNN[0]: Backend(by_cudnn),
    CUDNN[1]: Backend(
        lambda model, images: by_cudnn(model.to(memory_format=torch.channels_last), images), torch.channels_last
    ),
    "compile": Backend(compiled),
    "compile-nchw": Backend(compiled_nchw),
    "compile-max-autotune": Backend(functools.partial(compiled, max_autotune=True)),
    "onnxruntime": Backend(runtimes.onnxruntime),
    "openvino": Backend(runtimes.openvino),
    OURS: Backend(lambda model, images: convmixer_fast.optimize(model)),
    "fused-graphs": Backend(lambda model, images: convmixer_fast.optimize(model, cuda_graphs=True)),
    L2_CHUNKS: Backend(l2_chunks),
}
VARIANTS = ("fused-graphs", L2_CHUNKS)  # of ours, on a GPU
BROKEN_DOWN = (OURS, L2_CHUNKS)
CPU_ONLY = ("onnxruntime", "openvino")

PAPERS_PROTOCOL = dict(device="cuda", batch=64, dtype="float16", batches=20, image_size=224)
DEFAULTS = {
    "cuda": dict(
        models=["table1"],
        backends=["eager", "channels_last", *CUDNN, "compile", "compile-nchw", OURS],
        batch=64,
        dtype="float16",
        batches=20,
        limit=None,
    ),
    "cpu": dict(
        models=["convmixer_256_8_k9_p2", "convmixer_256_8_k3_p2"],
        backends=["eager", "channels_last", "compile", OURS],
        batch=16,
        dtype="float32",
        batches=10,
        limit=300,
    ),
}


def select_models(patterns: list[str]) -> list[str]:
    """The models that names, shell patterns, "table1" (with its peers) and "table2" (its ConvMixers) stand for.

    Ours come before timm's. Raises ValueError for what no model is called.
    """
    paper, ours = report.paper_rows(), convmixer_fast.list_models()
    has_timm = importlib.util.find_spec("timm") is not None
    selected = []
    for pattern in patterns:
        if pattern == "table1":
            names = [name for name, row in paper.items() if row["in_table1"] == "yes"]
        elif pattern == "table2":
            names = [name for name in paper if name in ours]
        else:
            name = ALIASES.get(pattern, pattern)
            names = convmixer_fast.list_models(name) or [peer for peer in peers.MODELS if peer == name]
            if not names and has_timm:
                names = _timm().list_models(name)
            if not names and not has_timm and name.isidentifier():
                names = [name]  # perhaps one of timm's: its row will say that timm is missing
            if not names:
                close = difflib.get_close_matches(name, [*ours, *ALIASES, *paper], n=3)
                raise ValueError(f"no model is called {pattern!r}" + (f"; close: {', '.join(close)}" if close else ""))
        selected += names
    return list(dict.fromkeys(selected))


def model_names(text: str) -> list[str]:
    """The type of an option that selects models: a mistyped name is refused even where a later option replaces it."""
    try:
        return select_models([text])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def each_once(models: Sequence[str | list[str]]) -> list[str]:
    """The models of an option of that type, or of a default, which argparse leaves as it is."""
    names = [select_models([model]) if isinstance(model, str) else model for model in models]
    return list(dict.fromkeys(itertools.chain.from_iterable(names)))


def _timm():
    import timm

    return timm


def plain(model: nn.Module) -> nn.Module:
    """The same model with the depthwise convolutions of PyTorch."""
    for module in model.modules():
        if isinstance(module, convmixer_fast.DepthwiseConv2d):
            module.__class__ = nn.Conv2d
    return model


def build(name: str) -> nn.Module:
    """The model in plain PyTorch with random weights, of ours or timm's.

    Raises ImportError where timm is needed and missing.
    """
    if name in convmixer_fast.list_models():
        return plain(convmixer_fast.create_model(name))
    if name in peers.MODELS:
        return peers.MODELS[name]()
    return _timm().create_model(name)


def default_image_size(model: nn.Module) -> int:
    """224, or 32 for a ConvMixer of the paper's CIFAR-10 table, or the size a model of timm's was made for."""
    if isinstance(model, convmixer_fast.ConvMixer):
        return 32 if model.n_classes == 10 else 224
    return model.default_cfg["input_size"][-1]


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Gives each BatchNorm an uneven weight and bias, and as statistics those of the images, as after training: then
    activations neither grow nor vanish with depth, and a mistake in any vector shows in the logits.

    Convolutions get a bias of about one input's deviation. Without it half of the activations are cut off at 0, and
    each BatchNorm amplifies rounding errors by up to 1.2: over 32 layers of random weights nothing is left of the
    logits in bfloat16, whoever computes them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.uniform_(0.5, 1.5)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.2)
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches: here, of one
    model.train()(images)
    model.eval()


def flops_per_image(model: nn.Module, image_size: int) -> int:
    """Floating-point operations of the convolutions and matrix products for one image, 2 a multiply-add.

    Taps on the padding count. Nothing is computed: the model runs on the meta device.
    """
    model = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, image_size, image_size, device="meta", dtype=next(model.parameters()).dtype))
    return counter.get_total_flops()


def failure(error: Exception) -> dict[str, str]:
    """What a row says in place of a figure: "skipped" for want of a package or of memory, else "failed"."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return dict(status="skipped", message="out of memory")
    if isinstance(error, ModuleNotFoundError):
        return dict(status="skipped", message=f"the package {error.name} is not installed")
    return dict(status="failed", message=report.one_line(error))


def obstacle(backend: str, model: str, device: torch.device) -> str:
    """Why a backend does not apply to a model or a device; empty where it does."""
    if backend in (OURS, *VARIANTS) and not model.startswith("convmixer"):
        return "not applicable: not a ConvMixer"
    if backend in CPU_ONLY and device.type != "cpu":
        return "not applicable: runs on the CPU here"
    if backend in VARIANTS and device.type != "cuda":
        return "not applicable: for a GPU"
    return no_cudnn_depthwise(device) if backend in CUDNN else ""


@torch.no_grad()
def run_model(
    name: str, args: argparse.Namespace, progress: tqdm, make: Callable[[], nn.Module] | None = None
) -> list[dict]:
    """A row for every backend: checked, then timed in rounds with the others. make: in place of build(name)."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows = {backend: dict(model=name, backend=backend, batch=args.batch) for backend in args.backends}
    try:
        torch.manual_seed(0)
        model = (make() if make else build(name)).to(device)
        size = args.image_size or default_image_size(model)
        calibrate(model, torch.randn(CALIBRATION, 3, size, size, device=device))
        model = model.to(dtype)
        images = torch.randn(args.batch, 3, size, size, device=device, dtype=dtype)
        checked = images[:CHECKED]
        with accuracy.no_tf32():
            expected = copy.deepcopy(model).double()(checked.double())
            eager_error = accuracy.relative_error(model(checked), expected)
        error_of_peers = max(eager_error, accuracy.relative_error(model(checked), expected))
        facts = dict(image_size=size, flops_per_image=flops_per_image(model, size), eager_error=eager_error)
        if isinstance(model, convmixer_fast.ConvMixer):
            facts["sizes"] = [model.dim, model.depth, model.patch_size, model.kernel_size]
    except Exception as error:  # whatever ails one model, the others go on
        for row in rows.values():
            row.update(failure(error))
        ranks.barrier()
        return list(rows.values())

    ready = {}
    for backend, row in rows.items():
        row.update(facts)
        progress.set_postfix_str(f"{name}, checking {backend}")
        if reason := obstacle(backend, name, device):
            row.update(status="skipped", message=reason)
            continue
        try:
            with limit.within(args.limit):
                batch = images.to(memory_format=BACKENDS[backend].memory_format)
                prepared = BACKENDS[backend].prepare(copy.deepcopy(model), batch)
                row["error"] = accuracy.relative_error(prepared(batch)[:CHECKED], expected)
                accepted_of = eager_error if backend in (OURS, *VARIANTS) else error_of_peers
                row.update(accuracy.verdict(row["error"], accepted_of, dtype))
                if row["status"] == "right":
                    row["message"] = accuracy.remark(row["error"], eager_error) if backend == OURS else ""
                    if backend == L2_CHUNKS:
                        row["message"] = f"{prepared.chunk} images per chunk"
                    run = functools.partial(prepared, batch)
                    limit.project(run, timing.WARM_UP + args.batches, args.limit, timing.clock_for(device))
            if row["status"] == "right":
                ready[backend] = run
        except limit.Exceeded as exceeded:
            row.update(status="skipped", message=str(exceeded), over_limit=True)
        except Exception as error:
            row.update(failure(error))

    progress.set_postfix_str(name)
    ranks.barrier()  # that all of them compute while one is timed
    try:
        clock, settle = timing.clock_for(device), timing.settle_for(device, args.latency)
        seconds = timing.measure(ready, args.batches, clock, progress.update, settle)
        for backend, samples in seconds.items():
            rows[backend].update(status="timed", seconds=samples)
    except Exception as error:
        for backend in ready:
            rows[backend].update(failure(error))
        return list(rows.values())
    for backend in BROKEN_DOWN if args.breakdown else ():
        if backend in ready:
            try:
                rows[backend]["breakdown"] = breakdown.measure(ready[backend].func, images, args.batches)
            except Exception as error:  # its time stands without the parts of it
                reason = f"no breakdown: {report.one_line(error)}"
                rows[backend]["message"] = "; ".join(filter(None, [rows[backend]["message"], reason]))
    return list(rows.values())


def merge(rows_of_ranks: list[list[dict]]) -> list[dict]:
    """The rows of rank 0 with all ranks' seconds; or, where some rank has none, with that rank's reason."""
    if len(rows_of_ranks) == 1:
        return rows_of_ranks[0]
    merged = []
    for rows in zip(*rows_of_ranks, strict=True):
        row = dict(rows[0])
        failed = next((rank for rank, other in enumerate(rows) if other["status"] != "timed"), None)
        if failed is not None:
            row.update(status=rows[failed]["status"], message=f"rank {failed}: {rows[failed]['message']}")
        else:
            row["rank_seconds"] = [other["seconds"] for other in rows]
        merged.append(row)
    return merged


def summarise(rows: list[dict]) -> None:
    """Derives the figures of the timed rows: images_per_second (of the median batch; summed over ranks),
    teramacs_per_second (multiply-adds, as papers count), over_best_other (ours over the fastest other backend that is
    held to the same instruction set) and k9_over_k3 (over the same network with kernel size 3)."""
    timed = [row for row in rows if row["status"] == "timed"]
    for row in timed:
        rates = [row["batch"] / statistics.median(seconds) for seconds in row.get("rank_seconds", [row["seconds"]])]
        row["images_per_second"] = sum(rates)
        if len(rates) > 1:
            row["rank_images_per_second"] = rates
        row["teramacs_per_second"] = teramacs(row["images_per_second"], row["flops_per_image"])
    rate = {(row["model"], row["backend"]): row["images_per_second"] for row in timed}
    mixers = [(row, (*row["sizes"][:-1], row["backend"]), row["sizes"][-1]) for row in timed if "sizes" in row]
    kernel_3 = {key: row["images_per_second"] for row, key, kernel_size in mixers if kernel_size == 3}
    for row in timed:
        no_peers = (OURS, *VARIANTS, *instructions.not_held())
        others = [rate[key] for key in rate if key[0] == row["model"] and key[1] not in no_peers]
        if row["backend"] in (OURS, *VARIANTS) and others:
            row["over_best_other"] = row["images_per_second"] / max(others)
    for row, key, kernel_size in mixers:
        if kernel_size == 9 and key in kernel_3:
            row["k9_over_k3"] = row["images_per_second"] / kernel_3[key]


def teramacs(images_per_second: float, flops_per_image: int) -> float:
    """10^12 multiply-adds per second."""
    return images_per_second * flops_per_image / 2 / 1e12


def published(name: str) -> list[dict]:
    """A row for every figure that others have published of a model, with images of the paper's size."""
    with (Path(__file__).parent / "data" / "published.csv").open(newline="") as file:
        figures = [row for row in csv.DictReader(file) if row["model"] == name]
    if not figures:
        return []
    with torch.device("meta"):
        flops = flops_per_image(build(name), PAPERS_PROTOCOL["image_size"])
    rows = []
    for figure in figures:
        rate = float(figure["images_per_second"])
        source = figure["source"].partition(":")[0]
        rows.append(
            dict(
                model=name,
                backend=f"published: {figure['backend']}",
                status="published",
                images_per_second=rate,
                teramacs_per_second=teramacs(rate, flops),
                message=f"{source}, {figure['device']}, torch {figure['torch']}; not measured here",
            )
        )
    return rows


def breakdowns(rows: list[dict]) -> str:
    """The breakdowns that were measured, as text; empty where there are none."""
    found = [row for row in rows if "breakdown" in row]
    return "".join(f"\n\n{row['model']}, {row['backend']}\n\n{breakdown.table(row['breakdown'])}" for row in found)


HEADER = ["model", "backend", "img/s", "x best other", "TMAC/s", "k9/k3", "error", "RTX 8000 (paper)", "remark"]


def table(rows: list[dict]) -> str:
    """The rows as text. error: max |logits - float64's| / max |float64's|."""
    paper = report.paper_rows()
    lines = []
    for row in rows:
        figure = paper[row["model"]]["rtx8000_images_per_second"] if row["model"] in paper else ""
        names = "images_per_second", "over_best_other", "teramacs_per_second", "k9_over_k3"
        figures = [report.number(row.get(name)) for name in names]
        error = f"{row['error']:.1e}" if "error" in row else ""
        of_ranks = " + ".join(map(report.number, row.get("rank_images_per_second", [])))
        remark = "; ".join(filter(None, [of_ranks and f"ranks: {of_ranks}", row["message"]]))
        lines.append([row["model"], row["backend"], *figures, error, figure, remark])
    return report.table(HEADER, lines)


def plot(path: Path, rows: list[dict], title: str) -> None:
    """A PNG: a group of bars per model, a bar per backend that was measured, and the paper's figure as a mark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paper = report.paper_rows()
    rows = [row for row in rows if row["status"] != "published"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    blues = plt.get_cmap("Blues")
    colours = {backend: blues(0.25 + 0.4 * i / max(1, len(backends) - 1)) for i, backend in enumerate(backends)}
    colours[OURS] = "#d1495b"
    thickness = 0.8 / len(backends)

    figure, axes = plt.subplots(figsize=(9, 1.2 + len(models) * (0.35 + 0.24 * len(backends))), layout="constrained")
    for row in rows:
        y = models.index(row["model"]) + (backends.index(row["backend"]) - (len(backends) - 1) / 2) * thickness
        rate = row.get("images_per_second", 0)
        axes.barh(y, rate, thickness * 0.9, color=colours[row["backend"]])
        over = f"  ({row['over_best_other']:.2f}x the best other)" if "over_best_other" in row else ""
        remark = row["message"].split(";")[0]
        label = f"{report.number(rate)}{over}" if rate else remark[:60] + "..." * (len(remark) > 60)
        axes.annotate(
            label,
            (rate, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox=dict(facecolor="white", linewidth=0, pad=0.5),
            zorder=3,
        )
    marked = [model for model in models if model in paper]
    for model in marked:
        figure_8000 = float(paper[model]["rtx8000_images_per_second"])
        axes.vlines(figure_8000, models.index(model) - 0.45, models.index(model) + 0.45, colors="black", linestyles=":")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[backend], label=backend) for backend in backends]
    if marked:
        handles.append(plt.Line2D([], [], color="black", linestyle=":", label="paper, RTX 8000"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.margins(x=0.3, y=0.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("images per second")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def describe(args: argparse.Namespace) -> str:
    """The settings in a line, and whether they are the paper's."""
    size = f"{args.image_size}x{args.image_size}" if args.image_size else "the models' own image sizes"
    settings = f"{args.device}, batches of {args.batch}, {args.dtype}, {size}, median of {args.batches} batches"
    settings += ", each on an idle GPU" if args.device == "cuda" and args.latency else ""
    same = all(getattr(args, name) == value for name, value in PAPERS_PROTOCOL.items())
    if ranks.count() > 1:
        settings += f", {ranks.count()} ranks"
    return f"{settings}: {'the' if same else 'NOT the'} paper's protocol"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = functools.partial(report.both_defaults, DEFAULTS)
    parser.add_argument(
        "--models",
        nargs="+",
        type=model_names,
        metavar="NAME",
        help=f"names, patterns, table1, table2, or names of timm's models {both('models')}",
    )
    parser.add_argument("--batch", type=positive, help=f"images a batch {both('batch')}")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help=both("dtype"))
    parser.add_argument("--batches", type=positive, help=f"timed batches of each backend {both('batches')}")
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="SECONDS",
        help="what a backend may take to be prepared and checked, and its batches together; one that takes longer is "
        "skipped (none on a GPU, 300 on a CPU)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    parser.add_argument("--image-size", type=positive, help="(224 on a GPU, on a CPU the size of the model's data set)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help=both("backends"))
    parser.add_argument(
        "--breakdown",
        action="store_true",
        help="time and floor of every part of ours; with --device cuda where there is no GPU, nothing but a prediction",
    )
    parser.add_argument(
        "--latency",
        action="store_true",
        help="on a GPU, wait until it is idle before each batch, so that gaps between launches count",
    )
    parser.add_argument("--json", type=Path, help="file for the results; a table goes beside it, as .md")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for a bar chart")
    args = parser.parse_args(argv)
    args.predict = args.breakdown and args.device == "cuda" and not torch.cuda.is_available()
    report.resolve_device(parser, args, DEFAULTS, may_miss=args.predict)
    if args.device == "cuda" and args.image_size is None:
        args.image_size = PAPERS_PROTOCOL["image_size"]
    args.models = each_once(args.models)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if ours is wrong or failed anywhere, else 0."""
    args = parse(argv)
    if args.predict:
        print(predictions(args))
        return 0
    with ranks.joined(args.device):
        return run(args)


def predictions(args: argparse.Namespace) -> str:
    """The breakdown of every ConvMixer of ours where there is no GPU to measure it on."""
    import prediction

    parts = [f"# {prediction.GPU}: prediction, not measured"]
    shape = (args.batch, 3, args.image_size, args.image_size)
    for name in filter(convmixer_fast.list_models().__contains__, args.models):
        module = convmixer_fast.optimize(build(name).eval(), getattr(torch, args.dtype))
        try:
            predicted = prediction.predict(module, shape)
        except ValueError as error:
            parts.append(f"{name}: {error}")
            continue
        rate = f"{args.batch / predicted['total_seconds']:.0f} images per second, a prediction"
        parts.append(f"{name}: {rate}\n\n{breakdown.table(predicted)}")
    return "\n\n".join(parts)


def run(args: argparse.Namespace) -> int:
    """Measures every model; rank 0 shows and writes the rows. Ctrl-C ends it with those of the finished models."""
    torch.backends.cudnn.benchmark = True  # PyTorch at its best
    first = ranks.rank() == 0
    facts = report.environment(torch.device(args.device)) | {"settings": describe(args)}
    if args.device == "cpu":
        facts["matrix products of fused"] = cpu_gemm.summary()
    if first:
        print(report.facts_list(facts), end="\n\n", flush=True)
    rows = []

    def show() -> None:
        print(table(rows) + breakdowns(rows))
        if args.plot and rows:
            mark = report.incomplete(len({row["model"] for row in rows}), len(args.models))
            title = f"{facts['device']}, {args.dtype}, batches of {args.batch}"
            plot(args.plot, rows, "\n".join([title, *(f"INCOMPLETE: {measured}" for measured in mark.values())]))

    bar = dict(total=len(args.models) * args.batches, unit="round", disable=None if first else True, leave=False)
    with report.showing(show) if first else nullcontext(), tqdm(**bar) as progress:
        for done, name in enumerate(args.models, 1):
            torch.compiler.reset()  # its limit of recompilations counts all models as one
            rows_of_ranks = ranks.gather(run_model(name, args, progress))
            progress.update(done * args.batches - progress.n)
            if first:
                rows += merge(rows_of_ranks) + (published(name) if args.device == "cuda" else [])
                summarise(rows)
                if args.json:
                    known = facts | report.incomplete(done, len(args.models))
                    text = f"{report.facts_list(known)}\n\n{table(rows)}{breakdowns(rows)}"
                    report.write_results(args.json, dict(environment=known, rows=rows), text)
    return int(any(row["backend"] == OURS and row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
