"""Global average pooling on an emulated GPU: every way to read the maps, results, traffic, and planted bugs."""

import contextlib
import ctypes
import dataclasses
import itertools
import math
import sys
from ctypes import Structure, c_bool, c_float, c_int32, c_int64
from pathlib import Path

import cases
import exact
import pytest
import torch
from cases import slow
from emulated import ElementwiseParams, EmulatedOps, PoolParams, Strides
from exact import ORDERS, dyadic, dyadic_vectors, first_finding, in_float64, plant
from numerics import assert_error_at_most_peer, assert_one_of_two_nearest
from ptxsim.toolchain import check_sizes

from convmixer_fast import reference
from convmixer_fast._types import ACTIVATIONS, DTYPES

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import kernel_report
import warp_trace

HALF = (torch.float16, torch.bfloat16)
ACCESSES = ("run", "pixel", "octet", "channels")  # enum class PoolAccess
MOST_INSTRUCTIONS = 25  # of a warp for 32 pixels: 32 x 32, float16, GELU


class Plan(Structure):
    """PoolPlan of csrc/cuda/pool/plan.h."""

    _fields_ = [
        ("access", c_int32),
        ("small_maps", c_bool),
        ("weight", c_float),
        *((name, c_int64) for name in ("channel_blocks", "pixels")),
        ("width", c_int32),
        *((name, c_int64) for name in ("row_stride", "col_stride")),
        ("step_cols", c_int32),
        *((name, c_int64) for name in ("step_offset", "wrap_offset")),
    ]

    @property
    def team(self):
        return {"octet": 32, "channels": 8}.get(ACCESSES[self.access], 8 if self.small_maps else 32)


@pytest.fixture(scope="module")
def ops():
    with contextlib.closing(EmulatedOps("sm_90a")) as emulated:
        check_sizes(emulated.program.lib, {"size_of_pool_plan": Plan})
        yield emulated


def plan_of(ops, shape, strides, dtype, address=1 << 20, activation="gelu"):
    """The kernel's arguments for maps that need not exist."""
    step = ElementwiseParams(*[address] * 3, DTYPES[torch.float32].code, ACTIVATIONS[activation].code)
    params = PoolParams(address, address, *shape, Strides(*strides), DTYPES[dtype].code, step)
    plan = Plan()
    ops.program.lib.choose_pool_plan(ctypes.byref(params), ctypes.byref(plan))
    return params, plan


# ------------------------------------------------------------------------------------------------ layouts


