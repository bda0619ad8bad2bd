"""Arguments that do and do not fit, at random: the operators give the right result or an error that names the argument,
and tensors without numbers (meta, FakeTensor) meet the same verdict in the same words."""

import random

import pytest
import torch
from cases import fuzz_run
from torch._subclasses.fake_tensor import FakeTensorMode

import convmixer_fast as cf
from convmixer_fast import reference

OPS = torch.ops.convmixer_fast
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHER_DTYPES = [torch.int64, torch.int8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn]
PROLOGUE = ["prologue_bias", "prologue_scale", "prologue_shift"]


class Draw:
    """Arguments of the operators, valid ones and such that were spoilt in up to two places."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, probability):
        return self.random.random() < probability

    def tensor(self, shape, dtype):
        values = torch.randn(shape, generator=self.generator)
        return values.to(dtype)

    def laid_out(self, tensor):
        """The same values in other strides, or one value in all places of a dimension."""
        kind = self.random.choice(["as is", "as is", "permuted", "strided", "expanded"])
        if kind == "permuted":
            order = self.random.sample(range(tensor.dim()), tensor.dim())
            back = [order.index(d) for d in range(tensor.dim())]
            return tensor.permute(order).contiguous().permute(back)
        if kind == "strided" and tensor.dim():
            wide = tensor.new_zeros([*tensor.shape[:-1], 2 * tensor.shape[-1] + 1])
            return wide[..., 1::2].copy_(tensor)
        if kind == "expanded" and tensor.dim() and 0 not in tensor.shape:
            d = self.random.randrange(tensor.dim())
            return tensor.narrow(d, 0, 1).expand_as(tensor)
        return tensor

    def valid(self, op):
        choose = self.random.choice
        n, c, h, w = choose([0, 1, 2, 3]), choose([1, 1, 2, 5, 17, 0]), choose([1, 3, 8, 0]), choose([1, 2, 9, 0])
        kh, kw = choose([1, 2, 3, 7]), choose([1, 3, 4])
        dtype = choose(DTYPES)
        vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        x, weight = self.laid_out(self.tensor((n, c, h, w), dtype)), self.laid_out(self.tensor((c, 1, kh, kw), dtype))
        vectors = [self.laid_out(self.tensor((c,), vector_dtype)) for _ in range(6)]
        named = dict(zip(["bias", "scale", "shift", *PROLOGUE], vectors))
        if op == "depthwise_conv2d":
            bias = self.laid_out(self.tensor((c,), dtype)) if self.chance(0.5) else None
            return dict(x=x, weight=weight, bias=bias)
        if op == "depthwise_conv2d_dgrad":
            return dict(gy=x, weight=weight)
        if op == "depthwise_conv2d_wgrad":
            gy = self.laid_out(self.tensor((n, c, h, w), dtype))
            return dict(x=x, gy=gy, kernel_h=kh, kernel_w=kw, bias=self.chance(0.5))
        activation = choose([0, 1, 2])
        if op.startswith("fused_depthwise"):
            if self.chance(0.5):
                named |= dict.fromkeys(PROLOGUE)
            arguments = dict(x=x, weight=weight, **named, activation=activation, residual=self.chance(0.5))
            shape = (n, c, h, w)
        else:
            arguments = dict(x=x, bias=named["bias"], scale=named["scale"], shift=named["shift"], activation=activation)
            shape = (n, c)
        if op.endswith(".out"):
            arguments["out"] = self.tensor(shape, dtype)
        return arguments

    def spoil(self, arguments):
        """Changes one argument, often so that it does not fit."""
        name = self.random.choice(list(arguments))
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            arguments[name] = self.spoilt(value, arguments)
        elif isinstance(value, bool) or value is None:
            pass  # nothing else fits the schema
        else:
            arguments[name] = self.random.choice([-1, 0, 3, 7, 2**31, 2**62])

    def spoilt(self, tensor, arguments):
        kind = self.random.choice(["dtype", "device", "dim", "size", "layout", "alias"])
        if kind == "dtype":
            real = tensor.real if tensor.is_complex() else tensor
            return real.to(self.random.choice(DTYPES + OTHER_DTYPES))
        if kind == "device":
            return tensor.to("meta")
        if kind == "dim":
            return self.random.choice([lambda t: t[None], lambda t: t.flatten(), lambda t: t.new_zeros(())])(tensor)
        if kind == "size" and tensor.dim():
            shape = list(tensor.shape)
            d = self.random.randrange(len(shape))
            shape[d] = self.random.choice([0, 1, shape[d] + 1, max(0, shape[d] - 1)])
            return self.tensor(shape, torch.float32).to(tensor.device, tensor.dtype)
        if kind == "alias":  # memory of another argument, if it is enough
            other = self.random.choice([a for a in arguments.values() if isinstance(a, torch.Tensor)])
            if other.dtype == tensor.dtype and other.numel() >= tensor.numel() and other.device == tensor.device:
                flat = other.flatten() if not other.is_contiguous() else other.view(-1)
                offset = self.random.choice([0, other.numel() - tensor.numel()])
                return flat[offset : offset + tensor.numel()].view(tensor.shape)
        return self.laid_out(tensor)


NAMES = [
    "depthwise_conv2d",
    "depthwise_conv2d_dgrad",
    "depthwise_conv2d_wgrad",
    "fused_depthwise",
    "fused_depthwise.out",
    "activate_pool",
    "activate_pool.out",
]


def overload(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(OPS, packet), overload or "default")


def call(name, arguments):
    """The results, or the text of the error."""
    order = [argument.name for argument in overload(name)._schema.arguments]
    given = {key: arguments[key] for key in order if key in arguments}
    try:
        results = overload(name)(**given)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    results = arguments["out"] if name.endswith(".out") else results
    return results if isinstance(results, tuple) else (results,)


def check(name, arguments):
    """The verdicts agree; what is computed is right. Returns whether it was computed."""
    copies = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    real = call(name, arguments)
    with FakeTensorMode() as mode:  # it makes of tensors that share memory such that share it
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        fake = call(name, fakes)
    described = f"{name}({', '.join(f'{k}={describe(v)}' for k, v in arguments.items())})"
    if isinstance(real, str):
        assert fake == real, f"{described}: the kernel says {real!r}, its fake {describe_all(fake)!r}"
        assert any(f"{word}" in real for word in [*arguments, "prologue"]), f"{described}: {real} names no argument"
        return False
    assert not isinstance(fake, str), f"{described}: the kernel computes, its fake says {fake!r}"
    assert describe_all(fake) == describe_all(real), described
    if all(value.device.type == "cpu" for value in arguments.values() if isinstance(value, torch.Tensor)):
        for result, exact in zip(real, expected(name, copies)):
            assert_right(result, exact, described)
    return True


def assert_right(result, exact, described):
    """One rounding to the result's dtype, and what sums in float32 (float64 for float64) may be off."""
    largest = max(1.0, exact.abs().nan_to_num().max().item()) if exact.numel() else 1.0
    arithmetic = torch.float64 if result.dtype == torch.float64 else torch.float32
    bound = (torch.finfo(result.dtype).eps + 64 * torch.finfo(arithmetic).eps) * largest
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=bound, equal_nan=True, msg=described)


