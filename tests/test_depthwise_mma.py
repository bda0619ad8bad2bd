"""The tensor-core kernel on an emulated GPU: accuracy, traffic, what it promises, and planted bugs."""

import contextlib
import itertools
import random

import cases
import pytest
import torch
from cases import slow
from emulated import EmulatedOps
from exact import BATCHES, CHANNELS, LAYOUTS, MAPS, ORDERS, Case, first_finding, in_float64, plant, run_exact
from numerics import assert_error_at_most_peer, assert_one_of_two_nearest

from convmixer_fast import reference

HALVES = [torch.float16, torch.bfloat16]
# One for each way through the kernel: 3 to 9 with all Toeplitz fragments in registers, then the ring of 1 to 4 k-steps.
KERNELS = [(3, 3), (5, 5), (7, 7), (9, 9), (8, 8), (11, 11), (31, 31), (51, 5), (5, 51), (4, 27)]
# In channels_last: 7 and 9, then the ring of 1 and 2 k-steps.
KERNELS_CHANNELS_LAST = [(7, 7), (9, 9), (3, 3), (11, 11)]
KERNELS_OF_LAYOUTS = [("contiguous", size) for size in KERNELS] + [
    ("channels_last", size) for size in KERNELS_CHANNELS_LAST
]

dtype = pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
bfloat16_slow = pytest.mark.parametrize("dtype", [torch.float16, *slow(torch.bfloat16)], ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module")
def ops():
    with contextlib.closing(EmulatedOps("sm_90a", sm_count=3)) as emulated:
        yield emulated


@pytest.fixture(scope="module")
def ampere():
    """Compiled otherwise: bfloat16 has fewer instructions before sm_90."""
    with contextlib.closing(EmulatedOps("sm_80", sm_count=3)) as emulated:
        yield emulated


def ways_through_the_kernel():
    """Those in float16 with GELU and a prologue, and what differs from them in one thing, at 9x9; others are slow."""
    for dtype, kernel, activation, prologue in itertools.product(
        HALVES, KERNELS_OF_LAYOUTS, ("gelu", "relu", "none"), (True, False)
    ):
        others = (dtype != torch.float16) + (activation != "gelu") + (not prologue)
        quick = others == 0 or (others == 1 and kernel == ("contiguous", (9, 9)))
        name = f"{kernel[0]}-{kernel[1]}-{activation}-{prologue}-{str(dtype)[6:]}"
        yield pytest.param(dtype, *kernel, activation, prologue, marks=() if quick else pytest.mark.slow, id=name)


def check_accuracy(ops, case, dtype, layout, activation="gelu", prologue=True):
    """As exact as eager PyTorch, which rounds after each step, on normally distributed data."""
    x, weight = cases.make_input(case, dtype, layout), cases.make_weight(case, dtype)
    vectors = cases.make_vectors(case, dtype, 6)
    ops.device.order = "forward"

    def arguments(vectors):
        return x, weight, *vectors[:3], activation, True, tuple(vectors[3:]) if prologue else None

    ours = ops.fused_depthwise(*arguments(vectors))
    (launch,) = ops.launches
    assert "depthwise_mma_kernel" in launch.kernel
    exact = reference.fused_depthwise(*in_float64(arguments(vectors)))
    peer = reference.fused_depthwise(*arguments([vector.to(dtype) for vector in vectors]))
    assert_error_at_most_peer(ours, peer, exact, f"{layout} {case} {activation} prologue={prologue} {dtype}")


@pytest.mark.parametrize("dtype, layout, kernel_size, activation, prologue", list(ways_through_the_kernel()))
def test_every_way_through_the_kernel(ops, dtype, layout, kernel_size, activation, prologue):
    batch, channels = (5, 3) if layout == "contiguous" else (2, 24)
    check_accuracy(ops, cases.Case(batch, channels, 32, 24, *kernel_size), dtype, layout, activation, prologue)


NINE = [kernel for kernel in KERNELS_OF_LAYOUTS if kernel[1] == (9, 9)]


@pytest.mark.parametrize("kernel", [*NINE, *slow(*(k for k in KERNELS_OF_LAYOUTS if k not in NINE))], ids=str)
def test_every_loader(ops, kernel):
    """Unaligned rows, aligned rows of several warps, and tiles; in channels_last tiles."""
    sizes = {"contiguous": [(5, 3, 14, 14), (2, 2, 64, 40), (1, 2, 65, 65)], "channels_last": [(1, 12, 56, 56)]}
    layout, kernel_size = kernel
    for size in sizes[layout]:
        check_accuracy(ops, cases.Case(*size, *kernel_size), torch.float16, layout)


@dtype
def test_gelu_is_off_by_less_than_half_an_ulp(ops, dtype):
    """The result before rounding is closer than half an ulp: after it, every value is one of the two neighbours. In the
    tail it is closer than 2^-26."""
    x = torch.linspace(-12, 12, 4096).to(dtype).view(1, 1, 128, 32)
    one = torch.ones(1)
    y = ops.fused_depthwise(x, torch.ones(1, 1, 1, 1, dtype=dtype), 0 * one, one, 0 * one, "gelu", False)
    exact = x.double() * torch.special.ndtr(x.double())
    assert_one_of_two_nearest(y, exact, in_tail=2.0**-26)
    assert (y == exact.to(dtype))[exact.abs() > 2.0**-14].double().mean() > 0.85, "most are the nearest"


@pytest.mark.parametrize("arch", ["sm_90a", *slow("sm_80")])
def test_same_bits_whatever_the_number_of_sms(arch):
    """However many blocks share the work, in whatever order their threads run."""
    case = cases.Case(3, 5, 32, 32, 9, 9)
    x, weight = cases.make_input(case, torch.float16), cases.make_weight(case, torch.float16)
    vectors, results = cases.make_vectors(case, torch.float16, 3), []
    for sm_count, order in ((1, "forward"), (7, "reverse"), (132, 5)):
        with contextlib.closing(EmulatedOps(arch, sm_count=sm_count, order=order)) as other:
            results.append(other.fused_depthwise(x, weight, *vectors))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kernel_size, left, reach", [((9, 9), 4, 16), ((3, 3), 4, 16), ((11, 15), 8, 32)])
def test_non_finite_pixels(ops, value, kernel_size, left, reach):
    """A pixel that is not finite makes NaN of the outputs whose stored window holds it, in the rows its taps reach, and
    leaves all others as they were."""
    case = cases.Case(1, 1, 32, 32, *kernel_size)
    x, weight = cases.make_input(case, torch.float16), cases.make_weight(case, torch.float16)
    clean = ops.depthwise_conv2d(x, weight)
    row, col = 13, 18
    x[0, 0, row, col] = value
    y = ops.depthwise_conv2d(x, weight)[0, 0]
    expected = torch.zeros(32, 32, dtype=torch.bool)
    top = (kernel_size[0] - 1) // 2
    for window in range(4):  # stored columns 8 window .. 8 window + reach - 1 are columns 8 window - left ...
        if 8 * window - left <= col < 8 * window - left + reach:
            expected[max(0, row - (kernel_size[0] - 1 - top)) : row + top + 1, 8 * window : 8 * window + 8] = True
    tapped = ~reference.depthwise_conv2d(x.double(), weight.double())[0, 0].isfinite()
    assert (tapped <= expected).all(), "the reference's are among them"
    assert torch.equal(~y.isfinite(), expected)
    assert torch.equal(y[~expected], clean[0, 0][~expected])


@bfloat16_slow
@pytest.mark.parametrize("size, batch", [((32, 32), 64), ((16, 16), 256)], ids=str)
@pytest.mark.parametrize("kernel_size", [3, 9])
def test_traffic_of_the_paper(dtype, size, batch, kernel_size):
    """Each byte of x and y moves once, 16 bytes per thread; shared memory feeds the tensor cores without conflicts."""
    case = cases.Case(batch, 4, *size, kernel_size, kernel_size)
    x, weight = cases.make_input(case, dtype), cases.make_weight(case, dtype)
    vectors = cases.make_vectors(case, dtype, 6)
    # On one multiprocessor a CTA keeps to its channel for 16 work tiles, about as many as on a large GPU at C = 1536.
    with contextlib.closing(EmulatedOps(sm_count=1, profile=True)) as ops:
        y = ops.fused_depthwise(x, weight, *vectors[:3], prologue=tuple(vectors[3:]))
        (launch,) = ops.launches
    profile = launch.profile
    print(profile.report())
    necessary = sum(tensor.nbytes for tensor in (x, weight, y, *vectors))
    assert 32 * (profile.loads.sectors + profile.stores.sectors) <= 1.02 * necessary
    assert profile.loads.widths[16] == x.nbytes // 16
    assert dict(profile.stores.widths) == {16: y.nbytes // 16}
    assert profile.shared["ldmatrix"].conflict == 1
    # The stores of the inputs take two wavefronts where one would move their bytes, those of the outputs one.
    assert profile.shared["st"].conflict <= 1.52


# How many bytes are moved per byte that is necessary: memory moves sectors of 32 bytes, of which a map that does not
# fill them shares the first and the last with its neighbours; counted per access, as without caches.
UNALIGNED_MAPS = {
    (28, 28): 1.15,
    (14, 14): 1.26,
    (31, 31): 1.73,
    (15, 15): 2.27,
    (7, 7): 3.26,
    (30, 26): 1.24,
    (37, 36): 1.26,
    (33, 29): 1.79,
    (61, 9): 3.12,
    (3, 62): 1.24,
    (9, 2): 1.71,
    (1, 31): 1.82,
}
UNALIGNED_LAYOUTS = ("contiguous", "planes", "unaligned")


@dtype
@pytest.mark.parametrize("kernel_size", [(3, 3), (9, 9), (8, 8), (11, 11), (4, 27)], ids=str)
def test_unaligned_rows(ops, dtype, kernel_size):
    """Maps in every shape that is loaded ahead, on 16 bytes as the engine's are, and at any address."""
    layouts = itertools.cycle(UNALIGNED_LAYOUTS)
    for size, prologue in itertools.product([*UNALIGNED_MAPS, (64, 62)], (True, False)):
        batch = min(17, 2 + 1000 // (size[0] * size[1]))
        case = Case(kernel_size, dtype, next(layouts), size, batch, 2, "reverse", True, prologue, True, False)
        torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)


@bfloat16_slow
@pytest.mark.parametrize("size", UNALIGNED_MAPS, ids=str)
def test_traffic_of_unaligned_rows(dtype, size):
    """Each element is loaded and stored once, two per access but at the ends of a row."""
    case = Case((9, 9), dtype, "contiguous", size, 32, 3, "forward", False, False, False, False)
    with contextlib.closing(EmulatedOps(sm_count=1, profile=True)) as ops:
        torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)
        (launch,) = ops.launches
    loads, stores = launch.profile.loads, launch.profile.stores
    assert "(convmixer_fast::cuda::Loader)1" in launch.kernel
    pairs, single = stores.widths[4], stores.widths.get(2, 0)
    elements = case.batch * case.channels * size[0] * size[1]
    assert 2 * pairs + single == elements and stores.widths.keys() <= {2, 4}
    assert single <= 2 * elements // size[1] * (size[1] % 2), "at most two per row, if the width is odd"
    weights = loads.widths[2] - single  # each CTA loads those of its channels
    assert loads.widths[4] == pairs and weights % 81 == 0 and loads.widths.keys() == {2, 4}
    moved = 32 * (loads.sectors + stores.sectors) / (4 * elements + 2 * weights)
    print(f"{moved:.3f} of the necessary bytes")
    assert moved <= UNALIGNED_MAPS[size]


def test_large_maps_in_tiles(ops):
    """Maps too large to be held in registers, and kernels that leave no registers for them."""
    for kernel_size, size in (((5, 5), (65, 65)), ((5, 51), (20, 30)), ((3, 57), (16, 16))):
        case = Case(kernel_size, torch.float16, "contiguous", size, 2, 2, "forward", True, True, True, False)
        torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)


