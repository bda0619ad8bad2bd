"""A cycle model of one SM: how long the warps that live on it need for their traces (warp_trace.py).

Each quarter of an SM issues at most one instruction per cycle, of the warp that issued last if that one is ready, else
of the youngest. A warp is ready for its next instruction

* after the stall count of the one before; after a branch that is taken also TAKEN_BRANCH cycles,
* when the scoreboards that it waits for are free (sass.py): LATENCY cycles after the instruction that holds them was
  dispatched, more if shared memory takes several wavefronts,
* when its pipe is free: a Device says for how many cycles an instruction occupies one,
* for load/store and MUFU, which wait for their pipe in a queue, when that queue has room (QUEUE). The load/store unit
  is one for the whole SM and takes one wavefront per cycle,
* after a barrier, when all warps of its block have come, and BARRIER cycles.

Sources of the constants: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking" (2024), for shared memory and tensor cores; Jia et al. (2018) for Volta, whose issue logic is that of
all later ones; Huerta et al., "Analyzing Modern NVIDIA GPU Cores" (2025), for the order of warps and the queue. LDC,
MUFU, S2R, branches and barriers are taken as they were on Volta and Ampere, not measured on Hopper.

Left out: DRAM bandwidth (the kernel report sets memory time beside the model's) and its contention, misses of the
instruction cache, conflicts of register banks and the reuse cache, the L1 cache's tags, the yield bit, the first and
the last work tile of a block. Expect a GPU to need 3 to 10 % longer.
"""

import heapq
import math
from collections import Counter, deque
from typing import NamedTuple

from sass import NO_SCOREBOARD, PIPE_OF, Instruction
from warp_trace import Step, UndecidedError


class Device(NamedTuple):
    """Clock and bandwidth, and the cycles for which a warp's instruction occupies a pipe of a quarter of an SM."""

    target: str
    ghz: float
    gb_per_s: float
    note: str
    tensor: float
    fma: float
    half: float
    alu: float = 2
    mufu: float = 8
    imad: float = 2


# Throughputs: CUDA C++ Programming Guide, "Arithmetic Instructions". Tensor cores: the vendor's peak of dense float16
# with float32 sums; on sm_90, whose peak takes wgmma, 62 % of it (Luo et al.).
DEVICES = {
    "H200": Device("sm_90a", 1.755, 4300, "4.3 TB/s, measured copy; 60 MB L2", tensor=6.5, fma=1, half=1),
    "H100": Device("sm_90a", 1.755, 3000, "3.0 TB/s, measured copy; 50 MB L2", tensor=6.5, fma=1, half=1),
    "A100": Device("sm_80", 1.41, 2039, "80 GB, 2.039 TB/s by data sheet", tensor=8, fma=2, half=1),
    "RTX 4090": Device("sm_89", 2.52, 1008, "1.008 TB/s by data sheet", tensor=32, fma=1, half=2),
}

LATENCIES = {  # cycles from dispatch to result, where ptxas has a scoreboard wait for it
    "LDS LDSM SHFL ATOMS": 29,
    "LDG LD LDL LDGSTS ATOM ATOMG": 1200,  # DRAM under load
    "MUFU I2F F2I F2F POPC FLO BREV": 24,
    "LDC R2UR": 40,
}
LATENCY = {name: cycles for names, cycles in LATENCIES.items() for name in names.split()}
OTHER_LATENCY = 30  # S2R and the like
READ_LATENCY = 12  # from dispatch until the sources are read
TAKEN_BRANCH = 10  # besides the stall count
BARRIER = 20
QUEUE = 5  # instructions of a quarter that wait for the load/store unit or MUFU
NEVER = 1 << 60
FEWEST_ISSUED = 60_000  # instructions of a simulation, after which its figures change by less than 1 %

# Why a warp waits, in the words of Nsight Compute.
REASON_OF = {"LDC": "imc_miss", "ULDC": "imc_miss", "LDG": "long_scoreboard", "LD": "long_scoreboard"}


class Operation(NamedTuple):
    """What the model needs to know of an instruction."""

    stall: int
    waits: tuple[int, ...]  # for scoreboards
    write_scoreboard: int
    read_scoreboard: int
    pipes: tuple[tuple[int, float], ...]  # (pipe, cycles that it is occupied)
    queue: str  # "lsu", "mufu" or empty
    latency: int
    reason: str  # why a warp waits for its result
    is_barrier: bool


BLOCKING_PIPES = ("tensor", "fma", "half", "alu", "imad")


