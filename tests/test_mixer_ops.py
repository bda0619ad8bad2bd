"""The operators below optimize() on the CPU take whatever anyone calls them with: the right logits or an error, and no
signal. Also what is said, and kept, where memory is short."""

import ctypes
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import fuzz_run

import convmixer_fast
from convmixer_fast import ops

mixer_ops = torch.ops.convmixer_fast
HUGE = [2**20, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1]
WEIGHTS = ["patch", "depthwise", "pointwise", "vectors", "head_weight", "head_bias"]


def network(dim=8, depth=1, kernel=(3, 3), patch=(2, 2), classes=5, in_channels=3, dtype=torch.float32, seed=0):
    """The arguments of mixer_pack by name; every one can be of any size, 0 included."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (dim, in_channels, *patch),
        (depth, dim, 1, *kernel),
        (depth, dim, dim),
        (2 * depth + 1, 3, dim),
        (classes, dim),
        (classes,),
    ]
    return {
        name: (torch.randn(shape, generator=generator) / 4).to(torch.float64 if name == "vectors" else dtype)
        for name, shape in zip(WEIGHTS, shapes, strict=True)
    }


def run(x, weights, activation=1, residual=True, **changed):
    """All four operators in turn; changed: arguments of the last two in place of what the others return."""
    packed = mixer_ops.mixer_pack(*weights.values())
    shapes = [weights[name] for name in ("patch", "depthwise", "head_weight")]
    size = mixer_ops.mixer_workspace_bytes(x, *shapes)
    workspace = mixer_ops.mixer_workspace(packed, changed.get("bytes", size))
    arguments = {"packed": packed, "workspace": workspace, "seconds": None}
    for name, change in changed.items():
        if name in arguments:
            arguments[name] = change(x, packed, workspace)
    packed, workspace, seconds = arguments.values()
    return mixer_ops.mixer(x, *shapes, packed, workspace, activation, residual, seconds)


def expected(x, weights, activation=1, residual=True):
    """The same in float64 and plain PyTorch."""
    patch, depthwise, pointwise, vectors, head_weight, head_bias = (weight.double() for weight in weights.values())
    act = {0: lambda z: z, 1: F.gelu, 2: F.relu}[activation]

    def after(z, convolution):
        bias, scale, shift = vectors[convolution][:, :, None, None]
        return act(z + bias) * scale + shift

    y = after(F.conv2d(x.double(), patch, stride=patch.shape[2:]), 0)
    kh, kw = depthwise.shape[3:]
    for layer in range(len(depthwise)):
        padded = F.pad(y, ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2))
        z = after(F.conv2d(padded, depthwise[layer], groups=y.shape[1]), 2 * layer + 1)
        y = after(F.conv2d(z + y if residual else z, pointwise[layer][:, :, None, None]), 2 * layer + 2)
    return y.mean((2, 3)) @ head_weight.T + head_bias


def assert_right(logits, x, weights, *options):
    limit = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[x.dtype]
    torch.testing.assert_close(logits.double(), expected(x, weights, *options), rtol=limit, atol=limit)


def images(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    "sizes, batch", [({}, 0), ({"classes": 0}, 2), ({"depth": 0}, 2), ({"depth": 0, "classes": 0}, 0)], ids=str
)
def test_sizes_of_zero_that_mean_something(sizes, batch):
    x, weights = images(batch, 3, 5, 6), network(**sizes)
    logits = run(x, weights)
    assert logits.shape == (batch, sizes.get("classes", 5))
    assert_right(logits, x, weights)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"dim": 0}, r"patch must be \(dim, in_channels, ph, pw\), each at least 1, got \(0, 3, 2, 2\)"),
        ({"in_channels": 0}, r"patch must be .*, each at least 1, got \(8, 0, 2, 2\)"),
        ({"patch": (0, 2)}, r"patch must be .*, each at least 1, got \(8, 3, 0, 2\)"),
        ({"patch": (2, 0)}, r"patch must be .*, each at least 1, got \(8, 3, 2, 0\)"),
        ({"kernel": (0, 3)}, r"depthwise must be .* kh, kw at least 1, got \(1, 8, 1, 0, 3\)"),
        ({"kernel": (3, 0)}, r"depthwise must be .* kh, kw at least 1, got \(1, 8, 1, 3, 0\)"),
        ({"kernel": (3, 0), "depth": 0}, r"depthwise must be .* kh, kw at least 1, got \(0, 8, 1, 3, 0\)"),
    ],
    ids=str,
)
def test_sizes_of_zero_that_mean_nothing(sizes, message):
    """Each operator says so: all take the shapes."""
    weights = network(**sizes)
    shapes = [weights[name] for name in ("patch", "depthwise", "head_weight")]
    x, memory = images(1, 3, 4, 4), torch.zeros(8 << 20, dtype=torch.uint8)
    for call in (
        lambda: mixer_ops.mixer_pack(*weights.values()),
        lambda: mixer_ops.mixer_workspace_bytes(x, *shapes),
        lambda: mixer_ops.mixer(x, *shapes, memory, memory, 1, True, None),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def expanded(tensor, *sizes):
    """Of these sizes, with the memory of one element."""
    return tensor.flatten()[:1].expand(sizes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": lambda x: expanded(x, 2**40, 3, 4, 4)}, r"fewer than 2\^32 patches, .* got \(1099511627776, 3, 4, 4\)"),
        ({"x": lambda x: expanded(x, 1, 3, 2**30, 2**30)}, r"x must have fewer than 2\^32 patches"),
        ({"patch": lambda p: expanded(p, 8, 3, 2**40, 2)}, "patch must be contiguous, float32"),
        ({"head_weight": lambda h: expanded(h, 2**58, 8)}, r"head_weight must be .* got strided float32 \(2882"),
        ({"depthwise": lambda d: d.new_empty(0, 8, 1, 2**31, 2**28)}, "must take fewer than 2.62 bytes packed"),
        ({"depthwise": lambda d: d.transpose(3, 4)[..., :2]}, "depthwise must be contiguous, float32 as patch"),
        ({"depthwise": lambda d: d.double()}, "depthwise must be .* as patch, got float64"),
        ({"pointwise": lambda p: p.mT.contiguous().mT[:, :, :7]}, r"pointwise must be contiguous, float32 \(1, 8, 8\)"),
        ({"vectors": lambda v: v.float()}, r"vectors must be contiguous, float64 \(3, 3, 8\), got float32 \(3, 3, 8\)"),
        ({"bytes": -1}, "bytes must be at least 0, got -1"),
        ({"bytes": 2**63 - 1}, "out of memory: could not allocate a workspace of 9223372036854775807 bytes"),
        ({"bytes": 100}, "workspace must be contiguous uint8 of .* bytes or more, got uint8 .100."),
        ({"workspace": lambda x, p, w: expanded(w, len(w))}, "workspace must be contiguous uint8"),
        ({"workspace": lambda x, p, w: w.view(torch.int32)}, "workspace must be contiguous uint8 .* got int32"),
        ({"seconds": lambda x, p, w: torch.zeros(12, dtype=torch.float64)[::2]}, r"seconds must be .* strided float64"),
        ({"seconds": lambda x, p, w: torch.zeros(6)}, r"seconds must be contiguous, float64 \(6\), got float32 \(6\)"),
        ({"seconds": lambda x, p, w: w[:48].view(torch.float64)}, "seconds must not share memory with workspace"),
        ({"seconds": lambda x, p, w: p[:48].view(torch.float64)}, "seconds must not share memory with packed"),
        ({"activation": 3}, "activation must be 0 .none., 1 .gelu. or 2 .relu., got 3"),
    ],
)
def test_unfit_arguments(changes, message):
    x, weights, options = images(1, 3, 4, 4), network(), {}
    for name, change in changes.items():
        if name == "x":
            x = change(x)
        elif name in weights:
            weights[name] = change(weights[name])
        else:
            options[name] = change
    with pytest.raises(RuntimeError, match=message):
        run(x, weights, **options)


def test_memory_that_is_shared():
    """The workspace is written while x and the packed weights are read."""
    weights = network()
    shapes = [weights[name] for name in ("patch", "depthwise", "head_weight")]
    packed = mixer_ops.mixer_pack(*weights.values())
    x = images(1, 3, 4, 4)
    size = mixer_ops.mixer_workspace_bytes(x, *shapes)
    both = torch.zeros(size + packed.nbytes, dtype=torch.uint8)
    both[: packed.nbytes] = packed
    with pytest.raises(RuntimeError, match="workspace must not share memory with packed"):
        mixer_ops.mixer(x, *shapes, both[: packed.nbytes], both[64:], 1, True, None)
    inside = both[: x.nbytes].view(torch.float32).view_as(x)
    with pytest.raises(RuntimeError, match="workspace must not share memory with x"):
        mixer_ops.mixer(inside, *shapes, packed, both, 1, True, None)
    beside = both[size:][: x.nbytes].view(torch.float32).copy_(x.flatten()).view_as(x)
    assert_right(mixer_ops.mixer(beside, *shapes, packed, both[:size], 1, True, None), x, weights)


@pytest.mark.parametrize("name", ["x", *WEIGHTS])
def test_meta_tensors(name):
    x, weights = images(1, 3, 4, 4), network()
    if name == "x":
        x = x.to("meta")
    else:
        weights[name] = weights[name].to("meta")
    with pytest.raises(NotImplementedError, match="convmixer_fast::mixer.* with Meta tensors"):
        run(x, weights)


# ------------------------------------------------------------------------------------------------ random arguments


class Call:
    """A network of small sizes and images for it, with up to three of the arguments changed into something unfit."""

    def __init__(self, seed):
        r = self.random = random.Random(seed)
        dtype = r.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
        size = lambda most: r.choice([0, 1]) if r.random() < 0.04 else r.randint(1, most)  # noqa: E731
        dim = r.choice([384, 400]) if r.random() < 0.02 else size(40)
        patch = size(3), size(3)
        channels = size(4)
        self.weights = network(dim, size(2), (size(9), size(9)), patch, size(40), channels, dtype, seed)
        shape = (size(3), channels, patch[0] * size(6) + r.randrange(2), patch[1] * size(6) + r.randrange(2))
        self.x = images(*shape, dtype=dtype)
        if r.random() < 0.3:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.options = {"activation": r.randrange(3), "residual": r.random() < 0.5}
        self.changes = []
        for _ in range(r.choice([0, 1, 1, 1, 2, 3])):
            name = r.choice(["x", *WEIGHTS, *WEIGHTS, "activation", "bytes", "workspace", "packed", "seconds"])
            self.changes.append(name)
            if name == "x":
                self.x = self.unfit(self.x)
            elif name in self.weights:
                self.weights[name] = self.unfit(self.weights[name])
            elif name == "activation":
                self.options[name] = r.choice([-1, 3, 2**31, 2**63 - 1, -(2**63)])
            elif name == "bytes":
                self.options[name] = r.choice([-1, -(2**63), 0, 1, 64, 2**21, *HUGE])
            else:
                self.options[name] = self.memory(name)

    def unfit(self, tensor):
        """A tensor that differs from this one in shape, strides, dtype or device."""
        r, shape = self.random, list(tensor.shape)
        kind = r.randrange(8)
        try:
            if kind == 0 and shape:  # a size of 0, or another small one
                shape[r.randrange(len(shape))] = r.choice([0, 0, 1, 2, 7])
                return tensor.new_ones(shape)
            if kind in (1, 2) and shape:  # huge, in the memory of one element
                for _ in range(r.randint(1, 2)):
                    shape[r.randrange(len(shape))] = r.choice(HUGE)
                return tensor.new_ones(1).expand(shape)
            if kind == 3 and shape:  # huge, without elements
                shape[r.randrange(len(shape))] = r.choice(HUGE)
                shape[r.randrange(len(shape))] = 0
                return tensor.new_empty(shape)
            if kind == 4 and tensor.dim() > 1:
                return tensor.transpose(*r.sample(range(tensor.dim()), 2))
            if kind == 5:
                return tensor.to(r.choice([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.complex64]))
            if kind == 6:
                return r.choice([lambda: tensor.to("meta"), lambda: tensor[None], lambda: tensor.flatten()])()
        except RuntimeError:  # torch makes no such tensor
            pass
        return tensor[..., ::2] if tensor.dim() else tensor[None]

    def memory(self, name):
        """What gives the packed weights, the workspace or the times, mostly unfit."""
        kind = self.random.randrange(8)
        count = 2 * self.weights["depthwise"].size(0) + 4 if self.weights["depthwise"].dim() else 6
        count = min(count, 100)

        def change(x, packed, workspace):
            whole = {"packed": packed, "workspace": workspace}
            tensor = whole.get(name, torch.zeros(count, dtype=torch.float64))
            changed = [
                lambda: tensor,
                lambda: tensor[:-1],
                lambda: tensor[::2],
                lambda: tensor[:1].expand(tensor.shape),
                lambda: packed[: count * 8].view(torch.float64) if name == "seconds" else packed,
                lambda: workspace[: count * 8].view(torch.float64) if name == "seconds" else workspace,
                lambda: tensor.to("meta"),
                lambda: tensor[None],
            ]
            return changed[kind]()

        return change

    def __str__(self):
        tensors = {"x": self.x} | self.weights
        described = (f"{k} {v.dtype} {tuple(v.shape)} {v.stride()} {v.device}" for k, v in tensors.items())
        return f"changed {self.changes}: {'; '.join(described)}; {self.options}"

    def __call__(self):
        """Whether there are logits, which then are right."""
        try:
            logits = run(self.x, self.weights, **self.options)
        except RuntimeError as error:
            assert str(error)
            return False
        assert_right(logits, self.x, self.weights, self.options["activation"], self.options["residual"])
        return True


def try_calls(first_seed, count, seconds):
    """Writes each call down before it is made. There is little memory, so that what is huge but fits is refused."""
    torch.set_num_threads(2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (2 << 30),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end, right, tried = time.monotonic() + seconds, 0, 0
    while tried < count and time.monotonic() < end:
        call = Call(first_seed + tried)
        print(f"seed {first_seed + tried}: {call}", flush=True)
        right += call()
        tried += 1
    print(f"{tried} {right}", flush=True)


def child(code, *arguments, timeout=600, **environment):
    """Runs code, which finds this file's functions, in a process of its own: its output's last line."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_mixer_ops import *; {code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    lines = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"exit status {done.returncode} in {lines[-1]}\n{done.stderr[-3000:]}"
    return lines[-1]


