"""The ops `stem` and `stem_backward`: a network's first convolution with its batch norm, ReLU and max pool.

On the matrix kernels, for an image of 1 to 7 channels:

    forward    conv2d (statistics in the epilogue) -> bn_act_pool
    backward   bn_act_pool_backward -> bn_act_backward_reduce -> conv2d_wgrad with the batch norm's backward on load

The gradient du of the convolution's output u, the network's largest activation, is never stored, unless the image
itself needs a gradient: its dgrad is ATen's. Where no kernel takes the convolution it is ATen's too.

    x [N, C, H, W], weight [K, C, R, S]; gamma, beta, mean, var [K] in the accumulation type
    geometry  stride, padding, dilation (2 each), groups;  pool  kernel, stride, padding
    group     the name of the process group that the norm goes over, or ""
    forward returns y, mean and var of u ([0] where they are given), over a group its count of pixels [1] ([0]
    without), u and the pool's argmax
    backward takes the statistics that forward normalised with and returns dx, dweight ([0] where they are not asked
    for), dgamma, dbeta
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import plans
from .aten import Geometry, conv, conv_backward
from .autograd import forbid_gradients
from .bn_act_pool import Pool, pooled_size
from .bn_stats import batch_stats as stats_of
from .conv2d import encoded
from .dispatch import ops as _ops
from .layout import acc_dtype, autocast_type, empty_nhwc, laid_out_as, pixels_of, to_nhwc
from .norm_relu import relu_bn_reduce
from .pointwise import matrix_kernels_take
from .spec import Norm
from .sync import Group, agreed, name_of

_LIB = torch.library.Library("resnet_fused", "FRAGMENT")
_NORM = "Tensor gamma, Tensor beta, Tensor mean, Tensor var"
_CONFIG = "float eps, bool batch_stats, str group, int[] geometry, int[] pool"
_LIB.define(f"stem(Tensor x, Tensor weight, {_NORM}, {_CONFIG}) -> Tensor[]")
_LIB.define(
    f"stem_backward(Tensor dy, Tensor x, Tensor weight, {_NORM}, Tensor u, Tensor argmax, {_CONFIG}, bool needs_x, "
    "bool needs_weight) -> Tensor[]"
)


def obstacle(channels: int, weight_shape: tuple[int, ...], g: Geometry) -> str | None:
    """Why no kernel of few channels takes a convolution, whatever the device; None if they do."""
    k, _, r, s = weight_shape
    if not 1 <= channels <= 7 or g.groups != 1:
        return "conv1 has not 1 to 7 input channels"
    if k % 8:
        return "conv1's output channels are not a multiple of 8"
    if max(r, s) > 7 or max(g.stride) > 2 or g.dilation != (1, 1):
        return "conv1 has a kernel above 7x7, a stride above 2 or a dilation"
    return None


def kernel_obstacle(x: Tensor, weight: Tensor, g: Geometry) -> str | None:
    """The same for tensors at hand, with what a multiprocessor holds; None where kernels run."""
    if not matrix_kernels_take(x):
        return "the matrix kernels take bfloat16 and float16, on compute capability 8.0 and newer"
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    shapes = (tuple(x.shape), tuple(weight.shape))
    return obstacle(x.shape[1], shapes[1], g) or _planned(*shapes, g, x.dtype, 10 * capability[0] + capability[1])


@functools.lru_cache(64)
def _planned(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], g: Geometry, dtype: torch.dtype, arch: int
) -> str | None:
    names = ("N", "C", "H", "W", "K", "R", "S")
    sizes = dict(zip(names, (*x_shape, weight_shape[0], *weight_shape[2:]), strict=True))
    for name, (down, across) in zip(("stride", "padding", "dilation"), g[:3], strict=True):
        sizes |= {f"{name}_h": down, f"{name}_w": across}
    problem: dict[str, int | torch.dtype] = {"dtype": dtype, **sizes, "groups": g.groups}
    forward, backward = plans.plan("conv2d", problem, arch), plans.plan("conv2d_wgrad", problem, arch, {"coef_dz": 16})
    return forward.reason or backward.reason or None


def _geometry(g: list[int]) -> Geometry:
    return Geometry((g[0], g[1]), (g[2], g[3]), (g[4], g[5]), g[6])


def _forward(x, weight, gamma, beta, mean, var, eps, batch_stats, group, geometry, pool) -> list[Tensor]:
    with torch.autocast(autocast_type(x), enabled=False):
        g = _geometry(geometry)
        if kernel_obstacle(x, weight, g) is None:
            u, *own = _ops.conv2d(to_nhwc(x), to_nhwc(weight), None, None, geometry, batch_stats)
        else:
            u = conv(x, weight, g)
            own = list(stats_of(u)) if batch_stats else [_nothing(x), _nothing(x)]
        own = agreed(own, pixels_of(u), Group.named(group))
        mean, var = own[:2] if batch_stats else (mean, var)
        norm = Norm.of(mean, var, gamma, beta, eps)
        y, argmax = _ops.bn_act_pool(u, norm.scale, norm.shift, *pool)
    return [y, *own, *([] if group else [_nothing(x)]), u, argmax]


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty((0,), dtype=acc_dtype(x.dtype))


def _fake_forward(x, weight, gamma, beta, mean, var, eps, batch_stats, group, geometry, pool) -> list[Tensor]:
    n, k, p, q = shape = _geometry(geometry).out_shape(x.shape, weight.shape)
    pooled = (n, k, pooled_size(p, *pool), pooled_size(q, *pool))
    sizes = (k if batch_stats else 0, k if batch_stats else 0, 1 if group else 0)
    stats = [x.new_empty((size,), dtype=acc_dtype(x.dtype)) for size in sizes]
    return [empty_nhwc(x, pooled), *stats, empty_nhwc(x, shape), empty_nhwc(x, pooled, dtype=torch.int8)]


def _backward(
    dy, x, weight, gamma, beta, mean, var, u, argmax, eps, batch_stats, group, geometry, pool, needs_x, needs_weight
) -> list[Tensor]:
    with torch.autocast(autocast_type(x), enabled=False):
        norm, g = Norm.of(mean, var, gamma, beta, eps), _geometry(geometry)
        da = _ops.bn_act_pool_backward(to_nhwc(dy), argmax, *u.shape[2:], *pool)
        prologue: tuple[Any, ...]
        prologue, dgamma, dbeta = relu_bn_reduce(da, u, norm, batch_stats, Group.named(group))
        kernels = kernel_obstacle(x, weight, g) is None
        dx = dw = dy.new_empty(0)
        grad = da
        if needs_x or (needs_weight and not kernels):
            grad, prologue = _ops.bn_act_backward_apply(da, *prologue), (None,) * 8
            dx, dw = conv_backward(grad, x, weight, g, needs_x, needs_weight and not kernels)
        if needs_weight and kernels:
            dw = _ops.conv2d_wgrad(grad, *prologue, to_nhwc(x), None, None, weight.shape[2:], geometry)
    return [dx, laid_out_as(dw, weight) if needs_weight else dw, dgamma, dbeta]


def _fake_backward(
    dy, x, weight, gamma, beta, mean, var, u, argmax, eps, batch_stats, group, geometry, pool, needs_x, needs_weight
) -> list[Tensor]:
    dx = empty_nhwc(x, x.shape) if needs_x else dy.new_empty((0,))
    dw = torch.empty_like(weight) if needs_weight else dy.new_empty((0,))
    return [dx, dw, torch.empty_like(gamma), torch.empty_like(beta)]


for _name, _impl, _fake in (("stem", _forward, _fake_forward), ("stem_backward", _backward, _fake_backward)):
    for _key in ("CPU", "CUDA"):
        _LIB.impl(_name, _impl, _key)
    torch.library.register_fake(f"resnet_fused::{_name}", _fake, lib=_LIB)

# What each op runs, for counting.
COMPOSITIONS: dict[str, Callable[..., list[Tensor]]] = {"stem": _forward, "stem_backward": _backward}

forbid_gradients("stem_backward")  # a second derivative raises


# ------------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, x, weight, gamma, beta, mean, var, config, outputs: list[Tensor]) -> None:
    stats = outputs[1:3] if config[1] else (mean, var)
    ctx.config = config
    ctx.save_for_backward(x, weight, gamma, beta, *stats, *outputs[4:])


def _call_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, gamma, beta; None for mean and var."""
    need = ctx.needs_input_grad
    grads = _ops.stem_backward(dy, *ctx.saved_tensors, *ctx.config, need[0], need[1])
    return (*(g if wanted else None for g, wanted in zip(grads, need[:4], strict=True)), None, None)


