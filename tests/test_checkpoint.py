"""load_checkpoint against the models that the weights come from, and what it says of files that do not fit."""

import argparse
import copy
import dataclasses
import datetime
import os
import pathlib
import re
import resource
import struct
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.torch
import torch
from cases import slow
from networks import copy_weights, plain_convmixer, randomize
from torch import nn
from torch.optim.swa_utils import AveragedModel

from convmixer_fast import ConvMixer, create_model, load_checkpoint, optimize, replace_depthwise, stored
from convmixer_fast.model import ALIASES, VARIANTS

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


def assert_same(model, expected):
    """The same weights, up to counters that a file may lack."""
    tensors = model.state_dict()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensors[key], tensor), key


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


def below(prefix):
    return lambda state: {prefix + key: tensor for key, tensor in state.items()}


FORMS = {
    "torch.compile": below("_orig_mod."),
    "DDP of torch.compile": below("module._orig_mod."),
    "Lightning Fabric": below("_forward_module.module."),
    "a module in a module": below("encoder.net."),
    "Lightning": lambda state: {
        "state_dict": below("model.")(state) | {"loss.weight": torch.ones(2), "loss.0.weight": torch.ones(2)},
        "hyper_parameters": argparse.Namespace(width=3),
        "callbacks": {"ModelCheckpoint": {"best_model_path": "x"}},
    },
    "torchvision": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3},
    "PyTorch's tutorial": lambda state: {"model_state_dict": state, "loss": torch.ones(())},
    "DeepSpeed": lambda state: {
        "module": state,
        "param_shapes": [{key: tensor.shape for key, tensor in state.items()}],
        "optimizer": {key: {"step": 3} for key in state},
    },
    "Composer": lambda state: {"state": {"model": below("module.")(state)}, "rng": []},
    "torch.compile of some modules": lambda state: {
        key.replace("stem.", "stem._orig_mod.").replace("blocks.1.", "blocks.1._orig_mod."): tensor
        for key, tensor in below("module.")(state).items()
    },
    "Determined": lambda state: {"models_state_dict": [state], "optimizers_state_dict": []},
    "a pair": lambda state: (state, 3),
    "ours among several": lambda state: {"best": dict(state), "model": state},
    "one dict in two entries": lambda state: {"best": state, "last": state},
    "with metadata": lambda state: OrderedDict(state),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["ours", "plain"])
def test_forms_that_trainers_write(form, source, ours, tmp_path, request):
    state = request.getfixturevalue(source).state_dict()
    path = save(tmp_path / "gelu.pt", FORMS[form](state))
    assert_same(load_checkpoint(path), ours)


