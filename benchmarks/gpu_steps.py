"""The steps of `make gpu`: what is run on a GPU, in which order, and for how long at most.

Three parts, the most telling first. `first` says in under six minutes whether the kernels are right and how fast they
and the networks are; `second` says why, by hardware counters, and covers gradients, training, latency and other maps;
`third` holds what takes long.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import report
from supervisor import Step

PAIR = ("convmixer_1536_20_k9_p7", "convmixer_768_32_k7_p7")  # the paper's largest networks
YARDSTICKS = ("convnext_large", "mixer_b16_224")  # of other families: they tell one card's speed from another's
OURS = ("fused", "fused-graphs", "fused-l2-chunks")
PAPERS_MAPS = ("1536x32x32", "768x32x32")
KERNELS = ("9", "3", "7", "5")  # the ratio of the first two is a prediction to check
# Maps of ConvNeXt, and such whose rows or planes do not start on 16 bytes.
OTHER_MAPS = ("96x56x56", "768x33x33", "192x28x28", "384x15x15", "384x14x14", "768x7x7")
OVERHEAD = 20  # seconds of a run beside its steps: start, checks of the libraries, ends of processes
WORKERS = 5  # of pytest-xdist: a float64 reference of each fits the GPU's memory beside the sanitizers'
SECONDS_PER_TEST = 60
FEW_THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # in each of the processes side by side
CHECKS = 110  # seconds for the tests and sanitizers that run side by side

# What a rehearsal appends to the steps' options, so that they end soon on a CPU.
TINY_NETWORK = ("--device", "cpu", "--models", "convmixer_256_8_k3_p2", "--image-size", "4", "--batch", "1")
TINY_TRAINING = (*TINY_NETWORK, "--dtypes", "float32", "--rounds", "1")
TINY_MAP = ("--device", "cpu", "--maps", "3x5x4", "--kernels", "3", "--batch", "1", "--rounds", "1")
TINY_LAUNCHES = ("--device", "cpu", "--batch", "1", "--channels", "2")
FEW_TESTS = ("-m", "not cuda and not fuzz", "-k")


def parts(out: Path) -> dict[str, list[Step]]:
    """The steps by part, in their order. out: folder of the results."""
    return {"first": first_part(out), "second": second_part(out), "third": third_part(out)}


def plan(out: Path, names: Collection[str] = (), seconds: float | None = None) -> list[Step]:
    """The steps that parts and single steps by name stand for, in their order; all where none is named.

    seconds: for everything, where that is known: the paper's tables, which always have more to do, get what the other
    steps leave of it.

    Raises ValueError for a name that no part and no step has.
    """
    known = parts(out)
    steps = [step for part in known.values() for step in part]
    accepted = [*known, *(step.name for step in steps)]
    if unknown := sorted(set(names).difference(accepted)):
        raise ValueError(f"{', '.join(unknown)}, accepted: {', '.join(accepted)}")
    wanted = {step.name for part, members in known.items() for step in members if {part, step.name}.intersection(names)}
    steps = [step for step in steps if not names or step.name in wanted]
    if seconds is None or steps[-1].name != "paper":
        return steps
    return [*steps[:-1], paper(out, max(steps[-1].seconds, seconds - seconds_for(steps[:-1])))]


def seconds_for(steps: Collection[Step]) -> float:
    """What the steps take if each takes all of its limit and none fails, with a little for what lies between them."""
    groups = {}
    for step in steps:
        if not step.in_place_of:
            group = step.group or step.name
            groups[group] = max(step.seconds, groups.get(group, 0))
    return sum(groups.values()) + OVERHEAD


def target(capability: tuple[int, int]) -> str:
    """What the kernels are compiled for on a GPU, as TORCH_CUDA_ARCH_LIST names it: 9.0a, 8.9."""
    return "{}.{}".format(*capability) + ("a" if capability == (9, 0) else "")


def build(capability: tuple[int, int]) -> Step:
    """Both libraries for one GPU, at once and on all cores."""
    return Step(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace", "--parallel", "2"],
        240,
        {
            "TORCH_CUDA_ARCH_LIST": target(capability),
            "CMF_CUDA": "1",
            "CMF_LINEINFO": "0",
            "MAX_JOBS": str(os.cpu_count()),
        },
        required=True,
        rehearsal=("--help",),  # reads the options, and compiles nothing
    )


def first_part(out: Path) -> list[Step]:
    compiled = ("--backends", "compile", "compile-nchw", "fused")
    uncompiled = ("--backends", "eager", "channels_last", *OURS, "--breakdown")
    return [
        benchmark(out, "kernels", "depthwise", 70, "--maps", *PAPERS_MAPS, "--kernels", *KERNELS, tiny=TINY_MAP),
        memcheck(
            "diagnosis",
            [sys.executable, "benchmarks/launches.py", "--batch", "2", "--channels", "32"],
            60,
            in_place_of="kernels",
            rehearsal=TINY_LAUNCHES,
        ),
        network(out, "networks", 70, "--models", *PAIR, *uncompiled, needs="kernels"),
        network(out, "networks-compiled", 110, "--models", *PAIR, *compiled, needs="kernels"),
        tests(out, "tests-forward", 75, "test_ops", few="test_depthwise_conv2d and 1x1x1x1 and float32"),
    ]


def second_part(out: Path) -> list[Step]:
    engine = ("test_gpu_engine", "test_optimize", "test_nn", "test_package", "test_benchmarks")
    sanitized = ("test_ops", "test_autograd")
    latency = ("--models", *PAIR, "--backends", "eager", *OURS, "--latency", "--batch")
    return [
        Step(
            "counters",
            [sys.executable, "benchmarks/counters.py", "--json", f"{relative(out)}/counters.json"],
            90,
            missing="" if shutil.which("ncu") else "ncu is not on PATH",
            rehearsal=TINY_LAUNCHES,
        ),
        tests(out, "tests-backward", CHECKS, "test_autograd", group="checks", few="test_wgrad_layouts and cpu"),
        tests(out, "tests-engine", CHECKS, *engine, group="checks", few="test_any_strides_of_the_images"),
        sanitized_tests(out, "memcheck", memcheck, sanitized),
        sanitized_tests(out, "racecheck", racecheck, sanitized),
        benchmark(out, "gradients", "gradients", 40, "--kernels", "9", "3", "--maps", PAPERS_MAPS[0], tiny=TINY_MAP),
        benchmark(out, "training", "training", 60, "--backends", "eager", "ours", tiny=TINY_TRAINING),
        network(out, "latency-1", 35, *latency, "1"),
        network(out, "latency-8", 35, *latency, "8"),
        benchmark(out, "maps", "depthwise", 45, "--maps", *OTHER_MAPS, "--kernels", "7", "9", tiny=TINY_MAP),
    ]


def third_part(out: Path) -> list[Step]:
    rows = [name for name, row in report.paper_rows().items() if row["in_table1"] == "yes"]
    convmixers = [name for name in rows if name.startswith("convmixer")]
    peers = [name for name in rows if name not in convmixers]
    autotuned = ("--models", PAIR[0], "--backends", "compile-max-autotune", "fused")
    chart = ("--plot", f"{relative(out)}/throughput.png")
    compiled = ("--maps", PAPERS_MAPS[0], "--kernels", "3", "9", "--operators", "aten", "fused", "compile")
    return [
        network(out, "autotuned", 240, *autotuned),
        network(out, "throughput", 300, *chart, "--models", *convmixers, *YARDSTICKS, tiny=("--backends", "fused")),
        benchmark(out, "depthwise", "depthwise", 90, tiny=TINY_MAP),
        benchmark(out, "compiled", "depthwise", 40, *compiled, tiny=TINY_MAP),
        benchmark(out, "training-compiled", "training", 150, "--models", "convmixer_768_32", tiny=TINY_TRAINING),
        network(out, "peers", 60, "--models", *peers, "--backends", "eager", "channels_last"),
        benchmark(out, "gemm", "gemm", 30, tiny=("--device", "cpu", "--sizes", "8x8x64", "--rounds", "1")),
        paper(out, 120),
    ]


def paper(out: Path, seconds: float) -> Step:
    """The paper's tables by its protocol, for as long as there is time; a later run goes on with them."""
    # The row that is being measured when its minutes are over, and the figures, take a while longer.
    minutes = (seconds - max(20, seconds / 10)) / 60
    command = [sys.executable, "benchmarks/paper.py", "--full", "--device", "cuda", "--out", f"{relative(out)}/paper"]
    command += ["--minutes", f"{minutes:.2f}", "--backends", "eager", "channels_last", "fused"]
    return Step("paper", command, seconds, rehearsal=("--device", "cpu", "--minutes", "0.02"))


