"""The benchmarks: what they write, what they refuse to time, and their arithmetic. What they measure is not tested."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import press_ctrl_c, start

pytest.importorskip("tqdm")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import breakdown  # noqa: E402
import cpu  # noqa: E402
import depthwise  # noqa: E402
import gemm  # noqa: E402
import gradients  # noqa: E402
import instructions  # noqa: E402
import limit  # noqa: E402
import overhead  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import runtimes  # noqa: E402
import throughput  # noqa: E402
import timing  # noqa: E402
import training  # noqa: E402
from tqdm import tqdm  # noqa: E402

import convmixer_fast  # noqa: E402

TINY = ["--device", "cpu", "--batch", "2", "--batches", "2", "--image-size", "8"]
PAIR = ["convmixer_256_8_k9_p2", "convmixer_256_8_k3_p2"]


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


class FakeClock:
    """A clock that moves only when a function under test moves it."""

    now = 0.0

    @classmethod
    def mark(cls) -> float:
        return cls.now

    seconds = staticmethod(lambda start, end: end - start)


def test_measure_interleaves_and_keeps_every_call():
    calls, rounds = [], []

    def function(name, *durations):
        remaining = iter([100.0] * timing.WARM_UP + list(durations))

        def call():
            calls.append(name)
            FakeClock.now += next(remaining)

        return call

    functions = {"a": function("a", 1, 2, 3), "b": function("b", 10, 30, 20)}
    seconds = timing.measure(functions, 3, FakeClock, lambda: rounds.append(len(calls)))
    assert seconds == {"a": [1, 2, 3], "b": [10, 30, 20]}
    assert calls == ["a"] * timing.WARM_UP + ["b"] * timing.WARM_UP + ["a", "b"] * 3
    assert len(rounds) == 3


def test_cold_copies_exceed_the_cache_and_keep_the_layout():
    x = torch.randn(2, 64, 64, 64).to(memory_format=torch.channels_last)
    copies = timing.cold_copies(x)
    assert sum(copy.numel() * 4 for copy in copies) >= 3 * timing.last_level_cache(x.device)
    assert len({copy.data_ptr() for copy in copies}) == len(copies) > 1
    assert all(copy.is_contiguous(memory_format=torch.channels_last) and torch.equal(copy, x) for copy in copies)
    assert len(timing.cold_copies(torch.zeros(1))) == timing.MOST_COPIES


def test_results_reach_the_disk_before_their_name_does(tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.md"
    report.write(path, "old")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((path.read_text(), (path.parent / partial).read_text())))
    partial = "results.md.partial"
    report.write(path, "Größe\n")
    assert synced == [("old", "Größe\n")]
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("results.md", "Größe\n")]


def test_damaged_results_are_named(tmp_path):
    path = tmp_path / "results.json"
    assert report.read_results(path) is None
    for content in ("", '{"rows": [', "\x00" * 100):
        path.write_text(content)
        with pytest.raises(SystemExit, match="results.json cannot be read, remove it to begin anew: JSONDecodeError"):
            report.read_results(path)


def test_throughput_ratios():
    common = dict(batch=10, status="timed", flops_per_image=10**9)
    rows = [
        dict(model=f"k{k}", backend=backend, seconds=seconds, **common, sizes=[256, 8, 2, k])
        for k, backend, seconds in [
            (9, "eager", [9.0, 2.0, 2.0]),  # 5 images a second
            (9, "compile", [1.25, 1.25, 1.25]),  # 8
            (9, "compile-nchw", [1.0, 1.0, 1.0]),  # 10
            (9, "cudnn-depthwise", [2.5, 2.5, 2.5]),  # 4
            (9, "fused", [0.25, 0.25, 8.0]),  # 40
            (9, "fused-l2-chunks", [0.125, 0.125, 0.125]),  # 80: ours, too
            (3, "eager", [0.5, 0.5, 0.5]),  # 20
            (3, "fused", [0.2, 0.2, 0.2]),  # 50
        ]
    ]
    rows.append(dict(model="k3", backend="compile", batch=10, status="wrong", message="wrong"))
    rows.append(dict(model="k9", backend="published: eager", status="published", images_per_second=1000.0))
    throughput.summarise(rows)
    figures = {(row["model"], row["backend"]): row for row in rows}
    assert figures["k9", "eager"]["images_per_second"] == 5
    assert figures["k9", "fused"]["teramacs_per_second"] == pytest.approx(0.02)
    assert figures["k9", "fused"]["over_best_other"] == 4
    assert figures["k9", "fused-l2-chunks"]["over_best_other"] == 8
    assert figures["k3", "fused"]["over_best_other"] == 2.5
    assert figures["k9", "fused"]["k9_over_k3"] == pytest.approx(0.8)
    assert figures["k9", "eager"]["k9_over_k3"] == 0.25
    assert "k9_over_k3" not in figures["k9", "compile"] and "over_best_other" not in figures["k9", "compile"]


def test_ratios_are_over_what_is_held_to_the_same_instruction_set(monkeypatch):
    common = dict(model="k9", batch=10, status="timed", flops_per_image=10**9)
    seconds = {"onnxruntime": 1.0, "openvino": 2.0, "fused": 0.5}  # 10, 5 and 20 images a second
    rows = [dict(backend=backend, seconds=[one], **common) for backend, one in seconds.items()]
    for isa, ratio in ((None, 2), ("avx2", 4)):
        monkeypatch.delenv("CMF_CPU_ISA", raising=False)
        if isa:
            monkeypatch.setenv("CMF_CPU_ISA", isa)
        throughput.summarise(rows)
        assert rows[2]["over_best_other"] == ratio


@pytest.mark.parametrize("product", ["own", "library"], indirect=True)
def test_breakdown_names_every_part(tmp_path, capsys, monkeypatch, product):
    ran = []
    for name in ("own_seconds", "library_seconds"):
        measure = getattr(breakdown, name)
        monkeypatch.setattr(breakdown, name, lambda *of, name=name, measure=measure: ran.append(name) or measure(*of))
    status, rows = run_throughput(tmp_path, "--models", PAIR[0], "--backends", "fused", "--breakdown")
    assert status == 0 and ran == [f"{product}_seconds"]
    found = rows[PAIR[0], "fused"]["breakdown"]
    assert [part["name"] for part in found["parts"]] == [*breakdown.PARTS, "rest"]
    assert sum(part["seconds"] for part in found["parts"]) == pytest.approx(found["total_seconds"])
    assert all(part["seconds"] > 0 and part["floor_seconds"] > 0 for part in found["parts"][:-1])
    assert min(found["ceilings"].values()) > 0
    model = convmixer_fast.create_model(PAIR[0])
    products = sum(part["flops"] for part in found["parts"] if part["name"] != "pool + head")
    head = 2 * model.dim * model.n_classes
    assert products == 2 * (throughput.flops_per_image(model, 8) - head)
    output = capsys.readouterr().out
    assert f"\n* matrix products of fused: {product}\n" in output
    assert f"\n\n{PAIR[0]}, fused\n\n| part " in output
    with pytest.raises(ValueError, match="there is no breakdown for meta, only for cpu, cuda"):
        breakdown.measure(convmixer_fast.optimize(model.eval()), torch.empty(1, device="meta"), 1)


def test_breakdown_of_a_gpus_kernels():
    """A range is listed on the host, with the time of its kernels, and once more on the device."""

    def event(name, device, microseconds):
        return SimpleNamespace(name=name, device_type=device, device_time_total=microseconds)

    host, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        event("GEMM", host, 3), event("GEMM", gpu, 3), event("aten::mm", host, 3), event("GEMM", host, 4),
        event("depthwise", host, 2), event("depthwise_mma_kernel", gpu, 2),
    ]  # fmt: skip
    assert breakdown.kernel_seconds(events) == {"GEMM": pytest.approx(7e-6), "depthwise": pytest.approx(2e-6)}


@pytest.mark.cuda
def test_breakdown_on_a_gpu(tmp_path):
    arguments = ["--models", PAIR[0], "--breakdown", "--device", "cuda", "--image-size", "64"]
    status, rows = run_throughput(tmp_path, *arguments, "--backends", *throughput.BROKEN_DOWN)
    assert status == 0 and len(rows) == 2
    for row in rows.values():
        parts = {part["name"]: part["seconds"] for part in row["breakdown"]["parts"]}
        assert all(parts[name] > 0 for name in breakdown.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it is measured")
def test_breakdown_without_the_gpu_is_a_prediction(capsys, monkeypatch):
    part = breakdown.Part("GEMM", 0.5, 1.0, 0.25, "memory")
    ceilings = breakdown.Ceilings(1.0, 1.0, 1.0)
    module = SimpleNamespace(
        predict=lambda *_: breakdown.combine([part], dict(GEMM=0.5, total=0.5), ceilings), GPU="H200"
    )
    monkeypatch.setitem(sys.modules, "prediction", module)
    assert throughput.main(["--device", "cuda", "--breakdown", "--models", PAIR[0]]) == 0
    output = capsys.readouterr().out
    assert output.startswith("# H200: prediction, not measured")
    assert f"{PAIR[0]}: 128 images per second, a prediction" in output


def test_the_breakdown_is_of_ours_and_of_its_l2_chunks(tmp_path, monkeypatch, capsys):
    """As on a GPU, of which this CPU takes the place."""
    monkeypatch.setattr(throughput, "obstacle", lambda *_: "")
    monkeypatch.setattr(throughput.gpu_engine, "l2_chunk", lambda x, weights: 1)
    measured = []

    def measure(module, images, rounds):
        measured.append(module.chunk)
        part, ceilings = breakdown.Part("GEMM", 0.5, 1.0, 0.25, "memory"), breakdown.Ceilings(1.0, 1.0, 1.0)
        return breakdown.combine([part], dict(GEMM=0.5, total=0.5), ceilings)

    monkeypatch.setattr(breakdown, "measure", measure)
    backends = ["eager", "fused", "fused-graphs", "fused-l2-chunks"]
    status, rows = run_throughput(tmp_path, "--models", PAIR[0], "--backends", *backends, "--breakdown")
    assert status == 0 and all(row["status"] == "timed" for row in rows.values())
    assert measured == ["auto", 1]
    assert [backend for (_, backend), row in rows.items() if "breakdown" in row] == ["fused", "fused-l2-chunks"]
    assert rows[PAIR[0], "fused-l2-chunks"]["message"] == "1 images per chunk"
    output = capsys.readouterr().out
    assert f"\n\n{PAIR[0]}, fused\n\n| part" in output and f"\n\n{PAIR[0]}, fused-l2-chunks\n\n| part" in output


def test_a_figure_stands_without_its_breakdown(tmp_path, monkeypatch):
    def no_profiler(*_):
        raise RuntimeError("CUPTI is busy")

    monkeypatch.setattr(breakdown, "measure", no_profiler)
    status, rows = run_throughput(tmp_path, "--models", PAIR[0], "--backends", "eager", "fused", "--breakdown")
    assert status == 0 and all(row["status"] == "timed" for row in rows.values())
    assert rows[PAIR[0], "fused"]["message"].endswith("no breakdown: RuntimeError: CUPTI is busy")


def test_a_part_that_the_profiler_did_not_see_has_no_rate():
    part, ceilings = breakdown.Part("depthwise", 0.0, 1.0, 0.25, "memory"), breakdown.Ceilings(1.0, 1.0, 1.0)
    text = breakdown.table(breakdown.combine([part], dict(depthwise=0.0, total=0.5), ceilings))
    assert re.search(r"\| depthwise +\| +0 \| +0.0% \| +\|", text)


def test_latency_is_that_of_an_idle_gpu(capsys):
    gpu_, cpu_ = torch.device("cuda"), torch.device("cpu")
    assert timing.settle_for(gpu_, latency=True) is torch.cuda.synchronize
    assert timing.settle_for(gpu_) is not torch.cuda.synchronize and timing.settle_for(gpu_)() is None
    assert timing.settle_for(cpu_, latency=True).args == timing.settle_for(cpu_).args == (0.02,)
    args = throughput.parse(["--device", "cpu", "--latency"])
    args.device = "cuda"
    assert "each on an idle GPU" in throughput.describe(args)
    args.latency = False
    assert "idle" not in throughput.describe(args)


def test_l2_chunks_are_as_large_as_the_engine_says(monkeypatch):
    asked = []

    def l2_chunk(x, weights):
        asked.append((x.shape, weights.patch.shape[0]))
        return 3

    monkeypatch.setattr(throughput.gpu_engine, "l2_chunk", l2_chunk)
    model = throughput.plain(convmixer_fast.ConvMixer(16, 2, 3, 2, 10)).eval()
    module = throughput.BACKENDS["fused-l2-chunks"].prepare(model, torch.empty(7, 3, 8, 8))
    assert module.chunk == 3 and asked == [((7, 3, 8, 8), 16)]


def test_compile_nchw_leaves_the_layout_alone(monkeypatch):
    """The options are such as this torch knows: it refuses others before it compiles anything."""
    compiler, asked = torch.compile, []

    def compile_(model, **settings):
        asked.append(settings)
        return compiler(model, **settings)

    monkeypatch.setattr(torch, "compile", compile_)
    model = torch.nn.Conv2d(1, 1, 1)
    prepare = throughput.BACKENDS["compile-nchw"].prepare
    prepare(model, torch.empty(1))
    prepare(model, torch.empty(1, device="meta"))
    on_cpu, elsewhere = (settings["options"] for settings in asked)
    assert on_cpu == {"layout_optimization": False, "freezing": True, "cpp.vec_isa_ok": True}
    assert elsewhere == {"layout_optimization": False}
    throughput.BACKENDS["compile"].prepare(model, torch.empty(1))
    assert "layout_optimization" not in asked[-1]["options"]


@pytest.mark.parametrize("backend", throughput.CUDNN)
@pytest.mark.parametrize("fails", [False, True])
def test_cudnn_computes_depthwise_convolutions_during_a_call_alone(monkeypatch, backend, fails):
    monkeypatch.setattr(torch.backends.cudnn, "depthwise_kernel", "native", raising=False)
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append((torch.backends.cudnn.depthwise_kernel, x.is_contiguous()))
            if fails:
                raise RuntimeError("no algorithm")
            return x

    chosen = throughput.BACKENDS[backend]
    images = torch.empty(2, 3, 4, 4).to(memory_format=chosen.memory_format)
    run = chosen.prepare(Model(), images)
    assert torch.backends.cudnn.depthwise_kernel == "native"
    if fails:
        with pytest.raises(RuntimeError, match="no algorithm"):
            run(images)
    else:
        assert run(images) is images
    assert seen == [("cudnn", backend == "cudnn-depthwise")]
    assert torch.backends.cudnn.depthwise_kernel == "native"


def test_where_cudnn_cannot_be_chosen_a_row_says_why(tmp_path, monkeypatch):
    status, rows = run_throughput(tmp_path, "--models", PAIR[0], "--backends", *throughput.CUDNN)
    assert status == 0
    for row in rows.values():
        assert row["status"] == "skipped" and row["message"].endswith("cuDNN needs a CUDA device, this is cpu")
    gpu_ = torch.device("cuda")
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(depthwise_kernel="auto"))
    assert throughput.no_cudnn_depthwise(gpu_) == ""
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace())
    reason = f"needs torch.backends.cudnn.depthwise_kernel, from torch 2.14 on; this is {torch.__version__}"
    assert throughput.no_cudnn_depthwise(gpu_) == reason
    assert throughput.obstacle("cudnn-depthwise", PAIR[0], gpu_) == reason
    assert throughput.obstacle("eager", PAIR[0], gpu_) == throughput.obstacle("fused", PAIR[0], gpu_) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_peers_give_the_models_logits(package, dtype):
    pytest.importorskip(package)
    if package == "onnxruntime":
        pytest.importorskip("onnxscript")
    model = throughput.plain(convmixer_fast.ConvMixer(16, 2, 3, 2, 10)).eval().to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        if (package, dtype) == ("onnxruntime", torch.bfloat16):
            with pytest.raises(TypeError, match="ONNX Runtime has no bfloat16 convolution on the CPU"):
                runtimes.onnxruntime(model, x)
            return
        expected = model(x)
        logits = getattr(runtimes, package)(model, x)(x)
    assert logits.dtype == dtype
    error = accuracy.relative_error(logits, expected.double())
    assert error <= accuracy.limit(0, dtype)


def test_a_peer_that_is_not_installed_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    status, rows = run_throughput(tmp_path, "--models", PAIR[0], "--backends", "eager", "openvino")
    assert status == 0
    row = rows[PAIR[0], "openvino"]
    assert (row["status"], row["message"]) == ("skipped", "the package openvino is not installed")


def test_depthwise_ratios():
    common = dict(map="1x1x1", kernel=3, bytes=4e9, flops=6e9, status="timed", copy_seconds=[1.0] * 3)
    rows = [
        common | dict(operator="aten", layout="nchw", seconds=[8.0, 8.0, 9.0]),
        common | dict(operator="aten", layout="channels_last", seconds=[4.0, 4.0, 4.0]),
        common | dict(operator="ours", layout="nchw", seconds=[2.0, 2.0, 99.0], fma_seconds=[1.0], fma_flops=12e9),
    ]
    depthwise.summarise(rows)
    ours = rows[-1]
    assert (ours["gigabytes_per_second"], ours["gigaflops_per_second"]) == (2, 3)
    assert (ours["of_copy"], ours["of_fma_peak"]) == (0.5, 0.25)
    assert (ours["over_aten_nchw"], ours["over_aten_channels_last"]) == (4, 2)
    assert "over_aten_nchw" not in rows[1]


def test_depthwise_over_kernel_3_and_over_nchw():
    times = {  # operator, layout and kernel, on two maps of which one has no kernel 3
        ("a", "ours", "nchw", 3): 2.0,
        ("a", "ours", "nchw", 9): 5.0,
        ("a", "ours", "channels_last", 3): 1.0,
        ("a", "ours", "channels_last", 9): 4.0,
        ("a", "aten", "nchw", 9): 7.0,
        ("b", "ours", "nchw", 9): 100.0,
        ("b", "ours", "channels_last", 9): 50.0,
    }
    names = "map", "operator", "layout", "kernel"
    figures = dict(bytes=1, flops=1, status="timed", copy_seconds=[1.0], message="")
    rows = [dict(zip(names, case)) | figures | dict(seconds=[seconds]) for case, seconds in times.items()]
    depthwise.summarise(rows)
    over_kernel_3 = [row.get("over_kernel_3") for row in rows]
    assert over_kernel_3 == [None, 2.5, None, 4, None, None, None]
    assert [row.get("over_nchw") for row in rows] == [None, None, 2, 1.25, None, None, 2]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in depthwise.table(rows).splitlines()]
    shown = [dict(zip(lines[0], line)) for line in lines[2:]]
    assert [line["ms / k3's"] for line in shown] == ["", "2.5", "", "4", "", "", ""]
    assert [line["speed / NCHW's"] for line in shown] == ["", "", "2", "1.25", "", "", "2"]
    assert "of FMA peak" not in lines[0] and "remark" not in lines[0], "empty in every row"


@pytest.mark.parametrize("name, size", [("convmixer_512_12_k8_p7", 224), ("convmixer_256_8_k3_p2", 32)])
def test_flops_are_those_of_the_layers(name, size):
    plain, model = throughput.build(name), convmixer_fast.create_model(name)
    pixels = (size // model.patch_size) ** 2
    layer = model.dim * model.kernel_size**2 + model.dim**2
    patches = model.dim * 3 * model.patch_size**2
    multiply_adds = pixels * (patches + model.depth * layer) + model.dim * model.n_classes
    assert throughput.flops_per_image(plain, size) == 2 * multiply_adds
    assert throughput.flops_per_image(model, size) == 2 * multiply_adds, "the package's operators are counted alike"


def test_paper_models_exist():
    paper = report.paper_rows()
    table2 = throughput.select_models(["table2"])
    assert set(table2) == {name for name, variant in convmixer_fast.model.VARIANTS.items() if variant.n_classes == 1000}
    assert paper["convmixer_1536_20_k9_p7"]["rtx8000_images_per_second"] == "134"
    timm = pytest.importorskip("timm")
    assert set(paper) - set(table2) - set(peers.MODELS) - set(peers.EMPTY) <= set(timm.list_models())
    assert throughput.select_models(["deit_tiny_patch7_224"]) == ["deit_tiny_patch7_224"]


def test_published_figures():
    """They are of our models, and stand beside what is measured without any part in its figures."""
    with (ROOT / "benchmarks" / "data" / "published.csv").open(newline="") as file:
        figures = list(csv.DictReader(file))
    assert {figure["model"] for figure in figures} <= set(convmixer_fast.list_models()) and len(figures) == 3
    (row,) = throughput.published("convmixer_1536_20_k9_p7")
    assert (row["backend"], row["status"], row["images_per_second"]) == ("published: eager", "published", 401.91)
    multiply_adds = 32**2 * 1536 * (3 * 7**2 + 20 * (9**2 + 1536)) + 1536 * 1000
    assert row["teramacs_per_second"] == pytest.approx(401.91 * multiply_adds / 1e12)
    assert row["message"] == "timm's tables, RTX 5090, torch 2.9.1; not measured here"
    assert throughput.published("convmixer_768_32_k7_p7")[0]["backend"] == "published: compile"
    assert throughput.published(PAIR[0]) == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_published_figures_follow_a_models_rows_on_a_gpu(tmp_path, monkeypatch, capsys, device):
    models = ["convmixer_1536_20_k9_p7", "convmixer_1024_20_k9_p14"]

    def run_model(name, args, progress):
        common = dict(model=name, batch=10, status="timed", flops_per_image=10**9, message="")
        return [common | dict(backend="eager", seconds=[1.0]), common | dict(backend="fused", seconds=[0.5])]

    monkeypatch.setattr(throughput, "run_model", run_model)
    monkeypatch.setattr(report, "environment", lambda device: dict(device="a GPU"))
    args = throughput.parse(["--device", "cpu", "--models", *models])
    args.device, args.json, args.plot = device, tmp_path / "rows.json", tmp_path / "chart.png"
    assert throughput.run(args) == 0
    rows = json.loads(args.json.read_text())["rows"]
    expected = ["eager", "fused"] + ["published: eager"] * (device == "cuda")
    assert [row["model"] for row in rows] == [name for name in models for _ in expected]
    assert [row["backend"] for row in rows] == 2 * expected
    assert [row.get("over_best_other") for row in rows if row["backend"] == "fused"] == [2, 2]
    assert capsys.readouterr().out.count("not measured here") == (2 if device == "cuda" else 0)
    assert args.plot.read_bytes().startswith(b"\x89PNG")


def test_every_model_that_is_named_must_exist(capsys):
    """Also one that a later option replaces."""
    for benchmark in (throughput, training):
        args = benchmark.parse(["--device", "cpu", "--models", *PAIR, "--models", "convmixer_768_32", PAIR[1], PAIR[1]])
        assert args.models == ["convmixer_768_32_k7_p7", PAIR[1]]
        with pytest.raises(SystemExit):
            benchmark.parse(["--device", "cpu", "--models", PAIR[0], "convmixer_256_8_k9_p3", "--models", PAIR[0]])
        assert "argument --models: no model is called 'convmixer_256_8_k9_p3'; close: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, given, later",
    [
        (throughput, "--dtype float16 --batch 64 --batches 20 --models table1", "--batch 1 --batches 2 --image-size 4"),
        (throughput, "--image-size 224 --backends fused-graphs compile", "--backends eager --image-size 8"),
        (depthwise, "--maps 1536x32x32 --kernels 9 3 --batch 64", "--maps 8x6x5 --kernels 3 --batch 1 --rounds 2"),
        (gradients, "--maps 1536x32x32 --kernels 9 3 --rounds 20", "--maps 8x6x5 --kernels 3 --batch 1 --rounds 2"),
        (gemm, "--sizes 1536x1536x65536 64x64x64 --rounds 9 --dtype float16", "--sizes 8x9x10 --rounds 1"),
        (training, "--dtypes float16 bfloat16 --rounds 9", "--dtypes float32 --rounds 1 --models convmixer_768_32"),
    ],
)
def test_later_options_override_earlier_ones(script, given, later):
    """A rehearsal on a CPU appends its options to those of a GPU's run."""
    both = vars(script.parse([*f"--device cuda {given}".split(), *f"--device cpu {later}".split()]))
    alone = vars(script.parse(f"--device cpu {later}".split()))
    named = {word[2:].replace("-", "_") for word in given.split() if word.startswith("--")}
    assert both["device"] == "cpu"
    replaced = {word[2:].replace("-", "_") for word in later.split() if word.startswith("--")}
    assert all(both[name] == alone[name] for name in both if name not in named - replaced)


