"""The execution of machine code: values, lanes that part and meet again, conflicts of shared memory."""

import ctypes
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import sass
import warp_trace
from sass import Control, Instruction
from warp import LANES, Warp, parse
from warp_trace import UndecidedError, opcodes, trace


def program(text):
    """Instructions of 16 bytes each from lines such as "@!P0 BRA @0x10"."""
    result = []
    for address, line in zip(itertools.count(0, 16), text.strip().splitlines()):
        words = line.split()
        guard = words.pop(0) if words[0].startswith("@") else ""
        result.append(Instruction(address, guard, words[0], "".join(words[1:]).split(",") if words[1:] else []))
    return result


def issued(code, params=b"", warps=1):
    return opcodes(code, trace(code, params, 80, warps))


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
    once = issued(code, (7).to_bytes(4, "little"))
    assert once == {"LDC": 1, "MOV": 1, "LOP3.LUT": 7, "BRA": 14, "FFMA": 4, "IADD3": 7, "ISETP.LT.AND": 7, "EXIT": 1}
    assert issued(code, (7).to_bytes(4, "little"), warps=3).total() == 3 * once.total()


def test_lanes_that_part_meet_again():
    """Even lanes take one way, odd ones the other; afterwards all go on as one."""
    code = program(
        """
        S2R R0, SR_TID.X
        LOP3.LUT P0, R1, R0, 0x1, RZ, 0xc0, !PT
        BSSY B0, @0x70
        @P0 BRA @0x60
        FADD R2, R2, R2
        BRA @0x70
        FMUL R2, R2, R2
        BSYNC B0
        FFMA R2, R2, R2, R2
        EXIT
        """
    )
    counts = issued(code)
    assert (counts["FADD"], counts["FMUL"], counts["BSYNC"], counts["FFMA"], counts["EXIT"]) == (1, 1, 2, 1, 1)


def test_loop_that_lanes_leave_one_by_one():
    """A lane's trip count is its number modulo 4. Half of them end there, the others wait for none of these."""
    code = program(
        """
        S2R R0, SR_TID.X
        LOP3.LUT R1, R0, 0x3, RZ, 0xc0, !PT
        BSSY B0, @0x70
        ISETP.EQ.AND P0, PT, R1, RZ, PT
        @P0 BRA @0x70
        IADD3 R1, R1, -0x1, RZ
        BRA @0x30
        BSYNC B0
        LOP3.LUT P1, R2, R0, 0x1, RZ, 0xc0, !PT
        @P1 EXIT
        BAR.SYNC 0x0
        FFMA R2, R2, R2, R2
        EXIT
        """
    )
    counts = issued(code)
    assert counts["IADD3"] == 3 and counts["ISETP.EQ.AND"] == 4
    assert (counts["BSYNC"], counts["BAR.SYNC"], counts["FFMA"], counts["EXIT"]) == (4, 1, 1, 2)


SOURCE = """
extern "C" __global__ void compute(long long* y, int a, unsigned b, long long c, unsigned long long d) {
  const int t = threadIdx.x;
  const int signed_t = t - 16;
  long long* out = y + t * 16;
  out[0] = signed_t * 1000003 / (a + t);
  out[1] = signed_t * 1000003 % (a + t);
  out[2] = (b * (t + 1u)) / (b % 1000u + t);
  out[3] = c * signed_t / (c % 77777 + 100 + t);
  out[4] = (d + t) / ((d >> (t + 5)) + 3);
  out[5] = (d * (t + 1)) % (d / 3 + t);
  out[6] = __byte_perm(b, b * 31u, 0x7531 - t) ^ __popc(b + t) ^ __clz(b >> t);
  out[7] = min(a, signed_t) + 3ll * max(b, (unsigned)t) + abs(signed_t);
  long long sum = 0;
  for (int i = 0; i < t % 7; i++) sum = sum * 3 + (i % 3 == t % 3 ? a : -i);
  out[8] = sum;
  out[9] = __shfl_xor_sync(~0u, a * t, 5) + __shfl_down_sync(~0u, t, 3) + __shfl_up_sync(~0u, t, 3, 8);
  out[10] = __ballot_sync(~0u, t % 3 == 1) + __any_sync(~0u, t == 40);
  out[11] = (c >> (t * 2)) + (c << t) + ((unsigned long long)c >> (63 - t));
}
"""


