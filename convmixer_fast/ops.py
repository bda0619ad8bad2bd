"""The operators: large-kernel depthwise convolution, alone and fused with what surrounds it in a ConvMixer.

All of them take tensors on CPU or CUDA, float64, float32, float16 or bfloat16, contiguous, channels_last or any
other strides, with 64-bit indexing, and return the memory format of ``x``. Sums are float32 (float64 for float64) and
the result is rounded once. :mod:`convmixer_fast.reference` defines each of them in plain PyTorch.

depthwise_conv2d is differentiable, by :mod:`convmixer_fast.autograd`. The other two are for inference: an argument that
requires a gradient, in grad mode, raises RuntimeError. Arguments that do not fit raise TypeError, ValueError or
RuntimeError with the argument's name, what it was and what is accepted.

As torch's own functions they leave a call to the __torch_function__ of an argument or a mode that has one: torch.fx
records each as one node. Dynamo does so itself, for the operators that it finds inside.
"""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _library, _types

# The names of activations, with the numbers that stand for them in the operators' schemas.
ACTIVATIONS = {name: activation.code for name, activation in _types.ACTIVATIONS.items()}

_ops = torch.ops.convmixer_fast


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution, stride 1, implicit zero "same" padding: ``F.conv2d(..., padding="same", groups=C)``.

    Differentiable in x, weight and bias, any number of times; under torch.autocast it casts them as F.conv2d does.
    torch.jit.script takes it.

    Args:
        x: (N, C, H, W), or one image (C, H, W); any of them may be 0.
        weight: (C, 1, kh, kw), of x's dtype; any sizes from 1 up. Even sizes pad (k - 1) // 2 in front, k // 2 behind.
        bias: (C,), of x's dtype, or None.

    Returns:
        (N, C, H, W), of x's dtype and memory format; or (C, H, W), of x's dtype and contiguous.
    """
    if has_torch_function_variadic(x, weight, bias) and not is_dynamo_compiling():
        return handle_torch_function(depthwise_conv2d, (x, weight, bias), x, weight, bias)
    if not torch.jit.is_scripting():
        _check_types(x, weight, bias)
    images = x.unsqueeze(0) if x.dim() == 3 else x
    if torch.jit.is_scripting():
        y = torch.ops.convmixer_fast.depthwise_conv2d(images, weight, bias)
    else:
        y = _call(_ops.depthwise_conv2d.default, images, weight, bias)
    return y.squeeze(0) if x.dim() == 3 else y


def fused_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str = "gelu",
    residual: bool = True,
    prologue: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """act(conv(z) + bias) * scale + shift (+ z), in one pass over memory.

    The spatial half of a ConvMixer layer ("Patches Are All You Need?", eq. 2) with its BatchNorm as scale and shift.
    z is x, or with ``prologue=(b, s, t)`` it is act(x + b) * s + t inside the map and 0 in the padding, rounded once to
    x's dtype: the channel half (eq. 3) of the layer before, whose 1x1 convolution then needs no pass of its own.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, kh, kw), of x's dtype.
        bias, scale, shift: (C,), float32 (float64 if x is).
        activation: a key of ACTIVATIONS, such as "gelu" (erf form) or "none"; of the epilogue and of the prologue.
        residual: whether z is added.
        prologue: None, or three vectors like bias, scale, shift.
        out: (N, C, H, W), of x's dtype and any strides that give each element memory of its own, to be written; it must
            not overlap any other argument. None: a new tensor.

    Returns:
        (N, C, H, W), of x's dtype and memory format; or out.
    """
    tensors = (x, weight, bias, scale, shift, *(prologue if isinstance(prologue, (tuple, list)) else ()), out)
    if has_torch_function_variadic(*tensors) and not is_dynamo_compiling():
        arguments = (x, weight, bias, scale, shift, activation, residual, prologue)
        return handle_torch_function(fused_depthwise, tensors, *arguments, out=out)
    if not isinstance(residual, bool):
        raise TypeError(f"residual must be a bool, got {residual!r}")
    if prologue is not None and (not isinstance(prologue, (tuple, list)) or len(prologue) != 3):
        raise TypeError(f"prologue must be None or three tensors (bias, scale, shift), got {type(prologue).__name__}")
    check_inference(x=x, weight=weight, bias=bias, scale=scale, shift=shift, prologue=prologue, out=out)
    vectors = prologue or (None, None, None)
    operands = (x, weight, bias, scale, shift, _activation(activation), residual, *vectors)
    if out is None:
        return _call(_ops.fused_depthwise.default, *operands)
    return _write(_ops.fused_depthwise.out, *operands, out=out)


def activate_pool(
    x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, activation: str = "gelu", *, out: Tensor | None = None
) -> Tensor:
    """The mean over H and W of act(x + bias) * scale + shift: the end of a ConvMixer in one pass over memory.

    Args:
        x: (N, C, H, W).
        bias, scale, shift: (C,), float32 (float64 if x is).
        activation: a key of ACTIVATIONS, such as "gelu" (erf form) or "none".
        out: (N, C), of x's dtype, contiguous, to be written; it must not overlap any other argument. None: a new
            tensor.

    Returns:
        (N, C), of x's dtype; NaN where the map is empty, as torch.mean. Or out.
    """
    tensors = (x, bias, scale, shift, out)
    if has_torch_function_variadic(*tensors) and not is_dynamo_compiling():
        return handle_torch_function(activate_pool, tensors, x, bias, scale, shift, activation, out=out)
    check_inference(x=x, bias=bias, scale=scale, shift=shift, out=out)
    arguments = (x, bias, scale, shift, _activation(activation))
    if out is None:
        return _call(_ops.activate_pool.default, *arguments)
    return _write(_ops.activate_pool.out, *arguments, out=out)


def _check_types(x: object, weight: object, bias: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(
            f"bias must be a Tensor or None, got {bias!r}: unlike F.conv2d, depthwise_conv2d takes no stride, padding, "
            'dilation or groups, which are 1, "same", 1 and C'
        )


def _activation(name: str) -> int:
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        accepted = ", ".join(repr(accepted) for accepted in ACTIVATIONS)
        raise ValueError(f"activation must be one of {accepted}, got {name!r}") from None


def check_inference(**arguments: Tensor | tuple[Tensor, ...] | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, argument in arguments.items():
        for tensor in argument if isinstance(argument, (tuple, list)) else (argument,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} requires a gradient, which this operator does not give: "
                    "call it under torch.no_grad() or torch.inference_mode(), or detach the tensor"
                )


def _write(op: torch._ops.OpOverload, *arguments: Any, out: Tensor) -> Tensor:
    """out, once the operator has written it."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError("out cannot be exported to ONNX with dynamo=False, which drops the write: leave it None")
    _call(op, *arguments, out=out)
    return out


def _call(op: torch._ops.OpOverload, *arguments: Any, **out: Tensor) -> Any:
    """An operator's result; says why when its device has no kernels, and keeps the type of out-of-memory errors."""
    x = arguments[0]
    if isinstance(x, Tensor) and x.is_cuda:
        _library.require_cuda()
    try:
        return op(*arguments, **out)
    except RuntimeError as error:
        if _library.ALLOCATION_FAILED in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise
