"""The CUDA launchers and kernels, run on an emulated GPU: results, memory errors, races, traffic."""

import contextlib

import cases
import pytest
import torch
from cases import slow
from emulated import EmulatedOps
from exact import Case, first_finding, in_float64, matrix, plant, run_exact
from numerics import assert_error_at_most_peer

from convmixer_fast import reference


@pytest.fixture(scope="module")
def ops():
    with contextlib.closing(EmulatedOps("sm_90a")) as emulated:
        yield emulated


# ------------------------------------------------------------------------------------------------ to the bit


# Every seventh case: in steps of 7 all pairs of dtype and layout come up, of which there are 40.
@pytest.mark.parametrize("case", [*matrix()[::7], *slow(*(c for i, c in enumerate(matrix()) if i % 7))], ids=str)
def test_depthwise_exactly(ops, case):
    torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)


@pytest.mark.parametrize("case", cases.EMPTY_CASES, ids=str)
def test_empty(ops, case):
    x, weight = cases.make_input(case, torch.float16), cases.make_weight(case, torch.float16)
    vectors = cases.make_vectors(case, torch.float16, 3)
    assert ops.fused_depthwise(x, weight, *vectors).shape == x.shape
    assert not ops.launches
    torch.testing.assert_close(ops.activate_pool(x, *vectors), reference.activate_pool(x, *vectors), equal_nan=True)


# ------------------------------------------------------------------------------------------------ accuracy, traffic


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, *slow(torch.float32, torch.bfloat16)], ids=lambda d: str(d)[6:])
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


@pytest.mark.slow
def test_older_device():
    """Before sm_80 the direct kernel takes the 16-bit types, too."""
    half = [case for case in matrix() if case.dtype.itemsize == 2 and case.layout in ("contiguous", "unaligned")]
    with contextlib.closing(EmulatedOps("sm_75")) as ops:
        for case in half:
            torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)
            assert "depthwise_direct_kernel" in ops.launches[-1].kernel


@pytest.mark.slow
def test_other_device():
    """What the emulated device is reaches the launcher and chooses the code."""
    case = Case((9, 9), torch.float16, "contiguous", (14, 14), 1, 3, "forward", False, False, False, True)
    with contextlib.closing(EmulatedOps("sm_80", sm_count=2)) as ops:
        torch.testing.assert_close(*run_exact(ops, case), rtol=0, atol=0)
        assert len(ops.launches) == 1


@pytest.mark.parametrize(
    "dtype", [torch.float16, *slow(torch.float64, torch.float32, torch.bfloat16)], ids=lambda d: str(d)[6:]
)
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

KERNEL, PLAN = "depthwise/direct/kernel.cuh", "depthwise/direct/plan.h"
# What the suite must find: (file, correct text, text with the bug, what is reported).
PLANTED = {
    "halo_one_row_short": (
        PLAN,
        "plan.in_rows = plan.strip_rows() * kDirectStripH + plan.tap_rows - 1;",
        "plan.in_rows = plan.strip_rows() * kDirectStripH + plan.tap_rows - 2;",
        {"wrong result", "uninitialised read", "out-of-bounds", "race"},
    ),
    "missing_barrier": (
        KERNEL,
        "__syncthreads();\n      if (has_strip) accumulate();",
        "if (has_strip) accumulate();",
        {"race", "uninitialised read"},
    ),
    "missing_zero_fill": (KERNEL, "h < 0 || h >= params_.height", "h >= params_.height", {"out-of-bounds"}),
    "padding_of_even_kernels": (
        KERNEL,
        "origin_col = tile_col + tap_col0 - params.pad_left;",
        "origin_col = tile_col + tap_col0 - params.kernel_w / 2;",
        {"wrong result"},
    ),
    "unguarded_tail": (
        KERNEL,
        "if (!has_strip || map >= maps) return;",
        "if (!has_strip) return;",
        {"out-of-bounds", "second write"},
    ),
    "rows_written_twice": (
        KERNEL,
        "if (strip_row + i >= plan.height || h >= params.height) return;",
        "if (h >= params.height) return;",
        {"second write", "global race", "wrong result"},
    ),
}


def cases_of_float16():
    return [case for case in matrix() if case.dtype == torch.float16]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug(name):
    *bug, reports = PLANTED[name]
    with contextlib.closing(EmulatedOps(overlay=plant(name, *bug), launcher="depthwise_direct")) as ops:
        assert first_finding(ops, cases_of_float16()) in reports


@pytest.mark.slow
def test_nothing_is_found_without_a_bug():
    with contextlib.closing(EmulatedOps(launcher="depthwise_direct")) as ops:
        assert first_finding(ops, cases_of_float16()) == "nothing"
