"""What torch.utils.flop_counter counts for the operators."""

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.convmixer_fast


def _flops(shape: torch.Size, kernel_h: int, kernel_w: int) -> int:
    """2 an output and tap, those on the padding included, as torch.utils.flop_counter counts convolutions."""
    return 2 * shape.numel() * kernel_h * kernel_w


@register_flop_formula([_ops.depthwise_conv2d, _ops.depthwise_conv2d_dgrad, _ops.fused_depthwise])
def _(x_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
    return _flops(x_shape, weight_shape[2], weight_shape[3])


@register_flop_formula(_ops.depthwise_conv2d_wgrad)
def _(x_shape: torch.Size, gy_shape: torch.Size, kernel_h: int, kernel_w: int, *_: object, **__: object) -> int:
    return _flops(x_shape, kernel_h, kernel_w)
