"""The command line: ``python -m convmixer_fast info``, ``... classify``, ``... weights`` and ``... explain``."""

import argparse
import json
import os
import signal
import sys
from itertools import chain
from pathlib import Path

import torch

from . import ConvMixer, __version__, build_info, load_checkpoint, optimize, ranks
from .explain import GPUS, explain
from .files import printable


class UsageError(Exception):
    """What is asked for cannot be done; where an argument does not fit, the message starts with its name."""


def read_labels(path: Path, n_classes: int) -> list[str]:
    """The classes' names, one a line, in the order of the network's outputs."""
    try:
        labels = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"argument --labels: {path}: {error}") from None
    if len(labels) != n_classes:
        raise UsageError(f"argument --labels: {path} has {len(labels)} lines, the model {n_classes} classes")
    return labels


def load_model(args: argparse.Namespace) -> ConvMixer:
    try:
        model = load_checkpoint(args.checkpoint, activation=args.activation)
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --checkpoint: {error}") from None
    if model.in_channels != 3:
        raise UsageError(f"argument --checkpoint: the model takes {model.in_channels} channels, expected 3 (RGB)")
    if args.image_size < model.patch_size:
        raise UsageError(f"argument --image-size: {args.image_size} is less than a patch, {model.patch_size}")
    return model


def classify(args: argparse.Namespace) -> int:
    """Prints the likeliest classes of each image; 1 if there are none for some image, else 0.

    The ranks of torchrun take a batch each in turn; rank 0 prints, in the order of the images.
    """
    try:
        from . import images  # here, for Pillow is optional
    except ImportError as error:
        raise UsageError(f"classify needs Pillow (pip install pillow): {error}") from None
    if args.device == "cuda":
        missing = build_info()["cuda_missing"] or (None if torch.cuda.is_available() else "torch sees no CUDA device")
        if missing:
            raise UsageError(f"argument --device: 'cuda', but {missing}")
    try:
        paths = images.find_images(args.images)
    except ValueError as error:
        raise UsageError(f"argument IMAGE: {error}") from None
    model = load_model(args)
    labels = read_labels(args.labels, model.n_classes) if args.labels else None
    dtype = getattr(torch, args.dtype)
    status = 0
    with ranks.joined(args.device):
        network = optimize(model, dtype=dtype).to(args.device)
        paths = ranks.of_first(paths)  # a folder may change while the ranks look into it
        for start in range(0, len(paths), args.batch_size * ranks.count()):
            first = start + args.batch_size * ranks.rank()
            batch = paths[first : first + args.batch_size]
            outcomes = images.predict(network, batch, args.image_size, args.batch_size, args.device, dtype)
            described = [describe_outcome(path, outcome, args.topk, labels) for path, outcome in outcomes]
            for readable, lines in chain.from_iterable(ranks.gather(described) or []):
                print(lines, file=sys.stdout if readable else sys.stderr)
                status |= not readable
    return int(status)


def describe_outcome(
    path: Path, outcome: torch.Tensor | Exception, topk: int, labels: list[str] | None
) -> tuple[bool, str]:
    """Whether there are probabilities for an image, and the lines to print: its likeliest classes, or why not."""
    if isinstance(outcome, Exception):
        return False, printable(f"{path}: {type(outcome).__name__}: {outcome}")
    lines = []
    for rank, (probability, index) in enumerate(zip(*outcome.topk(min(topk, len(outcome)))), 1):
        columns = [path, rank, int(index), f"{probability:.6f}"] + ([labels[index]] if labels else [])
        lines.append("\t".join(map(printable, columns)))
    return True, "\n".join(lines)


def draw(args: argparse.Namespace) -> int:
    """Draws the patch embedding and the depthwise kernels of each layer as PNG files, and prints their paths."""
    try:
        from .weights import draw_weights  # here, for Pillow is optional
    except ImportError as error:
        raise UsageError(f"weights needs Pillow (pip install pillow): {error}") from None
    try:
        model = load_checkpoint(args.checkpoint, activation="gelu")  # whichever: it has no weights
    except (OSError, ValueError) as error:
        raise UsageError(f"argument CHECKPOINT: {error}") from None
    try:
        paths = draw_weights(model, args.output)
    except OSError as error:
        raise UsageError(f"argument -o/--output: {error}") from None
    print(*map(printable, paths), sep="\n")
    return 0


