"""DepthwiseConv2d as an nn.Conv2d, replace_depthwise in models that know nothing of it, and restore_depthwise."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import convmixer_fast
from convmixer_fast import DepthwiseConv2d, optimize, replace_depthwise, restore_depthwise
from convmixer_fast.nn import Replaced

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("two_threads"),
]


def plain(channels, kernel_size, bias=True, **options):
    return nn.Conv2d(channels, channels, kernel_size, groups=channels, padding="same", bias=bias, **options)


@pytest.mark.parametrize("kernel_size", [9, 4, (3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_is_a_conv2d(kernel_size, bias):
    torch.manual_seed(0)
    theirs = plain(6, kernel_size, bias)
    torch.manual_seed(0)
    ours = DepthwiseConv2d(6, kernel_size, bias)
    assert repr(ours) == repr(theirs).replace("Conv2d", "DepthwiseConv2d")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 8, 7)
    assert torch.equal(ours(x), convmixer_fast.depthwise_conv2d(x, theirs.weight, theirs.bias))
    assert torch.equal(ours(x[0]), ours(x)[0])
    torch.testing.assert_close(ours.double()(x.double()), theirs.double()(x.double()), rtol=1e-12, atol=1e-12)


def test_device_and_dtype():
    module = DepthwiseConv2d(4, 3, device="meta", dtype=torch.bfloat16)
    assert (module.weight.device.type, module.bias.dtype) == ("meta", torch.bfloat16)
    assert module(torch.empty(2, 4, 5, 5, device="meta", dtype=torch.bfloat16)).shape == (2, 4, 5, 5)


def test_copies_and_files():
    module = DepthwiseConv2d(4, 5)
    x, file = torch.randn(2, 4, 6, 6), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert type(other) is DepthwiseConv2d
        assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((96, 96, 7), TypeError, "bias must be a bool, got 7: .* DepthwiseConv2d.channels, kernel_size."),
        ((4, 3, None), TypeError, "bias must be a bool, got None"),
        ((4.0, 3), TypeError, "channels must be an int, got 4.0"),
        ((True, 3), TypeError, "channels must be an int, got True"),
        ((0, 3), ValueError, "channels must be at least 1, got 0"),
        ((4, 0), ValueError, "kernel_size must be at least 1, got 0"),
        ((4, -3), ValueError, "kernel_size must be at least 1, got -3"),
        ((4, "3"), TypeError, r"kernel_size must be an int or two of them, \(height, width\), got '3'"),
        ((4, False), TypeError, "kernel_size must be an int or two of them, .* got False"),
        ((4, (3, 3, 3)), TypeError, r"kernel_size must be an int or two of them, .* got \(3, 3, 3\)"),
        ((4, (3, 0)), ValueError, r"kernel_size\[1\] must be at least 1, got 0"),
        ((4, (3.0, 3)), TypeError, r"kernel_size\[0\] must be an int, got 3.0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        DepthwiseConv2d(*arguments)


class Operators(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def runs_on_our_kernels(module, x):
    with Operators() as operators:
        module(x)
    ours, theirs = (name in operators.names for name in ("convmixer_fast::depthwise_conv2d", "aten::convolution"))
    assert ours != theirs, operators.names
    return ours


def pair_of_convolutions(kernel_size=5, **options):
    """PyTorch's, and the same replaced."""
    theirs = nn.Conv2d(4, 4, kernel_size, padding=kernel_size // 2, groups=4, **options)
    ours = copy.deepcopy(theirs)
    assert replace_depthwise(ours, min_kernel_size=1).count == 1
    return theirs, ours


CHANGES = {  # new attributes, and whether they are ours still
    "dilated": (dict(dilation=(2, 2), padding=(4, 4)), False),
    "dilated, as a number": (dict(dilation=2, padding=4), False),
    "strided": (dict(stride=(2, 2)), False),
    "strided one way": (dict(stride=[1, 2]), False),
    "unpadded": (dict(padding=(0, 0)), False),
    "valid": (dict(padding="valid"), False),
    "padded by other sizes": (dict(padding=(2, 1)), False),
    "circular": (dict(padding_mode="circular"), False),
    "reflect": (dict(padding_mode="reflect"), False),
    "replicate": (dict(padding_mode="replicate"), False),
    "numbers for pairs": (dict(stride=1, dilation=1, padding=2), True),
    "lists for pairs": (dict(stride=[1, 1], dilation=[1, 1], padding=[2, 2]), True),
    "same": (dict(padding="same"), True),
    "attributes that nn.Conv2d does not read": (dict(kernel_size=(7, 7), in_channels=9, out_channels=9), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_attributes_that_change_afterwards(change):
    """Whatever they say is computed, in each call, and by PyTorch's kernels where ours do not."""
    theirs, ours = pair_of_convolutions()
    attributes, on_ours = CHANGES[change]
    x = torch.randn(2, 4, 9, 8)
    assert runs_on_our_kernels(ours, x)
    for conv in (theirs, ours):
        for name, value in attributes.items():
            setattr(conv, name, value)
    for images in (x, x[0], x.double()):
        for conv in (theirs, ours):
            conv.to(images.dtype)
        assert runs_on_our_kernels(ours, images) is on_ours
        torch.testing.assert_close(ours(images), theirs(images))
    if "numbers" not in change and "number" not in change and "lists" not in change:
        assert repr(ours) == repr(theirs).replace("Conv2d", "DepthwiseConv2d")


class Subclass(torch.Tensor):
    """Knows of torch's functions alone what convolves, and no other of this package."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is not convmixer_fast.depthwise_conv2d
        return super().__torch_function__(function, types, args, kwargs or {})


WEIGHTS = {  # a change to the weight, what else has to change, the dtype of x
    "other size": (lambda weight: weight[..., :3, :3], dict(), torch.float32),
    "pruned channels": (lambda weight: weight[:3], dict(groups=3, in_channels=3, out_channels=3), torch.float32),
    "more filters": (lambda weight: torch.cat([weight, weight]), dict(out_channels=8), torch.float32),
    "dense": (lambda weight: weight.expand(4, 4, 5, 5), dict(groups=1), torch.float32),
    "int8": (lambda weight: (9 * weight).to(torch.int8), dict(), torch.int8),
    "complex": (lambda weight: weight.to(torch.complex64), dict(), torch.complex64),
    "subclass": (lambda weight: weight.as_subclass(Subclass), dict(), torch.float32),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_replaced(name):
    change, attributes, dtype = WEIGHTS[name]
    theirs, ours = pair_of_convolutions(bias=False)
    for conv in (theirs, ours):
        weight = change(conv.weight.detach())
        conv.weight = nn.Parameter(weight, requires_grad=weight.dtype != torch.int8)
        for attribute, value in attributes.items():
            setattr(conv, attribute, value)
    x = (9 * torch.randn(2, ours.in_channels, 9, 8)).to(dtype)
    expected, found = theirs(x), ours(x)
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)
    assert runs_on_our_kernels(ours, x) is (name == "pruned channels")


@pytest.mark.parametrize("device", ["cpu", "xpu", "mps"])
def test_devices(device):
    """By fake tensors, which need no such device."""
    _, ours = pair_of_convolutions(bias=False)
    with FakeTensorMode() as mode, Operators() as operators:
        x, weight = (
            FakeTensor(mode, torch.empty(shape, device="meta"), device) for shape in ((1, 4, 9, 8), (4, 1, 5, 5))
        )
        y = ours._conv_forward(x, weight, None)
    assert (y.shape, y.device.type) == (x.shape, device)
    assert ("convmixer_fast::depthwise_conv2d" in operators.names) == (device == "cpu")


class LargeKernelBlock(nn.Module):
    """RepLKNet's: 1x1, a large and a small depthwise kernel side by side, 1x1, residual."""

    def __init__(self, dim, kernel_size=13):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.expand = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())
        options = dict(groups=dim, bias=False)
        self.large = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, **options), nn.BatchNorm2d(dim)
        )
        self.small = nn.Sequential(nn.Conv2d(dim, dim, 5, padding=2, **options), nn.BatchNorm2d(dim))
        self.project = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        z = self.expand(self.norm(x))
        return x + self.project(torch.relu(self.large(z) + self.small(z)))


