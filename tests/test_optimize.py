"""optimize(): accuracy against float64 beside eager PyTorch, what survives of it, and what it says of other models."""

import copy
import pickle
import re

import pytest
import torch
from networks import Residual, float64_logits, plain_convmixer, randomize
from numerics import assert_error_at_most_peer
from torch import nn
from torch.nn.utils import prune

from convmixer_fast import ConvMixer, DepthwiseConv2d, optimize

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("two_threads"),
]

DIM, DEPTH, KERNEL, PATCH, CLASSES = 32, 3, 7, 4, 100
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class AnonymousResidual(nn.Sequential):
    """Figure 3 of the paper makes its residual so: a Sequential with another forward."""

    def forward(self, x):
        return self[0](x) + x


def nested_convmixer(dim, depth, kernel_size, patch_size, n_classes):
    """Figure 3 to the letter: a Sequential around each convolution with its activation and BatchNorm."""

    def activated(conv):
        return nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(dim))

    layers = (
        nn.Sequential(
            AnonymousResidual(activated(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding=kernel_size // 2))),
            activated(nn.Conv2d(dim, dim, 1)),
        )
        for _ in range(depth)
    )
    stem = activated(nn.Conv2d(3, dim, patch_size, patch_size))
    return nn.Sequential(stem, *layers, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(dim, n_classes))


def timm_convmixer(**options):
    convmixer = pytest.importorskip("timm.models.convmixer")
    return convmixer.ConvMixer(DIM, DEPTH, KERNEL, PATCH, **dict(num_classes=CLASSES) | options)


def without_head(model):
    model.reset_classifier(0)
    return model


def with_norms(make, model=None):
    """The plain ConvMixer, or another, with what `make` makes of each nn.BatchNorm2d."""
    model = model or plain_convmixer(DIM, DEPTH, KERNEL, PATCH, CLASSES)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, make(module))
    return model


def frozen(norm, kind=None):
    """A norm of a class FrozenBatchNorm2d, torchvision's or another, with the tensors of an nn.BatchNorm2d."""
    frozen = (kind or pytest.importorskip("torchvision.ops").FrozenBatchNorm2d)(norm.num_features)
    for name, buffer in frozen.named_buffers():
        buffer.copy_(getattr(norm, name).detach())
    return frozen


class FrozenBatchNorm2d(nn.Module):
    """As DETR's, whose eps is no attribute."""

    eps_of_forward = 1e-5

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        weight, bias, mean, variance = (buffer.view(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (variance + self.eps_of_forward).rsqrt()
        return x * scale + (bias - mean * scale)


MODELS = {
    "ours": lambda: ConvMixer(DIM, DEPTH, KERNEL, PATCH, CLASSES),
    "ours, even kernel": lambda: ConvMixer(DIM, DEPTH, 8, PATCH, CLASSES),
    "ours, 1x1": lambda: ConvMixer(DIM, DEPTH, 1, PATCH, CLASSES),
    "ours, ReLU": lambda: ConvMixer(DIM, DEPTH, KERNEL, PATCH, CLASSES, activation="relu"),
    "ours, no residual": lambda: ConvMixer(DIM, DEPTH, KERNEL, PATCH, CLASSES, residual=()),
    "timm": timm_convmixer,
    "timm, ReLU": lambda: timm_convmixer(act_layer=nn.ReLU),
    "plain": lambda: plain_convmixer(DIM, DEPTH, KERNEL, PATCH, CLASSES),
    "plain, padding k // 2": lambda: plain_convmixer(DIM, DEPTH, KERNEL, PATCH, CLASSES, padding=KERNEL // 2),
    "plain, rectangular": lambda: plain_convmixer(DIM, DEPTH, (7, 3), (4, 5), CLASSES, padding=(3, 1)),
    "nested": lambda: nested_convmixer(DIM, DEPTH, KERNEL, PATCH, CLASSES),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(randomize(MODELS["ours"]())),
    "FrozenBatchNorm2d, torchvision": lambda: with_norms(frozen, randomize(MODELS["plain"]())),
    "FrozenBatchNorm2d": lambda: with_norms(lambda norm: frozen(norm, FrozenBatchNorm2d), randomize(MODELS["plain"]())),
    "head without a bias": lambda: MODELS["plain"]()[:-1].append(nn.Linear(DIM, CLASSES, bias=False)),
}
# How a network may end, with the shape of the result for two images of 2 x 3 patches.
ENDS = {
    "map": (lambda: plain_convmixer(DIM, DEPTH, KERNEL, PATCH)[:-3], (2, DIM, 2, 3)),
    "pooled": (lambda: plain_convmixer(DIM, DEPTH, KERNEL, PATCH)[:-2], (2, DIM, 1, 1)),
    "features": (lambda: plain_convmixer(DIM, DEPTH, KERNEL, PATCH)[:-1], (2, DIM)),
    "features, Identity": (lambda: plain_convmixer(DIM, DEPTH, KERNEL, PATCH)[:-1].append(nn.Identity()), (2, DIM)),
    "maximum": (
        lambda: plain_convmixer(DIM, DEPTH, KERNEL, PATCH)[:-3].append(nn.AdaptiveMaxPool2d(1)),
        (2, DIM, 1, 1),
    ),
    "timm, num_classes=0": (lambda: timm_convmixer(num_classes=0), (2, DIM)),
    "timm, reset_classifier(0)": (lambda: without_head(timm_convmixer()), (2, DIM)),
    "timm, map": (lambda: timm_convmixer(num_classes=0, global_pool=""), (2, DIM, 2, 3)),
    "timm, features of catavgmax": (lambda: timm_convmixer(num_classes=0, global_pool="catavgmax"), (2, 2 * DIM)),
    **{
        f"timm, {pool}": (lambda pool=pool: timm_convmixer(global_pool=pool), (2, CLASSES))
        for pool in ("max", "avgmax", "catavgmax", "fast", "fastmax", "fastavgmax", "fastcatavgmax")
    },
}
SCRIPTED = ["ours, ReLU", "plain, rectangular", "map", "pooled", "timm, avgmax", "timm, features of catavgmax"]


def build(kind):
    torch.manual_seed(0)
    return randomize(MODELS[kind]() if kind in MODELS else ENDS[kind][0]())


def images(dtype=torch.float32, device="cpu", shape=(5, 3, 23, 38)):
    """Of a size that is no multiple of a patch."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.fixture(scope="module")
def model():
    return build("ours")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_error_at_most_eagers(kind, dtype, device):
    model = build(kind).to(device, dtype)
    x = images(dtype, device, (128, 3, 11, 10))  # small maps: pooling averages little of the layers' rounding away
    with torch.no_grad():
        eager = model(x)
    assert_error_at_most_peer(optimize(model)(x), eager, float64_logits(model, x), f"{kind}, {dtype}, {device}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("end", ENDS)
def test_any_end(end, dtype):
    """Of the model's shape, with an error of at most eager's."""
    model = build(end).to(dtype)
    optimized = optimize(model)
    x = images(dtype, shape=(16, 3, 2 * PATCH, 3 * PATCH))
    with torch.no_grad():
        eager = model(x)
    result = optimized(x)
    assert_error_at_most_peer(result, eager, float64_logits(model, x), f"{end}, {dtype}")
    assert optimized(x[:2]).shape == ENDS[end][1]
    assert optimized(x[:0]).shape == (0, *ENDS[end][1][1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ours", "ours, ReLU", "ours, no residual"])
def test_dense_features_error_at_most_eagers(kind, dtype):
    """At several resolutions; and the logits are the classifier's, of their mean."""
    model = build(kind).to(dtype=dtype)
    optimized = optimize(model)
    for height, width in ((23, 38), (4, 4), (61, 9)):
        x = images(dtype, shape=(5, 3, height, width))
        with torch.no_grad():
            eager = model.forward_features(x)
            exact = copy.deepcopy(model).double().forward_features(x.double())
        features = optimized.forward_features(x)
        assert features.shape == (5, DIM, height // PATCH, width // PATCH)
        assert_error_at_most_peer(features, eager, exact, f"{kind}, {dtype}, {height}x{width}")
    logits = optimized(x).double()
    pooled = features.double().mean((2, 3))
    expected = pooled @ optimized.head_weight.double().T + optimized.head_bias.double()
    assert (logits - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 3, 7, 4), (1, 3, 64, 9), (0, 3, 8, 8)])
def test_any_number_and_size_of_images(model, shape, dtype):
    x = images(dtype, shape=shape)
    logits = optimize(model, dtype)(x)
    assert (logits.shape, logits.dtype) == ((shape[0], CLASSES), dtype)
    # an image alone, and the same ones in other strides, give what they give in a batch
    big = torch.zeros(shape[0], 4, shape[2] + 3, 2 * shape[3], dtype=dtype)
    view = big[:, 1:, 3:, ::2]
    view.copy_(x)
    assert torch.equal(optimize(model, dtype)(view), logits)
    assert torch.equal(optimize(model, dtype)(x.to(memory_format=torch.channels_last)), logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_bit_for_bit(model, dtype, device):
    network = copy.deepcopy(model).to(device)
    x = images(dtype, device)
    optimized = optimize(network, dtype)
    logits = optimized(x)
    assert all(torch.equal(optimized(x), logits) for _ in range(10))
    assert torch.equal(optimize(network, dtype)(x), logits)


def test_model_given_is_unchanged():
    model = build("ours")
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    optimized = optimize(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert optimized._kept._engine is None
    for buffer in optimized.buffers():
        buffer.zero_()
    assert optimized(images()).count_nonzero() == 0
    assert not model.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    model.train()
    model(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversion_keeps_the_vectors(model, dtype):
    """Converted before or after, to and fro: bias, scale and shift stay in float64, as they were made."""
    x = images(dtype)
    vectors = optimize(model, dtype).vectors
    for converted in (optimize(model, dtype).half().bfloat16().to(dtype), optimize(model, dtype).to("cpu", dtype)):
        assert torch.equal(converted.vectors, vectors)
        assert {buffer.dtype for name, buffer in converted.named_buffers() if name != "vectors"} == {dtype}
    assert torch.equal(optimize(model).to(dtype)(x), optimize(model, dtype)(x)) or dtype == torch.float64


def test_vectors_are_rounded_as_they_run(model):
    """The scale as float32, and the shift by that scale: the mean goes to the same value as in float64."""
    exact, rounded = (optimize(model, dtype).vectors for dtype in (torch.float64, torch.float32))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    means = torch.stack([norm.running_mean.double() for norm in norms])
    assert torch.equal(rounded[:, 0], exact[:, 0])
    assert torch.equal(rounded[:, 1], exact[:, 1].float().double()) and not torch.equal(rounded, exact)
    at_mean = [vectors[:, 1] * means + vectors[:, 2] for vectors in (exact, rounded)]
    torch.testing.assert_close(*at_mean, rtol=0, atol=1e-14)


def test_dtype_of_the_model_is_kept(model):
    assert optimize(copy.deepcopy(model).bfloat16())(images(torch.bfloat16)).dtype == torch.bfloat16


def through_state_dict(optimized):
    other = copy.deepcopy(optimized)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(optimized.state_dict())
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_state_dict])
@pytest.mark.parametrize("kind", ["ours", "features", "maximum"])
def test_copies_pickles_saves(copied, kind, dtype):
    optimized = optimize(build(kind), dtype)
    x = images(dtype)
    assert torch.equal(copied(optimized)(x), optimized(x))


@pytest.mark.cuda
def test_moves_between_devices(model):
    optimized = optimize(model, torch.float16).cuda()
    assert {buffer.device.type for buffer in optimized.buffers()} == {"cuda"}
    assert torch.equal(optimized.vectors.cpu(), optimize(model).vectors)
    assert torch.equal(optimized.cpu()(images(torch.float16)), optimize(model, torch.float16)(images(torch.float16)))


def test_exports_with_dynamic_shapes(model):
    optimized = optimize(model)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(optimized, (images(),), dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}}).module()
    for x in (images(), images(shape=(2, 3, 40, 16))):
        with torch.no_grad():
            eager = model(x)
        assert_error_at_most_peer(exported(x), eager, float64_logits(model, x), "exported")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SCRIPTED)
def test_scripts(tmp_path, kind, dtype):
    """Alone and within another module, saved and loaded, on images of several sizes."""
    model = build(kind).to(dtype)
    optimized = optimize(model)
    scripted = torch.jit.script(optimized)
    within = torch.jit.script(nn.Sequential(nn.Identity(), copy.deepcopy(optimized)))
    torch.jit.save(scripted, tmp_path / "scripted.pt")
    loaded = torch.jit.load(tmp_path / "scripted.pt")
    for shape in ((32, 3, 11, 10), (16, 3, 8, 20)):
        x = images(dtype, shape=shape)
        with torch.no_grad():
            eager = model(x)
        assert_error_at_most_peer(scripted(x), eager, float64_logits(model, x), f"{kind}, {dtype}, scripted")
        assert torch.equal(loaded(x), scripted(x)) and torch.equal(within(x), scripted(x))


def test_scripted_refuses_gradients(model):
    scripted = torch.jit.script(optimize(model))
    with pytest.raises(torch.jit.Error, match="x requires a gradient, which an optimized ConvMixer does not give"):
        scripted(images().requires_grad_())
    with torch.no_grad():
        scripted(images().requires_grad_())


@pytest.mark.parametrize("kind", ["ours", "maximum"])
def test_traces(kind):
    optimized, x = optimize(build(kind)), images()
    traced = torch.jit.trace(optimized, x)
    torch.testing.assert_close(traced(x), optimized(x), rtol=1e-5, atol=1e-5)


def test_is_for_inference(model):
    optimized = optimize(model)
    assert not optimized.training and optimized.eval() is optimized
    assert list(optimized.parameters()) == []
    with pytest.raises(RuntimeError, match="an optimized ConvMixer is for inference"):
        optimized.train()
    with pytest.raises(RuntimeError, match="x requires a gradient"):
        optimized(images().requires_grad_())


def test_input_that_does_not_fit(model):
    optimized = optimize(model, torch.float16)
    with pytest.raises(TypeError, match="x must be torch.float16 as the weights, got torch.float32"):
        optimized(images())
    with pytest.raises(ValueError, match="x must be on cpu as the weights, got meta"):
        optimized(images(torch.float16).to("meta"))
    for shape in ((1, 3, 3, 4), (1, 3, 4, 3), (1, 4, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"x must be of shape \(N, 3, H, W\) .* H >= 4 and W >= 4, got \("):
            optimized(images(torch.float16, shape=shape))


def test_autocast_changes_nothing(model):
    optimized, x = optimize(model), images()
    logits = optimized(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optimized(x), logits)


def test_arguments_that_do_not_fit(model):
    with pytest.raises(TypeError, match="model must be an nn.Module, got OrderedDict"):
        optimize(model.state_dict())
    with pytest.raises(ValueError, match="dtype must be None or one of torch.float64, .*, got torch.int8"):
        optimize(model, torch.int8)
    for chunk in (0, -1, 1.5, True, "all"):
        with pytest.raises(ValueError, match=f"chunk must be 'auto' or an int from 1 up, got {chunk!r}"):
            optimize(model, chunk=chunk)
    with pytest.raises(TypeError, match="cuda_graphs must be a bool, got 1"):
        optimize(model, cuda_graphs=1)
    with pytest.raises(ValueError, match="model is Linear, accepted: convmixer_fast.ConvMixer, timm's"):
        optimize(nn.Linear(2, 2).eval())


class Product(Residual):
    def forward(self, x):
        return x * self.fn(x)


class Halved(nn.GELU):
    def forward(self, x):
        return super().forward(x) / 2


def replaced(path, make):
    """A change of the plain ConvMixer: the module at path, by what is made of it."""

    def apply(model):
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, name, make(getattr(parent, name)))
        return model

    return apply


def conv(kernel_size=KERNEL, **options):
    options = dict(groups=DIM, padding="same") | options
    return lambda _: nn.Conv2d(DIM, DIM, kernel_size, **options)


def reshaped(path, shape):
    """That change of a parameter or buffer alone, which leaves the attributes of its module as they were."""

    def apply(model):
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        tensors = module._parameters if name in module._parameters else module._buffers
        tensors[name] = torch.ones(shape)
        return model

    return apply


def without(index):
    return lambda model: nn.Sequential(*model[:index], *model[index + 1 :])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.train(), "model (Sequential) is in training mode, accepted: eval mode, model.eval()"),
        (
            replaced("4.3", lambda norm: norm.train()),
            "model.4.3 (BatchNorm2d) is in training mode, accepted: eval mode, model.eval()",
        ),
        (replaced("0", lambda _: nn.Linear(2, 2)), "model.0 is Linear, accepted: nn.Conv2d"),
        (replaced("0", lambda _: nn.Conv2d(3, DIM, 4, 3)), "model.0.stride is (3, 3), accepted: (4, 4)"),
        (replaced("0", lambda _: nn.Conv2d(3, DIM, 4, 4, 1)), "model.0.padding is (1, 1), accepted: 'valid' or (0, 0)"),
        (replaced("0", lambda _: nn.Conv2d(3, DIM, 4, 4, bias=False)), "model.0.bias is None, accepted: a tensor"),
        (replaced("1", lambda _: nn.SiLU()), "model.1 is SiLU, accepted: nn.GELU or nn.ReLU"),
        (replaced("1", lambda _: None), "model.1 is None, accepted: a module"),
        (replaced("1", lambda _: Halved()), "model.1 is Halved, accepted: nn.GELU or nn.ReLU"),
        (replaced("1", lambda _: nn.GELU("tanh")), "model.1.approximate is 'tanh', accepted: 'none'"),
        (replaced("3.2", lambda _: nn.ReLU()), "model.3.2 is ReLU, accepted: 'gelu' as before"),
        (replaced("2", lambda _: nn.GroupNorm(1, DIM)), "model.2 is GroupNorm, accepted: nn.BatchNorm2d"),
        (
            replaced("5.3", lambda _: nn.BatchNorm2d(DIM, track_running_stats=False)),
            "model.5.3.running_mean is None, accepted: a tensor",
        ),
        (replaced("4.0", lambda residual: residual.fn), "model.4.0.0 is Conv2d, accepted: a module with one child fn"),
        (replaced("3.0", lambda residual: residual.fn), "model.4.0 is Residual, accepted: nn.Conv2d"),
        (
            replaced("4.0", lambda residual: Product(residual.fn)),
            "model.4.0 (Product) does not give fn(x) + x, accepted: a module with one child fn",
        ),
        (replaced("3.0.fn", lambda fn: fn.append(nn.ReLU())), "model.3.0.fn.3 is ReLU, accepted: nothing more"),
        (replaced("3.0.fn", lambda fn: fn[:2]), "nothing comes after model.3.0.fn.1, accepted: nn.BatchNorm2d"),
        (replaced("4.0.fn.0", conv(5)), "model.4.0.fn.0.kernel_size is (5, 5), accepted: (7, 7)"),
        (replaced("3.0.fn.0", conv(padding=1)), "model.3.0.fn.0.padding is (1, 1), accepted: 'same' or (3, 3)"),
        (replaced("3.0.fn.0", conv(8, padding=4)), "model.3.0.fn.0.padding is (4, 4), accepted: 'same'"),
        (replaced("3.0.fn.0", conv(groups=1)), f"model.3.0.fn.0.groups is 1, accepted: {DIM}"),
        (replaced("3.0.fn.0", conv(dilation=2)), "model.3.0.fn.0.dilation is (2, 2), accepted: (1, 1)"),
        (replaced("3.0.fn.0", conv(padding_mode="circular")), "padding_mode is 'circular', accepted: 'zeros'"),
        (replaced("3.1", conv(1, stride=2, padding=0)), "model.3.1.groups is 32, accepted: 1"),
        (replaced("3.1", conv(3, groups=1)), "model.3.1.kernel_size is (3, 3), accepted: (1, 1)"),
        (
            replaced(str(DEPTH + 3), lambda _: nn.MaxPool2d(2)),
            "model.6 is MaxPool2d, accepted: a module with one child fn and the forward fn(x) + x, or a global pooling "
            "such as nn.AdaptiveAvgPool2d",
        ),
        (
            replaced(str(DEPTH + 3), lambda _: nn.AdaptiveMaxPool2d(1, return_indices=True)),
            "model.6.return_indices is True, accepted: False",
        ),
        (replaced(str(DEPTH + 3), lambda _: nn.AdaptiveAvgPool2d(2)), "model.6.output_size is 2, accepted: 1"),
        (without(DEPTH + 4), "model.7 is Linear, accepted: nn.Flatten"),
        (without(DEPTH + 3), "model.6 is Flatten, accepted: a module with one child fn"),
        (replaced(str(DEPTH + 5), lambda _: nn.Linear(2 * DIM, 3)), "model.8.in_features is 64, accepted: 32"),
        (replaced(str(DEPTH + 5), lambda _: nn.Linear(DIM, 0)), "model.8.weight is of shape (0, 32), accepted: sizes"),
        (replaced("0", lambda _: nn.Conv2d(0, DIM, 4, 4)), "model.0.weight is of shape (32, 0, 4, 4), accepted: sizes"),
        (replaced("0", lambda _: nn.Conv2d(3, 0, 4, 4)), "model.0.weight is of shape (0, 3, 4, 4), accepted: sizes"),
        (
            reshaped("3.1.weight", (DIM, DIM + 1, 1, 1)),
            "model.3.1.weight is of shape (32, 33, 1, 1), accepted: (32, 32",
        ),
        (reshaped("3.1.bias", (DIM + 1,)), "model.3.1.bias is of shape (33,), accepted: (32,)"),
        (reshaped("2.running_var", (1,)), "model.2.running_var is of shape (1,), accepted: (32,)"),
        (lambda model: model.append(nn.Softmax(1)), "model.9 is Softmax, accepted: nothing more"),
        (lambda model: nn.Sequential(*model[:3], *model[-3:]), "model.3 is AdaptiveAvgPool2d, accepted: a module with"),
        (lambda model: nn.Sequential(), "nothing comes after model, accepted: nn.Conv2d"),
    ],
)
def test_models_that_do_not_match(change, message):
    model = change(build("plain"))
    if "training mode" not in message:
        model.eval()
    with pytest.raises(ValueError, match=re.escape(message)):
        optimize(model)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(residual=("spatial", "channel")),
            "model.blocks.0.1 is Residual, accepted: nn.Conv2d (the fused step adds its input in the spatial half",
        ),
        (dict(residual=("channel",)), "model.blocks.0.1 is Residual, accepted: nn.Conv2d (the fused step adds its"),
        (
            dict(norm="layer"),
            "model.stem.2 is ChannelLayerNorm, accepted: nn.BatchNorm2d or nn.SyncBatchNorm or FrozenBatchNorm2d (its "
            "mean and variance depend on the image",
        ),
    ],
)
def test_ablations_that_the_fused_step_cannot_express(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optimize(ConvMixer(DIM, DEPTH, KERNEL, PATCH, CLASSES, **options).eval())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(global_pool=""),
            "model.head is Linear, accepted: a module with one child fn and the forward fn(x) + x, or a",
        ),
        (dict(act_layer=nn.SiLU), "model.stem.1 is SiLU, accepted: nn.GELU or nn.ReLU"),
    ],
)
def test_timm_models_that_do_not_match(options, message):
    convmixer = pytest.importorskip("timm.models.convmixer")
    model = convmixer.ConvMixer(**dict(dim=8, depth=1, kernel_size=3, patch_size=2) | options).eval()
    with pytest.raises(ValueError, match=re.escape(message)):
        optimize(model)


