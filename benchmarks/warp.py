"""The registers and lanes of a warp, and what SASS instructions other than branches do to them (sass.py).

All 32 lanes are executed: integer and predicate instructions with their values; loads from memory and floating-point
arithmetic write an unknown value, which spreads. An instruction that is not covered does the same.
"""

import functools
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from sass import Instruction

MASK = 0xFFFFFFFF
LANES = np.arange(32)
UNKNOWN = -1  # in place of a lane's value, which is never negative

# ------------------------------------------------------------------------------------------------ operands

# Registers and predicates are rows of one table. RZ and PT are rows as well, which are never written.
FIRST_ROW = {"R": 0, "UR": 256, "P": 512, "UP": 520}
ZERO = FIRST_ROW["R"] + 255
ZEROS = {ZERO, FIRST_ROW["UR"] + 255}
TRUES = {FIRST_ROW["P"] + 7, FIRST_ROW["UP"] + 7}
ROWS = 528
REGISTER = re.compile(r"(U?R)(\d+|Z)")
PREDICATE = re.compile(r"!?(U?P)(\d|T)")


class Operand(NamedTuple):
    text: str
    row: int = -1  # where a register or predicate is kept
    sign: str = ""  # "-" or "~" of a register, "!" of a predicate
    is_predicate: bool = False
    immediate: int = -1
    constant: tuple[int, int] = (-1, -1)  # (row of the index, offset) in constant bank 0


@functools.cache
def row_of(name: str) -> int:
    match = REGISTER.match(name) or PREDICATE.match(name)
    return FIRST_ROW[match[1]] + {"Z": 255, "T": 7}.get(match[2], int(match[2]) if match[2].isdigit() else 0)


@functools.cache
def parse(text: str) -> Operand:
    bare = text.partition(" ")[0].replace(".reuse", "")  # RET has a label beside the register
    if PREDICATE.fullmatch(bare):
        return Operand(text, row_of(bare.lstrip("!")), "!" if bare[0] == "!" else "", is_predicate=True)
    sign = bare[0] if bare[:1] in ("-", "~") else ""
    bare = re.sub(r"\.(64|U32|S32)$", "", bare.removeprefix(sign))
    if REGISTER.fullmatch(bare):
        return Operand(text, row_of(bare), sign)
    if match := re.fullmatch(r"c\[0x0\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]", bare):
        return Operand(text, -1, sign, constant=(row_of(match[1]) if match[1] else -1, int(match[2] or "0", 16)))
    if re.fullmatch(r"0x[0-9a-f]+", bare):
        return Operand(text, -1, sign, immediate=int(bare, 16))
    return Operand(text)  # floating-point constants, addresses, labels


@functools.cache
def address_terms(text: str) -> tuple[tuple[tuple[int, int], ...], int] | None:
    """((row, factor) ..., offset) as in "[R2.X4+UR4+-0x10]"."""
    terms, offset = [], 0
    for term in text.strip("[]").split("+"):
        if re.fullmatch(r"-?0x[0-9a-f]+", term):
            offset += int(term, 16)
        elif match := re.fullmatch(r"(U?R(?:\d+|Z))(?:\.X(\d+)|\.U32|\.64)?", term):
            terms.append((row_of(match[1]), int(match[2] or 1)))
        else:
            return None
    return tuple(terms), offset


# ------------------------------------------------------------------------------------------------ instructions


def signed(value: np.ndarray) -> np.ndarray:
    return (value ^ 0x80000000) - 0x80000000


def unsigned64(value: np.ndarray) -> np.ndarray:
    return value.astype(np.uint64)


def float_bits(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32).view(np.uint32).astype(np.int64)


def bits_float(bits: np.ndarray) -> np.ndarray:
    return (bits & MASK).astype(np.uint32).view(np.float32)


COMPARE = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def bytes_per_lane(modifiers: frozenset[str]) -> int:
    return next((SIZES[m] for m in modifiers if m in SIZES), 4)


WRITES_NOTHING = re.compile("ST.*|BAR|RED|NOP|DEPBAR|LDGDEPBAR|MEMBAR|ERRBAR|CCTL|YIELD|NANOSLEEP")

# What an instruction writes: (row, value, doubt). `doubt` has the sign bit set where the value is not known.
Written = list[tuple[int, np.ndarray, np.ndarray]]


