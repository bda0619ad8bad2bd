"""ConvMixer against an independent one in plain PyTorch, against timm's, and against the paper's parameter counts."""

import csv
from pathlib import Path

import pytest
import torch
from networks import copy_weights, plain_convmixer, randomize
from torch import nn

from convmixer_fast import ConvMixer, create_model, list_models, replace_depthwise

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
SIZES = ("dim", "depth", "kernel_size", "patch_size")
N_CLASSES = {"imagenet": 1000, "cifar10": 10}


def paper_rows(data_set):
    lines = (Path(__file__).parent / "data" / f"paper_{data_set}.csv").read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


ROWS = [(data_set, row) for data_set in N_CLASSES for row in paper_rows(data_set)]


def name_of(row):
    return "convmixer_{dim}_{depth}_k{kernel_size}_p{patch_size}".format(**row)


def n_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def equation_4(h, d, k, p, c, n):
    return h * (d * (k**2 + h + 6) + c * p**2 + 3 + n) + n


@pytest.mark.parametrize("data_set, row", ROWS, ids=lambda value: name_of(value) if isinstance(value, dict) else value)
def test_every_model_of_the_paper_has_a_name(data_set, row):
    with torch.device("meta"):
        model = create_model(name_of(row))
    assert name_of(row) in list_models()
    assert {size: getattr(model, size) for size in SIZES} == {size: int(row[size]) for size in SIZES}
    assert model.n_classes == N_CLASSES[data_set]
    assert model.activation == row.get("activation", "gelu")
    count = n_parameters(model)
    assert count == equation_4(*(int(row[size]) for size in SIZES), 3, N_CLASSES[data_set])
    if "params_thousands" in row:
        assert round(count / 1e3) == int(row["params_thousands"])
    elif name_of(row) == "convmixer_768_32_k3_p14":  # 20.2 in the paper, which is not what its equation 4 gives
        assert (row["params_millions"], round(count / 1e6, 1)) == ("20.2", 20.5)
    else:
        assert round(count / 1e6, 1) == float(row["params_millions"])


def test_list_models():
    assert sorted(list_models()) == sorted(name_of(row) for _, row in ROWS)
    assert list_models("convmixer_768_*") == ["convmixer_768_32_k7_p7", "convmixer_768_32_k3_p14"]
    assert list_models("resnet*") == []


def test_create_model_overrides():
    model = create_model("convmixer_256_8_k9_p1", dim=8, depth=1, n_classes=7, in_channels=1, activation="relu")
    assert n_parameters(model) == equation_4(8, 1, 9, 1, 1, 7)
    assert model.activation == "relu"


def test_create_model_unknown_name():
    with pytest.raises(ValueError, match="name must be one of .*'convmixer_768_32'.*, got 'convmixer_9000'"):
        create_model("convmixer_9000")


@pytest.mark.parametrize("name", [None, 3, ["convmixer_768_32"]])
def test_names_that_are_no_text(name):
    with pytest.raises(TypeError, match="name must be a str, got "):
        create_model(name)
    with pytest.raises(TypeError, match="pattern must be a str, got "):
        list_models(name)


@pytest.mark.parametrize("override", [dict(num_classes=10), dict(pretrained=True), dict(n_classes=10, self=1)])
def test_create_model_unknown_overrides(override):
    unknown = list(override)[-1]
    with pytest.raises(TypeError, match=f"overrides must be arguments of ConvMixer, dim, depth, .*norm; got {unknown}"):
        create_model("convmixer_256_8_k9_p2", **override)
    with pytest.raises(TypeError, match="n_classes must be an int, got '10'"):
        create_model("convmixer_256_8_k9_p2", n_classes="10")


