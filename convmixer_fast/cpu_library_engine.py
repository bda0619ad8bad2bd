"""Runs an optimized ConvMixer on the CPU with a library's matrix products: the schedule of gpu_engine.py."""

from typing import TYPE_CHECKING

from torch import Tensor

from .cpu_engine import CpuEngine
from .cpu_gemm import LIBRARY, products
from .gpu_engine import GpuEngine

if TYPE_CHECKING:
    from .inference import OptimizedConvMixer


class CpuLibraryEngine(GpuEngine):
    """Runs the forward passes that CpuEngine would, where cpu_gemm.products() says so.

    Unlike those of CpuEngine, the logits may depend on the number of threads and on the other images of a batch, as the
    library's products may.
    """

    # The depthwise operator then finds channels side by side, as its vectors have them, and transposes nothing. The
    # product gets a view of each matrix, which the library takes as it is.
    channels_last = True

    @staticmethod
    def runs(x: Tensor) -> bool:
        """Whether x can be run, and its dtype's products are the library's."""
        return CpuEngine.runs(x) and products()[x.dtype] == LIBRARY

    @staticmethod
    def takes(module: "OptimizedConvMixer") -> bool:
        """Whether it is for such a network: one that CpuEngine takes."""
        return CpuEngine.takes(module)
