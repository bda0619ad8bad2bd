"""The gradients of depthwise_conv2d to any order.

The convolution is linear in x and in the weight. So its derivatives are three operators in turn, each the derivative of
the others:
    y  = depthwise_conv2d(x, weight, bias)
    gx = depthwise_conv2d_dgrad(gy, weight)
    gweight, gbias = depthwise_conv2d_wgrad(x, gy, kernel_h, kernel_w, bias)
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .ops import _call

_ops = torch.ops.convmixer_fast
_library = torch.library.Library("convmixer_fast", "FRAGMENT")


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _call(_ops.depthwise_conv2d.default, x, weight, bias)


def _dgrad(gy: Tensor, weight: Tensor) -> Tensor:
    return _call(_ops.depthwise_conv2d_dgrad.default, gy, weight)


def _wgrad(x: Tensor, gy: Tensor, kernel_h: int, kernel_w: int, bias: bool) -> tuple[Tensor, Tensor]:
    """The gradients of the weight (C, 1, kernel_h, kernel_w) and of the bias (C,), or (0,) if it is not wanted."""
    return _call(_ops.depthwise_conv2d_wgrad.default, x, gy, kernel_h, kernel_w, bias)


# torch.library.register_autograd would do, but for torch.func.grad, which it refuses, and for forward mode,
# where it silently gives zeros. So the kernels of the key Autograd are registered here. _SingleLevelFunction is the
# base of autograd.Function that leaves the levels of torch.func to the dispatcher, as torch's own operators do.


def _save(ctx: Any, first: Tensor, second: Tensor) -> None:
    """The factors of a product: one is needed for the other's gradient."""
    need_first, need_second = ctx.needs_input_grad[1:3]
    ctx.save_for_backward(first if need_second else None, second if need_first else None)
    ctx.save_for_forward(first, second)


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _primals(ctx: Any) -> Iterator[Tensor]:
    return (forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors)


def _for_levels_below(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Derivatives of a derivative in forward mode: the level of torch.func below sees this one's arithmetic."""

    @functools.wraps(jvp)
    def enabled(*arguments: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(*arguments)

    return enabled


class _Conv(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _save(ctx, x, weight)
        ctx.kernel_size = weight.shape[2:]
        return run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, need_x, need_weight, need_bias = ctx.needs_input_grad
        gx = _dgrad(gy, weight) if need_x else None
        gweight = gbias = None
        if need_weight:
            kernel_h, kernel_w = ctx.kernel_size
            gweight, gbias = _wgrad(x, gy, kernel_h, kernel_w, need_bias)
        elif need_bias:
            gbias = gy.sum((0, 2, 3))
        return None, gx, gweight, gbias if need_bias else None

    @staticmethod
    @_for_levels_below
    def jvp(
        ctx: Any, _: None, x_tangent: Tensor | None, weight_tangent: Tensor | None, bias_tangent: Tensor | None
    ) -> Tensor | None:
        x, weight = _primals(ctx)
        return _sum(
            None if x_tangent is None else _conv(x_tangent, weight),
            None if weight_tangent is None else _conv(x, weight_tangent),
            None if bias_tangent is None else bias_tangent.view(-1, 1, 1).expand(x.shape),
        )


class _Dgrad(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], gy: Tensor, weight: Tensor) -> Tensor:
        _save(ctx, gy, weight)
        ctx.kernel_size = weight.shape[2:]
        return run(gy, weight)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor) -> tuple[Tensor | None, ...]:
        gy, weight = ctx.saved_tensors
        _, need_gy, need_weight = ctx.needs_input_grad
        ggy = _conv(ggx, weight) if need_gy else None
        kernel_h, kernel_w = ctx.kernel_size
        return None, ggy, _wgrad(ggx, gy, kernel_h, kernel_w, False)[0] if need_weight else None

    @staticmethod
    @_for_levels_below
    def jvp(ctx: Any, _: None, gy_tangent: Tensor | None, weight_tangent: Tensor | None) -> Tensor | None:
        gy, weight = _primals(ctx)
        return _sum(
            None if gy_tangent is None else _dgrad(gy_tangent, weight),
            None if weight_tangent is None else _dgrad(gy, weight_tangent),
        )


class _Wgrad(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, gy: Tensor, *sizes_and_bias: int
    ) -> tuple[Tensor, Tensor]:
        _save(ctx, x, gy)
        ctx.sizes_and_bias = sizes_and_bias
        return run(x, gy, *sizes_and_bias)

    @staticmethod
    def backward(ctx: Any, ggweight: Tensor, ggbias: Tensor) -> tuple[Tensor | None, ...]:
        x, gy = ctx.saved_tensors
        _, need_x, need_gy, *_ = ctx.needs_input_grad
        gx = _dgrad(gy, ggweight) if need_x else None
        ggy = _conv(x, ggweight, ggbias if ctx.sizes_and_bias[-1] else None) if need_gy else None
        return None, gx, ggy, None, None, None

    @staticmethod
    @_for_levels_below
    def jvp(ctx: Any, _: None, x_tangent: Tensor | None, gy_tangent: Tensor | None, *__: None) -> tuple[Tensor, Tensor]:
        x, gy = _primals(ctx)
        kernel_h, kernel_w, bias = ctx.sizes_and_bias
        no_gradient = x.new_zeros((x.shape[1], 1, kernel_h, kernel_w)), x.new_zeros((x.shape[1] if bias else 0,))
        by_x = no_gradient[0] if x_tangent is None else _wgrad(x_tangent, gy, kernel_h, kernel_w, False)[0]
        by_gy, bias_tangent = no_gradient if gy_tangent is None else _wgrad(x, gy_tangent, kernel_h, kernel_w, bias)
        return by_x + by_gy, bias_tangent


def _register(name: str, function: Any) -> None:
    """function: a subclass of _SingleLevelFunction, whose apply() PyTorch's types do not tell."""
    redispatch = getattr(_ops, name).default.redispatch
    after_autograd = torch._C._after_autograd_keyset

    def differentiable(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        # function.apply turns gradients off, but they are on for the level of torch.func below.
        def run(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return redispatch(keyset & after_autograd, *arguments)

        with enable_single_level_autograd_function():
            return function.apply(run, *arguments)

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        forward_mode = forward_ad._current_level >= 0
        if forward_mode or torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return differentiable(keyset, *arguments)
        # Most calls under torch.no_grad() end here, so it does no more than it must: like torch's own fallback for
        # operators without gradients, it leaves the key Autograd in force for what the operator calls in turn.
        return redispatch(keyset & after_autograd, *arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


_register("depthwise_conv2d", _Conv)
_register("depthwise_conv2d_dgrad", _Dgrad)
_register("depthwise_conv2d_wgrad", _Wgrad)
