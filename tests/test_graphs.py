"""What torch.fx, TorchScript and torch.compile make of replaced models and of our ConvMixer."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from networks import randomize
from torch import nn
from torch.nn.utils import prune

import convmixer_fast as cf
from convmixer_fast import ConvMixer, replace_depthwise, restore_depthwise

pytestmark = pytest.mark.usefixtures("two_threads")

CHANGES = {  # new attributes, with which PyTorch's kernels compute the convolution
    "dilated": dict(dilation=(2, 2), padding=(6, 6)),
    "circular": dict(padding_mode="circular"),
    "unpadded": dict(padding=(0, 0)),
    "strided": dict(stride=(2, 2), padding=(3, 3)),
}


def replaced(**attributes):
    """Of two convolutions the second has these attributes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.GELU(), nn.Conv2d(4, 4, 7, padding="same", groups=4, bias=False)
    )
    assert replace_depthwise(model).count == 2
    for name, value in attributes.items():
        setattr(model[2], name, value)
    return model.eval()


def images(dtype=torch.float32):
    return torch.randn(2, 4, 15, 14, generator=torch.Generator().manual_seed(1)).to(dtype)


def convmixer(**options):
    torch.manual_seed(0)
    return randomize(ConvMixer(6, 2, 5, 4, n_classes=3, in_channels=4, **options))


ABLATIONS = [dict(residual=()), dict(residual=("spatial", "channel"), norm="layer", activation="relu")]
REPLACED = {"replaced": replaced} | {name: partial(replaced, **change) for name, change in CHANGES.items()}
MODELS = REPLACED | {"ConvMixer": convmixer} | {str(options): partial(convmixer, **options) for options in ABLATIONS}


def each(models):
    return pytest.mark.parametrize("build", models.values(), ids=models)


# ------------------------------------------------------------------------------------------------------- torch.fx


@each(MODELS)
def test_traced_by_fx(build):
    """One node a convolution; and what is done with a traced module."""
    model = build()
    x = images()
    traced = torch.fx.symbolic_trace(model)
    count = [node.target for node in traced.graph.nodes].count(cf.depthwise_conv2d)
    assert count == (1 if build in list(REPLACED.values())[1:] else 2)
    traced.graph.lint()
    traced.graph.eliminate_dead_code()
    traced.recompile()
    others = (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), torch.fx.symbolic_trace(traced))
    for other in (traced, *others):
        assert torch.equal(other(x), model(x))


def test_a_traced_convmixer_still_checks_its_images():
    traced = torch.fx.symbolic_trace(convmixer())
    traced.graph.eliminate_dead_code()
    traced.recompile()
    with pytest.raises(ValueError, match=r"x must be of shape \(N, 4, H, W\) .* got \(2, 3, 15, 14\)"):
        traced(images()[:, :3])


def test_a_traced_module_is_compiled():
    traced, x = torch.fx.symbolic_trace(replaced()), images()
    torch.compiler.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), traced(x))


def test_traced_while_a_hook_computes_the_weight():
    """Of such a weight torch.fx tells nothing, so it is left to F.conv2d, which takes any."""
    model = replaced()
    prune.random_unstructured(model[0], "weight", 0.5)
    traced, x = torch.fx.symbolic_trace(model), images()
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(cf.depthwise_conv2d) == targets.count(torch.conv2d) == 1
    torch.testing.assert_close(traced(x), model(x))


def test_the_fused_functions_are_nodes():
    class Fused(nn.Module):
        def forward(self, x, weight, bias, scale, shift):
            prologue = (bias, scale, shift)
            y = cf.fused_depthwise(x, weight, bias, scale, shift, "relu", prologue=prologue)
            return cf.activate_pool(y, bias, scale, shift)

    arguments = (images(), torch.randn(4, 1, 3, 5), *torch.randn(3, 4))
    traced = torch.fx.symbolic_trace(Fused())
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [cf.fused_depthwise, cf.activate_pool]
    assert torch.equal(pickle.loads(pickle.dumps(traced))(*arguments), Fused()(*arguments))


def test_features_by_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    convnext = pytest.importorskip("torchvision.models.convnext")
    blocks = [convnext.CNBlockConfig(8, 12, 1), convnext.CNBlockConfig(12, None, 1)]
    torch.manual_seed(0)
    model = convnext.ConvNeXt(blocks, num_classes=3).eval()
    nodes, x = ["features.1", "features.3.0.block.0"], torch.randn(2, 3, 32, 32)
    expected = extraction.create_feature_extractor(model, nodes)(x)
    assert replace_depthwise(model).count == 2
    extractor = extraction.create_feature_extractor(model, nodes)
    assert sum(node.target is cf.depthwise_conv2d for node in extractor.graph.nodes) == 2
    for node, features in extractor(x).items():
        torch.testing.assert_close(features, expected[node])