def operation(instruction: Instruction, device: Device) -> Operation:
    name, control = instruction.name, instruction.control
    pipe = PIPE_OF.get(name)
    if pipe is None:
        raise UndecidedError(f"{instruction.opcode} at {instruction.address:#x}: no pipe is known")
    pipes = [(BLOCKING_PIPES.index(pipe), getattr(device, pipe))] if pipe in BLOCKING_PIPES else []
    if name == "IMAD":
        pipes.append((BLOCKING_PIPES.index("imad"), device.imad))
    return Operation(
        max(control.stall, 1),
        tuple(i for i in range(6) if control.wait_mask >> i & 1),
        control.write_scoreboard,
        control.read_scoreboard,
        tuple(pipes),
        pipe if pipe in ("lsu", "mufu") else "",
        LATENCY.get(name, OTHER_LATENCY),
        REASON_OF.get(name, "short_scoreboard"),
        name == "BAR" and "ARV" not in instruction.opcode,
    )


def steady_state(few: list[Step], many: list[Step]) -> list[Step]:
    """What a warp repeats: the steps that `many`, its trace for more work, has and `few` has not.

    Raises:
        UndecidedError: more work is not the same steps and some between them.
    """
    length = len(many) - len(few)
    same = next((i for i, (a, b) in enumerate(zip(few, many)) if a != b), len(few))
    # The traces part when the shorter one ends its loop; what follows there is the longer one's end as well.
    if length <= 0 or few[same:] != many[same + length :]:
        raise UndecidedError("the kernel does not repeat itself from one work tile to the next")
    return many[same : same + length]


class Result(NamedTuple):
    """How an SM spends its time in steady state."""

    cycles: float  # until every block has once done what it repeats
    issue: float  # share of the issue slots in use
    reasons: dict[str, float]  # shares of the warps' time, the largest first; "selected": a warp issues


class Warp:
    """A resident warp, which starts its steps anew when it is done with them."""

    def __init__(self, block: int, steps: list[Step], start: int):
        self.block, self.steps, self.at, self.issued = block, steps, 0, 0
        self.last = start - 1  # cycle of the last issue
        self.fixed = self.ready = start  # next issue by the stall count; by scoreboards and barriers too
        self.held = "short_scoreboard"  # why `ready` is later than `fixed`
        self.branch = 0  # cycles of `fixed` that are a branch's
        self.free = [0] * 6  # when each scoreboard is free
        self.holder = [self.held] * 6


