"""The operators on CPU and CUDA against float64, on the inputs of cases.py."""

import cases
import pytest
import torch
from numerics import assert_error_at_most_peer, assert_one_of_two_nearest

import convmixer_fast as cf
from convmixer_fast import ops, reference

pytestmark = pytest.mark.usefixtures("two_threads")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
PAPER = cases.Case(2, 48, 32, 32, 9, 9)
SMALL = cases.Case(2, 5, 6, 7, 3, 4)

device = pytest.mark.parametrize("device", DEVICES)
dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d)[6:])
case = pytest.mark.parametrize("case", cases.CASES, ids=str)
activation = pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))


def double(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def rounded_to(dtype, tensors):
    return [t.to(dtype) if isinstance(t, torch.Tensor) else t for t in tensors]


def check_fused(case, dtype, layout, device, activation="gelu", residual=True, prologue=True):
    x, weight = cases.make_input(case, dtype, layout, device), cases.make_weight(case, dtype, device)
    vectors = cases.make_vectors(case, dtype, 6, device)
    inner = tuple(vectors[3:]) if prologue else None

    def run(op, x, weight, vectors):
        return op(x, weight, *vectors[:3], activation, residual, tuple(vectors[3:]) if prologue else None)

    ours = cf.fused_depthwise(x, weight, *vectors[:3], activation, residual, inner)
    exact = run(reference.fused_depthwise, x.double(), weight.double(), double(vectors))
    peer = run(reference.fused_depthwise, x.contiguous(), weight, rounded_to(dtype, vectors))  # rounds at each step
    assert_error_at_most_peer(ours, peer, exact, f"fused_depthwise {case} {layout} {dtype} on {device}")
    return ours


@device
@dtype
@case
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_depthwise_conv2d(device, dtype, case, layout):
    x, weight = cases.make_input(case, dtype, layout, device), cases.make_weight(case, dtype, device)
    for bias in (None, cases.make_vectors(case, torch.float32, 1, device)[0].to(dtype)):
        ours = cf.depthwise_conv2d(x, weight, bias)
        peer = reference.depthwise_conv2d(x.contiguous(), weight, bias)  # oneDNN hangs at channels_last bfloat16 k = 31
        exact = reference.depthwise_conv2d(*double((x, weight, bias)))
        assert_error_at_most_peer(ours, peer, exact, f"depthwise_conv2d {case} {layout} {dtype} on {device}")
        assert ours.stride() == x.stride()


@device
@dtype
@case
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fused_depthwise(device, dtype, case, layout):
    check_fused(case, dtype, layout, device)


@device
@activation
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("prologue", [True, False])
def test_every_fusion(device, activation, residual, prologue):
    for dtype in (torch.float32, torch.bfloat16):
        check_fused(cases.Case(2, 19, 9, 11, 5, 4), dtype, "contiguous", device, activation, residual, prologue)


@device
@pytest.mark.parametrize("layout", list(cases.LAYOUTS))
@pytest.mark.parametrize("case", [PAPER, SMALL, cases.Case(3, 17, 14, 14, 7, 7)], ids=str)
def test_memory_layouts(device, layout, case):
    for dtype in (torch.float32, torch.float16):
        plain = check_fused(case, dtype, "contiguous", device) if layout != "batch_expanded" else None
        ours = check_fused(case, dtype, layout, device)
        if plain is not None and device == "cpu":
            assert torch.equal(ours, plain), "the CPU kernels sum in one order, whatever the layout"
        x = cases.make_input(case, dtype, layout, device)
        assert ours.stride() == torch.nn.functional.conv2d(x, x.new_ones(case.c, 1, 1, 1), groups=case.c).stride()


@dtype
@activation
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 7), (9, 9)], ids="{0[0]}x{0[1]}".format)
def test_small_kernels_on_a_cpu_read_pixels_in_place(dtype, activation, kernel):
    """In channels_last, where others are packed, with the same sums: channels about multiples of vectors and of blocks,
    one row and several, maps narrower than the kernel and wider than a band."""
    for channels in (4, 8, 15, 16, 17, 33, 257):
        for height, width in ((5, 2), (1, 17), (4, 130)):
            case = cases.Case(2, channels, height, width, *kernel)
            weight, vectors = cases.make_weight(case, dtype), cases.make_vectors(case, dtype, 3)
            for residual in (True, False):
                packed = cf.fused_depthwise(cases.make_input(case, dtype), weight, *vectors, activation, residual)
                for layout in ("channels_last", "channels_last_slice"):
                    x = cases.make_input(case, dtype, layout)
                    assert torch.equal(cf.fused_depthwise(x, weight, *vectors, activation, residual), packed)


