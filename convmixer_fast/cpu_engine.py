"""Runs an optimized ConvMixer on the CPU as one operator: its packed weights, and the memory its layers share."""

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops
from ._types import NETWORK_DTYPES
from .locks import give_lock

if TYPE_CHECKING:
    from .inference import OptimizedConvMixer

_MAX_IDLE_WORKSPACES = 4

_ops = torch.ops.convmixer_fast


class CpuEngine:
    """Runs forward passes of one network, from any thread.

    Memory is kept from call to call, for at most four calls at a time, and lent to one call at a time; what a call
    returns is its own.
    """

    _lock: threading.Lock

    def __init__(self, module: "OptimizedConvMixer"):
        """Packs the module's weights; later changes of them are not seen."""
        buffers = {name: buffer.contiguous() for name, buffer in module.named_buffers()}
        names = ("patch", "depthwise", "pointwise", "vectors", "head_weight", "head_bias")
        self._packed = ops._call(_ops.mixer_pack.default, *(buffers[name] for name in names))
        self._shapes = buffers["patch"], buffers["depthwise"], buffers["head_weight"]
        self._options = ops.ACTIVATIONS[module.activation], module.residual
        self._workspaces: list[Tensor] = []  # that no call is using; the one used last comes last
        give_lock(self)

    @staticmethod
    def runs(x: Tensor) -> bool:
        """Whether x can be run: a plain CPU tensor that nobody traces, and not float64."""
        plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in NETWORK_DTYPES
        return plain and not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    @staticmethod
    def takes(module: "OptimizedConvMixer") -> bool:
        """Whether it is for such a network: one that ends in average pooling and a head."""
        return module.pool == "avg" and module._buffers["head_weight"] is not None  # a search less than by attribute

    def __call__(self, x: Tensor, seconds: Tensor | None = None) -> Tensor:
        """The logits (N, n_classes) of images x (N, in_channels, H, W), of the weights' dtype.

        Args:
            seconds: float64 (2 depth + 4,) or None; receives the time of each stage: patches, their product, depthwise
                and 1x1 convolution of every layer in turn, pooling, head.
        """
        size = _ops.mixer_workspace_bytes.default(x, *self._shapes)
        workspace = self._take(size)
        if workspace is None:
            workspace = ops._call(_ops.mixer_workspace.default, self._packed, size)
        logits = ops._call(_ops.mixer.default, x, *self._shapes, self._packed, workspace, *self._options, seconds)
        with self._lock:
            self._workspaces = [*self._workspaces, workspace][-_MAX_IDLE_WORKSPACES:]
        return logits

    def _take(self, size: int) -> Tensor | None:
        """The smallest workspace of so many bytes or more, of several the one used last, which the caches may still
        hold. Where none has as many, the largest goes and makes room."""
        with self._lock:
            if not self._workspaces:
                return None
            fitting = [workspace for workspace in reversed(self._workspaces) if workspace.numel() >= size]
            taken = min(fitting, key=Tensor.numel) if fitting else max(self._workspaces, key=Tensor.numel)
            self._workspaces = [workspace for workspace in self._workspaces if workspace is not taken]
        return taken if fitting else None