class Sm:
    """Four schedulers with their pipes and queues, and the load/store unit that they share."""

    def __init__(self, operations: dict[int, Operation], device: Device, block: list[list[Step]], blocks: int):
        self.operations, self.mufu_cycles = operations, device.mufu
        # Blocks do not run in step: their starts are spread over the time that issue slots take for one round.
        round_cycles = sum(map(len, block)) * blocks // 4
        self.blocks = [[Warp(i, steps, round_cycles * i // blocks) for steps in block] for i in range(blocks)]
        self.warps = [warp for members in self.blocks for warp in members]
        self.quarters = [self.warps[quarter::4] for quarter in range(4)]
        self.pipe_free = [[0.0] * len(BLOCKING_PIPES) for _ in range(4)]
        self.mufu_free = [0.0] * 4
        self.lsu_free = 0.0
        self.queues: list[deque[float]] = [deque() for _ in range(4)]
        self.arrived = [0] * blocks
        self.reasons: Counter = Counter()

    def eligible(self, quarter: int, warp: Warp) -> int:
        """The first cycle in which the warp may issue, if no other does before."""
        operation, cycle = self.operations[warp.steps[warp.at].index], warp.ready
        for pipe, _ in operation.pipes:
            cycle = max(cycle, math.ceil(self.pipe_free[quarter][pipe]))
        if operation.queue:
            queue = self.queues[quarter]
            while queue and queue[0] <= cycle:
                queue.popleft()
            if len(queue) >= QUEUE:
                cycle = math.ceil(queue[-QUEUE])
        return cycle

    def issue(self, quarter: int, warp: Warp, cycle: int) -> bool:
        """Issues the warp's instruction; returns whether that ends a barrier."""
        index, wavefronts = warp.steps[warp.at]
        operation = self.operations[index]
        self.account(quarter, warp, operation, cycle)
        dispatched: float = cycle
        if operation.queue == "lsu":
            dispatched = max(cycle + 1, self.lsu_free)
            self.lsu_free = dispatched + wavefronts
        elif operation.queue == "mufu":
            dispatched = max(cycle + 1, self.mufu_free[quarter])
            self.mufu_free[quarter] = dispatched + self.mufu_cycles
        if operation.queue:
            self.queues[quarter].append(dispatched)
        for pipe, cycles in operation.pipes:
            free = self.pipe_free[quarter][pipe]
            self.pipe_free[quarter][pipe] = (free if free > cycle - 1 else cycle) + cycles  # keeps its fraction
        written = math.ceil(dispatched) + operation.latency + max(0, wavefronts - 1)
        read = math.ceil(dispatched) + READ_LATENCY
        for scoreboard, until, reason in (
            (operation.write_scoreboard, written, operation.reason),
            (operation.read_scoreboard, read, "short_scoreboard"),
        ):
            if scoreboard != NO_SCOREBOARD and until > warp.free[scoreboard]:
                warp.free[scoreboard], warp.holder[scoreboard] = until, reason
        warp.last, warp.issued, warp.at = cycle, warp.issued + 1, (warp.at + 1) % len(warp.steps)
        warp.branch = TAKEN_BRANCH if warp.steps[warp.at].index != index + 1 else 0
        warp.fixed = cycle + operation.stall + warp.branch
        if not operation.is_barrier:
            self.set_ready(warp)
            return False
        warp.ready = NEVER
        self.arrived[warp.block] += 1
        members = self.blocks[warp.block]
        if self.arrived[warp.block] < len(members):
            return False
        self.arrived[warp.block] = 0
        for member in members:
            self.set_ready(member)
            if member.ready < cycle + BARRIER:
                member.ready, member.held = cycle + BARRIER, "barrier"
        return True

    def set_ready(self, warp: Warp) -> None:
        warp.ready = warp.fixed
        for scoreboard in self.operations[warp.steps[warp.at].index].waits:
            if warp.free[scoreboard] > warp.ready:
                warp.ready, warp.held = warp.free[scoreboard], warp.holder[scoreboard]

    def account(self, quarter: int, warp: Warp, operation: Operation, cycle: int) -> None:
        """Why the warp did not issue in the cycles since its last instruction."""
        pipe_free = max((min(cycle, self.pipe_free[quarter][pipe]) for pipe, _ in operation.pipes), default=0)
        pipe_free = max(pipe_free, warp.ready)
        self.reasons["selected"] += 1
        self.reasons["wait"] += warp.fixed - warp.branch - warp.last - 1
        self.reasons["branch_resolving"] += warp.branch
        self.reasons[warp.held] += warp.ready - warp.fixed
        if operation.queue:  # not told from another warp's turn
            self.reasons["mio_throttle"] += cycle - warp.ready
        else:
            self.reasons["math_pipe_throttle"] += pipe_free - warp.ready
            self.reasons["not_selected"] += cycle - pipe_free

    def run(self, rounds: int) -> Result:
        """As many instructions as so many rounds of all warps have, after those of one round, which are not told."""
        events = [(0, quarter) for quarter in range(4)]
        last = [-1] * 4  # cycle of a quarter's last issue
        per_round = sum(len(warp.steps) for warp in self.warps)
        begin, now, issued = 0, 0, 0
        while issued < (1 + rounds) * per_round:
            now, quarter = heapq.heappop(events)
            if now <= last[quarter]:
                continue
            chosen, earliest = None, NEVER
            for warp in self.quarters[quarter]:
                cycle = self.eligible(quarter, warp)
                earliest = min(earliest, cycle)
                if cycle <= now:
                    chosen = warp
                    if warp.last == last[quarter]:
                        break
            if chosen is None:
                if earliest < NEVER:
                    heapq.heappush(events, (earliest, quarter))
                continue
            if self.issue(quarter, chosen, now):
                for other in range(4):
                    heapq.heappush(events, (now + BARRIER, other))
            heapq.heappush(events, (now + 1, quarter))
            last[quarter] = now
            issued += 1
            if issued == per_round:
                begin = now
                self.reasons.clear()
        window, total = now - begin, sum(self.reasons.values())
        reasons = {reason: count / total for reason, count in self.reasons.most_common()}
        return Result(window / rounds, rounds * per_round / (4 * window), reasons)


def simulate(instructions: list[Instruction], device: Device, block: list[list[Step]], blocks: int) -> Result:
    """An SM that holds so many blocks, each of whose warps repeats its steps."""
    used = {step.index for steps in block for step in steps}
    operations = {index: operation(instructions[index], device) for index in used}
    rounds = math.ceil(FEWEST_ISSUED / (blocks * sum(map(len, block))))  # at least one
    return Sm(operations, device, block, blocks).run(rounds)
