"""Takes a trained ConvMixer apart and gives its weights to the module for inference."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .inference import OptimizedConvMixer
from .model import Residual

# Modules whose forward runs their children one after the other, by the name of that function: no import of timm.
_CHAINS = {
    "torch.nn.modules.container.Sequential.forward",
    "convmixer_fast.model.ConvMixer.forward",
    "timm.models.convmixer.ConvMixer.forward",
    "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d.forward",
}
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.ReLU: "relu"}
# What the fused step cannot express, and why, by module.
_REASONS = {
    Residual: "the fused step adds its input in the spatial half of every layer or of none, and nowhere else",
    nn.LayerNorm: "its mean and variance depend on the image, so it is no fixed scale and shift",
}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_Module = TypeVar("_Module", bound=nn.Module)


def optimize(
    model: nn.Module, dtype: torch.dtype | None = None, *, chunk: int | str = "auto", cuda_graphs: bool = False
) -> OptimizedConvMixer:
    """A module for inference with the forward pass of a trained ConvMixer, on the fused operators.

    BatchNorm becomes a scale and a shift, computed in float64. The given model stays as it is and shares no memory
    with the new one.

    Args:
        model: in eval mode: a ConvMixer of this package or of timm, or an nn.Sequential as in the paper's Figure 3:
            patch convolution, then layers, then nn.AdaptiveAvgPool2d(1), nn.Flatten and nn.Linear. Every convolution
            has a bias and is followed by GELU (erf form) or ReLU, the same everywhere, and by nn.BatchNorm2d. The
            depthwise ones have one size and padding "same", or (k - 1) // 2 if it is odd, and are in a module with
            one child fn (of any name) whose forward is fn(x) + x; or all of them are in none, without a residual.
        dtype: torch.float64, float32, float16 or bfloat16, to convert the weights to; None: theirs.
        chunk: on a GPU, how many images at most go through all layers before the next ones start, which bounds the
            memory of the activations; more go in chunks of equal size, or one less. "auto": all together.
        cuda_graphs: on a GPU, record the kernels of a forward pass once for each shape of images (the 8 used last are
            kept) and replay them: no launch gaps, which matter for few images and small maps.

    Raises:
        TypeError: model is not a module, or cuda_graphs not a bool.
        ValueError: dtype or chunk is another one; or the first module that is in training mode or does not match, by
            its path.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    if isinstance(chunk, bool) or not (chunk == "auto" or isinstance(chunk, int) and chunk >= 1):
        raise ValueError(f"chunk must be 'auto' or an int from 1 up, got {chunk!r}")
    if not isinstance(cuda_graphs, bool):
        raise TypeError(f"cuda_graphs must be a bool, got {cuda_graphs!r}")
    if not _is_chain(model):
        raise ValueError(
            f"model is {type(model).__name__}, accepted: convmixer_fast.ConvMixer, timm's ConvMixer, nn.Sequential"
        )
    for path, module in model.named_modules(prefix="model"):
        if module.training:
            raise ValueError(f"{path} ({type(module).__name__}) is in training mode, accepted: eval mode, model.eval()")
    with torch.no_grad():
        return _convert(model, dtype, chunk, cuda_graphs)


