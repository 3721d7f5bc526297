"""Batch norms over the batches of a group of processes, as torch.nn.SyncBatchNorm: what travels, and what comes of it.

    forward     mean_i, var_i [K] and n_i, the number of pixels, of every process's batch, combined by Chan's formula
                M = sum n_i    mean = sum n_i mean_i / M    var = sum n_i (var_i + (mean_i - mean)^2) / M
    backward    the sums over pixels of dz and of dz (u - mean) [K], and n_i again, added up

That is one collective a norm and direction, of 2K + 1 numbers; a block's last unit and its projection share the one of
forward. (In backward the projection's sums come when the chain is done: earlier, its raw output would have to wait for
that.) The gradients of gamma and beta stay each process's own, as in PyTorch: who averages gradients averages those.

A unit in the Gram form sends the mean and variance of its output, which follow from its own operand's Gram matrix; the
matrix itself, of C x C numbers, stays at home. So every plan sends the same, and processes may run by different ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

# What torch.compile traces. Else torch.distributed's own functions run: TORCH_DISTRIBUTED_DEBUG=DETAIL checks those.
_traced = torch.ops._c10d_functional
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


class Group(NamedTuple):
    """Two processes or more, of which this is one."""

    name: str
    size: int

    @classmethod
    def of(cls, group: Any) -> Group | None:
        """That of a ProcessGroup or None; None where there is nobody else in it, or this process is not."""
        if group is None or group is dist.GroupMember.NON_GROUP_MEMBER:
            return None
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group is a {type(group).__name__}, expected a torch.distributed.ProcessGroup or None")
        if group.size() < 2:
            return None
        return cls(group.group_name, group.size())

    @classmethod
    def named(cls, name: str) -> Group | None:
        """That of a ProcessGroup's name; None for ""."""
        return cls.of(_process_group(name)) if name else None

    def gather(self, t: Tensor) -> Tensor:
        """Everybody's t [L]: [size, L]."""
        if torch.compiler.is_compiling():
            return _traced.wait_tensor(_traced.all_gather_into_tensor(t, self.size, self.name)).view(self.size, -1)
        everyone = t.new_empty(self.size * t.numel())
        _all_gather(everyone, t, group=_process_group(self.name))
        return everyone.view(self.size, -1)

    def sum(self, t: Tensor) -> Tensor:
        """Everybody's t added up; it may be written over t."""
        if torch.compiler.is_compiling():
            return _traced.wait_tensor(_traced.all_reduce(t, "sum", self.name))
        dist.all_reduce(t, group=_process_group(self.name))
        return t


def _process_group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(cast(Any, name))


def name_of(group: Group | None) -> str:
    """As `Group.named` takes it."""
    return "" if group is None else group.name


def names_of(groups: Iterable[Group | None]) -> str:
    """As `groups_named` takes them: one string, since torch.jit.trace takes no list of them."""
    return ",".join(map(name_of, groups))


def groups_named(names: str) -> tuple[Group | None, ...]:
    return tuple(map(Group.named, names.split(",")))


def agreed(stats: tuple[Tensor, ...], pixels: int, group: Group | None) -> tuple[Tensor, ...]:
    """`combined` of one norm."""
    return combined([stats], pixels, [group])[0]


def combined(
    stats: Sequence[tuple[Tensor, ...]], pixels: int, groups: Sequence[Group | None]
) -> list[tuple[Tensor, ...]]:
    """Statistics of norms over the same pixels, as they normalise with: those of this process, (mean, var) [K] or (),
    or where there is a group (mean, var, count [1]) of all of its processes'."""
    out = list(stats)
    for group in dict.fromkeys(groups):
        if group is not None:
            members = [i for i, own in enumerate(groups) if own == group]
            for i, own in zip(members, _chan([stats[i] for i in members], pixels, group), strict=True):
                out[i] = own
    return out


def _chan(stats: Sequence[tuple[Tensor, ...]], pixels: int, group: Group) -> list[tuple[Tensor, ...]]:
    means, variances = zip(*stats, strict=True)
    acc, sizes = means[0], [mean.numel() for mean in means]
    message = torch.cat([*means, *variances, acc.new_full((1,), pixels)])
    message = message if pixels else torch.zeros_like(message)
    mean, var, count = group.gather(message).double().split([sum(sizes), sum(sizes), 1], 1)  # [size, ...]
    total = count.sum(0)
    share = count / total
    overall = (share * mean).sum(0)
    spread = (share * (var + (mean - overall).square())).sum(0)
    parts = zip(overall.split(sizes), spread.split(sizes), strict=True)
    # Copies: an op's outputs must not share memory.
    return [tuple(t.to(acc.dtype, copy=True) for t in (m, v, total)) for m, v in parts]


class Sums(NamedTuple):
    """What a batch norm's backward needs of a whole batch: sums over its pixels, [K], and how many there are."""

    dz: Tensor
    dzx: Tensor  # of dz (u - mean)
    pixels: int | Tensor


def summed(dz: Tensor, dzx: Tensor, pixels: int, group: Group | None) -> Sums:
    """From the sums over this process's pixels."""
    if group is None:
        return Sums(dz, dzx, pixels)
    message = torch.cat([dz, dzx, dz.new_full((1,), pixels)])
    return Sums(*group.sum(message).split([dz.numel(), dzx.numel(), 1]))


class SumOverGroup(torch.autograd.Function):
    """`Group.sum` with a derivative: the loss of all processes is the sum of theirs."""

    @staticmethod
    def forward(ctx, t: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.sum(t.clone())

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(dy.clone(memory_format=torch.contiguous_format)), None