def large_kernel_net():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1),
        LargeKernelBlock(12),
        nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12),
        LargeKernelBlock(12, 7),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 7),
    )


def convnext():
    module = pytest.importorskip("timm.models.convnext")
    return module.ConvNeXt(num_classes=7, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), ls_init_value=0.5)


def timm_convmixer():
    module = pytest.importorskip("timm.models.convmixer")
    return module.ConvMixer(dim=12, depth=3, kernel_size=8, patch_size=4, num_classes=7)


MODELS = {"large kernels": (large_kernel_net, 4), "timm ConvNeXt": (convnext, 5), "timm ConvMixer": (timm_convmixer, 3)}
# So many that luck does not decide which of two ways to add is closer to float64.
IMAGES = torch.randn(60, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def results(model, images, train):
    """Logits, and in training the gradients of all parameters, and the buffers."""
    logits = model.train(train)(images)
    if not train:
        return dict(logits=logits.detach())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(logits.square().sum(), parameters.values())
    return dict(logits=logits.detach()) | dict(zip(parameters, gradients)) | dict(model.named_buffers())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name, train):
    torch.manual_seed(0)
    build, count = MODELS[name]
    model = build()
    replaced = copy.deepcopy(model)
    assert replace_depthwise(replaced).count == count
    exact = results(copy.deepcopy(model).double(), IMAGES.double(), train)
    in_double = results(copy.deepcopy(replaced).double(), IMAGES.double(), train)
    for key, expected in exact.items():
        torch.testing.assert_close(in_double[key], expected, rtol=1e-9, atol=1e-11, msg=partial("{}: {}".format, key))
    exact = torch.cat([tensor.flatten() for tensor in exact.values()]).double()
    errors = [
        torch.cat([tensor.flatten() for tensor in results(model, IMAGES, train).values()]).double() - exact
        for model in (replaced, model)
    ]
    ours, peer = (error.square().mean().sqrt().item() for error in errors)
    print(f"{name}, float32, root mean square error against float64: ours {ours:.3g}, peer {peer:.3g}")
    assert ours <= 1.2 * peer, "most of it is the rest of the network's, so that chance decides which is smaller"


