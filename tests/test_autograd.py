"""The gradients of depthwise_conv2d: accuracy against float64, to any order, and through what torch does with them."""

import copy

import cases
import pytest
import torch
import torch.nn.functional as F
from numerics import assert_error_at_most_peer
from torch.nn.utils._expanded_weights import ExpandedWeight
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._python_dispatch import TorchDispatchMode

import convmixer_fast as cf
from convmixer_fast import reference

pytestmark = pytest.mark.usefixtures("two_threads")

_ops = torch.ops.convmixer_fast
SMALL = cases.Case(2, 5, 6, 7, 3, 4)
CHECKED = [  # by finite differences
    cases.Case(1, 1, 1, 1, 1, 1),
    cases.Case(2, 2, 3, 2, 5, 7),  # nothing but edges
    cases.Case(2, 3, 5, 4, 3, 3),
    cases.Case(1, 2, 4, 6, 2, 4),
    cases.Case(1, 1, 2, 9, 1, 6),
]

device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=lambda d: str(d)[6:])
case = pytest.mark.parametrize("case", cases.CASES, ids=str)
layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def make_gy(case, dtype, layout="contiguous", device="cpu"):
    return cases.make_input(case, dtype, layout, device, seed=5)


def make_arguments(case, dtype=torch.float64, device="cpu"):
    """x, weight and bias, all of which require a gradient."""
    bias = cases.make_vectors(case, dtype, 1, device)[0].to(dtype)
    arguments = cases.make_input(case, dtype, device=device), cases.make_weight(case, dtype, device), bias
    return [tensor.requires_grad_() for tensor in arguments]