@pytest.mark.parametrize(
    "wrap", [AveragedModel, nn.DataParallel, lambda model: nn.ModuleDict({"a": model}), *slow(torch.compile)]
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_state_dicts_of_wrappers(wrap, suffix, ours, tmp_path):
    path = save(tmp_path / f"gelu.{suffix}", wrap(copy.deepcopy(ours)).state_dict())
    assert_same(load_checkpoint(path), ours)


BESIDE = {
    "NumPy's numbers": [np.float64(0.8), np.int64(3), np.bool_(True), np.dtype("f4"), np.array("2026", dtype="M8[Y]")],
    "NumPy's arrays": [np.arange(6).reshape(2, 3), np.zeros(2, "f4,O"), np.array(["text", None], dtype=object)],
    "paths": [pathlib.Path("/data"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:\\a")],
    "options": argparse.Namespace(a=1, b=[2], kind=float, path=pathlib.Path("x")),
    "dicts": [OrderedDict(a=1), defaultdict(list, a=[1]), defaultdict(dict), Counter("aab"), {(1, 2): 3}],
    "Python's": [{1, 2}, b"bytes", bytearray(b"bytes"), 10**30, -1, 1.5, 1 + 2j, None, True, (), "text"],
    "torch's": [torch.float16, torch.device("cuda:1"), torch.Size([1]), torch.strided, torch.random.get_rng_state()],
    "tensors": [torch.ones(1).expand(9), torch.ones(0), nn.Parameter(torch.ones(2)), torch.ones(2, device="meta")],
    "other tensors": [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2).byte()],
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_trainers_store_beside_the_weights(kind, legacy, ours, tmp_path):
    content = {"state_dict": ours.state_dict(), "beside": BESIDE[kind]}
    torch.save(content, tmp_path / "gelu.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(load_checkpoint(tmp_path / "gelu.pt"), ours)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray", "pathlib", "pathlib._local"])
def test_names_of_other_versions(module, ours, tmp_path):
    """NumPy 1 and 2, Python 3.12 and 3.13 call the same classes by different names."""
    path = save(tmp_path / "gelu.pt", {"state_dict": ours.state_dict(), "beside": [np.float64(1), pathlib.Path("a")]})

    def renamed(entries):
        names = rb"(?<=c)(numpy\._?core\.multiarray|pathlib(\._local)?)\n"
        own = module.partition(".")[0].encode()
        pickled = re.sub(
            names, lambda match: module.encode() + b"\n" if match[0].startswith(own) else match[0], entries["data.pkl"]
        )
        assert f"c{module}\n".encode() in pickled
        return entries | {"data.pkl": pickled}

    assert_same(load_checkpoint(with_entries(path, renamed)), ours)


def test_a_class_that_torch_does_not_know(ours, tmp_path):
    """Is named, with what allows it; then the file loads. What the user had allowed before stays allowed."""
    path = save(tmp_path / "gelu.pt", {"state_dict": ours.state_dict(), "when": datetime.date(2026, 1, 2)})
    refused(path, r"GLOBAL datetime.date was not an allowed .*torch.serialization.add_safe_globals\(\[datetime.date")
    with torch.serialization.safe_globals([datetime.date, argparse.Namespace]):
        allowed = set(torch.serialization.get_safe_globals())
        assert_same(load_checkpoint(path), ours)
        assert set(torch.serialization.get_safe_globals()) == allowed
    refused(path, "GLOBAL datetime.date was not an allowed")


def test_objects_of_numpy_are_not_made(tmp_path):
    """A dtype that claims to hold no objects, but does, lets bytes of the file pass for pointers."""
    made = b"\x89\x88\x87R"  # dtype(name, False, True)
    forged = b"(K\3" + unicode("|") + b"N" + unicode("a") + b"\x85}" + unicode("a") + b"cnumpy\ndtype\n" + unicode("O")
    forged += made + b"K\0\x86sK\x08K\1K\0tb"  # version, order, no subarray, names, fields, size, alignment, flags
    array = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R"
    array += b"(K\1K\1\x85cnumpy\ndtype\n" + unicode("V8") + made + forged + b"\x89U\x08AAAAAAAAtb"
    path = with_pickle(save(tmp_path / "gelu.pt", {}), b"\x80\x02" + array + b".")
    with path.open("rb") as file:
        assert type(stored.read_content(file)) is stored.Ignored


def test_tensors_in_every_layout(ours, tmp_path):
    """Parameters, tensors with attributes, slices, transposed, channels_last, all in one storage: each gets memory of
    its own, which whoever trains the model may write to."""
    state = ours.state_dict()
    flat = torch.cat([tensor.flatten() for tensor in state.values() if tensor.is_floating_point()])
    parts = flat.split([tensor.numel() if tensor.is_floating_point() else 0 for tensor in state.values()])
    marked = {key: nn.Parameter(tensor) for key, tensor in state.items() if tensor.is_floating_point()}
    for tensor in marked.values():
        tensor.weight_decay = 0
    layouts = {
        "parameters": dict(ours.named_parameters()) | dict(ours.named_buffers()),
        "with attributes": state | marked,
        "slices": {key: torch.stack([tensor, tensor + 1], -1)[..., 0] for key, tensor in state.items()},
        "transposed": {key: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor for key, tensor in state.items()},
        "channels_last": copy.deepcopy(ours).to(memory_format=torch.channels_last).state_dict(),
        "in one storage": {
            key: part.view_as(tensor) if tensor.is_floating_point() else tensor
            for (key, tensor), part in zip(state.items(), parts)
        },
    }
    for name, layout in layouts.items():
        model = load_checkpoint(save(tmp_path / f"{name}_gelu.pt", layout))
        assert_same(model, ours)
        storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        assert len(storages) == len(list(model.parameters())), name
        assert all(parameter.is_leaf and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "convolutions, norms, expected",
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mixed_dtypes(convolutions, norms, expected, ours, images, tmp_path):
    """Become the widest: no value changes, the model runs, and so does the optimized one."""
    state = {key: value.to(convolutions if value.dim() == 4 else norms) for key, value in ours.state_dict().items()}
    model = load_checkpoint(save(tmp_path / "gelu.pt", state))
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert {counter.dtype for counter in counters} == {torch.int64}
    assert all(torch.equal(tensor, state[key].to(tensor.dtype)) for key, tensor in model.state_dict().items())
    logits = model(images.to(expected))
    assert logits.dtype == expected
    torch.testing.assert_close(optimize(model)(images.to(expected)), logits, rtol=1e-4, atol=1e-4)


def test_counters_of_another_dtype_do_not_widen(ours, tmp_path):
    state = copy.deepcopy(ours).half().state_dict() | {"stem.2.num_batches_tracked": torch.tensor(3.0)}
    model = load_checkpoint(save(tmp_path / "gelu.pt", state))
    assert model.head.weight.dtype == torch.float16 and model.stem[2].num_batches_tracked == 3


EMA_FORMS = {
    "timm": lambda state, ema: {"state_dict": state, "state_dict_ema": ema, "epoch": 3},
    "torchvision": lambda state, ema: {
        "model": state,
        "model_ema": below("module.")(ema) | {"n_averaged": torch.ones(())},
    },
    "AveragedModel in a LightningModule": lambda state, ema: {
        "state_dict": {**below("net.")(state), **below("copy.module.")(ema), "copy.n_averaged": torch.ones(())}
    },
    "Lightning's WeightAveraging": lambda state, ema: {
        "state_dict": below("model.")(ema),
        "current_model_state": below("model.")(state),
        "averaging_state": {"n_averaged": torch.ones(())},
    },
    "mmengine": lambda state, ema: {
        "state_dict": ema,
        "ema_state_dict": below("module.")(state) | {"steps": torch.ones(())},
        "message_hub": {},
    },
    "ema_pytorch": lambda state, ema: {
        **below("online_model.")(state),
        **below("ema_model.")(ema),
        "step": torch.ones(()),
    },
    "nested": lambda state, ema: {"model": state, "ema": {"module": ema, "updates": 3}},
    "SWA": lambda state, ema: {"model_state_dict": state, "swa_state_dict": ema},
    "ignite": lambda state, ema: {"model": state, "ema_model": ema},
    "mmclassification": lambda state, ema: {"state_dict": state, "ema_state_dict": ema},
}


@pytest.mark.parametrize("form", EMA_FORMS)
def test_ema(form, ours, tmp_path, recwarn):
    """Without the argument, a warning says which were taken and how to choose; it points to the caller."""
    ema = randomize(copy.deepcopy(ours), seed=7)
    path = save(tmp_path / "gelu\n.pt", EMA_FORMS[form](ours.state_dict(), ema.state_dict()))
    assert_same(load_checkpoint(path, ema=True), ema)
    assert_same(load_checkpoint(path, ema=False), ours)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"gelu\\n.pt has averaged \(EMA\) weights beside .* ema=False") as warned:
        assert_same(load_checkpoint(path), ema)
    assert [warning.filename for warning in warned] == [__file__]


def test_ema_that_is_not_there(ours, tmp_path, recwarn):
    path = save(tmp_path / "gelu.pt", {"schema": {"model": ours.state_dict()}})
    averaged = save(tmp_path / "averaged_gelu.pt", AveragedModel(copy.deepcopy(ours)).state_dict())
    for ema in (None, False):
        assert_same(load_checkpoint(path, ema=ema), ours)
    for ema in (None, True):
        assert_same(load_checkpoint(averaged, ema=ema), ours)
    assert not recwarn
    with pytest.raises(
        ValueError, match=r"^\S+gelu.pt has no averaged \(EMA\) weights, which ema=True .* schema.model$"
    ):
        load_checkpoint(path, ema=True)
    with pytest.raises(ValueError, match=r"has no other than averaged \(EMA\) weights, which ema=False .* but module$"):
        load_checkpoint(averaged, ema=False)
    with pytest.raises(TypeError, match="ema must be True, False or None, got 'yes'"):
        load_checkpoint(path, ema="yes")


def test_timms_own_training_checkpoint(ours, tmp_path):
    saver_module = pytest.importorskip("timm.utils.checkpoint_saver")
    ema = randomize(copy.deepcopy(ours), seed=7)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    options = argparse.Namespace(model="convmixer_1536_20", data=pathlib.Path("/data"))
    saver = saver_module.CheckpointSaver(
        ours, optimizer, args=options, model_ema=ema, checkpoint_dir=tmp_path, unwrap_fn=lambda model: model
    )
    saver.save_checkpoint(0, metric=np.float64(0.8))
    for choice, expected in ((True, ema), (False, ours)):
        assert_same(load_checkpoint(tmp_path / "last.pth.tar", activation="gelu", ema=choice), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_keeps_the_dtype(ours, dtype, tmp_path):
    state = copy.deepcopy(ours).to(dtype).state_dict()
    model = load_checkpoint(save(tmp_path / "weights.pt", state), activation="gelu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])


@pytest.fixture
def narrow(monkeypatch):
    """The models of the paper by their names, four channels wide, so that their files are small."""
    for name, variant in VARIANTS.items():
        monkeypatch.setitem(VARIANTS, name, dataclasses.replace(variant, dim=4))


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
def test_activation_of_the_file_name(file_name, name, activation, tmp_path, narrow):
    model = load_checkpoint(save(tmp_path / file_name, create_model(name, n_classes=3).state_dict()))
    assert model.activation == activation
    named = VARIANTS[ALIASES.get(name, name)]
    assert all(getattr(model, size) == getattr(named, size) for size in ("dim", "depth", "kernel_size", "patch_size"))


def test_activation_argument_wins_over_the_file_name(tmp_path, narrow):
    path = save(tmp_path / "convmixer_256_8_k9_p1.pt", create_model("convmixer_256_8_k9_p1").state_dict())
    assert load_checkpoint(path, activation="relu").activation == "relu"


@pytest.mark.parametrize(
    "file_name, said",
    [
        ("weights.pt", "is not that of a known model of these sizes, {'dim': 4, .*'kernel_size': 9, .*'depth': 8}"),
        ("convmixer_768_32.pt", "is not that of a known model of these sizes"),
        ("convmixer_256_8_k9_p1_relu.pt", "says both"),
    ],
)
def test_activation_that_cannot_be_known(file_name, said, tmp_path, narrow):
    path = save(tmp_path / file_name, create_model("convmixer_256_8_k9_p1").state_dict())
    message = f"activation must be given, 'gelu' or 'relu': the file name {file_name} {said}"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_sizes_of_another_model_than_the_file_name(tmp_path, ours):
    """Its width counts too."""
    with pytest.raises(ValueError, match="is not that of a known model of these sizes, {'dim': 4"):
        load_checkpoint(save(tmp_path / "convmixer_256_8_k9_p1.pt", ConvMixer(4, 8, 9, 1).state_dict()))


def test_unknown_activation(tmp_path):
    with pytest.raises(ValueError, match="activation must be one of 'gelu', 'relu', got 'silu'"):
        load_checkpoint(tmp_path / "weights.pt", activation="silu")


class Intruder:
    """Code that runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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
        (changed("stem.0.weight", lambda weight: weight[:0]), "has shape (0, 2, 5, 5), accepted: sizes from 1 up"),
        (
            changed("stem.0.weight", lambda weight: weight.int()),
            "stem.0.weight is torch.int32, accepted: torch.float64, torch.f",
        ),
        (changed("head.bias", lambda bias: bias.to(torch.complex64)), "head.bias is torch.complex64, accepted: "),
        (
            changed("stem.2.num_batches_tracked", lambda count: count.bool()),
            "stem.2.num_batches_tracked is torch.bool, accepted: torch.int64, ",
        ),
        (lambda state: state | {"head.extra": torch.zeros(2)}, "has head.extra, which a ConvMixer of depth 3 has not"),
        (lambda state: {"conv1.weight": torch.zeros(2)}, "it has neither a tensor stem.0.weight (ours, timm's) nor 0"),
        (lambda state: state | {"epoch": 3}, "holds no state dict: its entry epoch is int, accepted: a dense"),
        (lambda state: state | {3: torch.zeros(2)}, "the file itself has a key that is no text"),
        (lambda state: {}, "holds no weights of a ConvMixer: it has neither a tensor stem.0.weight"),
        (lambda state: {}, "(the authors'), but nothing"),
        (lambda state: torch.zeros(2), "(the authors'), but a tensor"),
        (lambda state: [3, [[[[state]]]]], "(the authors'), but list"),
        (lambda state: argparse.Namespace(a=1), "(the authors'), but Ignored"),
        (lambda state: {"model": [torch.ones(2)]}, "(the authors'), but dict that begins with model"),
        (
            lambda state: state | {"x": torch.eye(2).to_sparse()},
            "its entry x is a tensor (sparse_coo, cpu), accepted: a",
        ),
        (
            lambda state: state | {"x": torch.ones(2, device="meta")},
            "its entry x is a tensor (strided, meta), accepted",
        ),
        (
            lambda state: {str(i): state | {"a": torch.zeros(i)} for i in range(17)},
            "weights of more than 16 ConvMixers",
        ),
        (lambda state: {"a": state, "b": dict(state)}, "holds the weights of several ConvMixers: a, b"),
        (lambda state: {"head": state | {"0.weight": torch.zeros(2)}}, "has 0.weight, which a ConvMixer of depth 3"),
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
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged, or not a file of weights: "):
            load_checkpoint(path, activation="gelu")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_does_not_run(ours, tmp_path, legacy):
    trace = tmp_path / "it ran"
    for content in (
        {"state_dict": ours.state_dict(), "args": Intruder(trace)},
        {**ours.state_dict(), "x": Intruder(trace)},
    ):
        torch.save(content, tmp_path / "gelu.pt", _use_new_zipfile_serialization=not legacy)
        refused(tmp_path / "gelu.pt", "GLOBAL _?io.open was not an allowed global")
        assert not trace.exists()
    torch.load(tmp_path / "gelu.pt", weights_only=False)["x"].close()
    assert trace.exists()  # so the file was a trap


@contextmanager
def limited_memory():
    """A gigabyte more than the process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def little_memory():
    with limited_memory():
        yield


def refused(path, message):
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}") as error:
        load_checkpoint(path, activation="gelu")
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= len(str(path)) + 500


def with_entries(path, change, compression=zipfile.ZIP_STORED):
    """Writes a zip anew, with its entries as {name: bytes} changed; the folder is left out of their names."""
    with zipfile.ZipFile(path) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in change(entries).items():
            archive.writestr(f"archive/{name}", content)
    return path


def with_pickle(path, content):
    return with_entries(path, lambda entries: entries | {"data.pkl": content})


def unicode(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x80\x02)" + b"\x85" * 100_000 + b".", "holds no weights"),  # nested tuples
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds no weights"),  # nested lists
        (b"\x80\x02" + b"(" * 100_000 + b".", "damaged"),
        (b"\x80\x02\x8e" + (1 << 40).to_bytes(8, "little") + b".", "Unsupported operand 142"),
        (b"\x80\x02X\xff\xff\xff\xffk.", "damaged"),  # a text of 4 gigabytes
        (b"\x80\x02j\xff\xff\xff\x7f.", "damaged"),  # gets what was not put
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "but NoneType"),  # puts into the two billionth place
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.", "damaged"),  # it would have a terabyte
        (b"\x80\x02ctorch\nTensor\n\x8a\x06\0\0\0\0\0\x01\x85R.", "damaged"),
        (b"\x80\x02cnumpy\nndarray\n\x8a\x06\0\0\0\0\0\x01\x85R.", "but Ignored"),
        (b"\x80\x02c\x1b[2J\nx\n)R.", r"GLOBAL \\x1b\[2J\.x was not"),
        (b"\x80\x02c" + b"k" * 1000 + b"\nx\n)R.", "GLOBAL k+ ... .*k"),
        (b"\x80\x02cos\nsystem\n" + unicode("true") + b"\x85R.", "GLOBAL os.system whose module os is blocked"),
        (b"\x80\x02NNR.", "unrecognized function None"),
        (b"\x80\x02NNa.", "Can only append to lists"),
        (b"\x80\x02NNNs.", "Can only SETITEM for dict"),
        (b"\x80\x02}(Nu.", "damaged"),
        (b"\x80\x02}" * 2, "damaged"),
        (b"\x80\x02(ibuiltins\nprint\n.", "Unsupported operand 105"),
        (b"\x80\x02NQ.", "persistent_load id must be"),
        (b"", "damaged"),
    ],
)
def test_hostile_pickles(content, message, ours, tmp_path, little_memory):
    refused(with_pickle(save(tmp_path / "weights.pt", ours.state_dict()), content), message)


