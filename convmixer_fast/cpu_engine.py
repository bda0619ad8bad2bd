"""Runs an optimized ConvMixer on the CPU as one operator: its packed weights, and the memory its layers share."""

import threading

import torch
from torch import Tensor, nn

from . import ops

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WEIGHTS = ("patch", "depthwise", "pointwise", "vectors", "head_weight", "head_bias")  # as mixer_pack takes them

_ops = torch.ops.convmixer_fast


class CpuEngine:
    """What an :class:`OptimizedConvMixer` keeps for the CPU: made from its buffers, and made anew once they change.

    Any number of threads may call it at once. Copying or pickling it gives an empty one.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._packed: Tensor | None = None
        self._buffers: list[Tensor] = []  # that _packed was made from
        self._versions: list[tuple[int, int]] = []
        self._workspaces: list[Tensor] = []  # that no call is using

    def __reduce__(self):
        return CpuEngine, ()

    @staticmethod
    def runs(x: Tensor) -> bool:
        """Whether x can be run: a plain CPU tensor that nobody traces, neither float64."""
        plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in _DTYPES
        return plain and not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    def __call__(self, module: nn.Module, x: Tensor, seconds: Tensor | None = None) -> Tensor:
        """The logits (N, n_classes) of images x (N, in_channels, H, W), of the dtype of module's buffers.

        Args:
            module: the OptimizedConvMixer this engine belongs to.
            seconds: float64 (2 depth + 4,) or None; receives the time of each step: patches, their product, depthwise
                and pointwise of every layer in turn, pooling, head.
        """
        packed = self._pack(module)
        shapes = module.patch, module.depthwise, module.head_weight
        size = -(-_ops.mixer_workspace.default(x, *shapes) // 4)
        try:
            workspace = self._workspaces.pop()
        except IndexError:
            workspace = torch.empty(0)
        if workspace.numel() < size:
            workspace = torch.zeros(size)
        logits = ops._call(
            _ops.mixer.default, x, *shapes, packed, workspace, ops.ACTIVATIONS[module.activation], seconds
        )
        self._workspaces.append(workspace)
        return logits

    def _pack(self, module: nn.Module) -> Tensor:
        with self._lock:
            buffers = [getattr(module, name) for name in _WEIGHTS]
            for name, buffer in zip(_WEIGHTS, buffers):
                if buffer.is_inference():  # counts no versions: the module gets a copy that does
                    with torch.inference_mode(False):
                        setattr(module, name, buffer.clone())
            buffers = [getattr(module, name) for name in _WEIGHTS]
            versions = [(buffer._version, buffer.data_ptr()) for buffer in buffers]
            same = len(self._buffers) == len(buffers) and all(map(lambda a, b: a is b, self._buffers, buffers))
            if not same or versions != self._versions:
                patch, depthwise, pointwise, vectors, *head = (buffer.contiguous() for buffer in buffers)
                self._packed = _ops.mixer_pack.default(patch, depthwise, pointwise, vectors.float(), *head)
                self._buffers, self._versions = buffers, versions
            return self._packed
