"""optimize() on the CPU: hostile sizes against float64, threads, and that what is packed follows the weights."""

import copy
import math
import os
import pickle
import signal
import subprocess
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from cases import slow
from networks import float64_logits, randomize
from numerics import assert_error_at_most_peer

from convmixer_fast import ConvMixer, cpu_engine, optimize
from convmixer_fast.cpu_engine import CpuEngine

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("two_threads", "product"),
]
BY_EITHER = pytest.mark.parametrize("product", ["own", "library"], indirect=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOGITS = 400  # at least, that an error is judged by: which of two ways to add is luckier with a few says little


def build(dim=32, depth=2, kernel_size=7, patch_size=2, n_classes=10, in_channels=3, seed=0, **options):
    torch.manual_seed(seed)
    return randomize(ConvMixer(dim, depth, kernel_size, patch_size, n_classes, in_channels, **options))


def images(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Channels, kernel, patch, classes; images. Around the vectors' and tiles' ends, and kernels larger than their map.
HOSTILE = [
    (dict(dim=1, kernel_size=1, patch_size=1, n_classes=1), (57, 3, 1, 1)),
    (dict(dim=3, kernel_size=2, patch_size=1, n_classes=33), (15, 3, 1, 37)),
    (dict(dim=17, kernel_size=9, patch_size=3, n_classes=2, in_channels=1), (2, 1, 8, 100)),
    (dict(dim=31, kernel_size=8, patch_size=2, n_classes=65), (43, 3, 11, 6)),
    (dict(dim=33, kernel_size=15, patch_size=1, n_classes=32), (29, 3, 3, 5)),
    (dict(dim=48, kernel_size=3, patch_size=4, n_classes=5, in_channels=5), (29, 5, 7, 70)),
    # From here on by Strassen's algorithm with 16 registers, one row later with 32.
    (dict(dim=272, depth=1, kernel_size=5, patch_size=2, n_classes=9), (2, 3, 36, 36)),
    (dict(dim=384, kernel_size=3, patch_size=2, n_classes=70), (3, 3, 14, 18)),
    (dict(dim=529, depth=1, kernel_size=5, patch_size=1, n_classes=33), (13, 3, 1, 3)),
    (dict(dim=560, depth=1, kernel_size=7, patch_size=3, n_classes=400), (1, 3, 40, 60)),
    (dict(dim=24, kernel_size=7, patch_size=1, n_classes=9, activation="relu"), (2, 3, 17, 15)),
    (dict(dim=24, kernel_size=5, patch_size=1, n_classes=9, residual=()), (4, 3, 12, 15)),
]


@BY_EITHER
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.float16), torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes, shape", HOSTILE, ids=[f"{sizes['dim']}-{sizes['kernel_size']}" for sizes, _ in HOSTILE]
)
def test_hostile_sizes(sizes, shape, dtype):
    def logits(seed):
        model, x = build(**sizes, seed=seed).to(dtype), images(shape, dtype, seed)
        with torch.no_grad():  # in the layout that suits the CPU
            eager = copy.deepcopy(model).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert CpuEngine.runs(x)
        return optimize(model)(x), eager, float64_logits(model, x)

    networks = math.ceil(LOGITS / (shape[0] * sizes["n_classes"]))
    assert_error_at_most_peer(*map(torch.cat, zip(*map(logits, range(networks)))), f"{sizes}, {dtype}")


BOTH_PRODUCTS = pytest.mark.parametrize("dim", [40, 400])  # of ours: the plain one and Strassen's


