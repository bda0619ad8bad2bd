"""The CUDA operators on CPU tensors: the launchers and kernels that ship, run on an emulated GPU (ptxsim).

`python tests/emulated.py sm_90a` compiles them beforehand, with a line for each file that takes its time.
"""

import ctypes
import sys
from ctypes import Structure, c_bool, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from ptxsim import Device, HostProgram, LaunchRecord
from ptxsim.host import build
from ptxsim.toolchain import check_sizes
from torch import Tensor

from convmixer_fast._types import ACTIVATIONS, DTYPES

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
NVCC_FLAGS = ("-O3", "-std=c++17")  # as in setup.py
COMPILED_FOR = {"sm_89": "sm_80"}  # the same PTX (SAME_PTX in setup.py)
INCLUDE_DIRS = [CSRC]
CHECKS = {"memory", "race", "global"}  # all that ptxsim has
SECONDS_PER_LAUNCH = 120


class Strides(Structure):
    _fields_ = [(name, c_int64) for name in "nchw"]


class ElementwiseParams(Structure):
    _fields_ = [
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("param_dtype", c_int32),
        ("activation", c_int32),
    ]


class DepthwiseParams(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
        *((name, c_int64) for name in ("batch", "channels", "height", "width")),
        ("x_stride", Strides),
        ("y_stride", Strides),
        *((name, c_int64) for name in ("kernel_h", "kernel_w", "pad_top", "pad_left")),
        ("dtype", c_int32),
        ("has_prologue", c_bool),
        ("residual", c_bool),
        ("flip_taps", c_bool),
        ("prologue", ElementwiseParams),
        ("epilogue", ElementwiseParams),
    ]


class WgradParams(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "gy", "gweight", "gbias", "workspace")),
        *((name, c_int64) for name in ("batch", "channels", "height", "width")),
        ("x_stride", Strides),
        ("gy_stride", Strides),
        *((name, c_int64) for name in ("kernel_h", "kernel_w", "pad_top", "pad_left")),
        ("dtype", c_int32),
    ]


class PoolParams(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("y", c_void_p),
        *((name, c_int64) for name in ("batch", "channels", "height", "width")),
        ("x_stride", Strides),
        ("dtype", c_int32),
        ("prologue", ElementwiseParams),
    ]


def sources(overlay: Path | None = None) -> list[Path]:
    """A program's sources: the kernels, their launchers, and C names for these; files of the overlay take the place of
    the project's of the same paths."""
    replaced = {path.relative_to(overlay): path for path in sorted(overlay.rglob("*.cu"))} if overlay else {}
    own = [path for path in sorted((CSRC / "cuda").rglob("*.cu")) if path.relative_to(CSRC) not in replaced]
    # The linker takes an inline function from the first object that has it: from the overlay's.
    return [*replaced.values(), *own, Path(__file__).with_name("emulated_launchers.cpp")]