def gradients(op, tensors, gy):
    """Of x, weight and bias, from fresh leaves."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(op(*leaves), leaves, gy)


@device
@dtype
@case
@layout
def test_gradients(device, dtype, case, layout):
    x, weight, bias = (tensor.detach() for tensor in make_arguments(case, dtype, device))
    gy = make_gy(case, dtype, device=device)
    exact = gradients(reference.depthwise_conv2d, [t.double() for t in (x, weight, bias)], gy.double())
    peer = gradients(reference.depthwise_conv2d, [x, weight, bias], gy)
    in_layout = cases.LAYOUTS[layout]
    ours = gradients(cf.depthwise_conv2d, [in_layout(x), weight, bias], in_layout(gy))
    for name, *values in zip(("gx", "gweight", "gbias"), ours, peer, exact):
        assert_error_at_most_peer(*values, f"{name} {case} {layout} {dtype} on {device}")
    assert ours[0].stride() == in_layout(x).stride()


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.kh % 2 and case.kw % 2], ids=str)
def test_dgrad_is_the_conv2d_with_flipped_taps(case):
    """Of odd sizes, whose padding is its own mirror image; bit for bit, as they are one kernel."""
    for dtype in cases.DTYPES:
        gy, weight = make_gy(case, dtype), cases.make_weight(case, dtype)
        flipped = cf.depthwise_conv2d(gy, weight.flip(2, 3))
        assert torch.equal(_ops.depthwise_conv2d_dgrad(gy, weight), flipped)


@device
@pytest.mark.parametrize("gy_layout", ["contiguous", "channels_last", "batch_expanded"])
@pytest.mark.parametrize("x_layout", list(cases.LAYOUTS))
def test_wgrad_layouts(device, x_layout, gy_layout):
    """Those of x and gy are independent of each other."""
    for case in (SMALL, cases.Case(3, 17, 14, 14, 7, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            x, gy = cases.make_input(case, dtype, x_layout, device), make_gy(case, dtype, gy_layout, device)
            ours = _ops.depthwise_conv2d_wgrad(x, gy, case.kh, case.kw, True)
            plain = _ops.depthwise_conv2d_wgrad(x.contiguous(), gy.contiguous(), case.kh, case.kw, True)
            if device == "cpu":
                assert all(map(torch.equal, ours, plain)), "the CPU kernels sum in one order, whatever the layout"
            x, gy, weight = x.contiguous(), gy.contiguous(), cases.make_weight(case, dtype, device)
            bias = weight.new_zeros(case.c)
            exact = gradients(reference.depthwise_conv2d, [t.double() for t in (x, weight, bias)], gy.double())
            peer = gradients(reference.depthwise_conv2d, [x, weight, bias], gy)
            for name, *values in zip(("gweight", "gbias"), ours, peer[1:], exact[1:]):
                assert_error_at_most_peer(*values, f"{name} {case} {x_layout} {gy_layout} {dtype} on {device}")


@pytest.mark.parametrize("gradient_of", ["sum", "transposed"])
def test_gradients_that_arrive_in_odd_layouts(gradient_of):
    """From y.sum() comes one element, expanded; from a permuted use other strides."""
    function = {"sum": lambda y: y.sum(), "transposed": lambda y: (y.transpose(1, 3) ** 2).sum()}[gradient_of]
    arguments = make_arguments(SMALL)
    ours = torch.autograd.grad(function(cf.depthwise_conv2d(*arguments)), arguments)
    exact = torch.autograd.grad(function(reference.depthwise_conv2d(*arguments)), arguments)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@device
@pytest.mark.parametrize("case", cases.EMPTY_CASES, ids=str)
def test_empty(device, case):
    arguments = make_arguments(case, torch.float32, device)
    gx, gweight, gbias = torch.autograd.grad(cf.depthwise_conv2d(*arguments).sum(), arguments)
    assert gx.shape == arguments[0].shape
    assert torch.equal(gweight, torch.zeros_like(gweight)) and gweight.shape == arguments[1].shape
    assert torch.equal(gbias, torch.zeros_like(gbias)) and gbias.shape == arguments[2].shape


def test_wgrad_has_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for case in (cases.Case(2, 48, 32, 32, 9, 9), cases.Case(40, 3, 9, 9, 5, 5)):  # few channels: split by images
            x, gy = cases.make_input(case, torch.float32), make_gy(case, torch.float32)
            results = []
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                results.append(_ops.depthwise_conv2d_wgrad(x, gy, case.kh, case.kw, True))
            assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_every_time(dtype):
    case = cases.Case(8, 48, 32, 32, 9, 9)
    x, gy = cases.make_input(case, dtype, device="cuda"), make_gy(case, dtype, device="cuda")
    first = _ops.depthwise_conv2d_wgrad(x, gy, 9, 9, True)
    for _ in range(20):
        assert all(map(torch.equal, first, _ops.depthwise_conv2d_wgrad(x, gy, 9, 9, True)))


@device
def test_wgrad_of_more_than_2_31_elements(device):
    """All rows are one, so each row of taps is a row's contribution as often as it meets a row."""
    channels, height, width = 64, 2**13 + 1, 2**12
    rows = torch.randn(2, width, channels, device=device).bfloat16()
    x, gy = (row.expand(1, height, width, channels).permute(0, 3, 1, 2) for row in rows)
    assert x.numel() > 2**31
    gweight, gbias = _ops.depthwise_conv2d_wgrad(x, gy, 3, 3, True)
    once = _ops.depthwise_conv2d_wgrad(x[:, :, :1].double(), gy[:, :, :1].double(), 3, 3, True)
    times = torch.tensor([height - 1, height, height - 1], device=device).view(3, 1)
    for ours, exact in ((gweight, times * once[0][:, :, 1:2]), (gbias, height * once[1])):
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=1.0)


@pytest.mark.cuda
@pytest.mark.sanitize
@dtype
@layout
def test_few_launches_for_the_sanitizer(dtype, layout):
    for sizes in ((3, 17, 14, 14, 7, 7), (1, 5, 33, 29, 11, 11), (2, 3, 32, 32, 9, 9)):
        test_gradients("cuda", dtype, cases.Case(*sizes), layout)


# ---------------------------------------------------------------------------------------- derivatives of any order


