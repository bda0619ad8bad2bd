"""Large-kernel depthwise convolution, and ConvMixer inference on it, at the speed of the hardware."""

from . import (
    autocast,  # noqa: F401 (registers what the operators do under autocast)
    autograd,  # noqa: F401 (registers their gradients)
    fakes,  # noqa: F401 (registers what they do without numbers)
    flops,  # noqa: F401 (registers what FlopCounterMode counts)
    ops,
    reference,
    vmap,  # noqa: F401 (registers their rules of vmap)
)
from ._library import build_info, library_paths
from ._version import __version__
from .checkpoint import load_checkpoint
from .diagnostics import explain
from .export import decompositions
from .model import ConvMixer, create_model, list_models
from .nn import DepthwiseConv2d, replace_depthwise, restore_depthwise
from .ops import activate_pool, depthwise_conv2d, fused_depthwise
from .optimize import optimize

__all__ = [
    "ConvMixer",
    "DepthwiseConv2d",
    "__version__",
    "activate_pool",
    "build_info",
    "create_model",
    "decompositions",
    "depthwise_conv2d",
    "explain",
    "fused_depthwise",
    "library_paths",
    "list_models",
    "load_checkpoint",
    "ops",
    "optimize",
    "reference",
    "replace_depthwise",
    "restore_depthwise",
]
