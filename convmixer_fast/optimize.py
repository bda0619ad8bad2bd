"""Takes a trained ConvMixer apart and gives its weights to the module for inference."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_hooks

from ._types import ACTIVATIONS, DTYPES
from .inference import OptimizedConvMixer
from .model import Residual
from .nn import DepthwiseConv2d

# Modules whose forward runs their children one after the other, by the name of that function: no import of timm.
_CHAINS = {
    "torch.nn.modules.container.Sequential.forward",
    "convmixer_fast.model.ConvMixer.forward",
    "timm.models.convmixer.ConvMixer.forward",
    "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d.forward",
}
# What makes features of the map, by the name of the forward of the module that does.
_POOLS = {
    "torch.nn.modules.pooling.AdaptiveAvgPool2d.forward": "avg",
    "torch.nn.modules.pooling.AdaptiveMaxPool2d.forward": "max",
    "timm.layers.adaptive_avgmax_pool.AdaptiveAvgMaxPool2d.forward": "avgmax",
    "timm.layers.adaptive_avgmax_pool.AdaptiveCatAvgMaxPool2d.forward": "catavgmax",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool.forward": "avg",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveMaxPool.forward": "max",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgMaxPool.forward": "avgmax",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveCatAvgMaxPool.forward": "catavgmax",
}
_A_POOL = "a global pooling such as nn.AdaptiveAvgPool2d"
_A_RESIDUAL = "a module with one child fn and the forward fn(x) + x"
_FROZEN = "FrozenBatchNorm2d"  # the class has this name in torchvision, detectron2, DETR and others
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.SyncBatchNorm)
# The layers that may follow a convolution: each activation's name, and what the layer must be set to.
_LAYERS = {known.module: (name, known.attributes) for name, known in ACTIVATIONS.items() if known.module}
# What the fused step cannot express, and why, by module.
_REASONS = {
    Residual: "the fused step adds its input in the spatial half of every layer or of none, and nowhere else",
    nn.LayerNorm: "its mean and variance depend on the image, so it is no fixed scale and shift",
}
# In units of the largest value, of which two orders of the same sums in float64 differ by 3e-16 in the paper's largest
# networks.
_TOLERANCE = 1e-6
_Module = TypeVar("_Module", bound=nn.Module)


def optimize(
    model: nn.Module, dtype: torch.dtype | None = None, *, chunk: int | str = "auto", cuda_graphs: bool = False
) -> OptimizedConvMixer:
    """A module for inference with the forward pass of a trained ConvMixer, on the fused operators.

    BatchNorm becomes a scale and a shift, computed in float64. The given model stays as it is and shares no memory
    with the new one. Copies of both run once on the CPU in float64, on two images of 2 x 3 patches, and must give the
    same.

    Args:
        model: in eval mode: a ConvMixer of this package or of timm, or an nn.Sequential as in the paper's Figure 3:
            patch convolution, then layers, then nn.AdaptiveAvgPool2d(1), nn.Flatten and nn.Linear. Every convolution
            has a bias and is followed by an activation that ConvMixer has, the same everywhere, and by nn.BatchNorm2d,
            nn.SyncBatchNorm or a FrozenBatchNorm2d. The depthwise ones have one size and padding "same", or
            (k - 1) // 2 if it is odd, and are in a module with one child fn (of any name) whose forward is fn(x) + x;
            or all of them are in none, without a residual. What follows the layers may end anywhere: then the result
            is the map, or features. Pooling may be nn.AdaptiveMaxPool2d(1) too, or any of timm's. No module may have
            forward hooks, or a method of its own in place of one that its class calls.
        dtype: torch.float64, float32, float16 or bfloat16, to convert the weights to; None: theirs.
        chunk: on a GPU, and on a CPU where a library multiplies, how many images at most go through all layers before
            the next ones start, which bounds the memory of the activations; more go in chunks of equal size, or one
            less. "auto": all together.
        cuda_graphs: on a GPU, record the kernels of a forward pass once for each shape of images (the 8 used last are
            kept) and replay them: no launch gaps, which matter for few images and small maps.

    Raises:
        TypeError: model is not a module, or cuda_graphs not a bool.
        ValueError: dtype or chunk is another one; or the first module that is in training mode or does not match, by
            its path; or the model gives something else than the network that its modules make up.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if isinstance(chunk, bool) or not (chunk == "auto" or isinstance(chunk, int) and chunk >= 1):
        raise ValueError(f"chunk must be 'auto' or an int from 1 up, got {chunk!r}")
    if not isinstance(cuda_graphs, bool):
        raise TypeError(f"cuda_graphs must be a bool, got {cuda_graphs!r}")
    if not _is_chain(model):
        wrapped = next((f"; pass model.{name}" for name in ("module", "_orig_mod") if name in model._modules), "")
        raise ValueError(
            f"model is {type(model).__name__}, accepted: convmixer_fast.ConvMixer, timm's ConvMixer, nn.Sequential"
            + wrapped
        )
    _check_calls(model)
    _check_tensors(model)
    with torch.no_grad():
        twins = _in_float64(model)
        parts = _take_apart(twins[model])
        _compare(twins[model], parts.assemble(torch.float64))
        patch = next(module for module, twin in twins.items() if twin is parts.patch).weight
        assert isinstance(patch, Tensor)
        optimized = parts.assemble(dtype or patch.dtype, chunk, cuda_graphs)
        return optimized.to(patch.device)