# ------------------------------------------------------------------------------------------------ kinds of steps


def relative(out: Path) -> str:
    """The folder as the steps' commands name it: their tables show these commands, and no path of a machine."""
    return os.path.relpath(out, report.ROOT)


def benchmark(out: Path, name: str, script: str, seconds: float, *options: str, tiny: tuple[str, ...]) -> Step:
    command = [sys.executable, f"benchmarks/{script}.py", "--device", "cuda", "--json", f"{relative(out)}/{name}.json"]
    return Step(name, [*command, *options], seconds, rehearsal=tiny)


def network(out: Path, name: str, seconds: float, *options: str, needs: str = "", tiny: tuple[str, ...] = ()) -> Step:
    step = benchmark(out, name, "throughput", seconds, *options, tiny=(*TINY_NETWORK, "--batches", "1", *tiny))
    return replace(step, needs=needs)


def pytest(report_file: Path, files: Collection[str], *options: str) -> list[str]:
    """Tests of files by name, with a JUnit report; verbose, so that the log of a run that is ended names the tests."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report_file}"]
    return [*command, *options, *(f"tests/{name}.py" for name in files)]


def tests(out: Path, name: str, seconds: float, *files: str, few: str, group: str = "") -> Step:
    """The CUDA tests of files. A fault makes CUDA unusable for its process: tests/cuda_faults.py ends that one, and
    pytest-xdist starts another. few: the tests of them that a rehearsal runs, by pytest's -k."""
    results, options, rehearsal = out / "logs" / f"{name}.xml", ["-m", "cuda"], (*FEW_TESTS, few)
    workers, limits = (importlib.util.find_spec(plugin) is not None for plugin in ("xdist", "pytest_timeout"))
    if workers:
        options += ["-n", str(WORKERS)]
        rehearsal += ("-n", "1")
    if limits:
        options.append(f"--timeout={SECONDS_PER_TEST}")
    if workers and limits:
        # A signal does not reach a test that waits for a kernel: the worker is ended, and another one goes on.
        options.append("--timeout-method=thread")
    command = pytest(results, files, *options)
    return Step(name, command, seconds, dict(FEW_THREADS), group=group, tests=results, rehearsal=rehearsal)


