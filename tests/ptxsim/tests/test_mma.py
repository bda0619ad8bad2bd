"""mma.sync bit by bit as MMA-Sim (Microsoft's model of tensor cores, compared with GPUs) computes it."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from ptxsim import DeviceError, Module, Out

GENERATIONS = {
    "sm_75": "Turing",
    "sm_80": "Ampere",
    "sm_86": "Ampere",
    "sm_89": "Ada Lovelace",
    "sm_90": "Hopper",
    "sm_100": "Blackwell",
    "sm_120": "RTX Blackwell",
}
IN_OUR_KERNELS = ["m16n8k16.f32.f16.f16.f32", "m16n8k16.f32.bf16.bf16.f32"]
SM_75 = ["m16n8k8.f32.f16.f16.f32", "m16n8k8.f16.f16.f16.f16"]
SM_80 = [
    *IN_OUR_KERNELS,
    *SM_75,
    "m16n8k16.f16.f16.f16.f16",
    "m16n8k8.f32.bf16.bf16.f32",
    "m16n8k8.f32.tf32.tf32.f32",
    "m16n8k4.f32.tf32.tf32.f32",
]
FP8 = ["m16n8k32.f32.e4m3.e5m2.f32", "m16n8k16.f32.e5m2.e5m2.f32", "m16n8k32.f16.e4m3.e4m3.f16"]


class Float(NamedTuple):
    bits: int
    exponent: int  # bits
    mantissa: int
    dtype: torch.dtype

    @property
    def sign(self):
        return 1 << self.bits - 1

    @property
    def infinity(self):
        return (2**self.exponent - 1) << self.mantissa


TYPES = {
    "f16": Float(16, 5, 10, torch.float16),
    "bf16": Float(16, 8, 7, torch.bfloat16),
    "tf32": Float(32, 8, 23, torch.float32),  # mma ignores 13 bits
    "f32": Float(32, 8, 23, torch.float32),
    "e4m3": Float(8, 4, 3, torch.float8_e4m3fn),
    "e5m2": Float(8, 5, 2, torch.float8_e5m2),
}
M, N = 16, 8
EACH = 64  # matrices of each kind of data


def cases():
    for arch, instructions in {
        "sm_75": SM_75,
        "sm_80": SM_80,
        "sm_86": IN_OUR_KERNELS,
        "sm_89": IN_OUR_KERNELS + FP8,
        "sm_90": SM_80,
        "sm_100": IN_OUR_KERNELS,
        "sm_120": SM_80 + FP8,
    }.items():
        for instruction in instructions:
            usual = instruction in IN_OUR_KERNELS and arch in ("sm_80", "sm_90", "sm_120")
            yield pytest.param(arch, instruction, marks=() if usual else pytest.mark.slow)


class Mma:
    """mma.sync of an architecture, on arrays of matrices."""

    def __init__(self, arch, instruction):
        shape, *types = instruction.split(".")
        self.d_type, self.a_type, self.b_type, _ = types
        self.k = int(re.search(r"k(\d+)", shape)[1])
        names = {
            name: [f"%{name}{i}" for i in range(elements * TYPES[type_].bits // 32 // 32)]
            for name, type_, elements in (
                ("a", self.a_type, M * self.k),
                ("b", self.b_type, N * self.k),
                ("c", self.d_type, M * N),
                ("d", self.d_type, M * N),
            )
        }

        def address(name):
            return f"ld.param.u64 %p, [{name}]; mad.wide.u32 %p, %thread, {4 * len(names[name])}, %p;\n"

        text = f""".version 8.8
.target {arch}
.address_size 64
.visible .entry multiply(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d) {{
.reg .b64 %p; .reg .b32 %block, %lane, %thread, {", ".join(sum(names.values(), []))};
mov.u32 %block, %ctaid.x; mov.u32 %lane, %tid.x; mad.lo.u32 %thread, %block, 32, %lane;
"""
        for name in "abc":
            text += address(name)
            text += "".join(f"ld.global.b32 {register}, [%p+{4 * i}];\n" for i, register in enumerate(names[name]))
        operands = ", ".join("{" + ", ".join(names[name]) + "}" for name in "dabc")
        text += f"mma.sync.aligned.{shape}.row.col.{'.'.join(types)} {operands};\n" + address("d")
        text += "".join(f"st.global.b32 [%p+{4 * i}], {register};\n" for i, register in enumerate(names["d"]))
        self.module = Module.from_ptx(text + "ret; }\n")

    def __call__(self, a, b, c):
        """The bits of D (count, M, N) from those of A (count, M, k), B (count, k, N) and C."""
        fragments = [np.ascontiguousarray(x[:, i, j]).view(np.uint32) for x, (i, j) in zip((a, b, c), self.layouts())]
        result = np.empty_like(fragments[2])
        self.module.launch("multiply", len(a), 32, [*fragments, Out(result)])
        d = np.empty_like(c)
        i, j = self.layouts()[2]
        d[:, i, j] = result.view(c.dtype)
        return d

    def layouts(self):
        """Of A, B and C the rows and columns of each lane's elements, as the PTX documentation has them."""
        group, thread = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4
        e = 32 // TYPES[self.a_type].bits  # elements of a register
        out = []
        for rows in (M, N):
            register, within = np.divmod(np.arange(rows * self.k // 32), e)
            out.append((register, e * thread + within))
        (a, a_k), (b, b_k) = out
        i = np.arange(M * N // 32)
        return (
            (group + 8 * (a & 1), a_k + 4 * e * (a >> 1)),
            (b_k + 4 * e * b, group + 0 * b),
            (group + 8 * (i >> 1), 2 * thread + (i & 1)),
        )


def random_bits(rng, type_, shape, low, high):
    """Bits of finite numbers of any sign and mantissa, with exponents from low to high as far as the type has them."""
    f = TYPES[type_]
    bias, most = 2 ** (f.exponent - 1) - 1, 2**f.exponent - (1 if type_ == "e4m3" else 2)
    field = rng.integers(np.clip(low + bias, 0, most), np.clip(high + bias, 0, most) + 1, shape)
    fraction = rng.integers(0, 2**f.mantissa - (type_ == "e4m3"), shape)  # in e4m3 all ones may be a NaN
    sign = rng.integers(0, 2, shape)
    return (sign * f.sign | field << f.mantissa | fraction).astype(f"uint{f.bits}")


TINY = (-1000, -1000)  # subnormals
KINDS = {  # of data: the least and the greatest exponents of A, B and C
    "alike": ((-2, 2), (-2, 2), (-4, 4)),
    "spread": ((-9, 9), (-9, 9), (-18, 18)),
    "any": ((-1000, 1000), (-1000, 1000), (-1000, 1000)),
    "subnormal": (TINY, (-2, 2), TINY),
    "least float32": ((-80, -68), (-80, -68), TINY),  # sums about it
    "least float16": ((-14, -10), (-14, -10), TINY),
    "greatest float32": ((62, 63), (62, 63), (126, 127)),
    "greatest float16": ((5, 7), (5, 7), (14, 15)),
    "large C": ((-2, 2), (-2, 2), (10, 30)),
    "sparse": ((-3, 3), (-3, 3), (-8, 8)),
    "sparse, least float32": ((-80, -68), (-80, -68), TINY),
    "powers of two, float32": ((-82, -74), (-82, -74), TINY),  # C is zero: the exponent of zeros counts
    "powers of two, float16": ((-15, -10), (-15, -10), TINY),
    "largest significands": ((0, 0), (0, 0), (0, 0)),
    "cancelling": ((-3, 3), (-3, 3), (-20, -6)),
    "Inf and NaN": ((-9, 9), (-9, 9), (-18, 18)),
}


def data(rng, mma, kind):
    """A, B and C as bits."""
    shapes = (EACH, M, mma.k), (EACH, mma.k, N), (EACH, M, N)
    types = mma.a_type, mma.b_type, mma.d_type
    a, b, c = values = [random_bits(rng, *x, *between) for *x, between in zip(types, shapes, KINDS[kind])]
    for x, f in zip(values, (TYPES[type_] for type_ in types)):
        if kind.startswith("sparse"):
            x[rng.random(x.shape) < 0.7] = 0
        if kind == "largest significands":
            x |= x.dtype.type(2**f.mantissa - 1)
            x &= x.dtype.type(f.sign - 1)
        if kind == "Inf and NaN":
            chosen = rng.random(x.shape) < 0.02
            special = np.array([f.infinity, f.infinity | f.sign, f.infinity + 1, f.sign - 1, 0, f.sign], x.dtype)
            x[chosen] = rng.choice(special, np.count_nonzero(chosen))
        if kind.startswith("powers of two"):
            x &= x.dtype.type(f.sign | f.infinity)
            subnormal = x & x.dtype.type(f.infinity) == 0
            x[subnormal] |= (1 << rng.integers(0, f.mantissa, np.count_nonzero(subnormal))).astype(x.dtype)
            x[rng.random(x.shape) < 0.5] = 0
    if kind.startswith("powers of two"):
        c[...] = 0
    if kind == "cancelling":  # one half of the products is the other with the other sign, but for the last
        half = mma.k // 2
        a[:, :, half:-1] = a[:, :, : half - 1] ^ a.dtype.type(TYPES[mma.a_type].sign)
        b[:, half:-1] = b[:, : half - 1]
    return values


def by_mma_sim(arch, instruction, mma, a, b, c):
    from mmasim.nv_ptx import MMA  # compiles C++ when it is first imported

    def tensor(bits, type_):
        return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(TYPES[type_].dtype)

    a, b, c = tensor(a, mma.a_type), tensor(b, mma.b_type), tensor(c, mma.d_type)
    rows, columns = a[:, :, None].expand(-1, -1, N, -1), b.transpose(1, 2)[:, None].expand(-1, M, -1, -1)
    d = MMA(GENERATIONS[arch], instruction).dpa(rows.contiguous(), columns.contiguous(), c)
    return d.view(torch.int16 if d.dtype == torch.float16 else torch.int32).numpy().view(f"u{d.itemsize}")


@pytest.mark.parametrize("arch,instruction", list(cases()))
def test_results_are_those_of_mma_sim(arch, instruction):
    rng, mma = np.random.default_rng(4), Mma(arch, instruction)
    for kind in KINDS:
        a, b, c = data(rng, mma, kind)
        wrong = np.argwhere(mma(a, b, c) != by_mma_sim(arch, instruction, mma, a, b, c))
        assert not len(wrong), f"{kind}: {len(wrong)} of {c.size} elements, the first at {wrong[0]}"


@pytest.mark.parametrize("instruction", IN_OUR_KERNELS)
def test_generations_round_differently(instruction):
    """So the data above tell a rule from that of another generation, which differs in a bit and in the groups."""
    a, b, c = data(np.random.default_rng(4), Mma("sm_80", instruction), "alike")
    ampere, ada, hopper, blackwell = (Mma(arch, instruction)(a, b, c) for arch in ("sm_80", "sm_89", "sm_90", "sm_120"))
    assert np.array_equal(ampere, ada) and np.array_equal(hopper, blackwell)
    assert np.mean(ampere != hopper) > 0.1


@pytest.mark.parametrize(
    "arch,instruction",
    [("sm_75", IN_OUR_KERNELS[0]), ("sm_75", "m16n8k8.f32.bf16.bf16.f32"), ("sm_80", FP8[0]), ("sm_90", FP8[0])],
)
def test_without_a_rule_it_is_an_error(arch, instruction):
    mma = Mma(arch, instruction)
    with pytest.raises(DeviceError, match=f"unsupported: how {arch} rounds this mma is not known"):
        mma(*data(np.random.default_rng(4), mma, "alike"))
