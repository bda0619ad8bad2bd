"""The operators for those who cannot run our kernels: as plain ATen operators, and as ONNX.

torch.compile, torch.export and AOTInductor keep the operators and so run our kernels. Other runtimes and compilers know
ATen or ONNX alone. Both of torch.onnx's exporters translate our operators once this package is imported, without an
option, to what :func:`decompositions` gives.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .ops import ACTIVATIONS

_ops = torch.ops.convmixer_fast
ACTIVATION_NAMES = {value: name for name, value in ACTIVATIONS.items()}


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """The operators that can be in an exported program, each with a function of its arguments in ATen operators.

    For ``ExportedProgram.run_decompositions(decompositions())``, where a runtime or compiler lacks our operators, and
    any other place that takes a table of decompositions. Given to torch.compile, it would take our kernels away.
    """
    return {
        _ops.depthwise_conv2d.default: reference.depthwise_conv2d,
        _ops.depthwise_conv2d_dgrad.default: _dgrad,
        _ops.depthwise_conv2d_wgrad.default: _wgrad,
        _ops.fused_depthwise.default: _fused_depthwise,
        _ops.activate_pool.default: _activate_pool,
        _ops.fused_depthwise.out: _into_out(_fused_depthwise),
        _ops.activate_pool.out: _into_out(_activate_pool),
    }


def _fused_depthwise(*arguments: Any) -> Tensor:
    *operands, activation, residual, bias, scale, shift = arguments
    prologue = None if bias is None else (bias, scale, shift)
    run: Callable[..., Tensor] = reference.fused_depthwise
    return run(*operands, ACTIVATION_NAMES[activation], residual, prologue)


def _activate_pool(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, activation: int) -> Tensor:
    return reference.activate_pool(x, bias, scale, shift, ACTIVATION_NAMES[activation])


def _into_out(function: Callable[..., Tensor]) -> Callable[..., None]:
    def run(*arguments: Any, out: Tensor) -> None:
        out.copy_(function(*arguments))

    return run


def _dgrad(gy: Tensor, weight: Tensor) -> Tensor:
    """The transposed convolution: one with the weight turned round, and the padding's front and back exchanged."""
    left, right, top, bottom = reference.same_padding(*weight.shape[2:])
    padded = F.pad(gy, (right, left, bottom, top))
    return F.conv2d(padded, weight.flip(2, 3), groups=gy.shape[1])


def _wgrad(x: Tensor, gy: Tensor, kernel_h: int, kernel_w: int, bias: bool) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    padded = F.pad(x, reference.same_padding(kernel_h, kernel_w))
    weight = x.new_empty((channels, 1, kernel_h, kernel_w))  # its shape alone is used
    _, gweight, gbias = torch.ops.aten.convolution_backward.default(
        gy, padded, weight, [channels], [1, 1], [0, 0], [1, 1], False, [0, 0], channels, [False, True, bias]
    )
    return gweight, gbias if bias else gy.new_empty((0,))


# --------------------------------------------------------------------------------------------------------- ONNX
#
# Importing torch.onnx takes longer than importing this package, and few programs do.


class _AfterTorchOnnx(importlib.abc.MetaPathFinder):
    """Has the import of torch.onnx, which may come or not, end with that of _onnx.py."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch.onnx":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_onnx()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register_onnx() -> None:
    try:
        importlib.import_module("._onnx", __package__)
    except (ImportError, AttributeError) as error:  # torch.onnx and the rest of the user's program work nevertheless
        warnings.warn(
            f"convmixer_fast's operators cannot be exported to ONNX with torch {torch.__version__}: {error}",
            stacklevel=2,
        )


if "torch.onnx" in sys.modules:
    _register_onnx()
else:
    sys.meta_path.insert(0, _AfterTorchOnnx())
