"""explain() against what the launchers do on an emulated GPU."""

import contextlib
import ctypes
import operator
import re
import subprocess
import sys
from types import SimpleNamespace

import cases
import pytest
import torch
from emulated import EmulatedOps

import convmixer_fast
from convmixer_fast import cli, diagnostics
from convmixer_fast.diagnostics import GPUS, Gpu, short_name

SM_COUNT, BLOCKS_PER_SM = 4, 1  # fewer than registers, which the emulator does not know, or shared memory would allow
TURING = Gpu("T4", 75, 40, 64 << 10, 32, 16)
EMULATED = Gpu("emulated", 90, SM_COUNT, 228 << 10, 64, BLOCKS_PER_SM)

dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module")
def ops():
    """Launches are recorded, and not executed."""
    device = dict(sm_count=SM_COUNT, blocks_per_sm=BLOCKS_PER_SM, execute=False)
    with contextlib.closing(EmulatedOps("sm_90a", **device)) as emulated:
        yield emulated


def launch(ops, case, dtype, layout, fused):
    """The record of an emulated launch: fused_depthwise with GELU and a prologue, or depthwise_conv2d."""
    x, weight = cases.make_input(case, dtype, layout), cases.make_weight(case, dtype)
    if fused:
        vectors = cases.make_vectors(case, dtype, 6)
        ops.fused_depthwise(x, weight, *vectors[:3], prologue=tuple(vectors[3:]))
    else:
        ops.depthwise_conv2d(x, weight)
    (record,) = ops.launches
    return record


def explain(case, dtype, layout="contiguous", device=EMULATED, fused=False):
    steps = {"activation": "gelu", "prologue": True} if fused else {"activation": "none"}
    shape, kernel_size = (case.n, case.c, case.h, case.w), (case.kh, case.kw)
    return convmixer_fast.explain(shape, kernel_size, dtype, layout, device=device, **steps)


@dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_is_what_is_launched(ops, case, dtype, layout, fused):
    explained, record = explain(case, dtype, layout, fused=fused), launch(ops, case, dtype, layout, fused)
    assert explained.name == short_name(record.kernel)
    assert bool(explained.reason) == (explained.kernel == "direct")
    assert (explained.grid, 1, 1) == record.grid
    assert (explained.block, 1, 1) == record.block
    assert explained.smem_bytes == record.shared_bytes


@pytest.mark.parametrize(
    "case",
    [cases.Case(2, 3, 32, 32, 9, 9), cases.Case(1, 2, 136, 140, 9, 9), cases.Case(1, 1, 150, 136, 31, 8)],
    ids=str,
)
def test_bytes_are_those_moved(case):
    """By one block, which reads the weights of a channel once."""
    device = Gpu("one block", 90, 1, 228 << 10, 64, 1)
    with contextlib.closing(EmulatedOps("sm_90a", sm_count=1, blocks_per_sm=1, profile=True)) as ops:
        record = launch(ops, case, torch.float16, "contiguous", fused=False)
    explained = explain(case, torch.float16, device=device)
    assert explained.grid == 1
    print(explained)
    assert record.profile.loads.bytes + record.profile.stores.bytes == explained.predicted_bytes
    assert record.profile.loads.unique_bytes + record.profile.stores.unique_bytes == explained.necessary_bytes