@device
@dtype
@case
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "planes"])
def test_activate_pool(device, dtype, case, layout):
    x, vectors = cases.make_input(case, dtype, layout, device), cases.make_vectors(case, dtype, 3, device)
    for activation in ops.ACTIVATIONS:
        ours = cf.activate_pool(x, *vectors, activation)
        exact = reference.activate_pool(x.double(), *double(vectors), activation)
        peer = reference.activate_pool(x, *rounded_to(dtype, vectors), activation)
        assert_error_at_most_peer(ours, peer, exact, f"activate_pool {activation} {case} {layout} {dtype} on {device}")


@device
@pytest.mark.parametrize("case", cases.EMPTY_CASES, ids=str)
def test_empty(device, case):
    x, weight = cases.make_input(case, torch.float32, device=device), cases.make_weight(case, torch.float32, device)
    vectors = cases.make_vectors(case, torch.float32, 3, device)
    assert cf.depthwise_conv2d(x, weight).shape == x.shape
    assert cf.fused_depthwise(x, weight, *vectors).shape == x.shape
    pooled = cf.activate_pool(x, *vectors)
    assert pooled.shape == x.shape[:2]
    assert pooled.isnan().all(), "the mean of nothing"


@device
def test_non_finite_pixels_stay_in_their_windows(device):
    """An Inf or NaN reaches the outputs whose window holds it, and no others."""
    case = cases.Case(1, 2, 24, 41, 9, 6)
    for layout in ("contiguous", "channels_last"):
        x, weight = (
            cases.make_input(case, torch.float32, layout, device),
            cases.make_weight(case, torch.float32, device),
        )
        for value, row, col in ((torch.inf, 11, 20), (torch.nan, 0, 40)):
            x[0, 0, row, col] = value
        assert torch.equal(
            cf.depthwise_conv2d(x, weight).isfinite(),
            reference.depthwise_conv2d(x.double(), weight.double()).isfinite(),
        )


@device
def test_large_values_and_tails_of_gelu(device):
    """GELU where naive forms overflow or cancel: its far tails, in every dtype."""
    for dtype in cases.DTYPES:
        x = torch.linspace(-40, 40, 1601, device=device).to(dtype).view(1, 1, 1, -1)
        x = torch.cat([x, torch.tensor([-3e4, 3e4], device=device).to(dtype).view(1, 1, 1, 2)], dim=3)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        vectors = [torch.full((1,), v, dtype=real, device=device) for v in (0.0, 1.0, 0.0)]
        weight = x.new_ones(1, 1, 1, 1)
        ours = cf.fused_depthwise(x, weight, *vectors, residual=False)
        exact = x.double() * torch.special.ndtr(x.double())
        assert_error_at_most_peer(ours, torch.nn.functional.gelu(x), exact, f"gelu {dtype} on {device}")


@pytest.mark.parametrize(
    "dtype, in_tail", [(torch.float32, 9e-8), (torch.float16, 2.0**-25), (torch.bfloat16, 2.0**-25)], ids=str
)
def test_values_of_gelu_on_a_cpu(dtype, in_tail):
    """The result before rounding is closer than half an ulp, or in the tail, where it is small, than in_tail."""
    x = torch.linspace(-12, 12, 1 << 16).to(dtype).view(1, 1, 256, 256)
    one = torch.ones(1)
    y = cf.fused_depthwise(x, x.new_ones(1, 1, 1, 1), 0 * one, one, 0 * one, residual=False)
    exact = x.double() * torch.special.ndtr(x.double())
    assert_one_of_two_nearest(y, exact, in_tail)
    assert (y == exact.to(dtype))[exact.abs() > 2.0**-9].double().mean() > 0.6, "most are the nearest"


@device
def test_same_bits_every_time(device):
    x, weight = cases.make_input(PAPER, torch.float16, device=device), cases.make_weight(PAPER, torch.float16, device)
    vectors = cases.make_vectors(PAPER, torch.float16, 3, device)
    first = cf.fused_depthwise(x, weight, *vectors)
    for _ in range(50):
        assert torch.equal(first, cf.fused_depthwise(x, weight, *vectors))