def strided(strides_of):
    """A layout by its strides, given channels, height, width and the elements of a map up to the next 16 bytes; what
    lies between its elements is NaN."""

    def layout(x):
        n, c, h, w = x.shape
        strides = strides_of(c, h, w, -(-h * w // 8) * 8)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides))
        return torch.full((extent,), torch.nan, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)

    return layout


LAYOUTS = exact.LAYOUTS | {
    "images_apart": strided(lambda c, h, w, pitch: (c * pitch + 8, pitch, w, 1)),
    "images_apart_unaligned": strided(lambda c, h, w, pitch: (c * pitch + 1, pitch, w, 1)),
    "maps_apart_unaligned": strided(lambda c, h, w, pitch: (c * (pitch + 1) * 8, pitch + 1, w, 1)),
    "rows_apart": strided(lambda c, h, w, _: (c * h * (w + 8), h * (w + 8), w + 8, 1)),
    "pixels_apart": strided(lambda c, h, w, _: (c * h * w * 8, h * w * 8, w * 8, 8)),
    "octets_apart": strided(lambda c, h, w, _: (h * w * (c + 8) + h * 8, 1, w * (c + 8) + 8, c + 8)),
    "octets_apart_unaligned": strided(lambda c, h, w, _: (h * w * (c + 1), 1, w * (c + 1), c + 1)),
    "octets_padded": strided(lambda c, h, w, _: (h * w * -(-c // 8) * 8, 1, w * -(-c // 8) * 8, -(-c // 8) * 8)),
    "octet_rows_unaligned": strided(lambda c, h, w, _: (h * (w * c + 1) * 8, 1, w * c + 1, c)),
}

# How a map is read: {(layout, channels, size): access in 16-bit types, in float32}, and by what team.
CHOICES = {
    ("contiguous", 3, (32, 32)): ("run 8", "run 8"),
    ("contiguous", 3, (16, 16)): ("run 8", "run 8"),
    ("contiguous", 3, (33, 32)): ("run 8", "run 32"),
    ("contiguous", 3, (65, 32)): ("run 32", "run 32"),
    ("contiguous", 40, (7, 7)): ("pixel 8", "pixel 8"),
    ("contiguous", 1, (7, 7)): ("pixel 8", "pixel 8"),
    ("contiguous", 3, (15, 15)): ("pixel 8", "pixel 8"),
    ("contiguous", 3, (31, 31)): ("pixel 32", "pixel 32"),
    ("contiguous", 3, (14, 14)): ("pixel 8", "run 8"),
    ("contiguous", 40, (1, 1)): ("octet 32", "channels 8"),
    ("unaligned", 3, (32, 32)): ("pixel 32", "pixel 32"),
    ("planes", 3, (7, 7)): ("run 8", "run 8"),
    ("planes", 3, (14, 14)): ("run 8", "run 8"),
    ("images_apart", 3, (15, 15)): ("run 8", "run 8"),
    ("images_apart_unaligned", 3, (32, 32)): ("pixel 32", "pixel 32"),
    ("maps_apart_unaligned", 3, (32, 32)): ("pixel 32", "pixel 32"),
    ("rows_apart", 3, (32, 32)): ("pixel 32", "pixel 32"),
    ("pixels_apart", 3, (32, 32)): ("pixel 32", "pixel 32"),
    ("transposed", 3, (32, 16)): ("pixel 32", "pixel 32"),
    ("channels_last", 40, (7, 7)): ("octet 32", "channels 8"),
    ("channels_last", 33, (7, 7)): ("channels 8", "channels 8"),
    ("channels_last", 1, (32, 32)): ("run 8", "run 8"),
    ("channels_last_unaligned", 40, (7, 7)): ("channels 8", "channels 8"),
    ("octets_apart", 40, (7, 7)): ("octet 32", "channels 8"),
    ("octets_padded", 33, (7, 7)): ("channels 8", "channels 8"),
    ("octets_apart_unaligned", 40, (7, 7)): ("channels 8", "channels 8"),
    ("octet_rows_unaligned", 40, (7, 7)): ("channels 8", "channels 8"),
}


@pytest.mark.parametrize("layout, channels, size", CHOICES)
def test_choice(ops, layout, channels, size):
    halves, single = CHOICES[layout, channels, size]
    along_channels = "octet" in halves or "channels" in halves
    double = "channels 8" if along_channels else "pixel 8" if size[0] * size[1] <= 256 else "pixel 32"
    for dtype in cases.DTYPES:
        x = LAYOUTS[layout](torch.ones(2, channels, *size, dtype=dtype))
        _, plan = plan_of(ops, x.shape, x.stride(), dtype, x.data_ptr())
        expected = {torch.float64: double, torch.float32: single}.get(dtype, halves)
        assert f"{ACCESSES[plan.access]} {plan.team}" == expected, dtype
        vectors = (torch.ones(channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32),) * 3
        assert (ops.activate_pool(x, *vectors, "none") == 3).all()
        assert f"PoolAccess){plan.access}, {str(plan.small_maps).lower()}>" in ops.launches[-1].kernel


@pytest.mark.parametrize(
    "shape, strides",
    [
        ((1, 2, 5, 2**31 + 11), (0, 2**40, 2**31 + 16, 1)),  # rows too long, with gaps
        ((1, 2, 2**31 + 11, 5), (0, 2**40, 8, 1)),  # a column of short rows
        ((1, 2, 1, 2**33 + 3), (0, 2**40, 2**33 + 3, 1)),  # one row that is too long
        ((1, 2, 2**17, 2**16), (0, 2**40, 2**16, 1)),  # rows that are one, which is too long
        ((1, 2, 2**33, 1), (0, 2**45, 3, 77)),  # one column
        ((1, 2, 7, 5), (0, 2**45, 2**41, 2**38)),
        ((1, 64, 2**17, 2**16), (0, 1, 2**22, 64)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_huge_maps(ops, shape, strides, dtype):
    """The walk over more pixels than 32 bits count meets each of them, by the arithmetic of PixelWalk."""
    _, plan = plan_of(ops, shape, strides, dtype)
    height, width = shape[2:]
    pixels = height * width
    assert plan.pixels == pixels and ACCESSES[plan.access] != "run"
    assert 0 < plan.width < 2**31 and 0 <= plan.step_cols < plan.width
    assert 0.5 <= pixels * plan.weight <= 1

    def offset(pixel):
        return pixel // plan.width * plan.row_stride + pixel % plan.width * plan.col_stride

    def place(pixel):  # of the tensor, in the order of rows or of columns
        by_columns = plan.col_stride == strides[2] != strides[3]
        h, w = (pixel % height, pixel // height) if by_columns else divmod(pixel, width)
        return h * strides[2] + w * strides[3]

    edges = [0, plan.width, 2 * plan.width, 2**30, 2**31, 2**32, pixels]
    for pixel in {edge + step for edge, step in itertools.product(edges, range(-40, 40))}:
        if 0 <= pixel < pixels:
            assert offset(pixel) == place(pixel)
        if 0 <= pixel < pixels - plan.team:
            wraps = pixel % plan.width + plan.step_cols >= plan.width
            assert offset(pixel + plan.team) == offset(pixel) + plan.step_offset + (plan.wrap_offset if wraps else 0)


# ------------------------------------------------------------------------------------------------ results


@dataclasses.dataclass
class Case:
    """Pixels whose sums are exact. A `value` takes the place of one map's last pixel, or of all if it is finite."""

    layout: str
    channels: int
    size: tuple[int, int]
    dtype: torch.dtype
    activation: str = "relu"
    batch: int = 2
    order: str | int = "forward"
    value: float = 0.0

    def __str__(self):
        fields = dataclasses.asdict(self) | {"dtype": str(self.dtype)[6:], "size": "{}x{}".format(*self.size)}
        return "-".join(map(str, fields.values()))

    def arguments(self):
        torch.manual_seed(0)
        x = dyadic(self.batch, self.channels, *self.size, most=2, step=0.25, dtype=self.dtype)
        bias, scale, shift = dyadic_vectors(self.channels, self.dtype)
        if self.value:
            pixels = slice(None) if math.isfinite(self.value) else slice(-1, None)
            x[0, self.channels // 2, pixels, pixels] = self.value
            scale = scale.where(scale != 0, 1)
        if self.activation == "gelu":  # whose values have no exact sums, so all pixels of a map are the same
            x = x.where(~x.isfinite(), x[..., :1, :1])
        return LAYOUTS[self.layout](x), bias, scale, shift, self.activation


def run_exact(ops, case):
    """The result and the float64 reference rounded once."""
    ops.device.order = case.order
    arguments = case.arguments()
    expected = reference.activate_pool(*in_float64(arguments)).to(case.dtype)
    return ops.activate_pool(*arguments), expected


SIZES = ((1, 1), (1, 9), (7, 7), (5, 1), (14, 14), (15, 15), (3, 70), (31, 31), (32, 32), (16, 16))
CHANNELS = (1, 3, 40, 33, 72)
MATRIX = [
    Case(layout, CHANNELS[(i + j) % 5], SIZES[(i + 3 * j) % 10], dtype, ("relu", "none")[i % 2], 2, ORDERS[i % 3])
    for i, (layout, dtype, j) in enumerate(itertools.product(LAYOUTS, cases.DTYPES, range(7)))
]
# More than a chunk of pixels per thread.
LARGE = [
    Case(layout, channels, (260, 256), dtype, batch=1)
    for layout, channels, dtype in (
        ("contiguous", 2, torch.float16),
        ("contiguous", 2, torch.float32),
        ("unaligned", 2, torch.float16),
        ("channels_last", 8, torch.float16),
        ("channels_last", 2, torch.float32),
    )
]


@pytest.mark.parametrize("case", [*MATRIX[::5], *LARGE, *slow(*(c for i, c in enumerate(MATRIX) if i % 5))], ids=str)
def test_exactly(ops, case):
    torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)


@pytest.mark.parametrize("own_dtype", [False, True], ids=["float32_vectors", "own_vectors"])
@pytest.mark.parametrize("layout", ["contiguous", "planes", "channels_last", "slice"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d)[6:])
def test_accuracy(ops, dtype, activation, layout, own_dtype):
    """On normally distributed data; the peer is eager PyTorch, which rounds after each step."""
    ops.device.order = "forward"
    for size in ((32, 32), (14, 14), (7, 7)):
        case = cases.Case(3, 40, *size, 1, 1)
        x = LAYOUTS[layout](cases.make_input(case, dtype))
        vectors = cases.make_vectors(case, dtype, 3)
        rounded = [vector.to(dtype) for vector in vectors]
        if own_dtype:
            vectors = rounded
        ours = ops.activate_pool(x, *vectors, activation)
        wanted = reference.activate_pool(*in_float64((x, *vectors, activation)))
        peer = reference.activate_pool(x, *rounded, activation)
        assert_error_at_most_peer(ours, peer, wanted, f"{layout} {size} {activation} {dtype} {own_dtype}")


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])
def test_gelu_of_every_value(ops, dtype):
    """Every finite number once, as a map of one pixel: one of the two numbers nearest to the result."""
    ops.device.order = "forward"
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()].view(1, -1, 1, 1)
    ones = torch.ones(x.shape[1])
    y = ops.activate_pool(x, 0 * ones, ones, 0 * ones)[0]
    assert_one_of_two_nearest(y, torch.nn.functional.gelu(x.double().flatten()), in_tail=2.0**-26)


NON_FINITE = {
    "run": ("contiguous", 3, (32, 32)),
    "run, its end": ("planes", 3, (7, 7)),
    "pixel": ("contiguous", 3, (7, 7)),
    "octet": ("channels_last", 40, (7, 7)),
    "channels": ("channels_last", 33, (7, 7)),
}


@pytest.mark.parametrize("name", NON_FINITE)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d)[6:])
def test_non_finite_pixels(ops, name, dtype):
    """An Inf or NaN makes of its map's mean what it makes of it in float64, and leaves the others as they were."""
    for value, activation in itertools.product((torch.inf, -torch.inf, torch.nan), ACTIVATIONS):
        case = Case(*NON_FINITE[name], dtype, activation, value=value)
        y, expected = run_exact(ops, case)
        assert torch.equal(y.isnan(), expected.isnan()), case
        assert torch.equal(y.isinf(), expected.isinf()), case
        assert torch.equal(y[y.isinf()], expected[y.isinf()]), case
        changed = case.channels // 2
        clean = ops.activate_pool(*dataclasses.replace(case, value=1.0).arguments())
        assert torch.equal(y[1], clean[1]) and torch.equal(y[0, :changed], clean[0, :changed]), case
        assert torch.equal(y[0, changed + 1 :], clean[0, changed + 1 :]), case


def test_large_values_do_not_overflow(ops):
    """A mean is not larger than the largest pixel, however large the sum is."""
    for dtype, layout in itertools.product((torch.bfloat16, torch.float32), ("contiguous", "channels_last")):
        x = LAYOUTS[layout](torch.full((1, 8, 32, 32), torch.finfo(dtype).max, dtype=dtype))
        vectors = torch.zeros(8), torch.ones(8), torch.zeros(8)
        for activation in ACTIVATIONS:
            y = ops.activate_pool(x, *vectors, activation)
            assert (y == torch.finfo(dtype).max).all(), (dtype, layout, activation)


@pytest.mark.parametrize("layout", ["contiguous", "planes", "channels_last", "slice"])
def test_same_bits_whatever_the_batch(ops, layout):
    case = cases.Case(5, 40, 14, 14, 1, 1)
    x, vectors = cases.make_input(case, torch.float16), cases.make_vectors(case, torch.float16, 3)
    together = ops.activate_pool(LAYOUTS[layout](x), *vectors)
    for i, order in enumerate(("forward", "reverse", 1, 2, 3)):
        ops.device.order = order
        assert torch.equal(ops.activate_pool(LAYOUTS[layout](x[i : i + 1]), *vectors)[0], together[i])


@pytest.mark.parametrize(
    "layout, channels, size",
    [
        ("contiguous", 64, (32, 32)),
        ("planes", 64, (32, 32)),
        ("contiguous", 64, (64, 64)),
        ("channels_last", 64, (32, 32)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=lambda d: str(d)[6:])
def test_traffic(ops, dtype, layout, channels, size):
    """Sectors of the maps and of the means, which are moved once; and the width of the accesses."""
    case = cases.Case(2, channels, *size, 1, 1)
    x, vectors = LAYOUTS[layout](cases.make_input(case, dtype)), cases.make_vectors(case, dtype, 3)
    ops.device.profile = True
    try:
        y = ops.activate_pool(x, *vectors)
    finally:
        ops.device.profile = False
    loads, stores = ops.launches[0].profile.loads, ops.launches[0].profile.stores
    print(ops.launches[0].profile.report())
    assert loads.unique_bytes == x.nbytes + sum(vector.nbytes for vector in vectors)
    assert stores.bytes == stores.unique_bytes == y.nbytes
    assert 32 * (loads.sectors + stores.sectors) <= 1.02 * (loads.unique_bytes + stores.unique_bytes)
    if not (layout == "channels_last" and dtype == torch.float32):  # a warp then reads 128 bytes by 4 of each lane
        assert loads.widths[16] == x.nbytes / 16


# ------------------------------------------------------------------------------------------------ machine code


@pytest.mark.slow
def test_instructions(ops):
    """No spills, and few enough instructions for a warp's 32 pixels that memory remains what the kernel waits for."""
    try:
        kernels = kernel_report.load_kernels(["sm_90a"], "pool")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert [kernel.name for kernel in kernels if kernel.resources.spills or kernel.resources.stack] == []
    for dtype, (layout, maps, warps) in itertools.product(
        HALF, ((torch.contiguous_format, 16, 4), (torch.channels_last, 64, 8))
    ):
        x = torch.empty(1, maps, 32, 32, dtype=dtype).contiguous(memory_format=layout)  # of one CTA
        params, plan = plan_of(ops, x.shape, x.stride(), dtype)
        assert plan.channel_blocks == 1
        name = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}[dtype]
        gelu, access = ACTIVATIONS["gelu"].code, f"PoolAccess){plan.access}, {str(plan.small_maps).lower()}>"
        (kernel,) = (k for k in kernels if f"<{name}, " in k.name and f"){gelu}, " in k.name and access in k.name)
        steps = warp_trace.trace(kernel.instructions, bytes(params) + bytes(plan), 90, warps)
        issued = warp_trace.opcodes(kernel.instructions, steps)
        per_pixel = issued.total() / (x.numel() / 32)
        print(f"{kernel.name}: {per_pixel:.1f} instructions per 32 pixels, {kernel.resources.registers} registers")
        assert per_pixel <= MOST_INSTRUCTIONS
        assert issued["MUFU.EX2"] == x.numel() / 32 and issued["LDG.E.128.CONSTANT"] == x.numel() / 256


# ------------------------------------------------------------------------------------------------ planted bugs

KERNEL, PLAN = "pool/kernel.cuh", "pool/plan.h"
WRONG = {"wrong result"}
# (file, correct text, text with the bug, what is reported).
PLANTED = {
    "unguarded_loads": (
        KERNEL,
        "if (first + i * kTeam < vectors) loaded[i]",
        "if (first < vectors) loaded[i]",
        {"out-of-bounds", "uninitialised read"},
    ),
    "unguarded_sums": (KERNEL, "if (first + i * kTeam >= vectors) break;", "", WRONG),
    "no_last_pixels": (KERNEL, "if (last < pixels) summand.add", "if (false) summand.add", WRONG),
    "last_pixels_twice": (KERNEL, "vectors * Traits::kVector + member;", "vectors * Traits::kVector;", WRONG),
    "rows_without_gaps": (KERNEL, "at_ += plan_.wrap_offset;", "", WRONG | {"out-of-bounds", "uninitialised read"}),
    "first_row_alone": (KERNEL, "if (col_ < plan.width) return;", "return;", WRONG | {"out-of-bounds"}),
    "shift_of_one_pixel": (KERNEL, "prologue.shift * count)", "prologue.shift)", WRONG),
    "same_chunk_again": (KERNEL, "sum_run<Traits>(map + first, ", "sum_run<Traits>(map, ", WRONG),
    "last_chunk_alone": (KERNEL, "sums_of[member][own + i] += sums[i]", "sums_of[member][own + i] = sums[i]", WRONG),
    "no_biases_yet": (
        KERNEL,
        "= prologue.bias;\n  __syncthreads();",
        "= prologue.bias;",
        {"race", "uninitialised read"},
    ),
    "no_sums_yet": (KERNEL, "__syncthreads();\n\n  if (writes) {", "if (writes) {", {"race", "uninitialised read"}),
    "unguarded_maps": (
        KERNEL,
        "if (exists && member == 0) write_mean",
        "if (member == 0) write_mean",
        {"second write", "out-of-bounds", "global race"},
    ),
    "unguarded_channels": (
        KERNEL,
        "if (first_channel + own < params.channels) {",
        "{",
        {"out-of-bounds", "uninitialised read"},
    ),
    "infinity_is_nan": (KERNEL, "fabsf(fminf(v, 16.f))", "fabsf(v)", WRONG),
    "small_sums_of_large_values": (PLAN, "left /= 2) plan.weight /= 2;", "left /= 2) plan.weight = 1;", WRONG),
    "unaligned_base": (PLAN, "reinterpret_cast<uintptr_t>(params.x) % 16 == 0", "true", {"misaligned"}),
    "unaligned_images": (
        PLAN,
        " && starts_on_16_bytes(params, params.batch, stride.n);",
        ";",
        {"misaligned"},
    ),
    "unaligned_maps": (
        PLAN,
        "starts_on_16_bytes(params, params.channels, stride.c);",
        "true;",
        {"misaligned"},
    ),
    "unaligned_octets": (PLAN, "params.channels % 8 == 0 && aligned", "params.channels % 8 == 0", {"misaligned"}),
    "part_of_an_octet": (
        PLAN,
        "params.channels % 8 == 0 && aligned",
        "aligned",
        {"out-of-bounds", "uninitialised read"},
    ),
    "unaligned_octet_rows": (
        PLAN,
        "starts_on_16_bytes(params, params.height, stride.h) &&",
        "",
        {"misaligned"},
    ),
    "gaps_taken_for_pixels": (
        PLAN,
        "params.height == 1 || stride.h == params.width * stride.w",
        "true",
        WRONG | {"out-of-bounds", "uninitialised read"},
    ),
}
HOSTILE = [case for case in MATRIX if case.dtype == torch.float16] + [
    *LARGE,
    Case(*NON_FINITE["run"], torch.float16, "gelu", value=torch.inf),
    Case("contiguous", 3, (32, 32), torch.bfloat16, "none", value=2.0**126),
]


def run_hostile(ops, case):
    """As run_exact, but of the GELU only what is infinite: its sums are not exact."""
    y, expected = run_exact(ops, case)
    return (y.isinf(), expected.isinf()) if case.activation == "gelu" else (y, expected)


@pytest.mark.slow
def test_hostile_cases_find_nothing(ops):
    assert first_finding(ops, HOSTILE, run_hostile) == "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug(name):
    *bug, reports = PLANTED[name]
    with contextlib.closing(EmulatedOps(overlay=plant(f"pool_{name}", *bug))) as ops:
        assert first_finding(ops, HOSTILE, run_hostile) in reports


@pytest.mark.slow
@pytest.mark.parametrize("step, reports", [("gridDim.x", {"nothing"}), ("1", {"second write", "global race"})])
def test_few_ctas(step, reports):
    """No launch that a test can run has more tiles than CTAs, so these are made few; once with tiles taken twice."""
    overlay = plant(f"pool_few_ctas_{step}", KERNEL, "params.batch * plan.channel_blocks, 1 << 30", "2, 1 << 30")
    path = overlay / "cuda" / KERNEL
    path.write_text(path.read_text().replace("tile += gridDim.x", f"tile += {step}"))
    with contextlib.closing(EmulatedOps(overlay=overlay)) as ops:
        many = [dataclasses.replace(case, channels=136, batch=3) for case in HOSTILE if case.size == (7, 7)]
        assert first_finding(ops, many, run_hostile) in reports
