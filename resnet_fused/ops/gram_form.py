"""The Gram form of a 1x1 convolution followed by a batch norm: the raw output is never stored.

The convolution u = a W' is linear, so its batch statistics follow from those of its operand a [M, C]:

    mean(u) = W mu            var(u)_k = w_k' Cov(a) w_k

and so do its gradients. With dz [M, K] the gradient of z = s (u - mean(u)) + beta, s = gamma r, r = 1/std:

    G       = dz' (a - mu)                       [K, C]      (pass W)
    dgamma  = r rowsum(W * G)                    dbeta = colsum(dz)
    dW      = s (G - r dgamma W Cov(a))
    da      = dz (s W) - (a - mu) Q - W'(s dbeta / M),   Q = W' diag(r s dgamma / M) W     (pass D)

Derivation: substitute u - mean(u) = (a - mu) W' into the batch norm's backward
du = s (dz - dbeta/M - xhat dgamma/M) and collect terms. Nothing divides by gamma.

Where the batch is spread over a group of processes (`sync.py`), this process knows mu and Cov(a) of its own n pixels
only, and needs no others: with d = W mu - mean(u), mean(u) and the sums dgamma, dbeta that divide by M the group's,

    du = s (dz - level - slope (u - W mu)),    slope = r dgamma / M,    level = dbeta / M + slope d

is a batch norm's backward around W mu, and the formulas above hold with that; but du no longer sums to 0 here:

    dW = s (G + (colsum(dz) - n level) mu' - n slope W Cov(a))

Accuracy. The operand is stored centred (a minus a per-channel constant near its mean, rounded once), so that
a large mean/std cancels nowhere. The sum w' Cov w still may: its error is about

    eps D_k,   D_k = sum_c w_kc^2 Cov_cc   (var(u)_k if the channels of a were uncorrelated)

with eps that of a sum over pixels in the accumulation type. Relative to var(u)_k that is eps D_k / var(u)_k, where
a convolution's rounding costs eps sqrt(D_k / var(u)_k). The ratio is large where channels are nearly dependent and
w_k lies near the null space of Cov. `cancelling` finds such outputs by var(u)_k < D_k / 8, and `block.py` computes
them by a convolution after all; the variance of the others is within about 8 eps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .aten import POINTWISE, conv, fused_conv, has_fused_conv, matmul_nt, matmul_tn, wgrad1x1
from .dispatch import ops as _ops
from .layout import acc_dtype, pixels_of
from .sync import Sums

_CENTER_SAMPLES = 1024  # pixels: any estimate within a few standard deviations of the mean will do

# var(u)_k / D_k below which an output leaves the Gram form. Every error grows as a power of D_k / var(u)_k times the
# dtype's eps, and eager's is a multiple of eps too: one threshold serves all dtypes. Just above 1/8 the errors are
# half of what the tests allow, in float32 and bfloat16; untrained networks on photographs stay above 1/5.
_CANCELS = 1 / 8


class Gram(NamedTuple):
    """What the operand's statistics are; all in the accumulation type."""

    center: Tensor  # [C] subtracted from the operand before it was rounded
    mean: Tensor  # [C] mean of the centred operand
    cov: Tensor  # [C, C] biased covariance