def test_devices():
    """The paper's layer: registers, of 16 warps at 128, or shared memory decide how many blocks an SM holds."""
    case = cases.Case(64, 1536, 32, 32, 9, 9)
    for name, gpu in GPUS.items():
        explained = explain(case, torch.bfloat16, device=name, fused=True)
        assert explained.block == 32 and explained.items == 64 * 1536
        assert explained.blocks_per_sm == min(16, gpu.smem_per_sm // (explained.smem_bytes + 1024))
        assert explained.grid == gpu.sm_count * explained.blocks_per_sm
    assert explain(case, torch.bfloat16, device="H100") == explain(case, torch.bfloat16, device="H200")  # the same SMs
    older = explain(case, torch.bfloat16, device=TURING)
    assert older.kernel == "direct" and "sm_80" in older.reason and older.grid == older.items


@pytest.mark.parametrize(
    "dtype, layout, kernel_size, reason",
    [
        (torch.float32, "contiguous", 9, "float32"),
        (torch.float16, "channels_last", 27, "channels_last"),
        (torch.float16, "contiguous", (3, 58), "58"),
        (torch.bfloat16, "contiguous", (256, 3), "256"),
        (torch.float16, "contiguous", (255, 57), "no tile"),
    ],
)
def test_says_why_it_is_the_direct_kernel(dtype, layout, kernel_size, reason):
    explained = convmixer_fast.explain((2, 8, 32, 32), kernel_size, dtype, layout)
    assert explained.kernel == "direct" and reason in explained.reason


@pytest.mark.parametrize(
    "argument, value",
    [
        ("x_shape", (1, 2, 3)),
        ("x_shape", (1, 0, 3, 3)),
        ("x_shape", (1, 2, 3.5, 3)),
        ("x_shape", (2**40, 2**23, 1, 1)),
        ("x_shape", (1, 1, 2**31, 2**9)),
        ("x_shape", (1, 2**39, 1, 1)),
        ("kernel_size", 0),
        ("kernel_size", (3, 3, 3)),
        ("kernel_size", (2**40, 2**23)),
        ("kernel_size", (2**31, 7)),
        ("kernel_size", (1, 2**24 + 1)),
        ("dtype", torch.int8),
        ("layout", "nhwc"),
        ("activation", "silu"),
        ("device", "H300"),
    ],
)
def test_argument_that_does_not_fit(argument, value):
    arguments = {"x_shape": (1, 2, 3, 3), "kernel_size": 3, "dtype": torch.float16} | {argument: value}
    with pytest.raises(ValueError, match=argument) as error:
        convmixer_fast.explain(**arguments)
    assert repr(value) in str(error.value)


ANY_QUERIES = """
import ctypes, random
from convmixer_fast import _library
from convmixer_fast.diagnostics import _Choice, _Device, _Query

SIZES = [0, 1, 2, 7, 8, 9, 32, 33, 255, 256, 1000, 65535, 2**20]
SIZES += [2**31 - 1, 2**31, 2**32, 2**40, 2**61, 2**63 - 1, -1, -8, -(2**63)]
wrapped = lambda value: (value + 2**63) % 2**64 - 2**63
for seed in range(800):
    r = random.Random(seed)
    sizes = SIZES[: r.choice([12, 14, len(SIZES)])]
    shape, kernel = r.choices(sizes, k=4), r.choices(sizes, k=2)
    n, c, h, w = shape
    strides = r.choice([[c * h * w, h * w, w, 1], [c * h * w, 1, w * c, c], r.choices(SIZES, k=4)])
    strides = list(map(wrapped, strides))
    dtype, activation = r.choice([0, 1, 2, 3, 2, 3, 4, -1]), r.choice([0, 1, 2, 2**31 - 1])
    smem = r.choice([227 << 10, 0, -5, 2**31 - 1])
    device = _Device(r.choice([7, 8, 9]), 132, smem, 228 << 10)
    query = _Query((*shape,), (*strides,), (*strides,), (*kernel,), dtype, activation, r.random() < 0.5, True, device)
    print(seed, shape, strides, kernel, dtype, activation, device.major, smem, flush=True)
    choice, buffer = _Choice(), ctypes.create_string_buffer(4096)
    arguments = ctypes.byref(query), ctypes.byref(choice)
    library = _library._cpu_library
    library.convmixer_fast_mma_arguments(*arguments, buffer, r.choice([4096, 0, -1]))
    library.convmixer_fast_direct_arguments(*arguments, buffer, r.choice([4096, 0, -1]))
    library.convmixer_fast_wgrad_arguments(*arguments, buffer, r.choice([4096, 0, -1]))
    library.convmixer_fast_pool_arguments(*arguments, buffer, r.choice([4096, 0, -1]))
    fits = library.convmixer_fast_select(*arguments)
    assert not fits or min(choice.work_tiles, choice.x_elements_read + 1, choice.threads, choice.registers) > 0
    assert not fits or choice.name and bool(choice.reason) != bool(choice.tensor_cores)
"""


@pytest.mark.parametrize("size", [(32, 32), (20, 32), (16, 16), (8, 8), (31, 31)], ids=str)
def test_a_kernel_of_one_warp_gets_one_warp(size):
    """Also where rows at odd distances are more words than a warp can hold, so that others help to load them."""
    for distance in (size[1], size[1] + 1):
        query = diagnostics._query((17, 2, *size), 9, torch.float16, "contiguous", "gelu", True, True, GPUS["H200"])
        query.x_stride[:] = (2 * size[0] * distance, size[0] * distance, distance, 1)
        launch = diagnostics._launch("mma", query)
        assert launch.block == 32 or not launch.name.endswith("true>>"), launch.name


def test_one_large_image():
    """The distance of images does not matter if there is one."""
    assert convmixer_fast.explain((1, 512, 512, 512), 9, torch.float16).kernel == "tensor cores"
    assert convmixer_fast.explain((2, 512, 512, 512), 9, torch.float16).kernel == "direct"


def test_direct_launch():
    """The direct kernel's arguments come from the choice of a GPU without tensor cores."""
    shape, kernel_size = (2, 3, 20, 30), (3, 5)
    launch = diagnostics.depthwise_launch(shape, kernel_size, torch.float16, direct=True)
    older = convmixer_fast.explain(shape, kernel_size, torch.float16, device=TURING)
    assert (launch.name, launch.tile, launch.work_tiles) == (older.name, older.tile, older.items)
    assert (launch.block, launch.smem_bytes) == (older.block, older.smem_bytes)
    assert launch.arguments


def test_a_library_with_other_structs_is_refused():
    sizes = {"convmixer_fast_query_bytes": diagnostics._Query, "convmixer_fast_choice_bytes": diagnostics._Choice}
    functions = {name: lambda struct=struct: ctypes.sizeof(struct) for name, struct in sizes.items()}
    diagnostics._check_sizes(SimpleNamespace(_name="ours", **functions))
    for name in sizes:
        for wrong in ({name: lambda: 8}, {name: None}):
            with pytest.raises(
                ImportError, match="other.so has [08] bytes in the struct .* rebuild it by `make build`"
            ):
                diagnostics._check_sizes(SimpleNamespace(_name="other.so", **functions | wrong))


def test_any_query():
    """The compiled functions themselves answer whatever they are asked; a signal would be the answer otherwise."""
    done = subprocess.run([sys.executable, "-c", ANY_QUERIES], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{done.returncode} {done.stdout.splitlines()[-1:]} {done.stderr}"


def test_the_docstring_names_what_there_is():
    names = re.findall(r"``(convmixer_fast\.[\w.]+)``", convmixer_fast.explain.__doc__)
    assert names == ["convmixer_fast.diagnostics.GPUS", "convmixer_fast.diagnostics.Gpu"]
    for name in names:
        assert operator.attrgetter(name.partition(".")[2])(convmixer_fast) is getattr(
            diagnostics, name.rpartition(".")[2]
        )


def test_registers_are_those_of_the_launch_bounds():
    def registers(dtype, kernel_size, layout="contiguous"):
        return convmixer_fast.explain((2, 32, 32, 32), kernel_size, dtype, layout).registers

    assert [registers(torch.float16, k) for k in (9, 11, 31)] == [128, 168, 168]
    assert [registers(torch.float16, k, "channels_last") for k in (9, 11)] == [128, 255]
    assert [registers(dtype, 9) for dtype in (torch.float32, torch.float64)] == [128, 255]


def test_command_line(capsys):
    assert cli.main(["explain", "64", "1536", "32", "32", "--kernel-size", "9", "--prologue"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    explained = convmixer_fast.explain((64, 1536, 32, 32), 9, torch.float16, prologue=True)
    assert shown["grid"] == str(explained.grid) and shown["name"] == explained.name and shown["tile"] == "1 x 32 x 32"
    assert cli.main(["explain", "1", "8", "7", "7", "--kernel-size", "3x5", "--dtype", "float64"]) == 0
    assert "reason" in capsys.readouterr().out


@pytest.mark.parametrize("kernel_size", ["9", "9x7"])
def test_command_line_in_any_order(capsys, kernel_size):
    shape, options = ["64", "1536", "32", "32"], ["--kernel-size", kernel_size, "--prologue"]
    assert cli.main(["explain", *shape, *options]) == 0
    shown = capsys.readouterr().out
    size = 9 if kernel_size == "9" else (9, 7)
    assert convmixer_fast.explain((64, 1536, 32, 32), size, torch.float16, prologue=True).name in shown
    for words in ([*options, *shape], [*options[:2], *shape, options[2]], [f"--kernel-size={kernel_size}", *shape]):
        assert cli.main(["explain", *words, "--prologue"]) == 0
        assert capsys.readouterr().out == shown


@pytest.mark.parametrize("kernel_size", ["0", "-3", "9x0", "9x", "x", "9x7x5", "9,7", "1.5", "nine"])
def test_command_line_refuses_a_kernel_size(capsys, kernel_size):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", f"--kernel-size={kernel_size}", "1", "8", "7", "7"])
    assert stopped.value.code == 2
    reason = f"argument --kernel-size: {kernel_size!r} is not a kernel size, such as 9, or 9x7 for 9 rows and 7 columns"
    assert capsys.readouterr().err.splitlines()[-1] == f"convmixer-fast explain: error: {reason}"


def test_command_line_refuses_sizes_that_no_tensor_has(capsys):
    huge = "9" * 20
    for words, name in [
        ([huge, "1", "1", "1", "--kernel-size", "3"], "x_shape"),
        (["1"] * 4 + ["--kernel-size", huge], "kernel_size"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["explain", *words])
        assert stopped.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(rf"convmixer-fast explain: error: {name} must be .*2\*\*63 bytes, got .*{huge}.*", error)
