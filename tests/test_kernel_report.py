"""The kernel report: what it counts is what the emulated GPU executes, and the budgets that it guards."""

import contextlib
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from emulated import EmulatedOps

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import breakdown
import kernel_budgets
import kernel_report
import prediction
import sass
from kernel_report import PAPER, PLAIN, Case

import convmixer_fast
from convmixer_fast import ConvMixer
from convmixer_fast.diagnostics import GPUS

RECORDED = Path(__file__).parent / "data" / "kernel_budgets.json"
SAME_IN_PTX = {"HMMA": "mma.", "LDSM": "ldmatrix.", "MUFU": "ex2."}

FUSED, CONVOLUTION, WGRAD = Case(PAPER, 9, prologue=True), Case(PAPER, 9, **PLAIN), Case(PAPER, 9, operator="wgrad")
SMALL_MAPS = Case((64, 1024, 16, 16), 9, prologue=True)
MOST_INSTRUCTIONS = {FUSED: 990, CONVOLUTION: 420}  # per plane on sm_90a
MOST_REGISTERS = 128
# By the cycle model, us on an H200. They change with the model and with the kernels: predictions, nothing is measured.
PREDICTED = {FUSED: 123.1, CONVOLUTION: 69.4, WGRAD: 76.1, SMALL_MAPS: 22.6}


def load(*patterns, target="sm_90a"):
    try:
        return [kernel for pattern in patterns for kernel in kernel_report.load_kernels([target], pattern)]
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kernels():
    """float16, contiguous, for sm_90a."""
    return load("depthwise_mma_f16_gelu", "depthwise_mma_f16_relu", "depthwise_wgrad_mma_f16")


@pytest.fixture(scope="module")
def planes(kernels):
    """What a block does in steady state, by case."""
    by_name = {kernel.name: kernel for kernel in kernels}
    wanted = {case: by_name[case.launch("sm_90a").name] for case in PREDICTED}
    return {case: kernel_report.trace_case(kernel, case) for case, kernel in wanted.items()}


# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.slow
@pytest.mark.parametrize("case", MOST_INSTRUCTIONS, ids=["fused", "convolution"])
def test_budget(planes, case):
    """The kernels that the paper's networks and plain convolutions run."""
    plane = planes[case]
    assert plane.opcodes.total() <= MOST_INSTRUCTIONS[case]
    assert plane.kernel.resources.registers <= MOST_REGISTERS
    assert (plane.kernel.resources.spills, plane.kernel.resources.stack) == (0, 0)


@pytest.mark.slow
def test_kernels_of_float16_are_no_worse_than_recorded(kernels):
    """After a change that is meant: python benchmarks/kernel_budgets.py tests/data/kernel_budgets.json --record"""
    recorded = json.loads(RECORDED.read_text())
    found = kernel_budgets.measure(kernels, kernel_budgets.launches())
    assert {kernel.name for kernel in kernels} == {e.get("kernel", label) for label, e in found["sm_90a"].items()}
    assert kernel_budgets.worse(recorded, found) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89"])
def test_other_targets_are_no_worse_than_recorded(target):
    """They have other instructions, and registers suffice more narrowly."""
    kernels = load("depthwise_mma_f16_gelu", "depthwise_mma_f16_relu", target=target)
    found = kernel_budgets.measure(kernels, kernel_budgets.launches())
    assert found[target] and kernel_budgets.worse(json.loads(RECORDED.read_text()), found) == []


def test_every_launch_has_a_budget():
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == kernel_report.CASES.keys()
    labels = {" ".join(case.labels) for case in kernel_budgets.launches()}
    for target, entries in recorded.items():
        assert labels <= entries.keys()
        counted = {label for label, entry in entries.items() if "instructions" in entry}
        assert counted == {label for label in labels if label.startswith("float16") and target == "sm_90a"}


def test_nothing_spills():
    recorded = json.loads(RECORDED.read_text())
    assert [entry for entries in recorded.values() for entry in entries.values() if entry["spills"]] == []


