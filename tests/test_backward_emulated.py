"""The gradients of depthwise_conv2d by the CUDA launchers and kernels, on an emulated GPU: exactness, accuracy,
determinism, traffic, and planted bugs."""

import contextlib
import dataclasses

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import slow
from emulated import EmulatedOps
from exact import LAYOUTS, ORDERS, Case, dyadic, first_finding, matrix, plant
from numerics import assert_error_at_most_peer

HALVES = [torch.float16, torch.bfloat16]

dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module")
def ops():
    with contextlib.closing(EmulatedOps("sm_90a", sm_count=3)) as emulated:
        yield emulated


@pytest.fixture(scope="module")
def ampere():
    """Compiled otherwise: bfloat16 has fewer instructions before sm_90."""
    with contextlib.closing(EmulatedOps("sm_80", sm_count=3)) as emulated:
        yield emulated


def autograd(x, weight, gy):
    """PyTorch's gradients of x, weight and bias, in their dtype."""
    kernel_h, kernel_w = weight.shape[2:]
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = weight.new_zeros(len(weight), requires_grad=True)
    padding = ((kernel_w - 1) // 2, kernel_w // 2, (kernel_h - 1) // 2, kernel_h // 2)
    F.conv2d(F.pad(x, padding), weight, bias, groups=len(weight)).backward(gy)
    return x.grad, weight.grad, bias.grad


def autograd_in_float64(*tensors):
    return autograd(*(tensor.double() for tensor in tensors))


def ours(ops, x, weight, gy):
    return ops.depthwise_conv2d_dgrad(gy, weight), *ops.depthwise_conv2d_wgrad(x, gy, weight.shape[2:])


def run_exact(ops, case):
    """All gradients of data whose sums need no rounding, and those of float64 rounded once, each as one tensor."""
    torch.manual_seed(0)
    shape = (case.batch, case.channels, *case.map)
    # The products are multiples of 1/16 below 1: the float32 sum of 2^20 of them is exact.
    x, gy = (LAYOUTS[case.layout](dyadic(*shape, most=1, step=0.25, dtype=case.dtype)) for _ in range(2))
    weight = dyadic(case.channels, 1, *case.kernel_size, most=1, step=0.125, dtype=case.dtype)
    ops.device.order = case.order
    gradients = ours(ops, x, weight, gy), (gradient.to(case.dtype) for gradient in autograd_in_float64(x, weight, gy))
    return tuple(torch.cat([gradient.flatten() for gradient in three]) for three in gradients)


# Every instantiation of the tensor-core kernel, blocks and passes of taps, splits, subtiles that do not exist, a last
# work tile with fewer images, rows at odd addresses, several chains of products (on one multiprocessor), tiles, fewer
# images than fill an M block; and the direct kernel on tiles, on several images, in several passes of taps.
MORE = [
    Case(kernel_size, dtype, layout, size, batch, channels, "forward", False, False, False, False)
    for kernel_size, dtype, layout, size, batch, channels in [
        ((3, 3), torch.float16, "contiguous", (16, 16), 17, 15),
        ((5, 5), torch.bfloat16, "contiguous", (32, 32), 3, 5),
        ((7, 7), torch.float16, "contiguous", (64, 32), 2, 2),
        ((9, 9), torch.bfloat16, "contiguous", (8, 8), 33, 3),
        ((9, 9), torch.float16, "contiguous", (7, 7), 33, 9),
        ((16, 16), torch.float16, "contiguous", (64, 32), 40, 4),
        ((5, 5), torch.float16, "unaligned", (14, 14), 9, 9),
        ((8, 8), torch.float16, "contiguous", (14, 14), 6, 2),
        ((2, 3), torch.float16, "contiguous", (128, 64), 1, 1),
        ((9, 9), torch.float16, "contiguous", (40, 24), 3, 1),
        ((7, 5), torch.float16, "contiguous", (264, 68), 1, 2),
        ((3, 11), torch.bfloat16, "contiguous", (70, 270), 1, 1),
        ((41, 60), torch.float16, "contiguous", (20, 24), 1, 2),
        ((130, 9), torch.float16, "contiguous", (9, 9), 1, 1),
        ((3, 3), torch.float16, "unaligned", (32, 32), 3, 2),
        ((5, 5), torch.bfloat16, "unaligned", (32, 32), 3, 2),
        ((7, 7), torch.float16, "contiguous", (65, 31), 2, 2),
        ((9, 9), torch.float16, "contiguous", (65, 31), 3, 2),
        ((3, 3), torch.float16, "contiguous", (14, 14), 9, 3),
        ((161, 3), torch.float16, "contiguous", (8, 8), 16, 1),
        ((95, 249), torch.float16, "contiguous", (33, 8), 1, 1),
        ((9, 9), torch.float32, "contiguous", (70, 80), 1, 3),
        ((3, 3), torch.float32, "contiguous", (14, 14), 17, 3),
        ((5, 5), torch.float32, "channels_last", (40, 33), 2, 24),
        ((50, 45), torch.float32, "contiguous", (9, 12), 1, 1),
        ((66, 66), torch.float32, "contiguous", (9, 12), 1, 1),
        ((520, 9), torch.float32, "contiguous", (9, 12), 1, 1),
        ((7, 7), torch.float16, "channels_last", (33, 20), 2, 40),
        ((4, 8), torch.float16, "channels_last", (14, 14), 2, 20),
    ]
]


QUICK = [*MORE, *matrix()[::11]]  # in steps of 11 all pairs of dtype and layout come up, of which there are 40


@pytest.mark.parametrize("case", QUICK + slow(*(case for case in matrix()[::5] if case not in QUICK)), ids=str)
def test_exactly(ops, case):
    torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MORE, *matrix()[3::7]], ids=str)
