"""The module that optimize() makes: a ConvMixer's forward pass on the fused operators."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .cpu_engine import CpuEngine
from .gpu_engine import GpuEngine, Vectors, unbound
from .model import check_images
from .reference import activate_and_normalize


class OptimizedConvMixer(nn.Module):
    """The forward pass of a ConvMixer with two steps a layer: a fused depthwise convolution and a matrix product.

    Made by :func:`convmixer_fast.optimize`. The fused step takes a convolution's raw output, applies its bias,
    activation and BatchNorm on the way in, convolves, applies those of its own and adds the residual, in one pass over
    memory.

    It converts, moves, copies, pickles and saves as any module; the weights are buffers. The vectors of bias and
    BatchNorm stay float64 whatever the weights' dtype, and are used as float32 (float64 with float64 weights); the
    scale is rounded once, when it is made: ask optimize() for float64 rather than converting later. It is
    for inference: train() raises RuntimeError, and so does an input that requires a gradient in grad mode. It computes
    in the weights' dtype under torch.autocast as well.

    On a GPU it keeps two buffers of activations (dim, images of a chunk, map) for each stream in use, for at most four
    calls at a time, and with CUDA graphs, besides two for all graphs, the images and logits of each. Any threads and
    streams may call it, and the caller may capture it into a CUDA graph; what a call returns no later call touches.
    """

    patch: Tensor
    depthwise: Tensor
    pointwise: Tensor
    vectors: Tensor
    head_weight: Tensor
    head_bias: Tensor

    def __init__(
        self,
        patch: Tensor,
        depthwise: Tensor,
        pointwise: Tensor,
        vectors: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
        activation: str,
        residual: bool = True,
        chunk: int | str = "auto",
        cuda_graphs: bool = False,
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
            residual: whether the spatial half of a layer adds its input.
            chunk, cuda_graphs: see :func:`convmixer_fast.optimize`.
        """
        super().__init__()
        self.register_buffer("patch", patch)
        self.register_buffer("depthwise", depthwise)
        self.register_buffer("pointwise", pointwise)
        self.register_buffer("vectors", vectors)
        self.register_buffer("head_weight", head_weight)
        self.register_buffer("head_bias", head_bias)
        self.activation = activation
        self.residual = residual
        self.chunk = chunk
        self.cuda_graphs = cuda_graphs
        self.training = False
        self._kept = _Kept()

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, n_classes) of images (N, in_channels, H, W), both of the weights' dtype.

        Raises:
            TypeError: x is of another dtype.
            ValueError: x is on another device or not of that shape, or smaller than a patch.
            RuntimeError: x requires a gradient, in grad mode.
        """
        with self._inference(x):
            for kind in (CpuEngine, GpuEngine):
                if kind.runs(x):
                    return self.engine(kind)(x)
            x, epilogue = self._last_product(x)
            return F.linear(ops.activate_pool(x, *epilogue, self.activation), self.head_weight, self.head_bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map (N, dim, H // ph, W // pw) before pooling, of the weights' dtype; x and errors as in forward."""
        with self._inference(x):
            x, epilogue = self._last_product(x)
            return activate_and_normalize(x, *epilogue, self.activation).to(x.dtype)

    @contextmanager
    def _inference(self, x: Tensor) -> Iterator[None]:
        """Checks the images; inside, nothing is recorded for gradients or converted by autocast."""
        if x.dtype != self.patch.dtype:
            raise TypeError(f"x must be {self.patch.dtype} as the weights, got {x.dtype}")
        if x.device != self.patch.device:
            raise ValueError(f"x must be on {self.patch.device} as the weights, got {x.device}")
        in_channels, patch_height, patch_width = self.patch.shape[1:]
        check_images(x, in_channels, patch_height, patch_width)
        ops.check_inference(x=x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            yield

    def engine(self, kind: type[CpuEngine] | type[GpuEngine]) -> CpuEngine | GpuEngine:
        """What runs the weights as they are now: made at the first call, and anew once they change."""
        return self._kept.engine(kind, self)

    def _last_product(self, x: Tensor) -> tuple[Tensor, Vectors]:
        """The raw output of the last layer's 1x1 convolution, and its bias, scale and shift, still to be applied.

        By operators alone, without memory of its own: what torch.export and torch.compile see.
        """
        layout = torch.contiguous_format if x.is_cuda else torch.channels_last
        after_patch, *after = unbound(self.vectors, x.dtype)

        x = x.contiguous(memory_format=layout)
        x = F.conv2d(x, self.patch, stride=self.patch.shape[2:]).contiguous(memory_format=layout)
        prologue = after_patch
        layers = zip(self.depthwise.unbind(), after[::2], self.pointwise.unbind(), after[1::2])
        for depthwise, after_depthwise, pointwise, after_pointwise in layers:
            x = ops.fused_depthwise(x, depthwise, *after_depthwise, self.activation, self.residual, prologue)
            x = _pointwise_conv2d(x, pointwise)
            prologue = after_pointwise
        return x, prologue

    def train(self, mode: bool = True) -> "OptimizedConvMixer":
        if mode:
            raise RuntimeError("an optimized ConvMixer is for inference: train the model it was made from")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OptimizedConvMixer":
        """Moves all buffers, and converts all but the vectors: they would lose precision, and weigh little."""

        def keep_vectors(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor is self.vectors and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_vectors, recurse)

    def extra_repr(self) -> str:
        depth, dim, _, *kernel_size = self.depthwise.shape
        return (
            f"dim={dim}, depth={depth}, kernel_size={tuple(kernel_size)}, patch_size={tuple(self.patch.shape[2:])}, "
            f"n_classes={len(self.head_bias)}, in_channels={self.patch.shape[1]}, activation={self.activation!r}, "
            f"residual={self.residual}, dtype={self.patch.dtype}, chunk={self.chunk!r}, cuda_graphs={self.cuda_graphs}"
        )


class _Kept:
    """The engine of a module, with the buffers that it was made of. Copying or pickling it gives an empty one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: CpuEngine | GpuEngine | None = None
        self._made_of: list[tuple[int, int, int]] = []

    def __reduce__(self) -> "tuple[type[_Kept], tuple[()]]":
        return _Kept, ()

    def engine(self, kind: type[CpuEngine] | type[GpuEngine], module: OptimizedConvMixer) -> CpuEngine | GpuEngine:
        with self._lock:
            for name, buffer in module.named_buffers():
                if buffer.is_inference():  # counts no versions: the module gets a copy that does
                    with torch.inference_mode(False):
                        setattr(module, name, buffer.clone())
            buffers = list(module.buffers())
            made_of = [(id(buffer), buffer.data_ptr(), buffer._version) for buffer in buffers]
            if type(self._engine) is kind and made_of == self._made_of:
                return self._engine
            engine = kind(module)
            # What an engine prepares while the caller captures a graph is computed by that graph's replays alone.
            if not (module.patch.is_cuda and torch.cuda.is_current_stream_capturing()):
                self._engine = engine
                self._made_of, self._buffers = made_of, buffers  # kept, so that no other takes over an id
            return engine


def _pointwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """The 1x1 convolution of x (N, C_in, H, W) with weight (C_out, C_in), by a library's matrix product."""
    if x.is_cuda:  # NCHW: one product an image, no copy
        return torch.matmul(weight, x.flatten(2)).unflatten(2, x.shape[2:])
    # channels_last, for which oneDNN has a product over all images; on the CPU it beat F.linear in most sizes measured
    return F.conv2d(x, weight[:, :, None, None])