@bfloat16_slow
@pytest.mark.parametrize("size", [(56, 56), (28, 28), (14, 14), (7, 7), (15, 15)], ids=str)
def test_channels_last_of_real_nets(ops, dtype, size):
    """Any number of channels that is a multiple of 8, in maps of any width."""
    for channels, kernel_size, prologue in ((24, (7, 7), False), (8, (9, 9), True), (40, (3, 3), True)):
        batch = 1 if size == (56, 56) else 2 + 1000 // (size[0] * size[1])
        case = Case(kernel_size, dtype, "channels_last", size, batch, channels, "reverse", True, prologue, True, False)
        torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)


@bfloat16_slow
@pytest.mark.parametrize("arch", [*slow("sm_80"), "sm_90a"])
@pytest.mark.parametrize("size, batch", [((32, 32), 16), ((16, 16), 64)], ids=str)
def test_traffic_of_channels_last(dtype, arch, size, batch):
    """Each byte of x and y moves once, 16 bytes per thread: half a sector, whose other half a sibling moves at the same
    time. The transposition causes no bank conflicts at 32x32."""
    case = cases.Case(batch, 32, *size, 9, 9)
    x, weight = cases.make_input(case, dtype, "channels_last"), cases.make_weight(case, dtype)
    vectors = cases.make_vectors(case, dtype, 6)
    with contextlib.closing(EmulatedOps(arch, sm_count=1, profile=True)) as ops:
        y = ops.fused_depthwise(x, weight, *vectors[:3], prologue=tuple(vectors[3:]))
        (launch,) = ops.launches
    profile = launch.profile
    print(profile.report())
    assert "depthwise_mma_kernel" in launch.kernel
    necessary = sum(tensor.nbytes for tensor in (x, weight, y, *vectors))
    assert profile.loads.unique_bytes == necessary - y.nbytes
    assert 32 * (profile.loads.sectors + profile.stores.sectors) <= 2.02 * necessary
    assert profile.loads.widths[16] == x.nbytes // 16
    assert dict(profile.stores.widths) == {16: y.nbytes // 16}
    assert profile.shared["ldmatrix"].conflict == 1
    assert profile.shared["st"].conflict <= (1.01 if size == (32, 32) else 2)


@pytest.mark.slow
def test_channels_last_fits_small_shared_memory():
    """An SM holds two CTAs or, on sm_89, one: each byte of x is requested once, and the results are the same where
    tensor cores round alike."""
    case = cases.Case(3, 24, 32, 32, 9, 9)
    x, weight = cases.make_input(case, torch.float16, "channels_last"), cases.make_weight(case, torch.float16)
    results = []
    for arch in ("sm_90a", "sm_80", "sm_89"):
        with contextlib.closing(EmulatedOps(arch, sm_count=2, profile=True)) as ops:
            results.append(ops.depthwise_conv2d(x, weight))
            (launch,) = ops.launches
        assert launch.block[0] == 256
        assert launch.profile.loads.widths[16] == x.nbytes // 16
    _, *before_sm_90 = results
    assert torch.equal(*before_sm_90)


def any_launches(count, seed):
    """(kernel size, x), x of every loader and alignment; the first lead to every instantiation."""
    kernels, sizes = (*KERNELS, (1, 11)), ((32, 32), (14, 14), (64, 40), (65, 65))
    for kernel_size, size, layout in itertools.product(kernels, sizes, ("contiguous", "channels_last")):
        yield kernel_size, LAYOUTS[layout](torch.empty(3, 8, *size, dtype=torch.float16))
    rng = random.Random(seed)
    for _ in range(count):
        size = rng.choice((*MAPS, (49, 49), (200, 8), (rng.randint(1, 70), rng.randint(1, 70))))
        batch, channels, gap = rng.choice((*BATCHES, 5, 40)), rng.choice((1, 3, 8, 20)), rng.choice((0, 0, 1, 2, 4, 8))
        x = torch.empty(batch, channels, size[0], size[1] + gap, dtype=torch.float16)
        kernel_size = rng.choice((*KERNELS, (1, 11), (3, 57), (255, 3), (rng.randint(1, 40),) * 2))
        yield kernel_size, LAYOUTS[rng.choice(list(LAYOUTS))](x)[..., : size[1]]


def test_launches_are_possible():
    """Threads, shared memory and grid are what kernel and device allow, whatever the maps' size, layout and alignment,
    forward and backward. Nothing is executed."""
    seen = set()
    with contextlib.closing(EmulatedOps("sm_90a", execute=False)) as ops:
        for kernel_size, x in any_launches(600, seed=0):
            ops.depthwise_conv2d(x, torch.empty(x.shape[1], 1, *kernel_size, dtype=x.dtype))
            seen |= {launch.kernel for launch in ops.launches}
            ops.depthwise_conv2d_wgrad(x, x, kernel_size)
            seen |= {launch.kernel for launch in ops.launches}
    # All instantiations for one dtype and activation.
    assert sum("depthwise_mma_kernel" in kernel for kernel in seen) == 34, seen
    assert sum("depthwise_wgrad_mma_kernel" in kernel for kernel in seen) == 14, seen


# ------------------------------------------------------------------------------------------------ planted bugs

MMA = "depthwise/mma/"
LOADERS = MMA + "loaders/"
# What the suite must find: (file, correct text, text with the bug, what may be reported).
PLANTED = {
    "mma_halo_row": (
        MMA + "smem.h",
        "maps.origin = -maps.row(-top) + left;",
        "maps.origin = -maps.row(1 - top) + left;",
        {"wrong result", "out-of-bounds", "uninitialised read"},
    ),
    "mma_no_barrier_before_the_sums": (
        MMA + "kernel.cuh",
        "mover.write_inputs(params, plan, tile, smem.elementwise);\n    sync_cta<Traits>();",
        "mover.write_inputs(params, plan, tile, smem.elementwise);",
        {"race"},
    ),
    "mma_no_barrier_before_the_stores": (
        MMA + "kernel.cuh",
        "    sync_cta<Traits>();\n\n    mover.store_outputs",
        "    mover.store_outputs",
        {"race"},
    ),
    "mma_barrier_of_a_warp_only": (
        MMA + "kernel.cuh",
        "else __syncthreads();",
        "else __syncwarp();",
        {"race", "uninitialised read"},
    ),
    "mma_toeplitz_of_even_kernels": (
        MMA + "kernel.cuh",
        "left_ - static_cast<int>(params.pad_left)",
        "left_ - static_cast<int>(params.kernel_w / 2)",
        {"wrong result", "out-of-bounds"},
    ),
    "mma_no_zero_border": (
        MMA + "kernel.cuh",
        "vectors[i] = make_uint4(0, 0, 0, 0);",
        "if (i % 2) vectors[i] = make_uint4(0, 0, 0, 0);",
        {"uninitialised read"},
    ),
    "mma_stale_taps": (
        MMA + "kernel.cuh",
        "tile.index == 0 || remaining == share.count",
        "remaining == share.count",
        {"wrong result"},
    ),
    "mma_one_warp_of_several": (
        MMA + "plan.h",
        "plan.warps == 1 &&",
        "plan.shape.m_blocks == 1 &&",
        {"failed launch"},
    ),
    "mma_pitch": (
        MMA + "plan.h",
        "fixed ? kFixedPitch : input_cols",
        "fixed ? kFixedPitch + kSubtile : input_cols",
        {"wrong result", "out-of-bounds", "uninitialised read"},
    ),
    "mma_ring_slot": (
        MMA + "main_loop.cuh",
        "toeplitz_[(i - o + kSubtile) % kSubtile][s]",
        "toeplitz_[(i + o) % kSubtile][s]",
        {"wrong result"},
    ),
    "mma_ring_gap": (
        MMA + "main_loop.cuh",
        "gap_before_(pad_top % kSubtile)",
        "gap_before_((pad_top + 1) % kSubtile)",
        {"wrong result", "out-of-bounds", "uninitialised read"},
    ),
    "mma_residual_of_the_next_row": (
        MMA + "epilogue.cuh",
        "sums[o % 2], addresses",
        "sums[(o + 1) % 2], addresses",
        {"wrong result"},
    ),
    "aligned_rows_unguarded_tail": (
        LOADERS + "aligned_rows.cuh",
        "rows_in_last = image < images_in_last ? rows : 0;",
        "rows_in_last = rows;",
        {"out-of-bounds"},
    ),
    "aligned_rows_of_the_next_channel": (
        LOADERS + "aligned_rows.cuh",
        "from_ += tiles.after(is_last);",
        "from_ += tiles.next;",
        {"wrong result", "out-of-bounds"},
    ),
    "aligned_rows_below_the_map": (
        LOADERS + "aligned_rows.cuh",
        "(static_cast<int>(params.height) - row + 1) / 2",
        "(static_cast<int>(params.height) - row + 2) / 2",
        {"wrong result", "out-of-bounds", "second write"},
    ),
    "unaligned_rows_unguarded_tail": (
        LOADERS + "steps.cuh",
        "if (image < images_in_last) lane.steps |=",
        "lane.steps |=",
        {"out-of-bounds"},
    ),
    "unaligned_rows_all_even": (
        LOADERS + "unaligned_rows.cuh",
        "is_odd(from_) ? ~operand.odd_steps : operand.odd_steps",
        "operand.odd_steps",
        {"misaligned", "wrong result", "out-of-bounds"},
    ),
    "unaligned_rows_beyond_the_end": (
        LOADERS + "unaligned_rows.cuh",
        "where(col + 1 < width, col < width);",
        "where(true, col < width);",
        {"wrong result", "out-of-bounds", "second write"},
    ),
    "unaligned_rows_before_the_start": (
        LOADERS + "unaligned_rows.cuh",
        "where(col < width, col > 0 && col - 1 < width);",
        "where(col < width, col - 1 < width);",
        {"wrong result", "out-of-bounds", "second write"},
    ),
    "steps_without_gaps": (
        LOADERS + "steps.cuh",
        "distances.after[trailing_zeros(step + 1)]",
        "distances.after[0]",
        {"wrong result", "out-of-bounds", "second write"},
    ),
    "tile_without_zero_fill": (
        LOADERS + "tiles.cuh",
        "return row >= 0 && row < height;",
        "return row < height;",
        {"out-of-bounds", "wrong result"},
    ),
    "tile_prologue_beside_the_map": (
        LOADERS + "tiles.cuh",
        "if (has_col && copy.has_row(row)) prologue(vectors[i]);",
        "prologue(vectors[i]);",
        {"wrong result"},
    ),
    "tile_prologue_outside_the_map": (
        LOADERS + "tiles.cuh",
        "if (!copy.has_row(row) || !has_col[0]) pair.values[0] = 0;",
        "",
        {"wrong result"},
    ),
    "channels_last_transposed_pixels": (
        LOADERS + "channels_last.cuh",
        "octets[1].values)[c / 2] = __byte_perm(even, odd, 0x7632)",
        "octets[1].values)[c / 2] = __byte_perm(odd, even, 0x7632)",
        {"wrong result"},
    ),
    "channels_last_second_pixel": (
        LOADERS + "channels_last.cuh",
        "has_second = col + 1 < static_cast<int>(params.width);",
        "has_second = true;",
        {"wrong result", "out-of-bounds", "second write"},
    ),
    "channels_last_unguarded_channels": (
        MMA + "mover.cuh",
        "return tile.channel < static_cast<int>(params.channels);",
        "return true;",
        {"out-of-bounds", "second write"},
    ),
}


def random_cases(count, seed):
    """float16 and bfloat16 over every property that the kernel knows; more than one tile of a large map included."""
    rng = random.Random(seed)
    kernel_sizes = [*KERNELS, (1, 1), (2, 1), (15, 15), (6, 6), (3, 7), (9, 13)]
    maps = (*MAPS, (24, 8), (28, 28), (40, 64), (9, 131), (150, 20), (264, 64), (270, 66))  # the last two in tiles
    for _ in range(count):
        kernel_size, size = rng.choice(kernel_sizes), rng.choice(maps)
        flags = [rng.random() < probability for probability in (0.7, 0.5, 0.5, 0.5)]
        case = Case(kernel_size, rng.choice(HALVES), rng.choice(list(LAYOUTS)), size, rng.choice(BATCHES),
                    rng.choice((*CHANNELS, 16, 24)), rng.choice([*ORDERS, rng.randrange(100)]), *flags)  # fmt: skip
        if case.products > 4_000_000:
            case.batch, case.channels = rng.choice((1, 2)), rng.choice((1, 2))
        yield case


# Rare among the random ones: work tiles of four images, the last of one; octets in tiles, with a prologue, and in rows
# of odd width; aligned rows of several warps under 7 tap rows, and of maps whose last subtiles have fewer rows.
RARE = [
    *(
        Case((3, 3), torch.float16, layout, (16, 16), 17, 24, "forward", True, True, True, False)
        for layout in ("contiguous", "channels_last")
    ),
    Case((7, 7), torch.float16, "channels_last", (56, 56), 1, 8, "forward", True, True, True, False),
    Case((9, 9), torch.float16, "channels_last", (7, 7), 17, 8, "forward", True, True, True, False),
    Case((7, 7), torch.float16, "contiguous", (64, 40), 2, 2, "forward", True, True, True, False),
    Case((5, 5), torch.float16, "contiguous", (20, 32), 3, 3, "forward", True, True, True, False),
    Case((3, 3), torch.float16, "contiguous", (13, 24), 5, 2, "reverse", True, True, True, False),
    # A tile of 32 x 32, and fewer images than an M block would hold: larger ones do not fit shared memory.
    Case((255, 31), torch.float16, "contiguous", (8, 33), 1, 1, "forward", True, True, True, False),
    Case((161, 3), torch.float16, "contiguous", (8, 8), 16, 1, "forward", True, True, True, False),
    *(  # one M block, whose words one warp cannot hold
        Case((3, 3), torch.float16, "unaligned", size, 17, 2, "forward", True, True, True, False)
        for size in ((32, 32), (16, 16), (8, 8))
    ),
]


def searched_for_bugs():
    return [case for case in random_cases(300, seed=1) if case.dtype == torch.float16] + RARE


@pytest.mark.parametrize("case", [*RARE, *random_cases(120, seed=0)], ids=str)
def test_exactly(ops, case):
    ops.device.order = case.order
    torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*RARE, *random_cases(120, seed=2)], ids=str)
def test_exactly_before_sm_90(ampere, case):
    ampere.device.order = case.order
    torch.testing.assert_close(*run_exact(ampere, case), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug(name):
    *bug, reports = PLANTED[name]
    with contextlib.closing(EmulatedOps(sm_count=3, overlay=plant(name, *bug))) as ops:
        assert first_finding(ops, searched_for_bugs()) in reports


@pytest.mark.slow
def test_nothing_is_found_without_a_bug(ops):
    assert first_finding(ops, searched_for_bugs()) == "nothing"


@pytest.mark.fuzz
def test_fuzz():
    """On devices of three sizes."""
    count, seed = cases.fuzz_run(2000)
    with contextlib.ExitStack() as stack:
        devices = [
            stack.enter_context(contextlib.closing(EmulatedOps(arch, sm_count=sms)))
            for arch, sms in (("sm_80", 1), ("sm_90a", 132), ("sm_89", 4))
        ]
        for i, case in enumerate(random_cases(count, seed)):
            ours, expected = run_exact(devices[i % 3], case)
            assert torch.equal(ours, expected), f"case {i} of seed {seed}: {case}"
    print(f"{count} cases of seed {seed}: no finding")
