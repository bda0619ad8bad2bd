"""The depthwise convolution as a module, its way into models that others wrote, and the way back."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.utils import _pair
from torch.nn.utils import parametrize

from ._types import DTYPES
from .ops import depthwise_conv2d

_DEVICES = ("cpu", "cuda", "meta")
# Any other subclass may know F.conv2d and not depthwise_conv2d.
_WEIGHTS: tuple[type[Tensor], ...] = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
if importlib.util.find_spec("torch.nn.utils._expanded_weights"):  # private: a later torch may lack it
    from torch.nn.utils._expanded_weights import ExpandedWeight

    from . import per_sample  # noqa: F401 (what an ExpandedWeight does in depthwise_conv2d)

    _WEIGHTS += (ExpandedWeight,)

# The least side of a kernel that replace_depthwise replaces unless told otherwise, by the weight's device, where it is
# not 1. On a CPU, PyTorch's 3x3 was measured to be faster on large channels_last maps (docs/worklog.md).
_LEAST_KERNEL_SIZE = {"cpu": 4}

_UNLIKE_CONV2D: dict[type[nn.Module], str] = {
    nn.Conv1d: "1-D",
    nn.Conv3d: "3-D",
    nn.ConvTranspose1d: "transposed",
    nn.ConvTranspose2d: "transposed",
    nn.ConvTranspose3d: "transposed",
}


def _renamed(function: Any, name: str) -> Any:
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__annotations__ = function.__annotations__
    return copy


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d(channels, channels, kernel_size, groups=channels, padding="same") on this package's kernels.

    An nn.Conv2d in all other respects: parameters, their initialisation, state dict, representation, autocast, and what
    becomes of it when its attributes or its weight are replaced. It computes what they say at each call, as nn.Conv2d
    does where these kernels do not (another stride, dilation, padding or padding_mode, other devices and dtypes).

    Args:
        channels: of the input and the output.
        kernel_size: of any size, (height, width) or one number; padding as PyTorch's "same".
        bias: whether there is one.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: channels or kernel_size are not positive integers, or bias is no bool.
    """

    # TorchScript compiles what is called alone, so it knows at compile time which of the two ways is taken.
    __constants__ = [*nn.Conv2d.__constants__, "_on_our_kernels"]
    __jit_unused_properties__ = ["_on_our_kernels"]

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_size("channels", channels)
        if isinstance(kernel_size, (tuple, list)) and len(kernel_size) == 2:
            for index, size in enumerate(kernel_size):
                check_size(f"kernel_size[{index}]", size)
        else:
            check_size("kernel_size", kernel_size, "an int or two of them, (height, width)")
        if not isinstance(bias, bool):
            raise TypeError(
                f"bias must be a bool, got {bias!r}: unlike nn.Conv2d, DepthwiseConv2d takes the channels once, "
                "DepthwiseConv2d(channels, kernel_size)"
            )
        super().__init__(
            channels, channels, kernel_size, padding="same", groups=channels, bias=bias, device=device, dtype=dtype
        )

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.jit.is_scripting():
            ours = self._on_our_kernels
        else:
            # The Proxy that torch.fx gives for a weight says nothing of it.
            known = weight if isinstance(weight, Tensor) else self._parameters.get("weight")
            ours = _obstacle(self, known) is None
        if ours:
            return depthwise_conv2d(x, weight, bias)
        else:  # which TorchScript leaves out where it knows the answer
            return self._plain_conv_forward(x, weight, bias)

    # TorchScript has no super(), and names a method as its function is named.
    _plain_conv_forward = _renamed(nn.Conv2d._conv_forward, "_plain_conv_forward")

    @property
    def _on_our_kernels(self) -> bool:
        return _obstacle(self, self.weight) is None


