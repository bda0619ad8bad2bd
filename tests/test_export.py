"""What leaves Python: ONNX by both exporters, decompositions for other compilers, exported and traced programs."""

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, EMPTY_CASES, make_input, make_vectors, make_weight
from networks import float64_logits, randomize
from numerics import assert_error_at_most_peer, max_error
from torch import nn

import convmixer_fast
from convmixer_fast import ConvMixer, DepthwiseConv2d, decompositions, export, optimize, replace_depthwise
from convmixer_fast.ops import ACTIVATIONS

ROOT = Path(__file__).resolve().parent.parent
FORMS = ["aoti", "program", "decomposed", "torchscript", "onnx"]  # those on docs/deployment.md
EXPORTERS = [False, pytest.param(True, marks=pytest.mark.slow)]  # dynamo=
_ops = torch.ops.convmixer_fast


class FusedSteps(nn.Module):
    """The fused operators with constants of their own: a step over the images, and the pooling at the end."""

    def __init__(self, kernel_size, activation, residual, prologue, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kernel_h, kernel_w = kernel_size
        weight = torch.randn(6, 1, kernel_h, kernel_w, generator=generator) / (kernel_h * kernel_w) ** 0.5
        self.weight = nn.Buffer(weight.to(dtype))
        self.vectors = nn.Buffer(torch.randn(6, 6, generator=generator))
        self.activation, self.residual, self.prologue = activation, residual, prologue

    def forward(self, x):
        first, second = self.vectors.to(torch.promote_types(x.dtype, torch.float32)).split(3)
        prologue = tuple(second) if self.prologue else None
        x = convmixer_fast.fused_depthwise(x, self.weight, *first, self.activation, self.residual, prologue)
        return convmixer_fast.activate_pool(x, *second, self.activation)


class IntoOut(nn.Module):
    """A fused step into memory of the caller's."""

    def forward(self, x, weight, bias, scale, shift):
        out = torch.empty_like(x)
        return convmixer_fast.fused_depthwise(x, weight, bias, scale, shift, out=out) * 2


def replaced():
    """Layers of torch's own after replace_depthwise: of odd and even size, with and without a bias."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 6, 7, padding="same", groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 6, (4, 5), padding="same", groups=6, bias=False),
    )
    assert replace_depthwise(model).count == 2
    return model.eval()


def mixer(kernel_size, dtype=torch.float32, activation="gelu"):
    torch.manual_seed(0)
    model = ConvMixer(dim=8, depth=2, kernel_size=kernel_size, patch_size=4, n_classes=3, activation=activation)
    return randomize(model).to(dtype)


def to_onnx(model, arguments, path, dynamo, dynamic=(), **options):
    """The ONNX model of a model whose argument x has these dynamic dimensions."""
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
        if dynamic:
            options["dynamic_shapes"] = (dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC),)
    elif dynamic:
        options |= dict(input_names=["x"], dynamic_axes={"x": list(dynamic)})
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, arguments, path, dynamo=dynamo, **options)
    return onnx.load(path)


def depthwise_nodes(exported):
    """Those of the Conv nodes that have a group for each channel, as (group, kernel_shape, pads)."""
    import onnx

    convs = [node for node in exported.graph.node if node.op_type == "Conv"]
    found = [{a.name: onnx.helper.get_attribute_value(a) for a in conv.attribute} for conv in convs]
    return [(a["group"], tuple(a["kernel_shape"]), tuple(a["pads"])) for a in found if a["group"] > 1]


def assert_runs_as_torch(path, model, *inputs):
    """ONNX Runtime's error against float64 is one of rounding: a few units of the largest value, as torch's is."""
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(path)
    (name,) = (argument.name for argument in session.get_inputs())
    for x in inputs:
        y = torch.from_numpy(session.run(None, {name: x.numpy()})[0])
        exact = float64_logits(model, x)
        with torch.no_grad():
            assert y.dtype == model(x).dtype
        unit = torch.finfo(x.dtype).eps * exact.abs().max().item()
        assert max_error(y, exact) <= 16 * unit, (max_error(y, exact), unit)


@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kernel_size, pads", [(5, (2, 2, 2, 2)), (4, (1, 1, 2, 2))])
@pytest.mark.parametrize("make", [lambda model: model, optimize], ids=["model", "optimized"])
def test_onnx_of_a_convmixer_of_any_size_of_images(make, kernel_size, pads, dtype, dynamo, tmp_path):
    model = mixer(kernel_size, dtype)
    images = torch.randn(2, 3, 32, 24, dtype=dtype), torch.randn(5, 3, 20, 41, dtype=dtype)
    path = tmp_path / "model.onnx"
    exported = to_onnx(make(model), (images[0],), path, dynamo, dynamic=(0, 2, 3))
    assert depthwise_nodes(exported) == 2 * [(8, (kernel_size, kernel_size), pads)]
    assert {node.domain for node in exported.graph.node} <= {""}
    assert_runs_as_torch(path, model, *images)


def test_onnx_by_the_newer_exporter(tmp_path):
    """One case for every run of the tests, as the exporter is slow: an operator of each kind."""
    torch.manual_seed(0)
    model = nn.Sequential(DepthwiseConv2d(6, (2, 5)), FusedSteps((4, 3), "gelu", True, True)).requires_grad_(False)
    x = torch.randn(2, 6, 9, 11)
    exported = to_onnx(model, (x,), tmp_path / "model.onnx", dynamo=True)
    assert depthwise_nodes(exported) == [(6, (2, 5), (0, 2, 1, 2)), (6, (4, 3), (1, 1, 2, 1))]
    assert_runs_as_torch(tmp_path / "model.onnx", model, x)


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_onnx_of_replaced_layers(dynamo, tmp_path):
    model, x = replaced(), torch.randn(2, 3, 9, 11)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        exported = to_onnx(model, (x.contiguous(memory_format=memory_format),), tmp_path / "model.onnx", dynamo)
        assert depthwise_nodes(exported) == [(6, (7, 7), (3, 3, 3, 3)), (6, (4, 5), (1, 2, 2, 2))]
        assert_runs_as_torch(tmp_path / "model.onnx", model, x)


@pytest.mark.parametrize("dynamo", EXPORTERS)
@pytest.mark.parametrize("activation, residual, prologue", itertools.product(ACTIVATIONS, (False, True), (False, True)))
def test_onnx_of_every_fused_step(activation, residual, prologue, dynamo, tmp_path):
    for kernel_size, dtype in (((3, 4), torch.float32), ((2, 5), torch.float16)):
        model = FusedSteps(kernel_size, activation, residual, prologue, dtype)
        x = torch.randn(2, 6, 9, 11).to(dtype)
        to_onnx(model, (x,), tmp_path / "model.onnx", dynamo)
        assert_runs_as_torch(tmp_path / "model.onnx", model, x)


@pytest.mark.parametrize(
    "opset, dynamo",
    [(9, False), (13, False), (20, False), *(pytest.param(v, True, marks=pytest.mark.slow) for v in (18, 22))],
)
def test_onnx_opsets(opset, dynamo, tmp_path):
    model, x = mixer(5), torch.randn(2, 3, 16, 16)
    exported = to_onnx(optimize(model), (x,), tmp_path / "model.onnx", dynamo, opset_version=opset)
    assert [entry.version for entry in exported.opset_import if entry.domain == ""] == [opset]
    assert_runs_as_torch(tmp_path / "model.onnx", model, x)


def test_onnx_without_a_write_that_the_exporter_would_drop(tmp_path):
    x, vector = torch.randn(1, 3, 5, 6), torch.randn(3)
    arguments = x, torch.randn(3, 1, 3, 3), vector, vector, vector
    with pytest.raises(RuntimeError, match="out cannot be exported to ONNX with dynamo=False"):
        torch.onnx.export(IntoOut(), arguments, tmp_path / "model.onnx", dynamo=False)
    traced = torch.jit.trace(IntoOut(), arguments)
    assert torch.equal(traced(*arguments), IntoOut()(*arguments))


@pytest.mark.parametrize("dynamo", EXPORTERS)
def test_onnx_in_float64(dynamo, tmp_path):
    """In which ONNX Runtime has no convolution. onnx's evaluator has, but no exact Erf: so the activation is ReLU."""
    onnx = pytest.importorskip("onnx")
    model, x = mixer(4, torch.float64, "relu"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    exported = to_onnx(optimize(model), (x,), tmp_path / "model.onnx", dynamo)
    run = pytest.importorskip("onnx.reference").ReferenceEvaluator(exported)
    y = torch.from_numpy(run.run(None, {exported.graph.input[0].name: x.numpy()})[0])
    with torch.no_grad():
        assert_error_at_most_peer(y, model(x), float64_logits(model, x), f"onnx {onnx.__version__}")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.slow
def test_onnx_of_a_saved_program(strict, tmp_path):
    model, x = replaced(), torch.randn(2, 3, 9, 11)
    torch.export.save(torch.export.export(model, (x,), strict=strict), tmp_path / "program.pt2")
    exported = to_onnx(torch.export.load(tmp_path / "program.pt2"), (), tmp_path / "model.onnx", dynamo=True)
    assert len(depthwise_nodes(exported)) == 2
    assert_runs_as_torch(tmp_path / "model.onnx", model, x)


@pytest.mark.slow
def test_onnx_of_a_step_into_given_memory(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    x, weight, v = torch.randn(2, 6, 9, 11), torch.randn(6, 1, 3, 3), torch.randn(3, 6)
    to_onnx(IntoOut(), (x, weight, *v), tmp_path / "model.onnx", dynamo=True)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    names = (argument.name for argument in session.get_inputs())
    (y,) = session.run(None, {name: value.numpy() for name, value in zip(names, (x, weight, *v), strict=True)})
    exact = IntoOut()(*(tensor.double() for tensor in (x, weight, *v)))
    assert max_error(torch.from_numpy(y), exact) <= 16 * torch.finfo(torch.float32).eps * exact.abs().max().item()


def test_onnx_of_a_script():
    """Whose graph the older exporter does not trace."""
    onnx = pytest.importorskip("onnx")

    class Step(nn.Module):
        def forward(self, x, weight):
            return torch.ops.convmixer_fast.depthwise_conv2d(torch.tanh(x), weight, None)

    file = io.BytesIO()
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            torch.jit.script(Step()), (torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 2)), file, dynamo=False
        )
    exported = onnx.load_from_string(file.getvalue())
    assert depthwise_nodes(exported) == [(2, (3, 2), (1, 0, 1, 1))]


def test_onnx_of_a_weight_of_any_size_names_it(tmp_path):
    pytest.importorskip("onnx")

    class Convolve(nn.Module):
        def forward(self, x, weight):
            return convmixer_fast.depthwise_conv2d(x, weight)

    options = dict(input_names=["x", "weight"], dynamic_axes={"weight": [2, 3]})
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(torch.onnx.errors.SymbolicValueError) as refused:
        arguments = torch.randn(2, 6, 9, 11), torch.randn(6, 1, 3, 3)
        torch.onnx.export(Convolve(), arguments, tmp_path / "model.onnx", dynamo=False, **options)
    assert str(refused.value).startswith("weight has no known shape, accepted: a known one, not dynamic")


@pytest.mark.parametrize("first, second", [("convmixer_fast", "torch.onnx"), ("torch.onnx", "convmixer_fast")])
def test_imports_in_either_order(first, second):
    """The package leaves torch.onnx alone, which takes longer to import than it does."""
    pytest.importorskip("onnx")
    code = f"""
import io, sys, torch
import {first}
assert {second!r} not in sys.modules and "onnx" not in sys.modules
import {second}
x = torch.ones(1, 2, 4, 4)
class Convolve(torch.nn.Module):
    def forward(self, x):
        return torch.ops.convmixer_fast.depthwise_conv2d(x, torch.ones(2, 1, 3, 3), None)
torch.onnx.export(Convolve(), (x,), io.BytesIO(), dynamo=False)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_a_torch_without_the_exporters_is_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "convmixer_fast._onnx", None)
    with pytest.warns(
        UserWarning, match=f"cannot be exported to ONNX with torch {torch.__version__}".replace("+", r"\+")
    ):
        export._register_onnx()


# ------------------------------------------------------------------------------------------------- decompositions


def test_every_operator_of_a_program_has_a_decomposition():
    """All but those of the CPU engine, which no program holds."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("convmixer_fast::")}
    assert {op.name() for op in decompositions()} == {name for name in names if "::mixer" not in name}


def arguments_of(case, dtype):
    """By operator, arguments that it takes."""
    x, weight, gy = make_input(case, dtype), make_weight(case, dtype), make_input(case, dtype, seed=3)
    v = make_vectors(case, dtype, 6)
    return {
        _ops.depthwise_conv2d.default: [(x, weight, None), (x, weight, v[0].to(dtype))],
        _ops.depthwise_conv2d_dgrad.default: [(gy, weight)],
        _ops.depthwise_conv2d_wgrad.default: [(x, gy, case.kh, case.kw, bias) for bias in (True, False)],
        _ops.fused_depthwise.default: [
            (x, weight, *v[:3], 1, True, None, None, None),
            (x, weight, *v[:3], 2, False, *v[3:]),
        ],
        _ops.activate_pool.default: [(x, *v[:3], activation) for activation in ACTIVATIONS.values()],
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decompositions_compute_what_the_operators_do(case):
    table = decompositions()
    for op, calls in arguments_of(case, torch.float64).items():
        for arguments in calls:
            ours, theirs = op(*arguments), table[op](*arguments)
            for a, b in zip(*((each if isinstance(each, tuple) else (each,)) for each in (ours, theirs)), strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_decompositions_of_no_images():
    """Of which training may have an empty batch."""
    table = decompositions()
    for op, calls in arguments_of(EMPTY_CASES[0], torch.float32).items():
        for arguments in calls:
            torch.testing.assert_close(table[op](*arguments), op(*arguments), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_decompositions_return_the_operators_dtypes(dtype):
    table = decompositions()
    for op, calls in arguments_of(CASES[3], dtype).items():
        for arguments in calls:
            torch.testing.assert_close(table[op](*arguments), op(*arguments), rtol=0.02, atol=0.05)


def test_decompositions_write_into_out():
    table = decompositions()
    for packet in (_ops.fused_depthwise, _ops.activate_pool):
        for arguments in arguments_of(CASES[3], torch.float64)[packet.default]:
            expected = packet.default(*arguments)
            out = torch.empty_like(expected)
            assert table[packet.out](*arguments, out=out) is None
            torch.testing.assert_close(out, expected)


def targets(module):
    """What a graph and those nested in it, such as the part without gradients, call."""
    graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    return {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}


def test_a_program_is_decomposed_on_demand():
    """And only then, also where torch.onnx has registered its functions."""
    import torch.onnx

    model = mixer(4)
    auto = torch.export.Dim.AUTO
    x = torch.randn(2, 3, 16, 12)
    program = torch.export.export(optimize(model), (x,), dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}})
    ours = {_ops.fused_depthwise.default, _ops.activate_pool.default}
    assert ours <= targets(program.graph_module) and ours <= targets(program.run_decompositions().graph_module)
    decomposed = program.run_decompositions(decompositions())
    assert torch.ops.aten.conv2d.default in targets(decomposed.graph_module)
    assert not any(target in decompositions() for target in targets(decomposed.graph_module))
    for images in (x, torch.randn(3, 3, 24, 21)):
        with torch.no_grad():
            assert_error_at_most_peer(decomposed.module()(images), model(images), float64_logits(model, images), "")


@pytest.mark.slow
def test_torch_compile_keeps_the_kernels(monkeypatch):
    """Also on a machine that sets CI, where torch.compile refuses operators that are in torch's own table."""
    import torch.onnx
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setenv("CI", "1")
    torch.compiler.reset()
    model = nn.Sequential(DepthwiseConv2d(6, 5), FusedSteps((3, 4), "gelu", True, True)).requires_grad_(False)
    x = torch.randn(2, 6, 9, 11)
    y, code = run_and_get_code(torch.compile(model, fullgraph=True, dynamic=True), x)
    assert torch.equal(y, model(x))
    for name in ("depthwise_conv2d", "fused_depthwise", "activate_pool"):
        assert f"torch.ops.convmixer_fast.{name}.default(" in "".join(code)


# ----------------------------------------------------------------------- programs of torch.export and TorchScript


@pytest.mark.parametrize("strict", [False, True])
def test_a_saved_program_runs_the_kernels(strict, tmp_path):
    model, x = replaced(), torch.randn(2, 3, 9, 11)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=strict), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert _ops.depthwise_conv2d.default in targets(program.graph_module)
    for images in (x, torch.randn(4, 3, 17, 12)):
        assert torch.equal(program.module()(images), model(images))


@pytest.mark.parametrize("make", [replaced, lambda: optimize(mixer(4))], ids=["replaced", "optimized"])
def test_a_traced_program_takes_other_sizes(make, tmp_path):
    model = make().requires_grad_(False)
    torch.jit.trace(model, torch.randn(2, 3, 16, 16)).save(tmp_path / "model.ts")
    traced = torch.jit.load(tmp_path / "model.ts")
    assert "convmixer_fast" in str(traced.inlined_graph)
    x = torch.randn(3, 3, 21, 18)
    torch.testing.assert_close(traced(x), model(x))


def test_a_model_on_meta_is_exported():
    model = replaced().to("meta")
    program = torch.export.export(model, (torch.randn(2, 3, 9, 11, device="meta"),))
    assert _ops.depthwise_conv2d.default in targets(program.graph_module)


def test_a_decomposed_training_step(tmp_path):
    """The gradients' operators as well, by functorch's tracing with the table."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, weight, bias = (
        make_input(CASES[3], torch.float64),
        make_weight(CASES[3], torch.float64),
        torch.randn(5).double(),
    )

    def gradients(x, weight, bias):
        loss = lambda *arguments: convmixer_fast.depthwise_conv2d(*arguments).square().sum()  # noqa: E731
        return torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, bias)

    step = make_fx(gradients, decomposition_table=decompositions())(x, weight, bias)
    assert torch.ops.aten.convolution_backward.default in targets(step)
    assert not any(target in decompositions() for target in targets(step))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    F.conv2d(leaves[0], leaves[1], leaves[2], padding="same", groups=5).square().sum().backward()
    for ours, leaf in zip(step(x, weight, bias), leaves):
        torch.testing.assert_close(ours, leaf.grad)


# ------------------------------------------------------------------------------------------- docs/deployment.md


def scripts():
    """Those of the page, by file name, in their order."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    return dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL))


def run_script(name, folder, *arguments, without=""):
    """Only the scripts that name our package can import it. without: what is left out of it."""
    script = scripts()[name]
    assert without in script
    (folder / name).write_text(script.replace(without, ""))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if "import convmixer_fast" in script:
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, name, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_every_block_of_the_page_is_a_script_that_is_run():
    page = (ROOT / "docs" / "deployment.md").read_text()
    assert page.count("```") == 2 * len(scripts())
    assert {name for name in scripts() if name not in ("make_model.py", "measure.py")} == {
        f"{step}.py" for step in ("run_module", *(f"{verb}_{form}" for form in FORMS for verb in ("make", "run")))
    }


@pytest.mark.slow
def test_the_pages_scripts(tmp_path):
    """In their order. Without the library, what was exported does not run."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in scripts():
        ran = run_script(name, tmp_path, *(["2"] if name == "measure.py" else []))
        assert ran.returncode == 0, f"{name}: {ran.stderr}"
    assert list(scripts())[-1] == "measure.py"
    assert len(re.findall(r"^batch \d+, \S+: [\d.]+ ms, [\d.]+ x$", ran.stdout, re.MULTILINE)) == 8
    for name in ("run_program.py", "run_torchscript.py"):
        ran = run_script(name, tmp_path, without='torch.ops.load_library("deploy/_C.so")')
        assert ran.returncode != 0 and "convmixer_fast" in ran.stderr
