"""Which CUDA kernel the depthwise operators launch for a shape, how, and what it moves; no GPU is asked."""

import ctypes
import math
from ctypes import Structure, c_bool, c_int32, c_int64
from typing import NamedTuple

import torch

from ._library import _cpu_library
from .ops import _activation

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc/params.h, enum class DType
_ELEMENTS = {torch.float64: "double", torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
_LAYOUTS = ("contiguous", "channels_last")
SYSTEM_SMEM = 1024  # bytes of an SM's shared memory that the system takes of each block


class Gpu(NamedTuple):
    """What the launch depends on. The memory of an SM includes what the system takes of each block."""

    name: str
    capability: int  # 80 for sm_80
    sm_count: int
    smem_per_sm: int  # bytes
    warps_per_sm: int
    blocks_per_sm: int

    def occupancy(self, threads: int, smem: int, registers: int) -> int:
        """Blocks of one kernel that an SM holds: by shared memory (bytes), warps, blocks and registers (a thread)."""
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
        name: of the kernel in C++, without namespaces.
        tile: (planes, height, width): outputs that a block computes at a time, of maps of one image and channel each;
            for tensor cores of one channel, or in channels_last of 8 or 16.
        items: such tiles in all, which the blocks share.
        block: threads.
        smem_bytes: dynamic shared memory of a block.
        registers: that a thread has at most, by the kernel's launch bounds; the compiler may use fewer.
        blocks_per_sm: that run at once with this many registers. The launch asks the driver, which knows the kernel's.
        grid: for tensor cores min(items, SMs x blocks_per_sm), larger in the launch where the kernel needs fewer
            registers; for the direct kernel a block an item.
        necessary_bytes: x, weight and y, each once. Vectors of the pointwise steps, some bytes a channel, are left out.
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
        ("device_smem", c_int32),
    ]


class _Choice(Structure):  # csrc/bindings/explain.cpp, Choice
    _fields_ = [(name, c_int64) for name in ("items", "read_elements")] + [
        (name, c_int32) for name in ("planes", "tile_h", "tile_w", "unrolled", "k_steps", "threads", "smem_bytes")
    ]


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
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
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
    return _Query(shape, x.stride(), y.stride(), kernel, _DTYPES[dtype], *flags, gpu.smem_per_sm - SYSTEM_SMEM)


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
        device: a name in ``explain.GPUS`` or a ``Gpu``.

    Raises:
        ValueError: an argument does not fit.
    """
    gpu = GPUS.get(device) if isinstance(device, str) else device
    if not isinstance(gpu, Gpu):
        raise ValueError(f"device must be a Gpu or one of {', '.join(map(repr, GPUS))}, got {device!r}")
    query, choice = _query(x_shape, kernel_size, dtype, layout, activation, prologue, True, gpu), _Choice()
    elements, weights = math.prod(query.shape), query.shape[1] * query.kernel[0] * query.kernel[1]
    necessary = (2 * elements + weights) * dtype.itemsize
    reason = ""
    if gpu.capability < 80:
        reason = f"the tensor-core kernel needs sm_80 or later, {gpu.name} is sm_{gpu.capability}"
    elif not _cpu_library.convmixer_fast_choose_mma(ctypes.byref(query), ctypes.byref(choice)):
        reason = _why_direct(query, dtype)
    if reason:
        if not _cpu_library.convmixer_fast_choose_direct(ctypes.byref(query), ctypes.byref(choice)):
            raise ValueError(
                "x_shape and kernel_size must be of fewer than 2**39 elements each, kernel_size at most 2**24 high and "
                f"wide, got {tuple(x_shape)} and {kernel_size!r}"
            )
        lanes_over_channels = str(query.x_stride[1] == 1 and query.shape[1] > 1).lower()
        name = f"depthwise_direct_kernel<DirectTraits<{_ELEMENTS[dtype]}, {lanes_over_channels}, {choice.unrolled}>>"
        registers = 255 if dtype == torch.float64 else 128  # depthwise_direct.cuh, DirectTraits::kMinBlocks
    else:
        channels_last = query.shape[3] > 1 and query.x_stride[3] != 1
        flags = ", ".join(str(flag).lower() for flag in (activation == "gelu", bool(prologue), channels_last))
        name = f"depthwise_mma_kernel<MmaTraits<{_ELEMENTS[dtype]}, {choice.unrolled}, {choice.k_steps}, {flags}>>"
        # depthwise_mma.cuh, MmaTraits::kMaxThreads and kMinBlocks
        registers = 128 if choice.k_steps == 1 else 255 if channels_last else 168
    blocks_per_sm = gpu.occupancy(choice.threads, choice.smem_bytes, registers)
    return Explanation(
        kernel="direct" if reason else "tensor cores",
        reason=reason,
        name=name,
        tile=(choice.planes, choice.tile_h, choice.tile_w),
        items=choice.items,
        block=choice.threads,
        smem_bytes=choice.smem_bytes,
        registers=registers,
        blocks_per_sm=blocks_per_sm,
        grid=min(choice.items, 2**30 if reason else gpu.sm_count * blocks_per_sm),
        necessary_bytes=necessary,
        predicted_bytes=necessary + (choice.read_elements - elements) * dtype.itemsize,
    )


def _why_direct(query: _Query, dtype: torch.dtype) -> str:
    """The first condition of choose_mma_tile (csrc/cuda/depthwise_tiles.h) that does not hold."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the tensor-core kernel takes float16 and bfloat16, dtype is {str(dtype)[6:]}"
    if query.kernel[1] > 41:
        return f"the tensor-core kernel takes kernels up to 41 columns wide, kernel_size has {query.kernel[1]}"
    if query.kernel[1] > 25 and query.shape[3] > 1 and query.x_stride[3] != 1:
        return f"in channels_last the tensor-core kernel takes kernels up to 25 wide, kernel_size has {query.kernel[1]}"
    if query.kernel[0] > 255:
        return f"the tensor-core kernel takes kernels up to 255 rows high, kernel_size has {query.kernel[0]}"
    return "no tile of the tensor-core kernel fits its shared memory, or its offsets 32 bits"


