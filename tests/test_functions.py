"""The public functions as torch's own: what __torch_function__ sees of them, and the types of their arguments."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import convmixer_fast as cf

pytestmark = pytest.mark.usefixtures("two_threads")

X, WEIGHT, VECTORS = torch.randn(2, 4, 6, 7), torch.randn(4, 1, 3, 5), torch.randn(3, 4)
PROLOGUE = tuple(torch.randn(3, 4))
FUNCTIONS = {  # and arguments, with every tensor that they take
    cf.depthwise_conv2d: dict(x=X, weight=WEIGHT, bias=VECTORS[0]),
    cf.fused_depthwise: dict(
        x=X,
        weight=WEIGHT,
        bias=VECTORS[0],
        scale=VECTORS[1],
        shift=VECTORS[2],
        activation="relu",
        residual=False,
        prologue=PROLOGUE,
        out=torch.empty_like(X),
    ),
    cf.activate_pool: dict(
        x=X, bias=VECTORS[0], scale=VECTORS[1], shift=VECTORS[2], activation="relu", out=torch.empty(2, 4)
    ),
}
function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


class Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@function
def test_a_mode_sees_one_call(function):
    expected = function(**copy.deepcopy(FUNCTIONS[function])).clone()
    arguments = copy.deepcopy(FUNCTIONS[function])
    with Calls() as mode:
        result = function(**arguments)
    ((called, args, kwargs),) = mode.calls
    assert called is function
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    assert {name: given.get(name) is value for name, value in arguments.items()} == dict.fromkeys(arguments, True)
    assert torch.equal(result, expected)


class Logged(torch.Tensor):
    calls = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def logged(value):
    return tuple(map(logged, value)) if isinstance(value, tuple) else value.as_subclass(Logged)


@pytest.mark.parametrize(
    "function, name",
    [
        (function, name)
        for function, arguments in FUNCTIONS.items()
        for name, value in arguments.items()
        if not isinstance(value, (str, bool))
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_subclass_sees_one_call(function, name):
    """Whichever argument is of it; the result is of it too, as of torch's functions."""
    arguments = copy.deepcopy(FUNCTIONS[function])
    expected = function(**arguments).clone()
    arguments[name] = logged(arguments[name])
    Logged.calls.clear()
    result = function(**arguments)
    assert function in Logged.calls
    assert [call for call in Logged.calls if call in FUNCTIONS] == [function]
    assert type(result) is Logged
    assert torch.equal(result.as_subclass(torch.Tensor), expected)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", [torch.Tensor, Subclass])
def test_in_a_graph_of_dynamo(kind):
    """Without a break, as the types of arguments are checked and subclasses asked."""

    def all_of_them(x, weight):
        y = cf.depthwise_conv2d(x, weight)
        y = cf.fused_depthwise(y, weight, *VECTORS, prologue=PROLOGUE)
        return cf.activate_pool(y, *VECTORS)

    torch.compiler.reset()
    compiled = torch.compile(all_of_them, fullgraph=True, backend="eager")
    for x in (X.as_subclass(kind), 2 * X.as_subclass(kind)):
        y = compiled(x, WEIGHT)
        assert type(y) is kind
        assert torch.equal(y, all_of_them(x, WEIGHT))
    with torch.device("cpu"):  # a mode, of torch's own
        x = x.as_subclass(torch.Tensor)
        assert torch.equal(compiled(x, WEIGHT), all_of_them(x, WEIGHT))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [VECTORS[0], None])
def test_one_image(memory_format, bias):
    """The same bits as in a batch, in the layout of F.conv2d's."""
    batch = X.contiguous(memory_format=memory_format)
    y = cf.depthwise_conv2d(batch[1], WEIGHT, bias)
    assert torch.equal(y, cf.depthwise_conv2d(batch, WEIGHT, bias)[1])
    peer = F.conv2d(batch[1], WEIGHT, bias, padding="same", groups=4)
    torch.testing.assert_close(y, peer)
    assert y.stride() == peer.stride()
    for shape in ((4, 0, 7), (4, 6, 0)):
        assert cf.depthwise_conv2d(torch.empty(shape), WEIGHT).shape == shape


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1.0], WEIGHT), "x must be a Tensor, got list"),
        ((None, WEIGHT), "x must be a Tensor, got NoneType"),
        ((X, 3), "weight must be a Tensor, got int"),
        ((X, WEIGHT, 3), "bias must be a Tensor or None, got 3: unlike F.conv2d, .* takes no stride"),
        ((X, WEIGHT, True), "bias must be a Tensor or None, got True"),
        ((X, WEIGHT, "same"), "bias must be a Tensor or None, got 'same'"),
    ],
)
def test_types_of_depthwise_conv2d(arguments, message):
    with pytest.raises(TypeError, match=message):
        cf.depthwise_conv2d(*arguments)


@pytest.mark.parametrize("residual", [1, None, "relu", 0.5])
def test_types_of_fused_depthwise(residual):
    with pytest.raises(TypeError, match="residual must be a bool, got "):
        cf.fused_depthwise(X, WEIGHT, *VECTORS, "gelu", residual)


@pytest.mark.parametrize("activation", [None, True, "GELU", torch.nn.GELU(), ["gelu"]])
def test_types_of_activations(activation):
    for call in (
        lambda: cf.fused_depthwise(X, WEIGHT, *VECTORS, activation),
        lambda: cf.activate_pool(X, *VECTORS, activation),
    ):
        with pytest.raises(ValueError, match="activation must be one of 'none', 'gelu', 'relu', got "):
            call()