def test_stays_the_same_module():
    """Parameters, hooks, mode, dtype, and what else refers to the module."""
    conv = plain(4, 5).to(torch.bfloat16).eval()
    conv.weight.requires_grad_(False)
    model = nn.Sequential(conv, nn.Sequential(conv))  # used twice
    optimizer = torch.optim.SGD(conv.parameters(), 0.1)
    weight, calls = conv.weight, []
    conv.register_forward_hook(lambda *_: calls.append("forward"))
    assert replace_depthwise(model) == Replaced(1, {})
    assert type(model[0]) is DepthwiseConv2d and model[0] is model[1][0] is conv
    assert conv.weight is weight is optimizer.param_groups[0]["params"][0]
    assert not conv.training and not conv.weight.requires_grad and conv.weight.dtype == torch.bfloat16
    model(torch.randn(1, 4, 6, 6).bfloat16())
    assert calls == ["forward"] * 2
    assert replace_depthwise(model) == Replaced(0, {}), "what is replaced stays"


def test_the_model_itself():
    conv = plain(3, 5)
    assert replace_depthwise(conv) == Replaced(1, {})
    assert type(conv) is DepthwiseConv2d
    conv = plain(3, 3)
    assert replace_depthwise(conv).skipped.keys() == {""}


class OtherConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def with_its_own_forward():
    conv = plain(4, 7)
    conv.forward = lambda x: x
    return conv


