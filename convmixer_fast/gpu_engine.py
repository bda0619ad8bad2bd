"""The forward pass of an optimized ConvMixer as a schedule of kernels over two buffers that are reused.

A layer is one library GEMM and one depthwise kernel, which takes the GEMM's raw output through bias, activation and
BatchNorm on its way in; nothing else passes over the activations. They are (channels, images, plane): then a 1x1
convolution over all images is a single matrix product, and a plane of any size starts on 16 bytes.

Nothing here asks for a GPU: on CPU tensors the same schedule runs on the CPU's operators, where cpu_library_engine.py
uses it, in channels_last.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from ._types import DTYPES
from .locks import give_lock
from .operator_pass import unit_filters

if TYPE_CHECKING:
    from .inference import OptimizedConvMixer

_PLANE_ALIGNMENT = 8  # elements: 16 bytes of a 16-bit type, what one access of the tensor-core kernel moves
_GEMM_TILE = (128, 256)  # of the output, of the usual library kernel: tells how many images keep a GPU busy
_GEMM_TILES_PER_MULTIPROCESSOR = 2  # at least, for that
_MAX_IDLE_ARENAS = 4
_MAX_GRAPHS = 8

Vectors = tuple[Tensor, Tensor, Tensor]  # bias, scale, shift
Step = tuple[str, Callable[[], object]]  # the part of the network it belongs to, and what to run


@dataclass(frozen=True)
class Weights:
    """A network's weights as the steps take them.

    Attributes:
        patch: (dim, in_channels * ph * pw, padded with zeros to a multiple of 8), a GEMM's left operand.
        patch_size: (in_channels, ph, pw).
        after_patch: bias, scale, shift after the patch convolution.
        layers: (depthwise (dim, 1, kh, kw), its vectors, pointwise (dim, dim), its vectors), one a layer.
        head: weight (features, n_classes) and bias (n_classes,), or None.
        activation: a key of model.ACTIVATIONS.
        residual: whether the depthwise half of a layer adds its input.
        pool, flatten: as OptimizedConvMixer has them.
        unit: (dim, 1, 1, 1), ones: filters that change nothing, for the map where it is needed as such; or None.
    """

    patch: Tensor
    patch_size: tuple[int, int, int]
    after_patch: Vectors
    layers: list[tuple[Tensor, Vectors, Tensor, Vectors]]
    head: tuple[Tensor, Tensor] | None
    activation: str
    residual: bool
    pool: str = "avg"
    flatten: bool = True
    unit: Tensor | None = None

    @staticmethod
    def of(module: "OptimizedConvMixer") -> "Weights":
        """Takes the module's; copies only the patch weight and the vectors."""
        after_patch, *after = unbound(module.vectors, module.patch.dtype)
        flat = module.patch.flatten(1)
        in_channels, patch_height, patch_width = module.patch.shape[1:]
        head = None
        if module.head_weight is not None and module.head_bias is not None:
            head = module.head_weight.t(), module.head_bias
        return Weights(
            patch=F.pad(flat, (0, -flat.shape[1] % _PLANE_ALIGNMENT)),
            patch_size=(in_channels, patch_height, patch_width),
            after_patch=after_patch,
            layers=list(zip(module.depthwise.unbind(), after[::2], module.pointwise.unbind(), after[1::2])),
            head=head,
            activation=module.activation,
            residual=module.residual,
            pool=module.pool,
            flatten=module.flatten,
            unit=None if module.pool == "avg" else unit_filters(len(module.patch), module.patch),
        )

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.patch, *self.after_patch, *(self.head or ()))
        if self.unit is not None:
            yield self.unit
        for depthwise, after_depthwise, pointwise, after_pointwise in self.layers:
            yield from (depthwise, *after_depthwise, pointwise, *after_pointwise)

    @property
    def features(self) -> int:
        """Of an image, after pooling."""
        return len(self.patch) * (2 if self.pool == "catavgmax" else 1)

    def empty_result(self, x: Tensor) -> Tensor:
        """What the pass writes for images x, before it does: logits, features or maps."""
        if self.pool == "":
            return x.new_empty(len(x), len(self.patch), *map_size(x, self))
        if self.head is not None:
            return x.new_empty(len(x), self.head[1].shape[0])
        return x.new_empty(len(x), self.features, *(() if self.flatten else (1, 1)))