@pytest.mark.parametrize("case, layout", [(PAPER, "contiguous"), (cases.Case(2, 280, 9, 30, 3, 3), "channels_last")])
def test_same_bits_for_any_number_of_threads(case, layout):
    threads = torch.get_num_threads()
    x, weight = cases.make_input(case, torch.float32, layout), cases.make_weight(case, torch.float32)
    vectors = cases.make_vectors(case, torch.float32, 3)
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append((cf.fused_depthwise(x, weight, *vectors), cf.activate_pool(x, *vectors)))
    finally:
        torch.set_num_threads(threads)
    for fused, pooled in results[1:]:
        assert torch.equal(fused, results[0][0]) and torch.equal(pooled, results[0][1])


@pytest.mark.slow
@device
@pytest.mark.parametrize(
    "layout, channels, height, width", [("contiguous", 2, 2**15 + 1, 2**15), ("channels_last", 64, 2**13 + 1, 2**12)]
)
def test_more_than_2_31_elements(device, layout, channels, height, width):
    row = torch.randn(channels, width, device=device).bfloat16()
    x = row[None, :, None].expand(1, channels, height, width)
    if layout == "channels_last":
        x = row.t().contiguous()[None, None].expand(1, height, width, channels).permute(0, 3, 1, 2)
    weight = torch.randn(channels, 1, 3, 3, device=device).bfloat16()
    assert x.numel() > 2**31
    y = cf.depthwise_conv2d(x, weight)
    expected = cf.depthwise_conv2d(x[:, :, :5], weight)  # all rows are one: so are the outputs between first and last
    assert torch.equal(y[:, :, :2], expected[:, :, :2])
    assert torch.equal(y[:, :, -2:], expected[:, :, -2:])
    assert torch.equal(y[:, :, height // 2], expected[:, :, 2])
    if device == "cpu":
        return  # whose sum of 2**30 pixels is 1.5 % off: what it keeps of the roundings is rounded, too
    ones = torch.ones(channels, device=device)
    mean = cf.activate_pool(x, 0 * ones, ones, 0 * ones, "relu").double()
    unit = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(mean, row.double().relu().mean(1)[None], rtol=unit, atol=0)


# ------------------------------------------------------------------------------------------- torch's machinery


def small_arguments(device="cpu", dtype=torch.float32):
    x, weight = cases.make_input(SMALL, dtype, device=device), cases.make_weight(SMALL, dtype, device)
    return x, weight, cases.make_vectors(SMALL, dtype, 6, device)


def called(operator, *arguments, **out) -> list[str]:
    """The operators that a call dispatches, itself first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operator(*arguments, **out)
    return [event.name for event in sorted(profile.events(), key=lambda event: event.time_range.start)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calls_through_the_dispatcher(mode):
    """None but the operator itself, which would cost more than what it does: only strided weights and vectors are
    copied, and a copy of `out` to itself counts the write."""
    x, weight, v = small_arguments()
    arguments, strided = (x, weight, *v[:3], 1, True, *v[3:]), weight.transpose(2, 3).contiguous().transpose(2, 3)
    with mode():
        for name, own in {
            "depthwise_conv2d": (x, weight, v[0]),
            "depthwise_conv2d_dgrad": (x, weight),
            "depthwise_conv2d_wgrad": (x, x, 3, 4, True),
            "fused_depthwise": arguments,
            "activate_pool": (x, *v[:3], 1),
        }.items():
            itself, copy = f"convmixer_fast::{name}", "aten::copy_"
            packet = getattr(torch.ops.convmixer_fast, name)
            assert called(packet.default, *own) == [itself]
            assert called(packet.default, x.transpose(2, 3).contiguous().transpose(2, 3), *own[1:]) == [itself]
            assert "out" not in packet.overloads() or called(packet.out, *own, out=packet(*own)) == [itself, copy]
        assert called(packet.default, x, v[0].repeat_interleave(2)[::2], *own[2:]) == [itself, copy]
        fused = torch.ops.convmixer_fast.fused_depthwise.default
        assert called(fused, x, strided, *arguments[2:]) == ["convmixer_fast::fused_depthwise", copy]


@device
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_opcheck(device, layout):
    x, weight, v = small_arguments(device)
    x = cases.LAYOUTS[layout](x)
    torch.library.opcheck(torch.ops.convmixer_fast.depthwise_conv2d.default, (x, weight, v[0]))
    torch.library.opcheck(torch.ops.convmixer_fast.depthwise_conv2d.default, (x, weight, None))
    torch.library.opcheck(torch.ops.convmixer_fast.fused_depthwise.default, (x, weight, *v[:3], 1, True, *v[3:]))
    torch.library.opcheck(torch.ops.convmixer_fast.activate_pool.default, (x, *v[:3], 1))
    out = dict(out=torch.empty_like(x))
    torch.library.opcheck(torch.ops.convmixer_fast.fused_depthwise.out, (x, weight, *v[:3], 1, True, *v[3:]), out)
    out = dict(out=x.new_empty(x.shape[:2]))
    torch.library.opcheck(torch.ops.convmixer_fast.activate_pool.out, (x, *v[:3], 1), out)


class AllOps(torch.nn.Module):
    def forward(self, x, weight, v):
        y = cf.depthwise_conv2d(x, weight, v[0])
        y = cf.fused_depthwise(y, weight, *v[:3], "relu", False, tuple(v[3:]), out=torch.empty_like(y))
        return cf.activate_pool(y, *v[3:])


@device
def test_compile(device):
    arguments = small_arguments(device)
    with torch.no_grad():
        compiled = torch.compile(AllOps(), fullgraph=True, dynamic=True)
        for batch in (1, 2, 2):
            x = arguments[0][:1].repeat(batch, 1, 1, 1)
            assert torch.equal(compiled(x, *arguments[1:]), AllOps()(x, *arguments[1:]))


def test_export_with_dynamic_shapes():
    x, weight, v = small_arguments()
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    dynamic = {"x": {0: batch, 2: height, 3: width}, "weight": None, "v": [None] * 6}
    with torch.no_grad():
        exported = torch.export.export(AllOps(), (x, weight, v), dynamic_shapes=dynamic)
        other = torch.randn(5, SMALL.c, 12, 9)
        assert torch.equal(exported.module()(other, weight, v), AllOps()(other, weight, v))


@device
@dtype
def test_given_output(device, dtype):
    """Written in any strides, nothing beside it; the result is that tensor."""
    x, weight = cases.make_input(SMALL, dtype, "contiguous", device), cases.make_weight(SMALL, dtype, device)
    vectors = cases.make_vectors(SMALL, dtype, 3, device)
    expected = cf.fused_depthwise(x, weight, *vectors)
    n, c, h, w = x.shape
    memory = torch.full((c, n, h * w + 3), 7, dtype=dtype, device=device)
    out = memory[..., : h * w].unflatten(2, (h, w)).transpose(0, 1)
    assert cf.fused_depthwise(x, weight, *vectors, out=out) is out
    assert torch.equal(out, expected)
    assert (memory[..., h * w :] == 7).all()
    pooled = torch.empty(n, c, dtype=dtype, device=device)
    assert cf.activate_pool(x, *vectors, out=pooled) is pooled
    assert torch.equal(pooled, cf.activate_pool(x, *vectors))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda out: out.float(), "out must have x's dtype float64, got float32"),
        (lambda out: out[:1], r"out must be \(2, 5, 6, 7\), got \(1, 5, 6, 7\)"),
        (lambda out: out[0], r"out must be \(2, 5, 6, 7\), got \(5, 6, 7\)"),
    ],
)
def test_given_output_that_does_not_fit(change, message):
    x, weight = cases.make_input(SMALL, torch.float64), cases.make_weight(SMALL, torch.float64)
    vectors = cases.make_vectors(SMALL, torch.float64, 3)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.convmixer_fast.fused_depthwise.out(
            x, weight, *vectors, 1, True, None, None, None, out=change(x.clone())
        )


def test_given_output_apart_from_the_input():
    both = torch.zeros(2, 5, 12, 7)
    weight, vectors = torch.zeros(5, 1, 3, 3), cases.make_vectors(SMALL, torch.float32, 3)
    with pytest.raises(RuntimeError, match="out must not share memory with x"):
        cf.fused_depthwise(both[:, :, :6], weight, *vectors, out=both[:, :, 5:11])
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        cf.activate_pool(both, *vectors, out=torch.zeros(5, 2).t())


def test_gradients_of_the_fused_operators_are_refused():
    x, weight, v = small_arguments()
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="weight requires a gradient.*no_grad"):
        cf.fused_depthwise(x, weight, *v[:3])
    with pytest.raises(RuntimeError, match="prologue requires a gradient"):
        cf.fused_depthwise(x, weight.detach(), *v[:3], prologue=(v[3].requires_grad_(), *v[4:]))
    with torch.no_grad():
        cf.fused_depthwise(x, weight, *v[:3])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(3, 4, 5)), r"x must be \(N, C, H, W\), got 3 dimensions: \(3, 4, 5\)"),
        (dict(x=torch.zeros(2, 5, 6, 7, dtype=torch.int32)), "x must be float64, float32, .* got int32"),
        (dict(weight=torch.zeros(5, 1, 3, 3).half()), "weight must have x's dtype float32, got float16"),
        (dict(weight=torch.zeros(4, 1, 3, 3)), r"weight must be \(C, 1, kh, kw\) with C = 5 .* got \(4, 1, 3, 3\)"),
        (dict(weight=torch.zeros(5, 1, 0, 3)), r"kh, kw from 1 to 16777216, got \(5, 1, 0, 3\)"),
        (dict(weight=torch.zeros(5, 3, 3)), r"weight must be .* got \(5, 3, 3\)"),
        (dict(bias=torch.zeros(5).double()), "bias must be float32 for float32 x, got float64"),
        (dict(scale=torch.zeros(6)), r"scale must be \(C,\) with C = 5 channels as x, got \(6\)"),
        (dict(shift=torch.zeros(5, 1)), r"shift must be \(C,\)"),
        (dict(activation="tanh"), "activation must be one of 'none', 'gelu', 'relu', got 'tanh'"),
        (dict(prologue=torch.zeros(3, 5)), "prologue must be None or three tensors"),
        (dict(prologue=(torch.zeros(5), torch.zeros(5), torch.zeros(4))), r"prologue\[2\] \(shift\) must be \(C,\)"),
        (dict(prologue=(torch.zeros(5), None, None)), "prologue must give all of bias, scale and shift"),
    ],
)
def test_errors_name_the_argument(change, message):
    x, weight, v = small_arguments()
    arguments = dict(x=x, weight=weight, bias=v[0], scale=v[1], shift=v[2]) | change
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        cf.fused_depthwise(**arguments)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        cf.depthwise_conv2d([1.0], torch.zeros(1, 1, 3, 3))


def test_error_of_a_failed_allocation():
    x = torch.zeros(1, 1, 1, 1).expand(2**20, 2**20, 2**10, 8)
    with pytest.raises(torch.OutOfMemoryError, match=r"could not allocate the output, \(1048576, 1048576, 1024, 8\)"):
        cf.depthwise_conv2d(x, torch.zeros(1, 1, 1, 1).expand(2**20, 1, 1, 1))


# ------------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
def test_current_stream_and_graph_capture():
    x, weight, v = small_arguments("cuda", torch.float16)
    expected = cf.fused_depthwise(x, weight, *v[:3])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cf.fused_depthwise(x, weight, *v[:3])
    y.zero_()
    x.neg_()
    graph.replay()
    assert torch.equal(y, cf.fused_depthwise(x, weight, *v[:3]))
    assert not torch.equal(y, expected)


@pytest.mark.cuda
def test_device_guard():
    x, weight, _ = small_arguments(f"cuda:{torch.cuda.device_count() - 1}")
    with torch.cuda.device(0):
        y = cf.depthwise_conv2d(x, weight)
    assert y.device == x.device
    assert_error_at_most_peer(
        y,
        reference.depthwise_conv2d(x, weight),
        reference.depthwise_conv2d(x.double(), weight.double()),
        "on the last device",
    )


@pytest.mark.cuda
def test_mixed_devices_are_refused():
    x, weight, _ = small_arguments()
    with pytest.raises(RuntimeError, match="weight must be on x's device"):
        cf.depthwise_conv2d(x.cuda(), weight)


@pytest.mark.cuda
@pytest.mark.sanitize
@dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_few_launches_for_the_sanitizer(dtype, layout):
    sizes = (
        (3, 17, 14, 14, 7, 7),
        (1, 5, 33, 29, 11, 11),
        (2, 3, 7, 7, 15, 15),
        (2, 3, 32, 32, 9, 9),
        (1, 2, 270, 66, 8, 8),
    )
    for size in sizes:
        check_fused(cases.Case(*size), dtype, layout, "cuda")
