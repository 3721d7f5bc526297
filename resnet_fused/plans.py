"""The plans of the CUDA kernels, by ctypes: what would be launched for a problem, or why nothing is.

    p = plan("bn_stats", {"dtype": torch.bfloat16, "M": 50176, "C": 64}, arch=90)
    p.reason, p.workspace, [(s.symbol, s.grid, s.block) for s in p.steps]

The plans are host code: they need neither a GPU nor a CUDA build. `csrc/<op>/<op>.h` has the problems' fields.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_char, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from . import _C

_library = ctypes.CDLL(_C.__file__)
_library.resnet_fused_launch.restype = ctypes.c_char_p
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # DType in csrc/common/dtype.h


def _problem(*, flags: str = "", sizes: str = "M C", buffers: str, tile: bool = False) -> type[ctypes.Structure]:
    """Mirror of a C++ problem: dtype, then int32 flags, then int64 sizes, then pointers, then the wanted tile."""
    fields: list[tuple[str, type]] = [("dtype", c_int32), *((name, c_int32) for name in flags.split())]
    fields += [(name, c_int64) for name in sizes.split()] + [(name, c_void_p) for name in buffers.split()]
    fields += [("tile", c_int32)] * tile
    return type("Problem", (ctypes.Structure,), {"_fields_": fields})


_POOL: dict[str, Any] = {"flags": "kernel stride padding", "sizes": "N H W C"}
_CONV1X1 = "N H W C K stride"
_CONV2D = "N H W C K R S stride_h stride_w padding_h padding_w dilation_h dilation_w groups"
_PADDED = "residual_stride residual_offset residual_H residual_W residual_C"
_BACKWARD = "u mask scale shift mean coef_dz coef_x coef_1"
_PROBLEMS = {
    "bn_stats": _problem(buffers="x mean var workspace"),
    "add_stats": _problem(buffers="x u scale shift y mean var workspace"),
    "bn_act": _problem(
        flags=f"relu y_pitch {_PADDED}", buffers="x scale shift residual residual_scale residual_shift y mask"
    ),
    "relu_mask": _problem(buffers="y mask"),
    "bn_act_backward_reduce": _problem(
        flags="dy_pitch", buffers="dy mask scale shift x mean dz sum_dz sum_dz_xc workspace"
    ),
    "bn_act_backward_apply": _problem(buffers="dy mask scale shift x mean coef_dz coef_x coef_1 addend dx"),
    "gram_operand": _problem(flags="relu", sizes="N H W C stride", buffers="x scale shift center a mean workspace"),
    "conv1x1": _problem(sizes=_CONV1X1, buffers="x scale shift weight out mean var workspace", tile=True),
    "conv1x1_dgrad": _problem(
        flags="addend_stride addend_offset addend_H addend_W addend_C addend_pixels",
        sizes=_CONV1X1,
        buffers=f"dy {_BACKWARD} weight addend addend_mask gate_u gate_scale gate_shift gate_mean dx sum_dz sum_dz_xc "
        "workspace",
        tile=True,
    ),
    "conv1x1_wgrad": _problem(
        flags="wide", sizes=_CONV1X1, buffers=f"dy {_BACKWARD} x x_scale x_shift dw sum_dz workspace", tile=True
    ),
    "conv2d": _problem(sizes=_CONV2D, buffers="x scale shift weight out mean var workspace", tile=True),
    "conv2d_bn_act": _problem(
        flags="relu",
        sizes=_CONV2D,
        buffers="x scale shift weight out_scale out_shift residual y mask",
        tile=True,
    ),
    "conv2d_dgrad": _problem(
        flags="addend_stride addend_offset addend_H addend_W addend_C addend_pixels",
        sizes=_CONV2D,
        buffers=f"dy {_BACKWARD} weight addend addend_mask gate_u gate_scale gate_shift gate_mean dx sum_dz sum_dz_xc "
        "workspace",
        tile=True,
    ),
    "conv2d_wgrad": _problem(sizes=_CONV2D, buffers=f"dy {_BACKWARD} x x_scale x_shift dw workspace", tile=True),
    "gram": _problem(sizes="N H W C stride", buffers="x scale shift center cov mean workspace", tile=True),
    "expand": _problem(
        flags="relu",
        sizes="N H W C K H2 W2 C2 stride",
        buffers="x scale shift weight out_scale out_shift x2 weight2 out_scale2 residual y mask",
        tile=True,
    ),
    "expand_dgrad": _problem(
        sizes=_CONV1X1,
        buffers="dy mask weight x scale shift q constant mean addend addend_mask dx sum_dz sum_dz_xc workspace",
        tile=True,
    ),
    "concat_act": _problem(flags="relu", sizes="M C K", buffers="x u scale shift y mask"),
    "concat_act_backward": _problem(sizes="M C K", buffers="dy mask u mean dz sum_dz sum_dz_xc workspace"),
    "gate_act": _problem(flags="relu", buffers="v x f y mask"),
    "gate_act_backward": _problem(buffers="dy mask v x f dv dx df"),
    "bn_act_pool": _problem(**_POOL, buffers="x scale shift y argmax"),
    "bn_act_pool_backward": _problem(**_POOL, buffers="dy argmax da"),
}
OPS = tuple(_PROBLEMS)


class _Step(ctypes.Structure):
    _fields_ = (
        ("symbol", c_char * 64),
        ("source", c_char * 64),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("smem", c_uint32),
        ("params_size", c_uint32),
        ("params", c_uint64 * 64),  # bytes, 8-byte aligned
    )


class _Plan(ctypes.Structure):
    _fields_ = (("reason", c_char * 160), ("workspace", c_int64), ("count", c_int32), ("steps", _Step * 2))


class Launch(ctypes.Structure):
    """What a launcher gets: symbol (bytes), grid and block (three numbers each), smem, params and params_size."""

    _fields_ = (
        ("symbol", ctypes.c_char_p),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("smem", c_uint32),
        ("params", c_void_p),
        ("params_size", c_size_t),
    )


@dataclass(frozen=True)
class Step:
    """One kernel launch. `params` is the kernel's only argument, by value."""

    symbol: str
    source: str  # file in csrc/
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem: int
    params: bytes


