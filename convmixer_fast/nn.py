"""The depthwise convolution as a module, and its way into models that others wrote."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .ops import depthwise_conv2d

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DEVICES = ("cpu", "cuda", "meta")


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d(channels, channels, kernel_size, groups=channels, padding="same") on this package's kernels.

    An nn.Conv2d in all other respects: parameters, their initialisation, state dict, representation, autocast.

    Args:
        channels: of the input and the output.
        kernel_size: of any size, (height, width) or one number; padding as PyTorch's "same".
        bias: whether there is one.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            channels, channels, kernel_size, padding="same", groups=channels, bias=bias, device=device, dtype=dtype
        )

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, C, H, W), or (C, H, W), to the same shape."""
        if x.dim() == 3:
            return depthwise_conv2d(x.unsqueeze(0), weight, bias).squeeze(0)
        return depthwise_conv2d(x, weight, bias)


@dataclass(frozen=True)
class Replaced:
    """What replace_depthwise did.

    Attributes:
        count: convolutions that were replaced.
        skipped: why not, by the path of each of the other nn.Conv2d.
    """

    count: int
    skipped: dict[str, str]


def replace_depthwise(model: nn.Module) -> Replaced:
    """Has every depthwise convolution of a model run on this package's kernels, in training and inference.

    A convolution qualifies if it is a plain nn.Conv2d with as many groups as input and output channels, stride 1,
    dilation 1 and zero padding that keeps the size: "same", or k // 2 for odd k. It becomes a DepthwiseConv2d in its
    place: the module and its parameters stay the same objects, with their hooks, device, dtype and mode, so optimizers
    and other references to them stay valid.

    Args:
        model: any module, changed in place.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    count, skipped = 0, {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or isinstance(module, DepthwiseConv2d):
            continue
        reason = next(_obstacles(module), None)
        if reason is None:
            module.__class__ = DepthwiseConv2d  # a subclass without state of its own
            count += 1
        else:
            skipped[path] = reason
    return Replaced(count, skipped)


def _obstacles(conv: nn.Conv2d) -> Iterator[str]:
    if type(conv) is not nn.Conv2d:
        yield f"it is {type(conv).__name__}, accepted: nn.Conv2d itself"
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        yield "its forward was replaced"
    channels = conv.in_channels
    padding: list[Any] = ["same"]
    if all(size % 2 for size in conv.kernel_size):
        padding.append(tuple(size // 2 for size in conv.kernel_size))
    accepted: dict[str, list[Any]] = dict(
        out_channels=[channels],
        groups=[channels],
        stride=[(1, 1)],
        dilation=[(1, 1)],
        padding=padding,
        padding_mode=["zeros"],
    )
    for name, values in accepted.items():
        value = getattr(conv, name)
        if value not in values:
            yield f"{name} is {value!r}, accepted: {' or '.join(map(repr, values))}"
    if conv.weight.dtype not in _DTYPES:
        yield f"weight is {conv.weight.dtype}, accepted: {', '.join(map(str, _DTYPES))}"
    if conv.weight.device.type not in _DEVICES:
        yield f"weight is on {conv.weight.device.type}, accepted: {', '.join(_DEVICES)}"
