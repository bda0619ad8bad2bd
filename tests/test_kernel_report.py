"""The kernel report: what it counts is what the emulated GPU executes, and the budgets that it guards."""

import contextlib
import itertools
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
import kernel_report
import prediction
import sass
from sass import Instruction

import convmixer_fast
from convmixer_fast import ConvMixer
from convmixer_fast.diagnostics import GPUS

MOST_INSTRUCTIONS = 1110  # a plane: 32 x 32, k <= 9, float16, prologue and epilogue
SAME_IN_PTX = {"HMMA": "mma.", "LDSM": "ldmatrix.", "MUFU": "ex2."}


@pytest.fixture(scope="module")
def kernels():
    """float16 with GELU, for sm_90a."""
    try:
        sass.find_tool("nvdisasm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return kernel_report.load_kernels(["sm_90a"], "depthwise_mma_f16_gelu")


@pytest.mark.slow
def test_no_spills(kernels):
    assert len(kernels) == 14
    print(kernel_report.resource_table(kernels))
    assert [kernel.name for kernel in kernels if kernel.resources.spills or kernel.resources.stack] == []


@pytest.mark.slow
def test_instructions_of_a_plane(kernels):
    planes = kernel_report.count_planes(kernels)
    assert len(planes) == 8
    print(kernel_report.plane_table(planes))
    assert {plane.kernel_size for plane in planes if plane.opcodes.total() > MOST_INSTRUCTIONS} == set()


@pytest.mark.slow
def test_devices(kernels):
    """Those of explain(); an H100 is an H200 with less bandwidth."""
    assert kernel_report.DEVICES.keys() == GPUS.keys()
    for name, device in kernel_report.DEVICES.items():
        assert re.fullmatch(rf"sm_{GPUS[name].capability}a?", device.target)
    planes = kernel_report.count_planes(kernels)
    for plane in planes:
        assert list(kernel_report.predictions(plane)) == ["H200", "H100"]
        h200, h100 = plane.predict("H200"), plane.predict("H100")
        assert h100.pop("memory") == pytest.approx(h200.pop("memory") * 4.3 / 3.0)
        assert h100 == h200
    text = kernel_report.document(kernels, planes, all_resources=False)
    assert text.count("\n| H100 ") == text.count("\n| H200 ") == len(planes)
    assert all(re.search(rf"\b{name}:\s", text) for name in kernel_report.DEVICES)


@pytest.mark.slow
def test_prediction_of_a_network(kernels):
    """Floors, but for the depthwise steps; in proportion to images and layers; float32 has none."""
    shape, small = (64, 3, 224, 224), dict(dim=64, patch_size=7, n_classes=10)
    module = convmixer_fast.optimize(ConvMixer(depth=2, kernel_size=9, **small).eval(), torch.float16)
    predicted = {part["name"]: part for part in prediction.predict(module, shape)["parts"]}
    assert list(predicted) == [*breakdown.PARTS, "rest"]
    for name, part in predicted.items():
        assert part["seconds"] == part["floor_seconds"] or name == "depthwise"
    plane = next(p for p in kernel_report.count_planes(kernels) if p.kernel_size == 9 and p.prologue)
    layer = max(plane.predict("H200").values()) / 1e6 * 64 / kernel_report.CHANNELS
    assert predicted["depthwise"]["seconds"] == pytest.approx(2 * layer)
    assert predicted["depthwise"]["seconds"] > predicted["depthwise"]["floor_seconds"] > 0
    half = prediction.predict(module, (32, *shape[1:]))["parts"][2]
    assert half["seconds"] == pytest.approx(layer)
    with pytest.raises(ValueError, match="dtype and kernel size are torch.float32 and 9x9, predicted are"):
        prediction.predict(module.float(), shape)
    even = convmixer_fast.optimize(ConvMixer(depth=1, kernel_size=8, **small).eval(), torch.float16)
    with pytest.raises(ValueError, match="torch.float16 and 8x8, predicted are"):
        prediction.predict(even, shape)


@pytest.mark.slow
def test_gradient_of_the_weight():
    """No spills, and fewer instructions and products than the memory-bound time of a plane leaves room for."""
    try:
        kernels = kernel_report.load_kernels(["sm_90a"], "depthwise_wgrad_mma_f16")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(kernels) == 5
    assert [kernel.name for kernel in kernels if kernel.resources.spills or kernel.resources.stack] == []
    planes = kernel_report.count_planes(kernels)
    print(kernel_report.plane_table(planes))
    assert {plane.kernel_size: plane.opcodes["HMMA.16816.F32"] for plane in planes} == {
        k: 8 * k + 8 for k in (3, 5, 7, 9)
    }
    for plane in planes:
        assert plane.opcodes["LDG.E.128.CONSTANT"] == 8  # of two tensors
        times = plane.predict("H200")
        assert max(times, key=times.get) == "memory"


def executed(images, kernel_size, prologue):
    """Instructions of a warp, by PTX opcode, in a launch of one block on the emulated GPU."""
    case = cases.Case(images, 1, 32, 32, kernel_size, kernel_size)
    x, weight = cases.make_input(case, torch.float16), cases.make_weight(case, torch.float16)
    vectors = cases.make_vectors(case, torch.float16, 6)
    with contextlib.closing(EmulatedOps("sm_90a", sm_count=1, blocks_per_sm=1, profile=True)) as ops:
        ops.fused_depthwise(x, weight, *vectors[:3], prologue=tuple(vectors[3:]) if prologue else None)
        return ops.launches[0].profile.by_opcode


@pytest.mark.slow
def test_counts_what_is_executed(kernels, kernel_size=9, prologue=True):
    """Machine code and PTX of the same kernel agree in those instructions that the compiler translates one by one."""
    planes = kernel_report.count_planes(kernels)
    (plane,) = [plane for plane in planes if (plane.kernel_size, plane.prologue) == (kernel_size, prologue)]
    few, many = executed(4, kernel_size, prologue), executed(8, kernel_size, prologue)

    def in_ptx(prefix):
        return sum(times - few.get(opcode, 0) for opcode, times in many.items() if opcode.startswith(prefix)) / 4

    for name, prefix in SAME_IN_PTX.items():
        times = sum(times for opcode, times in plane.opcodes.items() if opcode.startswith(name))
        assert times == in_ptx(prefix) > 0, name
    assert plane.opcodes["LDG.E.128.CONSTANT"] == plane.opcodes["STG.E.128"] == 4  # a plane is 4 x 32 x 16 bytes
    assert plane.pipes.total() == plane.opcodes.total()


def program(text):
    """Instructions of 16 bytes each from lines such as "@!P0 BRA @0x10"."""
    result = []
    for address, line in zip(itertools.count(0, 16), text.strip().splitlines()):
        words = line.split()
        guard = words.pop(0) if words[0].startswith("@") else ""
        result.append(Instruction(address, guard, words[0], "".join(words[1:]).split(",") if words[1:] else []))
    return result


def test_loops_and_predicates():
    """A loop whose trip count is a parameter, and a branch that its parity decides."""
    code = program(
        """
        LDC R0, c[0x0][0x160]
        MOV R1, RZ
        LOP3.LUT P1, R2, R1, 0x1, RZ, 0xc0, !PT
        @P1 BRA @0x50
        FFMA R9, R9, R9, R9
        IADD3 R1, R1, 0x1, RZ
        ISETP.LT.AND P0, PT, R1, R0, PT
        @P0 BRA @0x20
        EXIT
        """
    )
    issued = sass.count(code, (7).to_bytes(4, "little"), 80, warps=1)
    assert issued == {"LDC": 1, "MOV": 1, "LOP3.LUT": 7, "BRA": 14, "FFMA": 4, "IADD3": 7, "ISETP.LT.AND": 7, "EXIT": 1}
    assert sass.count(code, (7).to_bytes(4, "little"), 80, warps=3).total() == 3 * issued.total()


@pytest.mark.parametrize("number, divisor", [(1000, 7), (6, 7), (7, 7), (0, 5), (2**31 - 1, 3), (4095, 32)])
def test_integer_division(number, divisor):
    """The compiler's sequence, which starts from an approximate reciprocal."""
    thread = sass.Thread({}, {})
    thread.registers |= {"R0": number, "R4": divisor}
    code = program(
        """
        I2F.U32.RP R8, R4
        MUFU.RCP R8, R8
        VIADD R6, R8, 0xffffffe
        F2I.FTZ.U32.TRUNC.NTZ R7, R6
        IMAD.MOV.U32 R6, RZ, RZ, RZ
        IADD3 R9, RZ, -R7, RZ
        IMAD R9, R9, R4, RZ
        IMAD.HI.U32 R9, R7, R9, R6
        IMAD.HI.U32 R5, R9, R0, RZ
        IADD3 R7, -R5, RZ, RZ
        IMAD R1, R4, R7, R0
        ISETP.GE.U32.AND P0, PT, R1, R4, PT
        @P0 IMAD.IADD R1, R1, 0x1, -R4
        @P0 IADD3 R5, R5, 0x1, RZ
        ISETP.GE.U32.AND P1, PT, R1, R4, PT
        @P1 VIADD R5, R5, 0x1
        """
    )
    for instruction in code:
        thread.execute(instruction)
    assert thread.registers["R5"] == number // divisor


@pytest.mark.parametrize(
    "decides",
    ["LDG.E R0, desc[UR4][R2.64]", "SHFL.IDX PT, R0, R1, RZ, 0x1f", "@P3 MOV R0, 0x1", "UNHEARD.OF R0, R1, R2"],
)
def test_does_not_guess(decides, monkeypatch):
    monkeypatch.setattr(sass, "MOST_STEPS", 100)
    code = program(f"MOV R0, 0x1\n{decides}\nISETP.NE.AND P0, PT, R0, RZ, PT\n@P0 BRA @0x0\nEXIT")
    with pytest.raises(sass.UndecidedError, match="0x30"):
        sass.count(code, b"", 80, warps=1)


def test_endless_loop(monkeypatch):
    monkeypatch.setattr(sass, "MOST_STEPS", 100)
    with pytest.raises(sass.UndecidedError, match="100"):
        sass.count(program("BRA @0x0"), b"", 90, warps=1)


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
    """Of a kernel that cannot but spill."""
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