@device
@pytest.mark.parametrize("case", CHECKED, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(device, case, bias):
    arguments = make_arguments(case, device=device)[: 3 if bias else 2]
    options = dict(check_batched_grad=True, fast_mode=False)
    assert torch.autograd.gradcheck(cf.depthwise_conv2d, arguments, check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(cf.depthwise_conv2d, arguments, **options)


def unbatched_reference(x, weight, bias):
    return reference.depthwise_conv2d(x[None], weight, bias)[0]


@device
def test_unbatched(device):
    """(C, H, W) as F.conv2d takes it: values, gradients, vmap and torch.func."""
    x, weight, bias = make_arguments(SMALL, device=device)
    x = x.detach()[0].requires_grad_()
    y = cf.depthwise_conv2d(x, weight, bias)
    assert y.shape == x.shape
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding="same", groups=5), rtol=1e-12, atol=1e-12)
    for name in ("grad", "jvp", "vmap over weight", "vmap over bias", "vmap over all"):
        ours, exact = (
            torch.utils._pytree.tree_leaves(TRANSFORMS[name](op, x, weight, bias))
            for op in (cf.depthwise_conv2d, unbatched_reference)
        )
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_gradcheck_of_the_gradients():
    x, weight, _ = make_arguments(SMALL)
    gy = make_gy(SMALL, torch.float64).requires_grad_()
    dgrad, wgrad = _ops.depthwise_conv2d_dgrad.default, _ops.depthwise_conv2d_wgrad.default
    assert torch.autograd.gradcheck(dgrad, (gy, weight), check_forward_ad=True)
    for bias in (True, False):
        assert torch.autograd.gradcheck(wgrad, (x, gy, 3, 4, bias), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(wgrad, (x, gy, 3, 4, bias))


def third_order(op, x, weight, bias):
    def loss(x, weight):
        return op(x, weight, bias).pow(4).sum()

    by_x = torch.func.grad(loss)
    by_weight = torch.func.grad(lambda x, weight: by_x(x, weight).pow(3).sum(), argnums=1)
    return torch.func.grad(lambda x, weight: by_weight(x, weight).square().sum())(x, weight)


TRANSFORMS = {
    "grad": lambda op, x, w, b: torch.func.grad(lambda *a: op(*a).square().sum(), argnums=(0, 1, 2))(x, w, b),
    "third order": third_order,
    "hessian": lambda op, x, w, b: torch.func.hessian(lambda w: op(x, w, b).square().sum())(w),
    "jacrev": lambda op, x, w, b: torch.func.jacrev(op, argnums=(0, 1))(x, w, b),
    "jvp": lambda op, x, w, b: torch.func.jvp(op, (x, w, b), (2 * x, w * w, b + 1)),
    "jvp of jvp": lambda op, x, w, b: torch.func.jvp(
        lambda x: torch.func.jvp(lambda w: op(x, w, b), (w,), (w * w,))[1], (x,), (x * x,)
    ),
    "gradients of each image": lambda op, x, w, b: torch.func.vmap(
        torch.func.grad(lambda w, b, x: op(x[None], w, b).square().sum(), argnums=(0, 1)), (None, None, 0)
    )(w, b, x),
    "vmap over x": lambda op, x, w, b: torch.func.vmap(lambda x: op(x, w, b), 3, 1)(torch.stack([x, 2 * x, x * x], 3)),
    "vmap over weight": lambda op, x, w, b: torch.func.vmap(lambda w: op(x, w, b), 4)(torch.stack([w, 2 * w], 4)),
    "vmap over bias": lambda op, x, w, b: torch.func.vmap(lambda b: op(x, w, b))(torch.stack([b, 2 * b])),
    "vmap over all": lambda op, x, w, b: torch.func.vmap(op)(*(torch.stack([t, t * t]) for t in (x, w, b))),
    "vmap of vmap": lambda op, x, w, b: torch.func.vmap(
        lambda x: torch.func.vmap(lambda w: op(x, w, b))(torch.stack([w, 2 * w]))
    )(torch.stack([x, 2 * x])),
}


@device
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(device, transform):
    arguments = make_arguments(cases.Case(2, 2, 4, 3, 3, 2), device=device)
    ours, exact = (TRANSFORMS[transform](op, *arguments) for op in (cf.depthwise_conv2d, reference.depthwise_conv2d))
    ours, exact = map(torch.utils._pytree.tree_leaves, (ours, exact))
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "convmixer_fast":
            self.operators.append((function._opname.removeprefix("depthwise_conv2d_"), *args[4:]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "needed, operators",
    [
        ("x", [("dgrad",)]),
        ("weight", [("wgrad", False)]),
        ("bias", []),
        ("weight bias", [("wgrad", True)]),
        ("x bias", [("dgrad",)]),
        ("x weight bias", [("dgrad",), ("wgrad", True)]),
    ],
)
def test_only_what_is_needed_is_computed(needed, operators):
    arguments = make_arguments(SMALL)
    for name, tensor in zip(("x", "weight", "bias"), arguments):
        tensor.requires_grad_(name in needed.split())
    y = cf.depthwise_conv2d(*arguments)
    kept = {id(tensor) for tensor in y.grad_fn.saved_tensors if tensor is not None}
    assert len(kept) == ("x" in needed.split()) + ("weight" in needed.split())
    with Recorder() as recorder:
        y.backward(torch.ones_like(y))
    assert recorder.operators == operators
    for tensor in arguments:
        assert (tensor.grad is not None) == tensor.requires_grad


# ---------------------------------------------------------------------------------------------- torch's machinery


@device
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_opcheck(device, layout):
    x, weight, bias = make_arguments(SMALL, torch.float32, device)
    x = cases.LAYOUTS[layout](x.detach()).requires_grad_()
    gy = make_gy(SMALL, torch.float32, layout, device).requires_grad_()
    torch.library.opcheck(_ops.depthwise_conv2d.default, (x, weight, bias))
    torch.library.opcheck(_ops.depthwise_conv2d.default, (x, weight, None))
    torch.library.opcheck(_ops.depthwise_conv2d_dgrad.default, (gy, weight))
    for needs_bias in (True, False):
        torch.library.opcheck(_ops.depthwise_conv2d_wgrad.default, (x, gy, SMALL.kh, SMALL.kw, needs_bias))


def loss(x, weight, bias):
    return (F.gelu(cf.depthwise_conv2d(x, weight, bias)) * x).sum()


@device
@pytest.mark.parametrize("dynamic", [*cases.slow(False), True])
def test_compile(device, dynamic):
    arguments = make_arguments(SMALL, torch.float32, device)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        arguments[0] = arguments[0].detach()[:1].repeat(batch, 1, 1, 1).requires_grad_()
        ours = torch.autograd.grad(compiled(*arguments), arguments)
        for a, b in zip(ours, torch.autograd.grad(loss(*arguments), arguments)):
            torch.testing.assert_close(a, b)


def peer_conv2d(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=(1, 1), groups=x.shape[1])


@device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(device, dtype, compiled):
    """As F.conv2d: computes in the lower precision, gives gradients of the arguments' own, leaves float64 alone."""

    def under_autocast(op, *arguments):
        with torch.autocast(device, dtype):
            return op(*arguments)

    case = cases.Case(2, 5, 6, 7, 3, 3)
    arguments = make_arguments(case, torch.float32, device)
    ours = torch.compile(under_autocast, fullgraph=True) if compiled else under_autocast
    y, peer = ours(cf.depthwise_conv2d, *arguments), under_autocast(peer_conv2d, *arguments)
    gy = make_gy(case, dtype, device=device)
    rounded = [tensor.detach().to(dtype).double().requires_grad_() for tensor in arguments]
    exact = reference.depthwise_conv2d(*rounded)
    results, peers = ((result, *torch.autograd.grad(result, arguments, gy)) for result in (y, peer))
    exact = (exact, *torch.autograd.grad(exact, rounded, gy.double()))
    for name, result, its_peer, its_exact in zip(("y", "gx", "gweight", "gbias"), results, peers, exact):
        assert result.dtype == (dtype if name == "y" else torch.float32)
        what = f"autocast {name} {dtype} on {device}"
        assert_error_at_most_peer(result.to(dtype), its_peer.to(dtype), its_exact, what)
    assert under_autocast(cf.depthwise_conv2d, *make_arguments(case, torch.float64, device)).dtype == torch.float64
    with pytest.raises(RuntimeError, match="weight must have x's dtype float64"):
        under_autocast(cf.depthwise_conv2d, arguments[0].double(), *arguments[1:])


def test_a_graph_of_gradients_under_autocast():
    x, weight, bias = make_arguments(SMALL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = cf.depthwise_conv2d(x, weight, bias)
        (gx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        (gweight,) = torch.autograd.grad(gx.sum(), weight)
    exact_x, exact_weight, exact_bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    y = reference.depthwise_conv2d(exact_x, exact_weight, exact_bias)
    (gx,) = torch.autograd.grad(y.square().sum(), exact_x, create_graph=True)
    (exact,) = torch.autograd.grad(gx.sum(), exact_weight)
    assert gweight.dtype == torch.float32
    assert (gweight.double() - exact).abs().max() <= 0.02 * exact.abs().max()


# ------------------------------------------------------------------------------------------- gradients of each image


def per_sample(op, arguments, reduction="sum"):
    """The gradient of x and the fields grad_sample of the parameters."""
    x, *parameters = (tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in arguments)
    weights = [ExpandedWeight(p, len(x), reduction) if p.requires_grad else p for p in parameters]
    y = op(x, *weights)
    (y.square() * torch.arange(1, 1 + len(x)).view(-1, 1, 1, 1)).sum().backward()
    assert all(parameter.grad is None for parameter in parameters)
    return [x.grad, *(getattr(parameter, "grad_sample", None) for parameter in parameters)]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("needed", ["x weight bias", "weight bias", "x weight", "x bias", "bias", "weight"])
@pytest.mark.parametrize("case", CHECKED[1:] + [SMALL], ids=str)
def test_per_sample_gradients(case, needed, reduction):
    arguments = make_arguments(case)[: 3 if "bias" in needed else 2]
    for name, tensor in zip(("x", "weight", "bias"), arguments):
        tensor.requires_grad_(name in needed.split())
    ours = per_sample(cf.depthwise_conv2d, arguments, reduction)
    x, *parameters = (tensor.detach() for tensor in arguments)
    scale = len(x) if reduction == "mean" else 1
    for index, gradient in enumerate(ours):
        if not arguments[index].requires_grad:
            assert gradient is None
            continue
        for image in range(len(x)):
            leaves = [t.clone().requires_grad_() for t in (x[image : image + 1], *parameters)]
            (reference.depthwise_conv2d(*leaves).square().sum() * (image + 1)).backward()
            exact = leaves[index].grad * scale if index else leaves[index].grad[0]
            torch.testing.assert_close(gradient[image], exact, rtol=1e-12, atol=1e-12)


def test_per_sample_gradients_are_of_one_kernel():
    with Recorder() as recorder:
        per_sample(cf.depthwise_conv2d, make_arguments(SMALL))
    assert recorder.operators == [("depthwise_conv2d",), ("wgrad", False), ("dgrad",)]


def per_sample_of_model(model, x, loss_reduction="sum", **options):
    y = call_for_per_sample_grads(model, loss_reduction=loss_reduction, **options)(x)
    getattr(torch, loss_reduction)(y.square().flatten(1).sum(1)).backward()
    return [parameter.grad_sample for parameter in model.parameters()]


def replaced_and_not(bias=True):
    conv = torch.nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=bias)
    theirs = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), conv, torch.nn.GELU(), copy.deepcopy(conv))
    ours = copy.deepcopy(theirs)
    assert cf.replace_depthwise(ours).count == 2
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_per_sample_gradients_of_a_model(bias, reduction):
    x = torch.randn(3, 4, 9, 8)
    with Recorder() as recorder:
        ours, theirs = (per_sample_of_model(model, x, reduction) for model in replaced_and_not(bias))
    assert recorder.operators.count(("wgrad", False)) == 2
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((4, 9, 8), {}, "only support convolution with batched input"),
        ((3, 4, 9, 8), dict(batch_size=2), "batch size matching input but got input batch size of 3"),
        ((3, 4, 9, 8), dict(batch_first=False), "batch size matching input but got input batch size of 3"),
        ((0, 4, 9, 8), dict(batch_size=2), "0 is not a valid batch size"),
    ],
)
def test_errors_of_per_sample_gradients(shape, options, message):
    for model in replaced_and_not():
        with pytest.raises(RuntimeError, match=message):
            per_sample_of_model(model[1], torch.randn(shape), **options)