def sample_center(u: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """A per-channel constant [C] near the mean of u [N, C, H, W], or of relu(scale*u + shift), from a fixed sample
    of its pixels.

    It is a multiple of the power of two below the sample's standard deviation, and representable in u's type:
    subtracting it then rounds few values, and 0 where it need not be anything else. A constant with more bits
    would round neighbouring values all in one direction: in bfloat16 half a percent of a variance.
    """
    rows = u.permute(0, 2, 3, 1).reshape(-1, u.shape[1])  # [M, C], a view
    sample = rows[:: max(1, rows.shape[0] // _CENTER_SAMPLES)].to(acc_dtype(u.dtype))
    if scale is not None and shift is not None:
        sample = torch.addcmul(shift, sample, scale).relu_()
    mean = sample.mean(0)
    std = (sample - mean).square_().mean(0).sqrt_()  # several times faster than torch.std over rows
    step = std.log2().floor().exp2()
    center = torch.where(step > 0, (mean / step).round() * step, mean)
    return center.to(u.dtype).to(sample.dtype)


def gram_of(operand: Tensor, mean: Tensor, center: Tensor) -> Gram:
    """Statistics of a centred operand [N, C, H, W] whose mean [C] is known."""
    pixels = pixels_of(operand)
    wide = operand.to(mean.dtype)  # bfloat16's wgrad rounds its sums to bfloat16: 2^-9 of a variance, not 2^-23
    cov = wgrad1x1(wide, wide).div_(pixels).addr_(mean, mean, alpha=-1)
    return Gram(center, mean, cov)


def conv_stats(gram: Gram, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Batch mean and biased variance, both [K], of the 1x1 conv's output, which need not exist."""
    w = weight.flatten(1).to(gram.cov.dtype)  # [K, C]
    mean = output_mean(weight, gram.center.double() + gram.mean).to(w.dtype)
    var = matmul_nt(w, gram.cov).mul_(w).sum(1).clamp_min_(0)
    return mean, var


def output_mean(weight: Tensor, mean: Tensor) -> Tensor:
    """Mean [K] of the 1x1 conv's output for the operand's [C]; in float64, since large means may cancel in it."""
    return weight.flatten(1).double() @ mean.double()


def cancelling(gram: Gram, weight: Tensor, var: Tensor) -> Tensor:
    """The outputs [K'], usually none, for whose variance the Gram form is too inaccurate: see the module's head.

    Elsewhere than on the CPU, which outputs they are is not known without waiting for the device: none are
    returned, and the Gram form keeps its error eps D_k / var(u)_k there.
    """
    if var.device.type != "cpu":
        return torch.empty(0, dtype=torch.int64, device=var.device)
    uncorrelated = weight.flatten(1).to(var.dtype).square() @ gram.cov.diagonal()
    return (var < _CANCELS * uncorrelated).nonzero().flatten()


class Branch(NamedTuple):
    """One 1x1 unit of a block's end: its centred operand and the affine of its batch norm."""

    operand: Tensor  # [N, C, H, W], centred
    mean: Tensor  # [C] of the operand
    weight: Tensor  # [K, C, 1, 1]
    scale: Tensor  # [K] gamma / std
    beta: Tensor  # [K]


def expand(branches: list[Branch], residual: Tensor | None, relu: bool, save: bool) -> tuple[Tensor, Tensor]:
    """act(sum over branches of bn(conv1x1(a)) + residual) and its mask; one or two branches.

    Two branches are the expand conv and the projection: the dual GEMM. Where oneDNN serves, the scale is
    folded into the weights and one primitive does conv, shift, add and ReLU; the shift is computed from the
    rounded product, so that rounding the weights cannot move a channel's mean.
    """
    first = branches[0].operand
    if not has_fused_conv(first):
        return _expand_plain(branches, residual, relu, save)
    folded = [(b.weight * b.scale.view(-1, 1, 1, 1)).to(first.dtype) for b in branches]
    shift = torch.zeros_like(branches[0].beta)
    for b, w in zip(branches, folded, strict=True):
        shift = shift + b.beta - w.flatten(1).to(b.mean.dtype) @ b.mean
    if len(branches) == 2:
        residual = fused_conv(branches[1].operand, folded[1], None, POINTWISE)
    y = fused_conv(first, folded[0], shift.to(first.dtype), POINTWISE, residual, relu, into_residual=len(branches) == 2)
    return y, _ops.relu_mask(y) if relu and save else y.new_empty(0, dtype=torch.int32)


def _expand_plain(branches: list[Branch], residual: Tensor | None, relu: bool, save: bool):
    shifts = [b.beta - b.scale * (b.weight.flatten(1).to(b.mean.dtype) @ b.mean) for b in branches]
    u = conv(branches[0].operand, branches[0].weight, POINTWISE)
    if len(branches) == 1:
        return _ops.bn_act(u, branches[0].scale, shifts[0], residual, None, None, relu, relu and save)
    shortcut = conv(branches[1].operand, branches[1].weight, POINTWISE)
    return _ops.bn_act(u, branches[0].scale, shifts[0], shortcut, branches[1].scale, shifts[1], relu, relu and save)


def drift(gram: Gram, weight: Tensor, mean: Tensor) -> Tensor:
    """By how much the mean of this process's output lies above `mean`, that of its group: [K]."""
    return (output_mean(weight, gram.center.double() + gram.mean) - mean.double()).to(mean.dtype)


def gram_sums(
    operand: Tensor, gram: Gram, weight: Tensor, dz: Tensor, dbeta: Tensor, away: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pass W for dz [N, K, H, W], whose pixel sums are dbeta [K]: (G [K, C], sum dz (u - mean(u)) [K]).

    away: `drift` from the group's mean, where there is one.
    """
    g = wgrad1x1(operand, dz).addr_(dbeta, gram.mean, alpha=-1)
    return g, output_sums(g, weight, dbeta, away)


def output_sums(g: Tensor, weight: Tensor, dbeta: Tensor, away: Tensor | None) -> Tensor:
    """sum dz (u - mean(u)) [K] from G [K, C]."""
    dzx = (weight.flatten(1).to(g.dtype) * g).sum(1)
    return dzx if away is None else dzx.addcmul_(away, dbeta)


class Taken(NamedTuple):
    """What a batch norm takes from dz: du = s (dz - level - slope (u - mean(u))), with the mean of this process."""

    level: Tensor  # [K]
    slope: Tensor  # [K]


def taken_away(rstd: Tensor, sums: Sums, away: Tensor | None) -> Taken:
    """sums: of the whole batch; away: as in `gram_sums`."""
    slope, level = rstd.square() * sums.dzx / sums.pixels, sums.dz / sums.pixels
    return Taken(level if away is None else level.addcmul(slope, away), slope)


def weight_gradient(
    g: Tensor, gram: Gram, weight: Tensor, scale: Tensor, dbeta: Tensor, taken: Taken, pixels: int, grouped: bool
) -> Tensor:
    """dW [K, C, 1, 1] from G [K, C], of this process's pixels; dbeta [K] is too. grouped: whether there are others."""
    w = weight.flatten(1).to(g.dtype)
    dw = g - matmul_nt(w, gram.cov).mul_((taken.slope * pixels).unsqueeze(1))
    if grouped:  # sum du over these pixels alone is not 0
        dw.addr_(dbeta - taken.level * pixels, gram.center + gram.mean)
    return dw.mul_(scale.unsqueeze(1)).view_as(weight)


def gram_backward(operand: Tensor, gram: Gram, weight: Tensor, scale: Tensor, dz: Tensor, taken: Taken) -> Tensor:
    """Pass D: the gradient of the operand, for dz [N, K, H, W]. Formulas: the module's head."""
    w = weight.flatten(1).to(gram.cov.dtype)  # [K, C]
    q = matmul_tn(w, w * (scale * taken.slope).unsqueeze(1))  # [C, C]
    const = q @ gram.mean - w.t() @ (scale * taken.level)  # [C]
    into_a = (w * scale.unsqueeze(1)).t()[:, :, None, None].to(dz.dtype)  # [C, K, 1, 1]: dgrad as a fprop
    minus_q = q.neg_()[:, :, None, None].to(dz.dtype)
    da = conv(dz, into_a.contiguous(), POINTWISE)
    if has_fused_conv(operand):
        return fused_conv(operand, minus_q, const.to(dz.dtype), POINTWISE, da, into_residual=True)
    return da.add_(conv(operand, minus_q, POINTWISE) + const.to(dz.dtype).view(1, -1, 1, 1))
