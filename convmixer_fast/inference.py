"""The module that optimize() makes: a ConvMixer's forward pass on the fused operators."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .cpu_engine import CpuEngine
from .model import check_images


class OptimizedConvMixer(nn.Module):
    """The forward pass of a ConvMixer with two steps a layer: a fused depthwise convolution and a matrix product.

    Made by :func:`convmixer_fast.optimize`. The fused step takes a convolution's raw output, applies its bias, activation and
    BatchNorm on the way in, convolves, applies those of its own and adds the residual, in one pass over memory.

    It converts, moves, copies, pickles and saves as any module; the weights are buffers. The vectors of bias and
    BatchNorm stay float64 whatever the weights' dtype, and are used as float32 (float64 with float64 weights). It is
    for inference: train() raises RuntimeError, and so does an input that requires a gradient in grad mode.
    """

    def __init__(
        self,
        patch: Tensor,
        depthwise: Tensor,
        pointwise: Tensor,
        vectors: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
        activation: str,
    ):
        """
        Args:
            patch: (dim, in_channels, ph, pw), weight of the patch convolution.
            depthwise: (depth, dim, 1, kh, kw).
            pointwise: (depth, dim, dim).
            vectors: (2 depth + 1, 3, dim), float64: bias, scale and shift after each convolution, as they run.
            head_weight: (n_classes, dim).
            head_bias: (n_classes,).
            activation: "gelu" or "relu".
        """
        super().__init__()
        self.register_buffer("patch", patch)
        self.register_buffer("depthwise", depthwise)
        self.register_buffer("pointwise", pointwise)
        self.register_buffer("vectors", vectors)
        self.register_buffer("head_weight", head_weight)
        self.register_buffer("head_bias", head_bias)
        self.activation = activation
        self.training = False
        self._cpu = CpuEngine()

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, n_classes) of images (N, in_channels, H, W), both of the weights' dtype.

        Raises:
            TypeError: x is of another dtype.
            ValueError: x is not of that shape, or smaller than a patch.
        """
        if x.dtype != self.patch.dtype:
            raise TypeError(f"x must be {self.patch.dtype} as the weights, got {x.dtype}")
        check_images(x, *self.patch.shape[1:])
        if CpuEngine.runs(x):
            return self._cpu(self, x)
        layout = torch.contiguous_format if x.is_cuda else torch.channels_last
        arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
        after_patch, *after = (vectors.unbind() for vectors in self.vectors.to(arithmetic).unbind())

        x = x.contiguous(memory_format=layout)
        x = F.conv2d(x, self.patch, stride=self.patch.shape[2:]).contiguous(memory_format=layout)
        prologue = after_patch
        layers = zip(self.depthwise.unbind(), after[::2], self.pointwise.unbind(), after[1::2])
        for depthwise, after_depthwise, pointwise, after_pointwise in layers:
            x = ops.fused_depthwise(x, depthwise, *after_depthwise, self.activation, residual=True, prologue=prologue)
            x = _pointwise_conv2d(x, pointwise)
            prologue = after_pointwise
        return F.linear(ops.activate_pool(x, *prologue, self.activation), self.head_weight, self.head_bias)

    def train(self, mode: bool = True) -> "OptimizedConvMixer":
        if mode:
            raise RuntimeError("an optimized ConvMixer is for inference: train the model it was made from")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OptimizedConvMixer":
        """Moves all buffers, and converts all but the vectors: they would lose precision, and weigh little."""

        def keep_vectors(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor is self.vectors and moved.dtype != tensor.dtype else moved

        self._cpu = CpuEngine()
        return super()._apply(keep_vectors, recurse)

    def extra_repr(self) -> str:
        depth, dim, _, *kernel_size = self.depthwise.shape
        return (
            f"dim={dim}, depth={depth}, kernel_size={tuple(kernel_size)}, patch_size={tuple(self.patch.shape[2:])}, "
            f"n_classes={len(self.head_bias)}, in_channels={self.patch.shape[1]}, activation={self.activation!r}, "
            f"dtype={self.patch.dtype}"
        )


def _pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """The 1x1 convolution of x (N, C_in, H, W) with weight (C_out, C_in), by a library's matrix product."""
    if x.is_cuda:  # NCHW: one product an image, no copy
        return torch.matmul(weight, x.flatten(2)).unflatten(2, x.shape[2:])
    # channels_last, for which oneDNN has a product over all images; on the CPU it beat F.linear in most sizes measured
    return F.conv2d(x, weight[:, :, None, None])