class Decoded(NamedTuple):
    name: str
    modifiers: frozenset[str]
    operands: list[Operand]
    guard: Operand | None
    execute: Callable | None
    targets: list[int]  # rows that it may write
    uniform: bool  # executed once for the warp


def targets_of(name: str, modifiers: frozenset[str], operands: list[Operand]) -> list[int]:
    """The first operand, predicates that follow, the register after predicates; with the registers that continue it."""
    if not operands or WRITES_NOTHING.fullmatch(name):
        return []
    if name == "R2P":
        return [row_of(f"P{i}") for i in range(7)]
    predicates = list(itertools.takewhile(lambda operand: operand.is_predicate, operands[1:]))
    chosen = [operands[0], *predicates]
    if operands[0].is_predicate and not ("SET" in name or "PLOP3" in name or "VOTE" in name and len(operands) == 2):
        chosen += operands[len(chosen) :][:1]
    count = 1
    if "128" in modifiers or name in ("HMMA", "LDSM"):
        count = 4
    elif name == "SHF":
        pass
    elif name[0] == "D" or name == "CS2R" and "32" not in modifiers or modifiers & {"64", "WIDE", "F64", "U64", "S64"}:
        count = 2
    rows = []
    for operand in chosen:
        if operand.row >= 0:
            rows += [operand.row + i for i in range(1 if operand.is_predicate else count)]
    return [row for row in rows if row not in ZEROS | TRUES]