def memcheck(name: str, command: list[str], seconds: float, **rules) -> Step:
    """A command under compute-sanitizer: accesses out of bounds, also just beyond a block of memory."""
    # Failing calls of torch's libraries, which they expect and handle, are no findings.
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--padding", "512"]
    return sanitizer(name, options, command, seconds, **rules)


def racecheck(name: str, command: list[str], seconds: float, **rules) -> Step:
    """A command under compute-sanitizer: races in shared memory."""
    return sanitizer(name, ["--tool", "racecheck"], command, seconds, **rules)


def sanitizer(name: str, options: list[str], command: list[str], seconds: float, **rules) -> Step:
    program = shutil.which("compute-sanitizer")
    wrapper = [program or "compute-sanitizer", *options, "--error-exitcode", "1"]
    wrapper += ["--kernel-name", "kernel_substring=convmixer_fast"]
    return Step(
        name,
        [*wrapper, *command],
        seconds,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **FEW_THREADS},  # else an overrun stays inside a block of torch's cache
        missing="" if program else "compute-sanitizer is not on PATH",
        **rules,
    )


def sanitized_tests(out: Path, name: str, tool, files: Collection[str]) -> Step:
    """The few launches that tests mark for a sanitizer."""
    results = out / "logs" / f"{name}.xml"
    command = pytest(results, files, "-m", "cuda and sanitize")
    few = (*FEW_TESTS, "test_depthwise_conv2d and 1x1x1x1 and float32")
    return tool(name, command, CHECKS, group="checks", tests=results, rehearsal=few)
