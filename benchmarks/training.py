"""Images per second of training: forward, backward and optimizer step, ours beside PyTorch's eager and torch.compile.

Every backend trains a copy of the same network by AdamW, under torch.autocast with a gradient scaler in float16 and
bfloat16, and in float32 without. A round times one step of every backend in turn; the median of a backend's rounds
counts. On a GPU, "GB" is the peak of the memory that a step takes beyond what is held before it.

Before that, each backend's gradient of the very batch that is timed is compared with that of eager PyTorch in a wider
type: float64, or for autocast on a GPU float32; of a ConvMixer on its first layers alone (shallow). Whatever is off by
more than accuracy.limit() is reported, and not timed. All of that is without TF32; steps are timed with PyTorch's own
setting, in which it is at its best.
"""

import argparse
import copy
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import accuracy
import report
import sweep
import throughput
import timing
import torch
import torch.nn.functional as F
from report import positive
from throughput import failure
from torch import Tensor, nn
from tqdm import tqdm

import convmixer_fast


def ours(model: nn.Module) -> nn.Module:
    if convmixer_fast.replace_depthwise(model, min_kernel_size=1).count == 0:
        raise ValueError("the model has no depthwise convolution to replace")
    return model


# What becomes of a copy of the network in plain PyTorch.
BACKENDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "compile": torch.compile,
    "ours": ours,
    "ours-compile": lambda model: torch.compile(ours(model)),
}
OURS = ("ours", "ours-compile")
DEFAULTS = {
    "cuda": dict(models=["convmixer_768_32", "convmixer_1536_20"], batch=64, dtypes=["float16"], rounds=10),
    "cpu": dict(models=["convmixer_256_8_k9_p2"], batch=4, dtypes=["float32"], rounds=5),
}


CHECKED_LAYERS = 4


def shallow(model: nn.Module) -> nn.Module:
    """A copy whose gradient is compared: of a ConvMixer the first CHECKED_LAYERS layers with all that is around them.

    Through the 32 layers of 768/32, with random weights and ReLU, rounding to float16 grows until nothing is left of
    the gradient, whoever computes it: eager PyTorch is off by more than its largest value."""
    model = copy.deepcopy(model)
    if isinstance(model, convmixer_fast.ConvMixer):
        model.blocks = model.blocks[:CHECKED_LAYERS]
    return model


