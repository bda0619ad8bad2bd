"""SASS: disassembles a cubin. Each instruction comes with what the compiler tells the scheduler in its encoding.

Since Volta an instruction is 128 bits long and ptxas, not the hardware, keeps the order of dependent instructions:
those of fixed latency by a stall count, all others by six counters, the scoreboards. Bits 105 to 125 hold (Jia et al.,
"Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018): stall count (4 bits), yield (1), the
scoreboard that is released when the result is written (3; 7: none), the one that is released when the sources are read
(3), the scoreboards to wait for (6), operands to keep in the reuse cache (4).
"""

import re
import runpy
import subprocess
from pathlib import Path
from typing import NamedTuple

find_tool = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "find_cuda.py"))["find_tool"]

NO_SCOREBOARD = 7

# Opcodes by pipe. The load/store unit is one for the four quarters of an SM.
PIPES = {
    "tensor": "HMMA IMMA",
    "fma": "FFMA FADD FMUL IMAD IDP",
    "half": "HADD2 HFMA2 HMUL2 HMNMX2 HSET2 HSETP2",
    "alu": "IADD3 IADD VIADD VIADDMNMX VIMNMX IMNMX IABS LEA LOP3 SHF SHL SHR ISETP SEL PRMT MOV PLOP3 "
    "FMNMX FSEL FSET FSETP FCHK F2FP P2R R2P BMSK SGXT VOTE VABSDIFF I2I I2FP",
    "mufu": "MUFU I2F F2I F2F POPC FLO BREV",
    "lsu": "LDS STS LDSM STSM LDG STG LDL STL LD ST LDGSTS SHFL ATOMS ATOMG ATOM RED",
    "uniform": "UIADD3 UIMAD ULEA ULOP3 USHF UISETP USEL UMOV ULDC R2UR S2UR UPLOP3 UP2UR UR2UP UPRMT UFLO UPOPC "
    "VOTEU UBMSK USGXT",
    "other": "LDC S2R CS2R BRA BAR BSSY BSYNC BREAK BMOV WARPSYNC NOP EXIT CALL RET YIELD DEPBAR LDGDEPBAR MEMBAR "
    "ERRBAR CCTL MATCH REDUX NANOSLEEP",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


class Control(NamedTuple):
    stall: int = 1  # cycles until the warp may issue its next instruction
    write_scoreboard: int = NO_SCOREBOARD  # held until the result is written
    read_scoreboard: int = NO_SCOREBOARD  # held until the sources are read
    wait_mask: int = 0  # bit i: issue only when scoreboard i is free


class Instruction(NamedTuple):
    address: int
    guard: str  # "@!P0" or empty
    opcode: str  # with its modifiers
    operands: list[str]
    control: Control = Control()

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
UPPER_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/$")  # the encoding's, on a line of its own


def decode_control(upper_half: int) -> Control:
    """Bits 64 to 127 of an instruction's encoding."""
    stall, _, write_scoreboard, read_scoreboard, wait_mask = (
        upper_half >> first - 64 & (1 << bits) - 1 for first, bits in ((105, 4), (109, 1), (110, 3), (113, 3), (116, 6))
    )
    return Control(stall, write_scoreboard, read_scoreboard, wait_mask)


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its mangled name. Branch targets are addresses."""
    command = [find_tool("nvdisasm"), "-c", "-hex", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {}
    for section in re.split(r"^\.text\.(?=[^\n]+:$)", text, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition(":\n")
        labels, pending, instructions = {}, [], []
        for line in body.splitlines():
            if line.startswith("//----"):
                break
            if match := LINE.match(line):
                address = int(match[1], 16)
                labels.update(dict.fromkeys(pending, address))
                pending = []
                operands = [operand.strip() for operand in match[4].split(",")] if match[4] else []
                instructions.append(Instruction(address, match[2] or "", match[3], operands))
            elif match := UPPER_HALF.match(line):
                instructions[-1] = instructions[-1]._replace(control=decode_control(int(match[1], 16)))
            elif label := re.match(r"\s*([.$\w]+):\s*$", line):
                pending.append(label[1])
        for instruction in instructions:
            for i, operand in enumerate(instruction.operands):
                if label := re.fullmatch(r"`\((.+)\)", operand):
                    instruction.operands[i] = f"@{labels.get(label[1], 0):#x}"
        kernels[name] = instructions
    return kernels
