"""The engine: its schedule on emulated kernels, its memory, its caches; what needs a GPU is marked so."""

import contextlib
import copy
import math
import threading

import pytest
import torch
from emulated import EmulatedOps
from networks import float64_logits, randomize
from numerics import assert_error_at_most_peer
from torch.utils._python_dispatch import TorchDispatchMode

from convmixer_fast import ConvMixer, gpu_engine, optimize
from convmixer_fast.gpu_engine import GpuEngine, GraphCache, Weights

CLASSES = 100
FEATURES = 400  # pooled ones, at least, that an error is judged by: all logits of an image share theirs


def build(dim=16, depth=2, kernel_size=5, patch_size=2, seed=0, **options):
    torch.manual_seed(seed)
    return randomize(ConvMixer(dim, depth, kernel_size, patch_size, CLASSES, **options), seed)


def images(*shape, dtype=torch.float32, device="cpu", seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make_engine(model, dtype=torch.float32, chunk="auto", cuda_graphs=False) -> GpuEngine:
    """What the optimized model runs on a GPU, here on whatever device the model is."""
    return optimize(model, dtype, chunk=chunk, cuda_graphs=cuda_graphs).engine(GpuEngine)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
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


@pytest.mark.parametrize("chunk", ["auto", 1, 2, 3, 100])
@pytest.mark.parametrize("shape", [(5, 3, 23, 38), (1, 3, 2, 2), (7, 3, 12, 20), (0, 3, 8, 8)], ids=str)
def test_any_chunk(shape, chunk):
    model, x = build().double(), images(*shape, dtype=torch.float64)
    torch.testing.assert_close(make_engine(model, torch.float64, chunk)(x), model(x).detach(), rtol=1e-12, atol=1e-12)


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
        "aten::copy_",
        "aten::zero_",
        "convmixer_fast::fused_depthwise.out",
        "convmixer_fast::activate_pool.out",
    }
    VIEWS = {
        *("aten::alias", "aten::as_strided", "aten::expand", "aten::permute", "aten::slice.Tensor"),
        *("aten::split.Tensor", "aten::t", "aten::unsqueeze", "aten::view"),
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


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_schedule_allocates_nothing_and_waits_for_nothing(chunk):
    run, x = make_engine(build(), chunk=chunk), images(5, 3, 9, 14)
    geometry, logits = run.geometry(x), torch.empty(5, CLASSES)
    arena, weights = gpu_engine.Arena(run.weights, geometry), run.weights
    layers = [tensor for depthwise, _, pointwise, _ in weights.layers for tensor in (depthwise, pointwise)]
    with torch.no_grad(), OnlyInto(x, logits, *arena.buffers(), weights.patch, *weights.head, *layers) as checked:
        gpu_engine.run_all(gpu_engine.steps(weights, x, logits, geometry, arena))
    assert torch.equal(logits, run(x))
    steps_a_chunk = 2 + 1 + 2 * 2 + 2  # the patches and their zeros, GEMM, two layers, pool and head
    assert checked.writes == -(-5 // chunk) * steps_a_chunk


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


def test_threads_do_not_share_buffers():
    run = make_engine(build(dim=32, depth=4))
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


def test_inference_mode_and_back():
    run, x = make_engine(build()), images(2, 3, 8, 8)
    with torch.inference_mode():
        logits = run(x)
    with torch.no_grad():
        assert torch.equal(run(x), logits)


@pytest.mark.parametrize(
    "dim, size, cache_bytes, multiprocessors, images",
    [
        (1536, (32, 32), 60 << 20, 132, 9),  # float16: 6.3 MB an image for two buffers, 4.7 MB for the matrix
        (768, (32, 32), 60 << 20, 132, 19),
        (512, (14, 14), 60 << 20, 132, 152),
        (1536, (32, 32), 4 << 20, 40, float("inf")),  # not one image fits
        (256, (4, 4), 6 << 20, 132, float("inf")),  # 382 fit, but would make 48 tiles of a GEMM for 132 multiprocessors
    ],
)
def test_images_of_a_chunk(dim, size, cache_bytes, multiprocessors, images):
    with torch.device("meta"):
        meta = torch.empty(dim, 147, dtype=torch.float16)
    weights = Weights(meta, (3, 7, 7), None, [], None, "gelu", True)
    assert gpu_engine._images_in_cache(weights, size, cache_bytes, multiprocessors) == images


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
    assert count() - before == len(kept)


@on_gpu
def test_gpu_memory():
    model, optimized = gpu_pair()
    x = images(16, 3, 64, 64, dtype=torch.float16, device="cuda")
    optimized(x)  # the libraries' workspaces
    activations = 2 * 16 * 64 * 32 * 32 * 2
    optimized = copy.deepcopy(optimized)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits = optimized(x)
    prepared = 64 * 1024  # the padded patch weight and the vectors
    assert torch.cuda.max_memory_allocated() - before <= activations + logits.nbytes + prepared


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
def test_gpu_weights_that_change(options):
    _, optimized = gpu_pair(**options)
    x = images(4, 3, 32, 32, dtype=torch.float16, device="cuda")
    before = optimized(x)
    state = {name: tensor * 2 for name, tensor in optimized.state_dict().items()}
    optimized.load_state_dict(state)
    assert not torch.equal(optimized(x), before)
    assert torch.equal(optimized(x), copy.deepcopy(optimized)(x))