def test_random_arguments():
    tried, right = map(int, child("try_calls(0, 150, 100)").split())
    assert tried == 150 and 20 < right < 130


@pytest.mark.fuzz
def test_many_random_arguments():
    count, seed = fuzz_run(5000)
    tried, right = map(int, child(f"try_calls({seed}, {count}, 540)").split())
    print(f"{tried} calls from seed {seed} on, {right} of them with logits")
    assert right > tried // 20


# ------------------------------------------------------------------------------------------------ short memory

# Every block of 64 KiB and more is mapped anew, on all threads, so that a limit of the address space refuses it.
FROM_THE_SYSTEM = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(64 << 10)}


def take_free_blocks():
    """Allocates until the heap has to grow: no hole in it is left for a block that is to come from the system."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    end = libc.sbrk(0)
    for _ in range(100_000):  # 6 GB: no heap has such holes
        if libc.sbrk(0) != end:
            return
        libc.malloc(60 << 10)
    raise AssertionError("the heap does not grow")


def fails_and_recovers(call, spare, what="scratch"):
    """call() with `spare` bytes of memory for it raises OutOfMemoryError, again and again; and with enough is right."""
    take_free_blocks()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    for _ in range(3):
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + spare, unlimited[1]))
        try:
            call()
            text = "no error"
        except torch.OutOfMemoryError as error:
            text = str(error)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
        assert text.startswith("out of memory: could not allocate ") and what in text, text
    return call()


def start_threads():
    torch.set_num_threads(2)
    torch.ones(1 << 20).add_(1).sum()


def no_scratch_forward(batch):
    start_threads()
    x, weight = images(int(batch), 16, 8, 8), images(16, 1, 255, 255)
    y = fails_and_recovers(lambda: convmixer_fast.depthwise_conv2d(x, weight), 512 << 10)
    reach = weight[:, :, 120:135, 120:135]  # these taps reach the map; the others only meet padding
    reference = F.conv2d(x.double(), reach.double(), padding=7, groups=16)
    torch.testing.assert_close(y.double(), reference, rtol=1e-4, atol=1e-4)


def no_scratch_wgrad():
    """Two outputs and a workspace of 1 MiB each find room."""
    start_threads()
    x, gy = images(1, 16, 64, 64), images(1, 16, 64, 64)
    call = torch.ops.convmixer_fast.depthwise_conv2d_wgrad.default
    gweight, _ = fails_and_recovers(lambda: ops._call(call, x, gy, 127, 127, True), 2_400_000)
    padded = F.pad(x, (63,) * 4).double()
    for i, j in ((0, 0), (63, 63), (30, 126), (100, 62)):
        reference = (padded[:, :, i : i + 64, j : j + 64] * gy).sum((0, 2, 3))
        torch.testing.assert_close(gweight[:, 0, i, j].double(), reference, rtol=1e-4, atol=1e-4)


def no_scratch_mixer():
    start_threads()
    x, weights = images(2, 3, 32, 32), network(dim=640)
    shapes = [weights[name] for name in ("patch", "depthwise", "head_weight")]
    packed = mixer_ops.mixer_pack(*weights.values())
    workspace = mixer_ops.mixer_workspace(packed, mixer_ops.mixer_workspace_bytes(x, *shapes))
    arguments = x, *shapes, packed, workspace, 1, True, None
    logits = fails_and_recovers(lambda: ops._call(mixer_ops.mixer.default, *arguments), 128 << 10)
    torch.testing.assert_close(logits.double(), expected(x, weights), rtol=1e-3, atol=1e-3)


def no_memory_to_pack():
    start_threads()
    model, x = convmixer_fast.ConvMixer(256, 1, 5, 2, 10).eval(), images(2, 3, 32, 32)
    optimized = convmixer_fast.optimize(model)
    logits = fails_and_recovers(lambda: optimized(x), 128 << 10, "workspace")
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "code",
    [
        "no_memory_to_pack()",
        "no_scratch_forward(1)",
        "no_scratch_forward(4)",
        "no_scratch_wgrad()",
        "no_scratch_mixer()",
    ],
)
def test_no_memory(code):
    """On the calling thread alone, and on any of several: the error that all other allocations raise."""
    child(code, **FROM_THE_SYSTEM)


def print_what_stays():
    """Bytes that the process has more after a call that needs a lot than before."""
    torch.set_num_threads(1)
    x, weight = images(1, 1, 4, 4), torch.ones(1, 1, 2001, 2001)
    convmixer_fast.depthwise_conv2d(x, weight[..., :3, :3])
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    before = resident()
    convmixer_fast.depthwise_conv2d(x, weight)
    print(resident() - before)


def test_threads_keep_little_memory():
    """A kernel of 2001 x 2001 taps needs 64 MiB and more, of which a thread keeps nothing."""
    assert int(child("print_what_stays()")) < 20 << 20