def test_select_models():
    select = throughput.select_models
    assert select(["convmixer_256_8_k[39]_p2"]) == sorted(PAIR)
    assert select(["convmixer_768_32", "convmixer_768_32_k7_p7"]) == ["convmixer_768_32_k7_p7"]
    with pytest.raises(ValueError, match="no model is called 'convmixer_256_8_k9_p3'; close: .*convmixer_256_8_k9_p"):
        select(["convmixer_256_8_k9_p3"])


def test_throughput_writes_json_table_and_plot(tmp_path):
    results, chart = tmp_path / "out" / "results.json", tmp_path / "chart.png"
    done = run_script(
        "throughput.py", *TINY, "--models", *PAIR, "--backends", "eager", "fused", "--json", results, "--plot", chart
    )
    assert done.returncode == 0, done.stderr
    assert "NOT the paper's protocol" in done.stdout and "\r" not in done.stderr
    result = json.loads(results.read_text())
    assert result["environment"].keys() >= {"command", "date", "commit", "sources", "torch", "device", "settings"}
    assert [(row["model"], row["backend"]) for row in result["rows"]] == [
        (model, backend) for model in PAIR for backend in ("eager", "fused")
    ]
    for row in result["rows"]:
        assert row["status"] == "timed" and len(row["seconds"]) == 2 and row["images_per_second"] > 0
        assert row["error"] <= accuracy.limit(row["eager_error"], torch.float32)
        assert ("over_best_other" in row) == (row["backend"] == "fused")
        assert ("k9_over_k3" in row) == ("k9" in row["model"])
    printed_table = done.stdout.strip().split("\n\n")[-1]
    assert printed_table in results.with_suffix(".md").read_text()
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


