"""conv2d, conv2d_bn_act and conv2d_dgrad on every device: by the tolerance rule, and each element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv2d_cases import (
    GEOMETRIES,
    GROUPED,
    PROBLEMS,
    Geometry,
    Problem,
    bn_act_arguments,
    conv2d,
    conv2d_bn_act,
    conv2d_dgrad,
    dgrad_arguments,
    forward_arguments,
    kernel,
    out_shape,
)
from device import Device
from op_cases import activation, nhwc, ops
from pointwise_cases import DENSE, assert_close, assert_dense, assert_refused, compare, dtypes, mask_of, summed


def check_statistics(out: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> None:
    """They are those of what is stored."""
    assert_close(mean, out.double().mean((0, 2, 3)), 1e-5)
    assert_close(var, out.double().var((0, 2, 3), unbiased=False), 1e-5)


# -------------------------------------------------------------------------------------------------------- fprop


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_fprop(problem: Problem, affine: bool, device: Device) -> None:
    for dtype in dtypes(device):
        for _, got in compare(device, ops.conv2d, conv2d, lambda t: forward_arguments(problem, t, affine), dtype):
            assert_dense(got["0"])
            check_statistics(got["0"], got["1"], got["2"])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_fprop_of_every_geometry(geometry: Geometry, device: Device) -> None:
    problem = Problem(3, 40, 13, 11, 72, geometry)
    for dtype in dtypes(device):
        compare(device, ops.conv2d, conv2d, lambda t: forward_arguments(problem, t), dtype)


@pytest.mark.parametrize("problem", GROUPED, ids=str)
def test_groups(problem: Problem, device: Device) -> None:
    for dtype in dtypes(device):
        compare(device, ops.conv2d, conv2d, lambda t: forward_arguments(problem, t), dtype)
        compare(device, ops.conv2d_dgrad, conv2d_dgrad, lambda t: dgrad_arguments(problem, t), dtype)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS[1:4], ids=str)
def test_bn_act(problem: Problem, residual: bool, relu: bool, device: Device) -> None:
    for dtype in dtypes(device):

        def y_and_bits(**arguments: Any) -> tuple[torch.Tensor, ...]:
            y, mask = ops.conv2d_bn_act(**arguments)
            assert_dense(y)
            if relu:  # the bits are those of what is stored
                assert torch.equal(mask, ops.relu_mask(y))
            return (y,)

        compare(device, y_and_bits, conv2d_bn_act, lambda t: bn_act_arguments(problem, t, residual, relu), dtype)


def test_padding_stays_zero_after_the_activation(device: Device) -> None:
    """relu(shift) is not 0, padding is: a constant image shows what a border's outputs sum up."""
    x, w = torch.zeros(2, 8, 6, 9), torch.ones(8, 8, 3, 3)
    out = device.run(
        ops.conv2d, nhwc(x.bfloat16()), nhwc(w.bfloat16()), torch.ones(8), torch.ones(8), [1, 1, 1, 1, 1, 1, 1], False
    )[0]
    taps = torch.nn.functional.conv2d(torch.ones(2, 8, 6, 9), w, padding=1)
    assert torch.equal(out.float(), taps)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 64), (torch.float16, 1000)])
def test_statistics_far_from_zero(dtype: torch.dtype, ratio: int, device: Device) -> None:
    """One input channel makes every output's mean, `ratio` standard deviations from 0."""
    x, w = activation(2, 24, 13, 9, dtype), kernel(40, 24, (3, 3), 1, dtype)
    x[:, 0] = 1
    w[:, 0] = 0
    w[:, 0, 1, 1] = ratio * torch.randn(40).sign()
    out, mean, var = device.run(ops.conv2d, x, w, None, None, [1, 1, 1, 1, 1, 1, 1], True)
    assert_close(mean, out.double().mean((0, 2, 3)), 1e-6)
    assert_close(var, out.double().var((0, 2, 3), unbiased=False), 1e-4)


def test_nan_reaches_the_outputs_around_it_alone(device: Device) -> None:
    x, w = activation(2, 24, 5, 7, torch.bfloat16), kernel(40, 24, (3, 3), 1, torch.bfloat16)
    x[1, 3, 2, 0] = float("nan")
    out = device.run(ops.conv2d, x, w, torch.ones(24), torch.zeros(24), [1, 1, 1, 1, 1, 1, 1], False)[0]
    wanted = torch.zeros(2, 40, 5, 7, dtype=torch.bool)
    wanted[1, :, 1:4, 0:2] = True
    assert torch.equal(out.isnan(), wanted)


