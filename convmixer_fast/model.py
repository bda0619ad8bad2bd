"""ConvMixer, trainable, with the models of "Patches Are All You Need?" (arXiv 2201.09792) by name."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _types
from .nn import DepthwiseConv2d, check_size

ACTIVATIONS = {name: known.module for name, known in _types.ACTIVATIONS.items() if known.module}
HALVES = ("spatial", "channel")  # of a layer: equations 2 and 3


class Residual(nn.Module):
    """fn(x) + x."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (N, C, H, W), as in transformers."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return pixels.permute(0, 3, 1, 2)


NORMS = {"batch": nn.BatchNorm2d, "layer": ChannelLayerNorm}


class ConvMixer(nn.Module):
    """Patch embedding, ``depth`` layers of depthwise and 1x1 convolution, average pooling, linear classifier.

    "Patches Are All You Need?", section 2, equations 1-3 and Figure 3. The keys of the state dict are those of timm's
    ConvMixer. The number of parameters is the paper's equation 4: with width h, depth d, kernel k, patch p, c input
    channels and n classes, h [d (k^2 + h + 6) + c p^2 + 3 + n] + n.

    Args:
        dim: width h, the channels of every layer.
        depth: number of layers d.
        kernel_size: k, of the depthwise convolutions; "same" padding, so even sizes work.
        patch_size: p, side and stride of the patches.
        n_classes: number of logits.
        in_channels: channels of the images.
        activation: a key of ACTIVATIONS, such as "gelu" (erf form).
        residual: the halves of a layer that add their input to their result: any of "spatial" (equation 2) and
            "channel" (equation 3). Others than the default are ablations of the paper's Table 3.
        norm: "batch", or "layer" for that table's LayerNorm: over the channels of each pixel.

    Raises:
        TypeError, ValueError: an argument that is not a positive integer, or an unknown activation, half or norm.
    """

    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    n_classes: int
    in_channels: int

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        n_classes: int = 1000,
        in_channels: int = 3,
        activation: str = "gelu",
        residual: Sequence[str] = ("spatial",),
        norm: str = "batch",
    ):
        super().__init__()
        sizes = dict(
            dim=dim,
            depth=depth,
            kernel_size=kernel_size,
            patch_size=patch_size,
            n_classes=n_classes,
            in_channels=in_channels,
        )
        for name, size in sizes.items():
            check_size(name, size)
            setattr(self, name, size)
        check_activation(activation)
        _check_choice("norm", norm, NORMS)
        halves = list(residual) if isinstance(residual, Iterable) else [residual]
        if isinstance(residual, str) or any(half not in HALVES for half in halves):
            raise ValueError(f"residual must be a tuple of any of {', '.join(map(repr, HALVES))}, got {residual!r}")
        self.activation = activation
        self.residual = tuple(half for half in HALVES if half in halves)
        self.norm = norm

        def activate_and_normalize() -> tuple[nn.Module, nn.Module]:
            return ACTIVATIONS[activation](), NORMS[norm](dim)

        def layer() -> nn.Sequential:
            spatial = nn.Sequential(DepthwiseConv2d(dim, kernel_size), *activate_and_normalize())
            channel = nn.Sequential(nn.Conv2d(dim, dim, 1), *activate_and_normalize())
            return nn.Sequential(
                Residual(spatial) if "spatial" in halves else spatial,
                *([Residual(channel)] if "channel" in halves else channel),
            )

        self.stem = nn.Sequential(nn.Conv2d(in_channels, dim, patch_size, stride=patch_size), *activate_and_normalize())
        self.blocks = nn.Sequential(*(layer() for _ in range(depth)))
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(dim, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, n_classes) of images (N, in_channels, H, W).

        H and W may be anything from one patch up; what is left over after the last whole patch is not seen.

        Raises:
            ValueError: x is not of that shape.
        """
        return self.head(self.global_pool(self.forward_features(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """The map (N, dim, H // patch_size, W // patch_size) before pooling, for dense prediction; x as in forward."""
        x = check_images(x, self.in_channels, self.patch_size, self.patch_size)
        return self.blocks(self.stem(x))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, residual={self.residual}, norm={self.norm!r}"


def check_activation(activation: str) -> None:
    _check_choice("activation", activation, ACTIVATIONS)


def _check_choice(name: str, choice: str, accepted: Iterable[str]) -> None:
    if choice not in list(accepted):  # a dict would want something hashable
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {choice!r}")


@torch.fx.wrap  # one node of a traced graph, as the shape that it looks at is not known there
def check_images(x: Tensor, in_channels: int, patch_height: int, patch_width: int) -> Tensor:
    """x itself, so that a graph keeps this; raises ValueError unless it is a batch of images of at least one patch."""
    if x.dim() != 4 or x.shape[1] != in_channels or x.shape[2] < patch_height or x.shape[3] < patch_width:
        shape = str(list(x.shape))[1:-1]  # TorchScript cannot make a tuple of it
        raise ValueError(
            f"x must be of shape (N, {in_channels}, H, W) with at least one patch, H >= {patch_height} and "
            f"W >= {patch_width}, got ({shape})"
        )
    return x


@dataclass(frozen=True)
class Variant:
    """The arguments that make a named model."""

    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    n_classes: int
    activation: str

    @property
    def name(self) -> str:
        return f"convmixer_{self.dim}_{self.depth}_k{self.kernel_size}_p{self.patch_size}"


def _variants(n_classes: int, activation: str, *sizes: tuple[int, int, int, int]) -> list[Variant]:
    return [Variant(*size, n_classes, activation) for size in sizes]


# Every ConvMixer of the paper's tables as (dim, depth, kernel_size, patch_size). Equation 4 gives the parameters that
# the tables state, but for 768/32 with k = 3 and p = 14: 20.5 million, where the paper says 20.2.
VARIANTS = {
    variant.name: variant
    for variant in (
        # ImageNet-1k
        *_variants(
            1000,
            "gelu",
            (1536, 20, 9, 7),
            (1536, 20, 3, 7),
            (1536, 20, 9, 14),
            (1536, 24, 9, 14),
            (1024, 20, 9, 14),
            (1024, 16, 9, 7),
            (1024, 12, 8, 7),
            (512, 16, 8, 7),
            (512, 12, 8, 7),
        ),
        *_variants(1000, "relu", (768, 32, 7, 7), (768, 32, 3, 14)),
        # CIFAR-10
        *_variants(10, "gelu", *((128, depth, 8, 1) for depth in (4, 8, 12))),
        *_variants(10, "gelu", *((256, depth, 8, 1) for depth in (4, 8, 12, 16, 20))),
        *_variants(10, "gelu", *((256, 8, kernel_size, 1) for kernel_size in (3, 5, 7, 9, 11, 13, 15))),
        *_variants(10, "gelu", *((256, 8, kernel_size, 2) for kernel_size in (3, 5, 7, 9, 11))),
        *_variants(10, "gelu", *((256, 8, 9, patch_size) for patch_size in (4, 8))),
    )
}

# The names of the authors' releases and of timm.
ALIASES = {
    "convmixer_1536_20": "convmixer_1536_20_k9_p7",
    "convmixer_768_32": "convmixer_768_32_k7_p7",
    "convmixer_1024_20_ks9_p14": "convmixer_1024_20_k9_p14",
}


def list_models(pattern: str = "*") -> list[str]:
    """The names that create_model knows and that match a shell pattern, such as "convmixer_256_*".

    A name is convmixer_{dim}_{depth}_k{kernel_size}_p{patch_size}. The three pretrained models of the authors have an
    alias each, the name timm gives them, which create_model takes too: convmixer_1536_20, convmixer_768_32 and
    convmixer_1024_20_ks9_p14.

    Raises:
        TypeError: pattern is not a str.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a str, got {pattern!r}")
    return [name for name in VARIANTS if fnmatchcase(name, pattern)]


def create_model(name: str, **overrides: Any) -> ConvMixer:
    """A ConvMixer of the paper with random weights.

    Args:
        name: of list_models(), or an alias.
        overrides: arguments of ConvMixer to use in place of the model's own, such as n_classes=10.

    Raises:
        ValueError: the name is unknown.
        TypeError: an override is no argument of ConvMixer, or name not a str; also as ConvMixer.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    arguments = inspect.signature(ConvMixer).parameters
    for override in overrides:
        if override not in arguments:
            raise TypeError(f"overrides must be arguments of ConvMixer, {', '.join(arguments)}; got {override}")
    variant = VARIANTS.get(ALIASES.get(name, name))
    if variant is None:
        raise ValueError(f"name must be one of list_models() or {', '.join(map(repr, ALIASES))}, got {name!r}")
    return ConvMixer(**asdict(variant) | overrides)
