"""The command line: ``python -m convmixer_fast info``, ``... classify``, ``... weights`` and ``... explain``."""

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from . import ConvMixer, __version__, build_info, load_checkpoint, ops, optimize, ranks
from ._types import DTYPES, NETWORK_DTYPES, name_of
from .diagnostics import GPUS, explain
from .files import open_regular, printable
from .model import ACTIVATIONS

# Characters printed at most: of a file's name, which Linux bounds so; of a class's; of a message.
NAME_LIMIT, LABEL_LIMIT, MESSAGE_LIMIT = 4096, 1000, 2000
MAX_DIGITS = 100  # more than any size has; Python refuses to convert more than 4300
MAX_LABELS_BYTES = 16 << 20  # hundreds of bytes for each of ImageNet's 21,841 classes


class UsageError(Exception):
    """What is asked for cannot be done; where an argument does not fit, the message starts with its name."""


class OutputError(Exception):
    """Results cannot be written to stdout. Its cause is the OSError."""


class Parser(argparse.ArgumentParser):
    """Escapes what its messages quote: arguments, and what UsageError has of files."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, MESSAGE_LIMIT))


def say(line: str) -> None:
    """Prints results on stdout, what its encoding lacks escaped. Raises OutputError."""
    with _writing_results():
        print(_encodable(line, sys.stdout))


def complain(line: str) -> None:
    """Prints on stderr. Where that fails, there is no place to say so, and results matter more."""
    with suppress(OSError):
        print(_encodable(line, sys.stderr), file=sys.stderr)


def _encodable(line: str, stream: TextIO) -> str:
    encoding = stream.encoding or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def _writing_results() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError from error


@contextmanager
def _warnings_on_a_line() -> Iterator[None]:
    """Warnings are printed without the line of source code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: complain(
            printable(f"{category.__name__}: {message}", MESSAGE_LIMIT)
        )
        yield


def read_labels(path: Path, n_classes: int) -> list[str]:
    """The classes' names, one a line, in the order of the network's outputs."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_LABELS_BYTES + 1)
        if len(content) > MAX_LABELS_BYTES:
            raise ValueError(f"more than {MAX_LABELS_BYTES} bytes")
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("null characters, expected text in UTF-8")
    except (OSError, ValueError) as error:  # ValueError includes UnicodeDecodeError
        raise UsageError(f"argument --labels: {path}: {error}") from None
    labels = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    if len(labels) != n_classes:
        raise UsageError(f"argument --labels: {path} has {len(labels)} lines, the model {n_classes} classes")
    return labels


def read_checkpoint(argument: str, path: Path, activation: str | None, ema: bool | None) -> ConvMixer:
    """The model of a file; what is to be known about the file is said on stderr. Raises UsageError."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            model = load_checkpoint(path, activation, ema=ema)
        except (OSError, ValueError) as error:
            raise UsageError(f"argument {argument}: {error}") from None
    for warning in caught:
        complain(_about(path, str(warning.message).removeprefix(f"{printable(path)} ")))
    return model


def load_model(args: argparse.Namespace, max_size: int) -> ConvMixer:
    if args.image_size > max_size:
        raise UsageError(f"argument --image-size: {args.image_size}, accepted: at most {max_size}")
    model = read_checkpoint("--checkpoint", args.checkpoint, args.activation, args.ema)
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
    model = load_model(args, images.MAX_SIZE)
    labels = read_labels(args.labels, model.n_classes) if args.labels else None
    dtype = getattr(torch, args.dtype)
    status = 0
    with ranks.joined(args.device), images.quiet_decoders():
        network = optimize(model, dtype=dtype).to(args.device)
        paths = ranks.of_first(paths)  # a folder may change while the ranks look into it
        for start in range(0, len(paths), args.batch_size * ranks.count()):
            first = start + args.batch_size * ranks.rank()
            batch = paths[first : first + args.batch_size]
            with memory_for(args):
                outcomes = list(images.predict(network, batch, args.image_size, args.batch_size, args.device, dtype))
            described = [describe_outcome(path, outcome, args.topk, labels) for path, outcome in outcomes]
            for readable, lines in chain.from_iterable(ranks.gather(described) or []):
                (say if readable else complain)(lines)
                status |= not readable
    return int(status)