def _convert(model: nn.Module, dtype: torch.dtype | None, chunk: int | str, cuda_graphs: bool) -> OptimizedConvMixer:
    leaves = _Leaves(model, dtype)
    patch = leaves.take(nn.Conv2d)
    dim = patch.out_channels
    plain: dict[str, list[Any]] = dict(dilation=[(1, 1)], padding_mode=["zeros"])
    leaves.check(patch, stride=[patch.kernel_size], padding=["valid", (0, 0)], groups=[1], **plain)
    vectors = [leaves.take_vectors(patch)]
    depthwise: list[nn.Conv2d] = []
    pointwise: list[nn.Conv2d] = []
    plain |= dict(in_channels=[dim], out_channels=[dim], stride=[(1, 1)])
    residual = not leaves.next_is(nn.Conv2d)  # in the first layer, and so in all
    while not (depthwise and leaves.next_is(nn.AdaptiveAvgPool2d)):
        with leaves.residual(dim) if residual else nullcontext():
            conv = leaves.take(nn.Conv2d)
            kernel_size = depthwise[0].kernel_size if depthwise else conv.kernel_size
            padding: list[Any] = ["same"]
            if all(size % 2 for size in kernel_size):
                padding.append(tuple(size // 2 for size in kernel_size))
            leaves.check(conv, kernel_size=[kernel_size], groups=[dim], padding=padding, **plain)
            depthwise.append(conv)
            vectors.append(leaves.take_vectors(conv))
        conv = leaves.take(nn.Conv2d)
        leaves.check(conv, kernel_size=[(1, 1)], groups=[1], padding=["same", "valid", (0, 0)], **plain)
        pointwise.append(conv)
        vectors.append(leaves.take_vectors(conv))
    leaves.check(leaves.take(nn.AdaptiveAvgPool2d), output_size=[1, (1, 1)])
    leaves.check(leaves.take(nn.Flatten), start_dim=[1], end_dim=[-1, 3])
    head = leaves.take(nn.Linear)
    leaves.check(head, in_features=[dim])
    leaves.end()

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(dtype or patch.weight.dtype, copy=True, memory_format=torch.contiguous_format)

    return OptimizedConvMixer(
        patch=converted(patch.weight),
        depthwise=converted(torch.stack([conv.weight for conv in depthwise])),
        pointwise=converted(torch.stack([conv.weight.flatten(1) for conv in pointwise])),
        vectors=torch.stack(vectors),
        head_weight=converted(head.weight),
        head_bias=converted(head.bias),
        activation=leaves.activation,
        residual=residual,
        chunk=chunk,
        cuda_graphs=cuda_graphs,
    )


class _Leaves:
    """Takes a model's leaves in the order in which they run; raises ValueError at the first that does not match."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        self._dtype = dtype
        self._coming = deque(_leaves("model", model))
        self._path = "model"  # of the leaf taken last
        self.activation = ""  # that of all layers, known from the first one

    def next_is(self, kind: type[nn.Module]) -> bool:
        return bool(self._coming) and isinstance(self._coming[0][1], kind)

    def take(self, *kinds: type[_Module]) -> _Module:
        """The next leaf, which must be of one of these kinds and lack none of its tensors."""
        accepted = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        leaf = self._pop(accepted)
        module = next((leaf for kind in kinds if isinstance(leaf, kind) and type(leaf).forward is kind.forward), None)
        if module is None:
            raise self._mismatch(leaf, accepted)
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None:
                raise ValueError(f"{self._path}.{name} is None, accepted: a tensor")
        return module

    def check(self, module: nn.Module, **accepted: list[Any]) -> None:
        """Compares attributes of the leaf taken last with the values accepted for them."""
        for name, values in accepted.items():
            value = getattr(module, name)
            if value not in values:
                raise ValueError(f"{self._path}.{name} is {value!r}, accepted: {' or '.join(map(repr, values))}")

    def take_vectors(self, conv: nn.Conv2d) -> Tensor:
        """Bias, scale and shift (3, dim) in float64: of the convolution before, and of the BatchNorm after the next
        leaf, the activation. The scale is rounded as it will be used, and the shift takes the mean by that scale:
        else its rounding times the mean would be an error of every pixel, which no pooling averages out."""
        activation = self.take(*_ACTIVATIONS)
        if isinstance(activation, nn.GELU):
            self.check(activation, approximate=["none"])
        name = next(name for kind, name in _ACTIVATIONS.items() if isinstance(activation, kind))
        if self.activation not in ("", name):
            raise self._mismatch(activation, f"{self.activation!r} as before")
        self.activation = name
        norm = self.take(nn.BatchNorm2d)
        self.check(norm, num_features=[conv.out_channels])
        assert conv.bias is not None and norm.running_mean is not None and norm.running_var is not None  # by take()
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        if (self._dtype or conv.weight.dtype) != torch.float64:
            scale = scale.float().double()
        return torch.stack([conv.bias.double(), scale, norm.bias.double() - norm.running_mean.double() * scale])

    @contextmanager
    def residual(self, dim: int) -> Iterator[None]:
        """Steps into the next leaf, a module fn(x) + x, for the leaves of fn."""
        accepted = "a module with one child fn and the forward fn(x) + x"
        module = self._pop(accepted)
        path, children = self._path, list(module.named_children())
        if len(children) != 1:
            raise self._mismatch(module, accepted)
        name, fn = children[0]
        outside, self._coming = self._coming, deque(_leaves(f"{path}.{name}", fn))
        yield
        self.end()
        self._coming = outside
        # Only a run tells what a module's forward does.
        like = next(fn.parameters())
        x = torch.linspace(-1, 1, dim * 6, dtype=like.dtype, device=like.device).view(1, dim, 2, 3)
        if not torch.equal(module(x), fn(x) + x):
            raise ValueError(f"{path} ({type(module).__name__}) does not give {name}(x) + x, accepted: {accepted}")

    def end(self) -> None:
        if self._coming:
            raise self._mismatch(self._pop(""), "nothing more")

    def _pop(self, accepted: str) -> nn.Module:
        if not self._coming:
            raise ValueError(f"nothing comes after {self._path}, accepted: {accepted}")
        self._path, module = self._coming.popleft()
        return module

    def _mismatch(self, module: nn.Module, accepted: str) -> ValueError:
        reason = next((f" ({reason})" for kind, reason in _REASONS.items() if isinstance(module, kind)), "")
        return ValueError(f"{self._path} is {type(module).__name__}, accepted: {accepted}{reason}")


def _is_chain(module: nn.Module) -> bool:
    forward = type(module).forward
    return f"{forward.__module__}.{forward.__qualname__}" in _CHAINS


def _leaves(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if _is_chain(module):
        for name, child in module._modules.items():  # named_children() leaves out a child's second use
            if child is None:
                raise ValueError(f"{path}.{name} is None, accepted: a module")
            yield from _leaves(f"{path}.{name}", child)
    elif type(module) not in (nn.Identity, nn.Dropout):  # which do nothing in eval mode
        yield path, module
