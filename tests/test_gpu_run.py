"""`make gpu`: its plan, how steps are supervised and judged, which libraries it takes, and its rehearsal on the CPU."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import counters  # noqa: E402
import gpu  # noqa: E402
import gpu_steps  # noqa: E402
import launches  # noqa: E402
import rehearsal  # noqa: E402
import supervisor  # noqa: E402
from supervisor import Step  # noqa: E402

import convmixer_fast  # noqa: E402

# ------------------------------------------------------------------------------------------------ the plan


def test_plan_of_the_parts(tmp_path):
    parts = {part: [step.name for step in steps] for part, steps in gpu_steps.parts(tmp_path).items()}
    assert parts["first"] == ["kernels", "diagnosis", "networks", "networks-compiled", "tests-forward"]
    checks = ["tests-backward", "tests-engine", "memcheck", "racecheck"]
    assert parts["second"][:5] == ["counters", *checks] and parts["third"][-1] == "paper"
    names = list(itertools.chain(*parts.values()))
    assert len(set(names)) == len(names)
    for part, expected in parts.items():
        assert [step.name for step in gpu_steps.plan(tmp_path, [part])] == expected
    assert [step.name for step in gpu_steps.plan(tmp_path)] == names
    assert [step.name for step in gpu_steps.plan(tmp_path, ["paper", "gemm", "kernels"])] == [
        "kernels",
        "gemm",
        "paper",
    ]
    with pytest.raises(ValueError, match="kernel, accepted: first, second, third, kernels, "):
        gpu_steps.plan(tmp_path, ["kernel"])


def test_first_part_fits_five_minutes_and_three_quarters(tmp_path):
    """Whatever the kernels turn out to be; and both parts fit 15 minutes with a minute for the start of each."""
    seconds = [gpu_steps.seconds_for(gpu_steps.plan(tmp_path, [part])) for part in ("first", "second")]
    assert seconds[0] <= 5.75 * 60 and sum(seconds) <= 13 * 60
    first = {step.name: step for step in gpu_steps.plan(tmp_path, ["first"])}
    replaced = [step for step in first.values() if step.needs == "kernels"]
    assert [step.name for step in replaced] == ["networks", "networks-compiled"]
    assert first["diagnosis"].in_place_of == "kernels"
    assert first["diagnosis"].seconds <= sum(step.seconds for step in replaced)


def test_the_papers_tables_get_the_time_that_is_left(tmp_path):
    steps = gpu_steps.plan(tmp_path, ["third"], 60 * 60)
    assert gpu_steps.seconds_for(steps) == pytest.approx(60 * 60)
    command = steps[-1].command
    minutes = float(command[command.index("--minutes") + 1])
    assert 0.8 * steps[-1].seconds < 60 * minutes < steps[-1].seconds - 15


def test_steps_run_together_are_not_timed(tmp_path):
    grouped = [step for step in gpu_steps.plan(tmp_path) if step.group]
    assert grouped and not any("--json" in step.command for step in grouped)
    assert all(step.tests for step in grouped)


def test_latency_steps_wait_for_an_idle_gpu(tmp_path):
    with_it = [step.name for step in gpu_steps.plan(tmp_path) if "--latency" in step.command]
    assert with_it == ["latency-1", "latency-8"]


@pytest.mark.parametrize("capability, target", [((9, 0), "9.0a"), ((8, 9), "8.9"), ((12, 0), "12.0")])
def test_build_is_for_one_gpu(capability, target):
    step = gpu_steps.build(capability)
    assert step.environment["TORCH_CUDA_ARCH_LIST"] == target and step.required


# ------------------------------------------------------------------------------------------------ libraries


def test_libraries_are_taken_only_if_they_fit():
    fits = dict(cuda_missing=None, cuda_targets=["sm_80", "sm_90a"])
    assert gpu.unfit(fits, (9, 0)) == ""
    assert gpu.unfit(fits, (8, 0)) == ""
    assert gpu.unfit(fits, (8, 9)) == "the kernels are for sm_80, sm_90a, not for sm_89"
    assert gpu.unfit(fits | dict(cuda_missing="no driver"), (9, 0)) == "no driver"


def test_libraries_are_asked_in_a_process_of_their_own(tmp_path, monkeypatch):
    package = tmp_path / "convmixer_fast"
    package.mkdir()
    monkeypatch.setattr(gpu.report, "ROOT", tmp_path)
    (package / "__init__.py").write_text("raise ImportError('_C.so is not built')")
    assert gpu.unusable((9, 0)) == "they do not load: ImportError: _C.so is not built"
    (package / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert gpu.unusable((9, 0)) == "they do not load: exit -11"


def test_fingerprint_is_of_what_is_compiled(tmp_path):
    for name in ("setup.py", "tools/find_cuda.py", "csrc/cuda/kernel.cu", "csrc/params.h", "convmixer_fast/ops.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    seen = {gpu.fingerprint(tmp_path)}
    (tmp_path / "csrc" / "__pycache__").mkdir()
    (tmp_path / "csrc" / "__pycache__" / "fingerprint.pyc").write_text("")
    (tmp_path / "convmixer_fast" / "ops.py").write_text("changed")
    assert gpu.fingerprint(tmp_path) in seen
    changes = [("setup.py", "flags"), ("tools/find_cuda.py", "order")]
    changes += [("csrc/params.h", "fields"), ("csrc/cuda/other.cu", "kernel")]
    for name, text in changes:
        (tmp_path / name).write_text(text)
        seen.add(gpu.fingerprint(tmp_path))
    (tmp_path / "csrc" / "cuda" / "other.cu").rename(tmp_path / "csrc" / "cuda" / "renamed.cu")
    seen.add(gpu.fingerprint(tmp_path))
    assert len(seen) == 6


def test_libraries_here_are_of_these_sources():
    assert convmixer_fast.build_info()["sources"] == gpu.fingerprint()


def test_a_run_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in [
        ([], "this command needs a GPU"),
        (["--steps", "fist"], "argument --steps: fist, accepted"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            gpu.main(arguments)
        assert exit_.value.code == 2 and message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ supervision

FACTS = {"device": "D"}


def python_step(name: str, code: str, seconds: float = 30, **options) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds, **options)


def statuses(out: Path) -> dict[str, str]:
    return {step["step"]: step["status"] for step in json.loads((out / "results.json").read_text())["steps"]}


def remarks(out: Path) -> dict[str, str]:
    return {step["step"]: step.get("remark", "") for step in json.loads((out / "results.json").read_text())["steps"]}


def test_every_step_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "GRACE", 1)
    stale = tmp_path / "throughput.json"
    stale.write_text("of an earlier run")
    steps = [
        python_step("throughput", f"open({str(tmp_path / 'throughput.md')!r}, 'w').write('| figures |')"),
        python_step("failing", "print('the reason'); raise SystemExit(3)"),
        python_step("absent", "", missing="its program is not on PATH"),
        python_step("slow", "import time; time.sleep(60)", 0.5),
        python_step("required", "raise SystemExit(1)", required=True),
        python_step("after", ""),
    ]
    assert supervisor.run(steps[:1], tmp_path / "good", FACTS, total=20) == 0
    assert supervisor.run(steps[:3], tmp_path, FACTS, total=60) == 1
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# D\n\n* device: D") and "| figures |" in readme
    assert not stale.exists()
    assert statuses(tmp_path) == {"throughput": "passed", "failing": "failed", "absent": "skipped"}
    assert "the reason" in capsys.readouterr().out
    assert supervisor.run(steps[3:], tmp_path / "late", FACTS, total=42) == 1
    assert statuses(tmp_path / "late") == {"slow": "out of time", "required": "failed", "after": "not run"}


def test_steps_that_were_not_asked_for_keep_their_results(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps(dict(steps=[dict(step="maps", status="passed", remark="before")]))
    )
    for name in ("networks", "maps"):
        (tmp_path / f"{name}.md").write_text(f"table of {name}")
    assert supervisor.run([Step("networks", ["true"], 1)], tmp_path, FACTS, total=20) == 0
    text = (tmp_path / "README.md").read_text()
    assert "table of maps" in text and "table of networks" not in text
    assert statuses(tmp_path) == {"networks": "passed", "maps": "passed"} and remarks(tmp_path)["maps"] == "before"


def test_limits_are_the_steps_own_and_nothing_starts_without_time(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE", 1)
    monkeypatch.setattr(supervisor, "SHORTEST", 3)
    steps = [
        python_step("first", "import time; time.sleep(1)", 100),  # its limit exceeds what there is, and it may run
        python_step("endless", "import time; time.sleep(100)", 100),
        python_step("late", "", 100),
    ]
    begun = time.monotonic()
    assert supervisor.run(steps, tmp_path, FACTS, total=6) == 1
    assert time.monotonic() - begun < 9
    assert statuses(tmp_path) == {"first": "passed", "endless": "out of time", "late": "not run"}
    assert remarks(tmp_path)["late"] == "no time left"
    steps = [python_step("first", "import time; time.sleep(3)", 100), *steps[2:]]
    assert supervisor.run(steps, tmp_path / "short", FACTS, total=6) == 0  # two seconds are left, and three are needed
    assert statuses(tmp_path / "short") == {"first": "passed", "late": "not run"}


def test_steps_of_a_group_run_at_the_same_time(tmp_path, monkeypatch):
    """Each ends the other's wait; and each has its own limit and its own verdict."""
    monkeypatch.setattr(supervisor, "GRACE", 1)
    wait = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    steps = [
        python_step("left", wait.format(a, b), group="both"),
        python_step("right", wait.format(b, a), group="both"),
        python_step("hanging", "import time; time.sleep(60)", 2, group="both"),
        python_step("failing", "raise SystemExit(4)", group="both"),
    ]
    assert supervisor.run(steps, tmp_path / "out", FACTS, total=40) == 1
    expected = {"left": "passed", "right": "passed", "hanging": "out of time", "failing": "failed"}
    assert statuses(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "status, expected", [(0, ["passed", "skipped", "passed"]), (1, ["failed", "passed", "skipped"])]
)
def test_a_diagnosis_takes_the_place_of_the_networks(tmp_path, status, expected):
    steps = [
        python_step("kernels", f"raise SystemExit({status})"),
        python_step("diagnosis", "", in_place_of="kernels"),
        python_step("networks", "", needs="kernels"),
    ]
    assert supervisor.run(steps, tmp_path, FACTS, total=60) == status
    assert list(statuses(tmp_path).values()) == expected
    # Asked for by name, without the kernels, both have nothing to wait for.
    assert supervisor.run(steps[2:], tmp_path / "alone", FACTS, total=60) == 0
    assert statuses(tmp_path / "alone") == {"networks": "passed"}