class Scaled(torch.nn.Module):
    """A model whose logits are 1 % too large, and that counts its calls."""

    calls = 0

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        Scaled.calls += 1
        return self.model(x) * 1.01


def run_throughput(tmp_path, *arguments: str) -> tuple[int, dict[tuple[str, str], dict]]:
    path = tmp_path / "results.json"
    status = throughput.main([*TINY, *arguments, "--json", str(path)])
    return status, {(row["model"], row["backend"]): row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize("name, status", [("fused", 1), ("channels_last", 0)])
def test_a_wrong_backend_is_reported_and_not_timed(tmp_path, monkeypatch, capsys, name, status):
    monkeypatch.setitem(throughput.BACKENDS, name, throughput.Backend(lambda model, images: Scaled(model)))
    monkeypatch.setattr(Scaled, "calls", 0)
    model = PAIR[0]
    returned, rows = run_throughput(tmp_path, "--models", model, "--backends", "eager", name)
    assert returned == status
    assert rows[model, name]["status"] == "wrong" and "seconds" not in rows[model, name]
    assert Scaled.calls == 1
    assert rows[model, "eager"]["status"] == "timed"
    assert re.search(rf"\| {name} .*wrong: error .*, accepted .*; not timed", capsys.readouterr().out)


def test_what_one_backend_or_model_lacks_does_not_stop_the_rest(tmp_path, monkeypatch, lacking):
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: None)
    model = PAIR[0]
    backends = ["eager", "channels_last", "compile", "fused"]
    status, rows = run_throughput(tmp_path, "--models", "resnet18", model, "--backends", *backends)
    assert status == 0
    for backend in backends:
        row = rows["resnet18", backend]
        assert (row["status"], row["message"]) == ("skipped", "the package timm is not installed")
    messages = {backend: (rows[model, backend]["status"], rows[model, backend]["message"]) for backend in backends}
    assert messages["eager"] == ("timed", "") and messages["fused"][0] == "timed"
    assert messages["channels_last"] == ("skipped", "out of memory")
    assert messages["compile"] == ("failed", "RuntimeError: no compiler")