def test_pickles_that_are_too_long(ours, tmp_path, monkeypatch):
    """Each of a million empty dicts takes 64 bytes of memory and one of the file."""
    monkeypatch.setattr(stored, "MAX_PICKLE", 1000)
    path = save(tmp_path / "weights.pt", ours.state_dict())
    refused(with_pickle(path, b"\x80\x02" + b"}" * 997 + b"."), "but nothing")
    refused(with_pickle(path, b"\x80\x02" + b"}" * 998 + b"."), "its entry archive/data.pkl has more than 1000 bytes")


def test_one_tensor_named_in_several_ways(tmp_path, little_memory):
    """torch.load finds the entry data/0 as "0", 0 and "0\\0x" too, and makes a copy of its bytes for each."""
    path = save(tmp_path / "weights.pt", {"a": torch.zeros(20_000_000, dtype=torch.uint8)})
    begin = b"(" + unicode("storage") + b"ctorch\nByteStorage\n"
    end = unicode("cpu") + b"J" + (20_000_000).to_bytes(4, "little") + b"tQ"
    keys = [b"K\0", unicode("0"), *(unicode(f"0\0{i}") for i in range(98))]
    with_pickle(path, b"\x80\x02](" + b"".join(begin + key + end for key in keys) + b"e.")
    refused(path, "it has 2[0-9]{7} bytes, but 40000000 or more of tensors")


