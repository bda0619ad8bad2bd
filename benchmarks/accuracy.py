"""When a backend counts as wrong, and is not timed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Two right ways to compute the same were seen to differ by a factor of 4 in their rounding errors (torch.compile and
# eager, float32); a wrong tap, vector or layout is off by orders of magnitude.
MARGIN = 8.0
CEILING = 0.1


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; infinite where something is not finite. expected: float64."""
    if actual.shape != expected.shape:
        raise ValueError(f"the result has the shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    return error if error < float("inf") else float("inf")


def limit(eager_error: float, dtype: torch.dtype) -> float:
    """The greatest relative error of a right result: MARGIN times eager PyTorch's in the same dtype, or the dtype's
    epsilon if that is more (eager float64 has no error against itself), and CEILING where eager itself is off."""
    return min(MARGIN * max(eager_error, torch.finfo(dtype).eps), CEILING)


def verdict(error: float, eager_error: float, dtype: torch.dtype) -> dict[str, str]:
    """A row's status, "right" or "wrong", and what it says."""
    accepted = limit(eager_error, dtype)
    if error > accepted:
        return dict(status="wrong", message=f"wrong: error {error:.1e}, accepted {accepted:.1e}; not timed")
    return dict(status="right", message="")


@contextmanager
def no_tf32() -> Iterator[None]:
    """Disables TF32 in PyTorch's float32 products and convolutions, whose results others are judged by.

    On a GPU cuDNN rounds the operands of float32 convolutions to TF32's 10 bits unless it is told not to: by such a
    reference a right result counts as wrong, and by such an error of eager PyTorch a wrong one as right. What is timed
    stays outside: there PyTorch keeps its own setting and is at its best.
    """
    libraries = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [library.allow_tf32 for library in libraries]
    try:
        for library in libraries:
            library.allow_tf32 = False
        yield
    finally:
        for library, allowed in zip(libraries, before):
            library.allow_tf32 = allowed


def remark(error: float, eager_error: float) -> str:
    """What is said of ours beside its figures: nothing where it is as exact as eager PyTorch."""
    return f"error {error:.2e}, eager's {eager_error:.2e}" if error > eager_error else ""
