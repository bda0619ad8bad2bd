"""Executes the machine code of a kernel (warp.py), to learn which instructions its warps issue and how shared memory
serves them.

A static count of the instructions says little: a kernel holds slow paths, loops and code that runs once. So `trace`
executes each warp of a block, from the kernel's parameters and the thread index. Every instruction it passes was
issued, guarded or not. Lanes that part at a branch run one after the other until they meet again (BSSY, BSYNC). A
branch that an unknown value decides raises UndecidedError: nothing is guessed.

An access to shared memory takes as many wavefronts as the fullest of the 32 banks, each 4 bytes wide, has different
words; of 8 bytes each half of the warp by itself, of 16 bytes each quarter, of ldmatrix each 8 rows.

Encodings differ between architectures, their names hardly: sm_80 to sm_90a are covered.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
from sass import PIPE_OF, Instruction
from warp import LANES, Decoded, Warp, bytes_per_lane

CONSTANTS = {8: 0x160, 9: 0x210}  # where kernel parameters start in constant bank 0, by major architecture
GRID_X = 0x0C  # where gridDim.x is there
MOST_STEPS = 4_000_000
BANKS = 32  # shared memory has so many, 4 bytes wide
BYTES_PER_WAVEFRONT = 128  # that the load/store unit moves per cycle


class UndecidedError(RuntimeError):
    """The path of a kernel depends on what is not known before it runs, or on an instruction that is not covered."""


class Step(NamedTuple):
    """An instruction that a warp issues."""

    index: int  # in the kernel
    wavefronts: int  # that the load/store unit takes


# ------------------------------------------------------------------------------------------------ shared memory


def conflicts(addresses: np.ndarray, lanes: np.ndarray, bytes_per_lane: int, group: int) -> int:
    """Wavefronts of an access to shared memory whose lanes are served in groups."""
    if not lanes.any():
        return 0
    active = addresses[lanes]
    if (active == active[0]).all():
        return 1
    words = addresses[:, None] // 4 + np.arange(max(1, bytes_per_lane // 4))
    total = 0
    for first in range(0, 32, group):
        chosen = np.unique(words[first : first + group][lanes[first : first + group]])
        if chosen.size:
            total += np.bincount(chosen % BANKS).max()
    return int(total)


def wavefronts(warp: Warp, instruction: Decoded) -> int:
    """That the load/store unit of the SM needs. Shared memory without conflicts if addresses are not known."""
    name, modifiers = instruction.name, instruction.modifiers
    if PIPE_OF.get(name) != "lsu":
        return 0
    if name in ("SHFL", "ATOMS", "RED", "ATOMG", "ATOM"):
        return 1
    lanes, doubtful = warp.guarded(instruction.guard)
    if doubtful is not None:
        lanes = lanes | doubtful
    if name in ("LDG", "STG", "LDL", "STL", "LD", "ST", "LDGSTS"):
        return math.ceil(int(lanes.sum()) * bytes_per_lane(modifiers) / BYTES_PER_WAVEFRONT)
    if name in ("LDSM", "STSM"):
        matrices = int(next((m for m in modifiers if m in ("2", "4")), "1"))
        lanes, size, group = lanes & (matrices > LANES // 8), 16, 8
    elif name in ("LDS", "STS"):
        size = bytes_per_lane(modifiers)
        group = {8: 16, 16: 8}.get(size, 32)
    else:
        return 0
    place = next(operand for operand in instruction.operands if operand.text.startswith("["))
    addresses = warp.address(place)
    if addresses is None:
        return max(1, math.ceil(int(lanes.sum()) * size / BYTES_PER_WAVEFRONT))
    return conflicts(addresses, lanes, size, group)


# ------------------------------------------------------------------------------------------------ control flow

CONTROL_FLOW = {"BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "BMOV", "WARPSYNC", "BAR"}
NOT_COVERED = {"BRX", "BRXU", "JMP", "JMX", "JMXU", "KILL"}


class Group(NamedTuple):
    """Lanes of a warp that run together."""

    at: int
    lanes: np.ndarray


class Convergence:
    """The lanes of a warp that wait for each other, and those that are to run."""

    def __init__(self):
        self.alive = np.ones(32, bool)
        self.members: dict[str, np.ndarray] = {}  # by convergence barrier, B0 to B15
        self.waiting: dict[str, list[Group]] = {}  # by barrier
        self.ready: list[Group] = []

    def next_group(self) -> Group | None:
        """Lanes that have met, or else others; None after the last has ended."""
        for barrier, groups in self.waiting.items():
            lanes = np.logical_or.reduce([group.lanes for group in groups])
            members = self.members.get(barrier, self.alive) & self.alive
            if not (members & ~lanes).any():
                del self.waiting[barrier]
                return Group(groups[0].at, lanes)
        if self.ready:
            return self.ready.pop()
        if self.waiting:
            raise UndecidedError(f"lanes wait for others that do not come: {', '.join(self.waiting)}")
        return None


def trace_warp(instructions: list[Instruction], warp: Warp) -> list[Step]:
    index_of = {instruction.address: i for i, instruction in enumerate(instructions)}
    decoded: list[Decoded | None] = [None] * len(instructions)
    state, steps = Convergence(), []
    group: Group | None = Group(0, state.alive)
    while group is not None:
        at, warp.active = group
        while warp.active.any():
            if (instruction := decoded[at]) is None:
                instruction = decoded[at] = warp.decode(instructions[at])
            if len(steps) >= MOST_STEPS:
                raise UndecidedError(f"no end after {MOST_STEPS} instructions of a warp")
            steps.append(Step(at, wavefronts(warp, instruction)))
            if instruction.name in NOT_COVERED or "COLLECTIVE" in instruction.modifiers:
                raise UndecidedError(f"{where(instructions[at])} is not covered")
            if instruction.name in CONTROL_FLOW:
                at = control(instructions[at], instruction, at, warp, state, index_of)
            else:
                warp.execute(instruction)
                at += 1
        group = state.next_group()
    return steps


def where(instruction: Instruction) -> str:
    return f"{instruction.opcode} at {instruction.address:#x}"


def taken_lanes(source: Instruction, instruction: Decoded, warp: Warp) -> np.ndarray:
    """Active lanes for which all conditions hold: the guard, and a branch's predicates."""
    conditions = [instruction.guard] if instruction.guard else []
    conditions += [operand for operand in instruction.operands if operand.is_predicate]
    values = [warp.read(condition) for condition in conditions]
    holds = np.logical_and.reduce([warp.active, *(value == 1 for value in values)])
    fails = np.logical_or.reduce([~warp.active, *(value == 0 for value in values)])
    if not (holds | fails).all():
        texts = [source.guard, *(operand.text for operand in instruction.operands if operand.is_predicate)]
        raise UndecidedError(f"{where(source)}: {' '.join(filter(None, texts))} is not known")
    if "DIV" in instruction.modifiers:  # taken by a warp whose lanes have parted
        holds = holds & (bits_of(warp.active) != warp.read(instruction.operands[0]))
    return holds