class DoubledFeatures(ConvMixer):
    def forward_features(self, x):
        return super().forward_features(x) * 2


class HalvedConv2d(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) / 2


class HalvedDepthwiseConv2d(DepthwiseConv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) / 2


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(super().__iter__()))


class Doubled(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class Renamed(ConvMixer):
    """Which changes nothing of what a call does."""

    def __init__(self, width):
        super().__init__(width, DEPTH, KERNEL, PATCH, CLASSES)
        self.width = width

    def parameters(self, recurse=True):
        return super().parameters(recurse)

    def extra_repr(self):
        return f"width={self.width}"


def doubled_head():
    convmixer = pytest.importorskip("timm.models.convmixer")

    class DoubledHead(convmixer.ConvMixer):
        def forward_head(self, x, pre_logits=False):
            return super().forward_head(x, pre_logits) * 2

    return DoubledHead(DIM, DEPTH, KERNEL, PATCH, num_classes=CLASSES)


def after(action):
    """A change of the plain ConvMixer by an action on a module, given by its path."""

    def of(path, *arguments):
        def make():
            model = build("plain")
            action(model.get_submodule(path), *arguments)
            return model

        return make

    return of


hook = after(lambda module: module.register_forward_hook(lambda module, args, output: output * 2))
pre_hook = after(lambda module: module.register_forward_pre_hook(lambda module, args: (args[0] * 2,)))
pruned = after(lambda module: prune.l1_unstructured(module, "weight", 0.5))
replaced_method = after(lambda module, name: setattr(module, name, lambda *arguments: arguments[0] * 2))
OTHER_NETWORKS = {
    "a class's forward_features": (
        lambda: DoubledFeatures(DIM, DEPTH, KERNEL, PATCH, CLASSES),
        "model (DoubledFeatures) has a forward_features of its own, accepted: that of ConvMixer",
    ),
    "a class's forward_head": (doubled_head, "model (DoubledHead) has a forward_head of its own, accepted: that of"),
    "a class's _conv_forward": (
        lambda: replaced("3.1", lambda _: HalvedConv2d(DIM, DIM, 1))(build("plain")),
        "model.3.1 (HalvedConv2d) has a _conv_forward of its own, accepted: that of Conv2d",
    ),
    "a class's _conv_forward, ours": (
        lambda: replaced("3.0.fn.0", lambda _: HalvedDepthwiseConv2d(DIM, KERNEL))(build("plain")),
        "model.3.0.fn.0 (HalvedDepthwiseConv2d) has a _conv_forward of its own, accepted: that of DepthwiseConv2d",
    ),
    "a class's __iter__": (
        lambda: Backwards(*build("plain")),
        "model (Backwards) has a __iter__ of its own, accepted: that of Sequential",
    ),
    "a class's __call__": (
        lambda: replaced("2", lambda _: Doubled(DIM))(build("plain")),
        "model.2 (Doubled) has a __call__ of its own, accepted: that of BatchNorm2d",
    ),
    "forward of a Sequential": (
        replaced_method("3", "forward"),
        "model.3 (Sequential) has its forward replaced, accepted: the method of its class",
    ),
    "forward of an activation": (replaced_method("1", "forward"), "model.1 (GELU) has its forward replaced"),
    "_conv_forward": (replaced_method("4.1", "_conv_forward"), "model.4.1 (Conv2d) has its _conv_forward replaced"),
    "hook": (
        hook("3"),
        "model.3 (Sequential) has the forward hook <lambda>.<locals>.<lambda>, accepted: none; remove it first",
    ),
    "hook of the model": (hook(""), "model (Sequential) has the forward hook"),
    "hook of an activation": (hook("1"), "model.1 (GELU) has the forward hook"),
    "pre-hook": (pre_hook("4.0"), "model.4.0 (Residual) has the forward hook"),
    "pruning": (pruned("4.1"), "model.4.1 (Conv2d) has the forward hook L1Unstructured, accepted: none"),
    "torch.compile": (
        lambda: replaced("4.0", lambda residual: torch.compile(residual, backend="eager"))(build("plain")),
        "model.4.0 (OptimizedModule) was made by torch.compile, accepted: the module that it was given, ._orig_mod",
    ),
    "torch.compile of all": (
        lambda: torch.compile(build("plain"), backend="eager"),
        "model is OptimizedModule, accepted: convmixer_fast.ConvMixer, timm's ConvMixer, nn.Sequential; pass model.",
    ),
    "torch.jit": (
        lambda: replaced("1", torch.jit.script)(build("plain")),
        "model.1 (RecursiveScriptModule) was made by torch.jit, accepted: the module that it was given",
    ),
    "torch.jit of all": (
        lambda: torch.jit.script(build("plain")),
        "model is RecursiveScriptModule, accepted: convmixer_fast.ConvMixer",
    ),
    "DataParallel": (lambda: nn.DataParallel(build("plain")), "nn.Sequential; pass model.module"),
    "meta": (lambda: build("plain").to("meta"), "model.0.weight is on meta, accepted: cpu or cuda"),
    "complex": (
        lambda: build("plain").to(torch.complex64),
        "model.0.weight is torch.complex64, accepted: one of torch",
    ),
    "lazy": (
        lambda: replaced("8", lambda _: nn.LazyLinear(3))(build("plain")),
        "model.8 (LazyLinear) has the forward hook LazyModuleMixin._infer_parameters",
    ),
}


@pytest.mark.parametrize("what", OTHER_NETWORKS)
def test_what_would_be_another_network(what):
    make, message = OTHER_NETWORKS[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        optimize(make().eval())


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hooks(model, register):
    handle = getattr(nn.modules.module, register)(lambda module, *arguments: None)
    try:
        with pytest.raises(ValueError, match="every module has the global forward hook .*lambda.*, accepted: none"):
            optimize(model)
    finally:
        handle.remove()
    optimize(model)


@pytest.mark.parametrize(
    "forward, message",
    [
        (lambda self, x: nn.functional.gelu(x) * 1.001, r"they differ by 0\.\d+, where the largest value is \d"),
        (lambda self, x: nn.functional.gelu(x).mean(0, True), r"it gives \(1, 100\), the network \(2, 100\)"),
        (lambda self, x: nn.functional.gelu(x) / 0, r"they differ by nan, where the largest value is 0"),
    ],
)
def test_results_are_compared(monkeypatch, model, forward, message):
    """Where every module is as it should be, and yet the model gives something else."""
    optimize(model)
    monkeypatch.setattr(nn.GELU, "forward", forward)
    with pytest.raises(ValueError, match="model does not give what the network of its modules gives, .*" + message):
        optimize(model)


def test_frozen_norm_with_another_eps(monkeypatch):
    model = with_norms(lambda norm: frozen(norm, FrozenBatchNorm2d), build("plain")).eval()
    optimize(model)
    monkeypatch.setattr(FrozenBatchNorm2d, "eps_of_forward", 1e-3)
    with pytest.raises(ValueError, match="model does not give what the network of its modules gives"):
        optimize(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_networks_that_compute_no_numbers_are_equal(value):
    model = build("plain")
    model[-1].bias.detach()[0] = value
    result = optimize(model)(images())
    assert not result[:, 0].isfinite().any() and result[:, 1:].isfinite().all()


def spectral(model):
    nn.utils.parametrizations.spectral_norm(model[3][1])
    return model


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model[3][0].fn[0])
    return model


def compiled_in_place(model):
    def broken(graph, inputs):
        raise AssertionError("it was compiled")

    model.compile(backend=broken)
    return model


def without_affine_map(model):
    """In the first BatchNorm."""
    model[2].weight = model[2].bias = None
    return model


ACCEPTED = {
    "a subclass": lambda: randomize(Renamed(DIM)),
    "spectral_norm": lambda: spectral(build("plain")),
    "weight_norm": lambda: weight_norm(build("plain")),
    "compiled in place": lambda: compiled_in_place(build("plain")),
    "affine=False": lambda: without_affine_map(build("plain")),
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_is_the_same_network(what):
    model, x = ACCEPTED[what]().eval(), images()
    with torch.no_grad():
        expected = model.forward(x)
    torch.testing.assert_close(optimize(model)(x), expected, rtol=1e-4, atol=1e-4)
