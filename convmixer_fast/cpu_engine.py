"""Runs an optimized ConvMixer on the CPU as one operator: its packed weights, and the memory its layers share."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .inference import OptimizedConvMixer

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_ops = torch.ops.convmixer_fast


class CpuEngine:
    """Runs forward passes of one network, from any thread.

    Memory is kept from call to call and lent to one call at a time; what a call returns is its own.
    """

    def __init__(self, module: "OptimizedConvMixer"):
        """Packs the module's weights; later changes of them are not seen."""
        patch, depthwise, pointwise, vectors, *head = (buffer.contiguous() for buffer in module.buffers())
        self._packed = ops._call(_ops.mixer_pack.default, patch, depthwise, pointwise, vectors, *head)
        self._shapes = patch, depthwise, head[0]
        self._options = ops.ACTIVATIONS[module.activation], module.residual
        self._workspaces: list[Tensor] = []  # that no call is using

    @staticmethod
    def runs(x: Tensor) -> bool:
        """Whether x can be run: a plain CPU tensor that nobody traces, and not float64."""
        plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in _DTYPES
        return plain and not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    def __call__(self, x: Tensor, seconds: Tensor | None = None) -> Tensor:
        """The logits (N, n_classes) of images x (N, in_channels, H, W), of the weights' dtype.

        Args:
            seconds: float64 (2 depth + 4,) or None; receives the time of each step: patches, their product, depthwise
                and pointwise of every layer in turn, pooling, head.
        """
        size = _ops.mixer_workspace_bytes.default(x, *self._shapes)
        workspace: Tensor | None
        try:
            workspace = self._workspaces.pop()
        except IndexError:
            workspace = None
        if workspace is None or workspace.nbytes < size:
            workspace = ops._call(_ops.mixer_workspace.default, self._packed, size)
        logits = ops._call(_ops.mixer.default, x, *self._shapes, self._packed, workspace, *self._options, seconds)
        self._workspaces.append(workspace)
        return logits