def expected(name, arguments):
    """The results in float64, by plain PyTorch."""
    a = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    packet = name.partition(".")[0]
    activation = ["none", "gelu", "relu"][a.get("activation", 0)]
    first = a.get("x", a.get("gy"))
    if first.numel() == 0 and packet != "activate_pool":  # which F.conv2d does not take
        if packet != "depthwise_conv2d_wgrad":
            return (first,)
        channels = first.shape[1]
        return first.new_zeros(channels, 1, a["kernel_h"], a["kernel_w"]), first.new_zeros(channels if a["bias"] else 0)
    if packet == "depthwise_conv2d":
        return (reference.depthwise_conv2d(**a),)
    if packet == "fused_depthwise":
        prologue = tuple(a[key] for key in PROLOGUE)
        vectors = a["bias"], a["scale"], a["shift"]
        if prologue[0] is not None:  # rounded to the dtype of x before the convolution
            inner = reference.activate_and_normalize(a["x"], *prologue, activation)
            a["x"] = inner.to(arguments["x"].dtype).double()
        return (reference.fused_depthwise(a["x"], a["weight"], *vectors, activation, a["residual"]),)
    if packet == "activate_pool":
        return (reference.activate_pool(a["x"], a["bias"], a["scale"], a["shift"], activation),)
    if packet == "depthwise_conv2d_dgrad":
        x = torch.zeros_like(a["gy"], requires_grad=True)
        return torch.autograd.grad(reference.depthwise_conv2d(x, a["weight"]), x, a["gy"])
    channels = a["x"].shape[1]
    weight = a["x"].new_zeros((channels, 1, a["kernel_h"], a["kernel_w"]), requires_grad=True)
    bias = a["x"].new_zeros(channels, requires_grad=True)
    gradients = torch.autograd.grad(reference.depthwise_conv2d(a["x"], weight, bias), (weight, bias), a["gy"])
    return gradients if a["bias"] else (gradients[0], bias[:0])


def describe(value):
    if not isinstance(value, torch.Tensor):
        return value
    return f"{value.dtype} {tuple(value.shape)} {tuple(value.stride())} {value.device}"


def describe_all(results):
    return results if isinstance(results, str) else [describe(result) for result in results]


def run(name, seeds):
    """How many of the calls were computed."""
    computed = 0
    for seed in seeds:
        draw = Draw(seed)
        arguments = draw.valid(name)
        for _ in range(draw.random.choice([0, 1, 1, 2])):
            draw.spoil(arguments)
        try:
            computed += check(name, arguments)
        except Exception as error:
            error.add_note(f"seed {seed}") if hasattr(error, "add_note") else print("seed", seed)
            raise
    return computed


