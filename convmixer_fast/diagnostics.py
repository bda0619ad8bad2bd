"""Which CUDA kernel the depthwise operators launch for a shape, how, and what it moves; no GPU is asked."""

import ctypes
import math
import re
from ctypes import Structure, c_bool, c_char, c_int32, c_int64
from typing import NamedTuple

import torch

from ._library import _cpu_library
from ._types import DTYPES
from .ops import _activation

_LAYOUTS = ("contiguous", "channels_last")
SYSTEM_SMEM = 1024  # bytes of an SM's shared memory that the system takes for each block


class Gpu(NamedTuple):
    """What the launch depends on. The memory of an SM includes what the system takes for each block."""

    name: str
    capability: int  # 80 for sm_80
    sm_count: int
    smem_per_sm: int  # bytes
    warps_per_sm: int
    blocks_per_sm: int

    def occupancy(self, threads: int, smem: int, registers: int) -> int:
        """Blocks of one kernel that an SM holds: by shared memory (bytes), warps, blocks and registers (per thread)."""
        warps = -(-threads // 32)
        # Registers are allocated by the warp, 256 at a time, and each quarter of an SM has 16,384 of them.
        warps_by_registers = 4 * (16384 // (-(-32 * registers // 256) * 256))
        per_block = -(-(smem + SYSTEM_SMEM) // 128) * 128
        by_warps = min(self.warps_per_sm, warps_by_registers) // warps
        return min(self.smem_per_sm // per_block, by_warps, self.blocks_per_sm)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 90, 132, 228 << 10, 64, 32),
        Gpu("H100", 90, 132, 228 << 10, 64, 32),
        Gpu("A100", 80, 108, 164 << 10, 64, 32),
        Gpu("RTX 4090", 89, 128, 100 << 10, 48, 24),
    )
}


class Explanation(NamedTuple):
    """What :func:`explain` returns.

    Attributes:
        kernel: "tensor cores" or "direct".
        reason: why it is the direct kernel; empty for tensor cores.
        name: the kernel in C++, as demanglers and profilers give it, without namespaces.
        tile: (maps, height, width): outputs that a block computes at a time. A map belongs to one image and channel;
            those of a tile belong to one channel on tensor cores, or in channels_last to 8.
        items: such tiles in all, which the blocks share.
        block: threads per block.
        smem_bytes: dynamic shared memory per block.
        registers: registers per thread that the kernel's launch bounds allow; the compiler may use fewer.
        blocks_per_sm: blocks that run at once on an SM with this many registers. The launch asks the driver, which
            knows how many registers the kernel has.
        grid: blocks. On tensor cores min(items, SMs x blocks_per_sm), larger in the launch if the kernel needs fewer
            registers; for the direct kernel one per item.
        necessary_bytes: x, weight and y, each once. Bias, scale and shift, some bytes per channel, are left out.
        predicted_bytes: as necessary_bytes, with what is read more than once: the halo of neighbouring tiles.
    """

    kernel: str
    reason: str
    name: str
    tile: tuple[int, int, int]
    items: int
    block: int
    smem_bytes: int
    registers: int
    blocks_per_sm: int
    grid: int
    necessary_bytes: int
    predicted_bytes: int


class _Device(Structure):  # csrc/cuda/common/device.h, Device
    _fields_ = [(name, c_int32) for name in ("major", "sms", "cta_smem", "sm_smem")]


class _Query(Structure):  # csrc/bindings/explain.cpp, DepthwiseQuery
    _fields_ = [
        ("shape", c_int64 * 4),
        ("x_stride", c_int64 * 4),
        ("y_stride", c_int64 * 4),
        ("kernel", c_int64 * 2),
        ("dtype", c_int32),
        ("activation", c_int32),
        ("prologue", c_bool),
        ("residual", c_bool),
        ("device", _Device),
    ]


class _Choice(Structure):  # csrc/bindings/explain.cpp, Choice
    _fields_ = [
        *((name, c_int64) for name in ("work_tiles", "x_elements_read")),
        *((name, c_int32) for name in ("tensor_cores", "maps_per_tile", "tile_h", "tile_w")),
        *((name, c_int32) for name in ("threads", "smem_bytes", "registers")),
        *((name, c_char * 128) for name in ("name", "reason")),
    ]


def _check_sizes(library: ctypes.CDLL) -> None:
    """Raises ImportError for a library whose structs are not those above."""
    for struct, name in ((_Query, "query"), (_Choice, "choice")):
        size_of = getattr(library, f"convmixer_fast_{name}_bytes", None)
        size = size_of() if size_of else 0
        if size != ctypes.sizeof(struct):
            raise ImportError(
                f"{library._name} has {size} bytes in the struct that convmixer_fast/diagnostics.py calls "
                f"{struct.__name__}, which has {ctypes.sizeof(struct)}: rebuild it by `make build`"
            )


_check_sizes(_cpu_library)


def _query(
    x_shape: tuple[int, int, int, int],
    kernel_size: int | tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    activation: str,
    prologue: bool,
    residual: bool,
    gpu: Gpu,
) -> _Query:
    shape = tuple(x_shape)
    if len(shape) != 4 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"x_shape must be four positive sizes (N, C, H, W), got {x_shape!r}")
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(kernel) != 2 or not all(isinstance(size, int) and size > 0 for size in kernel):
        raise ValueError(f"kernel_size must be a positive size or two (kh, kw), got {kernel_size!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, _LAYOUTS))}, got {layout!r}")
    for name, value, elements in (
        ("x_shape", shape, math.prod(shape)),
        ("kernel_size", kernel, shape[1] * math.prod(kernel)),
    ):
        if elements * dtype.itemsize >= 2**63:
            raise ValueError(f"{name} must be of a tensor of fewer than 2**63 bytes, got {value!r}")
    x = torch.empty(shape, device="meta", dtype=dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch._prims_common.suggest_memory_format(x))
    flags = _activation(activation), prologue, residual
    device = _Device(gpu.capability // 10, gpu.sm_count, gpu.smem_per_sm - SYSTEM_SMEM, gpu.smem_per_sm)
    return _Query(shape, x.stride(), y.stride(), kernel, DTYPES[dtype].code, *flags, device)


def explain(
    x_shape: tuple[int, int, int, int],
    kernel_size: int | tuple[int, int],
    dtype: torch.dtype,
    layout: str = "contiguous",
    *,
    activation: str = "gelu",
    prologue: bool = False,
    device: str | Gpu = "H200",
) -> Explanation:
    """Which CUDA kernel a depthwise operator launches, how, and the bytes it moves.

    The choice is made by the code that launches. Addresses are taken as multiples of 16 bytes. Nothing here is
    measured: grid and bytes follow from the shape and from what is known of the GPU.

    Args:
        x_shape: (N, C, H, W), all positive.
        kernel_size: k or (kh, kw).
        dtype: of x and weight: float64, float32, float16 or bfloat16.
        layout: "contiguous" or "channels_last".
        activation: "gelu", "relu" or "none"; ``depthwise_conv2d`` has "none".
        prologue: whether ``fused_depthwise`` has one.
        device: a name in ``convmixer_fast.diagnostics.GPUS`` or a ``convmixer_fast.diagnostics.Gpu``.

    Raises:
        ValueError: an argument does not fit.
    """
    gpu = GPUS.get(device) if isinstance(device, str) else device
    if not isinstance(gpu, Gpu):
        raise ValueError(f"device must be a Gpu or one of {', '.join(map(repr, GPUS))}, got {device!r}")
    query, choice = _query(x_shape, kernel_size, dtype, layout, activation, prologue, True, gpu), _Choice()
    elements, weights = math.prod(query.shape), query.shape[1] * query.kernel[0] * query.kernel[1]
    necessary = (2 * elements + weights) * dtype.itemsize
    if not _cpu_library.convmixer_fast_select(ctypes.byref(query), ctypes.byref(choice)):
        raise ValueError(
            "x_shape and kernel_size must be of fewer than 2**39 elements each, kernel_size at most 2**24 high and "
            f"wide, got {tuple(x_shape)} and {kernel_size!r}"
        )
    blocks_per_sm = gpu.occupancy(choice.threads, choice.smem_bytes, choice.registers)
    return Explanation(
        kernel="tensor cores" if choice.tensor_cores else "direct",
        reason=choice.reason.decode(),
        name=choice.name.decode(),
        tile=(choice.maps_per_tile, choice.tile_h, choice.tile_w),
        items=choice.work_tiles,
        block=choice.threads,
        smem_bytes=choice.smem_bytes,
        registers=choice.registers,
        blocks_per_sm=blocks_per_sm,
        grid=min(choice.work_tiles, gpu.sm_count * blocks_per_sm if choice.tensor_cores else 2**30),
        necessary_bytes=necessary,
        predicted_bytes=necessary + (choice.x_elements_read - elements) * dtype.itemsize,
    )


def short_name(demangled: str) -> str:
    """A kernel's name as :attr:`Explanation.name` has it, from that of a demangler or a profiler: without namespaces,
    return type and parameters."""
    name = re.sub(r"convmixer_fast::(cuda::)?|\(anonymous namespace\)::", "", demangled).replace("> >", ">>")
    return re.sub(r"\([^()]*\)$", "", name.removeprefix("void "))


class Launch(NamedTuple):
    """What :func:`depthwise_launch`, :func:`wgrad_launch` and :func:`pool_launch` return.

    Attributes:
        name: the kernel in C++, as :attr:`Explanation.name` has it.
        tile: (maps, height, width): what a block computes at a time.
        work_tiles: such tiles in all, which the blocks share.
        block: threads per block.
        smem_bytes: dynamic shared memory per block.
        arguments: the kernel's parameters as they lie in its constant memory, with made-up addresses.
    """

    name: str
    tile: tuple[int, int, int]
    work_tiles: int
    block: int
    smem_bytes: int
    arguments: bytes


def depthwise_launch(
    x_shape: tuple[int, int, int, int],
    kernel_size: int | tuple[int, int],
    dtype: torch.dtype,
    layout: str = "contiguous",
    *,
    activation: str = "gelu",
    prologue: bool = False,
    residual: bool = True,
    device: str = "H200",
    direct: bool = False,
) -> Launch:
    """The tensor-core kernel of the forward pass, for any number of blocks; or the direct kernel, also where it would
    not be chosen.

    Raises:
        ValueError: an argument does not fit, or the shape leaves only the direct kernel.
    """
    query = _query(x_shape, kernel_size, dtype, layout, activation, prologue, residual, GPUS[device])
    return _launch("direct" if direct else "mma", query)


def wgrad_launch(x_shape: tuple[int, int, int, int], kernel_size: int | tuple[int, int], dtype: torch.dtype) -> Launch:
    """The tensor-core kernel of the weight's and the bias's gradient as one block that does all the work; NCHW.

    Raises:
        ValueError: an argument does not fit, or the shape leaves the direct kernel.
    """
    return _launch("wgrad", _query(x_shape, kernel_size, dtype, "contiguous", "none", False, False, GPUS["H200"]))


def pool_launch(
    x_shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str = "contiguous", *, activation: str = "gelu"
) -> Launch:
    """The pooling kernel, for any number of blocks.

    Raises:
        ValueError: an argument does not fit.
    """
    return _launch("pool", _query(x_shape, 1, dtype, layout, activation, False, False, GPUS["H200"]))


def _launch(operator: str, query: _Query) -> Launch:
    choice, buffer = _Choice(), ctypes.create_string_buffer(4096)
    arguments_of = getattr(_cpu_library, f"convmixer_fast_{operator}_arguments")
    size = arguments_of(ctypes.byref(query), ctypes.byref(choice), buffer, len(buffer))
    if not size:
        reason = choice.reason.decode() or "the sizes are too large"
        raise ValueError(f"x_shape {(*query.shape,)} with kernel_size {(*query.kernel,)}: {reason}")
    tile = choice.maps_per_tile, choice.tile_h, choice.tile_w
    name, arguments = choice.name.decode(), buffer.raw[:size]
    return Launch(name, tile, choice.work_tiles, choice.threads, choice.smem_bytes, arguments)