@pytest.mark.parametrize(
    "tests, status, remark",
    [
        ("def test_a(): pass", "passed", "1 tests ran, 0 failed, 0 skipped"),
        ("def test_a(): assert 0\ndef test_b(): pass", "failed", "2 tests ran, 1 failed, 0 skipped; exit 1"),
        ("def test_a(): pytest.skip('no GPU')", "failed", "no test ran, 1 skipped"),
        ("def test_a(): pytest.skip('no GPU')\ndef test_b(): pass", "passed", "1 tests ran, 0 failed, 1 skipped"),
        ("", "failed", "no test ran, 0 skipped"),
        ("import os; os._exit(0)", "failed", "exit 0, and no report of its tests"),
    ],
)
def test_nothing_skipped_counts_as_passed(tmp_path, tests, status, remark):
    file, results = tmp_path / "test_it.py", tmp_path / "logs" / "it.xml"
    file.write_text(f"import pytest\n{tests}\n")
    results.parent.mkdir()
    results.write_text("<testsuite tests='3' failures='0' errors='0' skipped='0'/>")  # of an earlier run
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"--junitxml={results}",
        f"--rootdir={tmp_path}",
    ]
    assert supervisor.run([Step("it", [*command, str(file)], 60, tests=results)], tmp_path, FACTS, 90) == (
        status == "failed"
    )
    assert statuses(tmp_path) == {"it": status} and remarks(tmp_path) == {"it": remark}