def test_what_is_worse():
    label = " ".join(FUSED.labels)
    recorded = {"sm_90a": {label: {"kernel": "k<1>", "registers": 121, "spills": 0, "instructions": 1000.0}}}

    def worse(**changes):
        found = copy.deepcopy(recorded)
        found["sm_90a"][label] |= changes
        return kernel_budgets.worse(recorded, found)

    # 8 registers are allocated at once; the kernel's name may change.
    assert worse() == worse(registers=128, instructions=900.0, kernel="k<1, 2>") == []
    assert worse(registers=129) == [f"sm_90a, {label}: 129 registers, recorded are 121"]
    assert worse(spills=4) == [f"sm_90a, {label}: 4 spills, recorded are 0"]
    assert worse(instructions=1000.5) == [f"sm_90a, {label}: 1000.5 instructions, recorded are 1000.0"]
    assert kernel_budgets.worse({}, recorded) == [f"sm_90a, {label}: not recorded"]


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.slow
def test_gradient_of_the_weight(planes):
    plane = planes[WGRAD]
    assert plane.opcodes["HMMA.16816.F32"] == 8 * 9 + 8
    assert plane.opcodes["LDG.E.128.CONSTANT"] == 8  # in two tensors


def executed(images):
    """The profile of FUSED with so many images of one channel, by one block on the emulated GPU."""
    case = cases.Case(images, 1, 32, 32, 9, 9)
    x, weight = cases.make_input(case, torch.float16), cases.make_weight(case, torch.float16)
    vectors = cases.make_vectors(case, torch.float16, 6)
    with contextlib.closing(EmulatedOps("sm_90a", sm_count=1, blocks_per_sm=1, profile=True)) as ops:
        ops.fused_depthwise(x, weight, *vectors[:3], prologue=tuple(vectors[3:]))
        return ops.launches[0].profile


@pytest.mark.slow
def test_counts_what_is_executed(planes):
    """Machine code and PTX of the same kernel agree in those instructions that the compiler translates one by one, and
    in the conflicts of their accesses to shared memory."""
    plane = planes[FUSED]
    few, many = executed(4), executed(8)

    def in_ptx(prefix):
        counts = few.by_opcode, many.by_opcode
        return (
            sum(times - counts[0].get(opcode, 0) for opcode, times in counts[1].items() if opcode.startswith(prefix))
            / 4
        )

    for name, prefix in SAME_IN_PTX.items():
        times = sum(times for opcode, times in plane.opcodes.items() if opcode.startswith(name))
        assert times == in_ptx(prefix) > 0, name
    assert plane.opcodes["LDG.E.128.CONSTANT"] == plane.opcodes["STG.E.128"] == 4  # a plane is 4 x 32 x 16 bytes
    assert plane.pipes.total() == plane.opcodes.total()

    for name, kind in {"STS": "st", "LDSM": "ldmatrix"}.items():
        steps = [step for warp in plane.steps for step in warp]
        wavefronts = sum(s.wavefronts for s in steps if plane.kernel.instructions[s.index].name == name) / plane.planes
        assert wavefronts == (many.shared[kind].wavefronts - few.shared[kind].wavefronts) / 4 > 0, name


# ------------------------------------------------------------------------------------------------ predictions


@pytest.mark.slow
@pytest.mark.parametrize("case", PREDICTED, ids=["fused", "convolution", "wgrad", "small maps"])
def test_predicted_time(planes, case):
    assert planes[case].predict("H200").model == pytest.approx(PREDICTED[case], rel=0.05)


@pytest.mark.slow
def test_tensor_cores_pay(kernels):
    """By the model tensor cores take less than a third of the direct kernel's time also for kernels of few rows or few
    columns, in both layouts: far more than the model may be wrong by."""
    by_name = {k.name: k for k in kernels + load("depthwise_mma_f16_relu_nhwc", "depthwise_direct_f16")}

    def predicted(case):
        kernel = by_name[case.launch("sm_90a").name]
        return kernel_report.trace_case(kernel, case).predict("H200").microseconds

    for case in kernel_report.NARROW:
        assert 3 * predicted(case) < predicted(case._replace(operator="direct")), case


