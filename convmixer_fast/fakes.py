"""The operators on tensors without numbers, for torch.export, torch.compile and the meta device: what a result looks
like, and the same errors.

The checks are those of tensor_checks.h and operators.h in csrc/bindings, in their order and their words; tests hold
both sides to the same verdict. Where sizes are symbols, a check becomes a condition of the traced program.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._types import ACTIVATIONS, DTYPES, either, name_of

_library = torch.library.Library("convmixer_fast", "FRAGMENT")

_LARGEST_KERNEL = 2**24  # rows or columns
_PROLOGUE = ("prologue[0] (bias)", "prologue[1] (scale)", "prologue[2] (shift)")


def _require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    torch._check(condition, message)


def _listed(sizes: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, sizes))})"


def _check_map(name: str, x: Tensor) -> None:
    _require(x.dim() == 4, lambda: f"{name} must be (N, C, H, W), got {x.dim()} dimensions: {_listed(x.shape)}")


def _check_dtype(name: str, x: Tensor) -> None:
    _require(x.dtype in DTYPES, lambda: f"{name} must be {either(map(name_of, DTYPES))}, got {name_of(x.dtype)}")


def _check_beside(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    _require(tensor.device == x.device, lambda: f"{name} must be on {x_name}'s device {x.device}, got {tensor.device}")


def _check_same_dtype(name: str, tensor: Tensor, x: Tensor, x_name: str = "x") -> None:
    _require(
        tensor.dtype == x.dtype,
        lambda: f"{name} must have {x_name}'s dtype {name_of(x.dtype)}, got {name_of(tensor.dtype)}",
    )


def _check_weight(weight: Tensor, x: Tensor, x_name: str = "x") -> None:
    _check_beside("weight", weight, x, x_name)
    _check_same_dtype("weight", weight, x, x_name)

    def message() -> str:
        return (
            f"weight must be (C, 1, kh, kw) with C = {x.shape[1]} channels as {x_name} and kh, kw from 1 to "
            f"{_LARGEST_KERNEL}, got {_listed(weight.shape)}"
        )

    _require(weight.dim() == 4, message)
    _require(weight.shape[0] == x.shape[1], message)
    _require(weight.shape[1] == 1, message)
    for size in weight.shape[2:]:
        _require(size >= 1, message)
        _require(size <= _LARGEST_KERNEL, message)


def _check_vector(name: str, vector: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    _check_beside(name, vector, x)
    _require(
        vector.dtype == dtype,
        lambda: f"{name} must be {name_of(dtype)} for {name_of(x.dtype)} x, got {name_of(vector.dtype)}",
    )

    def message() -> str:
        return f"{name} must be (C,) with C = {x.shape[1]} channels as x, got {_listed(vector.shape)}"

    _require(vector.dim() == 1, message)
    _require(vector.shape[0] == x.shape[1], message)


def _check_vectors(x: Tensor, vectors: dict[str, Tensor]) -> None:
    """Those of a pointwise step: bias, scale and shift, by name."""
    for name, vector in vectors.items():
        _check_vector(name, vector, x, DTYPES[x.dtype].arithmetic)


def _check_activation(activation: int) -> None:
    accepted = {known.code: name for name, known in ACTIVATIONS.items()}
    _require(
        activation in accepted,
        lambda: f"activation must be {either(f'{code} ({name})' for code, name in accepted.items())}, got {activation}",
    )


def _is_injective(tensor: Tensor) -> bool:
    """Whether no two elements may share memory: False only where a dimension does not stride over all that the nearer
    ones span."""
    if tensor.numel() == 0:
        return True
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= span:
                return False
            span += (size - 1) * stride
    return True


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether one's elements, from the first to the last, lie among the other's."""
    if one.numel() == 0 or other.numel() == 0 or one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False

    def extent(tensor: Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        begin = tensor.storage_offset() * tensor.element_size()
        return begin, begin + (span + 1) * tensor.element_size()

    (begin, end), (other_begin, other_end) = extent(one), extent(other)
    return begin < other_end and other_begin < end


def _check_apart(out: Tensor, name: str, tensor: Tensor) -> None:
    _require(not _share_memory(out, tensor), lambda: f"out must not share memory with {name}")


def _check_output(out: Tensor, shape: tuple[int, ...], inputs: dict[str, Tensor]) -> None:
    x = inputs["x"]
    _check_beside("out", out, x)
    _check_same_dtype("out", out, x)

    def message() -> str:
        return f"out must be {_listed(shape)}, got {_listed(out.shape)}"

    _require(out.dim() == len(shape), message)
    for size, expected in zip(out.shape, shape):
        _require(size == expected, message)
    if any(isinstance(size, torch.SymInt) for size in (*out.shape, *out.stride(), out.storage_offset())):
        return  # where it lies is known when the program runs, and checked then
    _require(
        _is_injective(out),
        lambda: f"out must have memory of its own for each element, got strides {_listed(out.stride())}",
    )
    for name, tensor in inputs.items():
        _check_apart(out, name, tensor)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch._prims_common.suggest_memory_format(x))