@contextmanager
def memory_for(args: argparse.Namespace) -> Iterator[None]:
    """Raises UsageError where the network's inputs and activations do not fit the memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch raises RuntimeError on the CPU, and OutOfMemoryError, which is one, on a GPU.
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        given = f"--batch-size {args.batch_size}, --image-size {args.image_size}"
        raise UsageError(
            f"out of memory with {given}: {str(error).splitlines()[0] if str(error) else 'refused'}"
        ) from None


def describe_outcome(
    path: Path, outcome: torch.Tensor | Exception, topk: int, labels: list[str] | None
) -> tuple[bool, str]:
    """Whether there are probabilities for an image, and the lines to print: its likeliest classes, or why not."""
    if isinstance(outcome, Exception):
        return False, _about(path, f"{type(outcome).__name__}: {outcome}")
    lines = []
    for rank, (probability, index) in enumerate(zip(*outcome.topk(min(topk, len(outcome)))), 1):
        columns = [printable(path, NAME_LIMIT), str(rank), str(int(index)), f"{probability:.6f}"]
        lines.append("\t".join(columns + ([printable(labels[index], LABEL_LIMIT)] if labels else [])))
    return True, "\n".join(lines)


def _about(path: Path, reason: str) -> str:
    return f"{printable(path, NAME_LIMIT)}: {printable(reason, MESSAGE_LIMIT)}"


def draw(args: argparse.Namespace) -> int:
    """Draws the patch embedding and the depthwise kernels of each layer as PNG files, and prints their paths."""
    try:
        from .draw_filters import draw_weights  # here, for Pillow is optional
    except ImportError as error:
        raise UsageError(f"weights needs Pillow (pip install pillow): {error}") from None
    model = read_checkpoint("CHECKPOINT", args.checkpoint, "gelu", args.ema)  # whichever: it has no weights
    try:
        for path in draw_weights(model, args.output):
            say(printable(path, NAME_LIMIT))
    except ValueError as error:
        raise UsageError(f"argument CHECKPOINT: {args.checkpoint}: {error}") from None
    except OSError as error:
        raise UsageError(f"argument -o/--output: {args.output}: {error}") from None
    return 0


def info(args: argparse.Namespace) -> int:
    """Prints what was built and what is in use."""
    if args.json:
        say(json.dumps(build_info(), indent=2))
        return 0
    for name, value in build_info().items():
        text = " ".join(value) if isinstance(value, list) else value
        say(f"{name.replace('_', ' '):15} {printable(text or 'none')}")
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
            say(f"{name.replace('_', ' '):15} {' x '.join(map(str, value)) if isinstance(value, tuple) else value}")
    return 0


def positive(text: str) -> int:
    if not _is_positive(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _is_positive(text: str) -> bool:
    return text.isdecimal() and len(text) <= MAX_DIGITS and int(text) > 0


def kernel_sizes(text: str) -> tuple[int, int]:
    """Rows and columns, of one word: with two, no one could tell where the sizes that follow begin."""
    sizes = text.split("x")
    if len(sizes) > 2 or not all(map(_is_positive, sizes)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a kernel size, such as 9, or 9x7 for 9 rows and 7 columns")
    return int(sizes[0]), int(sizes[-1])


def file_path(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise argparse.ArgumentTypeError("'' is not the name of a file or folder")
    return Path(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="convmixer-fast", description="ConvMixer inference on fused operators")
    parser.add_argument("--version", action="version", version=f"convmixer_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    ema: dict[str, Any] = dict(
        action=argparse.BooleanOptionalAction, help="whether to take the averaged weights, where there are"
    )

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
    argument("images", metavar="IMAGE", nargs="+", type=file_path, help="image file, or folder of them")
    argument("--checkpoint", metavar="F", type=file_path, required=True, help="the model's weights")
    argument("--activation", choices=tuple(ACTIVATIONS), help="needed where the checkpoint's name does not tell")
    argument("--ema", **ema)
    argument("--labels", metavar="F", type=file_path, help="the classes' names, one a line")
    argument("--topk", metavar="K", type=positive, default=5, help="lines an image at most (%(default)s)")
    argument("--image-size", metavar="S", type=positive, default=224, help="side of the input (%(default)s pixels)")
    argument("--batch-size", metavar="N", type=positive, default=16, help="images a pass (%(default)s)")
    dtypes = tuple(map(name_of, NETWORK_DTYPES))
    argument("--dtype", choices=dtypes, default="float32", help="(%(default)s)")
    argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    command.set_defaults(run=classify, parser=command)

    command = commands.add_parser("weights", help="draw a checkpoint's filters", description=draw.__doc__)
    argument = command.add_argument
    argument("checkpoint", metavar="CHECKPOINT", type=file_path, help="the model's weights")
    argument("--ema", **ema)
    argument("-o", "--output", metavar="DIR", type=file_path, required=True, help="folder for the pictures")
    command.set_defaults(run=draw, parser=command)

    command = commands.add_parser(
        "explain", help="which CUDA kernel a shape gets, and how", description=explain_launch.__doc__
    )
    argument = command.add_argument
    argument("shape", metavar="SIZE", nargs=4, type=positive, help="of the input: N C H W")
    argument("--kernel-size", metavar="K", type=kernel_sizes, required=True, help="rows and columns: 9, or 9x7")
    argument("--dtype", choices=tuple(map(name_of, DTYPES)), default="float16", help="(%(default)s)")
    argument("--layout", choices=("contiguous", "channels_last"), default="contiguous", help="(%(default)s)")
    argument("--activation", choices=tuple(ops.ACTIVATIONS), default="gelu", help="(%(default)s)")
    argument("--prologue", action="store_true", help="with the prologue of fused_depthwise")
    argument("--device", choices=tuple(GPUS), default="H200", help="(%(default)s)")
    command.set_defaults(run=explain_launch, parser=command)

    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status, or raises SystemExit(2) where the arguments do not fit."""
    if sys.stderr is None:  # closed by who started us; print() would take stdout in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        complain("convmixer-fast: error: stdout is closed")
        return 1
    try:
        try:
            with _warnings_on_a_line():
                return run(argv)
        finally:  # also of --help, which leaves by SystemExit
            with _writing_results():
                sys.stdout.flush()
    except OutputError as error:
        with suppress(OSError):  # Python would try once more to write the rest, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error.__cause__, BrokenPipeError):  # whoever reads, such as head, has had enough
            complain(f"convmixer-fast: error: stdout cannot be written: {error.__cause__}")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run(argv: list[str] | None) -> int:
    args = parse(argv)
    try:
        status: int = args.run(args)
        return status
    except UsageError as error:
        parser: argparse.ArgumentParser = args.parser
        parser.error(str(error))