@pytest.mark.parametrize("restored", [False, True])
def test_quantization_of_graphs(restored):
    """The convolution stays in float where it is ours, and is quantized as PyTorch's where it is restored."""
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")

    def quantized(model):
        model = quantize_fx.prepare_fx(model, mapping, (x,))
        model(x)
        return quantize_fx.convert_fx(model)

    x = images()
    plain = nn.Sequential(nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    model = copy.deepcopy(plain)
    assert replace_depthwise(model).count == 1
    if restored:
        restore_depthwise(model)
        assert torch.equal(quantized(model)(x), quantized(plain)(x))
    else:
        converted = quantized(model)
        assert sum(node.target is cf.depthwise_conv2d for node in converted.graph.nodes) == 1
        torch.testing.assert_close(converted(x), model(x), rtol=0, atol=0.05)


# ---------------------------------------------------------------------------------------------------- TorchScript


def loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@each(MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scripted(build, dtype):
    model, x = build().to(dtype), images(dtype)
    scripted = torch.jit.script(model)
    for other in (scripted, loaded(scripted), torch.jit.freeze(scripted)):
        assert torch.equal(other(x), model(x))


def test_what_a_scripted_module_runs():
    """Ours where the attributes say what ours compute, and PyTorch's alone where they do not."""
    for change in ({}, *CHANGES.values()):
        graph = str(torch.jit.script(replaced(**change)[2]).inlined_graph)
        assert ("convmixer_fast::depthwise_conv2d" in graph) == (not change)
        assert ("aten::conv2d" in graph) == bool(change)


def test_scripted_and_unbatched():
    module = replaced()
    assert torch.equal(torch.jit.script(module)(images()[0]), module(images()[0]))
    arguments = images()[0], torch.randn(4, 1, 3, 4)
    assert torch.equal(torch.jit.script(cf.depthwise_conv2d)(*arguments), cf.depthwise_conv2d(*arguments))


def test_a_scripted_module_trains():
    """Several times: TorchScript optimizes what it has run."""
    model = replaced()
    scripted, x = torch.jit.script(copy.deepcopy(model)), images()
    model(x).square().sum().backward()
    for _ in range(4):
        scripted.zero_grad()
        scripted(x).square().sum().backward()
        for ours, theirs in zip(scripted.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


def test_scripted_under_autocast():
    model = replaced()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(images())
        assert expected.dtype == torch.bfloat16
        assert torch.equal(torch.jit.script(model)(images()), expected)


def test_a_scripted_convmixer_still_checks_its_images():
    with pytest.raises(torch.jit.Error, match=r"x must be of shape \(N, 4, H, W\) .* got \(2, 3, 15, 14\)"):
        torch.jit.script(convmixer())(images()[:, :3])


@each(REPLACED)
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_traced_by_jit(build):
    model = build()
    traced = torch.jit.trace(model, images())
    assert torch.equal(loaded(traced)(images()[:, :, :13]), model(images()[:, :, :13]))


# -------------------------------------------------------------------------------------------------- torch.compile


def operators_of(compiled, x):
    names = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._opname)
            return function(*args, **(kwargs or {}))

    with Recorder():
        y = compiled(x)
    return y, "depthwise_conv2d" in names


def test_changes_after_compilation():
    """Replacing, restoring and other attributes reach a model that torch.compile has compiled already."""
    model, x = nn.Conv2d(4, 4, 7, padding=3, groups=4), images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check(on_ours):
        y, ours = operators_of(compiled, x)
        assert ours == on_ours
        torch.testing.assert_close(y, nn.Conv2d._conv_forward(model, x, model.weight, model.bias))

    check(False)
    replace_depthwise(compiled)
    check(True)
    model.dilation, model.padding = (2, 2), (6, 6)
    check(False)
    model.dilation, model.padding = (1, 1), (3, 3)
    check(True)
    restore_depthwise(compiled)
    check(False)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    for model, count in ((replaced(), 2), (replaced(**CHANGES["dilated"]), 1)):
        exported = torch.export.export(model, (images(),), strict=strict)
        targets = [str(node.target) for node in exported.graph.nodes]
        assert targets.count("convmixer_fast.depthwise_conv2d.default") == count
        assert torch.equal(exported.module()(images()), model(images()))