class Warp:
    """Registers and lanes of one warp."""

    def __init__(self, constants: dict[int, int], special: dict[str, np.ndarray | int]):
        self.constants = constants  # bytes of constant bank 0 by offset
        self.special = {name: np.broadcast_to(np.int64(value), (32,)) for name, value in special.items()}
        # What nothing has written yet is 0, not unknown: ptxas sets flags bit by bit in whatever a register holds.
        self.values = np.zeros((ROWS, 32), np.int64)
        self.values[list(TRUES)] = 1
        self.active = np.ones(32, bool)

    @property
    def active(self) -> np.ndarray:
        """The lanes that run."""
        return self._active

    @active.setter
    def active(self, lanes: np.ndarray) -> None:
        self._active, self._all_active = lanes, bool(lanes.all())

    # -- operands

    def constant(self, offset: int, size: int = 4) -> int:
        found = [self.constants.get(offset + i) for i in range(size)]
        return UNKNOWN if None in found else int.from_bytes(bytes(found), "little")

    def read(self, operand: Operand, offset: int = 0) -> np.ndarray:
        """32-bit values; offset 1 is the upper half of a pair."""
        if operand.row >= 0:
            value = self.values[operand.row if operand.row in ZEROS else operand.row + offset]
            if operand.is_predicate:
                return value ^ 1 if operand.sign else value
        elif operand.immediate >= 0:
            value = np.full(32, operand.immediate >> 32 * offset & MASK)
        elif operand.constant[1] >= 0 or operand.constant[0] >= 0:
            row, start = operand.constant
            if row < 0:
                value = np.full(32, self.constant(start + 4 * offset))
            else:
                at = self.values[row]
                value = np.array([self.constant(int(i) + start + 4 * offset) if i >= 0 else UNKNOWN for i in at])
        else:
            return np.full(32, UNKNOWN)
        if operand.sign:
            value = np.where(value < 0, UNKNOWN, (-value if operand.sign == "-" else ~value) & MASK)
        return value

    def read_pair(self, operand: Operand) -> tuple[np.ndarray, np.ndarray]:
        """64-bit values, and a doubt that is negative where they are not known."""
        bare = operand._replace(sign="")
        low, high = self.read(bare), self.read(bare, 1)
        value = high << 32 | (low & MASK)
        return (-value if operand.sign == "-" else value), low | high

    def address(self, operand: Operand) -> np.ndarray | None:
        """Where an access to shared memory goes; None if that is not known in all active lanes."""
        terms = address_terms(operand.text)
        if terms is None:
            return None
        total = np.full(32, terms[1])
        for row, factor in terms[0]:
            value = self.values[row]
            if (value[self.active] < 0).any():
                return None
            total = total + value * factor
        return total & MASK

    # -- execution

    def decode(self, instruction: Instruction) -> Decoded:
        name, *modifiers = instruction.opcode.split(".")
        operands = [parse(text) for text in instruction.operands]
        method = getattr(self, "_" + name.removeprefix("U").lower(), None)
        guard = parse(instruction.guard.removeprefix("@")) if instruction.guard else None
        modifiers = frozenset(modifiers)
        targets = targets_of(name, modifiers, operands)
        return Decoded(
            name, modifiers, operands, guard, method, targets, name.startswith("U") or name in ("R2UR", "S2UR")
        )

    def guarded(self, guard: Operand | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Active lanes that execute, and those of which it is not known."""
        if guard is None or guard.row in TRUES and not guard.sign:
            return self.active, None
        value = self.read(guard)
        doubtful = self.active & (value < 0)
        return self.active & (value == 1), doubtful if doubtful.any() else None

    def execute(self, instruction: Decoded) -> None:
        """One instruction that is no branch. Under a guard that is not known, what it writes is not known."""
        targets, guard = instruction.targets, instruction.guard
        if not targets:
            return
        if guard is None and (self._all_active or instruction.uniform):
            lanes, doubtful = None, None  # all
        else:
            lanes, doubtful = self.guarded(guard)
            if doubtful is not None:
                self.values[np.ix_(targets, doubtful)] = UNKNOWN
            if not lanes.any():
                return
            if instruction.uniform:
                lanes = None
        written = instruction.execute(instruction.modifiers, instruction.operands) if instruction.execute else None
        if written is None:
            if lanes is None:
                self.values[targets] = UNKNOWN
            else:
                self.values[np.ix_(targets, lanes)] = UNKNOWN
            return
        for row, value, doubt in written:
            if row in ZEROS or row in TRUES:
                continue
            value = np.where(doubt < 0, UNKNOWN, value & MASK)
            if lanes is None:
                self.values[row] = value
            else:
                self.values[row, lanes] = value[lanes]

    # -- instructions: each returns what it writes, or None if that is not known

    def _one(self, operand: Operand, value: np.ndarray, doubt: np.ndarray) -> Written:
        return [(operand.row, value, doubt)]

    def _split(self, operands):
        """(register written, predicates written, sources, predicates read)."""
        first = next(i for i in range(1, len(operands)) if not operands[i].is_predicate)
        last = next((i for i in range(first, len(operands)) if operands[i].is_predicate), len(operands))
        return operands[0], operands[1:first], operands[first:last], operands[last:]

    def _carry(self, predicates) -> tuple[np.ndarray, np.ndarray]:
        total, doubt = np.zeros(32, np.int64), np.zeros(32, np.int64)
        for predicate in predicates:
            value = self.read(predicate)
            total, doubt = total + value, doubt | value
        return total, doubt

    def _mov(self, modifiers, operands):
        value = self.read(operands[1])
        return self._one(operands[0], value, value)

    def _hfma2(self, modifiers, operands):
        """ptxas makes constants of it: HFMA2.MMA R0, -RZ, RZ, 1.875, 0 is 0x3f800000."""
        if len(operands) != 5 or not operands[1].row == operands[2].row == ZERO:
            return None
        try:
            halves = [int(np.float16(operand.text).view(np.uint16)) for operand in operands[3:]]
        except ValueError:
            return None
        value = np.full(32, halves[0] << 16 | halves[1])
        return self._one(operands[0], value, value)

    def _sel(self, modifiers, operands):
        chosen = self.read(operands[3])
        value = np.where(chosen == 1, self.read(operands[1]), self.read(operands[2]))
        return self._one(operands[0], value, value | chosen)

    _fsel = _sel

    def _s2r(self, modifiers, operands):
        value = self.special.get(operands[1].text)
        return None if value is None else self._one(operands[0], value, value)

    _s2ur = _s2r

    def _cs2r(self, modifiers, operands):
        if operands[1].text != "SRZ":
            return None
        zero = np.zeros(32, np.int64)
        return [(operands[0].row + i, zero, zero) for i in range(1 if "32" in modifiers else 2)]

    def _r2ur(self, modifiers, operands):
        if len(operands) != 2:
            return None
        value = np.full(32, self.read(operands[1])[self.active.argmax()])
        return self._one(operands[0], value, value)

    def _ldc(self, modifiers, operands):
        size = bytes_per_lane(modifiers)
        if modifiers - {"U8", "U16", "64"}:
            return None
        if size >= 4:
            values = [self.read(operands[1], offset) for offset in range(size // 4)]
            return [(operands[0].row + i, value, value) for i, value in enumerate(values)]
        if operands[1].constant[0] >= 0:
            return None
        value = np.full(32, self.constant(operands[1].constant[1], size))
        return self._one(operands[0], value, value)

    def _imad(self, modifiers, operands):
        target, carry_out, (a, b, c), carry_in = self._split(operands)
        wide = modifiers & {"WIDE", "HI"}
        x, y = self.read(a), self.read(b)
        addend, doubt = self.read_pair(c) if wide else (self.read(c),) * 2
        carry, carry_doubt = self._carry(carry_in)
        doubt = doubt | x | y | carry_doubt
        if wide and "U32" not in modifiers:
            x, y = signed(x), signed(y)
        product = x * y
        total = product + addend + carry
        if "HI" in modifiers:
            written = [(target.row, total >> 32, doubt)]
        elif wide:
            written = [(target.row, total, doubt), (target.row + 1, total >> 32, doubt)]
        elif carry_out:
            return None
        else:
            return [(target.row, total, doubt)]
        over = unsigned64(total) < unsigned64(product)
        over |= (carry > 0) & (unsigned64(total) == unsigned64(product))
        return written + [(predicate.row, over, doubt) for predicate in carry_out]

    def _iadd3(self, modifiers, operands):
        target, carry_out, sources, carry_in = self._split(operands)
        total, doubt = self._carry(carry_in)
        for source in sources:
            value = self.read(source._replace(sign=""))
            doubt = doubt | value
            total = total + {"-": (~value & MASK) + 1, "~": ~value & MASK, "": value}[source.sign]
        # Three operands carry twice, which takes two predicates; what reads them adds both.
        carries = total >> 32
        carries_doubt = np.where(carries > max(len(carry_out), 1), UNKNOWN, doubt)
        return [
            (target.row, total, doubt),
            *((predicate.row, carries > i, carries_doubt) for i, predicate in enumerate(carry_out)),
        ]

    _viadd = _iadd3

    def _viaddmnmx(self, modifiers, operands):
        a, b, c = (self.read(operand) for operand in operands[1:4])
        doubt = a | b
        return self._minimum(modifiers, operands[0], np.where(doubt < 0, UNKNOWN, a + b & MASK), c, operands[4])

    def _imnmx(self, modifiers, operands):
        return self._minimum(modifiers, operands[0], self.read(operands[1]), self.read(operands[2]), operands[3])

    _vimnmx = _imnmx

    def _minimum(self, modifiers, target, a, b, smaller):
        least = self.read(smaller)
        key = (lambda value: value) if "U32" in modifiers else signed
        a_is_less = key(a) < key(b)
        return self._one(target, np.where(a_is_less == (least == 1), a, b), a | b | least)

    def _iabs(self, modifiers, operands):
        value = self.read(operands[1])
        return self._one(operands[0], abs(signed(value)), value)

    def _lea(self, modifiers, operands):
        target, carry_out, sources, carry_in = self._split(operands)
        carry, doubt = self._carry(carry_in)
        a, b, *high, shift = (self.read(source) for source in sources)
        shift = int(shift[0])
        doubt = doubt | a | b
        if "HI" not in modifiers:
            total = (a << shift & MASK) + b
        else:
            wide = a & MASK
            if "SX32" in modifiers:
                wide = signed(a)
            elif high:
                wide, doubt = wide | high[0] << 32, doubt | high[0]
            total = (wide << shift >> 32 & MASK) + b + (carry if "X" in modifiers else 0)
        return [(target.row, total, doubt), *((predicate.row, total >> 32, doubt) for predicate in carry_out[:1])]

    def _shf(self, modifiers, operands):
        low, shift, high = (self.read(operand) for operand in operands[1:4])
        doubt = low | shift | high
        if "W" in modifiers:
            shift = shift & (63 if modifiers & {"U64", "S64"} else 31)
        far = shift > 63
        shift = np.clip(shift, 0, 63)
        if modifiers & {"U64", "S64"}:
            wide = high << 32 | (low & MASK)
            if "L" in modifiers:
                wide = np.where(far, 0, wide << shift)
            elif "S64" in modifiers:
                wide = wide >> shift
            else:
                wide = np.where(far, 0, unsigned64(wide) >> unsigned64(shift)).astype(np.int64)
            return self._one(operands[0], wide >> 32 if "HI" in modifiers else wide, doubt)
        if "L" in modifiers:
            return None if "HI" in modifiers else self._one(operands[0], np.where(shift > 31, 0, low << shift), doubt)
        if "HI" not in modifiers:
            return None
        return self._one(operands[0], (signed(high) if "S32" in modifiers else high & MASK) >> shift, doubt)

    def _lop3(self, modifiers, operands):
        written = 2 if operands[0].is_predicate else 1
        *sources, table = operands[written : written + 4]
        a, b, c = (self.read(source) for source in sources)
        result = np.zeros(32, np.int64)
        for minterm in range(8):
            if table.immediate >> minterm & 1:
                result |= (a if minterm & 4 else ~a) & (b if minterm & 2 else ~b) & (c if minterm & 1 else ~c)
        result &= MASK
        doubt = a | b | c
        return self._one(operands[written - 1], result, doubt) + (
            self._one(operands[0], result != 0, doubt) if written == 2 else []
        )

    def _plop3(self, modifiers, operands):
        a, b, c = (self.read(operand) for operand in operands[2:5])
        minterm, doubt = 4 * a + 2 * b + c, a | b | c
        return [
            (target.row, table.immediate >> np.clip(minterm, 0, 7) & 1, doubt)
            for target, table in zip(operands[:2], operands[5:7])
        ]

    def _isetp(self, modifiers, operands):
        first, second, left, right, other, *low = operands
        a, b, other = self.read(left), self.read(right), self.read(other)
        doubt = a | b
        if "U32" not in modifiers:
            a, b = signed(a), signed(b)
        result = COMPARE[next(m for m in modifiers if m in COMPARE)](a, b).astype(np.int64)
        if "EX" in modifiers:  # the lower halves decide if these are equal
            below = self.read(low[0])
            result, doubt = np.where(a == b, below, result), doubt | np.where(a == b, below, 0)

        def combine(value):
            if "AND" in modifiers:
                return value & other, np.where(other == 0, 0, doubt | other)
            if "OR" in modifiers:
                return value | other, np.where(other == 1, 0, doubt | other)
            return value ^ other, doubt | other

        return [(first.row, *combine(result & 1)), (second.row, *combine(result & 1 ^ 1))]

    def _i2f(self, modifiers, operands):
        if modifiers - {"RP", "U32", "S32", "U64", "S64"}:
            return None
        if modifiers & {"U64", "S64"}:
            value, doubt = self.read_pair(operands[1])
            value = value if "S64" in modifiers else unsigned64(value)
        else:
            doubt = self.read(operands[1])
            value = doubt & MASK if "U32" in modifiers else signed(doubt)
        rounded = value.astype(np.float32)
        if "RP" in modifiers:
            below = np.array([int(r) < int(v) for r, v in zip(rounded, value)])
            rounded = np.where(below, np.nextafter(rounded, np.float32(np.inf)), rounded)
        return self._one(operands[0], float_bits(rounded), doubt)

    def _mufu(self, modifiers, operands):
        bits = self.read(operands[1])
        if modifiers != {"RCP"}:
            return None
        value = bits_float(bits)
        return self._one(operands[0], float_bits(1 / np.where(value == 0, 1, value)), np.where(value == 0, -1, bits))

    def _f2i(self, modifiers, operands):
        bits = self.read(operands[1])
        if "TRUNC" not in modifiers or not modifiers & {"U32", "U64"}:
            return None
        value = bits_float(bits)
        finite = np.where(np.isfinite(value), value, 0)
        bits = np.where(np.isfinite(value), bits, -1)
        limit = 2 ** (64 if "U64" in modifiers else 32) - 1
        whole = unsigned64(np.array([min(max(int(v), 0), limit) for v in finite], dtype=object))
        low, high = (whole & np.uint64(MASK)).astype(np.int64), (whole >> np.uint64(32)).astype(np.int64)
        return [(operands[0].row, low, bits)] + ([(operands[0].row + 1, high, bits)] if "U64" in modifiers else [])

    def _fchk(self, modifiers, operands):
        """Whether a quotient of floats needs the long way. It is taken for an ordinary one, which does not."""
        false = np.zeros(32, np.int64)
        return self._one(operands[0], false, false)

    def _prmt(self, modifiers, operands):
        if modifiers:
            return None
        low, selector, high = (self.read(operand) for operand in operands[1:4])
        source = unsigned64(high << 32 | (low & MASK))
        result = np.zeros(32, np.int64)
        for i in range(4):
            chosen = selector >> 4 * i
            byte = (source >> unsigned64(8 * (chosen & 7)) & np.uint64(255)).astype(np.int64)
            byte = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte)
            result |= byte << 8 * i
        return self._one(operands[0], result, low | selector | high)

    def _p2r(self, modifiers, operands):
        base, mask = self.read(operands[2]), self.read(operands[3])
        if modifiers:
            return None
        packed, doubt = np.zeros(32, np.int64), base | mask
        for i in range(7):
            bit = self.values[row_of(f"P{i}")]
            used = mask >> i & 1
            packed, doubt = packed | (bit & 1) << i, doubt | np.where(used == 1, bit, 0)
        return self._one(operands[0], base & ~mask | packed & mask, doubt)

    def _r2p(self, modifiers, operands):
        value, mask = self.read(operands[1]), int(self.read(operands[2])[0])
        if modifiers or mask < 0:
            return None
        return [(row_of(f"P{i}"), value >> i & 1, value) for i in range(7) if mask >> i & 1]

    def _popc(self, modifiers, operands):
        value = self.read(operands[1])
        return self._one(operands[0], sum(value >> i & 1 for i in range(32)), value)

    def _flo(self, modifiers, operands):
        value = self.read(operands[-1])
        if modifiers - {"U32"} or "U32" not in modifiers or operands[0].is_predicate:
            return None
        found = np.array([int(v).bit_length() - 1 & MASK if v >= 0 else 0 for v in value])
        return self._one(operands[0], found, value)

    def _bmsk(self, modifiers, operands):
        start, width = self.read(operands[1]), self.read(operands[2])
        bits = (1 << np.clip(width, 0, 32)) - 1
        return self._one(operands[0], np.where(start > 31, 0, bits << np.clip(start, 0, 31)), start | width)

    def _vote(self, modifiers, operands):
        """VOTE.ANY R0, P0, P1: the lanes whose predicate holds, and whether any (ALL: all) of them do; either target
        may be missing."""
        *targets, source = operands
        value = self.read(source)
        doubt = value if (value[self.active] < 0).any() else np.zeros(32, np.int64)
        doubt = np.full(32, doubt.min())
        holds = self.active & (value == 1)
        decided = holds.any() if "ANY" in modifiers else holds[self.active].all()
        if not modifiers & {"ANY", "ALL"}:
            return None
        ballot = np.full(32, int((holds.astype(np.int64) << LANES).sum()))
        return [(t.row, np.full(32, int(decided)) if t.is_predicate else ballot, doubt) for t in targets]

    def _shfl(self, modifiers, operands):
        """The upper bits of the last operand cut the warp into segments, the lower ones bound them."""
        within, target, source, by, bounds = operands
        value, by, bounds = self.read(source), self.read(by), self.read(bounds)
        if (by < 0).any() or (bounds < 0).any():
            return None
        clamp, segment = bounds & 31, bounds >> 8 & 31
        highest = LANES & segment | clamp & ~segment
        if "IDX" in modifiers:
            lane = LANES & segment | by & 31 & ~segment
        else:
            lane = {"UP": LANES - by, "DOWN": LANES + by, "BFLY": LANES ^ by}[
                next(m for m in modifiers if m in ("UP", "DOWN", "BFLY"))
            ]
        valid = lane >= highest if "UP" in modifiers else lane <= highest
        lane = np.where(valid, lane, LANES) & 31
        moved = np.where(self.active[lane], value[lane], UNKNOWN)
        return [(within.row, valid, np.zeros(32, np.int64)), (target.row, moved, moved)]