def _check_calls(model: nn.Module) -> None:
    """Raises ValueError at the first module of which a call does not, or not only, run its class's methods, or runs
    them in training mode."""
    every = dict(_torch_hooks._global_forward_pre_hooks) | dict(_torch_hooks._global_forward_hooks)
    for hook in every.values():
        raise ValueError(f"every module has the global forward hook {_name(hook)}, accepted: none; remove it first")
    for path, module in model.named_modules(prefix="model"):
        what = f"{path} ({type(module).__name__})"
        if module.training:
            raise ValueError(f"{what} is in training mode, accepted: eval mode, model.eval()")
        if "_orig_mod" in module._modules:
            raise ValueError(f"{what} was made by torch.compile, accepted: the module that it was given, ._orig_mod")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{what} was made by torch.jit, accepted: the module that it was given")
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            raise ValueError(f"{what} has the forward hook {_name(hook)}, accepted: none; remove it first")
        for method in _methods(type(module)):
            if method in vars(module):
                raise ValueError(f"{what} has its {method} replaced, accepted: the method of its class")


def _check_tensors(model: nn.Module) -> None:
    """Raises ValueError at the first parameter or buffer that is no plain tensor of an accepted dtype, in memory."""
    for path, module in model.named_modules(prefix="model"):
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is None:
                continue
            what = f"{path}.{name} is"
            if type(tensor) not in (Tensor, nn.Parameter):
                raise ValueError(f"{what} a {type(tensor).__name__}, accepted: a plain tensor")
            if tensor.device.type not in ("cpu", "cuda"):
                raise ValueError(f"{what} on {tensor.device}, accepted: cpu or cuda")
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in DTYPES:
                raise ValueError(f"{what} {tensor.dtype}, accepted: one of {', '.join(map(str, DTYPES))}")


