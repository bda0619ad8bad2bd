"""Cases for the emulated kernels whose results can be compared to the bit, and bugs planted to see them found."""

import dataclasses
import itertools
import random
import re
import shutil
from pathlib import Path

import cases
import torch
from emulated import CSRC
from ptxsim import DeviceError
from ptxsim.toolchain import cache_dir

from convmixer_fast import reference

KERNEL_SIZES = ((1, 1), (3, 3), (5, 5), (7, 7), (8, 8), (9, 9), (11, 11), (15, 15), (31, 31), (5, 9), (2, 1))
MAPS = ((32, 32), (16, 16), (14, 14), (7, 7), (1, 1), (33, 29), (56, 56), (3, 70))
BATCHES = (1, 3, 17)
CHANNELS = (1, 3, 8, 33)
ORDERS = ("forward", "reverse", 1)
MOST_PRODUCTS = 8_000_000  # of inputs and taps in one case: keeps it at a fraction of a second


def unaligned(x):
    """x one element past an aligned address, with the strides it has."""
    return x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


LAYOUTS = cases.LAYOUTS | {
    "unaligned": lambda x: unaligned(x.contiguous()),
    "channels_last_unaligned": lambda x: unaligned(x.contiguous(memory_format=torch.channels_last)),
}


def in_float64(arguments):
    """The same arguments with every tensor in float64."""
    if isinstance(arguments, torch.Tensor):
        return arguments.double()
    return type(arguments)(map(in_float64, arguments)) if isinstance(arguments, tuple | list) else arguments


@dataclasses.dataclass
class Case:
    kernel_size: tuple[int, int]
    dtype: torch.dtype
    layout: str
    map: tuple[int, int]
    batch: int
    channels: int
    order: str | int
    fused: bool  # fused_depthwise, with or without prologue and residual; else depthwise_conv2d
    prologue: bool
    residual: bool
    bias: bool

    def __str__(self):
        size = cases.Case(self.batch, self.channels, *self.map, *self.kernel_size)
        steps = ("fused", "prologue", "residual") if self.fused else ("bias",)
        flags = [step for step in steps if getattr(self, step)]
        return "-".join([str(size), str(self.dtype)[6:], self.layout, *flags, str(self.order)])

    @property
    def products(self):
        (h, w), (kernel_h, kernel_w) = self.map, self.kernel_size
        return self.batch * self.channels * h * w * kernel_h * kernel_w


def matrix():
    """Every kernel size with every dtype and layout; the other properties by chance, the same in each run."""
    rng = random.Random(0)
    result = []
    for kernel_size, dtype, layout in itertools.product(KERNEL_SIZES, cases.DTYPES, LAYOUTS):
        flags = [rng.random() < probability for probability in (0.7, 0.5, 0.5, 0.5)]
        case = Case(kernel_size, dtype, layout, *map(rng.choice, (MAPS, BATCHES, CHANNELS, ORDERS)), *flags)
        if case.products > MOST_PRODUCTS:
            case = dataclasses.replace(case, batch=1, channels=min(case.channels, 3))
        result.append(case)
    return result


def dyadic(*shape, most, step, dtype):
    """Multiples of step in [-most, most]: sums of their products are exact in float32, whatever their order."""
    count = round(most / step)
    return (torch.randint(-count, count + 1, shape) * step).to(dtype)


def dyadic_vectors(channels, dtype):
    """bias, scale and shift."""
    vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return tuple(dyadic(channels, most=2, step=step, dtype=vector_dtype) for step in (0.25, 1, 0.25))


def run_exact(ops, case):
    """The result on data whose sums need no rounding, and the float64 reference rounded once: they are to be equal."""
    torch.manual_seed(0)
    x = LAYOUTS[case.layout](dyadic(case.batch, case.channels, *case.map, most=2, step=0.25, dtype=case.dtype))
    weight = dyadic(case.channels, 1, *case.kernel_size, most=1, step=0.125, dtype=case.dtype)
    if case.fused:
        name = "fused_depthwise"
        epilogue, prologue = (dyadic_vectors(case.channels, case.dtype) for _ in range(2))
        arguments = (x, weight, *epilogue, "relu", case.residual, prologue if case.prologue else None)
    else:
        name = "depthwise_conv2d"
        arguments = (x, weight, dyadic(case.channels, most=2, step=0.25, dtype=case.dtype) if case.bias else None)
    ops.device.order = case.order
    options = dict(out=cases.planes(torch.empty_like(x))) if case.layout == "planes" and case.fused else {}
    return getattr(ops, name)(*arguments, **options), getattr(reference, name)(*in_float64(arguments)).to(case.dtype)


def plant(name, file, correct, planted):
    """An overlay for EmulatedOps: all headers, csrc/cuda/<file> with a bug, and the sources that include it, of the
    kernels those in float16 without GELU. In a folder that stays, so that it is compiled once; everything else is the
    project's own."""
    overlay = Path(cache_dir(), "planted", name)
    shutil.rmtree(overlay, ignore_errors=True)
    sources = [path for path in (CSRC / "cuda").rglob("*.*") if path.suffix in (".cu", ".cuh", ".h")]
    texts = {path: path.read_text() for path in [CSRC / "params.h", *(CSRC / "common").glob("*.h"), *sources]}
    includes = {
        path: {(path.parent / name).resolve() for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)}
        for path, text in texts.items()
    }
    faulty = CSRC / "cuda" / file
    assert texts[faulty].count(correct) == 1, f"{file} has not {correct!r} once: plant the bug elsewhere"
    texts[faulty] = texts[faulty].replace(correct, planted)
    concerned = [faulty]
    for included in concerned:  # which grows by the files that include it
        concerned += [path for path in texts if included in includes[path] and path not in concerned]
    for path, text in texts.items():
        is_wanted = path in concerned and not re.search(r"_(bf16|f32|f64|gelu)(?=[_.])", path.name)
        if is_wanted or path.suffix != ".cu":
            copy = overlay / path.relative_to(CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
    return overlay


def first_finding(ops, cases, run_exact=run_exact):
    """What the first case that goes wrong reports, or "nothing"."""
    for case in cases:
        try:
            ours, expected = run_exact(ops, case)
        except DeviceError as error:
            print(case, error, sep="\n")
            return error.what
        except RuntimeError as error:  # what a launcher returns
            print(case, error, sep="\n")
            return "failed launch"
        if not torch.equal(ours, expected):
            print(case)
            return "wrong result"
    return "nothing"