@torch.library.register_fake("convmixer_fast::depthwise_conv2d", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_map("x", x)
    _check_dtype("x", x)
    _check_weight(weight, x)
    if bias is not None:
        _check_vector("bias", bias, x, x.dtype)
    return _like(x)


@torch.library.register_fake("convmixer_fast::depthwise_conv2d_dgrad", lib=_library)
def _(gy: Tensor, weight: Tensor) -> Tensor:
    _check_map("gy", gy)
    _check_dtype("gy", gy)
    _check_weight(weight, gy, "gy")
    return _like(gy)


@torch.library.register_fake("convmixer_fast::depthwise_conv2d_wgrad", lib=_library)
def _(x: Tensor, gy: Tensor, kernel_h: int, kernel_w: int, bias: bool) -> tuple[Tensor, Tensor]:
    _check_map("x", x)
    _check_dtype("x", x)
    _check_beside("gy", gy, x)
    _check_same_dtype("gy", gy, x)
    _check_map("gy", gy)
    for size, expected in zip(gy.shape, x.shape):
        _require(size == expected, lambda: f"gy must have x's shape {_listed(x.shape)}, got {_listed(gy.shape)}")

    def message() -> str:
        return f"kernel_h and kernel_w must be from 1 to {_LARGEST_KERNEL}, got {kernel_h} and {kernel_w}"

    for size in (kernel_h, kernel_w):
        _require(size >= 1, message)
        _require(size <= _LARGEST_KERNEL, message)
    channels = x.shape[1]
    return x.new_empty((channels, 1, kernel_h, kernel_w)), x.new_empty((channels if bias else 0,))


def _check_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: int,
    residual: bool,
    *prologue: Tensor | None,
) -> dict[str, Tensor]:
    """The tensors that the kernel reads, by name."""
    _check_map("x", x)
    _check_dtype("x", x)
    _check_weight(weight, x)
    _check_activation(activation)
    vectors = dict(bias=bias, scale=scale, shift=shift)
    _check_vectors(x, vectors)
    given = {name: vector for name, vector in zip(_PROLOGUE, prologue) if vector is not None}
    _require(len(given) in (0, 3), lambda: "prologue must give all of bias, scale and shift, or none")
    _check_vectors(x, given)
    return dict(x=x, weight=weight, **vectors, **given)


@torch.library.register_fake("convmixer_fast::fused_depthwise", lib=_library)
def _(*arguments: Any) -> Tensor:
    return _like(_check_fused(*arguments)["x"])


@torch.library.register_fake("convmixer_fast::fused_depthwise.out", lib=_library)
def _(*arguments: Any, out: Tensor) -> None:
    inputs = _check_fused(*arguments)
    _check_output(out, inputs["x"].shape, inputs)


def _check_pool(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, activation: int) -> dict[str, Tensor]:
    """The tensors that the kernel reads, by name."""
    _check_map("x", x)
    _check_dtype("x", x)
    _check_activation(activation)
    vectors = dict(bias=bias, scale=scale, shift=shift)
    _check_vectors(x, vectors)
    return dict(x=x, **vectors)


@torch.library.register_fake("convmixer_fast::activate_pool", lib=_library)
def _(*arguments: Any) -> Tensor:
    x = _check_pool(*arguments)["x"]
    return x.new_empty(x.shape[:2])


@torch.library.register_fake("convmixer_fast::activate_pool.out", lib=_library)
def _(*arguments: Any, out: Tensor) -> None:
    inputs = _check_pool(*arguments)
    _check_output(out, inputs["x"].shape[:2], inputs)
    _require(out.is_contiguous(), lambda: f"out must be contiguous, got strides {_listed(out.stride())}")