def forever() -> None:
    """In small steps, whatever they raise; for a minute, should nobody end it."""
    for _ in range(6000):
        with contextlib.suppress(Exception):
            time.sleep(0.01)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(limit, "POLL", 0.01)


def test_a_backend_over_the_limit_is_skipped(monkeypatch, impatient):
    """Whether in preparing or by what its batches would take; the others are timed."""

    def slow(model, images):
        def run(x):
            time.sleep(3)
            return model(x)

        return run

    monkeypatch.setitem(throughput.BACKENDS, "compile", throughput.Backend(lambda model, images: forever()))
    monkeypatch.setitem(throughput.BACKENDS, "channels_last", throughput.Backend(slow))
    args = throughput.parse([*TINY, "--backends", "eager", "channels_last", "compile", "fused", "--limit", "12"])
    rows = throughput.run_model(PAIR[0], args, tqdm(disable=True))
    eager, batches, preparing, ours = rows
    assert (
        (preparing["status"], preparing["over_limit"])
        == (batches["status"], batches["over_limit"])
        == ("skipped", True)
    )
    assert preparing["message"] == "over the limit of 12 s: preparing and checking"
    assert re.fullmatch(
        r"over the limit of 12 s: 5 batches would take [\d.]+ s, by one of [34](\.\d+)? s", batches["message"]
    )
    assert eager["status"] == ours["status"] == "timed" and "over_limit" not in ours
    throughput.summarise(rows)
    assert "over_best_other" in ours and "images_per_second" not in batches


def test_batches_are_projected_from_one():
    def function():
        FakeClock.now += 35.3

    with pytest.raises(limit.Exceeded) as raised:
        limit.project(function, 23, 300, FakeClock)
    assert str(raised.value) == "over the limit of 300 s: 23 batches would take 812 s, by one of 35.3 s"
    limit.project(function, 8, 300, FakeClock)
    limit.project(lambda: pytest.fail("called"), 23, None, FakeClock)


def test_a_limit_ends_with_its_block(impatient):
    before = signal.getsignal(signal.SIGALRM)
    for error in (limit.Exceeded, KeyError):
        with pytest.raises(error), limit.within(0.1 if error is limit.Exceeded else 100):
            if error is KeyError:
                raise KeyError
            forever()
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) is before
    with limit.within(None):
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_a_destructor_swallows_holds_all_the_same(impatient):
    class Slow:
        def __del__(self):
            forever()

    with pytest.raises(limit.Exceeded), limit.within(0.2):
        Slow()
        forever()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list a process's children")
def test_what_a_backend_has_started_is_over_before_the_next_is_timed(impatient):
    """A thread that compiles goes on with the next file when the main thread is stopped."""

    def compile_():
        for _ in range(2):
            subprocess.run(["sleep", "0.7"])

    thread = threading.Thread(target=compile_)
    with pytest.raises(limit.Exceeded), limit.within(1):
        thread.start()
        forever()
    thread.join(0.1)
    assert not thread.is_alive()


def test_openvino_can_be_stopped(monkeypatch, impatient):
    """Its infer() would not return to Python before it is done."""
    calls = []
    request = SimpleNamespace(
        start_async=lambda inputs, share_inputs: calls.append("start"),
        wait_for=lambda milliseconds: time.sleep(milliseconds / 1e3),
        cancel=lambda: calls.append("cancel"),
        wait=lambda: calls.append("wait"),
    )
    openvino = SimpleNamespace(
        convert_model=lambda model, example_input: SimpleNamespace(reshape=lambda shape: None),
        compile_model=lambda *_: SimpleNamespace(create_infer_request=lambda: request),
    )
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    run = runtimes.openvino(torch.nn.Identity(), torch.zeros(1))
    with pytest.raises(limit.Exceeded), limit.within(0.2):
        run(torch.zeros(1))
    assert calls == ["start", "cancel", "wait"]


def test_fused_does_not_apply_to_other_networks(tmp_path):
    pytest.importorskip("timm")
    status, rows = run_throughput(
        tmp_path, "--models", "resnet18", "--backends", "eager", "fused", "--image-size", "32"
    )
    assert status == 0
    assert rows["resnet18", "eager"]["status"] == "timed"
    assert rows["resnet18", "fused"]["message"] == "not applicable: not a ConvMixer"


class Tf32(torch.nn.Module):
    """A model whose float32 results are as coarse as with TF32 where PyTorch may use it, as on a GPU."""

    seen = []

    def __init__(self):
        super().__init__()
        self.model = throughput.plain(convmixer_fast.ConvMixer(16, 2, 3, 2, 10))

    def forward(self, x):
        y = self.model(x)
        if not x.is_meta and not self.training:
            allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            Tf32.seen.append((x.dtype, allowed))
            y = y * 1.001 if x.dtype == torch.float32 and all(allowed) else y
        return y


@pytest.fixture
def tf32(monkeypatch):
    """PyTorch may use TF32 everywhere."""
    monkeypatch.setattr(Tf32, "seen", [])
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = True
    yield
    for library, allowed in zip(libraries, before):
        library.allow_tf32 = allowed


def test_tf32_is_off_for_references_and_comes_back(tf32):
    with accuracy.no_tf32():
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with pytest.raises(KeyError), accuracy.no_tf32():
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_tf32_of_the_peers_is_not_accepted_of_ours(tf32, monkeypatch):
    """Eager PyTorch without TF32 sets what ours may be off by; its peers run, and are judged, by PyTorch's setting."""
    monkeypatch.setitem(throughput.BACKENDS, "fused", throughput.Backend(lambda model, images: model))
    args = throughput.parse([*TINY, "--backends", "eager", "fused"])
    eager, ours = throughput.run_model("convmixer", args, tqdm(disable=True), Tf32)
    assert eager["status"] == "timed" and 0.9e-3 < eager["error"] < 1.1e-3
    assert ours["status"] == "wrong" and eager["eager_error"] < 1e-5
    off, on = (False, False), (True, True)
    assert [allowed for dtype, allowed in Tf32.seen if dtype == torch.float64] == [off]
    timed = [allowed for dtype, allowed in Tf32.seen if dtype == torch.float32]
    assert timed[:2] == [off, on] and set(timed[2:]) == {on} and len(timed) > 4


def test_depthwise_is_checked_without_tf32_and_timed_with_pytorchs_setting(tf32, monkeypatch):
    seen = []

    def convolution(x, weight, vectors):
        seen.append((x.dtype, torch.backends.cudnn.allow_tf32))
        return depthwise.aten(x, weight, vectors)

    monkeypatch.setitem(depthwise.OPERATORS, "aten", (convolution, convolution))
    args = depthwise.parse([*TINY_MAP, "--operators", "aten", "--layouts", "nchw"])
    (row,) = depthwise.run_case((8, 6, 5), 3, None, args, tqdm(disable=True))
    assert row["status"] == "timed"
    assert seen[:3] == [(torch.float64, False), (torch.float32, False), (torch.float32, False)]
    assert {allowed for _, allowed in seen[3:]} == {True} and len(seen) == 3 + timing.WARM_UP + args.rounds


TINY_MAP = ["--device", "cpu", "--maps", "8x24x20", "--batch", "2", "--rounds", "2"]


def test_depthwise_writes_json_and_table(tmp_path):
    results = tmp_path / "results.json"
    done = run_script("depthwise.py", *TINY_MAP, "--kernels", "3", "4", "--json", results)
    assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 2 * 3 * 2  # kernels, operators, layouts
    for row in rows:
        assert row["status"] == "timed" and len(row["seconds"]) == len(row["copy_seconds"]) == 2
        assert row["bytes"] == 2 * 4 * 2 * 8 * 24 * 20
        assert row["flops"] == 2 * 2 * 8 * 24 * 20 * row["kernel"] ** 2
        assert row["of_copy"] > 0 and row["of_fma_peak"] > 0
        assert ("over_aten_nchw" in row) == ("over_aten_channels_last" in row) == (row["operator"] != "aten")
        assert ("over_kernel_3" in row) == (row["kernel"] == 4)
        assert ("over_nchw" in row) == (row["layout"] == "channels_last")
    assert done.stdout.strip().split("\n\n")[-1] in results.with_suffix(".md").read_text()


def test_a_wrong_operator_is_reported_and_not_timed(tmp_path, monkeypatch):
    calls = []

    def shifted(x, weight, vectors):
        calls.append(x)
        return convmixer_fast.depthwise_conv2d(x, weight).roll(1, dims=3)

    definition = depthwise.OPERATORS["ours"][1]
    monkeypatch.setitem(depthwise.OPERATORS, "ours", (shifted, definition))
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: None)  # for good, in this process
    results = tmp_path / "results.json"
    options = ["--kernels", "5", "--layouts", "nchw", "--operators", "aten", "ours"]
    assert depthwise.main([*TINY_MAP, *options, "--json", str(results)]) == 1
    aten, ours = json.loads(results.read_text())["rows"]
    assert aten["status"] == "timed"
    assert ours["status"] == "wrong" and "seconds" not in ours and len(calls) == 1


