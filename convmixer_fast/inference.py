"""The module that optimize() makes: a ConvMixer's forward pass on the fused operators."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import ops
from .cpu_engine import CpuEngine
from .cpu_library_engine import CpuLibraryEngine
from .gpu_engine import GpuEngine
from .locks import give_lock
from .model import check_images
from .operator_pass import Scriptable, end, last_map, last_product


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

    Changing weights: what an engine prepares of them at the first call is made anew after any change that PyTorch
    counts, be it in place, of a buffer, or by load_state_dict(). It counts none that goes through ``.data``, a NumPy
    view, or the memory that share_memory() shares with another process: call :meth:`refresh` after one, or results may
    be those of the old weights. Copies and unpickled modules start with the weights as they are.

    torch.jit.script, torch.jit.trace, torch.export and torch.compile take it as a sequence of operators. A scripted one
    is saved and loaded by TorchScript where convmixer_fast is imported; it refuses what an operator refuses, with that
    one's words, and torch.autocast.

    On a CPU whatever multiplies its matrices is chosen by dtype and processor, or by CMF_CPU_GEMM (docs/inference.md).
    On a GPU, and on a CPU where a library multiplies, it keeps two buffers of activations (dim, images of a chunk, map)
    for each stream in use, for at most four calls at a time, and with CUDA graphs, besides two for all graphs, the
    images and logits of each. Any threads and
    streams may call it, and the caller may capture it into a CUDA graph; what a call returns no later call touches.
    """

    patch: Tensor
    depthwise: Tensor
    pointwise: Tensor
    vectors: Tensor
    head_weight: Tensor | None
    head_bias: Tensor | None
    pool: str = "avg"  # what a module has that was pickled before there were others
    flatten: bool = True

    def __init__(
        self,
        patch: Tensor,
        depthwise: Tensor,
        pointwise: Tensor,
        vectors: Tensor,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        activation: str,
        residual: bool = True,
        chunk: int | str = "auto",
        cuda_graphs: bool = False,
        pool: str = "avg",
        flatten: bool = True,
    ):
        """
        Args:
            patch: (dim, in_channels, ph, pw), weight of the patch convolution.
            depthwise: (depth, dim, 1, kh, kw).
            pointwise: (depth, dim, dim).
            vectors: (2 depth + 1, 3, dim), float64: bias, scale and shift after each convolution, as they run.
            head_weight: (n_classes, features); None: the result is the features.
            head_bias: (n_classes,), or None with head_weight.
            activation: a key of model.ACTIVATIONS.
            residual: whether the spatial half of a layer adds its input.
            chunk, cuda_graphs: see :func:`convmixer_fast.optimize`.
            pool: what makes features of the map: "avg", "max" (dim of them), "avgmax", half the sum of the two,
                "catavgmax" (2 dim), both; or "" for nothing, and then the map is the result.
            flatten: whether features are (N, features), as for a head, or (N, features, 1, 1).
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
        self.pool = pool
        self.flatten = flatten
        self.training = False
        self._kept = _Kept()

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, n_classes) of images (N, in_channels, H, W), both of the weights' dtype.

        Without a head the features (N, dim), (N, dim, 1, 1) or, of "catavgmax", twice as many; without pooling the map,
        as forward_features.

        Raises:
            TypeError: x is of another dtype.
            ValueError: x is on another device or not of that shape, or smaller than a patch.
            RuntimeError: x requires a gradient, in grad mode; or CMF_CPU_GEMM, where it is read, has an unknown value.
        """
        with self._inference(x):
            kind = self.engine_kind(x)
            return self.engine(kind)(x) if kind else self.by_operators(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map (N, dim, H // ph, W // pw) before pooling, of the weights' dtype; x and errors as in forward."""
        with self._inference(x):
            return last_map(*self._last_product(x), ops.ACTIVATIONS[self.activation])

    def by_operators(self, x: Tensor) -> Tensor:
        """What forward gives, but for checks of x, without an engine and the memory that one keeps."""
        activation = ops.ACTIVATIONS[self.activation]
        return end(*self._last_product(x), activation, self.pool, self.flatten, self.head_weight, self.head_bias)

    def refresh(self) -> None:
        """Has the next call use the weights as they are now, however they were changed."""
        self._kept = _Kept()

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

    def engine_kind(self, x: Tensor) -> type[CpuEngine] | type[GpuEngine] | None:
        """What runs images x (N, in_channels, H, W); None: the operators one by one.

        Raises:
            RuntimeError: CMF_CPU_GEMM, which cpu_gemm.products() reads, has an unknown value.
        """
        for kind in (CpuLibraryEngine, CpuEngine, GpuEngine):
            if kind.runs(x) and kind.takes(self):
                return kind
        return None

    def engine(self, kind: type[CpuEngine] | type[GpuEngine]) -> CpuEngine | GpuEngine:
        """What runs the weights as they are now: made at the first call, and anew once they change."""
        return self._kept.engine(kind, self)

    def _last_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activation = ops.ACTIVATIONS[self.activation]
        return last_product(x, self.patch, self.depthwise, self.pointwise, self.vectors, activation, self.residual)

    def __prepare_scriptable__(self) -> Scriptable:
        """What torch.jit.script takes in place of this module."""
        activation = ops.ACTIVATIONS[self.activation]
        return Scriptable(self._buffers, activation, self.residual, self.pool, self.flatten)

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
        n_classes = 0 if self.head_weight is None else len(self.head_weight)
        return (
            f"dim={dim}, depth={depth}, kernel_size={tuple(kernel_size)}, patch_size={tuple(self.patch.shape[2:])}, "
            f"n_classes={n_classes}, in_channels={self.patch.shape[1]}, activation={self.activation!r}, "
            f"residual={self.residual}, dtype={self.patch.dtype}, chunk={self.chunk!r}, "
            f"cuda_graphs={self.cuda_graphs}, pool={self.pool!r}, flatten={self.flatten}"
        )


class _Kept:
    """The engine of a module, with the buffers that it was made of. Copying or pickling it gives an empty one."""

    _lock: threading.Lock

    def __init__(self) -> None:
        give_lock(self)
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
                self._engine = engine  # first: a child forked before the next statement makes its own
                self._made_of, self._buffers = made_of, buffers  # kept, so that no other takes over an id
            return engine