def test_any_channels_on_the_cpu() -> None:
    cpu, problem = Device("cpu"), Problem(2, 3, 5, 7, 33, Geometry((3, 3), 2, (1, 1)))
    for dtype in dtypes(cpu):
        compare(cpu, ops.conv2d, conv2d, lambda t: forward_arguments(problem, t), dtype)
        compare(
            cpu, lambda **a: ops.conv2d_bn_act(**a)[:1], conv2d_bn_act, lambda t: bn_act_arguments(problem, t), dtype
        )
        compare(cpu, ops.conv2d_dgrad, conv2d_dgrad, lambda t: dgrad_arguments(problem, t), dtype)


# -------------------------------------------------------------------------------------------------------- dgrad


@pytest.mark.parametrize("end", ["none", "add", "add mask", "gate"])
@pytest.mark.parametrize("prologue", ["none", "bn", "bn mask", "bn gate"])
@pytest.mark.parametrize("problem", PROBLEMS[2:4], ids=str)
def test_dgrad(problem: Problem, prologue: str, end: str, device: Device) -> None:
    for dtype in dtypes(device):
        runs = compare(
            device, ops.conv2d_dgrad, conv2d_dgrad, lambda t: dgrad_arguments(problem, t, prologue, end), dtype
        )
        for a, got in runs:
            dx = got["0"]
            assert_dense(dx)
            if end == "gate":  # sums are those of what is stored
                wanted = summed(dx.double(), a["gate_u"].double(), a["gate_mean"].double())[1:]
                for own, want, terms in zip((got["1"], got["2"]), wanted, (dx, 3 * dx), strict=True):
                    assert (own.double() - want).abs().max() <= 1e-6 * terms.double().abs().sum((0, 2, 3)).max()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_dgrad_of_every_problem(problem: Problem, device: Device) -> None:
    for dtype in dtypes(device):
        compare(device, ops.conv2d_dgrad, conv2d_dgrad, lambda t: dgrad_arguments(problem, t), dtype)
        compare(
            device, ops.conv2d_dgrad, conv2d_dgrad, lambda t: dgrad_arguments(problem, t, "bn mask", "add mask"), dtype
        )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_dgrad_of_every_geometry(geometry: Geometry, device: Device) -> None:
    problem = Problem(3, 40, 13, 11, 72, geometry)
    for dtype in dtypes(device):
        compare(device, ops.conv2d_dgrad, conv2d_dgrad, lambda t: dgrad_arguments(problem, t), dtype)


# -------------------------------------------------------------------------------------------------------- errors


X, DY = activation(2, 8, 5, 7, torch.bfloat16), activation(2, 16, 5, 7, torch.bfloat16)
W, V = kernel(16, 8, (3, 3), 1, torch.bfloat16), torch.ones(8)
ONES = [1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.contiguous()}, "x has shape .* " + DENSE),
        ({"weight": W.float()}, "weight has dtype float32, expected bfloat16"),
        ({"weight": W[:, :4]}, r"weight has shape \[16, 4, 3, 3\], which does not convolve 8 channels in 1 groups"),
        ({"weight": W.contiguous()}, "weight has shape .* " + DENSE),
        ({"geometry": ONES[:4]}, r"geometry is \[1, 1, 1, 1\], expected stride, padding and dilation"),
        ({"geometry": [0, *ONES[1:]]}, "expected strides, dilations and groups from 1"),
        ({"geometry": [1, 1, -1, 1, 1, 1, 1]}, "expected paddings from 0"),
        ({"geometry": [1, 1, 0, 0, 3, 3, 1]}, r"x has shape \[2, 8, 5, 7\], smaller than the kernel \[3, 3\]"),
        ({"geometry": [*ONES[:6], 3]}, "which does not convolve 8 channels in 3 groups"),
        ({"scale": None}, "shift is given without scale"),
        ({"scale": torch.ones(16)}, r"scale has shape \[16\], expected \[8\]"),
    ],
)
def test_fprop_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    arguments = {"x": X, "weight": W, "scale": V, "shift": V, "geometry": ONES, "stats": True}
    assert_refused(device, ops.conv2d, arguments, changes, "conv2d: .*" + message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 6}, r"dy has shape \[2, 16, 5, 7\], expected the convolution's output, \[2, 16, 6, 7\]"),
        ({"weight": kernel(24, 8, (3, 3), 1, torch.bfloat16)}, r"weight has shape \[24, 8, 3, 3\]"),
        ({"mask": mask_of(2, 16, 5, 7)}, "mask is given without u"),
        ({"addend": X, "gate_u": X}, "is given without|is given with"),
        ({"addend_mask": mask_of(2, 8, 5, 7)}, "addend_mask is given without addend"),
        ({"gate_u": X}, "gate_u is given without gate_scale"),
    ],
)
def test_dgrad_errors(changes: dict[str, Any], message: str, device: Device) -> None:
    problem = Problem(2, 8, 5, 7, 16, Geometry())
    arguments = dgrad_arguments(problem, torch.bfloat16, "none", "none")
    assert out_shape(problem) == tuple(DY.shape)
    assert_refused(device, ops.conv2d_dgrad, arguments, changes, "conv2d_dgrad: .*" + message)