def test_exactly_before_sm_90(ampere, case):
    torch.testing.assert_close(*run_exact(ampere, case), rtol=0, atol=0)


@pytest.mark.slow
def test_older_device():
    """Before sm_80 the direct kernel takes the 16-bit types, too."""
    with contextlib.closing(EmulatedOps("sm_75")) as older:
        for case in [case for case in matrix() if case.dtype in HALVES][::4]:
            torch.testing.assert_close(*run_exact(older, case), rtol=0, atol=0)
            assert "depthwise_wgrad_direct_kernel" in older.launches[0].kernel


@dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_accuracy(ops, dtype, layout, case):
    """On normally distributed data; the peer is PyTorch's autograd in the same dtype, on contiguous tensors: of 31 x 31
    taps in bfloat16 and channels_last it takes minutes."""
    x, weight = cases.make_input(case, dtype, layout), cases.make_weight(case, dtype)
    gy = cases.make_input(case, dtype, layout, seed=3)
    ops.device.order = "forward"
    peer = autograd(x.contiguous(), weight, gy.contiguous())
    results = ours(ops, x, weight, gy), peer, autograd_in_float64(x, weight, gy)
    for name, *gradients in zip(("x", "weight", "bias"), *results):
        assert_error_at_most_peer(*gradients, f"gradient of {name} {case} {layout} {dtype}")


def test_accuracy_of_long_sums():
    """On one multiprocessor a thread adds up as much as it ever does, of numbers that mostly cancel."""
    case = cases.Case(1, 2, 40, 37, 31, 31)
    x, weight = cases.make_input(case, torch.float32), cases.make_weight(case, torch.float32)
    gy = cases.make_input(case, torch.float32, seed=3)
    with contextlib.closing(EmulatedOps(sm_count=1)) as one:
        results = ours(one, x, weight, gy), autograd(x, weight, gy), autograd_in_float64(x, weight, gy)
    for name, *gradients in zip(("x", "weight", "bias"), *results):
        assert_error_at_most_peer(*gradients, f"gradient of {name}, one multiprocessor")


def test_long_chains_are_bounded():
    """Tensor cores round every sum towards zero: what they add up in one go must not be long. Here each of 16 CTAs has
    512 maps of one channel, of numbers that hardly cancel; without a bound the sums are 1.1e-4 too small on average."""
    case = cases.Case(512, 16, 32, 32, 3, 3)
    x, gy = (cases.make_input(case, torch.float16, seed=seed) + 0.5 for seed in (0, 3))
    gy /= 64
    with contextlib.closing(EmulatedOps(sm_count=1)) as one:
        gweight, _ = one.depthwise_conv2d_wgrad(x, gy, (3, 3))
        assert [launch.grid[0] for launch in one.launches if "wgrad_mma" in launch.kernel] == [16]
    exact = autograd_in_float64(x, torch.zeros(16, 1, 3, 3), gy)[1]
    assert abs(((gweight.double() - exact) / exact).mean()) < 2**-15


