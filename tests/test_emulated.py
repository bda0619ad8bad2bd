"""The CUDA launchers and kernels, run on an emulated GPU: results, memory errors, races, traffic."""

import contextlib
import dataclasses
import itertools
import random
import shutil
from pathlib import Path

import cases
import pytest
import torch
from emulated import CSRC, EmulatedOps
from numerics import assert_error_at_most_peer
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

dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module")
def ops():
    with contextlib.closing(EmulatedOps("sm_90a")) as emulated:
        yield emulated


def in_float64(arguments):
    """The same arguments with every tensor in float64."""
    if isinstance(arguments, torch.Tensor):
        return arguments.double()
    return type(arguments)(map(in_float64, arguments)) if isinstance(arguments, tuple | list) else arguments


# ------------------------------------------------------------------------------------------------ to the bit


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
    return getattr(ops, name)(*arguments), getattr(reference, name)(*in_float64(arguments)).to(case.dtype)


@pytest.mark.parametrize("case", matrix(), ids=str)
def test_depthwise_exactly(ops, case):
    torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)


@dtype
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("size", [(32, 32), (7, 7), (1, 1), (3, 70)], ids=str)
def test_pool_exactly(ops, dtype, layout, size):
    torch.manual_seed(0)
    x = LAYOUTS[layout](dyadic(3, 33, *size, most=2, step=0.25, dtype=dtype))
    arguments = (x, *dyadic_vectors(33, dtype), "relu")
    for order in ORDERS:
        ops.device.order = order
        y = ops.activate_pool(*arguments)
        torch.testing.assert_close(y, reference.activate_pool(*in_float64(arguments)).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("case", cases.EMPTY_CASES, ids=str)
def test_empty(ops, case):
    x, weight = cases.make_input(case, torch.float16), cases.make_weight(case, torch.float16)
    vectors = cases.make_vectors(case, torch.float16, 3)
    assert ops.fused_depthwise(x, weight, *vectors).shape == x.shape
    assert not ops.launches
    torch.testing.assert_close(ops.activate_pool(x, *vectors), reference.activate_pool(x, *vectors), equal_nan=True)


# ------------------------------------------------------------------------------------------------ accuracy, traffic


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_accuracy(ops, dtype, layout):
    """On normally distributed data; the peer is eager PyTorch, which rounds after each step."""
    case = cases.Case(2, 16, 32, 32, 9, 9)
    x, weight = cases.make_input(case, dtype, layout), cases.make_weight(case, dtype)
    vectors = cases.make_vectors(case, dtype, 6)
    peer_vectors = [vector.to(dtype) for vector in vectors]
    ops.device.order = "forward"

    def compare(name, *arguments, peer_arguments):
        exact, peer = getattr(reference, name)(*in_float64(arguments)), getattr(reference, name)(*peer_arguments)
        assert_error_at_most_peer(getattr(ops, name)(*arguments), peer, exact, f"{name} {layout} {dtype}")

    compare("depthwise_conv2d", x, weight, peer_arguments=(x, weight))
    compare("activate_pool", x, *vectors[:3], peer_arguments=(x, *peer_vectors[:3]))
    for prologue in (None, slice(3, 6)):
        arguments, peer_arguments = (
            (x, weight, *v[:3], "gelu", True, None if prologue is None else tuple(v[prologue]))
            for v in (vectors, peer_vectors)
        )
        compare("fused_depthwise", *arguments, peer_arguments=peer_arguments)


def test_other_device():
    """What the emulated device is reaches the launcher and chooses the code."""
    case = Case((9, 9), torch.float16, "contiguous", (14, 14), 1, 3, "forward", False, False, False, True)
    with contextlib.closing(EmulatedOps("sm_80", sm_count=2)) as ops:
        torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)
        assert len(ops.launches) == 1


@dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_traffic(ops, dtype, layout):
    """No byte is read that is not needed, and each of the output's is written by one store."""
    case = cases.Case(2, 16, 32, 32, 9, 9)
    x, weight = cases.make_input(case, dtype, layout), cases.make_weight(case, dtype)
    vectors = cases.make_vectors(case, dtype, 6)
    ops.device.profile = True
    try:
        y = ops.fused_depthwise(x, weight, *vectors[:3], prologue=tuple(vectors[3:]))
    finally:
        ops.device.profile = False
    (launch,) = ops.launches
    print(launch.profile.report())
    assert launch.profile.loads.unique_bytes == sum(tensor.nbytes for tensor in (x, weight, *vectors))
    assert launch.profile.stores.bytes == launch.profile.stores.unique_bytes == y.nbytes


# ------------------------------------------------------------------------------------------------ planted bugs

# What the suite must find: (correct text, text with the bug, what is reported).
PLANTED = {
    "halo_one_row_short": (
        "tile.in_rows = tile.strip_rows() * Traits::kStripH + tile.tap_rows - 1;",
        "tile.in_rows = tile.strip_rows() * Traits::kStripH + tile.tap_rows - 2;",
        {"wrong result", "uninitialised read", "out-of-bounds", "race"},
    ),
    "missing_barrier": (
        "__syncthreads();\n      if (has_strip) accumulate();",
        "if (has_strip) accumulate();",
        {"race", "uninitialised read"},
    ),
    "missing_zero_fill": ("h < 0 || h >= params_.height", "h >= params_.height", {"out-of-bounds"}),
    "padding_of_even_kernels": (
        "origin_col = tile_col + tap_col0 - params.pad_left;",
        "origin_col = tile_col + tap_col0 - params.kernel_w / 2;",
        {"wrong result"},
    ),
    "unguarded_tail": (
        "if (!has_strip || plane >= planes) return;",
        "if (!has_strip) return;",
        {"out-of-bounds", "second write"},
    ),
    "rows_written_twice": (
        "if (strip_row + i >= tile.height || h >= params.height) return;",
        "if (h >= params.height) return;",
        {"second write", "global race", "wrong result"},
    ),
}


def plant(name, correct, planted):
    """A copy of the sources with a bug, in float16 only; in a folder that stays, so that it is compiled once."""
    csrc = Path(cache_dir(), "planted", name)
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(CSRC, csrc)
    for other in ("f32", "f64", "bf16"):
        (csrc / "cuda" / f"depthwise_direct_{other}.cu").unlink()
    dispatch, kernel = csrc / "cuda" / "elements.cuh", csrc / "cuda" / "depthwise_direct.cuh"
    lines = dispatch.read_text().splitlines(keepends=True)
    others = [line for line in lines if line.strip().startswith("case DType::") and "kFloat16" not in line]
    assert len(others) == 3
    dispatch.write_text("".join(line for line in lines if line not in others))
    text = kernel.read_text()
    assert text.count(correct) == 1, f"{kernel.name} has not {correct!r} once: plant the bug elsewhere"
    kernel.write_text(text.replace(correct, planted))
    return csrc


def first_finding(ops):
    for case in matrix():
        if case.dtype == torch.float16:
            try:
                ours, expected = run_exact(ops, case)
            except DeviceError as error:
                print(case, error, sep="\n")
                return error.what
            if not torch.equal(ours, expected):
                print(case)
                return "wrong result"
    return "nothing"


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug(name):
    correct, planted, reports = PLANTED[name]
    assert first_finding(EmulatedOps(csrc=plant(name, correct, planted))) in reports