@pytest.mark.parametrize(
    "conv, reason",
    [
        (nn.Conv2d(4, 8, 7, padding=3, groups=4), "weight is (8, 1, 7, 7), accepted: (4, 1, height, width)"),
        (nn.Conv2d(4, 4, 7, padding=3, groups=4, stride=2), "stride is (2, 2), accepted: (1, 1)"),
        (plain(4, 7, dilation=2), "dilation is (2, 2), accepted: (1, 1)"),
        (nn.Conv2d(4, 4, 5, padding=1, groups=4), "padding is (1, 1), accepted: 'same' or (2, 2)"),
        (nn.Conv2d(4, 4, 8, padding=4, groups=4), "padding is (4, 4), accepted: 'same'"),
        (nn.Conv2d(4, 4, (3, 4), padding=(1, 2), groups=4), "padding is (1, 2), accepted: 'same'"),
        (plain(4, 7, padding_mode="circular"), "padding_mode is 'circular', accepted: 'zeros'"),
        (OtherConv2d(4, 4, 7, padding=3, groups=4), "it is test_nn.OtherConv2d, accepted: nn.Conv2d itself"),
        (with_its_own_forward(), "its forward was replaced"),
        (
            plain(4, 7, dtype=torch.complex64),
            "weight is torch.complex64, accepted: torch.float64, torch.float32, torch.float16, torch.bfloat16",
        ),
        (nn.Conv1d(4, 4, 31, groups=4), "it is torch.nn.modules.conv.Conv1d (1-D), accepted: nn.Conv2d itself"),
        (nn.Conv3d(4, 8, 5, groups=4), "it is torch.nn.modules.conv.Conv3d (3-D), accepted: nn.Conv2d itself"),
        (
            nn.ConvTranspose2d(4, 4, 7, groups=4),
            "it is torch.nn.modules.conv.ConvTranspose2d (transposed), accepted: nn.Conv2d itself",
        ),
        (
            nn.LazyConv2d(4, 7, groups=4),
            "it is torch.nn.modules.conv.LazyConv2d, accepted: nn.Conv2d itself, which it becomes in its first run",
        ),
    ],
)
def test_what_is_not_replaced(conv, reason):
    kind = type(conv)
    assert replace_depthwise(nn.Sequential(nn.Identity(), nn.Sequential(conv))) == Replaced(0, {"1.0": reason})
    assert type(conv) is kind


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 7, padding=3),
        nn.Conv2d(1, 8, 7, padding=3),
        nn.Conv2d(4, 4, 7, padding=3, groups=2),
        nn.Conv3d(4, 4, 7),
        nn.ConvTranspose2d(4, 8, 7),
        nn.LazyConv2d(8, 7),
        nn.GroupNorm(4, 4),
        DepthwiseConv2d(4, 7),
        OtherConv2d(4, 4, 7),
    ],
)
def test_what_is_no_depthwise_convolution_of_others(conv):
    assert replace_depthwise(nn.Sequential(conv)) == Replaced(0, {})


@pytest.mark.parametrize("convert", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(1, 4, 9, 9))])
def test_what_is_in_torchscript(convert):
    """Its classes tell nothing; a traced one keeps its weight alone."""
    model = nn.Sequential(plain(4, 7), nn.Conv2d(4, 4, 7), plain(4, 3), nn.ReLU())
    reason = "it is a Conv2d in TorchScript, accepted: nn.Conv2d itself, before it is compiled"
    assert replace_depthwise(nn.Sequential(convert(model))) == Replaced(0, {"0.0": reason, "0.2": reason})
    replace_depthwise(model, min_kernel_size=1)
    assert replace_depthwise(convert(model)) == Replaced(0, {}), "ours"


def kernels_of_many_sizes():
    sizes = (1, 2, 3, 4, 5, (1, 7), (3, 1))
    return nn.Sequential(*(plain(2, size) for size in sizes), nn.Conv2d(1, 1, 5, padding=2))