@pytest.mark.slow
def test_devices(planes):
    """Those of explain(); an H100 is an H200 with less bandwidth."""
    assert kernel_report.DEVICES.keys() == GPUS.keys()
    for name, device in kernel_report.DEVICES.items():
        assert re.fullmatch(rf"sm_{GPUS[name].capability}a?", device.target)
    plane = planes[CONVOLUTION]
    h200, h100 = plane.predict("H200"), plane.predict("H100")
    assert h100.memory == pytest.approx(h200.memory * 4.3 / 3.0)
    assert h100._replace(memory=0) == h200._replace(memory=0)
    assert h100.microseconds == h100.memory > h200.microseconds == max(h200.model, h200.memory)
    text = kernel_report.document([plane.kernel], [plane], all_resources=False)
    assert text.count("\n| H100 ") == text.count("\n| H200 ") == 1
    assert all(re.search(rf"\b{name}:\s", text) for name in kernel_report.DEVICES)


@pytest.mark.slow
def test_rounds_of_work_tiles(planes):
    """A block that has one work tile more than others makes the launch last longer."""
    plane = planes[CONVOLUTION]
    blocks = GPUS["H200"].sm_count * plane.predict("H200").warps  # of one warp and one map each

    def model(batch):
        case = plane.case._replace(shape=(batch, *plane.case.shape[1:]))
        return plane._replace(case=case).predict("H200").model

    tiles = [batch * PAPER[1] / blocks for batch in (8, 9, 11)]
    assert [-(-count // 1) for count in tiles] == [6, 7, 8]
    assert model(9) == pytest.approx(model(8) * 7 / 6) and model(11) == pytest.approx(model(8) * 8 / 6)


@pytest.mark.slow
def test_prediction_of_a_network(planes):
    """Floors, but for the depthwise steps; in proportion to images and layers; float32 has none."""
    shape, small = (64, 3, 224, 224), dict(dim=64, patch_size=7, n_classes=10)
    module = convmixer_fast.optimize(ConvMixer(depth=2, kernel_size=9, **small).eval(), torch.float16)
    predicted = {part["name"]: part for part in prediction.predict(module, shape)["parts"]}
    assert list(predicted) == [*breakdown.PARTS, "rest"]
    for name, part in predicted.items():
        assert part["seconds"] == part["floor_seconds"] or name == "depthwise"
    layer = planes[FUSED].predict("H200").microseconds / 1e6 * 64 / PAPER[1]
    assert predicted["depthwise"]["seconds"] == pytest.approx(2 * layer)
    assert predicted["depthwise"]["seconds"] > predicted["depthwise"]["floor_seconds"] > 0
    half = prediction.predict(module, (32, *shape[1:]))["parts"][2]
    assert half["seconds"] == pytest.approx(layer)
    with pytest.raises(ValueError, match="dtype and kernel size are torch.float32 and 9x9, predicted are"):
        prediction.predict(module.float(), shape)
    even = convmixer_fast.optimize(ConvMixer(depth=1, kernel_size=8, **small).eval(), torch.float16)
    with pytest.raises(ValueError, match="torch.float16 and 8x8, predicted are"):
        prediction.predict(even, shape)


# ------------------------------------------------------------------------------------------------ text


def test_tool_that_is_missing():
    with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-nvsomething"):
        sass.find_tool("nvsomething")


def test_update(tmp_path):
    """The section is appended, then replaced; what stands around it stays."""
    path = tmp_path / "design.md"
    path.write_text("# Design\n")
    kernel_report.update(path, "one")
    path.write_text(path.read_text() + "\n## After\n")
    kernel_report.update(path, "two")
    begin, end = kernel_report.MARKERS
    assert path.read_text() == f"# Design\n\n{begin}two\n{end}\n## After\n"


def test_spills_are_read(tmp_path):
    """ptxas must spill here: 80 values do not fit 32 registers."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float* y) {\n"
        "  float v[80];\n#pragma unroll\n  for (int i = 0; i < 80; i++) v[i] = y[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n#pragma unroll\n"
        "  for (int i = 0; i < 80; i++) y[(79 - i) * 1024 + threadIdx.x] = v[i];\n}\n"
    )
    command = [sass.find_tool("nvcc"), "-cubin", "-arch=sm_80", "-Xptxas=-v", source, "-o", tmp_path / "spills.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (resources,) = kernel_report.read_resources(log).values()
    assert resources.registers == 32 and resources.spills > 0