@BOTH_PRODUCTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dim, dtype):
    optimized = optimize(build(dim), dtype)
    x = images((3, 3, 22, 30), dtype)
    threads = torch.get_num_threads()
    try:
        logits = []
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            logits.append(optimized(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@BOTH_PRODUCTS
@pytest.mark.parametrize("unlike", [1, float("inf"), float("nan")])
def test_an_image_alone_gives_what_it_gives_in_a_batch(dim, unlike):
    optimized = optimize(build(dim))
    x = images((5, 3, 14, 10))
    alone = torch.cat([optimized(image[None]) for image in x])
    x[1] *= unlike
    others = [0, 2, 3, 4]
    assert torch.equal(alone[others], optimized(x)[others])


def test_weights_are_taken_by_name():
    """In whatever order the module has them."""
    optimized, x = optimize(build()), images((2, 3, 12, 12))
    other = copy.deepcopy(optimized)
    other._buffers = dict(reversed(other._buffers.items()))
    assert torch.equal(other(x), optimized(x))


@BY_EITHER
def test_results_are_not_overwritten_by_later_calls():
    optimized = optimize(build())
    x = images((2, 3, 12, 12))
    first = optimized(x)
    kept = first.clone()
    optimized(images((2, 3, 12, 12), seed=2))
    assert torch.equal(first, kept)


@BY_EITHER
@BOTH_PRODUCTS
def test_images_of_any_size_in_turn(dim):
    """The memory that calls share keeps nothing that a later one could see: not even NaN."""
    optimized = optimize(build(dim))
    shapes = [(2, 3, 30, 20), (1, 3, 4, 6), (3, 3, 16, 16)]
    expected = [copy.deepcopy(optimized)(images(shape)) for shape in shapes]
    assert optimized(torch.full((4, 3, 40, 40), float("nan"))).isnan().all()
    for shape, logits in zip(shapes, expected):
        assert torch.equal(optimized(images(shape)), logits)


def change_in_place(optimized, other):
    for buffer, new in zip(optimized.buffers(), other.buffers(), strict=True):
        buffer.copy_(new)


def change_data(optimized, other):
    for buffer, new in zip(optimized.buffers(), other.buffers(), strict=True):
        buffer.data = new.data.clone()


def change_buffers(optimized, other):
    for name, new in other.named_buffers():
        setattr(optimized, name, new)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_data,
        change_buffers,
        lambda optimized, other: optimized.load_state_dict(other.state_dict()),
        lambda optimized, other: optimized.load_state_dict(other.state_dict(), assign=True),
    ],
    ids=["in place", "data", "buffers", "load_state_dict", "load_state_dict assign"],
)
@pytest.mark.parametrize("inference", [False, True])
@BY_EITHER
def test_weights_that_change(change, inference):
    with torch.inference_mode(inference):
        x = images((2, 3, 12, 12))
        optimized, other = optimize(build()), optimize(build(seed=9))
        expected = other(x)
        assert not torch.equal(optimized(x), expected)
        change(optimized, other)
        assert torch.equal(optimized(x), expected)


@BY_EITHER
def test_copies_and_pickles_leave_out_what_is_packed():
    optimized = optimize(build(dim=64))
    x = images((1, 3, 8, 8))
    before = len(pickle.dumps(optimized))
    logits = optimized(x)
    assert len(pickle.dumps(optimized)) == before
    assert set(optimized.state_dict()) == {name for name, _ in optimized.named_buffers()}
    assert torch.equal(copy.deepcopy(optimized)(x), logits)


@pytest.mark.parametrize(
    "change",
    [lambda tensor: tensor.data.mul_(2), lambda tensor: tensor.numpy().__imul__(2)],
    ids=[".data", "NumPy"],
)
@pytest.mark.parametrize("name", ["patch", "depthwise", "pointwise", "vectors", "head_weight"])
@BY_EITHER
def test_refresh_after_changes_that_count_no_version(name, change):
    optimized, x = optimize(build()), images((2, 3, 12, 12))
    before = optimized(x)
    change(getattr(optimized, name))
    optimized.refresh()
    after = optimized(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(optimized)(x))


def test_refresh_after_another_process_changed_shared_weights():
    optimized, x = optimize(build()).share_memory(), images((2, 3, 12, 12))
    before = optimized(x)

    def change():
        optimized.head_bias += 1

    assert in_child(change) == 0
    optimized.refresh()
    torch.testing.assert_close(optimized(x), before + 1)