@pytest.mark.parametrize(
    "device, least, kept",
    [
        ("cpu", None, ["0", "1", "2", "6"]),
        ("meta", None, []),
        ("cpu", 1, []),
        ("cpu", 3, ["0", "1"]),
        ("cpu", 7, ["0", "1", "2", "3", "4", "6"]),
    ],
)
def test_min_kernel_size(device, least, kept):
    model = kernels_of_many_sizes().to(device)
    replaced = replace_depthwise(model, min_kernel_size=least)
    assert list(replaced.skipped) == kept
    for name, module in model.named_children():
        if name != "7":
            assert (type(module) is nn.Conv2d) == (name in kept)
    assert type(model[7]) is (nn.Conv2d if least == 7 else DepthwiseConv2d), "one channel is depthwise, and dense"
    if least == 7:
        assert replaced.skipped["6"] == "kernel_size is (3, 1), accepted: 7 or more on a side (min_kernel_size)"


def test_filter():
    model = nn.Sequential(
        plain(4, 5), nn.Sequential(plain(4, 7), nn.Conv2d(4, 4, 5)), plain(4, 3), plain(4, 5, bias=False)
    )
    seen = []

    def wanted(path, module):
        seen.append((path, module))
        return module.bias is not None

    assert replace_depthwise(model, filter=wanted).skipped.pop("3") == "filter returned False"
    assert seen == [("0", model[0]), ("1.0", model[1][0]), ("3", model[3])], "those that qualify"
    assert [type(model[0]), type(model[1][0]), type(model[3])] == [DepthwiseConv2d, DepthwiseConv2d, nn.Conv2d]


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(min_kernel_size=0), ValueError, "min_kernel_size must be at least 1, got 0"),
        (dict(min_kernel_size=5.0), TypeError, "min_kernel_size must be None or an int, got 5.0"),
        (dict(min_kernel_size=True), TypeError, "min_kernel_size must be None or an int, got True"),
        (dict(filter="blocks"), TypeError, "filter must be None or a function of a path and a module, got 'blocks'"),
        (dict(filter=lambda path, module: None), TypeError, "filter must return a bool, got None for '0'"),
        (dict(filter=lambda path, module: 0 if path == "1" else True), TypeError, "got 0 for '1'"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    model = nn.Sequential(plain(4, 5), plain(4, 5))
    with pytest.raises(error, match=message):
        replace_depthwise(model, **options)
    assert [type(conv) for conv in model] == [nn.Conv2d] * 2, "as it was"


def test_what_was_done_is_short_to_read():
    efficientnet = pytest.importorskip("timm").create_model("efficientnet_b0")
    replaced = replace_depthwise(efficientnet)
    assert repr(replaced) == (
        "Replaced(count=7, skipped=9:\n"
        "  'blocks.0.0.conv_dw' and 4 more: kernel_size is (3, 3), accepted: 4 or more on a side (min_kernel_size)\n"
        "  'blocks.1.0.conv_dw' and 3 more: stride is (2, 2), accepted: (1, 1))"
    )
    assert all(efficientnet.get_submodule(path).groups > 1 for path in replaced.skipped)
    assert repr(Replaced(3, {})) == "Replaced(count=3, skipped=0)"


def test_wrapped():
    """By modules that show the attributes of what is inside as theirs, and have no weight of their own."""

    class Wrapper(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self._modules["inside"], name)

    assert replace_depthwise(Wrapper(plain(4, 5))) == replace_depthwise(torch.compile(plain(4, 5))) == Replaced(1, {})
    sharded = plain(4, 5)
    del sharded.weight
    reason = "weight is a builtins.NoneType, accepted: a torch.Tensor itself"
    assert replace_depthwise(nn.Sequential(Wrapper(sharded))) == Replaced(0, {"0.inside": reason})


def test_weights_that_are_computed():
    """Parametrized by torch's newer way, a module has a class of its own; by older ones it is still an nn.Conv2d."""
    model = nn.Sequential(parametrizations.weight_norm(plain(4, 5)), parametrizations.spectral_norm(plain(4, 5)))
    before = copy.deepcopy(model.state_dict())
    assert all("ParametrizedConv2d" in reason for reason in replace_depthwise(model).skipped.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "not computed anew"
    for wrap in (nn.utils.weight_norm, lambda conv: prune.random_unstructured(conv, "weight", 0.5)):
        conv = wrap(plain(4, 5)).double()
        x = torch.randn(1, 4, 9, 8, dtype=torch.float64)
        expected = conv(x)
        assert replace_depthwise(conv).count == 1
        torch.testing.assert_close(conv(x), expected)
        assert runs_on_our_kernels(conv, x)


def test_not_a_module():
    for function in (replace_depthwise, restore_depthwise):
        with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
            function("convnext")


def test_restore():
    """What was replaced, and what was made by us; with hooks, parameters and files, and not what never was ours."""
    torch.manual_seed(0)
    model = nn.Sequential(plain(4, 5), nn.Sequential(plain(4, 4), nn.Conv2d(4, 4, 1)), OtherConv2d(4, 4, 5))
    before = pickle.dumps(model)
    replace_depthwise(model)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    parameters = list(model.parameters())
    x = torch.randn(2, 4, 9, 8)
    expected = pickle.loads(before)(x)
    assert restore_depthwise(model) == 2
    assert torch.equal(model(x), expected), "PyTorch's kernels, so PyTorch's bits"
    assert calls == ["forward"]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    model[0]._forward_hooks.clear()
    assert pickle.dumps(model) == before
    assert restore_depthwise(model) == 0
    assert replace_depthwise(model).count == 2, "and again"

    ours = DepthwiseConv2d(4, 5)
    theirs = plain(4, 5)
    theirs.load_state_dict(ours.state_dict())
    assert restore_depthwise(ours) == 1 and type(ours) is nn.Conv2d
    assert repr(ours) == repr(theirs) and torch.equal(ours(x), theirs(x))

    class Derived(DepthwiseConv2d):
        pass

    assert restore_depthwise(Derived(4, 5)) == 0


def test_restore_of_what_was_parametrized():
    conv = plain(4, 5)
    replace_depthwise(conv)
    parametrizations.weight_norm(conv)
    other = copy.deepcopy(conv)
    x = torch.randn(1, 4, 9, 8)
    expected = conv(x)
    assert restore_depthwise(nn.Sequential(conv)) == 1
    assert not runs_on_our_kernels(conv, x) and runs_on_our_kernels(other, x), "a copy shares the class, and stays"
    torch.testing.assert_close(conv(x), expected)
    assert torch.equal(copy.deepcopy(conv)(x), conv(x))
    assert type(nn.utils.parametrize.remove_parametrizations(conv, "weight")) is nn.Conv2d
    assert type(nn.utils.parametrize.remove_parametrizations(other, "weight")) is DepthwiseConv2d


def test_restored_models_are_quantized_as_if_never_replaced():
    quantization = pytest.importorskip("torch.ao.quantization")

    def quantized(change):
        torch.manual_seed(0)
        model = nn.Sequential(
            quantization.QuantStub(),
            nn.Conv2d(8, 8, 7, padding=3, groups=8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            quantization.DeQuantStub(),
        ).eval()
        change(model)
        model = quantization.fuse_modules(model, [["1", "2", "3"]])
        model.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(model)
        x = torch.randn(2, 8, 9, 9)
        prepared(x)
        converted = quantization.convert(prepared)
        reason = "it is torch.ao.nn.intrinsic.quantized.modules.conv_relu.ConvReLU2d, accepted: nn.Conv2d itself"
        assert replace_depthwise(converted) == Replaced(0, {"1": reason})
        return converted(x)

    def there_and_back(model):
        assert replace_depthwise(model).count == 1
        restore_depthwise(model)

    assert torch.equal(quantized(there_and_back), quantized(lambda model: None))


def test_optimize_takes_a_replaced_model():
    torch.manual_seed(0)
    model = timm_convmixer().eval()
    expected = optimize(model)(IMAGES)
    replace_depthwise(model)
    assert torch.equal(optimize(model)(IMAGES), expected)


def test_our_convmixer_uses_it():
    model = convmixer_fast.ConvMixer(8, 2, kernel_size=5, patch_size=2)
    assert sum(isinstance(module, DepthwiseConv2d) for module in model.modules()) == 2