class View:
    """Saved as a tensor that torch would not make."""

    def __init__(self, elements, *view):
        self.arguments = (torch.ones(elements).storage(), *view, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "view, message",
    [
        ((1, 0, (7,), (0,)), r"head.bias of shape \(7,\) needs 28 bytes, its storage has 4"),
        ((7, 1, (7,), (1,)), "damaged"),
        ((7, 0, (7,), (2,)), "damaged"),
        ((7, 0, (1 << 62,), (1 << 62,)), "damaged"),
        ((7, 0, (1 << 64,), (1,)), "damaged"),
        ((7, -1, (7,), (1,)), "damaged"),
        ((7, 6, (7,), (-1,)), "damaged"),
        ((7, 0, (7.0,), (1,)), "damaged"),
        ((7, 0, (1 << 62,) * 1000, (1,) * 1000), "damaged"),
        ((7, 0, (0, 1 << 62), (1, 1)), r"shape \(0, 4611686018427387904\), expected \(7,\)"),
        ((7, 0, (1,) * 64, (1,) * 64), "has shape .1, 1, .*expected"),
    ],
)
def test_hostile_views(view, message, ours, tmp_path, little_memory):
    refused(save(tmp_path / "weights.pt", ours.state_dict() | {"head.bias": View(*view)}), message)