def in_child(work, seconds=60):
    """The exit status of a forked child that does this work, 1 if it raises; fails if it takes longer."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # OpenMP's other threads are not in the child
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the child did not end within {seconds} seconds")


def test_child_forked_while_another_thread_makes_the_engine(monkeypatch):
    """Whatever locks were held at the fork: that of the module here, and that of an engine."""
    optimized, x = optimize(build()), images((2, 3, 12, 12))
    expected = copy.deepcopy(optimized)(x)
    making, go_on = threading.Event(), threading.Event()
    make = CpuEngine.__init__

    def stop_on_the_way(engine, module):
        if threading.current_thread() is maker:
            making.set()
            assert go_on.wait(60)
        make(engine, module)

    monkeypatch.setattr(CpuEngine, "__init__", stop_on_the_way)
    maker = threading.Thread(target=optimized, args=(x,))
    maker.start()
    assert making.wait(60)
    assert optimized._kept._lock.locked()

    def call():
        assert torch.equal(optimized(x), expected)
        assert torch.equal(optimized(x), expected)

    try:
        status = in_child(call, 20)
    finally:
        go_on.set()
        maker.join()
    assert status == 0
    engine = optimized.engine(CpuEngine)
    with engine._lock:
        assert in_child(call, 20) == 0


def test_one_workspace_for_calls_in_turn():
    """It grows with the images, by another in its place, and stays as large."""
    optimized = optimize(build())
    engine, seen = optimized.engine(CpuEngine), []
    for batch in (1, 4, 2, 8, 1):
        optimized(images((batch, 3, 40, 40)))
        assert len(engine._workspaces) == 1
        seen.append(engine._workspaces[0].nbytes)
    assert seen[0] < seen[1] == seen[2] < seen[3] == seen[4]


def test_smaller_workspace_goes_before_the_larger_is_made(monkeypatch):
    optimized = optimize(build())
    optimized(images((1, 3, 40, 40)))
    engine, kept = optimized.engine(CpuEngine), []
    old = weakref.ref(engine._workspaces[0])
    call = cpu_engine.ops._call

    def watch(op, *arguments):
        kept.append(old() is not None)
        return call(op, *arguments)

    monkeypatch.setattr(cpu_engine.ops, "_call", watch)
    optimized(images((8, 3, 40, 40)))
    assert kept == [False, False]


def test_few_workspaces_are_kept():
    """Of calls that run at the same time; a call takes the smallest that fits, and gives it back as the last used."""
    optimized, x = optimize(build()), images((2, 3, 20, 20))
    engine = optimized.engine(CpuEngine)
    sizes = [50_000_000 + 1000 * size for size in (5, 1, 4, 2, 3, 6)]
    for size in sizes:
        workspace = torch.ops.convmixer_fast.mixer_workspace(engine._packed, size)
        engine._workspaces = [*engine._workspaces, workspace]
    smallest = engine._workspaces[1]
    optimized(x)
    assert [workspace.nbytes - 50_000_000 for workspace in engine._workspaces] == [4000, 2000, 3000, 6000][-3:] + [1000]
    assert engine._workspaces[-1] is smallest


def test_failed_call_keeps_no_workspace(monkeypatch):
    optimized, x = optimize(build()), images((2, 3, 20, 20))
    expected = optimized(x)
    engine = optimized.engine(CpuEngine)
    call = cpu_engine.ops._call

    def fail(op, *arguments):
        raise RuntimeError("planted")

    monkeypatch.setattr(cpu_engine.ops, "_call", fail)
    with pytest.raises(RuntimeError, match="planted"):
        optimized(x)
    assert engine._workspaces == []
    monkeypatch.setattr(cpu_engine.ops, "_call", call)
    assert torch.equal(optimized(x), expected)


def test_threads_and_models_at_once():
    models = [optimize(build(seed=seed)) for seed in range(2)]
    inputs = [images((2, 3, 8 + 2 * i, 12), seed=i) for i in range(3)]
    expected = [[copy.deepcopy(model)(x) for x in inputs] for model in models]
    wrong = []

    def work(turn):
        for i in range(30):
            m, j = (i + turn) % 2, (i // 2 + turn) % 3
            if not torch.equal(models[m](inputs[j]), expected[m][j]):
                wrong.append((turn, i))

    workers = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert all(len(model.engine(CpuEngine)._workspaces) <= 4 for model in models)


def test_operator_checks_its_memory():
    optimized = optimize(build())
    x = images((1, 3, 8, 8))
    shapes = optimized.patch, optimized.depthwise, optimized.head_weight
    ops = torch.ops.convmixer_fast
    packed = ops.mixer_pack(
        optimized.patch,
        optimized.depthwise,
        optimized.pointwise,
        optimized.vectors,
        optimized.head_weight,
        optimized.head_bias,
    )
    workspace = ops.mixer_workspace(packed, ops.mixer_workspace_bytes(x, *shapes))
    assert torch.equal(ops.mixer(x, *shapes, packed, workspace, 1, True, None), optimized(x))
    with pytest.raises(RuntimeError, match="packed must be contiguous uint8 of"):
        ops.mixer(x, *shapes, packed[:-16], workspace, 1, True, None)
    with pytest.raises(RuntimeError, match="workspace must be contiguous uint8 of"):
        ops.mixer(x, *shapes, packed, workspace[:-16], 1, True, None)
    with pytest.raises(RuntimeError, match="x must be \\(N, 3, H, W\\) with H >= 2"):
        ops.mixer(x[:, :, :1], *shapes, packed, workspace, 1, True, None)
    with pytest.raises(RuntimeError, match="patch must be float32, float16 or bfloat16, got float64"):
        ops.mixer_workspace_bytes(x.double(), *(tensor.double() for tensor in shapes))


def test_stages_are_shared_by_however_many_threads_come(tmp_path):
    program = Path(__file__).with_name("work_stealing_program.cpp")
    subprocess.run(["g++", "-O1", "-std=c++17", "-Wall", "-pthread", program, "-o", tmp_path / "program"], check=True)
    ran = subprocess.run([tmp_path / "program"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout
