"""The benchmarks: what they write, what they refuse to time, and their arithmetic. What they measure is not tested."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import accuracy  # noqa: E402
import breakdown  # noqa: E402
import cpu  # noqa: E402
import depthwise  # noqa: E402
import gpu  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import runtimes  # noqa: E402
import throughput  # noqa: E402
import timing  # noqa: E402

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


def test_throughput_ratios():
    common = dict(batch=10, status="timed", flops_per_image=10**9)
    rows = [
        dict(model=f"k{k}", backend=backend, seconds=seconds, **common, sizes=[256, 8, 2, k])
        for k, backend, seconds in [
            (9, "eager", [9.0, 2.0, 2.0]),  # 5 images a second
            (9, "compile", [1.0, 1.0, 1.0]),  # 10
            (9, "fused", [0.25, 0.25, 8.0]),  # 40
            (3, "eager", [0.5, 0.5, 0.5]),  # 20
            (3, "fused", [0.2, 0.2, 0.2]),  # 50
        ]
    ]
    rows.append(dict(model="k3", backend="compile", batch=10, status="wrong", message="wrong"))
    throughput.summarise(rows)
    figures = {(row["model"], row["backend"]): row for row in rows}
    assert figures["k9", "eager"]["images_per_second"] == 5
    assert figures["k9", "fused"]["teraflops_per_second"] == pytest.approx(0.04)
    assert figures["k9", "fused"]["over_best_other"] == 4
    assert figures["k3", "fused"]["over_best_other"] == 2.5
    assert figures["k9", "fused"]["k9_over_k3"] == pytest.approx(0.8)
    assert figures["k9", "eager"]["k9_over_k3"] == 0.25
    assert "k9_over_k3" not in figures["k9", "compile"] and "over_best_other" not in figures["k9", "compile"]


def test_breakdown_names_every_part(tmp_path, capsys):
    status, rows = run_throughput(tmp_path, "--models", PAIR[0], "--backends", "fused", "--breakdown")
    assert status == 0
    found = rows[PAIR[0], "fused"]["breakdown"]
    assert [part["name"] for part in found["parts"]] == [*breakdown.PARTS, "rest"]
    assert sum(part["seconds"] for part in found["parts"]) == pytest.approx(found["total_seconds"])
    assert all(part["seconds"] > 0 and part["floor_seconds"] > 0 for part in found["parts"][:-1])
    assert min(found["ceilings"].values()) > 0
    model = convmixer_fast.create_model(PAIR[0])
    products = sum(part["flops"] for part in found["parts"] if part["name"] != "pool + head")
    head = 2 * model.dim * model.n_classes
    assert products == 2 * (throughput.flops_per_image(model, 8) - head)
    assert "pool + head" in capsys.readouterr().out
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
    arguments = ["--models", PAIR[0], "--backends", "fused", "--breakdown", "--device", "cuda", "--image-size", "64"]
    status, rows = run_throughput(tmp_path, *arguments)
    assert status == 0
    parts = {part["name"]: part["seconds"] for part in rows[PAIR[0], "fused"]["breakdown"]["parts"]}
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


def test_fused_does_not_apply_to_other_networks(tmp_path):
    pytest.importorskip("timm")
    status, rows = run_throughput(
        tmp_path, "--models", "resnet18", "--backends", "eager", "fused", "--image-size", "32"
    )
    assert status == 0
    assert rows["resnet18", "eager"]["status"] == "timed"
    assert rows["resnet18", "fused"]["message"] == "not applicable: not a ConvMixer"


TINY_MAP = ["--device", "cpu", "--maps", "32x48x40", "--batch", "2", "--rounds", "2"]


def test_depthwise_writes_json_and_table(tmp_path):
    results = tmp_path / "results.json"
    done = run_script("depthwise.py", *TINY_MAP, "--kernels", "3", "4", "--json", results)
    assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 2 * 3 * 2  # kernels, operators, layouts
    for row in rows:
        assert row["status"] == "timed" and len(row["seconds"]) == len(row["copy_seconds"]) == 2
        assert row["bytes"] == 2 * 4 * 2 * 32 * 48 * 40
        assert row["flops"] == 2 * 2 * 32 * 48 * 40 * row["kernel"] ** 2
        assert row["of_copy"] > 0 and row["of_fma_peak"] > 0
        assert ("over_aten_nchw" in row) == ("over_aten_channels_last" in row) == (row["operator"] != "aten")
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


def test_fma_peak_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"g\+\+ is needed"):
        depthwise.FmaPeak()


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


def test_gpu_run_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        gpu.main([])
    assert exit_.value.code == 2 and "this command needs a GPU" in capsys.readouterr().err


def test_gpu_plan_fits_its_time(tmp_path):
    steps = gpu.plan(tmp_path, (9, 0))
    names = [step.name for step in steps]
    inference, training = ["throughput", "engine", "latency", "depthwise"], ["gradients", "training"]
    late = ["compiled", "peers", "training-compiled", "memcheck", "racecheck", "paper"]
    assert names == ["build", "tests", *inference, *training, *late]
    assert set(gpu.BENCHMARKS) <= set(names)
    assert steps[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert gpu.plan(tmp_path, (8, 9))[0].environment["TORCH_CUDA_ARCH_LIST"] == "8.9"
    assert sum(gpu.limits(steps, 9 * 60)) <= 9 * 60
    assert sum(gpu.limits(steps, 60)) == pytest.approx(60)
    longer = gpu.plan(tmp_path, (9, 0), seconds=20 * 60)  # all of it for the paper's tables and figures
    assert sum(step.seconds for step in longer) == pytest.approx(20 * 60)
    minutes = float(longer[-1].command[longer[-1].command.index("--minutes") + 1])
    assert 0.8 * longer[-1].seconds < 60 * minutes < longer[-1].seconds - 15


def python_step(name: str, code: str, seconds: float = 20, **options) -> gpu.Step:
    return gpu.Step(name, [sys.executable, "-c", code], seconds, **options)


def statuses(out: Path) -> dict[str, str]:
    return {step["step"]: step["status"] for step in json.loads((out / "results.json").read_text())["steps"]}


def test_gpu_plan_of_some_steps(tmp_path):
    names = [step.name for step in gpu.plan(tmp_path, (9, 0), 600, ["engine", "paper"])]
    assert names == ["build", "engine", "paper"]
    assert [step.name for step in gpu.plan(tmp_path, (9, 0), 600, ["tests"])] == ["build", "tests"]


def test_gpu_run_of_some_steps_keeps_the_others(tmp_path):
    for name in ("engine", "depthwise"):
        (tmp_path / f"{name}.md").write_text(f"table of {name}")
    assert gpu.run([gpu.Step("engine", ["true"], 1)], tmp_path, {"device": "D"}, total=20) == 0
    text = (tmp_path / "README.md").read_text()
    assert "table of depthwise" in text and "table of engine" not in text


def test_gpu_run_reports_every_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "GRACE", 1)
    stale = tmp_path / "throughput.json"
    stale.write_text("of an earlier run")
    steps = [
        python_step("throughput", f"open({str(tmp_path / 'throughput.md')!r}, 'w').write('| figures |')"),
        python_step("failing", "print('the reason'); raise SystemExit(3)"),
        python_step("absent", "", missing="its program is not on PATH"),
        python_step("slow", "import time; time.sleep(60)", 0.5),
        python_step("needed", "raise SystemExit(1)", needed=True),
        python_step("after", ""),
    ]
    assert gpu.run(steps[:1], tmp_path / "good", {"device": "D"}, total=20) == 0
    assert gpu.run(steps[:3], tmp_path, {"device": "D"}, total=60) == 1
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# D\n\n* device: D") and "| figures |" in readme
    assert not stale.exists()
    assert statuses(tmp_path) == {"throughput": "passed", "failing": "failed", "absent": "skipped"}
    assert "the reason" in capsys.readouterr().out
    assert gpu.run(steps[3:], tmp_path, {"device": "D"}, total=42) == 1
    assert statuses(tmp_path) == {"slow": "out of time", "needed": "failed", "after": "not run"}


def test_gpu_run_writes_what_it_has_when_stopped(tmp_path):
    started = tmp_path / "started"
    script = tmp_path / "stopped.py"
    script.write_text(
        f"""
import sys
sys.path.append({str(ROOT / "benchmarks")!r})
from pathlib import Path
import gpu
steps = [
    gpu.Step("first", [sys.executable, "-c", ""], 20),
    gpu.Step("second", ["sh", "-c", "sleep 300 & echo $! > {started}.new && mv {started}.new {started}; wait"], 20),
    gpu.Step("third", [sys.executable, "-c", ""], 20),
]
sys.exit(gpu.run(steps, Path({str(tmp_path / "out")!r}), {{"device": "D"}}, 60))
"""
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        grandchild = int(started.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
    finally:
        process.kill()
    assert statuses(tmp_path / "out") == {"first": "passed", "second": "stopped", "third": "not run"}
    assert "stopped" in (tmp_path / "out" / "README.md").read_text()
    state = Path(f"/proc/{grandchild}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


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
    mean = statistics.geometric_mean(float(row["x best other"]) for row in table)
    assert float(re.search(r"geometric mean of x best other: ([\d.]+)", text)[1]) == pytest.approx(mean, abs=0.02)