SEVERAL_PASSES = [case for case in MORE if max(case.kernel_size) >= 60 and case.products < 1_000_000]


@pytest.mark.parametrize("case", [*MORE[::5], *(case for case in SEVERAL_PASSES if case not in MORE[::5])], ids=str)
def test_deterministic(ops, case):
    """The order of threads and blocks does not change a bit of sums that are rounded, by either kernel, in one or
    several passes of taps."""
    size = cases.Case(case.batch, case.channels, *case.map, *case.kernel_size)
    x, gy = (LAYOUTS[case.layout](cases.make_input(size, case.dtype, seed=seed)) for seed in (0, 3))
    results = []
    for ops.device.order in ORDERS:
        results.append(ops.depthwise_conv2d_wgrad(x, gy, case.kernel_size))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_only_what_is_wanted(ops, dtype, wanted):
    case = cases.Case(2, 3, 16, 12, 5, 5)
    x, gy = cases.make_input(case, dtype), cases.make_input(case, dtype, seed=3)
    both = ops.depthwise_conv2d_wgrad(x, gy, (5, 5))
    some = ops.depthwise_conv2d_wgrad(x, gy, (5, 5), weight=wanted[0], bias=wanted[1])
    for result, full, is_wanted in zip(some, both, wanted):
        assert torch.equal(result, full) if is_wanted else result is None


@pytest.mark.parametrize("case", cases.EMPTY_CASES, ids=str)
def test_empty(ops, case):
    """Nothing sums to zero."""
    x, gy = cases.make_input(case, torch.float16), cases.make_input(case, torch.float16)
    gweight, gbias = ops.depthwise_conv2d_wgrad(x, gy, (3, 3))
    assert gweight.shape == (case.c, 1, 3, 3) and gbias.shape == (case.c,)
    assert not gweight.any() and not gbias.any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_non_finite_pixels(ops, value):
    """They reach the gradients of their own channel only, whatever image or channel a block takes next."""
    case = cases.Case(9, 3, 16, 16, 7, 7)
    x, gy = cases.make_input(case, torch.float16), cases.make_input(case, torch.float16, seed=3)
    clean = ops.depthwise_conv2d_wgrad(x, gy, (7, 7))
    x[7, 1, 8, 8] = value
    gweight, gbias = ops.depthwise_conv2d_wgrad(x, gy, (7, 7))
    assert torch.equal(gbias, clean[1])
    assert not gweight[1].isfinite().any()
    assert torch.equal(gweight[::2], clean[0][::2])


# Maps and images: 8 work tiles per CTA, fewer than on a large GPU at C = 1536.
LARGE, SMALL = ((32, 32), 64), ((16, 16), 256)
TRAFFIC = [
    *((torch.float16, 9, *LARGE), (torch.bfloat16, 7, *LARGE), (torch.float32, 9, *LARGE)),
    *((torch.float16, 3, *SMALL), (torch.bfloat16, 5, *SMALL), (torch.float32, 3, *SMALL)),
]