def info(args: argparse.Namespace) -> int:
    """Prints what was built and what is in use."""
    if args.json:
        print(json.dumps(build_info(), indent=2))
        return 0
    for name, value in build_info().items():
        text = " ".join(value) if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):15} {text or 'none'}")
    return 0


def explain_launch(args: argparse.Namespace) -> int:
    """Prints which CUDA kernel a depthwise operator launches for a shape, how, and the bytes it moves."""
    try:
        explanation = explain(
            args.shape,
            args.kernel_size,
            getattr(torch, args.dtype),
            args.layout,
            activation=args.activation,
            prologue=args.prologue,
            device=args.device,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    for name, value in explanation._asdict().items():
        if value not in (None, ""):
            print(f"{name.replace('_', ' '):15} {' x '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return 0


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def kernel_sizes(text: str) -> tuple[int, int]:
    """Rows and columns, of one word: with two, no one could tell where the sizes that follow begin."""
    sizes = text.split("x")
    if len(sizes) > 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a kernel size, such as 9, or 9x7 for 9 rows and 7 columns")
    return int(sizes[0]), int(sizes[-1])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convmixer-fast", description="ConvMixer inference on fused operators")
    parser.add_argument("--version", action="version", version=f"convmixer_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="what was built and what is in use", description=info.__doc__)
    command.add_argument("--json", action="store_true", help="as a JSON object")
    command.set_defaults(run=info, parser=command)

    command = commands.add_parser(
        "classify",
        help="classify image files",
        description="Prints the likeliest classes of each image, a line each, separated by tabs: image, rank, index of "
        "the class, probability and, with --labels, its name. Unreadable images are named on stderr, the rest go on, "
        "and the exit status is 1. Images are prepared as timm does for ConvMixer: ImageNet's mean and deviation. "
        "With `torchrun --nproc-per-node N -m convmixer_fast classify ...` N processes share the images.",
    )
    argument = command.add_argument
    argument("images", metavar="IMAGE", nargs="+", type=Path, help="image file, or folder of them")
    argument("--checkpoint", metavar="F", type=Path, required=True, help="the model's weights")
    argument("--activation", choices=("gelu", "relu"), help="needed where the checkpoint's name does not tell")
    argument("--labels", metavar="F", type=Path, help="the classes' names, one a line")
    argument("--topk", metavar="K", type=positive, default=5, help="lines an image at most (%(default)s)")
    argument("--image-size", metavar="S", type=positive, default=224, help="side of the input (%(default)s pixels)")
    argument("--batch-size", metavar="N", type=positive, default=16, help="images a pass (%(default)s)")
    argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(%(default)s)")
    argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    command.set_defaults(run=classify, parser=command)

    command = commands.add_parser("weights", help="draw a checkpoint's filters", description=draw.__doc__)
    argument = command.add_argument
    argument("checkpoint", metavar="CHECKPOINT", type=Path, help="the model's weights")
    argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder for the pictures")
    command.set_defaults(run=draw, parser=command)

    command = commands.add_parser(
        "explain", help="which CUDA kernel a shape gets, and how", description=explain_launch.__doc__
    )
    argument = command.add_argument
    argument("shape", metavar="SIZE", nargs=4, type=positive, help="of the input: N C H W")
    argument("--kernel-size", metavar="K", type=kernel_sizes, required=True, help="rows and columns: 9, or 9x7")
    argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"), default="float16", help="(%(default)s)")
    argument("--layout", choices=("contiguous", "channels_last"), default="contiguous", help="(%(default)s)")
    argument("--activation", choices=("none", "gelu", "relu"), default="gelu", help="(%(default)s)")
    argument("--prologue", action="store_true", help="with the prologue of fused_depthwise")
    argument("--device", choices=tuple(GPUS), default="H200", help="(%(default)s)")
    command.set_defaults(run=explain_launch, parser=command)

    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status, or raises SystemExit(2) where the arguments do not fit."""
    try:
        try:
            args = parse(argv)
            try:
                status: int = args.run(args)
                return status
            except UsageError as error:
                parser: argparse.ArgumentParser = args.parser
                parser.error(str(error))
        finally:  # also of --help, which leaves by SystemExit
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
