"""load_checkpoint against the models that the weights come from, and what it says of files that do not fit."""

import argparse
import copy
import re

import pytest
import safetensors.torch
import torch
from networks import copy_weights, plain_convmixer, randomize
from torch import nn

from convmixer_fast import ConvMixer, create_model, load_checkpoint, replace_depthwise

SIZES = dict(dim=12, depth=3, kernel_size=4, patch_size=5, n_classes=7, in_channels=2)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = randomize(plain_convmixer(**SIZES))
    assert replace_depthwise(model).count == SIZES["depth"]  # the same kernels as ours, so the same bits
    return model


@pytest.fixture(scope="module")
def ours(plain):
    return copy_weights(plain, ConvMixer(**SIZES))


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 2, 21, 17, generator=torch.Generator().manual_seed(1))


def save(path, content):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def prefixed(state):
    return {f"module.{key}": tensor for key, tensor in state.items()}


def without_counters(state):
    return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def training_state(state):
    """What timm's training script saves."""
    options = argparse.Namespace(model="convmixer_1536_20", lr=0.01)
    return {"epoch": 3, "arch": "convmixer_1536_20", "state_dict": prefixed(state), "args": options, "metric": 80.1}


@pytest.mark.parametrize(
    "suffix, wrap",
    [
        *((".pth.tar", wrap) for wrap in (dict, prefixed, without_counters, training_state)),
        *((".safetensors", wrap) for wrap in (dict, prefixed, without_counters)),
    ],
)
@pytest.mark.parametrize("source", ["ours", "plain"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_loads_what_was_saved(source, suffix, wrap, images, plain, tmp_path, request):
    state = request.getfixturevalue(source).state_dict()
    model = load_checkpoint(save(tmp_path / f"weights{suffix}", wrap(state)), activation="gelu")
    assert {size: getattr(model, size) for size in SIZES} == SIZES
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(images), plain(images))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("residual", [("spatial",), ("spatial", "channel"), ("channel",), ()])
def test_loads_ablations(residual, norm, images, tmp_path):
    model = randomize(ConvMixer(**SIZES, residual=residual, norm=norm))
    loaded = load_checkpoint(save(tmp_path / "gelu.pt", model.state_dict()))
    assert (loaded.residual, loaded.norm, loaded.depth) == (residual, norm, 3)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_loads_timms(tmp_path, images):
    convmixer = pytest.importorskip("timm.models.convmixer")
    sizes = dict(dim=12, depth=3, kernel_size=4, patch_size=5, num_classes=7, in_chans=2)
    model = randomize(convmixer.ConvMixer(**sizes, act_layer=nn.ReLU))
    replace_depthwise(model)
    path = save(tmp_path / "model.safetensors", model.state_dict())
    assert torch.equal(load_checkpoint(path, activation="relu")(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_keeps_the_dtype(ours, dtype, tmp_path):
    state = copy.deepcopy(ours).to(dtype).state_dict()
    model = load_checkpoint(save(tmp_path / "weights.pt", state), activation="gelu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])


def expanded(name, **overrides):
    """The state dict of a model of the paper, one number a tensor in the file."""
    with torch.device("meta"):
        model = create_model(name, **overrides)
    return {key: torch.zeros((), dtype=like.dtype).expand(like.shape) for key, like in model.state_dict().items()}


@pytest.mark.parametrize(
    "file_name, name, activation",
    [
        ("convmixer_1536_20_ks9_p7.pth.tar", "convmixer_1536_20", "gelu"),  # the authors' releases
        ("convmixer_768_32_ks7_p7_relu.pth.tar", "convmixer_768_32", "relu"),
        ("convmixer_1024_20_ks9_p14.pth.tar", "convmixer_1024_20_ks9_p14", "gelu"),
        ("convmixer_768_32.in1k.bin", "convmixer_768_32", "relu"),
        ("run2-convmixer_768_32_k3_p14.pt", "convmixer_768_32_k3_p14", "relu"),
        ("convmixer_256_8_k9_p1.pt", "convmixer_256_8_k9_p1", "gelu"),
        ("mine_GELU.pt", "convmixer_128_4_k8_p1", "gelu"),
    ],
)
def test_activation_of_the_file_name(file_name, name, activation, tmp_path):
    model = load_checkpoint(save(tmp_path / file_name, expanded(name, n_classes=3)))
    assert model.activation == activation
    with torch.device("meta"):
        named = create_model(name)
    assert all(getattr(model, size) == getattr(named, size) for size in ("dim", "depth", "kernel_size", "patch_size"))


def test_activation_argument_wins_over_the_file_name(tmp_path):
    path = save(tmp_path / "convmixer_256_8_k9_p1.pt", expanded("convmixer_256_8_k9_p1"))
    assert load_checkpoint(path, activation="relu").activation == "relu"


@pytest.mark.parametrize(
    "file_name, said",
    [
        ("weights.pt", "is not that of a known model of these sizes, .*'dim': 256, 'depth': 8, 'kernel_size': 9"),
        ("convmixer_768_32.pt", "is not that of a known model of these sizes"),
        ("convmixer_256_8_k9_p1_relu.pt", "says both"),
    ],
)
def test_activation_that_cannot_be_known(file_name, said, tmp_path):
    path = save(tmp_path / file_name, expanded("convmixer_256_8_k9_p1"))
    message = f"activation must be given, 'gelu' or 'relu': the file name {file_name} {said}"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_unknown_activation(tmp_path):
    with pytest.raises(ValueError, match="activation must be one of 'gelu', 'relu', got 'silu'"):
        load_checkpoint(tmp_path / "weights.pt", activation="silu")


def changed(key, change):
    """A change of a state dict: of the tensor of that key, or, where change returns None, its removal."""

    def apply(state):
        value = change(state.pop(key))
        return state if value is None else state | {key: value}

    return apply


@pytest.mark.parametrize(
    "change, message",
    [
        (changed("blocks.1.0.fn.2.running_var", lambda _: None), "lacks blocks.1.0.fn.2.running_var"),
        (changed("stem.0.bias", lambda _: None), "lacks stem.0.bias, which a ConvMixer of depth 3 has"),
        (changed("head.weight", lambda _: None), "lacks head.weight"),
        (changed("blocks.2.1.weight", lambda _: None), "has blocks.2.0.fn.0.weight, which"),
        (changed("blocks.0.0.fn.0.weight", lambda _: None), "lacks blocks.0.0.fn.0.weight"),
        (
            changed("blocks.1.1.weight", lambda weight: weight[:, :-1]),
            "blocks.1.1.weight has shape (12, 11, 1, 1), expected (12, 12, 1, 1)",
        ),
        (
            changed("blocks.2.0.fn.0.weight", lambda weight: weight[..., 1:, 1:]),
            "blocks.2.0.fn.0.weight has shape (12, 1, 3, 3), expected (12, 1, 4, 4)",
        ),
        (
            changed("stem.0.weight", lambda weight: weight[..., 1:]),
            "stem.0.weight has shape (12, 2, 5, 4), expected (12, 2, 5, 5)",
        ),
        (
            changed("stem.0.weight", lambda weight: weight.flatten(1)),
            "stem.0.weight has shape (12, 50), expected (dim, in_channels, patch_size, patch_size)",
        ),
        (changed("stem.0.weight", lambda weight: weight[:0]), "is not of a ConvMixer: by its tensors, dim is 0"),
        (changed("stem.0.weight", lambda weight: weight.int()), "stem.0.weight is torch.int32, expected a float"),
        (changed("head.bias", lambda bias: bias.half()), "head.bias is torch.float16, expected torch.float32"),
        (lambda state: state | {"head.extra": torch.zeros(2)}, "has head.extra, which a ConvMixer of depth 3 has not"),
        (lambda state: {"conv1.weight": torch.zeros(2)}, "it has neither stem.0.weight (ours, timm's) nor 0.weight"),
        (lambda state: state | {"epoch": 3}, "holds no state dict: its entry 'epoch' is int"),
        (lambda state: {}, "holds no state dict, but nothing"),
        (lambda state: torch.zeros(2), "holds no state dict, but Tensor"),
    ],
)
def test_state_dicts_that_do_not_fit(change, message, ours, tmp_path):
    path = save(tmp_path / "weights.pt", change(dict(ours.state_dict())))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        load_checkpoint(path, activation="gelu")


def test_damaged_files(ours, tmp_path):
    """Every file cut short, in each format, and files of something else."""
    state = ours.state_dict()
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    damaged = []
    for path in list(tmp_path.iterdir()):
        content = path.read_bytes()
        for length in (0, 1, 10, 100, len(content) // 2, len(content) - 1):
            damaged.append(path.with_name(f"{length}-{path.name}"))
            damaged[-1].write_bytes(content[:length])
    damaged.append(tmp_path / "text.pth")
    damaged[-1].write_text("<html>404: not found</html>\n")
    for path in damaged:
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged, or not a file of weights alone: "):
            load_checkpoint(path, activation="gelu")


class Intruder:
    """Code that runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_file_does_not_run(ours, tmp_path):
    trace = tmp_path / "it ran"
    path = save(tmp_path / "weights.pt", {"state_dict": ours.state_dict(), "args": Intruder(trace)})
    with pytest.raises(ValueError, match="not a file of weights alone: Unsupported global: GLOBAL _?io.open"):
        load_checkpoint(path, activation="gelu")
    assert not trace.exists()
    torch.load(path, weights_only=False)["args"].close()
    assert trace.exists()  # so the file was a trap


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.safetensors")
