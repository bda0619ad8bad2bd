"""SASS: disassembles a cubin, and executes the control flow of a kernel to count the instructions that a launch issues.

A static count of the instructions says little: a kernel holds slow paths, loops and code that runs once. So `count`
executes one thread of each warp: integer and predicate instructions with their values, from the kernel's parameters
and the thread index; loads from memory and floating-point arithmetic with an unknown value, which spreads. Every
instruction it passes was issued, guarded or not. A branch that an unknown value decides raises UndecidedError: nothing
is guessed. The thread is lane 0 of its warp; a path that only other lanes take is not counted.

Encodings differ between architectures, their names hardly: sm_80 to sm_90a are covered.
"""

import itertools
import math
import re
import runpy
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

find_tool = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "find_cuda.py"))["find_tool"]

CONSTANTS = {8: 0x160, 9: 0x210}  # where kernel parameters start in constant bank 0, by major architecture
GRID_X = 0x0C  # where gridDim.x is there
MOST_STEPS = 2_000_000
MASK = 0xFFFFFFFF


class UndecidedError(RuntimeError):
    """The path of a kernel depends on what is not known before it runs, or on an instruction that is not covered."""


class Instruction(NamedTuple):
    address: int
    guard: str  # "@!P0" or empty
    opcode: str  # with its modifiers
    operands: list[str]


LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its mangled name. Branch targets are addresses."""
    text = subprocess.run([find_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
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
            elif label := re.match(r"\s*([.$\w]+):\s*$", line):
                pending.append(label[1])
        for instruction in instructions:
            for i, operand in enumerate(instruction.operands):
                if label := re.fullmatch(r"`\((.+)\)", operand):
                    instruction.operands[i] = f"@{labels.get(label[1], 0):#x}"
        kernels[name] = instructions
    return kernels


# ------------------------------------------------------------------------------------------------ execution


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def bits_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def round_up_to_float(value: int) -> float:
    """The smallest float32 that is not less."""
    rounded = bits_float(float_bits(float(value)))
    return rounded if rounded >= value else bits_float(float_bits(rounded) + 1)


COMPARE = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
COMBINE = {"AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b}
REGISTER = re.compile(r"(U?R)(\d+|Z)")
PREDICATE = re.compile(r"U?P(\d|T)")


class Thread:
    """Registers of one thread; None, or no entry, is a value that is not known."""

    def __init__(self, constants: dict[int, int], special: dict[str, int]):
        self.constants, self.special = constants, special  # bytes of constant bank 0 by offset; by name
        self.registers: dict[str, int | bool | None] = {}

    # -- operands

    def read(self, operand: str, offset: int = 0):
        """A 32-bit value; offset 1 is the upper half of a pair."""
        text = operand.replace(".reuse", "")
        if text[0] in "-~":
            value = self.read(text[1:], offset)
            return None if value is None else (-value if text[0] == "-" else ~value) & MASK
        if match := re.fullmatch(r"c\[0x0\]\[(?:(\w+)\+?)??(0x[0-9a-f]+)?\]", text):
            base = self.read(match[1]) if match[1] else 0
            return None if base is None else self.constant(base + int(match[2] or "0", 16) + 4 * offset, 4)
        if match := REGISTER.fullmatch(re.sub(r"\.(64|U32|S32)$", "", text)):
            return 0 if match[2] == "Z" else self.registers.get(f"{match[1]}{int(match[2]) + offset}")
        if re.fullmatch(r"0x[0-9a-f]+", text):
            return int(text, 16) >> 32 * offset & MASK
        return None  # floating-point constants, addresses

    def read_pair(self, operand: str) -> int | None:
        if operand[0] == "-":
            value = self.read_pair(operand[1:])
            return None if value is None else -value & (1 << 64) - 1
        low, high = self.read(operand), self.read(operand, 1)
        return None if low is None or high is None else high << 32 | low

    def constant(self, offset: int, size: int) -> int | None:
        found = [self.constants.get(offset + i) for i in range(size)]
        return None if None in found else int.from_bytes(bytes(found), "little")

    def predicate(self, operand: str) -> bool | None:
        """Of an operand such as !P0, or of a guard such as @!P0."""
        negated, name = "!" in operand, operand.lstrip("@!")
        value = True if name in ("PT", "UPT") else self.registers.get(name)
        return None if value is None else value != negated

    def write(self, operand: str, value, offset: int = 0):
        if match := REGISTER.match(operand):
            if match[2] != "Z":
                value = None if value is None else value & MASK
                self.registers[f"{match[1]}{int(match[2]) + offset}"] = value
        elif PREDICATE.fullmatch(operand) and not operand.endswith("T"):
            self.registers[operand] = value

    # -- instructions

    def execute(self, instruction: Instruction):
        """One instruction that is no branch. Under a guard that is not known, what it writes is not known."""
        guard = self.predicate(instruction.guard) if instruction.guard else True
        if guard is False:
            return
        name, *modifiers = instruction.opcode.split(".")
        method = getattr(self, "_" + name.removeprefix("U").lower(), None) if guard else None
        values = method(set(modifiers), instruction.operands) if method else None
        if values is None:
            values = self._unknown(name, modifiers, instruction.operands)
        for operand, offset, value in values:
            self.write(operand, value, offset)

    def _unknown(self, name, modifiers, operands):
        """What an instruction may write: the first operand, predicates that follow, the register after predicates."""
        if not operands or name[:2] in ("ST", "BA") or name in ("BSSY", "BSYNC", "NOP", "WARPSYNC", "RED", "DEPBAR"):
            return []
        if name == "R2P":
            return [(f"P{i}", 0, None) for i in range(7)]
        targets = [operands[0], *itertools.takewhile(PREDICATE.fullmatch, operands[1:])]
        if PREDICATE.fullmatch(operands[0]) and not ("SET" in name or "PLOP3" in name):
            targets += operands[len(targets) :][:1]
        modifiers = {name, *modifiers}
        count = 4 if modifiers & {"128", "HMMA", "LDSM"} else 1
        if name[0] == "D" or modifiers & {"64", "WIDE", "F64", "U64", "S64", "CS2R"}:
            count = 2
        return [(target, offset, None) for target in targets for offset in range(count)]

    def _values(self, *operands):
        values = [self.read(operand) for operand in operands]
        return None if None in values else values

    def _split(self, operands):
        """(register written, predicates written, sources, predicates read)."""
        is_predicate = [bool(PREDICATE.fullmatch(operand.lstrip("!"))) for operand in operands]
        first = next(i for i in range(1, len(operands)) if not is_predicate[i])
        last = next((i for i in range(first, len(operands)) if is_predicate[i]), len(operands))
        return operands[0], operands[1:first], operands[first:last], operands[last:]

    def _carry(self, predicates):
        values = [self.predicate(predicate) for predicate in predicates]
        return None if None in values else sum(values)

    def _mov(self, modifiers, operands):
        return [(operands[0], 0, self.read(operands[1]))]

    def _sel(self, modifiers, operands):
        chosen = self.predicate(operands[3])
        return None if chosen is None else [(operands[0], 0, self.read(operands[1 if chosen else 2]))]

    _fsel = _sel

    def _s2r(self, modifiers, operands):
        return [(operands[0], 0, self.special.get(operands[1]))]

    _s2ur = _s2r

    def _cs2r(self, modifiers, operands):
        if operands[1] != "SRZ":
            return None
        return [(operands[0], offset, 0) for offset in range(1 if "32" in modifiers else 2)]

    def _r2ur(self, modifiers, operands):
        return [(operands[0], 0, self.read(operands[1]))] if len(operands) == 2 else None

    def _ldc(self, modifiers, operands):
        sizes = {"U8": 1, "U16": 2, "64": 8}
        size = next((sizes[m] for m in modifiers if m in sizes), 4)
        if modifiers - {"U8", "U16", "64"}:
            return None
        if size >= 4:
            return [(operands[0], offset, self.read(operands[1], offset)) for offset in range(size // 4)]
        match = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operands[1])
        return [(operands[0], 0, self.constant(int(match[1], 16), size))] if match else None

    def _imad(self, modifiers, operands):
        target, carry_out, (a, b, c), carry_in = self._split(operands)
        wide = modifiers & {"WIDE", "HI"}
        values = self._values(a, b)
        addend = self.read_pair(c) if wide else self.read(c)
        carry = self._carry(carry_in)
        if values is None or addend is None or carry is None:
            return None
        if wide and "U32" not in modifiers:
            values = [signed(value) for value in values]
        total = (values[0] * values[1] & (1 << 64) - 1) + addend + carry
        if "HI" in modifiers:
            return None if carry_out else [(target, 0, total >> 32)]
        results = [(target, 0, total), *([(target, 1, total >> 32)] if wide else [])]
        if carry_out and not wide:
            return None
        return results + [(predicate, 0, bool(total >> 64)) for predicate in carry_out]

    def _iadd3(self, modifiers, operands):
        target, carry_out, sources, carry_in = self._split(operands)
        total = self._carry(carry_in)
        values = self._values(*(source.lstrip("-") for source in sources))
        if total is None or values is None or len(carry_out) > 1 and carry_out[1] != "PT":
            return None
        for source, value in zip(sources, values):
            total += (~value & MASK) + 1 if source.startswith("-") else value
        if carry_out and sum(source not in ("RZ", "URZ") for source in sources) > 2:
            return None  # two carries
        return [(target, 0, total), *((predicate, 0, bool(total >> 32)) for predicate in carry_out[:1])]

    _viadd = _iadd3

    def _viaddmnmx(self, modifiers, operands):
        if (values := self._values(*operands[1:4])) is None:
            return None
        return self._minimum(modifiers, operands[0], values[0] + values[1] & MASK, values[2], operands[4])

    def _imnmx(self, modifiers, operands):
        if (values := self._values(*operands[1:3])) is None:
            return None
        return self._minimum(modifiers, operands[0], *values, operands[3])

    _vimnmx = _imnmx

    def _minimum(self, modifiers, target, a, b, smaller):
        smaller = self.predicate(smaller)
        key = (lambda value: value) if "U32" in modifiers else signed
        return None if smaller is None else [(target, 0, (min if smaller else max)(a, b, key=key))]

    def _iabs(self, modifiers, operands):
        value = self.read(operands[1])
        return None if value is None else [(operands[0], 0, abs(signed(value)))]

    def _lea(self, modifiers, operands):
        target, carry_out, sources, carry_in = self._split(operands)
        carry = self._carry(carry_in)
        values = self._values(*sources)
        if carry is None or values is None:
            return None
        a, b, *high, shift = values
        if "HI" not in modifiers:
            total = (a << shift & MASK) + b
        else:
            wide = signed(a) if "SX32" in modifiers else a | (high[0] << 32 if high else 0)
            total = (wide << shift >> 32 & MASK) + b + (carry if "X" in modifiers else 0)
        return [(target, 0, total), *((predicate, 0, bool(total >> 32)) for predicate in carry_out[:1])]

    def _shf(self, modifiers, operands):
        if (values := self._values(*operands[1:4])) is None:
            return None
        low, shift, high = values
        shift = shift & 31 if "W" in modifiers else shift
        if modifiers & {"U64", "S64"}:
            wide = high << 32 | low
            wide = signed(wide, 64) if "S64" in modifiers else wide
            wide = wide << shift if "L" in modifiers else wide >> shift
            return [(operands[0], 0, wide >> 32 if "HI" in modifiers else wide)]
        if "L" in modifiers:
            return None if "HI" in modifiers else [(operands[0], 0, low << shift)]
        if "HI" not in modifiers:
            return None
        return [(operands[0], 0, (signed(high) if "S32" in modifiers else high) >> shift)]

    def _lop3(self, modifiers, operands):
        written = 2 if PREDICATE.fullmatch(operands[0]) else 1
        *sources, table = operands[written : written + 4]
        if (values := self._values(*sources)) is None:
            return None
        a, b, c = values
        result = 0
        for minterm in range(8):
            if int(table, 16) >> minterm & 1:
                result |= (a if minterm & 4 else ~a) & (b if minterm & 2 else ~b) & (c if minterm & 1 else ~c)
        result &= MASK
        return [(operands[written - 1], 0, result)] + ([(operands[0], 0, result != 0)] if written == 2 else [])

    def _plop3(self, modifiers, operands):
        values = [self.predicate(operand) for operand in operands[2:5]]
        if None in values:
            return None
        minterm = 4 * values[0] + 2 * values[1] + values[2]
        return [(target, 0, bool(int(table, 16) >> minterm & 1)) for target, table in zip(operands[:2], operands[5:7])]

    def _isetp(self, modifiers, operands):
        first, second, a, b, other, *low = operands
        values, other = self._values(a, b), self.predicate(other)
        compare = next(COMPARE[m] for m in modifiers if m in COMPARE)
        combine = next(COMBINE[m] for m in modifiers if m in COMBINE)
        if values is None or other is None:
            if "AND" in modifiers and other is False:
                return [(first, 0, False), (second, 0, False)]
            return None
        if "U32" not in modifiers:
            values = [signed(value) for value in values]
        result = compare(*values)
        if "EX" in modifiers:
            below = self.predicate(low[0])
            if below is None:
                return None
            if values[0] == values[1]:  # then the lower halves decide
                result = below
        return [(first, 0, combine(result, other)), (second, 0, combine(not result, other))]

    def _i2f(self, modifiers, operands):
        value = self.read(operands[1])
        if value is None or modifiers - {"RP", "U32", "S32"} or "RP" not in modifiers:
            return None
        return [(operands[0], 0, float_bits(round_up_to_float(value if "U32" in modifiers else signed(value))))]

    def _mufu(self, modifiers, operands):
        value = self.read(operands[1])
        if value is None or modifiers != {"RCP"} or bits_float(value) == 0:
            return None
        return [(operands[0], 0, float_bits(1 / bits_float(value)))]

    def _f2i(self, modifiers, operands):
        value = self.read(operands[1])
        if value is None or not {"U32", "TRUNC"} <= modifiers or not math.isfinite(bits_float(value)):
            return None
        return [(operands[0], 0, min(max(math.trunc(bits_float(value)), 0), MASK))]

    def _prmt(self, modifiers, operands):
        if modifiers or (values := self._values(*operands[1:4])) is None:
            return None
        low, selector, high = values
        source = (high << 32 | low).to_bytes(8, "little")
        chosen = [source[selector >> 4 * i & 7] for i in range(4)]
        signs = [selector >> 4 * i & 8 for i in range(4)]
        result = [(255 if byte & 128 else 0) if sign else byte for byte, sign in zip(chosen, signs)]
        return [(operands[0], 0, int.from_bytes(bytes(result), "little"))]

    def _p2r(self, modifiers, operands):
        base, mask = self.read(operands[2]), self.read(operands[3])
        bits = [self.registers.get(f"P{i}", False) for i in range(7)]
        if modifiers or base is None or mask is None or any(mask >> i & 1 and bits[i] is None for i in range(7)):
            return None
        packed = sum(bool(bit) << i for i, bit in enumerate(bits))
        return [(operands[0], 0, base & ~mask | packed & mask)]


def is_covered(architecture: int) -> bool:
    return architecture // 10 in CONSTANTS


def count(instructions: list[Instruction], params: bytes, architecture: int, warps: int) -> Counter:
    """How often each opcode is issued by the only block of a launch.

    Args:
        params: the kernel's parameters as they lie in memory.
        architecture: 80 for sm_80.
        warps: of the block.

    Raises:
        UndecidedError: see the module.
    """
    if not is_covered(architecture):
        raise UndecidedError(f"sm_{architecture} is not covered")
    base = CONSTANTS[architecture // 10]
    constants = dict(enumerate((1).to_bytes(4, "little"), GRID_X))
    constants |= dict(enumerate((32 * warps).to_bytes(4, "little")))
    constants |= dict(enumerate(params, base))
    index_of = {instruction.address: i for i, instruction in enumerate(instructions)}
    issued = Counter()
    for warp in range(warps):
        thread = Thread(constants, {"SR_TID.X": 32 * warp, "SR_CTAID.X": 0, "SR_CgaCtaId": 0})
        at, visits = 0, [0] * len(instructions)
        for _ in range(MOST_STEPS):
            instruction = instructions[at]
            visits[at] += 1
            at += 1
            name = instruction.opcode.partition(".")[0]
            if name not in ("BRA", "EXIT", "CALL", "RET"):
                if name in ("BRX", "JMP", "JMX", "BREAK"):
                    raise UndecidedError(f"{instruction.opcode} at {instruction.address:#x} is not covered")
                thread.execute(instruction)
                continue
            conditions = [instruction.guard] if instruction.guard else []
            conditions += [operand for operand in instruction.operands if PREDICATE.fullmatch(operand.lstrip("!"))]
            taken = [thread.predicate(condition) for condition in conditions]
            if False in taken:
                continue
            if None in taken:
                unknown = " ".join(conditions)
                raise UndecidedError(f"{instruction.opcode} at {instruction.address:#x}: {unknown} is not known")
            if name == "EXIT":
                break
            target = instruction.operands[-1]
            if name == "RET":
                address = thread.read(instruction.operands[0])
            else:
                address = int(target[1:], 16) if target.startswith("@") else None
            if address not in index_of:
                raise UndecidedError(f"{instruction.opcode} at {instruction.address:#x}: unknown target {target}")
            at = index_of[address]
        else:
            raise UndecidedError(f"no end after {MOST_STEPS} instructions of a warp")
        for instruction, times in zip(instructions, visits):
            if times:
                issued[instruction.opcode] += times
    return issued
