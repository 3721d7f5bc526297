"""What the kernels of the tails share: an activation [N, C, H, W] in NHWC as a matrix [M, C], cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.pointwise import Checks

PROGRAMS = 1024  # of a kernel that sums over rows: eight blocks of eight warps for each multiprocessor of a large GPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def checked(op: str, name: str, x: Tensor) -> Checks:
    """The checks of a call, of which x is the first activation."""
    return Checks(op, name, x, DTYPES)


def check_rows(check: Checks, M: int) -> None:
    """Of kernels that find a row's pixel, which is a division in 32 bits."""
    check.require(M < 2**31, f"there are {M} pixels, expected fewer than 2^31")


def require_rows(check: Checks, name: str, x: Tensor) -> None:
    """Of what takes a mean."""
    check.require(matrix(x)[0] > 0, f"{name} has shape {list(x.shape)}, expected at least one value per channel")


def pointwise_checks(op: str, relu: bool, save_mask: bool, **activations: Tensor) -> Checks:
    """Those of a call of activations of one shape, which may end in a ReLU with its mask."""
    (first, x), *others = activations.items()
    check = checked(op, first, x)
    for name, t in others:
        check.activation(name, t, x.shape)
    check_mask_wanted(check, relu, save_mask)
    return check


def check_mask_wanted(check: Checks, relu: bool, save_mask: bool) -> None:
    check.require(
        relu or not save_mask, "save_mask is True and relu is False, expected relu=True: only a relu has a mask"
    )


# -------------------------------------------------------------------------------------------------- on the host


@dataclass(frozen=True)
class Tiles:
    """How a matrix [M, C] is cut: into tiles of `rows` x `channels`, and for sums into chunks of `chunk` rows."""

    M: int
    C: int
    width: int  # neighbouring channels that are accessed at once: each row begins at a multiple of it
    rows: int
    channels: int
    num_warps: int
    chunk: int = 0  # a multiple of `rows`

    @property
    def chunks(self) -> int:
        return -(-self.M // self.chunk)

    @property
    def grid(self) -> tuple[int]:
        """A program for each tile or, with chunks, for each of those and tile's width of channels."""
        down = -(-self.M // (self.chunk or self.rows))
        return (down * -(-self.C // self.channels),)

    @property
    def constexprs(self) -> dict[str, Any]:
        return {"WIDTH": self.width, "ROWS": self.rows, "CHANNELS": self.channels}


def tiles(M: int, C: int, *activations: Tensor | None, elements: int = 2048, offset: int = 0) -> Tiles:
    """Tiles of so many elements for a kernel of which `activations` are the operands, one from channel `offset` on.

    16 elements a thread, or eight where each is an access of its own: with more of those ptxas spills.
    """
    given = [t for t in activations if t is not None]
    access = 16 // given[0].element_size()
    width = 1 if any(t.shape[1] % access for t in given) or offset % access else access
    channels = min(max(triton.next_power_of_2(C), 32), 128)
    rows = elements // channels // (2 if width == 1 else 1)
    return Tiles(M, C, width, rows, channels, elements // (32 * 16))


def chunked(M: int, C: int, *activations: Tensor | None) -> Tiles:
    """For sums over rows: about so many programs, and at most that many partial sums, whatever the GPU."""
    by = tiles(M, C, *activations, elements=4096)
    wanted = max(PROGRAMS // -(-C // by.channels), 1)
    chunk = max(-(-M // (wanted * by.rows)), 1) * by.rows
    return replace(by, chunk=chunk)


def matrix(x: Tensor) -> tuple[int, int]:
    """M and C of an activation [N, C, H, W]."""
    n, c, h, w = x.shape
    return n * h * w, c


# ------------------------------------------------------------------------------------------------- in a kernel


@triton.jit
def whole(C, WIDTH: tl.constexpr):
    """C, which is a multiple of WIDTH: of itself Triton looks for multiples of 16 only."""
    return C // WIDTH * WIDTH


@triton.jit
def place(C, rows, CHANNELS: tl.constexpr):
    """(first row, first channel) of this program; those for all channels of the same `rows` are neighbours."""
    across = tl.cdiv(C, CHANNELS)
    program = tl.program_id(0)
    return (program // across).to(tl.int64) * rows, program % across * CHANNELS


@triton.jit
def inside(first, end, c, C, ROWS: tl.constexpr):
    """Which elements of the tile from row `first` lie before row `end`, and how many of its rows do."""
    left = tl.minimum(end - first, ROWS).to(tl.int32)
    return (tl.arange(0, ROWS) < left)[:, None] & (c < C)[None, :], left


@triton.jit
def offsets(c, C, ROWS: tl.constexpr):
    """[ROWS, CHANNELS], from the begin of a tile's first row."""
    return tl.arange(0, ROWS)[:, None] * C + c[None, :]


@triton.jit
def vector(v, c, C):
    """[1, CHANNELS] of a vector [C]."""
    return tl.load(v + c, c < C, other=0.0)[None, :]


@triton.jit
def affine(x, scale, shift, c, C):
    return vector(scale, c, C) * x + vector(shift, c, C)


@triton.jit
def relu(z):
    """A NaN passes, as in PyTorch."""
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def strided_rows(first, H, W, STRIDE: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS] of x [N*H*W, C] that a tile of every STRIDE-th pixel reads, from its row `first` below 2^31."""
    m = first.to(tl.int32) + tl.arange(0, ROWS)
    across, down = tl.cdiv(W, STRIDE), tl.cdiv(H, STRIDE)
    line = m // across
    return (line // down * H + line % down * STRIDE).to(tl.int64) * W + m % across * STRIDE


@triton.jit
def words(mask, first, left, c0, C, M, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointers [ROWS, CHANNELS / 32] to a tile's words in bit panels [ceil(C/32), M], and which of them there are."""
    panel = c0 // 32 + tl.arange(0, CHANNELS // 32)
    row = tl.arange(0, ROWS)[:, None]
    return mask + first + panel[None, :].to(tl.int64) * M + row, (row < left) & (panel * 32 < C)[None, :]


@triton.jit
def store_mask(mask, passed, first, left, c0, C, M, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """passed [ROWS, CHANNELS]: bit c % 32 of word [c / 32][m]; beyond C it must be False."""
    bits = tl.reshape(passed.to(tl.int32), (ROWS, CHANNELS // 32, 32)) << tl.arange(0, 32)[None, None, :]
    at, there = words(mask, first, left, c0, C, M, ROWS, CHANNELS)
    tl.store(at, tl.sum(bits, 2), there)


@triton.jit
def load_mask(mask, first, left, c0, C, M, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """[ROWS, CHANNELS] booleans; beyond the matrix they are False."""
    at, there = words(mask, first, left, c0, C, M, ROWS, CHANNELS)
    bits = tl.load(at, there, other=0)[:, :, None] >> tl.arange(0, 32)[None, None, :] & 1
    return tl.reshape(bits, (ROWS, CHANNELS)) != 0
