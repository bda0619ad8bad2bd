"""The operators in plain PyTorch: the definition that every kernel is tested against.

Each function has the signature of its namesake in :mod:`convmixer_fast.ops`, works in any floating dtype on any
device, is differentiable, and rounds where the definition says: in float64 it is the yardstick of the tests.
"""

import torch.nn.functional as F
from torch import Tensor

from ._types import ACTIVATIONS


def activate_and_normalize(v: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    """activation(v + bias) * scale + shift over the channels of (N, C, H, W), in the vectors' dtype."""
    bias, scale, shift = (vector.view(-1, 1, 1) for vector in (bias, scale, shift))
    return ACTIVATIONS[activation].function(v.to(bias.dtype) + bias) * scale + shift


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.conv2d with one filter a channel, stride 1 and "same" zero padding (even sizes: the extra row and column
    of padding at the bottom and right)."""
    return F.conv2d(F.pad(x, same_padding(*weight.shape[2:])), weight, bias, groups=x.shape[1])


def same_padding(kernel_h: int, kernel_w: int) -> tuple[int, int, int, int]:
    """Zeros left, right, above and below, as F.pad takes them."""
    left, top = (kernel_w - 1) // 2, (kernel_h - 1) // 2
    return left, kernel_w - 1 - left, top, kernel_h - 1 - top


def fused_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str = "gelu",
    residual: bool = True,
    prologue: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """act(conv(z) + bias) * scale + shift (+ z): one half of a ConvMixer layer ("Patches Are All You Need?", eq. 2),
    with z = x, or z = act(x + b) * s + t for prologue = (b, s, t): the other half (eq. 3) of the layer before."""
    z = x if prologue is None else activate_and_normalize(x, *prologue, activation).to(x.dtype)
    arithmetic = bias.dtype
    convolved = depthwise_conv2d(z.to(arithmetic), weight.to(arithmetic))
    y = activate_and_normalize(convolved, bias, scale, shift, activation)
    return (y + z if residual else y).to(x.dtype)


def activate_pool(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, activation: str = "gelu") -> Tensor:
    """The mean over H and W of act(x + bias) * scale + shift: (N, C)."""
    return activate_and_normalize(x, bias, scale, shift, activation).mean((2, 3)).to(x.dtype)
