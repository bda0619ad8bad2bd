"""Hostile inputs, once: shapes, kernel sizes and memory layouts that every implementation must get right."""

import os
from typing import NamedTuple

import pytest
import torch


def slow(*values):
    """These values of a parameter, for `make test-all` alone."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def fuzz_run(cases):
    """How many cases a test of `-m fuzz` tries, and from which seed on: CMF_FUZZ_CASES and CMF_FUZZ_SEED, or these."""
    return tuple(int(os.environ.get(name, other)) for name, other in (("CMF_FUZZ_CASES", cases), ("CMF_FUZZ_SEED", 1)))


class Case(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int

    def __str__(self):
        return f"{self.n}x{self.c}x{self.h}x{self.w}-k{self.kh}x{self.kw}"


CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(17, 3, 1, 1, 9, 9),  # nothing but padding around each pixel
    Case(2, 3, 7, 7, 15, 15),  # a map smaller than the kernel
    Case(3, 5, 7, 7, 8, 8),  # even: PyTorch's asymmetric padding
    Case(3, 17, 14, 14, 7, 7),
    Case(1, 33, 16, 16, 9, 9),
    Case(2, 48, 32, 32, 9, 9),  # the paper's
    Case(1, 2, 32, 32, 3, 3),
    Case(1, 5, 33, 29, 11, 11),
    Case(1, 3, 56, 56, 5, 5),
    Case(1, 2, 40, 37, 31, 31),
    Case(2, 65, 9, 8, 2, 4),
    Case(1, 2, 60, 9, 51, 5),
    Case(1, 3, 5, 70, 3, 7),
    Case(1, 1, 3, 200, 1, 40),
]

EMPTY_CASES = [Case(0, 3, 8, 8, 3, 3), Case(2, 0, 8, 8, 3, 3), Case(2, 3, 0, 8, 3, 3), Case(2, 3, 8, 0, 3, 3)]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _embed(x, make_parent):
    """x as a view into a larger tensor, the rest of which is NaN: a read outside the view shows."""
    n, c, h, w = x.shape
    view = make_parent(torch.full((n + 1, c + 2, h + 3, w + 1), torch.nan, dtype=x.dtype, device=x.device))
    view = view[1:, 1 : c + 1, 2 : h + 2, 1 : w + 1]
    return view.copy_(x)


def planes(x):
    """x as (channels, images, plane), every plane on a multiple of 8 elements: as an engine keeps its activations."""
    n, c, h, w = x.shape
    pitch = -(-h * w // 8) * 8
    memory = torch.full((c, n, pitch), torch.nan, dtype=x.dtype, device=x.device)
    return memory[..., : h * w].unflatten(2, (h, w)).transpose(0, 1).copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: _embed(x, lambda parent: parent),
    "channels_last_slice": lambda x: _embed(x, lambda p: p.contiguous(memory_format=torch.channels_last)),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_second_column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "planes": planes,
    "batch_expanded": lambda x: x[:1].expand(x.shape),
}


def make_input(case, dtype, layout="contiguous", device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator).to(dtype)
    return LAYOUTS[layout](x.to(device))


def make_weight(case, dtype, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.c, 1, case.kh, case.kw, generator=generator) / (case.kh * case.kw) ** 0.5
    return weight.to(dtype).to(device)


def make_vectors(case, dtype, count, device="cpu", seed=2):
    """count vectors (C,) of bias-, scale- and shift-like size, in the dtype that the fused operators take."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, case.c, generator=generator).to(device)
    return list(vectors.to(torch.float64 if dtype == torch.float64 else torch.float32))