@dataclass(frozen=True)
class Plan:
    """The launches for a problem, in order; `reason` says why there are none, and is empty where there are."""

    reason: str
    workspace: int  # float32 elements
    steps: tuple[Step, ...]


def plan(
    op: str,
    problem: Mapping[str, int | torch.dtype],
    arch: int = 80,
    buffers: Mapping[str, int] | None = None,
) -> Plan:
    """Plans `op` for a compute capability times ten.

    problem: dtype, flags and sizes by name, as in the op's problem struct. buffers: addresses by name; one that is
    absent is a null pointer, which for an optional operand means that it is not there. Raises KeyError for an op
    or a name that does not exist.
    """
    kind = _PROBLEMS[op]
    given = {**problem, **(buffers or {})}
    if unknown := given.keys() - {field[0] for field in kind._fields_}:
        raise KeyError(f"{op} has no {', '.join(sorted(unknown))}")
    values = {name: _DTYPES[v] if isinstance(v, torch.dtype) else int(v) for name, v in given.items()}
    result = _Plan()
    _library[f"resnet_fused_plan_{op}"](ctypes.byref(kind(**values)), arch, ctypes.byref(result))
    if result.reason:
        return Plan(result.reason.decode(), 0, ())
    return Plan("", result.workspace, tuple(_step(result.steps[i]) for i in range(result.count)))


def _step(step: _Step) -> Step:
    grid, block = step.grid, step.block
    return Step(
        symbol=step.symbol.decode(),
        source=step.source.decode(),
        grid=(grid[0], grid[1], grid[2]),
        block=(block[0], block[1], block[2]),
        smem=step.smem,
        params=bytes(step.params)[: step.params_size],
    )


def run(steps: Iterable[Step], device: int | None) -> None:
    """Launches the steps on the current stream of a GPU; None: on what takes CUDA's place, within `launcher`.

    Nothing is checked: the addresses that were planned for must hold what the problem says. Raises RuntimeError with
    the kernel's name if a launch fails.
    """
    for step in steps:
        params = ctypes.create_string_buffer(step.params, len(step.params))
        launch = Launch(
            step.symbol.encode(), step.grid, step.block, step.smem, ctypes.addressof(params), len(step.params)
        )
        message = _library.resnet_fused_launch(ctypes.byref(launch), -1 if device is None else device)
        if message:
            raise RuntimeError(message.decode())


def has_cuda() -> bool:
    """Whether the extension was built with the CUDA kernels."""
    return bool(_library.resnet_fused_has_cuda())


@contextmanager
def wanted_tile(tile: int) -> Iterator[None]:
    """Within the block this thread's ops launch kernels with the tile of this number; 0: with their own choice.

    They raise RuntimeError where it does not exist or does not serve.
    """
    _library.resnet_fused_want_tile(tile)
    try:
        yield
    finally:
        _library.resnet_fused_want_tile(0)


_replaced = False


def launcher_replaced() -> bool:
    """Whether kernels run elsewhere than on a GPU: within `launcher`."""
    return _replaced


@contextmanager
def launcher(launch: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block every kernel launch, of ops on CPU tensors too, goes to `launch` instead of CUDA.

    What `launch` raises is raised by the block.
    """
    raised: list[BaseException] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch), c_void_p)
    def callback(launch_pointer: ctypes._Pointer[Launch], _stream: int | None) -> int:
        try:
            launch(launch_pointer.contents)
        except BaseException as error:
            raised.append(error)
            return 1
        return 0

    global _replaced
    _library.resnet_fused_set_launcher(callback)
    _replaced = True
    try:
        yield
    except RuntimeError:
        if raised:
            raise raised[0] from None
        raise
    finally:
        _library.resnet_fused_set_launcher(None)
        _replaced = False