def test_archive_after_each_step(tmp_path):
    """One file with everything so far; a later step finds there what an earlier one left."""
    archive, out = tmp_path / "sent" / "results.tar.gz", tmp_path / "out"
    first = f"print('of the log'); open({str(out / 'kernels.md')!r}, 'w').write('| figures |')"
    second = f"""
import tarfile
names = tarfile.open({str(archive)!r}).getnames()
assert {{'out/README.md', 'out/results.json', 'out/kernels.md', 'out/logs/kernels.log'}} <= set(names), names
"""
    steps = [python_step("kernels", first), python_step("looking", second)]
    assert supervisor.run(steps, out, FACTS, 60, archive) == 0
    with tarfile.open(archive) as tar:
        readme = tar.extractfile("out/README.md").read().decode()
    assert "| figures |" in readme and re.search(r"looking +\| passed", readme)


def test_output_is_short_and_ends_with_the_most_telling(tmp_path, capsys):
    """Ten thousand characters at most, whatever the steps wrote; tables without facts, rules and alignment."""
    steps = []
    for i in range(12):
        rows = "\\n".join(f"| {name:20} | {i}.{row:03} |" for row in range(90) for name in ("eager", "ours"))
        text = f"* fact: {'x' * 100}\\n\\n| name | ms |\\n| ---- | --: |\\n{rows}"
        code = f"open({str(tmp_path / f'step{i}.md')!r}, 'w').write({text!r}.replace('\\\\n', chr(10)))"
        steps.append(python_step(f"step{i}", code))
    steps.append(python_step("failing", "print('y' * 5000); raise SystemExit(1)"))
    assert supervisor.run(steps, tmp_path, FACTS, 200) == 1
    output = capsys.readouterr().out
    assert len(output) <= supervisor.OUTPUT_LIMIT
    assert "|eager|0.089|" in output and "fact" not in output and "---:" not in output
    assert output.index("--- step1 ---") < output.index("--- step0 ---") < output.index("|failing|failed|")
    assert "more parts are in the folder" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_results_are_written_when_the_run_is_stopped(tmp_path, number):
    started = tmp_path / "started"
    script = tmp_path / "stopped.py"
    script.write_text(
        f"""
import sys
sys.path.append({str(ROOT / "benchmarks")!r})
from pathlib import Path
from supervisor import Step, run
steps = [
    Step("first", [sys.executable, "-c", ""], 30),
    Step("second", ["sh", "-c", "sleep 300 & echo $! > {started}.new && mv {started}.new {started}; wait"], 30),
    Step("third", [sys.executable, "-c", ""], 30),
]
sys.exit(run(steps, Path({str(tmp_path / "out")!r}), {{"device": "D"}}, 90, Path({str(tmp_path / "out.tar.gz")!r})))
"""
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        grandchild = int(started.read_text())
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    finally:
        process.kill()
    assert statuses(tmp_path / "out") == {"first": "passed", "second": "stopped", "third": "not run"}
    assert "stopped" in (tmp_path / "out" / "README.md").read_text() and (tmp_path / "out.tar.gz").exists()
    state = Path(f"/proc/{grandchild}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_clocks_are_those_of_a_busy_gpu(tmp_path, monkeypatch):
    """nvidia-smi's lines: SM clock, memory clock, utilisation, ...; a field may be missing on some GPUs."""
    program = tmp_path / "nvidia-smi"
    lines = ["345, 2619, 0, 70, 30", "1755, 2619, 98, 600, 50", "1980, 2619, 97, 600, 50", "1755, 2619, [N/A], 1, 1"]
    program.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines)]) + "\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    begun = time.monotonic()
    clocks = supervisor.Clocks(tmp_path / "clocks.csv")
    clocks._reader.join(30)
    clocks.stop()
    assert clocks.between(begun, time.monotonic()) == (1755 + 1980) / 2
    assert clocks.between(begun - 2, begun - 1) is None
    logged = (tmp_path / "clocks.csv").read_text().splitlines()
    assert logged[0].startswith("seconds,clocks.sm") and len(logged) == 1 + len(lines)