def truncated(a, b):
    """Division and remainder of C."""
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return quotient, a - quotient * b


def expected(t, a, b, c, d):
    def wrap(value, bits):
        value &= (1 << bits) - 1
        return value - (1 << bits) if value >> (bits - 1) else value

    u32 = (1 << 32) - 1
    u64 = (1 << 64) - 1
    s = t - 16
    source = (b * 31 & u32) << 32 | b
    selector = 0x7531 - t
    permuted = sum((source >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))
    total = 0
    for i in range(t % 7):
        total = wrap(total * 3 + (a if i % 3 == t % 3 else -i), 64)
    up = t - 3 if t % 8 >= 3 else t
    return [
        *truncated(s * 1000003, a + t),
        (b * (t + 1) & u32) // (b % 1000 + t),
        truncated(wrap(c * s, 64), c % 77777 + 100 + t)[0],
        (d + t & u64) // ((d >> (t + 5)) + 3),
        (d * (t + 1) & u64) % (d // 3 + t),
        wrap(permuted ^ (b + t & u32).bit_count() ^ (32 - (b >> t).bit_length()), 32),
        wrap(min(a, s) + 3 * max(b, t) + abs(s), 64),
        total,
        wrap(a * (t ^ 5), 32) + (t + 3 if t < 29 else t) + up,
        sum(1 << i for i in range(32) if i % 3 == 1),
        wrap((c >> min(2 * t, 63)) + wrap(c << t, 64) + ((c & u64) >> (63 - t)), 64),
    ]


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_integer_arithmetic(tmp_path, monkeypatch, target):
    """What a compiled kernel stores: divisions of 32 and 64 bits, loops, permutations, votes and shuffles."""
    try:
        command = [sass.find_tool("nvcc"), "-cubin", f"-arch={target}", "-o", tmp_path / "k.cubin", tmp_path / "k.cu"]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    (tmp_path / "k.cu").write_text(SOURCE)
    subprocess.run(command, capture_output=True, check=True)
    (code,) = sass.disassemble(tmp_path / "k.cubin").values()
    stored = {}

    def record(warp, instruction, original=warp_trace.wavefronts):
        if instruction.name == "STG":
            place, value = instruction.operands
            base, offset = re.search(r"\[(R\d+)\.64(?:\+(-?0x\w+))?\]", place.text).groups()
            lanes = warp.guarded(instruction.guard)[0]
            address, _ = warp.read_pair(parse(base))
            values, known = warp.read_pair(value)
            for lane in LANES[lanes]:
                assert known[lane] >= 0
                stored[int(address[lane]) + int(offset or "0", 16)] = int(values[lane])
        return original(warp, instruction)

    monkeypatch.setattr(warp_trace, "wavefronts", record)
    r = random.Random(7)
    for _ in range(3):
        a, b = r.randrange(1, 5000), r.randrange(1 << 20, 1 << 32)
        c, d = r.randrange(1 << 20, 1 << 45), r.randrange(1 << 50, 1 << 62)
        stored.clear()
        params = ctypes.c_uint64(4096), ctypes.c_int32(a), ctypes.c_uint32(b), ctypes.c_int64(c), ctypes.c_uint64(d)
        trace(code, b"".join(map(bytes, params)), int(target[3:5]), warps=1)
        for t in range(32):
            found = [stored[4096 + 8 * (16 * t + i)] for i in range(12)]
            assert found == expected(t, a, b, c, d), (t, a, b, c, d)


@pytest.mark.parametrize(
    "decides",
    [
        "LDG.E R0, desc[UR4][R2.64]",
        "@P4 LDG.E R0, desc[UR4][R2.64]",
        "SHFL.IDX PT, R0, R4, RZ, 0x1f",
        "@P3 MOV R0, 0x1",
        "UNHEARD.OF R0, R1, R2",
    ],
)
def test_does_not_guess(decides, monkeypatch):
    monkeypatch.setattr(warp_trace, "MOST_STEPS", 100)
    code = program(
        f"""
        S2R R5, SR_TID.X
        ISETP.LT.AND P4, PT, R5, 0x7, PT
        LDS R4, [RZ]
        ISETP.NE.AND P3, PT, R4, RZ, PT
        MOV R0, 0x1
        {decides}
        ISETP.NE.AND P0, PT, R0, RZ, PT
        @P0 BRA @0x0
        EXIT
        """
    )
    with pytest.raises(UndecidedError, match="0x70"):
        trace(code, b"", 80, warps=1)


def test_endless_loop(monkeypatch):
    monkeypatch.setattr(warp_trace, "MOST_STEPS", 100)
    with pytest.raises(UndecidedError, match="100"):
        trace(program("BRA @0x0"), b"", 90, warps=1)


def test_branch_that_is_not_covered():
    with pytest.raises(UndecidedError, match="BRX at 0x10 is not covered"):
        trace(program("S2R R0, SR_TID.X\nBRX R0\nEXIT"), b"", 90, warps=1)


@pytest.mark.parametrize(
    "opcode, stride, wavefronts",
    [
        ("LDS", 4, 1),
        ("LDS", 0, 1),
        ("LDS", 8, 2),
        ("LDS", 128, 32),
        ("LDS", 132, 1),
        ("LDS.U16", 2, 1),
        ("LDS.64", 8, 2),
        ("STS.64", 24, 2),
        ("STS.64", 80, 4),
        ("STS.128", 16, 4),
        ("STS.128", 32, 8),
        ("LDSM.16.M88.4", 16, 4),
        ("LDSM.16.M88.4", 80, 4),
        ("LDSM.16.M88.4", 64, 16),
        ("LDSM.16.M88.2", 128, 16),
        ("LDG.E.128", 16, 4),
        ("LDG.E.U16", 2, 1),
    ],
)
def test_wavefronts(opcode, stride, wavefronts):
    """The lanes' addresses are equally far apart."""
    place = "desc[UR4][R2.64]" if opcode.startswith("LDG") else "[R1+UR8+0x10]"
    operands = f"{place}, R4" if opcode.startswith("STS") else f"R4, {place}"
    code = program(f"S2R R0, SR_TID.X\nUMOV UR8, 0x400\nIMAD R1, R0, {stride:#x}, RZ\n{opcode} {operands}\nEXIT")
    (steps,) = trace(code, b"", 90, warps=1)
    assert [step.wavefronts for step in steps] == [0, 0, 0, wavefronts, 0]


@pytest.mark.parametrize("opcode, wavefronts", [("LDS", 16), ("LDS.64", 32), ("LDS.128", 32)])
def test_wavefronts_of_groups(opcode, wavefronts):
    """The lanes of each half meet in banks of their own: 4 bytes a lane are served together, 8 and 16 in groups."""
    code = program(
        f"""
        S2R R0, SR_TID.X
        SHF.R.U32.HI R1, RZ, 0x4, R0
        IMAD R2, R1, 0x10, RZ
        IMAD R2, R0, 0x80, R2
        {opcode} R4, [R2]
        EXIT
        """
    )
    (steps,) = trace(code, b"", 90, warps=1)
    assert steps[4].wavefronts == wavefronts


def test_wavefronts_of_some_lanes():
    code = program(
        "S2R R0, SR_TID.X\nISETP.GE.AND P0, PT, R0, 0x18, PT\n@P0 LDS.128 R4, [R0.X16]\n@!PT LDS R4, [R0]\nEXIT"
    )
    (steps,) = trace(code, b"", 90, warps=1)
    assert [step.wavefronts for step in steps] == [0, 0, 1, 0, 0]


def test_control_bits():
    """Encodings of IMAD.WIDE.U32 and LDC.64 as nvdisasm prints them."""
    assert sass.decode_control(0x001FC800078E0A03) == Control(4, 7, 7, 0b000001)
    assert sass.decode_control(0x000E260000000A00) == Control(3, 0, 7, 0)
    assert sass.decode_control(0x0001E80000000C05) == Control(4, 7, 0, 0)


def test_uninitialized_registers_hold_nothing():
    """ptxas sets single bits of a register that nothing has written."""
    warp = Warp({}, {})
    for instruction in program("LOP3.LUT R1, R1, 0xfffffffd, RZ, 0xc0, !PT\nLOP3.LUT R1, R1, 0x2, RZ, 0xfc, !PT"):
        warp.execute(warp.decode(instruction))
    assert np.array_equal(warp.values[1], np.full(32, 2))
