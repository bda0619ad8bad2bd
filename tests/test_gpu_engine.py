"""The engine: its schedule on emulated kernels, its memory, its caches; what needs a GPU is marked so."""

import contextlib
import copy
import math
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import slow
from emulated import EmulatedOps
from networks import float64_logits, randomize
from numerics import assert_error_at_most_peer
from torch.utils._python_dispatch import TorchDispatchMode

from convmixer_fast import ConvMixer, _library, gpu_engine, optimize
from convmixer_fast.cpu_library_engine import CpuLibraryEngine
from convmixer_fast.gpu_engine import GpuEngine, GraphCache, Weights

CLASSES = 100
FEATURES = 400  # pooled ones, at least, that an error is judged by: all logits of an image share theirs


def build(dim=16, depth=2, kernel_size=5, patch_size=2, seed=0, **options):
    torch.manual_seed(seed)
    return randomize(ConvMixer(dim, depth, kernel_size, patch_size, CLASSES, **options), seed)


def images(*shape, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make_engine(model, dtype=torch.float32, chunk="auto", cuda_graphs=False, kind=GpuEngine) -> GpuEngine:
    """What the optimized model runs on a GPU, here on whatever device the model is; or another kind of engine."""
    return optimize(model, dtype, chunk=chunk, cuda_graphs=cuda_graphs).engine(kind)


EITHER_LAYOUT = pytest.mark.parametrize("kind", [GpuEngine, CpuLibraryEngine])


# ------------------------------------------------------------------------------------------------ the schedule


@pytest.fixture(scope="module")
def emulated():
    with contextlib.closing(EmulatedOps("sm_90a")) as ops:
        yield ops


NETWORKS = {
    "256/8, k 9, p 2": (dict(dim=256, depth=8, kernel_size=9, patch_size=2), (5, 3, 32, 32)),
    "33 x 33": (dict(dim=24, depth=3, kernel_size=9, patch_size=1), (3, 3, 33, 33)),
    "7 x 7, ReLU": (dict(dim=32, depth=3, kernel_size=7, patch_size=2, activation="relu"), (5, 3, 15, 14)),
    "patches longer than dim": (dict(dim=8, depth=2, kernel_size=8, patch_size=7), (4, 3, 50, 63)),
}


@pytest.mark.parametrize("dtype", [torch.float16, *slow(torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_schedule_on_emulated_kernels(emulated, monkeypatch, network, dtype):
    """Emulated depthwise and pooling kernels, library GEMMs: the reference's logits, in chunks of 2, 2 and 1 too."""
    options, shape = NETWORKS[network]
    monkeypatch.setattr(gpu_engine, "ops", emulated)
    results = []
    for seed in range(math.ceil(FEATURES / (shape[0] * options["dim"]))):
        model, x = build(**options, seed=seed).to(dtype), images(*shape, dtype=dtype, seed=seed)
        run = make_engine(model, dtype, chunk=2)
        with torch.no_grad():
            results.append((run(x), model(x), float64_logits(model, x)))
        assert "depthwise_mma" in depthwise_kernel(emulated, run, x) or dtype == torch.float32
    assert_error_at_most_peer(*map(torch.cat, zip(*results)), f"{network} {dtype}")


def depthwise_kernel(emulated, run, x):
    """The name of the kernel that the first depthwise step launches."""
    geometry, logits = run.geometry(x), x.new_empty(len(x), CLASSES)
    arena = gpu_engine.Arena(run.weights, geometry)
    for part, step in gpu_engine.steps(run.weights, x, logits, geometry, arena):
        step()
        if part == "depthwise":
            return emulated.launches[-1].kernel


@EITHER_LAYOUT
@pytest.mark.parametrize("chunk", ["auto", 1, 2, 3, 100])
@pytest.mark.parametrize("shape", [(5, 3, 23, 38), (1, 3, 2, 2), (7, 3, 12, 20), (0, 3, 8, 8)], ids=str)
def test_any_chunk(shape, chunk, kind):
    model, x = build().double(), images(*shape, dtype=torch.float64)
    logits = make_engine(model, torch.float64, chunk, kind=kind)(x)
    torch.testing.assert_close(logits, model(x).detach(), rtol=1e-12, atol=1e-12)


ENDINGS = pytest.mark.parametrize(
    "pool, flatten, head",
    [
        *((pool, flatten, False) for pool in ("avg", "max", "avgmax", "catavgmax") for flatten in (True, False)),
        *((pool, True, True) for pool in ("max", "avgmax", "catavgmax")),
        ("", False, False),
    ],
)


def build_ending(pool, flatten, head, dtype=torch.float32):
    """An optimized network of this package with another end."""
    optimized = optimize(build(), dtype)
    optimized.pool, optimized.flatten = pool, flatten
    if not head:
        optimized.head_weight = optimized.head_bias = None
    elif pool == "catavgmax":
        optimized.head_weight = torch.cat((optimized.head_weight, 2 * optimized.head_weight), 1)
    return optimized


@ENDINGS
@pytest.mark.parametrize("shape", [(5, 3, 23, 38), (1, 3, 2, 2), (0, 3, 8, 8)], ids=str)
def test_any_end(pool, flatten, head, shape):
    """As the operators give it, which tests compare with models; in chunks, too."""
    optimized, x = build_ending(pool, flatten, head, torch.float64), images(*shape, dtype=torch.float64)
    expected = optimized(x)  # float64: without an engine on a CPU
    for chunk in ("auto", 2):
        optimized.chunk = chunk
        optimized.refresh()
        result = optimized.engine(GpuEngine)(x)
        assert result.shape == expected.shape
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "chunk, batch, sizes",
    [
        ("auto", 64, [64]),
        (7, 64, 4 * [7] + 6 * [6]),
        (8, 64, 8 * [8]),
        (3, 7, [3, 2, 2]),
        (100, 5, [5]),
        (1, 3, [1, 1, 1]),
    ],
)
def test_chunks_are_of_equal_size(monkeypatch, chunk, batch, sizes):
    """All images at once unless a chunk is asked for; and then no short one at the end."""
    run, x, seen = make_engine(build(), chunk=chunk), images(batch, 3, 4, 4), []
    patchify = gpu_engine._patchify

    def count(x, *arguments):
        seen.append(len(x))
        patchify(x, *arguments)

    monkeypatch.setattr(gpu_engine, "_patchify", count)
    run(x)
    assert seen == sizes
    assert run.geometry(x).images == max(sizes)


def test_any_strides_of_the_images():
    run, x = make_engine(build()), images(3, 3, 9, 14)
    logits = run(x)
    inside = torch.zeros(3, 4, 12, 28)[:, 1:, 3:, ::2]
    inside.copy_(x)
    for other in (inside, x.to(memory_format=torch.channels_last), x.flip(0).flip(0)):
        assert torch.equal(run(other), logits)


def test_two_kernels_a_layer():
    model, x = build(depth=5), images(2, 3, 8, 8)
    run = make_engine(model)
    geometry = run.geometry(x)
    arena = gpu_engine.Arena(run.weights, geometry)
    schedule = gpu_engine.steps(run.weights, x, torch.empty(2, CLASSES), geometry, arena)
    assert [part for part, _ in schedule] == ["patchify"] * 2 + ["depthwise", "GEMM"] * 5 + ["pool + head"] * 2


# ------------------------------------------------------------------------------------------------ memory


class OnlyInto(TorchDispatchMode):
    """Fails at an operator whose result lies outside of the given memory, or that is not known to return at once.

    So a schedule that runs in it can be captured into a CUDA graph: no allocation, no synchronisation.
    """

    ASYNCHRONOUS = {
        "aten::mm.out",
        "aten::addmm.out",
        "aten::amax.out",
        "aten::mean.out",
        "aten::add_.Tensor",
        "aten::mul_.Tensor",
        "aten::copy_",
        "aten::zero_",
        "convmixer_fast::fused_depthwise.out",
        "convmixer_fast::activate_pool.out",
    }
    VIEWS = {
        *("aten::alias", "aten::as_strided", "aten::expand", "aten::permute", "aten::slice.Tensor"),
        *("aten::t", "aten::unbind.int", "aten::unsqueeze", "aten::view"),
    }

    def __init__(self, *tensors):
        super().__init__()
        self.memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.writes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name()
        assert name in self.ASYNCHRONOUS | self.VIEWS, f"{name} may allocate or wait"
        result = op(*args, **kwargs or {})
        for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(result)):
            assert tensor.untyped_storage().data_ptr() in self.memory, f"{name} allocates {tuple(tensor.shape)}"
        self.writes += name in self.ASYNCHRONOUS
        return result


@EITHER_LAYOUT
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_schedule_allocates_nothing_and_waits_for_nothing(chunk, kind):
    run, x = make_engine(build(), chunk=chunk, kind=kind), images(5, 3, 9, 14)
    geometry, logits = run.geometry(x), torch.empty(5, CLASSES)
    arena, weights = gpu_engine.Arena(run.weights, geometry), run.weights
    layers = [tensor for depthwise, _, pointwise, _ in weights.layers for tensor in (depthwise, pointwise)]
    with torch.no_grad(), OnlyInto(x, logits, *arena.buffers(), weights.patch, *weights.head, *layers) as checked:
        gpu_engine.run_all(gpu_engine.steps(weights, x, logits, geometry, arena))
    assert torch.equal(logits, run(x))
    steps_a_chunk = 2 + 1 + 2 * 2 + 2  # the patches and their zeros, GEMM, two layers, pool and head
    assert checked.writes == -(-5 // chunk) * steps_a_chunk


@ENDINGS
def test_no_end_allocates_or_waits(pool, flatten, head):
    optimized, x = build_ending(pool, flatten, head), images(5, 3, 9, 14)
    run = optimized.engine(GpuEngine)
    geometry, result, weights = run.geometry(x), run.weights.empty_result(x), run.weights
    arena = gpu_engine.Arena(weights, geometry)
    with torch.no_grad(), OnlyInto(x, result, *arena.buffers(), *weights.tensors()):
        gpu_engine.run_all(gpu_engine.steps(weights, x, result, geometry, arena))
    assert torch.equal(result, run(x))


def test_the_check_of_allocations_can_fail():
    x = torch.ones(1)
    with pytest.raises(AssertionError, match="aten::add.Tensor may allocate or wait"), OnlyInto(x):
        x + 1
    with pytest.raises(AssertionError, match="aten::_local_scalar_dense may allocate or wait"), OnlyInto(x):
        x.item()
    other = torch.ones(1)
    with pytest.raises(AssertionError, match=r"aten::copy_ allocates \(1,\)"), OnlyInto(x):
        other.copy_(x)


def test_two_buffers_of_activations():
    """Whatever the depth and the number of images, and kept from call to call; a larger chunk replaces them."""
    dim, element = 16, 4
    run = make_engine(build(dim, depth=7), chunk=2)
    for height, width, pitch in ((9, 7, 64), (3, 4, 16), (11, 4, 48)):
        for batch in (1, 2, 9):
            run(images(batch, 3, 2 * height, 2 * width))
        if pitch == 64:
            kept = run._idle[0][1].first.data_ptr()
        assert run.arena_bytes() == 2 * dim * 2 * 64 * element
        assert run._idle[0][1].first.data_ptr() == kept
    run(images(2, 3, 20, 20))
    assert run.arena_bytes() == 2 * dim * 2 * 104 * element


def test_result_is_not_touched_by_later_calls():
    run = make_engine(build())
    x, y = images(3, 3, 8, 8), images(3, 3, 8, 8, seed=2)
    logits = run(x)
    before = logits.clone()
    assert not torch.equal(run(y), before)
    assert torch.equal(logits, before)
    logits.zero_()
    assert torch.equal(run(x), before)


@EITHER_LAYOUT
def test_threads_do_not_share_buffers(kind):
    run = make_engine(build(dim=32, depth=4), kind=kind)
    inputs = [images(4, 3, 24 + 2 * (i % 3), 24, seed=i) for i in range(6)]
    alone = [run(x) for x in inputs]
    results = [[] for _ in inputs]

    def work(i):
        for _ in range(8):
            results[i].append(run(inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, several in zip(alone, results):
        assert len(several) == 8
        assert all(torch.equal(logits, expected) for logits in several)
    assert len(run._idle) <= gpu_engine._MAX_IDLE_ARENAS


@EITHER_LAYOUT
def test_inference_mode_and_back(kind):
    run, x = make_engine(build(), kind=kind), images(2, 3, 8, 8)
    with torch.inference_mode():
        logits = run(x)
    with torch.no_grad():
        assert torch.equal(run(x), logits)


def meta_weights(dim):
    """Of a float16 network with patches of 7 x 7, as far as the sizes of buffers and matrices go."""
    patch = torch.empty(dim, 147, dtype=torch.float16, device="meta")
    return Weights(patch, (3, 7, 7), None, [], None, "gelu", True)


class ImagesOnAGpu:
    """What is asked of images, without a GPU."""

    is_cuda, device = True, "cuda:1"

    def __init__(self, *shape):
        self.shape = shape

    def __len__(self):
        return self.shape[0]


@pytest.mark.parametrize(
    "dim, size, cache_mb, batch, images",
    [
        (1536, (32, 32), 60, 64, 9),  # 6.3 MB per image for two buffers, 4.7 MB for the matrix
        (1536, (32, 32), 50, 64, 7),
        (1536, (32, 32), 60, 5, 5),  # all fit
        (768, (32, 32), 60, 64, 19),
        (512, (14, 14), 60, 1000, 152),
        (1536, (32, 32), 4, 64, 64),  # not one image fits
        (256, (4, 4), 6, 1000, 1000),  # 376 fit, 333 would run: 42 tiles of a GEMM for 132 multiprocessors
        (1024, (16, 16), 60, 64, 64),  # 58 fit, but 32 and 32 would run: 256 tiles, and 264 are wanted
        (1024, (16, 16), 60, 116, 58),
        (1024, (16, 16), 60, 117, 58),  # 39, 39 and 39: 312 tiles
    ],
)
def test_images_in_l2(monkeypatch, dim, size, cache_mb, batch, images):
    """By itself, and as asked of a device with 132 multiprocessors."""
    weights = meta_weights(dim)
    assert gpu_engine.images_in_l2(weights, size, cache_mb << 20, 132, batch) == images
    gpu = SimpleNamespace(L2_cache_size=cache_mb << 20, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {"cuda:1": gpu}.__getitem__)
    assert gpu_engine.l2_chunk(ImagesOnAGpu(batch, 3, *(7 * side for side in size)), weights) == images


def test_l2_of_a_device_that_is_no_gpu():
    run, x = make_engine(build()), images(2, 3, 8, 8)
    with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu"):
        gpu_engine.l2_chunk(x, run.weights)


# ------------------------------------------------------------------------------------------------ graphs


class FakeGraphs:
    """In place of CUDA's: records what happens. A recorded forward pass doubles its images."""

    def __init__(self):
        self.events = []

    def record_shape(self, x):
        self.events.append(("record", tuple(x.shape)))

        class Recorded:
            def replay(_, x):
                self.events.append(("replay", tuple(x.shape)))
                return x * 2

        return Recorded()

    def wait(self, stream):
        self.events.append(("wait", stream))

    def record(self, stream):
        self.events.append(("fence", stream))


def test_graphs_are_recorded_once_a_shape_and_replayed_in_order():
    fake = FakeGraphs()
    cache = GraphCache(fake.record_shape, fake)
    x = torch.ones(2, 3)
    assert torch.equal(cache(x, "a"), 2 * x)
    cache(x, "b")
    one, other = [("wait", "a"), ("record", (2, 3)), ("replay", (2, 3)), ("fence", "a")], []
    other = [("wait", "b"), ("replay", (2, 3)), ("fence", "b")]
    assert fake.events == one + other


def test_graphs_of_the_shapes_used_last_are_kept():
    fake = FakeGraphs()
    cache = GraphCache(fake.record_shape, fake, limit=2)
    for size in (1, 2, 1, 3, 1, 2):
        cache(torch.ones(size))
    assert [event for event in fake.events if event[0] == "record"] == [("record", (n,)) for n in (1, 2, 3, 2)]
    assert cache.shapes() == [(1,), (2,)]


# ------------------------------------------------------------------------------------------------ streams


def address(tensor):
    """Of the memory in which it lies, alone or with others."""
    return tensor.untyped_storage().data_ptr()


def memory_of(weights):
    """The addresses of all tensors that hang on a Weights."""
    leaves = torch.utils._pytree.tree_leaves(list(vars(weights).values()))
    return {address(leaf) for leaf in leaves if torch.is_tensor(leaf)}


class Touched(TorchDispatchMode):
    """Collects the addresses of what operators read and write."""

    def __init__(self):
        super().__init__()
        self.memory = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        self.memory |= {address(leaf) for leaf in leaves if torch.is_tensor(leaf)}
        return result


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        pass

    def record_event(self):
        self.log.append(f"{self.name} notes what it has done")
        return self.name

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


class FakeCuda:
    """In place of torch.cuda, for CPU tensors, which then claim to be on a GPU: streams on which everything is done at
    once, and graphs whose replay does nothing.

    Attributes:
        stream: the current one; capturing: whether it is captured.
        log: what streams did with events; uses: (name of a stream, memory) as the allocator was told.
    """

    def __init__(self, monkeypatch):
        def record_stream(tensor, stream):
            self.uses.append((stream.name, address(tensor)))

        self.log, self.uses, self.capturing = [], [], False
        self.switch_to("home")
        fakes = dict(
            device=contextlib.nullcontext,
            stream=contextlib.nullcontext,
            graph=lambda *arguments, **options: contextlib.nullcontext(),
            Stream=lambda: FakeStream("recording", self.log),
            Event=lambda: SimpleNamespace(wait=lambda stream: None, record=lambda stream: None),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
            current_stream=lambda device=None: self.stream,
            is_current_stream_capturing=lambda: self.capturing,
        )
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
        monkeypatch.setattr(_library, "require_cuda", lambda: None)

    def switch_to(self, name):
        self.stream = FakeStream(name, self.log)


@pytest.fixture
def fake_cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize(
    "ending", [("avg", True, True), ("avg", True, False), ("avgmax", True, True), ("", False, False)]
)
@pytest.mark.parametrize("chunk", ["auto", 2])
def test_recorded_graph_holds_on_to_all_its_memory(fake_cuda, chunk, ending):
    """What the kernels of a replay read or write outlives the replay, whatever the stream; a stream is named once."""
    optimized, x = build_ending(*ending), images(5, 3, 8, 8)
    optimized.chunk = chunk
    run = optimized.engine(GpuEngine)
    geometry = run.geometry(x)
    arena = gpu_engine.Arena(run.weights, geometry)
    recorded = gpu_engine.Recorded(run.weights, x, geometry, arena)
    with torch.no_grad(), Touched() as graph:
        gpu_engine.run_all(gpu_engine.steps(run.weights, recorded.images, recorded.result, geometry, arena))
    assert graph.memory > memory_of(run.weights)
    for name in ("side", "other"):
        fake_cuda.switch_to(name)
        recorded.replay(x)
        recorded.replay(x)
    assert sorted(fake_cuda.uses) == sorted((name, memory) for name in ("side", "other") for memory in graph.memory)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_weights_outlive_calls_on_any_stream(fake_cuda, cuda_graphs):
    """And calls on other streams wait for the copies that the engine made on the first."""
    run, x = make_engine(build(), cuda_graphs=cuda_graphs), images(2, 3, 8, 8)
    run(x)
    fake_cuda.switch_to("other")
    run(x)
    for name in ("home", "other"):
        assert {memory for stream, memory in fake_cuda.uses if stream == name} >= memory_of(run.weights)
    if not cuda_graphs:  # those are put in order by their own event
        assert fake_cuda.log == ["home notes what it has done", "home waits for home", "other waits for home"]
    fake_cuda.uses.clear()
    run(x)
    assert fake_cuda.uses == []


def test_capture_by_the_caller_uses_no_stream(fake_cuda):
    """It runs nothing; and an event of before would be an error in it."""
    run, x = make_engine(build()), images(2, 3, 8, 8)
    run(x)
    fake_cuda.uses.clear(), fake_cuda.log.clear()
    fake_cuda.switch_to("captured")
    fake_cuda.capturing = True
    run(x)
    assert fake_cuda.uses == fake_cuda.log == []


def test_an_engine_made_while_the_caller_captures_is_not_kept(fake_cuda):
    """Its copies of the weights are written when that graph is replayed, and not before."""
    optimized = optimize(build())
    fake_cuda.capturing = True
    captured = optimized.engine(GpuEngine)
    fake_cuda.capturing = False
    kept = optimized.engine(GpuEngine)
    assert kept is not captured
    fake_cuda.capturing = True
    assert optimized.engine(GpuEngine) is kept


# ------------------------------------------------------------------------------------------------ weights


def test_weights_are_prepared_once_and_anew_when_they_change():
    model = build()
    optimized, x = optimize(model), images(2, 3, 8, 8)
    run = optimized.engine(GpuEngine)
    assert optimized.engine(GpuEngine) is run
    optimized.load_state_dict(optimize(build(seed=5)).state_dict())
    assert torch.equal(optimized.engine(GpuEngine)(x), make_engine(build(seed=5))(x))
    optimized.load_state_dict(optimize(model).state_dict())
    with torch.no_grad():
        optimized.head_bias += 1
        optimized.vectors.mul_(2)
    changed = optimized.engine(GpuEngine)
    assert not torch.allclose(changed(x), run(x) + 1)
    assert optimized.engine(GpuEngine) is changed
    assert optimized.double().engine(GpuEngine)(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["patch", "depthwise", "pointwise", "vectors", "head_weight"])
def test_refresh_after_a_change_that_counts_no_version(name):
    optimized, x = optimize(build()), images(2, 3, 8, 8)
    before = optimized.engine(GpuEngine)(x)
    getattr(optimized, name).data.mul_(2)
    optimized.refresh()
    after = optimized.engine(GpuEngine)(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, copy.deepcopy(optimized).engine(GpuEngine)(x))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        optimized = optimize(build(), torch.float64)
        other = optimize(build(seed=5), torch.float64).state_dict()
    x = images(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(optimized.engine(GpuEngine)(x), make_engine(build(), torch.float64)(x))
    with torch.inference_mode():
        optimized.load_state_dict(other)
    assert torch.equal(optimized.engine(GpuEngine)(x), make_engine(build(seed=5), torch.float64)(x))


def test_copies_have_memory_of_their_own():
    optimized, x = optimize(build()), images(2, 3, 8, 8)
    run = optimized.engine(GpuEngine)
    logits = run(x)
    twin = copy.deepcopy(optimized)
    assert twin.engine(GpuEngine) is not run
    assert torch.equal(twin.engine(GpuEngine)(x), logits)


# ------------------------------------------------------------------------------------------------ on a GPU

ENGINES = [dict(), dict(chunk=2), dict(cuda_graphs=True), dict(cuda_graphs=True, chunk=3)]
on_gpu = pytest.mark.cuda


def gpu_pair(dtype=torch.float16, **options):
    model = build(dim=64, depth=3, kernel_size=9).to("cuda", dtype)
    return model, optimize(model, **options)


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gpu_error_at_most_eagers(dtype, options):
    model, optimized = gpu_pair(dtype, **options)
    for shape in ((64, 3, 20, 22), (7, 3, 66, 66), (1, 3, 30, 30)):
        x = images(*shape, dtype=dtype, device="cuda")
        with torch.no_grad():
            assert_error_at_most_peer(optimized(x), model(x), float64_logits(model, x), f"{dtype} {options} {shape}")


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_gpu_shapes_that_change_and_views(options):
    _, optimized = gpu_pair(**options)
    _, plain = gpu_pair(chunk=options.get("chunk", "auto"))
    for i in range(30):
        x = images(1 + i % 5, 4, 32 + i % 11, 40, dtype=torch.float16, device="cuda", seed=i)[:, 1:, :, ::2]
        assert torch.equal(optimized(x), plain(x))
    if options.get("cuda_graphs"):
        assert len(optimized.engine(GpuEngine).graphs.shapes()) == gpu_engine._MAX_GRAPHS


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_gpu_allocates_the_logits_only(options):
    _, optimized = gpu_pair(**options)
    x = images(8, 3, 32, 32, dtype=torch.float16, device="cuda")
    optimized(x), optimized(x)

    def count():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before = count()
    kept = [optimized(x) for _ in range(5)]
    ours = count() - before
    workspaces = 0
    if not options.get("cuda_graphs"):  # a replay allocates none
        chunk = options.get("chunk", len(x))
        product = bare_head(optimized, chunk)
        before = count()
        for _ in range(len(kept) * len(x) // chunk):
            product()
        workspaces = count() - before
    assert ours == len(kept) + workspaces


def bare_head(optimized, images):
    """The classifier's product for so many images by PyTorch alone, run once: whether it takes a workspace at every
    call is a matter of how PyTorch was built."""
    weight, bias = optimized.head_weight.t(), optimized.head_bias
    pooled, logits = weight.new_zeros(images, len(weight)), weight.new_empty(images, len(bias))
    product = partial(torch.addmm, bias, pooled, weight, out=logits)
    product()
    return product


def peak_bytes(run):
    """Allocated at most during a call, beyond what is now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


@on_gpu
def test_gpu_memory():
    model, optimized = gpu_pair()
    x = images(16, 3, 64, 64, dtype=torch.float16, device="cuda")
    logits = optimized(x)  # and the libraries' workspaces
    activations = 2 * 16 * 64 * 32 * 32 * 2
    workspace = peak_bytes(bare_head(optimized, len(x)))
    prepared = 64 * 1024  # the padded patch weight and the vectors
    optimized = copy.deepcopy(optimized)
    assert peak_bytes(lambda: optimized(x)) <= activations + logits.nbytes + prepared + workspace


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_gpu_streams_and_threads(options):
    _, optimized = gpu_pair(**options)
    inputs = [images(4, 3, 32 + 2 * (i % 2), 32, dtype=torch.float16, device="cuda", seed=i) for i in range(4)]
    alone = [optimized(x).clone() for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            several = [optimized(inputs[i]) for _ in range(20)]
            stream.synchronize()
        wrong.extend(i for logits in several if not torch.equal(logits, alone[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def keep_busy():
    """The current stream, for about half a second: what is queued after it has not begun when Python goes on."""
    torch.cuda._sleep(1_000_000_000)


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_gpu_weights_replaced_while_calls_are_in_flight(options):
    """Calls on another stream still see the weights with which they were queued, though nobody holds on to them."""
    _, optimized = gpu_pair(**options)
    x = images(4, 3, 32, 32, dtype=torch.float16, device="cuda")
    side, expected = torch.cuda.Stream(), optimized(x)
    run = optimized.engine(GpuEngine)
    graphs = [recorded.graph for recorded in run.graphs._recorded.values()] if run.graphs else []  # outlive the engine
    sizes = {address(tensor): tensor.untyped_storage().nbytes() for tensor in run.weights.tensors()}.values()

    def take_memory():
        return [torch.full((size // 2,), torch.nan, dtype=x.dtype, device="cuda") for size in sizes for _ in range(8)]

    spare = take_memory(), take_memory()
    del spare  # so that nothing below has to ask the driver for memory, which may wait
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        optimized(x)
        side.synchronize()
        keep_busy()
        in_flight = [optimized(x) for _ in range(3)]
        done = side.record_event()
    for name in dict(optimized.named_buffers()):
        setattr(optimized, name, torch.zeros_like(getattr(optimized, name)))
    assert optimized.engine(GpuEngine) is not run
    del run  # the last that held the weights
    taken = take_memory()
    torch.cuda.current_stream().synchronize()
    assert not done.query(), "the calls were over before their weights went: this shows nothing"
    torch.cuda.synchronize()
    assert all(torch.equal(logits, expected) for logits in in_flight)
    del graphs, taken


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_gpu_first_call_in_flight(options):
    """A call on another stream waits for the copies of the weights that the first call has only queued."""
    _, optimized = gpu_pair(**options)
    x = images(4, 3, 32, 32, dtype=torch.float16, device="cuda")
    twin, (one, other) = copy.deepcopy(optimized), (torch.cuda.Stream(), torch.cuda.Stream())
    expected = twin(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(one):
        keep_busy()
        first = optimized(x)
    with torch.cuda.stream(other):
        second = optimized(x)
    torch.cuda.synchronize()
    assert torch.equal(first, expected) and torch.equal(second, expected)


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_gpu_captured_by_the_caller(options):
    _, optimized = gpu_pair(**options)
    x = images(4, 3, 32, 32, dtype=torch.float16, device="cuda")
    other = images(4, 3, 32, 32, dtype=torch.float16, device="cuda", seed=2)
    expected = [optimized(x), optimized(other)]
    static, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = optimized(static)
    for batch in (4, 64):  # which replaces the buffers outside of the graph
        optimized(images(batch, 3, 64, 64, dtype=torch.float16, device="cuda"))
    for data, value in zip((x, other), expected):
        static.copy_(data)
        graph.replay()
        assert torch.equal(logits, value)


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_gpu_first_call_in_a_capture_by_the_caller(options):
    _, warm = gpu_pair(**options)
    x = images(4, 3, 32, 32, dtype=torch.float16, device="cuda")
    expected = warm(x)  # the libraries choose their kernels
    first, graph = copy.deepcopy(warm), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = first(x)
    assert torch.equal(first(x), expected)
    graph.replay()
    assert torch.equal(logits, expected)


@on_gpu
@pytest.mark.parametrize("options", ENGINES, ids=str)
def test_gpu_weights_that_change(options):
    _, optimized = gpu_pair(**options)
    x = images(4, 3, 32, 32, dtype=torch.float16, device="cuda")
    before = optimized(x)
    state = {name: tensor * 2 for name, tensor in optimized.state_dict().items()}
    optimized.load_state_dict(state)
    assert not torch.equal(optimized(x), before)
    assert torch.equal(optimized(x), copy.deepcopy(optimized)(x))