@pytest.mark.parametrize("name", ["convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"])
def test_aliases_are_timms_models(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name, pretrained=False)
    assert [(key, value.shape) for key, value in ours.state_dict().items()] == [
        (key, value.shape) for key, value in theirs.state_dict().items()
    ]
    activations = {type(module) for module in theirs.modules() if isinstance(module, tuple(ACTIVATIONS.values()))}
    assert activations == {ACTIVATIONS[ours.activation]}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "dim, depth, kernel_size, patch_size, in_channels, height, width",
    [
        (16, 2, 9, 7, 3, 32, 32),
        (16, 2, 8, 7, 3, 30, 45),  # even kernel; H and W not multiples of the patch
        (8, 3, 5, 1, 1, 6, 4),
        (8, 1, 3, 14, 3, 14, 14),  # a single patch
        (2, 1, 1, 2, 4, 3, 2),
    ],
)
def test_equals_plain_convmixer(dim, depth, kernel_size, patch_size, in_channels, height, width, activation):
    torch.manual_seed(0)
    plain = plain_convmixer(dim, depth, kernel_size, patch_size, 5, in_channels, ACTIVATIONS[activation])
    model = ConvMixer(dim, depth, kernel_size, patch_size, 5, in_channels, activation)
    copy_weights(randomize(plain), model)
    assert replace_depthwise(plain, min_kernel_size=1).count == depth  # the same kernels, so the same bits
    x = torch.randn(3, in_channels, height, width)
    assert torch.equal(model(x), plain(x))

    for network in (model, plain):
        network.double().train()
        network(x.double()).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def layer_norm(x, norm):
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    weight, bias = (vector.view(-1, 1, 1) for vector in (norm.weight, norm.bias))
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("residual", [("spatial",), ("channel", "spatial"), ("channel",), ()])
def test_ablations(residual, norm):
    """The variants of Table 3 by the paper's equations, with the modules' weights; and that they train."""
    torch.manual_seed(0)
    model = randomize(ConvMixer(6, 2, 3, 2, 5, residual=residual, norm=norm)).double()
    x = torch.randn(4, 3, 8, 10, dtype=torch.float64)

    def stage(z, kind):
        conv, activation, normalize = kind
        y = activation(conv(z))
        return layer_norm(y, normalize) if norm == "layer" else normalize(y)

    z = stage(x, model.stem)
    for block in model.blocks:
        leaves = [leaf for leaf in block.modules() if not list(leaf.children())]
        for half, kind in (("spatial", leaves[:3]), ("channel", leaves[3:])):
            z = stage(z, kind) + (z if half in residual else 0)
    torch.testing.assert_close(model.forward_features(x), z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), model.head(z.mean((2, 3))), rtol=1e-12, atol=1e-12)

    labels = torch.arange(4)
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
    assert losses[-1] < losses[0] / 2


def test_ablations_that_do_not_exist():
    for residual in ("spatial", ("temporal",)):
        with pytest.raises(ValueError, match="residual must be a tuple of any of 'spatial', 'channel', got "):
            ConvMixer(4, 1, residual=residual)
    with pytest.raises(ValueError, match="norm must be one of 'batch', 'layer', got 'group'"):
        ConvMixer(4, 1, norm="group")
    assert ConvMixer(4, 1, residual=iter(["channel"])).residual == ("channel",)
    for residual in (None, True, 3, (["spatial"],)):
        with pytest.raises(ValueError, match="residual must be a tuple of any of 'spatial', 'channel', got "):
            ConvMixer(4, 1, residual=residual)
    for choice in ("activation", "norm"):
        for value in (None, 1, ["gelu"], {}, nn.GELU()):
            with pytest.raises(ValueError, match=f"{choice} must be one of '.*', got "):
                ConvMixer(4, 1, **{choice: value})


@pytest.mark.parametrize("shape", [(1, 3, 6, 7), (1, 3, 7, 6), (1, 1, 7, 7), (3, 7, 7)])
def test_images_that_do_not_fit(shape):
    model = ConvMixer(4, 1, kernel_size=3, patch_size=7).eval()
    with pytest.raises(ValueError, match=r"x must be of shape \(N, 3, H, W\) .* H >= 7 and W >= 7, got \("):
        model(torch.zeros(shape))


@pytest.mark.parametrize("name", ["dim", "depth", "kernel_size", "patch_size", "n_classes", "in_channels"])
def test_sizes_that_do_not_fit(name):
    sizes = dict(dim=4, depth=1)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ConvMixer(**sizes | {name: 0})
    for value in (2.0, True, "3", (3, 3)):
        with pytest.raises(TypeError, match=f"{name} must be an int, got "):
            ConvMixer(**sizes | {name: value})


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be one of 'gelu', 'relu', got 'silu'"):
        ConvMixer(4, 1, activation="silu")