def test_depthwise_by_cudnn(tmp_path, monkeypatch):
    """The flag is set during a call alone; where it does nothing, the rows say why, and others go on."""
    monkeypatch.setattr(torch.backends.cudnn, "depthwise_kernel", "auto", raising=False)
    seen = []

    def aten(x, weight, vectors):
        seen.append(torch.backends.cudnn.depthwise_kernel)
        return x

    monkeypatch.setattr(depthwise, "aten", aten)
    run, definition = depthwise.OPERATORS["cudnn"]
    run(torch.empty(1), None, None)
    assert seen == ["cudnn"] and torch.backends.cudnn.depthwise_kernel == "auto"
    assert definition is depthwise.convolution
    monkeypatch.setattr(timing, "keep_freed_memory", lambda: None)  # for good, in this process
    results = tmp_path / "results.json"
    options = ["--kernels", "3", "--layouts", "nchw", "--operators", "cudnn", "ours", "--json", str(results)]
    assert depthwise.main([*TINY_MAP, *options]) == 0
    cudnn, ours = json.loads(results.read_text())["rows"]
    assert cudnn["status"] == "skipped" and cudnn["message"].endswith("cuDNN needs a CUDA device, this is cpu")
    assert ours["status"] == "timed"


class TickingClock:
    """Every span takes a second."""

    now = 0

    @classmethod
    def mark(cls) -> int:
        cls.now += 1
        return cls.now

    seconds = staticmethod(lambda start, end: end - start)


def test_overhead_is_a_call_s_share_of_its_round(monkeypatch):
    calls = []
    monkeypatch.setattr(overhead, "calls_to_time", lambda device: {"torch.mm": lambda: calls.append(device)})
    result = overhead.microseconds("cpu", rounds=3, calls=4, clock=TickingClock)
    assert result == {"inference_mode": {"torch.mm": 250_000}, "no_grad": {"torch.mm": 250_000}}
    assert calls == ["cpu"] * 2 * 4 * (timing.WARM_UP + 3)
    result["no_grad"]["ours"] = result["inference_mode"]["ours"] = 500_000
    assert " ".join(overhead.table(result).splitlines()[-1].split()) == "| ours | 500000 | 2 | 500000 | 2 |"


def test_overhead_times_every_operator(capsys):
    assert overhead.main(["--device", "cpu", "--rounds", "1", "--calls", "1"]) == 0
    timed = re.findall(
        r"^\| (operator|function) (\w+)(, out)?", capsys.readouterr().out.replace(", prologue", ""), re.M
    )
    registered = {name.removeprefix("convmixer_fast::") for name in torch._C._dispatch_get_all_op_names()}
    of_layers = {name for name in registered if re.match(r"(depthwise_conv2d|fused_depthwise|activate_pool)", name)}
    assert {name + (".out" if out else "") for kind, name, out in timed if kind == "operator"} == of_layers
    assert {name for kind, name, _ in timed if kind == "function"} == {
        "depthwise_conv2d",
        "fused_depthwise",
        "activate_pool",
    }


def run_gemm(tmp_path, *options: str) -> tuple[int, dict[str, dict]]:
    path = tmp_path / "gemm.json"
    status = gemm.main(["--device", "cpu", "--rounds", "2", "--sizes", "8x6x70", "--json", str(path), *options])
    return status, {row["variant"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gemm_writes_json_and_table(tmp_path, capsys, dtype):
    status, rows = run_gemm(tmp_path, "--dtype", dtype)
    assert status == 0 and list(rows) == ["mm", "padded", "transposed", "cublaslt", "square"]
    assert rows["cublaslt"]["status"] == "skipped"
    assert rows["cublaslt"]["message"].endswith("cuBLASLt needs a CUDA device, this is cpu")
    for name in ("mm", "padded", "transposed", "square"):
        row = rows[name]
        assert row["status"] == "timed" and len(row["seconds"]) == 2
        assert row["flops"] == (2 * gemm.SIDE["cpu"] ** 3 if name == "square" else 2 * 8 * 6 * 70)
        assert row["error"] <= accuracy.limit(row["eager_error"], getattr(torch, dtype))
        assert ("of_ceiling" in row) == (name != "square") and ("over_mm" in row) == (name in ("padded", "transposed"))
    output = capsys.readouterr().out.strip().split("\n\n")[-1]
    assert output in (tmp_path / "gemm.md").read_text() and "not applicable" in output


@pytest.mark.cuda
def test_gemm_on_a_gpu(tmp_path):
    before = torch.backends.cuda.preferred_blas_library()
    status, rows = run_gemm(tmp_path, "--device", "cuda", "--sizes", "64x32x512")
    assert status == 0 and all(row["status"] == "timed" for row in rows.values())
    assert torch.backends.cuda.preferred_blas_library() == before


def test_gemm_ratios():
    common = dict(case="c", status="timed", flops=4e12)
    times = dict(mm=[4.0, 4.0, 9.0], padded=[2.0, 2.0, 2.0], square=[1.0, 1.0, 1.0])
    rows = [common | dict(variant=name, seconds=seconds) for name, seconds in times.items()]
    gemm.summarise(rows)
    mm, padded, square = rows
    assert (mm["teraflops_per_second"], padded["teraflops_per_second"]) == (1, 2)
    assert (mm["of_ceiling"], padded["of_ceiling"], padded["over_mm"]) == (0.25, 0.5, 2)
    assert "over_mm" not in mm and "of_ceiling" not in square


def test_gemm_variants_differ_in_layout_alone(monkeypatch):
    """Each computes the product; where its operands and its result lie is what it is there for."""
    calls = []
    product = torch.mm

    def spy(left, right, *, out):
        calls.append((left.stride(), right.stride(), out.stride()))
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    weight, x = torch.randn(8, 6), torch.randn(6, 70)
    for name in ("mm", "padded", "transposed"):
        torch.testing.assert_close(gemm.VARIANTS[name](weight, x)(), weight @ x)
    pitch = 70 + 64
    assert calls == [((6, 1), (70, 1), (70, 1)), ((6, 1), (pitch, 1), (pitch, 1)), ((6, 1), (1, 6), (8, 1))]


@pytest.mark.parametrize("fails", [False, True])
def test_gemm_by_cublaslt_restores_the_library(monkeypatch, fails):
    preferred = ["cublas"]

    def library(name=None):
        preferred.extend([name] if name else [])
        return preferred[-1]

    def mm(weight, x, out):
        assert library() == "cublaslt"
        if fails:
            raise RuntimeError("no algorithm")
        return out

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", library)
    monkeypatch.setattr(torch, "mm", mm)
    run = gemm.VARIANTS["cublaslt"](torch.randn(8, 6), torch.randn(6, 70))
    if fails:
        with pytest.raises(RuntimeError, match="no algorithm"):
            run()
    else:
        assert run().shape == (8, 70)
    assert preferred == ["cublas", "cublaslt", "cublas"]


def test_a_wrong_product_is_reported_and_not_timed(tmp_path, monkeypatch, capsys):
    calls = []

    def shifted(weight, x):
        def run():
            calls.append(x.shape)
            return (weight @ x).roll(1, dims=1)

        return run

    monkeypatch.setitem(gemm.VARIANTS, "padded", shifted)
    status, rows = run_gemm(tmp_path)
    assert status == 1 and len(calls) == 1
    assert rows["padded"]["status"] == "wrong" and "seconds" not in rows["padded"]
    assert rows["mm"]["status"] == rows["square"]["status"] == "timed"
    assert re.search(r"padded .*wrong: error .*; not timed", capsys.readouterr().out)


def test_fma_peak_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"g\+\+ is needed"):
        depthwise.FmaPeak()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="reads instructions of x86")
