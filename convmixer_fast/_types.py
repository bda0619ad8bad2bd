"""The dtypes and the activations that the package knows, one table each. Whatever lists them reads it here: checks and
their messages, the choices of the command line, the reference, exported graphs, and the emulator of the tests."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DType:
    """A dtype of tensors.

    Attributes:
        code: its value in csrc/params.h, enum class DType.
        arithmetic: the dtype of sums, and of bias, scale and shift around a convolution.
    """

    code: int
    arithmetic: torch.dtype


DTYPES = {
    torch.float64: DType(0, torch.float64),
    torch.float32: DType(1, torch.float32),
    torch.float16: DType(2, torch.float32),
    torch.bfloat16: DType(3, torch.float32),
}
# Those of the CPU engine and of `classify` on the command line; float64 is for comparisons.
NETWORK_DTYPES = tuple(dtype for dtype, known in DTYPES.items() if known.arithmetic == torch.float32)


@dataclass(frozen=True)
class Activation:
    """An activation; its name in ACTIVATIONS is that of the function in torch.nn.functional, or "none".

    Attributes:
        code: its value in csrc/params.h, enum class Activation.
        function: what it computes.
        module: the layer of a network that computes it; None: networks cannot have it.
        attributes: what that layer must be set to.
    """

    code: int
    function: Callable[[Tensor], Tensor]
    module: type[nn.Module] | None = None
    attributes: Mapping[str, object] = field(default_factory=dict)


ACTIVATIONS = {
    "none": Activation(0, lambda v: v),
    "gelu": Activation(1, F.gelu, nn.GELU, {"approximate": "none"}),
    "relu": Activation(2, F.relu, nn.ReLU),
}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def either(names: Iterable[str]) -> str:
    """A choice for an error message: "float32, float16 or bfloat16"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
