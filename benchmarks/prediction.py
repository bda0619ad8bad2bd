"""What a pass of an optimized ConvMixer should take on a GPU that is not there: predictions, nothing is measured.

Every part at its floor (breakdown.py), by the speeds of an H200 that were measured elsewhere with cuBLAS and a copy;
but for the depthwise steps, which a cycle model predicts from the machine code of the kernel (kernel_report.py) with
GELU and a 32x32 map, and which are taken in proportion for other maps. No gaps between kernels: a CUDA graph. It is a
lower bound: pooling is taken for bound by memory, and what the cycle model leaves out makes depthwise steps longer.
"""

import math

import breakdown
import kernel_report
import torch

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
    target = kernel_report.DEVICES[GPU].target
    case = kernel_report.Case(kernel_report.PAPER, kernel_h, dtype, prologue=True)
    source = f"depthwise_mma_{'f16' if dtype == torch.float16 else 'bf16'}_gelu"
    kernels = kernel_report.load_kernels([target], source)
    kernel = next(kernel for kernel in kernels if kernel.name == case.launch(target).name)
    layer = kernel_report.trace_case(kernel, case).predict(GPU).microseconds / 1e6
    patch_h, patch_w = module.patch.shape[2:]
    pixels = shape[0] * dim * (shape[2] // patch_h) * (shape[3] // patch_w)
    parts = breakdown.floors(module, torch.empty(shape, dtype=dtype, device="meta"), CEILINGS)
    seconds = {part.name: part.seconds for part in parts}
    seconds["depthwise"] = depth * layer * pixels / math.prod(case.shape)
    return breakdown.combine(parts, seconds | {"total": sum(seconds.values())}, CEILINGS)
