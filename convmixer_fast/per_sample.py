"""The gradients of depthwise_conv2d for each image by torch.nn.utils's call_for_per_sample_grads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils._expanded_weights.expanded_weights_impl import implements_per_sample_grads
from torch.nn.utils._expanded_weights.expanded_weights_utils import (
    forward_helper,
    set_grad_sample_if_exists,
    unpack_expanded_weight_or_tensor,
)

from .ops import depthwise_conv2d

_ops = torch.ops.convmixer_fast


@implements_per_sample_grads(depthwise_conv2d)
class _PerSampleGrad(torch.autograd.Function):
    """As PyTorch's for F.conv2d, whose errors and grad_sample fields it has."""

    @staticmethod
    def forward(
        ctx: Any,
        kwarg_names: tuple[()],
        function: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        if x.dim() != 4:
            raise RuntimeError(
                "Expanded Weights only support convolution with batched input, got depthwise_conv2d with an unbatched "
                f"input of dim {x.dim()}, expected input of dim 4"
            )
        y = forward_helper(function, (x, weight, bias), {})
        # The fields are set in the backward pass, so that the weights are needed as they were given.
        ctx.x, ctx.weight, ctx.bias = x, weight, bias
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = gradients
        x, weight, bias = ctx.x, ctx.weight, ctx.bias
        n, channels, height, width = x.shape

        def weight_gradient(weight: Tensor) -> Tensor:
            """(N, C, 1, kh, kw): images are independent of each other as channels are, so they become channels."""
            maps, gmaps = (t.reshape(1, n * channels, height, width) for t in (x, gy))
            gweight, _ = _ops.depthwise_conv2d_wgrad(maps, gmaps, *weight.shape[2:], False)
            return gweight.unflatten(0, (n, channels))

        set_grad_sample_if_exists(weight, weight_gradient)
        set_grad_sample_if_exists(bias, lambda _: gy.sum((2, 3)))
        needs_x = ctx.needs_input_grad[2]
        gx = _ops.depthwise_conv2d_dgrad(gy, unpack_expanded_weight_or_tensor(weight)) if needs_x else None
        return None, None, gx, None, None