def control(source: Instruction, instruction: Decoded, at: int, warp: Warp, state: Convergence, index_of) -> int:
    """Executes a branch or barrier; returns where the active lanes go on, of which there may be none."""
    name, operands = instruction.name, instruction.operands
    lanes = taken_lanes(source, instruction, warp)
    following = at + 1
    if name in ("BRA", "CALL", "RET"):
        if not lanes.any():
            return following
        target = operands[-1].text
        address = int(target[1:], 16) if target.startswith("@") else None
        if name == "RET":
            found = np.unique(warp.read(operands[0])[lanes])
            address = int(found[0]) if len(found) == 1 else None
        if address not in index_of:
            raise UndecidedError(f"{where(source)}: unknown target {target}")
        if (others := warp.active & ~lanes).any():
            state.ready.append(Group(following, others))
            warp.active = lanes
        return index_of[address]
    if name == "EXIT":
        state.alive = state.alive & ~lanes
        warp.active = warp.active & ~lanes
    elif name == "BSSY":
        state.members[operands[0].text] = warp.active
    elif name == "BREAK":
        state.members[operands[-1].text] = state.members[operands[-1].text] & ~lanes
    elif name == "BMOV":
        target, moved = operands
        if target.row >= 0:
            warp.values[target.row, lanes] = bits_of(state.members.get(moved.text, warp.active))
        else:
            state.members[target.text] = (int(warp.read(moved)[lanes.argmax()]) >> LANES & 1).astype(bool)
    elif lanes.any() and (warp.active != state.alive).any():  # BSYNC, WARPSYNC, BAR: where lanes meet
        barrier = operands[0].text if name == "BSYNC" else where(source)
        state.waiting.setdefault(barrier, []).append(Group(following, warp.active))
        warp.active = warp.active & False
    return following


def bits_of(lanes: np.ndarray) -> int:
    return int((lanes.astype(np.int64) << LANES).sum())


def is_covered(architecture: int) -> bool:
    return architecture // 10 in CONSTANTS


def trace(
    instructions: list[Instruction], params: bytes, architecture: int, warps: int, blocks: int = 1
) -> list[list[Step]]:
    """What each warp of the first block of a launch issues.

    Args:
        params: the kernel's parameters as they lie in memory.
        architecture: 80 for sm_80.
        warps: per block.
        blocks: of the launch, along x.

    Raises:
        UndecidedError: see the module.
    """
    if not is_covered(architecture):
        raise UndecidedError(f"sm_{architecture} is not covered")
    constants = dict(enumerate(blocks.to_bytes(4, "little"), GRID_X))
    constants |= dict(enumerate((32 * warps).to_bytes(4, "little")))
    constants |= dict(enumerate(params, CONSTANTS[architecture // 10]))
    zeros = dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"), 0)
    special = zeros | {"SR_LANEID": LANES}
    with np.errstate(all="ignore"):  # lanes whose values are not known overflow and divide by zero
        return [
            trace_warp(instructions, Warp(constants, special | {"SR_TID.X": 32 * warp + LANES}))
            for warp in range(warps)
        ]


def opcodes(instructions: list[Instruction], steps: list[list[Step]]) -> Counter:
    """How often each opcode is issued by the warps."""
    visits = Counter(step.index for warp in steps for step in warp)
    result: Counter = Counter()
    for index, times in visits.items():
        result[instructions[index].opcode] += times
    return result