def check_size(name: str, size: object, accepted: str = "an int") -> None:
    """Raises TypeError or ValueError unless it is an int from 1 up."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be {accepted}, got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")


def _obstacle(conv: nn.Conv2d, weight: Tensor | None) -> str | None:
    """Why this package's kernels do not compute what nn.Conv2d does with this weight, or None if they do.

    The one answer for replace_depthwise and for each call of DepthwiseConv2d: hence without detours.
    """
    if weight is None or type(weight) not in _WEIGHTS:
        return f"weight is a {_name(weight)}, accepted: a torch.Tensor itself"
    if torch.jit.is_tracing():  # in which the weight's sizes are tensors: comparing them warns
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    else:
        shape = tuple(weight.shape)
    if len(shape) != 4 or shape[:2] != (conv.groups, 1):
        return f"weight is {shape}, accepted: ({conv.groups}, 1, height, width)"
    if not _means(conv.stride, (1, 1)):
        return f"stride is {conv.stride!r}, accepted: (1, 1)"
    if not _means(conv.dilation, (1, 1)):
        return f"dilation is {conv.dilation!r}, accepted: (1, 1)"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}, accepted: 'zeros'"
    kernel_h, kernel_w = shape[2:]
    if conv.padding != "same":
        half = (kernel_h // 2, kernel_w // 2)
        odd = kernel_h % 2 == kernel_w % 2 == 1
        if not (odd and _means(conv.padding, half)):
            return f"padding is {conv.padding!r}, accepted: 'same'" + (f" or {half}" if odd else "")
    if weight.dtype not in DTYPES:
        return f"weight is {weight.dtype}, accepted: {', '.join(map(str, DTYPES))}"
    if weight.device.type not in _DEVICES:
        return f"weight is on {weight.device.type}, accepted: {', '.join(_DEVICES)}"
    return None


def _means(value: Any, pair: tuple[int, int]) -> bool:
    """Whether F.conv2d takes a value, which may be one number for both sides, as the pair."""
    return value == pair or _pair(value) == pair


@dataclass(frozen=True, repr=False)
class Replaced:
    """What replace_depthwise did.

    Attributes:
        count: convolutions that were replaced.
        skipped: why not, by the path of each other depthwise convolution.
    """

    count: int
    skipped: dict[str, str]

    def __repr__(self) -> str:
        """A line for each reason, with how many were left for it and the path of the first."""
        paths = defaultdict(list)
        for path, reason in self.skipped.items():
            paths[reason].append(path)
        lines = [
            f"\n  {', '.join(map(repr, left[:1]))}{f' and {len(left) - 1} more' if left[1:] else ''}: {reason}"
            for reason, left in paths.items()
        ]
        return f"Replaced(count={self.count}, skipped={len(self.skipped)}{':' if lines else ''}{''.join(lines)})"


def replace_depthwise(
    model: nn.Module,
    *,
    min_kernel_size: int | None = None,
    filter: Callable[[str, nn.Conv2d], bool] | None = None,
) -> Replaced:
    """Has the depthwise convolutions of a model run on this package's kernels, in training and inference.

    A convolution qualifies if it is a plain nn.Conv2d with as many groups as input and output channels, stride 1,
    dilation 1 and zero padding that keeps the size: "same", or k // 2 for odd k. It becomes a DepthwiseConv2d in its
    place: the module and its parameters stay the same objects, with their hooks, device, dtype and mode, so optimizers
    and other references to them stay valid. restore_depthwise undoes it: do so before quantization, which knows
    modules by their type.

    Args:
        model: any module, changed in place.
        min_kernel_size: the least that the larger side of a kernel must have. None: 4 while the weights are on a CPU,
            where PyTorch's 3x3 is faster on large channels_last maps, else 1, which takes all.
        filter: called with the path and the module of each that qualifies, replaces it if it returns True.

    Returns:
        How many were replaced, and why each other depthwise convolution was left, of any number of dimensions, of
        other classes too: those with as many groups as input channels, and more than one.

    Raises:
        TypeError, ValueError: model is not a module, min_kernel_size not an int from 1 up, filter cannot be called or
            returns something other than a bool; the model is then as it was.
    """
    _check_module(model)
    if min_kernel_size is not None:
        check_size("min_kernel_size", min_kernel_size, "None or an int")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter must be None or a function of a path and a module, got {filter!r}")
    qualified: list[nn.Conv2d] = []
    skipped = {}
    for path, module in model.named_modules():
        reason = _other_class(module)
        if reason is None:
            assert isinstance(module, nn.Conv2d)
            reason = _reason_to_leave(path, module, min_kernel_size, filter)
        if reason is None:
            qualified.append(module)
        elif _is_depthwise(module):
            skipped[path] = reason
    for module in qualified:
        module.__class__ = DepthwiseConv2d  # a subclass without state of its own
    return Replaced(len(qualified), skipped)


def restore_depthwise(model: nn.Module) -> int:
    """Makes an nn.Conv2d of every DepthwiseConv2d of a model, in place: what replace_depthwise did is undone.

    Each computes the same as before, on PyTorch's kernels, and stays the same object with all that it has. Classes that
    others derived from DepthwiseConv2d stay.

    Returns:
        How many there were.

    Raises:
        TypeError: model is not a module.
    """
    _check_module(model)
    count = 0
    for module in model.modules():
        kind = type(module)
        if kind is DepthwiseConv2d:
            module.__class__ = nn.Conv2d
        elif kind.__bases__ == (DepthwiseConv2d,) and parametrize.is_parametrized(module):
            # The class that torch made for this module, which copies of the module share.
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type("ParametrizedConv2d", (nn.Conv2d,), own)
        else:
            continue
        count += 1
    return count


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _is_depthwise(module: nn.Module) -> bool:
    """Whether it has the attributes of a depthwise convolution, whatever its class; not if it is ours already."""
    in_script = isinstance(module, torch.jit.ScriptModule)
    if isinstance(module, DepthwiseConv2d) or in_script and module.original_name == DepthwiseConv2d.__name__:
        return False
    if in_script and not hasattr(module, "groups"):  # traced: of its attributes the weight is left
        weight = getattr(module, "weight", None)
        return "Conv" in str(module.original_name) and weight is not None and weight.shape[:2] == (len(weight), 1)
    # Wrappers of modules may show the attributes of what they wrap as their own: those are not in their __dict__.
    for name in ("groups", "in_channels", "out_channels", "kernel_size"):
        if name not in vars(module) and not (in_script and hasattr(module, name)):
            return False
    groups, channels = module.groups, module.in_channels
    return bool(groups != 1 and channels in (groups, 0))  # 0: of a lazy module, not known yet


def _other_class(module: nn.Module) -> str | None:
    if type(module) is nn.Conv2d:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return f"it is a {module.original_name} in TorchScript, accepted: nn.Conv2d itself, before it is compiled"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"it is {_name(module)}, accepted: nn.Conv2d itself, which it becomes in its first run"
    kind = next((f" ({kind})" for other, kind in _UNLIKE_CONV2D.items() if isinstance(module, other)), "")
    return f"it is {_name(module)}{kind}, accepted: nn.Conv2d itself"


def _reason_to_leave(
    path: str,
    conv: nn.Conv2d,
    min_kernel_size: int | None,
    filter: Callable[[str, nn.Conv2d], bool] | None,
) -> str | None:
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        return "its forward was replaced"
    reason = _obstacle(conv, getattr(conv, "weight", None))
    if reason is not None:
        return reason
    least = _LEAST_KERNEL_SIZE.get(conv.weight.device.type, 1) if min_kernel_size is None else min_kernel_size
    if max(conv.weight.shape[2:]) < least:
        return f"kernel_size is {conv.kernel_size}, accepted: {least} or more on a side (min_kernel_size)"
    if filter is None:
        return None
    wanted = filter(path, conv)
    if not isinstance(wanted, bool):
        raise TypeError(f"filter must return a bool, got {wanted!r} for {path!r}")
    return None if wanted else "filter returned False"