class Trainer:
    """A network with its optimizer, and the batch that it is trained on."""

    def __init__(self, model: nn.Module, images: Tensor, target: Tensor, dtype: torch.dtype):
        self.model, self.images, self.target = model.train(), images, target
        self.amp = torch.autocast(images.device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        self.scaler = torch.amp.GradScaler(images.device.type, 2.0**10, enabled=dtype == torch.float16)

    def backward(self) -> None:
        """The gradients, times the scaler's scale."""
        with self.amp:
            loss = F.cross_entropy(self.model(self.images), self.target)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()

    def gradient(self) -> Tensor:
        """That of all parameters, in float64."""
        self.backward()
        scale = self.scaler.get_scale()
        return torch.cat([p.grad.flatten().double() for p in self.model.parameters() if p.grad is not None]) / scale

    def step(self) -> None:
        self.backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def wider(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cuda" and dtype != torch.float32 else torch.float64


def peak_bytes(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run_model(name: str, dtype_name: str, args: argparse.Namespace, progress: tqdm) -> list[dict]:
    """A row for every backend: checked, then timed in rounds with the others."""
    torch.compiler.reset()  # its limit of recompilations counts all models as one
    device, dtype = torch.device(args.device), getattr(torch, dtype_name)
    rows = {backend: dict(model=name, dtype=dtype_name, backend=backend, batch=args.batch) for backend in args.backends}
    try:
        torch.manual_seed(0)
        model = throughput.build(name).to(device)
        size = args.image_size or throughput.default_image_size(model)
        images = torch.randn(args.batch, 3, size, size, device=device)
        target = torch.arange(args.batch, device=device) % 10
        exact, checked = wider(dtype, device), shallow(model)
        with accuracy.no_tf32():
            expected = Trainer(copy.deepcopy(checked).to(exact), images.to(exact), target, exact).gradient()
            eager = Trainer(copy.deepcopy(checked), images, target, dtype).gradient()
        eager_error = accuracy.relative_error(eager, expected)
    except Exception as error:  # whatever ails one model, the others go on
        for row in rows.values():
            row.update(failure(error))
        return list(rows.values())

    ready = {}
    for backend, row in rows.items():
        row.update(image_size=size, eager_error=eager_error)
        progress.set_postfix_str(f"{name}, {dtype_name}, checking {backend}")
        try:
            trainer = Trainer(BACKENDS[backend](copy.deepcopy(checked)), images, target, dtype)
            with accuracy.no_tf32():
                row["error"] = accuracy.relative_error(trainer.gradient(), expected)
            row.update(accuracy.verdict(row["error"], eager_error, dtype))
            if row["status"] == "right":
                row["message"] = accuracy.remark(row["error"], eager_error) if backend in OURS else ""
                trainer = Trainer(BACKENDS[backend](copy.deepcopy(model)), images, target, dtype)
                trainer.step()  # makes the optimizer's state
                if device.type == "cuda":
                    row["peak_bytes"] = peak_bytes(trainer.step)
                ready[backend] = trainer.step
        except Exception as error:
            row.update(failure(error))

    progress.set_postfix_str(f"{name}, {dtype_name}")
    sweep.time_rows(rows, ready, args, progress)
    return list(rows.values())


def summarise(rows: list[dict]) -> None:
    """Derives the figures of the timed rows: images_per_second (of the median step) and, of ours, over_best_other."""
    timed = [row for row in rows if row["status"] == "timed"]
    for row in timed:
        row["images_per_second"] = row["batch"] / statistics.median(row["seconds"])
    for row in timed:
        others = [
            other["images_per_second"]
            for other in timed
            if other["backend"] not in OURS and (other["model"], other["dtype"]) == (row["model"], row["dtype"])
        ]
        if row["backend"] in OURS and others:
            row["over_best_other"] = row["images_per_second"] / max(others)


HEADER = ["model", "dtype", "backend", "img/s", "x best other", "GB", "error", "remark"]


def table(rows: list[dict]) -> str:
    """The rows as text. error: max |gradient - the wider type's| / max |the wider type's|."""
    lines = []
    for row in rows:
        figures = [report.number(row.get(name)) for name in ("images_per_second", "over_best_other")]
        memory = report.number(row["peak_bytes"] / 1e9) if "peak_bytes" in row else ""
        error = f"{row['error']:.1e}" if "error" in row else ""
        lines.append([row["model"], row["dtype"], row["backend"], *figures, memory, error, row["message"]])
    return report.table(HEADER, lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = functools.partial(report.both_defaults, DEFAULTS)
    models = f"as throughput.py's {both('models')}"
    parser.add_argument("--models", nargs="+", type=throughput.model_names, metavar="NAME", help=models)
    parser.add_argument("--batch", type=positive, help=f"images a step {both('batch')}")
    parser.add_argument("--dtypes", nargs="+", choices=("float16", "bfloat16", "float32"), help=both("dtypes"))
    parser.add_argument("--rounds", type=positive, help=f"timed steps of each backend {both('rounds')}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    parser.add_argument("--image-size", type=positive, help="(that of the model's data set)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["eager", "compile", "ours"])
    parser.add_argument("--json", type=Path, help="file for the results; a table goes beside it, as .md")
    args = parser.parse_args(argv)
    report.resolve_device(parser, args, DEFAULTS)
    args.models = throughput.each_once(args.models)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if ours is wrong or failed anywhere, else 0."""
    args = parse(argv)
    torch.backends.cudnn.benchmark = True  # PyTorch at its best
    if args.device == "cpu":
        timing.keep_freed_memory()
    settings = f"{args.device}, batches of {args.batch}, median of {args.rounds} steps"
    cases = [(name, dtype) for name in args.models for dtype in args.dtypes]
    rows = sweep.run(args, settings, cases, run_model, summarise, table)
    return int(any(row["backend"] in OURS and row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(report.exit_status(main))
