"""The rules of torch.func.vmap for depthwise_conv2d and its derivatives.

The vmapped dimension is folded into the batch if only x or gy has it; into the channels if weight or bias has it too,
and always for the weight's gradient.

fused_depthwise and activate_pool have no rules: torch calls them once per element.
"""

from typing import Any

import torch
from torch import Tensor

from .autograd import _conv, _dgrad, _wgrad

_library = torch.library.Library("convmixer_fast", "FRAGMENT")
_Dims = tuple[int | None, ...]  # the vmapped dimension of each argument, None for one that has none


def _fold(tensor: Tensor, batch_dim: int | None, size: int, dim: int) -> Tensor:
    """The vmapped dimension, or copies of what has none, in front of dimension dim and joined with it."""
    if batch_dim is None:
        tensor = tensor.unsqueeze(dim).expand(*tensor.shape[:dim], size, *tensor.shape[dim:])
    else:
        tensor = tensor.movedim(batch_dim, dim)
    return tensor.flatten(dim, dim + 1)


def _unfold(tensor: Tensor, size: int, dim: int) -> Tensor:
    return tensor.unflatten(dim, (size, tensor.shape[dim] // size))


@torch.library.register_vmap("convmixer_fast::depthwise_conv2d", lib=_library)
def _(info: Any, in_dims: _Dims, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    size, (x_dim, weight_dim, bias_dim) = info.batch_size, in_dims
    if weight_dim is None and bias_dim is None:
        return _unfold(_conv(_fold(x, x_dim, size, 0), weight, bias), size, 0), 0
    weight = _fold(weight, weight_dim, size, 0)
    bias = None if bias is None else _fold(bias, bias_dim, size, 0)
    return _unfold(_conv(_fold(x, x_dim, size, 1), weight, bias), size, 1), 1


@torch.library.register_vmap("convmixer_fast::depthwise_conv2d_dgrad", lib=_library)
def _(info: Any, in_dims: _Dims, gy: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    size, (gy_dim, weight_dim) = info.batch_size, in_dims
    if weight_dim is None:
        return _unfold(_dgrad(_fold(gy, gy_dim, size, 0), weight), size, 0), 0
    return _unfold(_dgrad(_fold(gy, gy_dim, size, 1), _fold(weight, weight_dim, size, 0)), size, 1), 1


@torch.library.register_vmap("convmixer_fast::depthwise_conv2d_wgrad", lib=_library)
def _(
    info: Any, in_dims: _Dims, x: Tensor, gy: Tensor, kernel_h: int, kernel_w: int, bias: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    x, gy = (_fold(tensor, dim, size, 1) for tensor, dim in zip((x, gy), in_dims))
    gweight, gbias = _wgrad(x, gy, kernel_h, kernel_w, bias)
    return (_unfold(gweight, size, 0), _unfold(gbias, size, 0)), (0, 0)