def test_tensors_that_share_memory(tmp_path):
    """A file asks for no more memory than it has bytes."""
    shared = ConvMixer(**SIZES | {"dim": 48})
    for layer in shared.blocks[1:]:
        layer.load_state_dict(shared.blocks[0].state_dict(keep_vars=True), assign=True)
    path = save(tmp_path / "weights.pt", shared.state_dict())
    refused(path, f"has {path.stat().st_size} bytes, but [0-9]+ of tensors: they share memory, accepted: each its own")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda entries: {name: entries[name] for name in entries if name != "data/0"}, "data/0"),
        (lambda entries: entries | {"data/0": entries["data/0"] + b"0"}, "record size .* does not match expected size"),
        (
            lambda entries: entries | {"data.pkl": bytes((64 << 20) + 1)},
            "its entry archive/data.pkl has more than 67108864 bytes",
        ),
        (lambda entries: entries | {"constants.pkl": b""}, "TorchScript"),
        (lambda entries: {"a": b""}, "damaged"),
        (lambda entries: entries | {"../x": b""}, None),
        (lambda entries: entries | {"byteorder": b"middle"}, "Unknown endianness type: middle"),
    ],
)
def test_hostile_zips(change, message, ours, tmp_path, little_memory):
    path = with_entries(save(tmp_path / "weights.pt", ours.state_dict()), change)
    if message:
        refused(path, message)
    else:
        assert_same(load_checkpoint(path, activation="gelu"), ours)