# ------------------------------------------------------------------------------------------------ counters


def raw_page(metrics: dict[str, tuple[str, list[str]]], kernels: list[str]) -> str:
    names = ["ID", "Kernel Name", *metrics]
    units = ["", "", *(unit for unit, _ in metrics.values())]
    rows = [[str(i), kernel, *(values[i] for _, values in metrics.values())] for i, kernel in enumerate(kernels)]
    lines = [",".join(f'"{cell}"' for cell in row) for row in (names, units, *rows)]
    return "\n".join(["==PROF== Connected to process 1", *lines, "==PROF== Disconnected"])


def kernel_names(extra: str) -> list[str]:
    """As the launches give them; the gradient of the weight launches a second, smaller kernel."""
    names = [f"void convmixer_fast::cuda::{launch.kernel}<a, b>(Params)" for launch in launches.LAUNCHES]
    return [*names[:5], extra, *names[5:]]


def test_counters_of_a_page():
    kernels = kernel_names("void convmixer_fast::cuda::depthwise_wgrad_reduce_kernel<half>(Params)")
    planes = 2 * 3
    necessary = 2 * planes * 32 * 32 * 2
    page = raw_page(
        {
            "gpu__time_duration.sum": ("ns", ["2,000", *["1"] * 6]),
            "smsp__cycles_elapsed.max": ("cycle", ["3,510", *["1"] * 6]),
            "smsp__inst_executed.sum": ("inst", [f"{planes * 1104:,}", *["60"] * 6]),
            "dram__bytes_read.sum": ("Kbyte", [f"{necessary / 2000}", *["1"] * 6]),
            "dram__bytes_write.sum": ("byte", [f"{necessary / 2 * 1.04}", *["1"] * 6]),
            "launch__shared_mem_config_size": ("byte", ["233472", *["1"] * 6]),
            counters.STALLED.format("wait"): ("", ["0.75", *["0"] * 6]),
            counters.STALLED.format("barrier"): ("", ["n/a", *["0"] * 6]),
        },
        kernels,
    )
    rows = counters.summarise(counters.read(page), batch=2, channels=3)
    assert [row["launch"] for row in rows] == [launch.name for launch in launches.LAUNCHES]
    first, pool = rows[0], rows[-1]
    assert first["gigahertz"] == pytest.approx(1.755) and first["time"] == pytest.approx(2e-6)
    assert first["instructions_per_plane"] == 1104 and first["smem_configured"] == 228 * 1024
    assert first["dram_over_necessary"] == pytest.approx(1.02)
    assert first["stalls"] == {"wait": 0.75} and first["issue_active"] is None
    assert "activate_pool_kernel" in pool["kernel"] and pool["necessary_bytes"] == necessary / 2
    text = counters.table(rows)
    assert "1104" in text and "wait 0.75" in text


