"""DepthwiseConv2d as an nn.Conv2d, and replace_depthwise in models that know nothing of it."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

import convmixer_fast
from convmixer_fast import DepthwiseConv2d, optimize, replace_depthwise
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
    conv = plain(3, 3)
    assert replace_depthwise(conv) == Replaced(1, {})
    assert type(conv) is DepthwiseConv2d


class OtherConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def with_its_own_forward():
    conv = plain(4, 3)
    conv.forward = lambda x: x
    return conv


@pytest.mark.parametrize(
    "conv, reason",
    [
        (nn.Conv2d(4, 4, 3, padding=1), "groups is 1, accepted: 4"),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), "out_channels is 8, accepted: 4"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, stride=2), "stride is (2, 2), accepted: (1, 1)"),
        (plain(4, 3, dilation=2), "dilation is (2, 2), accepted: (1, 1)"),
        (nn.Conv2d(4, 4, 5, padding=1, groups=4), "padding is (1, 1), accepted: 'same' or (2, 2)"),
        (nn.Conv2d(4, 4, 8, padding=4, groups=4), "padding is (4, 4), accepted: 'same'"),
        (nn.Conv2d(4, 4, (3, 4), padding=(1, 2), groups=4), "padding is (1, 2), accepted: 'same'"),
        (plain(4, 3, padding_mode="circular"), "padding_mode is 'circular', accepted: 'zeros'"),
        (OtherConv2d(4, 4, 3, padding=1, groups=4), "it is OtherConv2d, accepted: nn.Conv2d itself"),
        (with_its_own_forward(), "its forward was replaced"),
        (
            plain(4, 3, dtype=torch.complex64),
            "weight is torch.complex64, accepted: torch.float64, torch.float32, torch.float16, torch.bfloat16",
        ),
    ],
)
def test_what_is_not_replaced(conv, reason):
    kind = type(conv)
    assert replace_depthwise(nn.Sequential(nn.Identity(), nn.Sequential(conv))) == Replaced(0, {"1.0": reason})
    assert type(conv) is kind


def test_parametrized():
    conv = nn.utils.parametrizations.weight_norm(plain(4, 3))
    assert "ParametrizedConv2d" in replace_depthwise(nn.Sequential(conv)).skipped["0"]


def test_not_a_module():
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        replace_depthwise("convnext")


def test_optimize_takes_a_replaced_model():
    torch.manual_seed(0)
    model = timm_convmixer().eval()
    expected = optimize(model)(IMAGES)
    replace_depthwise(model)
    assert torch.equal(optimize(model)(IMAGES), expected)


def test_our_convmixer_uses_it():
    model = convmixer_fast.ConvMixer(8, 2, kernel_size=5, patch_size=2)
    assert sum(isinstance(module, DepthwiseConv2d) for module in model.modules()) == 2