def test_zips_that_torch_does_not_write(ours, tmp_path, little_memory):
    """Compressed, where 60 kB hold 60 MB; with a name twice; with entries that share bytes; in two folders; empty."""
    path = save(tmp_path / "weights.pt", ours.state_dict())
    with_entries(path, lambda entries: entries | {"zeros": bytes(60_000_000)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refused(path, "archive/data.pkl is compressed, which torch.save does not do")
    save(path, ours.state_dict())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"")
    refused(path, "entries of the zip have the same name or share bytes")
    with zipfile.ZipFile(save(path, ours.state_dict()), "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for number in range(20):
            copied = copy.copy(largest)
            copied.filename = f"archive/{number}"
            archive.filelist.append(copied)
        archive._didModify = True
    refused(path, "entries of the zip have the same name or share bytes")
    path.write_bytes(b"PK\3\4" + b"PK\5\6" + bytes(18))
    refused(path, "its zip does not end with its directory")
    path.write_bytes(b"PK\3\4")
    refused(path, "its zip does not end with its directory")


def test_a_tensor_marked_as_a_folder(ours, tmp_path):
    """torch.load takes what its memory happened to hold: one flipped bit, outside what checksums protect."""
    path = save(tmp_path / "weights.pt", ours.state_dict())
    content = bytearray(path.read_bytes())
    name = content.rindex(b"weights/data/0")  # in the directory
    content[name - 46 + 38] ^= 0x10
    path.write_bytes(content)
    assert torch.load(path).keys() == ours.state_dict().keys()
    refused(path, "its entry weights/data/0 is marked as a folder")


def end_records(path):
    """A zip of torch.save as its entries, its directory, its 64-bit record, the locator of this, its last record."""
    content = path.read_bytes()
    assert content[-98:-94] == b"PK\6\6" and content[-42:-38] == b"PK\6\7" and content[-22:-18] == b"PK\5\6"
    start = int.from_bytes(content[-50:-42], "little")
    return content[:start], content[start:-98], content[-98:-42], content[-42:-22], content[-22:]


def test_zips_with_two_directories(ours, tmp_path):
    """Of which zipfile and torch.load might each read another one: then no checksum protects what is loaded."""
    path = save(tmp_path / "weights.pt", ours.state_dict())
    entries, directory, end64, locator, end = end_records(path)
    moved = end64[:48] + (len(entries) + len(directory) + 56).to_bytes(8, "little")
    moved_locator = locator[:8] + (len(entries) + 2 * len(directory) + 56).to_bytes(8, "little") + locator[16:]
    for content in (
        entries + directory + end64 + directory + moved + locator + end,  # the locator is that of the first
        entries + directory + directory + end64 + moved_locator + end,  # a gap
        entries + directory + end64 + locator + end[:-2] + b"\1\0x",  # a comment
        entries + directory + end64 + locator + end + b"x",
        entries + directory + end64 + locator + end[:-2] + b"\x16\0" + end,  # the comment is a record too
        entries[:4] + entries + directory + end64 + locator + end,  # something before it
    ):
        path.write_bytes(content)
        refused(path, "damaged, or not a file of weights: its zip (does not end with its directory|has two ends)")


def safetensors_file(path, header, data=b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_hostile_safetensors(ours, tmp_path, little_memory):
    path = tmp_path / "weights.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{" + bytes(99))
    refused(path, "header too large")
    for header in (
        b"{",
        b'{"a":' * 100_000,
        b'{"stem.0.weight":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}',
        b'{"stem.0.weight":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}',
        b'{"stem.0.weight":{"dtype":"F32","shape":[100],"data_offsets":[0,4]}}',
    ):
        refused(safetensors_file(path, header, bytes(4)), "damaged")
    ones = b",".join([b"1"] * 1000)
    header = b'{"stem.0.weight":{"dtype":"F32","shape":[' + ones + b'],"data_offsets":[0,4]}}'
    refused(safetensors_file(path, header, bytes(4)), r"stem.0.weight has shape \(1, 1, .* expected")
    save(path, ours.state_dict() | {"head.bias": torch.zeros(7).to(torch.float8_e5m2)})
    refused(path, "head.bias is torch.float8_e5m2, accepted: torch.float64")


def test_layers_by_names_alone(ours, tmp_path, little_memory):
    """Each of which takes longer to build than to write."""
    names = {f"blocks.{number}.1.weight": torch.zeros(1) for number in range(3, 1025)}
    refused(save(tmp_path / "weights.safetensors", ours.state_dict() | names), "has 1025 layers, accepted: 1024")


@pytest.mark.parametrize(
    "key, shown",
    [
        ("a\x1b]0;title\x07\x1b[2J\nfake line", re.escape(r"has a\x1b]0;title\x07\x1b[2J\nfake line, which")),
        ("k" * 3_000_000, "has k{27} ... k{27}, which"),
        ("\U000e0001" * 100, r"has (\\U000e0001)+.*, which"),
        ("\udcff", r"has \\udcff, which"),
        ("9" * 5000 + ".weight", "has 999.*, which"),
        ("99999999999999999999.bias", "has 99999999999999999999.bias, which"),
        ("00.weight", "has 00.weight, which"),
        ("\u0663.weight", "has \u0663.weight, which"),
        ("blocks.0.9.weight", "has blocks.0.9.weight, which"),
        ("3.9.weight", "has blocks.0.9.weight, which"),
        ("", "has , which"),
    ],
)
def test_keys_of_every_kind(key, shown, plain, tmp_path):
    refused(save(tmp_path / "weights.pt", plain.state_dict() | {key: torch.zeros(1)}), shown)


def test_keys_of_both_kinds(plain, tmp_path):
    refused(
        save(tmp_path / "weights.pt", plain.state_dict() | {"head.bias": torch.zeros(7)}), "keys of both the authors'"
    )


def test_names_of_files_in_messages(tmp_path):
    path = tmp_path / "a\x1b[2J\n_gelu.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(
        ValueError, match=r"a\\x1b\[2J\\n_gelu.pt is damaged, or not a file of weights: it begins like no"
    ):
        load_checkpoint(path)


def test_no_bit_of_a_tensor_flips_unseen(tmp_path):
    """torch.load gives other weights: it does not compare checksums."""
    model = ConvMixer(2, 1, 3, 1, 2)
    path = save(tmp_path / "weights.pt", model.state_dict())
    content = path.read_bytes()
    start = content.index(model.head.bias.detach().numpy().tobytes())
    for bit in range(8 * model.head.bias.nbytes):
        flipped = bytearray(content)
        flipped[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        refused(path, "the checksum of its entry weights/data/[0-9]+ is wrong")
    assert not torch.equal(torch.load(path)["head.bias"], model.head.bias)


def test_formats_without_checksums(ours, tmp_path):
    """Of torch.save before 1.6, and with its checksums switched off."""
    path = tmp_path / "gelu.pt"
    torch.save({"model": ours.state_dict(), "epoch": 3}, path, _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(path), ours)
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save(path, ours.state_dict())
    finally:
        torch.serialization.set_crc32_options(computed)
    assert_same(load_checkpoint(path), ours)


def test_a_file_of_a_machine_of_the_other_byte_order(ours, tmp_path):
    path = save(tmp_path / "gelu.pt", ours.state_dict())
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    itemsize = {f"data/{i}": tensor.itemsize for i, tensor in enumerate(ours.state_dict().values())}

    def swap(entries):
        swapped = {
            name: np.frombuffer(entries[name], f"u{size}").byteswap().tobytes() for name, size in itemsize.items()
        }
        return entries | swapped | {"byteorder": other}

    with_entries(path, swap)
    assert torch.equal(torch.load(path)["head.bias"], ours.head.bias)
    assert_same(load_checkpoint(path), ours)
    with_entries(path, lambda entries: entries | {"byteorder": sys.byteorder.encode()})
    assert not torch.equal(load_checkpoint(path).head.bias, ours.head.bias)


@pytest.mark.parametrize(
    "name", ["Grüße 图 gelu.pt", "gelu", "gelu.SAFETENSORS", "gelu.bin", "\udcff_gelu.safetensors"]
)
def test_the_content_tells_the_format(name, ours, tmp_path):
    path = tmp_path / name
    with path.open("wb") as file:
        torch.save(ours.state_dict(), file)
    assert_same(load_checkpoint(path), ours)
    path.write_bytes(safetensors.torch.save(ours.state_dict()))
    model = load_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))  # the weights are no map of the file
    assert_same(model, ours)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for name in ("gelu.pt", "gelu.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(OSError, match=f"{name} is a FIFO, accepted: a regular file"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(OSError, match="/dev/zero is a character device"):
        load_checkpoint("/dev/zero")
    with pytest.raises(IsADirectoryError):
        load_checkpoint(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.safetensors")