@pytest.mark.parametrize("dtype, kernel_size, size, batch", TRAFFIC, ids=str)
def test_traffic(dtype, kernel_size, size, batch):
    """x and gy are read once, the workspace included; on tensor cores 16 bytes per thread, and shared memory feeds them
    without conflicts."""
    case = cases.Case(batch, 2, *size, kernel_size, kernel_size)
    x, gy = cases.make_input(case, dtype), cases.make_input(case, dtype, seed=3)
    with contextlib.closing(EmulatedOps(sm_count=1, profile=True)) as ops:
        results = ops.depthwise_conv2d_wgrad(x, gy, (kernel_size, kernel_size))
        profiles = [launch.profile for launch in ops.launches]
    print(*(profile.report() for profile in profiles))
    necessary = sum(tensor.nbytes for tensor in (x, gy, *results))
    moved = 32 * sum(profile.loads.sectors + profile.stores.sectors for profile in profiles)
    print(f"{moved / necessary:.4f} of the necessary bytes")
    assert moved <= 1.05 * necessary
    if dtype in HALVES:
        assert dict(profiles[0].loads.widths) == {16: (x.nbytes + gy.nbytes) // 16}
        assert profiles[0].shared["ldmatrix"].conflict == 1


# ------------------------------------------------------------------------------------------------ planted bugs

MMA, DIRECT, SHARE = "wgrad/mma/kernel.cuh", "wgrad/direct/kernel.cuh", "wgrad/share.h"
MMA_PLAN, LOADERS = "wgrad/mma/plan.h", "depthwise/mma/loaders/"
# What the suite must find: (file, correct text, text with the bug, what is reported).
PLANTED = {
    "dgrad_taps_as_they_are": (
        "depthwise/mma/toeplitz.cuh",
        "weight[params.flip_taps ? kernel - 1 - i : i]",
        "weight[i]",
        {"wrong result"},
    ),
    "wgrad_no_barrier_before_the_next_tile": (
        MMA,
        "    tile = following;\n    __syncthreads();",
        "    tile = following;",
        {"race"},
    ),
    "wgrad_stale_images": (
        LOADERS + "aligned_rows.cuh",
        "if constexpr (kZeroMissing) vectors_[i] = {};",
        "",
        {"wrong result"},
    ),
    "wgrad_stale_images_of_words": (
        LOADERS + "unaligned_rows.cuh",
        "if constexpr (kZeroMissing) words_[step] = {};",
        "",
        {"wrong result"},
    ),
    "wgrad_stale_images_of_tiles": (
        LOADERS + "tiles.cuh",
        "const bool has_col = image < copy.position.images && copy.has_col(col);",
        "const bool has_col = copy.has_col(col);",
        {"wrong result", "out-of-bounds"},
    ),
    "wgrad_sums_of_the_last_channel": (
        MMA,
        "scratch);\n      acc.clear();",
        "scratch);",
        {"wrong result"},
    ),
    "wgrad_subtiles_that_do_not_exist": (
        MMA,
        "if (subtile >= plan.shape.subtiles) return operand.zero_subtile;",
        "",
        {"wrong result", "uninitialised read", "out-of-bounds"},
    ),
    "wgrad_one_diagonal_further": (
        MMA,
        "diagonal = tap % kernel_w + plan.lead + kSubtile - 1;",
        "diagonal = tap % kernel_w + plan.lead + kSubtile;",
        {"wrong result"},
    ),
    "wgrad_tile_without_zero_fill": (
        LOADERS + "tiles.cuh",
        "return row >= 0 && row < height;",
        "return row < height;",
        {"out-of-bounds", "wrong result"},
    ),
    "wgrad_last_chain_only": (
        MMA,
        "diagonal = is_first ? sum : diagonal + sum;",
        "diagonal = sum;",
        {"wrong result"},
    ),
    "wgrad_chains_of_the_last_channel": (
        MMA,
        "is_first_chain = is_last_of_channel;",
        "is_first_chain = false;",
        {"wrong result"},
    ),
    "wgrad_gap_of_the_ring": (
        MMA_PLAN,
        "2 * (maps.row(row + 1 - plan.x.top) - maps.row(row - plan.x.top));",
        "2 * (maps.row(row + 1) - maps.row(row));",
        {"wrong result", "uninitialised read", "out-of-bounds"},
    ),
    "wgrad_partials_overlap": (
        SHARE,
        "return ((cta + channel_block) * channels + channel) * sums;",
        "return ((cta > channel_block ? cta : channel_block) * channels + channel) * sums;",
        {"second write", "global race", "wrong result", "uninitialised read"},
    ),
    "wgrad_direct_missing_barrier": (
        DIRECT,
        "__syncthreads();\n    if (has_taps) accumulate();",
        "if (has_taps) accumulate();",
        {"race", "uninitialised read"},
    ),
    "wgrad_direct_sums_over_tiles": (
        DIRECT,
        "__syncthreads();  // the tiles are no longer read",
        "",
        {"race"},
    ),
    "wgrad_direct_padding_of_even_kernels": (
        DIRECT,
        "col + pass_col - params.pad_left,",
        "col + pass_col - params.kernel_w / 2,",
        {"wrong result"},
    ),
}

MORE_OF_FLOAT16 = [dataclasses.replace(case, dtype=torch.float16) for case in MORE]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug(name):
    *bug, reports = PLANTED[name]
    with contextlib.closing(EmulatedOps(sm_count=1, overlay=plant(name, *bug))) as ops:
        assert first_finding(ops, MORE_OF_FLOAT16, run_exact) in reports


@pytest.mark.slow
def test_nothing_is_found_without_a_bug():
    with contextlib.closing(EmulatedOps(sm_count=1)) as ops:
        assert first_finding(ops, MORE_OF_FLOAT16, run_exact) == "nothing"