class EmulatedOps:
    """depthwise_conv2d, fused_depthwise and activate_pool with the signatures of :mod:`convmixer_fast.ops`; and the
    gradients of depthwise_conv2d.

    They take CPU tensors of any strides and alignment, which the kernels see as they lie in memory. A call raises
    ptxsim.DeviceError on an access that is out of bounds (of the elements of the tensor, not of its storage),
    misaligned or uninitialised, on a write to an input, on a race in shared or global memory, on barrier misuse, on a
    leak, and if an element of the output is not written exactly once; RuntimeError if the launcher returns an error.

    Args:
        arch: of the emulated GPU, such as "sm_80".
        overlay: a folder like csrc with sources that take the place of the project's of the same paths, and with all
            headers that these include.
        launcher: of csrc/cuda/common/launch.h: "depthwise", which chooses the kernel, or "depthwise_direct".
        **device: further properties and options of the ptxsim.Device: sm_count, shared_per_block_optin, order
            ("forward", "reverse" or a seed), profile, execute (False: results are left as they were).

    Attributes:
        device: the ptxsim.Device. Its options (order, profile) may be changed between calls.
        launches: of the last call, with kernel, grid, block, shared_bytes, instructions, seconds and profile.
    """

    def __init__(self, arch: str = "sm_90a", overlay: Path | None = None, launcher: str = "depthwise", **device):
        self.device = Device(arch, checks=CHECKS, timeout=SECONDS_PER_LAUNCH, **device)
        self.program = HostProgram(
            sources(overlay), self.device, NVCC_FLAGS, INCLUDE_DIRS, arches=[COMPILED_FOR.get(arch, arch)]
        )
        self.launcher = getattr(self.program, launcher)
        mirrored = {"depthwise": DepthwiseParams, "wgrad": WgradParams, "pool": PoolParams}
        check_sizes(self.program.lib, {f"size_of_{name}_params": structure for name, structure in mirrored.items()})

    @property
    def launches(self) -> list[LaunchRecord]:
        return self.device.launches

    def close(self):
        self.device.close()

    def depthwise_conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._depthwise(x, weight, (bias, None, None), "none")

    def fused_depthwise(
        self, x, weight, bias, scale, shift, activation="gelu", residual=True, prologue=None, *, out=None
    ) -> Tensor:
        return self._depthwise(x, weight, (bias, scale, shift), activation, residual, prologue, out)

    def activate_pool(self, x, bias, scale, shift, activation="gelu", *, out=None) -> Tensor:
        y = x.new_empty(x.shape[:2]) if out is None else out
        with self.device.scope():
            params = PoolParams(
                **self._map(x, y), prologue=self._elementwise("prologue", (bias, scale, shift), activation)
            )
            self._launch(self.program.activate_pool, params, y)
        return y

    def depthwise_conv2d_dgrad(self, gy: Tensor, weight: Tensor) -> Tensor:
        """Gradient of x."""
        return self._depthwise(gy, weight, (None, None, None), "none", flip_taps=True)

    def depthwise_conv2d_wgrad(self, x, gy, kernel_size, bias=True, weight=True) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the weight and the bias, each None where it is not wanted. Neither the workspace nor the results
        are initialised, and every element of the workspace that is written is written once."""
        batch, channels, height, width = x.shape
        (kernel_h, kernel_w), dtype = kernel_size, x.dtype
        results = [
            torch.empty(shape, dtype=dtype) if wanted else None
            for wanted, shape in ((weight, (channels, 1, kernel_h, kernel_w)), (bias, (channels,)))
        ]
        with self.device.scope():
            params = WgradParams(
                x=self._upload("x", x),
                gy=self._upload("gy", gy),
                batch=batch,
                channels=channels,
                height=height,
                width=width,
                x_stride=Strides(*x.stride()),
                gy_stride=Strides(*gy.stride()),
                kernel_h=kernel_h,
                kernel_w=kernel_w,
                pad_top=(kernel_h - 1) // 2,
                pad_left=(kernel_w - 1) // 2,
                dtype=DTYPES[dtype].code,
            )
            for name, result in zip(("gweight", "gbias"), results):
                if result is not None:
                    setattr(params, name, self.device.alloc(result.nbytes, name, once=True))
            size = ctypes.c_size_t()
            self._call(self.program.depthwise_wgrad_workspace, params, ctypes.byref(size))
            if size.value:
                params.workspace = self.device.alloc(size.value, "workspace", once=True)
            self._call(self.program.depthwise_wgrad, params, None)
            for name, result in zip(("gweight", "gbias"), results):
                if result is not None:
                    self._download(getattr(params, name), result)
        return tuple(results)

    def _depthwise(self, x, weight, epilogue, activation, residual=False, prologue=None, out=None, flip_taps=False):
        y = torch.empty_like(x, memory_format=torch._prims_common.suggest_memory_format(x)) if out is None else out
        with self.device.scope():
            kernel_h, kernel_w = weight.shape[2:]
            params = DepthwiseParams(
                **self._map(x, y),
                weight=self._upload("weight", weight.contiguous()),
                y_stride=Strides(*y.stride()),
                kernel_h=kernel_h,
                kernel_w=kernel_w,
                pad_top=kernel_h // 2 if flip_taps else (kernel_h - 1) // 2,
                pad_left=kernel_w // 2 if flip_taps else (kernel_w - 1) // 2,
                has_prologue=prologue is not None,
                residual=residual,
                flip_taps=flip_taps,
                prologue=self._elementwise("prologue", prologue or (None, None, None), activation),
                epilogue=self._elementwise("epilogue", epilogue, activation),
            )
            self._launch(self.launcher, params, y)
        return y

    def _map(self, x, y) -> dict:
        batch, channels, height, width = x.shape
        return dict(
            x=self._upload("x", x),
            y=self.device.alloc_view(_as_numpy(y), "y", once=True),
            batch=batch,
            channels=channels,
            height=height,
            width=width,
            x_stride=Strides(*x.stride()),
            dtype=DTYPES[x.dtype].code,
        )

    def _elementwise(self, step, vectors, activation) -> ElementwiseParams:
        addresses = [
            None if vector is None else self._upload(f"{step}.{name}", vector.contiguous())
            for name, vector in zip(("bias", "scale", "shift"), vectors)
        ]
        dtypes = {DTYPES[vector.dtype].code for vector in vectors if vector is not None} or {0}
        (dtype,) = dtypes
        return ElementwiseParams(*addresses, dtype, ACTIVATIONS[activation].code)

    def _upload(self, name, tensor) -> int:
        return self.device.upload_view(_as_numpy(tensor), name, readonly=True)

    def _launch(self, launcher, params, y):
        if y.numel() == 0:  # as csrc/bindings/operators.h
            self.device.launches.clear()
            return
        self._call(launcher, params, None)
        self._download(params.y, y)

    def _call(self, launcher, params, argument):
        self.device.launches.clear()
        self.device.errors.clear()
        status = launcher(ctypes.byref(params), argument)
        if status:
            reasons = "; ".join(f"{error.call}: {error.name}, {error.reason}" for error in self.device.errors)
            raise RuntimeError(f"{launcher.__name__} returned CUDA error {status}: {reasons}")
        if self.program.last_error:
            raise RuntimeError(f"{launcher.__name__} returned success, but left CUDA error {self.program.last_error}")

    def _download(self, address, result):
        array = _as_numpy(result)
        array[...] = self.device.download(address, array, complete=self.device.execute)


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's memory; bfloat16, which numpy lacks, as int16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def compile_beforehand(arch: str):
    def report(source):
        line = f"{arch}: {Path(source).relative_to(ROOT)}\n"
        print(line, end="", flush=True)  # in one piece: sources are compiled side by side

    build(sources(), [arch], NVCC_FLAGS, INCLUDE_DIRS, report)


if __name__ == "__main__":
    for arch in sys.argv[1:]:
        compile_beforehand(arch)