class Stem(torch.autograd.Function):
    """maxpool(relu(bn(conv(x)))): (x, weight, gamma, beta, mean, var, eps, batch_stats, group, geometry, pool) -> (y,
    mean, var, count), [0] where they are given or there is no group."""

    @staticmethod
    def forward(
        ctx, x, weight, gamma, beta, mean, var, eps: float, batch_stats: bool, group: Group | None, g: Geometry,
        pool: Pool,
    ):  # fmt: skip
        config = (eps, batch_stats, name_of(group), encoded(g), list(pool))
        outputs = _ops.stem(x, weight, gamma, beta, mean, var, *config)
        _save(ctx, x, weight, gamma, beta, mean, var, config, outputs)
        ctx.mark_non_differentiable(*outputs[1:4])
        return tuple(outputs[:4])

    @staticmethod
    def backward(ctx, dy: Tensor, *_: Tensor):
        return (*_call_backward(ctx, dy), None, None, None, None, None)


def _setup(ctx, inputs, output) -> None:
    x, weight, gamma, beta, mean, var, *config = inputs
    _save(ctx, x, weight, gamma, beta, mean, var, config, output)
    ctx.mark_non_differentiable(*output[1:])


def _registered_backward(ctx, dout: list[Tensor]):
    """Gradients of a direct call, e.g. from an exported graph; only y (output 0) carries one."""
    return (*_call_backward(ctx, dout[0]), None, None, None, None, None)


torch.library.register_autograd("resnet_fused::stem", _registered_backward, setup_context=_setup, lib=_LIB)
