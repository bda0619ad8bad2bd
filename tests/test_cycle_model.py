"""The cycle model, by programs whose time can be told by hand. A round ends with a branch to its start."""

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cycle_model
from cycle_model import BARRIER, DEVICES, LATENCY, QUEUE, READ_LATENCY, TAKEN_BRANCH, simulate, steady_state
from sass import Control, Instruction
from warp_trace import Step, UndecidedError

DEVICE = DEVICES["H200"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(cycle_model, "FEWEST_ISSUED", 4000)


def instructions(*lines):
    """From (opcode, control)."""
    return [Instruction(16 * i, "", opcode, [], control) for i, (opcode, control) in enumerate(lines)]


def round_of(*lines, warps=1, blocks=1, device=DEVICE, wavefronts=0):
    """The cycles of a round of all warps, and the reasons to wait."""
    code = instructions(*lines, ("BRA", Control()))
    steps = [Step(i, wavefronts if "S" in line.opcode else 0) for i, line in enumerate(code)]
    result = simulate(code, device, [steps] * warps, blocks)
    return result.cycles, result


def test_stall_counts():
    """They are cycles until the next instruction; four warps of a quarter use each other's."""
    chain = [("FFMA", Control(stall=4))] * 50
    alone = 50 * 4 + 1 + TAKEN_BRANCH
    cycles, result = round_of(*chain)
    assert cycles == pytest.approx(alone, rel=0.01)
    assert result.reasons["wait"] == pytest.approx(150 / alone, rel=0.02)
    assert result.reasons["branch_resolving"] == pytest.approx(TAKEN_BRANCH / alone, rel=0.02)
    assert round_of(*chain, blocks=4)[0] == pytest.approx(alone, rel=0.01)  # one each for the four quarters
    assert round_of(*chain, blocks=8)[0] == pytest.approx(alone, rel=0.01)
    cycles, result = round_of(*chain, blocks=32)
    assert cycles == pytest.approx(8 * 51, rel=0.01) and result.issue == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    "opcode, name, expected",
    [
        ("FFMA", "H200", 1),
        ("FFMA", "A100", 2),
        ("IADD3", "H200", 2),
        ("IMAD", "H200", 2),
        ("HMMA.16816.F32", "H200", 6.5),
        ("MUFU.EX2", "H200", 8),
    ],
)
def test_pipes(opcode, name, expected):
    """Independent instructions follow each other as fast as their pipe takes them, whoever issues them."""
    for blocks in (1, 8):
        cycles, result = round_of(*[(opcode, Control())] * 200, blocks=blocks, device=DEVICES[name])
        assert cycles == pytest.approx(200 * expected * max(1, blocks // 4), rel=0.06)
    if expected > 1:
        assert next(iter(result.reasons)) == ("mio_throttle" if opcode[:4] == "MUFU" else "math_pipe_throttle")


def test_imad_leaves_half_of_the_fma_pipe():
    """FFMA uses it, and not more than that."""
    mixed = [("IMAD", Control()), ("FFMA", Control())] * 100
    assert round_of(*mixed, blocks=8)[0] == pytest.approx(2 * 200, rel=0.05)
    assert round_of(*[("IMAD", Control())] * 200, blocks=8)[0] == pytest.approx(2 * 400, rel=0.05)


@pytest.mark.parametrize(
    "opcode, reason", [("LDC", "imc_miss"), ("LDS", "short_scoreboard"), ("LDG", "long_scoreboard")]
)
def test_scoreboards(opcode, reason):
    """What waits for a result issues its latency after the load; the load is dispatched a cycle after its issue."""
    queued = opcode != "LDC"
    cycles, result = round_of((opcode, Control(1, 2)), ("FFMA", Control(1, 7, 7, 0b000100)))
    assert cycles == pytest.approx(queued + LATENCY[opcode] + 2 + TAKEN_BRANCH, rel=0.01)
    assert next(iter(result.reasons)) == reason
    cycles, _ = round_of((opcode, Control(1, 2)), ("FFMA", Control(1, 7, 7, 0b001000)))
    assert cycles == pytest.approx(3 + TAKEN_BRANCH, rel=0.01)


def test_sources_that_are_read_late():
    """A store frees its registers long before a load has its result."""
    cycles, _ = round_of(("STS", Control(1, 7, 1)), ("FFMA", Control(1, 7, 7, 0b000010)))
    assert cycles == pytest.approx(1 + READ_LATENCY + 2 + TAKEN_BRANCH, rel=0.01)


def test_load_store_unit_is_shared():
    """One wavefront per cycle for all quarters; conflicts also make the result late."""
    loads = [("LDS", Control())] * 100
    for warps in (4, 16):
        cycles, result = round_of(*loads, blocks=warps, wavefronts=3)
        assert cycles == pytest.approx(300 * warps, rel=0.05)
        assert next(iter(result.reasons)) == "mio_throttle"
    waits = ("LDS", Control(1, 2)), ("FFMA", Control(1, 7, 7, 0b000100))
    assert round_of(*waits, wavefronts=8)[0] == pytest.approx(round_of(*waits, wavefronts=1)[0] + 7)


def test_queue():
    """As many loads as it holds leave a warp free for other work; one more makes it wait."""
    work = [("FFMA", Control(1))] * 20

    def cycles(loads):
        return round_of(*[("LDS", Control(1))] * loads, *work, wavefronts=40)[0]

    free = QUEUE + 1  # one is under way
    assert cycles(2 * free) == pytest.approx(2 * free * 40, rel=0.02)
    code = instructions(*[("LDS", Control(1))] * (free + 1), ("FFMA", Control(1)))
    sm = cycle_model.Sm({i: cycle_model.operation(x, DEVICE) for i, x in enumerate(code)}, DEVICE, [[]], 1)
    warp = sm.warps[0]
    warp.steps = [Step(i, 40) for i in range(len(code))]
    issued = []
    for _ in range(free + 1):
        issued.append(max(issued[-1] + 1 if issued else 0, sm.eligible(0, warp)))
        sm.issue(0, warp, issued[-1])
    assert issued[:free] == list(range(free)) and issued[free] == 1 + 40


def test_barriers():
    """The warps of a block wait for the slowest one, and for those of no other block."""
    code = instructions(
        *[("FFMA", Control(stall=10))] * 10, ("BAR.SYNC", Control()), ("FFMA", Control()), ("BRA", Control())
    )
    slow = [Step(i, 0) for i in range(len(code))]
    fast = [step for step in slow if step.index >= 10]
    result = simulate(code, DEVICE, [slow, fast], 1)
    assert result.cycles == pytest.approx(10 * 10 + BARRIER + 2 + TAKEN_BRANCH, rel=0.01)
    assert result.reasons["barrier"] > 0
    two = simulate(code, DEVICE, [slow, fast], 2)
    assert two.cycles == pytest.approx(result.cycles, rel=0.01)


def test_steady_state():
    """What more work adds, though the first and the last work tile differ from the others."""
    begin, tile, last, end = [Step(0, 0)], [Step(1, 2), Step(2, 0), Step(3, 0)], [Step(1, 2), Step(3, 0)], [Step(4, 0)]
    few, many = begin + tile + last + end, begin + 3 * tile + last + end
    assert sorted(steady_state(few, many)) == sorted(2 * tile)
    with pytest.raises(UndecidedError, match="does not repeat"):
        steady_state(few, begin + 2 * tile + [Step(7, 0)] + end)
    for shorter in (few, many):
        with pytest.raises(UndecidedError, match="does not repeat"):
            steady_state(many, shorter)


def test_opcode_without_a_pipe():
    with pytest.raises(UndecidedError, match=r"UNHEARD\.OF at 0x0: no pipe is known"):
        round_of(("UNHEARD.OF", Control()))


def test_clocks_do_not_run_apart():
    """Figures hardly change with the length of a simulation."""
    mixed = [
        ("LDS", Control(2, 0)),
        ("HMMA.16816.F32", Control(6, 7, 7, 1)),
        ("IADD3", Control(4)),
        ("MUFU", Control(1)),
    ]
    long = round_of(*mixed * 40, blocks=16, wavefronts=4)[0]
    assert math.isclose(long, 4 * round_of(*mixed * 10, blocks=16, wavefronts=4)[0], rel_tol=0.05)