def unbound(vectors: Tensor, dtype: torch.dtype) -> list[Vectors]:
    """Bias, scale and shift after each convolution, of vectors (n, 3, C), as float32, or float64 for float64."""
    each = (stacked.unbind() for stacked in vectors.to(DTYPES[dtype].arithmetic).unbind())
    return [(bias, scale, shift) for bias, scale, shift in each]


@dataclass(frozen=True)
class Geometry:
    """Sizes of the activations of some images.

    Attributes:
        images: at most as many as go through all layers together.
        height, width: of a map.
        channels_last: whether the channels of a pixel lie side by side, in place of the pixels of a plane.
        pitch: columns from one map to the next.
    """

    images: int
    height: int
    width: int
    channels_last: bool = False

    @property
    def pitch(self) -> int:
        pixels = self.height * self.width
        return pixels if self.channels_last else -(-pixels // _PLANE_ALIGNMENT) * _PLANE_ALIGNMENT

    def matrix(self, buffer: Tensor, rows: int, images: int) -> Tensor:
        """The start of a buffer as (rows, images * pitch), transposed in memory if channels_last."""
        columns = images * self.pitch
        used = buffer[: rows * columns]
        return used.view(columns, rows).t() if self.channels_last else used.view(rows, columns)

    def maps(self, matrix: Tensor, images: int) -> Tensor:
        """Such a matrix as maps (images, rows, height, width)."""
        row, column = matrix.stride()
        strides = (self.pitch * column, row, self.width * column, column)
        return matrix.as_strided((images, matrix.shape[0], self.height, self.width), strides, matrix.storage_offset())


class Arena:
    """The memory of a forward pass: two buffers, made on the stream on which they are used."""

    def __init__(self, weights: Weights, geometry: Geometry):
        with torch.inference_mode(False):  # a later call, outside of inference mode, may write to them
            self.first, self.second = (weights.patch.new_empty(size) for size in self._sizes(weights, geometry))

    def holds(self, weights: Weights, geometry: Geometry) -> bool:
        first, second = self._sizes(weights, geometry)
        return len(self.first) >= first and len(self.second) >= second

    @staticmethod
    def _sizes(weights: Weights, geometry: Geometry) -> tuple[int, int]:
        dim, patch_elements = weights.patch.shape
        columns = geometry.images * max(geometry.pitch, _PLANE_ALIGNMENT)  # the features lie here, too
        return dim * columns, max(dim, patch_elements) * columns  # the patches lie where depthwise outputs will

    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.first, self.second


def map_size(x: Tensor, weights: Weights) -> tuple[int, int]:
    _, patch_height, patch_width = weights.patch_size
    return x.shape[2] // patch_height, x.shape[3] // patch_width


def chunks_of(batch: int, most: int) -> int:
    """The number of chunks in which that many images go through the layers, where a chunk takes `most` at most."""
    return -(-batch // most)


def l2_chunk(x: Tensor, weights: Weights) -> int:
    """How many of the images x (one or more) a chunk may have to stay within the L2 cache of their GPU: the `chunk` for
    optimize(), by the model of images_in_l2.

    Raises:
        ValueError: x is not on a GPU.
    """
    if not x.is_cuda:
        raise ValueError(f"x must be on a CUDA device, got {x.device}")
    gpu = torch.cuda.get_device_properties(x.device)
    return images_in_l2(weights, map_size(x, weights), gpu.L2_cache_size, gpu.multi_processor_count, len(x))


def images_in_l2(weights: Weights, size: tuple[int, int], cache_bytes: int, multiprocessors: int, batch: int) -> int:
    """As many images as keep both buffers and a layer's matrix in the L2 cache, where a kernel then finds what the one
    before it wrote; the whole batch, if not even one does, or if the smallest of the chunks that then run would not
    give every multiprocessor two tiles of a GEMM.

    A model that no GPU has confirmed: chunk="auto" does not go by it.

    Args:
        size: (height, width) of a map.
        cache_bytes, multiprocessors: of the GPU.
        batch: images of a call.
    """
    dim, element = weights.patch.shape[0], weights.patch.element_size()
    pitch = Geometry(1, *size).pitch
    most = (cache_bytes - dim * dim * element) // (2 * dim * pitch * element)
    if most < 1:
        return batch
    smallest = batch // chunks_of(batch, most)
    tiles = -(-dim // _GEMM_TILE[0]) * (-(-smallest * pitch // _GEMM_TILE[1]))
    return min(most, batch) if tiles >= _GEMM_TILES_PER_MULTIPROCESSOR * multiprocessors else batch


def steps(weights: Weights, x: Tensor, result: Tensor, geometry: Geometry, arena: Arena) -> Iterator[Step]:
    """The forward pass: what to run, in order. Allocates nothing and waits for nothing.

    Args:
        x: images (N, in_channels, H, W), of any strides.
        result: of Weights.empty_result, written.
        geometry: of the largest chunk of x; the others have as many images, or one less.
        arena: which holds it.
    """
    chunks = chunks_of(len(x), geometry.images)
    for images, rows in zip(x.tensor_split(chunks), result.tensor_split(chunks)):
        yield from _chunk_steps(weights, images, rows, geometry, arena)


def _chunk_steps(weights: Weights, x: Tensor, result: Tensor, geometry: Geometry, arena: Arena) -> Iterator[Step]:
    images, (dim, patch_elements) = len(x), weights.patch.shape
    patches = geometry.matrix(arena.second, patch_elements, images)
    pointwise_out = geometry.matrix(arena.first, dim, images)
    depthwise_out = geometry.matrix(arena.second, dim, images)
    depthwise_in, depthwise_out_maps = geometry.maps(pointwise_out, images), geometry.maps(depthwise_out, images)

    yield "patchify", partial(_patchify, x, weights.patch_size, geometry, patches)
    yield "patchify", partial(torch.mm, weights.patch, patches, out=pointwise_out)
    prologue = weights.after_patch
    for depthwise, after_depthwise, pointwise, after_pointwise in weights.layers:
        yield (
            "depthwise",
            partial(
                ops.fused_depthwise,
                depthwise_in,
                depthwise,
                *after_depthwise,
                weights.activation,
                weights.residual,
                prologue,
                out=depthwise_out_maps,
            ),
        )
        yield "GEMM", partial(torch.mm, pointwise, depthwise_out, out=pointwise_out)
        prologue = after_pointwise
    if weights.pool == "":
        yield _activate(weights, depthwise_in, prologue, result)
        return
    # Features lie where no step still reads: in the second buffer, or, if the map takes that, in the first. Either has
    # 8 elements or more a channel and image.
    unused = arena.second if weights.pool == "avg" else arena.first
    pooled, spare = unused[: 2 * images * weights.features].view(2, images, weights.features)
    if weights.head is None:
        pooled = result.view(images, weights.features)
    if weights.pool == "avg":
        yield "pool + head", partial(ops.activate_pool, depthwise_in, *prologue, weights.activation, out=pooled)
    else:
        yield _activate(weights, depthwise_in, prologue, depthwise_out_maps)
        yield "pool + head", partial(_pool, depthwise_out_maps, weights.pool, pooled, spare)
    if weights.head is not None:
        weight, bias = weights.head
        yield "pool + head", partial(torch.addmm, bias, pooled, weight, out=result)


def _activate(weights: Weights, product: Tensor, after: Vectors, out: Tensor) -> Step:
    """The map after the last product, in one pass over memory."""
    assert weights.unit is not None
    run = partial(ops.fused_depthwise, product, weights.unit, *after, weights.activation, False, out=out)
    return "pool + head", run


def _pool(maps: Tensor, pool: str, out: Tensor, spare: Tensor) -> None:
    """The features (images, features) of maps (images, dim, H, W) by a pooling other than "avg"; spare is as long as
    out, and written."""
    dim = maps.shape[1]
    if pool == "catavgmax":
        torch.mean(maps, (2, 3), out=out[:, :dim])
    torch.amax(maps, (2, 3), out=out[:, -dim:])
    if pool == "avgmax":
        out.add_(torch.mean(maps, (2, 3), out=spare)).mul_(0.5)


def _patchify(x: Tensor, patch_size: tuple[int, int, int], geometry: Geometry, patches: Tensor) -> None:
    """Every patch of x as a column of `patches`, in the patch weight's order, below it the zeros of its padding."""
    channels, patch_height, patch_width = patch_size
    height, width, images = geometry.height, geometry.width, len(x)
    whole = x[:, :, : height * patch_height, : width * patch_width]
    by_patch = whole.unflatten(2, (height, patch_height)).unflatten(4, (width, patch_width))
    elements = channels * patch_height * patch_width
    to = geometry.maps(patches[:elements], images).unflatten(1, patch_size)
    to.copy_(by_patch.permute(0, 1, 3, 5, 2, 4))
    patches[elements:].zero_()


class MultiStreamMemory:
    """Memory that kernels of several streams use: freed, it is not reused until the work on all of them has finished.

    Left alone, the allocator gives freed memory to the next one who asks on the stream for which it was made, and lets
    only work of that stream finish first.

    Args:
        tensors: that lie in it.
        written: an event after what was written to it, for streams that have not waited for that; None: all have.
    """

    def __init__(self, tensors: Iterable[Tensor], written: torch.cuda.Event | None = None):
        self.tensors = list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())
        self._written = written
        self._streams: set[torch.cuda.Stream] = set()

    def use_on(self, stream: torch.cuda.Stream) -> None:
        """Call it before kernels on that stream use the memory. What it says to stream and allocator holds until the
        memory is freed, so it costs nothing but the first time."""
        if stream not in self._streams:
            if self._written:
                stream.wait_event(self._written)
            for tensor in self.tensors:
                tensor.record_stream(stream)
            self._streams.add(stream)


class Recorded:
    """The forward pass on images of one shape as a CUDA graph, on memory that stays where it is."""

    def __init__(self, weights: Weights, x: Tensor, geometry: Geometry, arena: Arena):
        with torch.inference_mode(False):  # replays, outside of inference mode too, write to them
            self.images = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            self.result = weights.empty_result(x)
        self.memory = MultiStreamMemory((self.images, self.result, *arena.buffers(), *weights.tensors()))
        with torch.cuda.device(x.device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):  # the libraries choose their kernels and set up their workspaces
                run_all(steps(weights, self.images, self.result, geometry, arena))
            current.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating.
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                run_all(steps(weights, self.images, self.result, geometry, arena))

    def replay(self, x: Tensor) -> Tensor:
        self.memory.use_on(torch.cuda.current_stream(x.device))
        self.images.copy_(x)
        self.graph.replay()
        return self.result.clone()


class GraphCache:
    """What `record` made of the shapes used last, replayed one after the other whatever the streams.

    Args:
        record: gives the Recorded for images like these.
        fence: an event: wait(stream) and record(stream).
        limit: how many shapes are kept.
    """

    _lock: threading.Lock

    def __init__(self, record: Callable[[Tensor], Recorded], fence: torch.cuda.Event, limit: int = _MAX_GRAPHS):
        self._record, self._fence, self._limit = record, fence, limit
        give_lock(self)
        self._recorded: OrderedDict[torch.Size, Recorded] = OrderedDict()

    def __call__(self, x: Tensor, stream: torch.cuda.Stream | None = None) -> Tensor:
        """The result for x. stream: on which the caller works."""
        with self._lock:
            self._fence.wait(stream)  # all graphs use one arena
            if x.shape not in self._recorded:
                self._recorded[x.shape] = self._record(x)
            self._recorded.move_to_end(x.shape)
            result = self._recorded[x.shape].replay(x)
            self._fence.record(stream)
            while len(self._recorded) > self._limit:
                self._recorded.popitem(last=False)
        return result

    def shapes(self) -> list[torch.Size]:
        """Least recently used first."""
        return list(self._recorded)


class GpuEngine:
    """Runs forward passes of one network, from any thread and on any stream.

    Buffers are kept from call to call, for each stream, and are lent to one call at a time: calls of several threads
    never share one. What a call returns is its own. A stream that the caller captures into a CUDA graph of his own
    gets buffers that belong to that graph.

    Attributes:
        channels_last: whether the activations are, see Geometry.
    """

    channels_last = False
    _lock: threading.Lock

    def __init__(self, module: "OptimizedConvMixer"):
        """Later changes of the module's weights are not seen."""
        with torch.no_grad():
            self.weights = Weights.of(module)
        self.chunk = module.chunk
        give_lock(self)
        self._idle: list[tuple[object, Arena]] = []  # with their streams; the one used last comes last
        self._recording: Arena | None = None  # that of the graph recorded last
        self.graphs: GraphCache | None = None
        written = None
        if module.patch.is_cuda:
            with torch.cuda.device(module.patch.device):
                if not torch.cuda.is_current_stream_capturing():
                    written = torch.cuda.current_stream().record_event()
                if module.cuda_graphs:
                    self.graphs = GraphCache(self._record, torch.cuda.Event())
        self._memory = MultiStreamMemory(self.weights.tensors(), written)

    @staticmethod
    def runs(x: Tensor) -> bool:
        """Whether x can be run: a CUDA tensor that nobody traces."""
        return x.is_cuda and not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    @staticmethod
    def takes(module: "OptimizedConvMixer") -> bool:
        """Whether it is for such a network: for any."""
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """The logits (N, n_classes) of images x (N, in_channels, H, W), or what the network gives without a head."""
        if not x.is_cuda:
            return self._run(x, None, captured=False)
        with torch.cuda.device(x.device):
            stream, captured = torch.cuda.current_stream(), torch.cuda.is_current_stream_capturing()
            if self.graphs and len(x) and not captured:
                return self.graphs(x, stream)
            if not captured:  # the owner of a graph of his own keeps the module as long as he replays it
                self._memory.use_on(stream)
            return self._run(x, stream, captured)

    def _run(self, x: Tensor, stream: torch.cuda.Stream | None, captured: bool) -> Tensor:
        result = self.weights.empty_result(x)
        if len(x):
            geometry = self.geometry(x)
            with self._arena(geometry, stream, captured) as arena:
                run_all(steps(self.weights, x, result, geometry, arena))
        return result

    def geometry(self, x: Tensor) -> Geometry:
        """Of the largest chunk of x."""
        chunks = chunks_of(len(x), self.chunk) if isinstance(self.chunk, int) else 1  # "auto"
        return Geometry(-(-len(x) // chunks), *map_size(x, self.weights), self.channels_last)

    def arena_bytes(self) -> int:
        """Of the buffers that no call uses at present."""
        return sum(buffer.nbytes for _, arena in self._idle for buffer in arena.buffers())

    @contextmanager
    def _arena(self, geometry: Geometry, stream: object, captured: bool) -> Iterator[Arena]:
        if captured:
            yield Arena(self.weights, geometry)
            return
        with self._lock:
            last = next((i for i, (its, _) in reversed(list(enumerate(self._idle))) if its == stream), None)
            arena = None if last is None else self._idle.pop(last)[1]
        if arena is None or not arena.holds(self.weights, geometry):
            del arena  # before the larger one is made
            arena = Arena(self.weights, geometry)
        yield arena
        with self._lock:
            self._idle = [*self._idle, (stream, arena)][-_MAX_IDLE_ARENAS:]

    def _record(self, x: Tensor) -> Recorded:
        geometry = self.geometry(x)
        if self._recording is None or not self._recording.holds(self.weights, geometry):
            self._recording = Arena(self.weights, geometry)
        return Recorded(self.weights, x, geometry, self._recording)


def run_all(schedule: Iterator[Step]) -> None:
    for _, run in schedule:
        run()