@pytest.fixture
def arguments():
    x, weight, vector = torch.randn(2, 3, 4, 5), torch.randn(3, 1, 3, 3), torch.randn(3)
    return dict(x=x, weight=weight, bias=vector, scale=vector + 1, shift=vector + 2, activation="none", residual=False)


@pytest.mark.parametrize("name", NAMES)
def test_fakes_and_kernels_agree(name):
    count = 100
    computed = run(name, range(count))
    assert count // 10 < computed < count * 9 // 10, "both kinds are to be tried"


@pytest.mark.fuzz
@pytest.mark.parametrize("name", NAMES)
def test_fakes_and_kernels_agree_at_length(name):
    count, seed = fuzz_run(3000)
    print(f"{name}: {count} calls from seed {seed} on, {run(name, range(seed, seed + count))} of them computed")


@pytest.mark.parametrize("inference", [False, True])
def test_a_given_output_counts_as_written(arguments, inference):
    """So autograd notices that what it has saved is another now."""
    saved = torch.ones(2, 3, 4, 5, requires_grad=True).exp()
    total = saved.sum()
    with torch.inference_mode(inference), torch.no_grad():
        cf.fused_depthwise(**arguments, out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()

    memory = torch.zeros(6)
    version = memory._version
    cf.activate_pool(*(arguments[name] for name in ("x", "bias", "scale", "shift")), out=memory.view(2, 3))
    assert memory._version > version


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "prologue"])
def test_a_given_output_apart_from_every_input(arguments, name):
    memory = torch.zeros(2, 3, 4, 5)
    if name == "prologue":
        vectors = torch.zeros(3), memory.view(-1)[100:103], torch.zeros(3)
        arguments, name = arguments | dict(prologue=vectors), r"prologue\[1\] \(scale\)"
    else:
        like = arguments[name]
        arguments[name] = memory.view(-1)[-like.numel() :].view(like.shape).copy_(like)
    with pytest.raises(RuntimeError, match=f"out must not share memory with {name}"):
        cf.fused_depthwise(**arguments, out=memory)


def test_given_outputs_that_do_not_fit(arguments):
    x = arguments["x"]
    wide = torch.zeros(2, 3, 4, 8)
    for out, message in {
        x.new_zeros(2, 3, 4, 1).expand_as(
            x
        ): r"out must have memory of its own for each element, got strides \(12, 4, 1, 0\)",
        wide.as_strided(x.shape, (96, 32, 4, 1)): "out must have memory of its own for each element",
        torch.zeros_like(x, requires_grad=True): "out requires a gradient",
        torch.zeros_like(x, device="meta"): "out must be on x's device cpu, got meta",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            cf.fused_depthwise(**arguments, out=out)
    with torch.no_grad():
        cf.fused_depthwise(**arguments, out=torch.zeros_like(x, requires_grad=True))
    spread = torch.zeros(2, 3, 4, 10)[..., ::2]
    assert torch.equal(cf.fused_depthwise(**arguments, out=spread), cf.fused_depthwise(**arguments))


def test_tensors_of_two_devices(arguments):
    """The dispatcher gives them to the fake kernel: a result would be memory that nobody has written."""
    for x, weight in (("meta", "cpu"), ("cpu", "meta")):
        with pytest.raises(RuntimeError, match=f"weight must be on x's device {x}, got {weight}"):
            cf.depthwise_conv2d(arguments["x"].to(x), arguments["weight"].to(weight))


class Mismatched(torch.nn.Module):
    def forward(self, x, weight):
        return cf.depthwise_conv2d(x, weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export_and_compile_refuse_what_the_kernel_refuses(dynamic):
    x, weight = torch.zeros(2, 8, 9, 9), torch.zeros(4, 1, 3, 3)
    message = r"weight must be \(C, 1, kh, kw\) with C = .* channels as x"
    shapes = dict(x={2: torch.export.Dim.AUTO}, weight={2: torch.export.Dim.AUTO}) if dynamic else None
    with pytest.raises(Exception, match=message):
        torch.export.export(Mismatched(), (x, weight), dynamic_shapes=shapes)
    with pytest.raises(Exception, match=message):
        torch.compile(Mismatched(), fullgraph=True, dynamic=dynamic, backend="eager")(x, weight)


def test_memory_that_a_contiguous_copy_would_need():
    x = torch.zeros(1).expand(1, 2**20, 1, 1)
    weight = torch.zeros(1).expand(2**20, 1, 2**12, 2**12)
    with pytest.raises(torch.OutOfMemoryError, match=r"could not allocate a contiguous copy of weight, \(1048576, 1, "):
        cf.depthwise_conv2d(x, weight)
