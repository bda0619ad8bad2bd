"""The benchmarks of the backward pass: what they write, and what they do with a wrong or missing backend."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import accuracy
import depthwise
import gradients
import throughput
import timing
import training

import convmixer_fast

MODEL = "convmixer_tiny"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    def build(name):
        assert name == MODEL
        model = convmixer_fast.ConvMixer(8, 2, kernel_size=5, patch_size=2, n_classes=10)
        return throughput.plain(model)

    monkeypatch.setattr(throughput, "build", build)
    monkeypatch.setattr(throughput, "select_models", list)
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: None)  # for good, in this process


def run(benchmark, path, *options):
    status = benchmark.main(["--device", "cpu", "--batch", "4", "--rounds", "2", "--json", str(path), *options])
    return status, json.loads(path.read_text())["rows"]


def run_training(path, *options):
    return run(training, path, "--models", MODEL, *options)


def test_training_writes_json_and_table(tmp_path, capsys):
    path = tmp_path / "training.json"
    types = ["float32", "bfloat16", "float16"]
    status, rows = run_training(path, "--dtypes", *types, "--backends", "eager", "ours")
    assert status == 0
    assert [(row["dtype"], row["backend"]) for row in rows] == [(t, b) for t in types for b in ("eager", "ours")]
    for row in rows:
        assert row["status"] == "timed" and len(row["seconds"]) == 2
        assert row["images_per_second"] > 0 and row["batch"] == 4
        assert row["error"] <= accuracy.limit(row["eager_error"], getattr(torch, row["dtype"]))
        assert ("over_best_other" in row) == (row["backend"] == "ours")
    assert capsys.readouterr().out.strip().split("\n\n")[-1] in path.with_suffix(".md").read_text()


def test_backends_run_what_they_say():
    plain = throughput.build(MODEL)
    kinds = {type(module) for module in plain.modules()}
    assert convmixer_fast.DepthwiseConv2d not in kinds
    assert convmixer_fast.DepthwiseConv2d in {type(module) for module in training.BACKENDS["ours"](plain).modules()}


def test_a_step_trains():
    torch.manual_seed(0)
    model = throughput.build(MODEL)
    trainer = training.Trainer(model, torch.randn(4, 3, 8, 8), torch.arange(4), torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    for _ in range(3):
        trainer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


class Tf32(torch.nn.Module):
    """Notes whether it runs with TF32."""

    seen = []

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        Tf32.seen.append((x.dtype, torch.backends.cudnn.allow_tf32))
        return self.model(x)


def test_training_is_checked_without_tf32_and_timed_with_pytorchs_setting(tmp_path, monkeypatch):
    build = throughput.build
    monkeypatch.setattr(throughput, "build", lambda name: Tf32(build(name)))
    monkeypatch.setattr(throughput, "default_image_size", lambda model: 8)
    monkeypatch.setattr(Tf32, "seen", [])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    status, (row,) = run_training(tmp_path / "rows.json", "--backends", "eager")
    assert status == 0 and row["status"] == "timed"
    assert Tf32.seen[:3] == [(torch.float64, False), (torch.float32, False), (torch.float32, False)]
    steps = Tf32.seen[3:]
    assert steps == [(torch.float32, True)] * (1 + timing.WARM_UP + 2)


def test_a_gradient_is_checked_on_the_first_layers_and_all_are_timed(tmp_path, monkeypatch):
    """In float16 a deep network of random weights has no gradient that could be compared."""
    deep = convmixer_fast.ConvMixer(dim=8, depth=9, kernel_size=3, patch_size=2, n_classes=10)
    layers = []
    monkeypatch.setattr(throughput, "build", lambda name: throughput.plain(deep))
    monkeypatch.setitem(training.BACKENDS, "eager", lambda model: layers.append(len(model.blocks)) or model)
    status, (row,) = run_training(tmp_path / "rows.json", "--backends", "eager")
    assert status == 0 and row["status"] == "timed" and layers == [training.CHECKED_LAYERS, 9]
    few = training.shallow(deep)
    assert len(deep.blocks) == 9 and torch.equal(few.blocks[3][1].weight, deep.blocks[3][1].weight)
    other = torch.nn.Linear(2, 3)
    assert torch.equal(training.shallow(other).weight, other.weight)


class WrongGradient(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        y = self.model(x)
        return y + 0.5 * (y - y.detach())


def test_a_wrong_gradient_is_reported_and_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(training.BACKENDS, "ours", WrongGradient)
    status, (eager, ours) = run_training(tmp_path / "rows.json", "--backends", "eager", "ours")
    assert status == 1
    assert eager["status"] == "timed" and ours["status"] == "wrong" and "seconds" not in ours


def test_a_failing_backend_does_not_stop_the_rest(tmp_path, monkeypatch):
    def no_compiler(model):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(training.BACKENDS, "compile", no_compiler)
    monkeypatch.setitem(training.BACKENDS, "ours", lambda model: training.ours(torch.nn.Sequential(torch.nn.ReLU())))
    status, rows = run_training(tmp_path / "rows.json")
    eager, compiled, ours = rows
    assert status == 1 and eager["status"] == "timed"
    assert compiled["message"] == "RuntimeError: no compiler"
    assert ours["message"] == "ValueError: the model has no depthwise convolution to replace"


def test_gradients_writes_json_and_table(tmp_path, capsys):
    path = tmp_path / "gradients.json"
    status, rows = run(gradients, path, "--maps", "8x12x10", "--kernels", "3", "5")
    assert status == 0
    assert len(rows) == 2 * 2 * 2 * 2  # gradients, kernels, operators, layouts
    for row in rows:
        assert row["status"] == "timed" and row["map"] in ("dgrad 8x12x10", "wgrad 8x12x10")
        assert row["bytes"] == 2 * 4 * 4 * 8 * 12 * 10
        assert row["of_copy"] > 0 and row["of_fma_peak"] > 0
        assert ("over_aten_nchw" in row) == (row["operator"] == "ours")
    assert capsys.readouterr().out.strip().split("\n\n")[-1] in path.with_suffix(".md").read_text()


@pytest.mark.parametrize("gradient", list(gradients.GRADIENTS))
def test_a_wrong_operator_is_reported_and_not_timed(tmp_path, monkeypatch, gradient):
    right = gradients.GRADIENTS[gradient]["ours"]
    monkeypatch.setitem(gradients.GRADIENTS[gradient], "ours", lambda *tensors: 1.01 * right(*tensors))
    status, rows = run(gradients, tmp_path / "rows.json", "--maps", "8x9x8", "--kernels", "3", "--layouts", "nchw")
    assert status == 1
    for row in rows:
        wrong = row["map"].startswith(gradient) and row["operator"] == "ours"
        assert row["status"] == ("wrong" if wrong else "timed")


@pytest.mark.parametrize("gradient", list(gradients.GRADIENTS))
@pytest.mark.parametrize("image", [0, 3])
def test_every_image_of_the_batch_is_checked(tmp_path, monkeypatch, gradient, image):
    """A gradient of the input that is wrong in one image, and one of the weight that leaves one out."""
    right = gradients.GRADIENTS[gradient]["ours"]

    def wrong(x, gy, weight):
        gy = gy.clone()
        gy[image] = 0
        return right(x, gy, weight)

    monkeypatch.setitem(gradients.GRADIENTS[gradient], "ours", wrong)
    status, rows = run(gradients, tmp_path / "rows.json", "--maps", "8x9x8", "--kernels", "3", "--layouts", "nchw")
    assert status == 1
    found = {(row["map"].split()[0], row["operator"]): row["status"] for row in rows}
    assert found.pop((gradient, "ours")) == "wrong"
    assert set(found.values()) == {"timed"}


def float64_tensors():
    return [x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.float64]


def test_nothing_in_float64_is_left_when_gradients_are_timed(tmp_path, monkeypatch):
    left = []
    time_variants = depthwise.time_variants
    earlier = float64_tensors()  # held, so that no new tensor gets the id of one of them

    def count(*arguments):
        left.append([x.shape for x in float64_tensors() if all(x is not other for other in earlier)])
        return time_variants(*arguments)

    monkeypatch.setattr(depthwise, "time_variants", count)
    status, _ = run(gradients, tmp_path / "rows.json", "--maps", "8x9x8", "--kernels", "3")
    assert status == 0 and left == [[], []]


def test_gradients_are_checked_without_tf32_and_timed_with_pytorchs_setting(tmp_path, monkeypatch):
    right, seen = gradients.GRADIENTS["wgrad"]["aten"], []

    def aten(x, gy, weight):
        seen.append((x.dtype, torch.backends.cudnn.allow_tf32))
        return right(x, gy, weight)

    monkeypatch.setitem(gradients.GRADIENTS["wgrad"], "aten", aten)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run(gradients, tmp_path / "rows.json", "--maps", "8x9x8", "--kernels", "3", "--layouts", "nchw")
    assert seen[:3] == [(torch.float64, False), (torch.float32, False), (torch.float32, False)]
    assert seen[3:] == [(torch.float32, True)] * (timing.WARM_UP + 2)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--kernels", "3", "4"], "argument --kernels: got 4, accepted: odd sizes"),
        (["--operators", "fused"], "unrecognized arguments: --operators fused"),
    ],
)
def test_what_gradients_have_not_is_refused(capsys, arguments, said):
    with pytest.raises(SystemExit):
        gradients.main(["--device", "cpu", *arguments])
    assert said in capsys.readouterr().err
