"""What a pass of an optimized ConvMixer should take on a GPU that is not there: predictions, nothing is measured.

Every part at its floor (breakdown.py), by the speeds of an H200 that were measured elsewhere with cuBLAS and a copy;
but for the depthwise steps, whose instructions are counted in the machine code of the kernel (kernel_report.py) with
GELU and a 32x32 map, and taken in proportion for other maps. No gaps between kernels: a CUDA graph. It is a lower
bound: latency is taken for hidden and pooling for bound by memory; docs/worklog.md has what a cycle model says.
"""

import breakdown
import kernel_report
import torch

from convmixer_fast.diagnostics import explain
from convmixer_fast.inference import OptimizedConvMixer

GPU = "H200"
CEILINGS = breakdown.Ceilings(flops=790e12, product_flops=790e12, bytes=kernel_report.DEVICES[GPU].gb_per_s * 1e9)


def predict(module: OptimizedConvMixer, shape: tuple[int, int, int, int]) -> dict[str, object]:
    """The breakdown, as breakdown.measure gives it, of images (N, C, H, W).

    Raises:
        ValueError: the weights are not of float16 or bfloat16, or the kernel has no count of its own (kernels of other
            heights than 3, 5, 7 and 9).
    """
    depth, dim, _, kernel_h, kernel_w = module.depthwise.shape
    dtype = module.patch.dtype
    if dtype not in (torch.float16, torch.bfloat16) or kernel_h != kernel_w or kernel_h not in (3, 5, 7, 9):
        raise ValueError(
            f"dtype and kernel size are {dtype} and {kernel_h}x{kernel_w}, "
            "predicted are float16 and bfloat16 with 3, 5, 7, 9"
        )
    plane = kernel_report.PLANE
    name = explain((1, 1, plane, plane), kernel_h, dtype, prologue=True, device=GPU).name
    source = f"depthwise_mma_{'f16' if dtype == torch.float16 else 'bf16'}_gelu"
    kernels = kernel_report.load_kernels([kernel_report.DEVICES[GPU].target], source)
    kernel = next(kernel for kernel in kernels if kernel.name == name)
    counted = kernel_report.count_plane(kernel, kernel_h, dtype, prologue=True, wgrad=False)
    layer = max(counted.predict(GPU).values()) / 1e6  # of BATCH images of CHANNELS planes
    patch_h, patch_w = module.patch.shape[2:]
    pixels = shape[0] * dim * (shape[2] // patch_h) * (shape[3] // patch_w)
    parts = breakdown.floors(module, torch.empty(shape, dtype=dtype, device="meta"), CEILINGS)
    seconds = {part.name: part.seconds for part in parts}
    seconds["depthwise"] = depth * layer * pixels / (kernel_report.BATCH * kernel_report.CHANNELS * plane**2)
    return breakdown.combine(parts, seconds | {"total": sum(seconds.values())}, CEILINGS)