def test_saved_tensors_notice_changes():
    x, weight, bias = make_arguments(SMALL)
    x = x.detach()
    y = cf.depthwise_conv2d(x, weight, bias)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2, 5, 6), torch.zeros(5, 1, 3, 3)), "gy must be .N, C, H, W., got 3 dimensions"),
        ((torch.zeros(2, 5, 6, 7), torch.zeros(4, 1, 3, 3)), r"with C = 5 channels as gy .* got \(4, 1, 3, 3\)"),
        ((torch.zeros(2, 5, 6, 7), torch.zeros(5, 1, 3, 3).half()), "weight must have gy's dtype float32, got float16"),
    ],
)
def test_errors_of_dgrad(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        _ops.depthwise_conv2d_dgrad(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 5, 6)), "x must be .N, C, H, W., got 3 dimensions"),
        (dict(x=torch.zeros(2, 5, 6, 7).long()), "x must be float64, float32, .* got int64"),
        (dict(gy=torch.zeros(2, 5, 6)), "gy must be .N, C, H, W., got 3 dimensions"),
        (dict(gy=torch.zeros(2, 5, 6, 8)), r"gy must have x's shape \(2, 5, 6, 7\), got \(2, 5, 6, 8\)"),
        (dict(gy=torch.zeros(2, 5, 6, 7).half()), "gy must have x's dtype float32, got float16"),
        (dict(kernel_w=0), "kernel_h and kernel_w must be from 1 to 16777216, got 3 and 0"),
    ],
)
def test_errors_of_wgrad(change, message):
    arguments = dict(x=torch.zeros(2, 5, 6, 7), gy=torch.zeros(2, 5, 6, 7), kernel_h=3, kernel_w=4, bias=True) | change
    with pytest.raises(RuntimeError, match=message):
        _ops.depthwise_conv2d_wgrad(*arguments.values())