def _in_float64(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """A twin of each module, the model's own first: on the CPU, with float64 tensors; all else is shared."""
    twins: dict[nn.Module, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if module not in twins:
            new = twins[module] = object.__new__(type(module))  # copy.copy refuses parametrized ones
            vars(new).update(vars(module))
            vars(new).update(
                _parameters={name: converted(tensor) for name, tensor in module._parameters.items()},
                _buffers={name: converted(tensor) for name, tensor in module._buffers.items()},
                _modules={name: None if child is None else twin(child) for name, child in module._modules.items()},
                _compiled_call_impl=None,  # model.compile(): the same network, to be run as it is written
            )
        return twins[module]

    def converted(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype)

    twin(model)
    return twins


def _compare(model: nn.Module, optimized: OptimizedConvMixer) -> None:
    """Raises ValueError unless the two, both in float64 on the CPU, give the same to within their rounding."""
    channels, height, width = optimized.patch.shape[1:]
    shape = 2, channels, 3 * height - 1, 4 * width - 1  # 2 x 3 patches, and a rest where they are larger than a pixel
    x = torch.randn(shape, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    expected, result = model(x), optimized.by_operators(x)
    found = f"model does not give what the network of its modules gives, accepted: the same; on images of {shape} "
    if not isinstance(expected, Tensor):
        raise ValueError(f"{found}it gives {type(expected).__name__}, the network a tensor")
    if expected.shape != result.shape:
        raise ValueError(f"{found}it gives {tuple(expected.shape)}, the network {tuple(result.shape)}")
    # Neither infinities nor NaN have a distance: two ways to add may end in either.
    comparable = expected.isfinite() | result.isfinite()
    off = torch.where(comparable, (expected - result).abs(), 0).max()
    largest = torch.where(expected.isfinite(), expected.abs(), 0).max()
    if not off <= _TOLERANCE * largest:
        raise ValueError(f"{found}they differ by {off:.3g}, where the largest value is {largest:.3g}")


@dataclass(frozen=True)
class _Parts:
    """A network, checked: its modules in the order in which they run.

    Attributes:
        patch, depthwise, pointwise: convolutions.
        norms: after each convolution, as they run.
        activation, residual, pool, flatten: as OptimizedConvMixer has them.
        head: or None.
    """

    patch: nn.Conv2d
    depthwise: list[nn.Conv2d]
    pointwise: list[nn.Conv2d]
    norms: list[nn.Module]
    activation: str
    residual: bool
    pool: str
    flatten: bool
    head: nn.Linear | None

    def assemble(self, dtype: torch.dtype, chunk: int | str = "auto", cuda_graphs: bool = False) -> OptimizedConvMixer:
        """The module for inference, with copies of the weights in this dtype."""

        def converted(tensor: Tensor) -> Tensor:
            return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)

        layers = [conv for layer in zip(self.depthwise, self.pointwise) for conv in layer]
        head_weight = head_bias = None
        if self.head is not None:
            head_weight = converted(self.head.weight)
            head_bias = head_weight.new_zeros(len(head_weight)) if self.head.bias is None else converted(self.head.bias)
        return OptimizedConvMixer(
            patch=converted(self.patch.weight),
            depthwise=torch.stack([conv.weight.to(dtype) for conv in self.depthwise]).contiguous(),
            pointwise=torch.stack([conv.weight.flatten(1).to(dtype) for conv in self.pointwise]).contiguous(),
            vectors=torch.stack([_vectors(*pair, dtype) for pair in zip([self.patch, *layers], self.norms)]),
            head_weight=head_weight,
            head_bias=head_bias,
            activation=self.activation,
            residual=self.residual,
            chunk=chunk,
            cuda_graphs=cuda_graphs,
            pool=self.pool,
            flatten=self.flatten,
        )


def _vectors(conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype) -> Tensor:
    """Bias, scale and shift (3, dim) in float64, of a convolution and the BatchNorm after its activation. The scale is
    rounded as it will be used, and the shift takes the mean by that scale: else its rounding times the mean would be an
    error of every pixel, which no pooling averages out."""
    names = "running_mean", "running_var", "weight", "bias"
    mean, variance, weight, bias = (getattr(norm, name, None) for name in names)
    assert mean is not None and variance is not None  # by _Leaves.take_norm
    deviation = (variance + getattr(norm, "eps", 1e-5)).sqrt()  # 1e-5: of frozen ones that cannot have another
    scale = (torch.ones_like(mean) if weight is None else weight) / deviation
    if dtype != torch.float64:
        scale = scale.float().double()
    shift = -mean * scale if bias is None else bias - mean * scale
    assert conv.bias is not None  # by _Leaves.take_conv
    return torch.stack([conv.bias, scale, shift])


def _take_apart(model: nn.Module) -> _Parts:
    """The parts of a model; raises ValueError at the first that does not match."""
    leaves = _Leaves(model)
    patch = leaves.take_conv()
    dim = patch.out_channels
    plain: dict[str, list[Any]] = dict(dilation=[(1, 1)], padding_mode=["zeros"])
    leaves.check(patch, stride=[patch.kernel_size], padding=["valid", (0, 0)], groups=[1], **plain)
    norms = [leaves.take_norm(patch)]
    depthwise: list[nn.Conv2d] = []
    pointwise: list[nn.Conv2d] = []
    plain |= dict(in_channels=[dim], out_channels=[dim], stride=[(1, 1)])
    residual = not leaves.next_is(nn.Conv2d)  # in the first layer, and so in all
    while not depthwise or leaves.left() and not leaves.next_is_pool():
        instead = f", or {_A_POOL}" if depthwise else ""
        with leaves.residual(dim, instead) if residual else nullcontext():
            conv = leaves.take_conv("" if residual else instead)
            kernel_size = depthwise[0].kernel_size if depthwise else conv.kernel_size
            padding: list[Any] = ["same"]
            if all(size % 2 for size in kernel_size):
                padding.append(tuple(size // 2 for size in kernel_size))
            leaves.check(conv, kernel_size=[kernel_size], groups=[dim], padding=padding, **plain)
            depthwise.append(conv)
            norms.append(leaves.take_norm(conv))
        conv = leaves.take_conv()
        leaves.check(conv, kernel_size=[(1, 1)], groups=[1], padding=["same", "valid", (0, 0)], **plain)
        pointwise.append(conv)
        norms.append(leaves.take_norm(conv))
    pool, flatten, head = "", False, None
    if leaves.left():
        pool, flatten = leaves.take_pool()
        if leaves.left() and not flatten:
            leaves.check(leaves.take(nn.Flatten), start_dim=[1], end_dim=[-1, 3])
            flatten = True
        if leaves.left():
            head = leaves.take(nn.Linear)
            leaves.check(head, in_features=[2 * dim if pool == "catavgmax" else dim])
            leaves.check_shape(head, (head.out_features, head.in_features))
    leaves.end()
    return _Parts(patch, depthwise, pointwise, norms, leaves.activation, residual, pool, flatten, head)


class _Leaves:
    """Takes a model's leaves in the order in which they run; raises ValueError at the first that does not match."""

    def __init__(self, model: nn.Module):
        self._coming = deque(_leaves("model", model))
        self._path = "model"  # of the leaf taken last
        self.activation = ""  # that of all layers, known from the first one

    def left(self) -> bool:
        return bool(self._coming)

    def next_is(self, kind: type[nn.Module]) -> bool:
        return self.left() and isinstance(self._coming[0][1], kind)

    def next_is_pool(self) -> bool:
        return self.left() and _forward_name(self._coming[0][1]) in _POOLS

    def take(self, *kinds: type[_Module], instead: str = "") -> _Module:
        """The next leaf, which must be of one of these kinds and run as those do. instead: what else is accepted."""
        accepted = " or ".join(f"nn.{kind.__name__}" for kind in kinds) + instead
        leaf = self._pop(accepted)
        for kind in kinds:
            if isinstance(leaf, kind):
                base = DepthwiseConv2d if isinstance(leaf, DepthwiseConv2d) else kind
                if type(leaf).forward is base.forward:
                    _check_methods(self._path, leaf, base)
                    return leaf
        raise self._mismatch(leaf, accepted)

    def check(self, module: nn.Module, **accepted: list[Any]) -> None:
        """Compares attributes of the leaf taken last with the values accepted for them."""
        for name, values in accepted.items():
            value = getattr(module, name)
            if value not in values:
                raise ValueError(f"{self._path}.{name} is {value!r}, accepted: {' or '.join(map(repr, values))}")

    def check_shape(self, module: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> None:
        """Compares the weight, and the bias if there is one, of the leaf taken last with what its attributes say."""
        for name, tensor, expected in (("weight", module.weight, shape), ("bias", module.bias, shape[:1])):
            if tensor is not None and tensor.shape != expected:
                raise ValueError(f"{self._path}.{name} is of shape {tuple(tensor.shape)}, accepted: {expected}")
        if 0 in shape:
            raise ValueError(f"{self._path}.weight is of shape {shape}, accepted: sizes from 1 up")

    def take_conv(self, instead: str = "") -> nn.Conv2d:
        conv = self.take(nn.Conv2d, instead=instead)
        self._check_present(conv, "bias")
        self.check_shape(conv, (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size))
        return conv

    def take_norm(self, conv: nn.Conv2d) -> nn.Module:
        """The BatchNorm after the next leaf, the activation, after conv."""
        activation = self.take(*_LAYERS)
        name, attributes = next(found for kind, found in _LAYERS.items() if isinstance(activation, kind))
        self.check(activation, **{attribute: [value] for attribute, value in attributes.items()})
        if self.activation not in ("", name):
            raise self._mismatch(activation, f"{self.activation!r} as before")
        self.activation = name
        if self.left() and type(self._coming[0][1]).__name__ == _FROZEN:
            norm = self._pop("")
        else:
            norm = self.take(*_NORMS, instead=f" or {_FROZEN}")
        self._check_present(norm, "running_mean", "running_var")
        for name in ("running_mean", "running_var", "weight", "bias"):
            tensor = getattr(norm, name, None)
            if tensor is not None and tensor.shape != (conv.out_channels,):
                shape = tuple(tensor.shape)
                raise ValueError(f"{self._path}.{name} is of shape {shape}, accepted: {(conv.out_channels,)}")
        return norm

    def take_pool(self) -> tuple[str, bool]:
        """How the next leaf pools, and whether it flattens."""
        leaf = self._pop(_A_POOL)
        accepted: dict[str, list[Any]] = dict(output_size=[1, (1, 1)], return_indices=[False])
        self.check(leaf, **{name: values for name, values in accepted.items() if hasattr(leaf, name)})
        return _POOLS[_forward_name(leaf)], getattr(leaf, "flatten", False)

    @contextmanager
    def residual(self, dim: int, instead: str) -> Iterator[None]:
        """Steps into the next leaf, a module fn(x) + x, for the leaves of fn. instead: what else is accepted."""
        accepted = _A_RESIDUAL + instead
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
        x = torch.linspace(-1, 1, dim * 6, dtype=torch.float64, device="cpu").view(1, dim, 2, 3)
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

    def _check_present(self, module: nn.Module, *names: str) -> None:
        for name in names:
            if getattr(module, name, None) is None:
                raise ValueError(f"{self._path}.{name} is None, accepted: a tensor")

    def _mismatch(self, module: nn.Module, accepted: str) -> ValueError:
        reason = next((f" ({reason})" for kind, reason in _REASONS.items() if isinstance(module, kind)), "")
        return ValueError(f"{self._path} is {type(module).__name__}, accepted: {accepted}{reason}")


def _forward_name(module: nn.Module) -> str:
    forward = getattr(type(module), "forward", None)  # classes of torch.jit have none
    return f"{forward.__module__}.{forward.__qualname__}" if isinstance(forward, FunctionType) else ""


def _is_chain(module: nn.Module) -> bool:
    return _forward_name(module) in _CHAINS


def _leaves(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if _is_chain(module):
        _check_methods(path, module, next(kind for kind in type(module).__mro__ if "forward" in vars(kind)))
        for name, child in module._modules.items():  # named_children() leaves out a child's second use
            if child is None:
                raise ValueError(f"{path}.{name} is None, accepted: a module")
            yield from _leaves(f"{path}.{name}", child)
    elif type(module) not in (nn.Identity, nn.Dropout):  # which do nothing in eval mode
        yield path, module


def _check_methods(path: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises ValueError if a call of the module runs other methods than one of its base class `kind` does."""
    for name in _methods(kind):
        if getattr(type(module), name) is not getattr(kind, name):
            raise ValueError(
                f"{path} ({type(module).__name__}) has a {name} of its own, accepted: that of {kind.__name__}"
            )


def _methods(kind: type[nn.Module]) -> list[str]:
    """The names of the methods that a call of such a module runs, as far as the code of its forward names them."""
    names = ["forward"]
    for name in names:  # which grow
        code = getattr(kind, name).__code__ if _is_method(kind, name) else None
        new = (each for each in _names(code) if _is_method(kind, each) and not hasattr(nn.Module, each)) if code else ()
        names += [each for each in new if each not in names]
    return [name for name in ("__call__", "_call_impl", "__getattr__", "__iter__", *names) if hasattr(kind, name)]


def _is_method(kind: type[nn.Module], name: str) -> bool:
    return isinstance(getattr(kind, name, None), FunctionType)


def _names(code: CodeType) -> Iterator[str]:
    yield from dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside, such as a comprehension
            yield from _names(constant)


def _name(hook: object) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
