"""The forward pass of an optimized ConvMixer by operators alone, without memory of its own, in the part of Python that
TorchScript compiles: what torch.compile, torch.export and torch.jit see, and what runs where no engine does."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops


def last_product(
    x: Tensor, patch: Tensor, depthwise: Tensor, pointwise: Tensor, vectors: Tensor, activation: int, residual: bool
) -> tuple[Tensor, Tensor]:
    """The raw output (N, dim, H // ph, W // pw) of the last layer's 1x1 convolution, and the bias, scale and shift
    (3, dim) still to be applied to it.

    Args:
        x: images (N, in_channels, H, W).
        patch, depthwise, pointwise, vectors: as OptimizedConvMixer has them.
        activation: a value of ops.ACTIVATIONS.
        residual: whether the spatial half of a layer adds its input.
    """
    layout = torch.contiguous_format if x.is_cuda else torch.channels_last
    after = vectors.to(torch.float64 if x.dtype == torch.float64 else torch.float32).unbind(0)
    x = x.contiguous(memory_format=layout)
    x = F.conv2d(x, patch, stride=patch.shape[2:]).contiguous(memory_format=layout)
    for layer in range(depthwise.size(0)):
        x = _fused_depthwise(x, depthwise[layer], after[2 * layer + 1], activation, residual, after[2 * layer])
        x = _pointwise_conv2d(x, pointwise[layer])
    return x, after[-1]


def last_map(product: Tensor, after: Tensor, activation: int) -> Tensor:
    """The map that pooling gets, of the product's shape and dtype; product and after are of last_product."""
    return _fused_depthwise(product, unit_filters(product.size(1), product), after, activation, False, None)


def unit_filters(channels: int, like: Tensor) -> Tensor:
    """(channels, 1, 1, 1), of the dtype and on the device of like: weights of a depthwise convolution that changes
    nothing, so that only its epilogue is left: bias, activation and BatchNorm in one pass over memory."""
    return torch.ones([channels, 1, 1, 1], dtype=like.dtype, device=like.device)


def end(
    product: Tensor,
    after: Tensor,
    activation: int,
    pool: str,
    flatten: bool,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
) -> Tensor:
    """The network's result; product and after are of last_product, the others as OptimizedConvMixer has them."""
    if pool == "":
        return last_map(product, after, activation)
    if pool == "avg":
        pooled = _activate_pool(product, after, activation)
    else:
        activated = last_map(product, after, activation)
        pooled = activated.amax((2, 3))
        if pool == "avgmax":
            pooled = 0.5 * (activated.mean((2, 3)) + pooled)
        elif pool == "catavgmax":
            pooled = torch.cat((activated.mean((2, 3)), pooled), 1)
    if head_weight is not None:
        return F.linear(pooled, head_weight, head_bias)
    return pooled if flatten else pooled[:, :, None, None]


class Scriptable(nn.Module):
    """What torch.jit.script compiles in place of an OptimizedConvMixer, with the same buffers.

    Args:
        buffers: of that module, None for those it lacks.
        activation, residual, pool, flatten: see last_product and end.
    """

    patch: Tensor
    depthwise: Tensor
    pointwise: Tensor
    vectors: Tensor
    head_weight: Tensor | None
    head_bias: Tensor | None

    def __init__(
        self, buffers: dict[str, Tensor | None], activation: int, residual: bool, pool: str, flatten: bool
    ) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.activation = activation
        self.residual = residual
        self.pool = pool
        self.flatten = flatten
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("x requires a gradient, which an optimized ConvMixer does not give: detach it")
        product, after = last_product(
            x, self.patch, self.depthwise, self.pointwise, self.vectors, self.activation, self.residual
        )
        return end(product, after, self.activation, self.pool, self.flatten, self.head_weight, self.head_bias)


def _fused_depthwise(
    x: Tensor, weight: Tensor, after: Tensor, activation: int, residual: bool, before: Tensor | None
) -> Tensor:
    bias, scale, shift = after.unbind(0)
    if before is None:
        first, second, third = None, None, None
    else:
        first, second, third = before.unbind(0)
    if torch.jit.is_scripting():  # which compiles no more than the operator itself
        return torch.ops.convmixer_fast.fused_depthwise(
            x, weight, bias, scale, shift, activation, residual, first, second, third
        )
    return ops._call(
        torch.ops.convmixer_fast.fused_depthwise.default,
        x,
        weight,
        bias,
        scale,
        shift,
        activation,
        residual,
        first,
        second,
        third,
    )


def _activate_pool(x: Tensor, after: Tensor, activation: int) -> Tensor:
    bias, scale, shift = after.unbind(0)
    if torch.jit.is_scripting():
        return torch.ops.convmixer_fast.activate_pool(x, bias, scale, shift, activation)
    return ops._call(torch.ops.convmixer_fast.activate_pool.default, x, bias, scale, shift, activation)


def _pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """The 1x1 convolution of x (N, C_in, H, W) with weight (C_out, C_in), by a library's matrix product."""
    if x.is_cuda:  # NCHW: one product an image, no copy
        return torch.matmul(weight, x.flatten(2)).unflatten(2, x.shape[2:])
    # channels_last, for which oneDNN has a product over all images; on the CPU it beat F.linear in most sizes measured
    return F.conv2d(x, weight[:, :, None, None])