def test_counters_of_other_kernels_are_refused():
    page = raw_page({"smsp__inst_executed.sum": ("inst", ["1"])}, ["void convmixer_fast::cuda::other_kernel<int>(int)"])
    with pytest.raises(
        ValueError, match="no depthwise_mma_kernel of 'fused k=9' among the kernels that ncu saw: .*other"
    ):
        counters.summarise(counters.read(page), 1, 1)
    with pytest.raises(ValueError, match="ncu saw: none"):
        counters.summarise(counters.read("==ERROR== no permission"), 1, 1)


def test_counters_go_on_without_metrics_that_ncu_does_not_know(tmp_path, monkeypatch, capfd):
    """The stand-in refuses a metric as ncu does; its sections are still counted."""
    monkeypatch.setitem(counters.METRICS, "time", "gpu__time_of_another_name.sum")
    with rehearsal.stand_ins(tmp_path):
        status = counters.main([*gpu_steps.TINY_LAUNCHES, "--json", str(tmp_path / "counters.json")])
    assert status == 0
    assert "unknown: gpu__time_of_another_name.sum" in capfd.readouterr().err
    rows = json.loads((tmp_path / "counters.json").read_text())["rows"]
    assert len(rows) == len(launches.LAUNCHES) and rows[0]["time"] is None