@pytest.mark.parametrize(
    "isa, register", [("generic", "xmm"), ("avx2", "ymm"), ("avx512", "zmm"), ("avx512_bf16", "zmm")]
)
def test_every_loop_of_the_peak_has_all_its_chains(tmp_path, monkeypatch, isa, register):
    """The compiler drops a chain whose values it knows, and then fewer operations are done than are counted."""
    if not (shutil.which("g++") and shutil.which("objdump")):
        pytest.skip("needs g++ and objdump")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    command = ["objdump", "-d", "--no-show-raw-insn", depthwise.peak_library(isa)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instruction = re.compile(r"^ *([0-9a-f]+):\s+(\S+) *(.*)", re.M)
    listed = [(int(address, 16), name, operands) for address, name, operands in instruction.findall(code)]
    chains = set()
    for address, name, operands in listed:
        target = int(operands.split()[0], 16) if name.startswith("j") and operands[0] != "*" else address
        body = [operands for at, name, operands in listed if target <= at < address and re.match("vfmadd|mulps", name)]
        if body:
            chains.add(len(body))
            assert all(register in operands for operands in body)
    assert chains == {12}


def test_the_peak_is_that_of_our_instruction_set():
    """And the environment's facts name it, with what it was chosen by."""
    isa = "avx2"
    if not cpu.has(isa):
        pytest.skip("this CPU has no AVX2")
    code = """
import json, depthwise, report, torch
peak = depthwise.FmaPeak()
lanes = peak.flops / (2 * 12 * torch.get_num_threads() * peak.ITERATIONS)
print(json.dumps([lanes, report.environment(torch.device("cpu"))]))
"""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    environment = os.environ | {"PYTHONPATH": folders} | instructions.held_to(isa)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, facts = json.loads(done.stdout)
    assert found == 8 and facts["instruction set"] == isa
    assert dict(setting.split("=") for setting in facts["held by"].split()) == instructions.settings(isa)


def test_instruction_sets_are_those_of_our_kernels():
    """Each with the same settings; one that a library does not know is refused here."""
    source = (ROOT / "csrc" / "cpu" / "dispatch.cpp").read_text()
    assert sorted(instructions.NAMES) == sorted(re.findall(r'\{"(\w+)", k', source)) == sorted(depthwise.PEAK_FLAGS)
    variables = {tuple(sorted(instructions.held_to(isa))) for isa in instructions.NAMES}
    assert len(variables) == 1 and "CMF_CPU_ISA" in variables.pop()
    with pytest.raises(KeyError):
        instructions.held_to("sse9")


def test_what_torch_compile_keeps_is_kept_apart():
    """An instruction set's compiled networks, with weights packed for it, must not run under another one."""
    folders = [instructions.held_to(isa)["TORCHINDUCTOR_CACHE_DIR"] for isa in instructions.NAMES]
    assert len({*folders, os.environ.get("TORCHINDUCTOR_CACHE_DIR")}) == len(folders) + 1
    code = "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    assert held_to_avx2(code).strip() == instructions.held_to("avx2")["TORCHINDUCTOR_CACHE_DIR"]


def test_the_facts_of_an_environment_without_settings(monkeypatch):
    for name in instructions.held_to("generic"):
        monkeypatch.delenv(name, raising=False)
    assert instructions.facts() == {"instruction set": convmixer_fast.build_info()["cpu_isa"]}
    monkeypatch.delitem(sys.modules, "convmixer_fast")
    assert instructions.facts() == {}


def held_to_avx2(code: str, **variables: str) -> str:
    """What a program prints where ours and the peers are held to AVX2. variables: of its environment, in addition."""
    if not cpu.has("avx2"):
        pytest.skip("this CPU has no AVX2")
    environment = os.environ | instructions.held_to("avx2") | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pytorch_is_held_to_an_instruction_set():
    """Its kernels, its oneDNN and the vectors of torch.compile."""
    code = """
import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa
torch.nn.Conv2d(32, 32, 3)(torch.randn(4, 32, 32, 32))
print(torch.backends.cpu.get_cpu_capability(), pick_vec_isa())
"""
    output = held_to_avx2(code, ONEDNN_VERBOSE="1")  # OpenVINO's convolutions fail with that, on two threads
    assert output.splitlines()[-1] == "AVX2 avx2"
    assert "cpu,isa:Intel AVX2\n" in output and "jit:avx2" in output and "avx512" not in output


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_openvino_is_held_to_an_instruction_set(precision):
    """By the kernels in its execution graph; on a wider processor they are AVX-512's."""
    pytest.importorskip("openvino")
    output = held_to_avx2(f"""
import openvino, torch
model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, groups=16), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(1))
x = torch.randn(1, 16, 8, 8)
converted = openvino.convert_model(model, example_input=x)
converted.reshape(list(x.shape))
compiled = openvino.compile_model(converted, "CPU", {{"INFERENCE_PRECISION_HINT": "{precision}"}})
compiled({{0: x.numpy()}})
print([operator.get_rt_info()["primitiveType"].value for operator in compiled.get_runtime_model().get_ordered_ops()])
""")
    kernels = output.splitlines()[-1]
    assert "avx2" in kernels and "avx512" not in kernels


def test_results_that_are_not_finite_are_wrong():
    expected = torch.ones(3, dtype=torch.float64)
    assert accuracy.relative_error(torch.tensor([1.0, 1.0, 0.5]), expected) == 0.5
    for bad in (float("nan"), float("inf")):
        error = accuracy.relative_error(torch.tensor([1.0, bad, 1.0]), expected)
        for eager_error in (0.001, float("inf")):
            assert accuracy.verdict(error, eager_error, torch.float16)["status"] == "wrong"
    with pytest.raises(ValueError, match=r"the result has the shape \(1,\), expected \(3,\)"):
        accuracy.relative_error(torch.ones(1), expected)


def test_table_escapes_and_aligns():
    text = report.table(["name", "figure"], [["a|b", "1.5"], ["c", "120"]])
    assert text.splitlines() == ["| name | figure |", "| ---- | -----: |", "| a\\|b |    1.5 |", "| c    |    120 |"]


def test_source_hash_follows_content_and_ignores_builds(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    source = tmp_path / "csrc" / "kernel.cu"
    source.parent.mkdir()
    source.write_text("a")
    first = report.source_hash()
    (source.parent / "kernel.so").write_text("binary")
    assert report.source_hash() == first
    source.write_text("b")
    assert report.source_hash() != first


def test_commit_is_of_this_tree_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert report.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc")
    assert report.commit() == "abc"


def interrupt_script(name: str, *arguments: object, when: Path) -> tuple[int, str, str]:
    """Runs a benchmark until a file is there, then presses Ctrl-C: (exit status, stdout, stderr)."""
    return press_ctrl_c(start(ROOT / "benchmarks" / name, *arguments, PYTHONPATH=str(ROOT)), when.exists)


def test_ctrl_c_shows_the_finished_models(tmp_path):
    """The second model takes seconds longer, of which most are the rests before its batches."""
    results, chart = tmp_path / "results.json", tmp_path / "chart.png"
    options = [*TINY, "--batches", 50, "--models", *PAIR, "--backends", "eager", "fused"]
    status, output, errors = interrupt_script(
        "throughput.py", *options, "--json", results, "--plot", chart, when=results.with_suffix(".md")
    )
    assert status == 130 and "Traceback" not in errors and "KeyboardInterrupt" not in errors, errors
    result = json.loads(results.read_text())
    assert result["environment"]["incomplete"] == "1 of 2 measured"
    assert [(row["model"], row["status"]) for row in result["rows"]] == 2 * [(PAIR[0], "timed")]
    mark, table = output.strip().split("\n\n")[-2:]
    assert mark == "INCOMPLETE: stopped by Ctrl-C"
    text = results.with_suffix(".md").read_text()
    assert table in text and PAIR[0] in table and PAIR[1] not in table and "* incomplete: 1 of 2 measured\n" in text
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_ctrl_c_shows_the_finished_cases(tmp_path):
    """Those of any benchmark that sweep.py runs. A round takes at least as long as the loop of fused multiply-adds."""
    results = tmp_path / "results.json"
    options = [*TINY_MAP, "--rounds", 20, "--kernels", 3, 4, "--operators", "ours", "--layouts", "nchw"]
    status, output, errors = interrupt_script(
        "depthwise.py", *options, "--json", results, when=results.with_suffix(".md")
    )
    assert status == 130 and "Traceback" not in errors and "KeyboardInterrupt" not in errors, errors
    result = json.loads(results.read_text())
    assert result["environment"]["incomplete"] == "1 of 2 measured"
    assert [(row["kernel"], row["status"]) for row in result["rows"]] == [(3, "timed")]
    mark, table = output.strip().split("\n\n")[-2:]
    assert mark == "INCOMPLETE: stopped by Ctrl-C" and table in results.with_suffix(".md").read_text()


def test_ctrl_c_before_the_first_case(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(gemm, "run_case", interrupted)
    assert report.exit_status(lambda: gemm.main(["--device", "cpu"])) == 130
    assert capsys.readouterr().out.strip().split("\n\n")[-1].startswith("| M x K x N | variant |")


def test_finished_results_are_not_marked(tmp_path):
    status, _ = run_gemm(tmp_path, "--sizes", "8x6x70", "9x6x70")
    assert status == 0 and "incomplete" not in json.loads((tmp_path / "gemm.json").read_text())["environment"]


def test_two_signals_are_one_ctrl_c(tmp_path):
    """As timeout(1) sends them; the second one meets what the first one began. Later, another one ends that, too."""
    code = """
import os, signal, sys, time
import report

def show():
    os.kill(os.getpid(), signal.SIGINT)
    print("shown", flush=True)
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGINT)
    print("not shown")

def main():
    with report.showing(show):
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever a shell's background job has
sys.exit(report.exit_status(main))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "INCOMPLETE: stopped by Ctrl-C\n\nshown\n", "")


def test_cpu_table_of_the_rows_before_ctrl_c(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "MODELS", {PAIR[0]: ((2, 1), 1)})
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: 1)
    measure = cpu.Row.measure

    def interrupted_at_the_second(row, out, *arguments):
        if row.batch == 1:
            raise KeyboardInterrupt
        return measure(row, out, *arguments)

    monkeypatch.setattr(cpu.Row, "measure", interrupted_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        cpu.main(["--models", PAIR[0], "--backends", "fused", "--out", str(tmp_path)])
    mark, table = capsys.readouterr().out.strip().split("\n\n")
    assert mark == "INCOMPLETE: stopped by Ctrl-C"
    assert [line.split()[1:4] for line in table.splitlines()[2:]] == [[PAIR[0], "|", "2"]]


def cpu_results(out: Path, dtype: str, threads: int, **rates: float | None) -> None:
    """Writes a row's file; None: over the limit."""
    rows = [
        dict(model=PAIR[0], backend=backend, batch=2, flops_per_image=1, message="", error=1e-6)
        | (dict(status="timed", seconds=[2 / rate]) if rate else dict(status="skipped", over_limit=True))
        for backend, rate in rates.items()
    ]
    throughput.summarise(rows)
    report.write_results(cpu.Row(PAIR[0], 2, dtype, 1).file(out, threads), dict(rows=rows), "")


@pytest.mark.parametrize("isa", [None, "avx2"])
def test_cpu_table_of_backends_over_the_limit(tmp_path, monkeypatch, isa):
    monkeypatch.setattr(cpu, "MODELS", {PAIR[0]: ((2,), 1)})
    cpu_results(tmp_path, "float32", 2, eager=10, onnxruntime=20, fused=30)
    cpu_results(tmp_path, "bfloat16", 2, eager=None, channels_last=5, fused=45)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in cpu.summary(tmp_path, 2, isa).splitlines()]
    float32, bfloat16 = [dict(zip(lines[0], line)) for line in lines[2:4]]
    assert (bfloat16["eager"], bfloat16["channels_last"], bfloat16["compile"]) == ("> limit", "5", "")
    assert (float32["x best other"], bfloat16["x best other"]) == ("1.5", "9")
    assert (float32["x own float32"], bfloat16["x own float32"]) == ("", "1.5")
    assert float32["onnxruntime *" if isa else "onnxruntime"] == "20"
    text = cpu.summary(tmp_path, 2, isa)
    assert text.count("Held to avx2; *: has no setting for that") == (1 if isa else 0)
    assert text.splitlines()[-1] == f"geometric mean of x best other: {(1.5 * 9) ** 0.5:.2f}"
    assert text.splitlines()[1].split("|")[4].endswith("-: "), "a column of figures, to the right"


def test_cpu_rows_are_held_to_an_instruction_set(tmp_path, monkeypatch, capsys):
    """And to a limit of time; their results are a device's of their own."""
    monkeypatch.setattr(cpu, "MODELS", {PAIR[0]: ((1,), 1)})
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(cpu, "has", lambda isa: isa == "avx2")
    run, children = subprocess.run, []

    def child(command, **settings):
        children.append((command, settings["env"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", child)
    device = report.results_folder(report.cpu_name())
    for options, folder in ((["--isa", "avx2", "--limit", "7"], f"{device}-avx2"), ([], str(device))):
        children.clear()
        assert cpu.main(["--backends", "fused", *options]) == 0
        assert (Path(folder) / "cpu.md").exists()
        for command, environment in children:
            limited = command[command.index("--limit") + 1]
            results = tmp_path / command[command.index("--json") + 1]
            assert limited == ("7" if options else "300") and results.parent == Path(folder) / "cpu"
            if options:
                assert environment.items() >= (instructions.held_to("avx2") | {"OMP_NUM_THREADS": "1"}).items()
            else:
                assert {name: environment.get(name) for name in instructions.held_to("avx2")} == {
                    name: os.environ.get(name) for name in instructions.held_to("avx2")
                }
        assert len(children) == 2
    with pytest.raises(SystemExit):
        cpu.main(["--isa", "avx512"])
    assert "argument --isa: this CPU has no avx512" in capsys.readouterr().err
    monkeypatch.setattr(subprocess, "run", run)


def test_instruction_sets_of_this_cpu():
    assert cpu.has("generic") and not cpu.has("sse9")


@pytest.mark.slow
def test_cpu_table(tmp_path, monkeypatch, capsys):
    """Every row in a process of its own, at all threads and at one; a table of what is there."""
    monkeypatch.setattr(cpu, "MODELS", {PAIR[0]: ((2, 1), 1)})
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: 2)
    assert cpu.main(["--models", PAIR[0], "--backends", "eager", "fused", "--out", str(tmp_path)]) == 0
    names = sorted(path.stem.removeprefix(PAIR[0] + "-") for path in (tmp_path / "cpu").glob("*.json"))
    both = [f"batch{batch}-{dtype}-2threads" for batch in (1, 2) for dtype in ("bfloat16", "float32")]
    assert names == sorted(both + ["batch2-bfloat16-1threads", "batch2-float32-1threads"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    header = next(line for line in lines if "x one core" in line)
    table = [dict(zip(header, line)) for line in lines if line and line[0] == PAIR[0] and len(line) == len(header)]
    assert [(row["batch"], row["dtype"]) for row in table] == [
        (str(batch), dtype) for dtype in ("float32", "bfloat16") for batch in (2, 1)
    ]
    for row in table:
        assert float(row["x best other"]) == pytest.approx(float(row["fused"]) / float(row["eager"]), rel=0.02)
        assert not row["openvino"] and bool(row["of FMA peak"]) == (row["dtype"] == "float32")
        assert bool(row["x one core"]) == (row["batch"] == "2") and float(row["error"]) > 0
    text = (tmp_path / "cpu.md").read_text()
    mean = statistics.geometric_mean(row.results(tmp_path, 2)["fused"]["over_best_other"] for row in cpu.rows())
    assert re.search(r"geometric mean of x best other: ([\d.]+)", text)[1] == f"{mean:.2f}"