def mma_arguments(
    x_shape: tuple[int, int, int, int],
    kernel_size: int | tuple[int, int],
    dtype: torch.dtype,
    *,
    activation: str = "gelu",
    prologue: bool = False,
    residual: bool = True,
) -> bytes:
    """The parameters of the tensor-core kernel as they lie in its constant memory, with made-up addresses; NCHW.

    Raises:
        ValueError: an argument does not fit, or the shape leaves the direct kernel.
    """
    query = _query(x_shape, kernel_size, dtype, "contiguous", activation, prologue, residual, GPUS["H200"])
    buffer = ctypes.create_string_buffer(4096)
    size = _cpu_library.convmixer_fast_mma_arguments(ctypes.byref(query), buffer, len(buffer))
    if not size:
        raise ValueError(f"x_shape {tuple(x_shape)} with kernel_size {kernel_size}: no tensor-core kernel")
    return buffer.raw[:size]


class WgradLaunch(NamedTuple):
    """What :func:`wgrad_launch` returns: the kernel's name in C++, threads of a block, bytes of shared memory, and the
    parameters as they lie in its constant memory, with made-up addresses."""

    name: str
    block: int
    smem_bytes: int
    arguments: bytes


def wgrad_launch(
    x_shape: tuple[int, int, int, int], kernel_size: int | tuple[int, int], dtype: torch.dtype
) -> WgradLaunch:
    """The tensor-core kernel of the weight's and the bias's gradient as one block that does all the work; NCHW.

    Raises:
        ValueError: an argument does not fit, or the shape leaves the direct kernel.
    """
    query = _query(x_shape, kernel_size, dtype, "contiguous", "none", False, False, GPUS["H200"])
    choice, buffer = _Choice(), ctypes.create_string_buffer(4096)
    size = _cpu_library.convmixer_fast_wgrad_arguments(ctypes.byref(query), ctypes.byref(choice), buffer, len(buffer))
    if not size:
        raise ValueError(f"x_shape {tuple(x_shape)} with kernel_size {kernel_size}: no tensor-core kernel")
    name = f"depthwise_wgrad_mma_kernel<WgradTraits<{_ELEMENTS[dtype]}, {choice.unrolled}>>"
    return WgradLaunch(name, choice.threads, choice.smem_bytes, buffer.raw[:size])