# ------------------------------------------------------------------------------------------------ rehearsal


@pytest.mark.parametrize(
    "command, message",
    [
        (["ncu", "--clock-controll", "none", "true"], "unrecognized arguments|required"),
        (["ncu", "--clock-control", "boost", "--csv", "--log-file", "x", "true"], "invalid choice: 'boost'"),
        (["ncu", "--clock-control", "none", "--csv", "--log-file", "x", "--section", "Schedule", "true"], "Schedule"),
        (
            ["ncu", "--clock-control", "none", "--csv", "--log-file", "x", "--metrics", "a.sum", "true"],
            "unknown: a.sum",
        ),
        (["compute-sanitizer", "--tool", "memchek", "--error-exitcode", "1", "true"], "invalid choice: 'memchek'"),
        (
            ["compute-sanitizer", "--tool", "racecheck", "--padding", "8", "--error-exitcode", "1", "true"],
            "of memcheck",
        ),
        (["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"], "no program to run"),
        (["nvidia-smi", "--query-gpu=clock", "--format=csv"], "unknown: clock"),
    ],
)
def test_stand_ins_refuse_what_the_programs_would(tmp_path, command, message):
    with rehearsal.stand_ins(tmp_path):
        ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode != 0 and re.search(message, ran.stderr), ran.stderr


def test_stand_ins_give_the_status_of_the_program(tmp_path):
    with rehearsal.stand_ins(tmp_path):
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", "sh", "-c", "exit 7"]
        assert subprocess.run(command, capture_output=True).returncode == 7
    assert str(tmp_path) not in os.environ["PATH"]


def rehearse(folder: Path, *steps: str) -> tuple[int, dict[str, str], str]:
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--steps", *steps, "--out", folder / "out"]
    command += ["--archive", folder / "results.tar.gz"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=420, env=environment)
    return ran.returncode, statuses(folder / "out"), ran.stdout + ran.stderr


@pytest.mark.slow
def test_rehearsal_of_the_first_part(tmp_path):
    """Every command line of it, on the CPU, with results, logs and archive as on a GPU."""
    status, found, output = rehearse(tmp_path, "first")
    names = ["build", *(step.name for step in gpu_steps.plan(tmp_path, ["first"]))]
    assert found == dict.fromkeys(names, "passed"), output
    assert status == 0 and len(output) <= supervisor.OUTPUT_LIMIT
    with tarfile.open(tmp_path / "results.tar.gz") as tar:
        members = tar.getnames()
    expected = {"kernels.json", "networks.md", "networks-compiled.md", "logs/tests-forward.xml", "logs/clocks.csv"}
    assert {f"out/{name}" for name in expected} <= set(members)


@pytest.mark.slow
def test_rehearsal_finds_a_mistyped_option(tmp_path, monkeypatch, capsys):
    """Also one that a later option overrides: values are checked as they are read."""
    for options in (["--kernal", "9"], ["--kernels", "nine"]):
        step = gpu_steps.benchmark(tmp_path, "kernels", "depthwise", 60, *options, tiny=gpu_steps.TINY_MAP)
        monkeypatch.setattr(gpu_steps, "plan", lambda *_, step=step: [step])
        assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
        assert statuses(tmp_path)["kernels"] == "failed"
        assert re.search("unrecognized arguments: --kernal|nine", capsys.readouterr().out)
