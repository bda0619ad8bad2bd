"""How torch.onnx's two exporters translate the operators; imported once torch.onnx is.

Of both the result is what :func:`convmixer_fast.decompositions` gives: a depthwise convolution is one Conv with a group
for each channel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import onnx
from torch._C import TensorType, Value
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.onnx import symbolic_opset9
from torch.onnx.symbolic_helper import parse_args

from .export import ACTIVATION_NAMES, decompositions
from .reference import same_padding

# ----------------------------------------------------------------------------------- torch.onnx.export(dynamo=True)
#
# It decomposes the program by torch's own table for all purposes (torch._decomp.decomposition_table). An operator in
# there is an error in torch.compile where the variable CI is set, and fake tensors use the decomposition instead of the
# function registered for them. So our operators are decomposed one step before: by the functionalization that
# torch.export's programs go through, while ONNX is exported and only then.

_DECOMPOSITIONS = decompositions()


def _functionalize(
    mode: Any, op: torch._ops.OpOverload, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> Any:
    """A call of one of the operators under FunctionalTensorMode."""
    if not onnx.is_in_onnx_export():
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        return _DECOMPOSITIONS[op](*args, **(kwargs or {}))


for _op in _DECOMPOSITIONS:
    torch.library.register_torch_dispatch(_op, FunctionalTensorMode, _functionalize)


# ---------------------------------------------------------------------------------- torch.onnx.export(dynamo=False)
#
# It translates the nodes of a TorchScript graph one by one, each by the function registered for its operator.


def _known(name: str, value: Value) -> tuple[torch.dtype, list[int] | None]:
    """A tensor's dtype, which must be known, and its sizes where all are."""
    kind = value.type()
    dtype = kind.dtype() if isinstance(kind, TensorType) else None
    if not isinstance(kind, TensorType) or dtype is None:
        raise onnx.errors.SymbolicValueError(f"{name} has no known dtype, accepted: a tensor of a known one", value)
    return dtype, kind.sizes()


def _cast(g: Any, x: Value, dtype: torch.dtype, to: torch.dtype) -> Value:
    return x if dtype == to else g.op("Cast", x, to_i=onnx.JitScalarType.from_dtype(to).onnx_type())


def _conv(g: Any, x: Value, weight: Value, sizes: list[int] | None, *bias: Value) -> Value:
    if sizes is None:
        raise onnx.errors.SymbolicValueError("weight has no known shape, accepted: a known one, not dynamic", weight)
    channels, _, kernel_h, kernel_w = sizes
    left, right, top, bottom = same_padding(kernel_h, kernel_w)
    return g.op(
        "Conv",
        x,
        weight,
        *bias,
        group_i=channels,
        kernel_shape_i=[kernel_h, kernel_w],
        pads_i=[top, left, bottom, right],
    )


def _activate_and_normalize(g: Any, v: Value, bias: Value, scale: Value, shift: Value, activation: int) -> Value:
    over_channels = g.op("Constant", value_t=torch.tensor([-1, 1, 1]))
    bias, scale, shift = (g.op("Reshape", vector, over_channels) for vector in (bias, scale, shift))
    v = g.op("Add", v, bias)
    name = ACTIVATION_NAMES[activation]
    if name != "none":
        v = getattr(symbolic_opset9, name)(g, v)  # as torch translates its own activation
    return g.op("Add", g.op("Mul", v, scale), shift)


def _is_none(value: Value) -> bool:
    return bool(value.node().mustBeNone())


@parse_args("v", "v", "v")
def depthwise_conv2d(g: Any, x: Value, weight: Value, bias: Value) -> Value:
    _, sizes = _known("weight", weight)
    return _conv(g, x, weight, sizes, *([] if _is_none(bias) else [bias]))


@parse_args("v", "v", "v", "v", "v", "i", "b", "v", "v", "v")
def fused_depthwise(
    g: Any,
    x: Value,
    weight: Value,
    bias: Value,
    scale: Value,
    shift: Value,
    activation: int,
    residual: bool,
    prologue_bias: Value,
    prologue_scale: Value,
    prologue_shift: Value,
) -> Value:
    (dtype, _), (arithmetic, _), (_, sizes) = _known("x", x), _known("bias", bias), _known("weight", weight)
    z = _cast(g, x, dtype, arithmetic)
    if not _is_none(prologue_bias):
        z = _activate_and_normalize(g, z, prologue_bias, prologue_scale, prologue_shift, activation)
        z = _cast(g, _cast(g, z, arithmetic, dtype), dtype, arithmetic)  # rounded to x's dtype
    y = _conv(g, z, _cast(g, weight, dtype, arithmetic), sizes)
    y = _activate_and_normalize(g, y, bias, scale, shift, activation)
    return _cast(g, g.op("Add", y, z) if residual else y, arithmetic, dtype)


@parse_args("v", "v", "v", "v", "i")
def activate_pool(g: Any, x: Value, bias: Value, scale: Value, shift: Value, activation: int) -> Value:
    (dtype, _), (arithmetic, _) = _known("x", x), _known("bias", bias)
    y = _activate_and_normalize(g, _cast(g, x, dtype, arithmetic), bias, scale, shift, activation)
    return _cast(g, g.op("Flatten", g.op("GlobalAveragePool", y), axis_i=1), arithmetic, dtype)


for _symbolic in (depthwise_conv2d, fused_depthwise, activate_pool):
    onnx.register_custom_op_symbolic(f"convmixer_fast::{_symbolic.__name__}", _symbolic, opset_version=9)
