"""Reading nn.Conv2d and nn.BatchNorm2d modules into `ConvBN` units, and why some must stay as they are."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules import module as nn_module

from .functional import ConvBN

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_GLOBAL_HOOKS = tuple("_global" + name for name in _HOOKS)


def is_frozen_norm(bn: nn.Module) -> bool:
    """torchvision's FrozenBatchNorm2d: buffers only, always given statistics. (torchvision is optional.)"""
    return type(bn).__name__ == "FrozenBatchNorm2d" and type(bn).__module__.startswith("torchvision.")


def group_of(bn: nn.Module) -> Any:
    """The ProcessGroup whose batches an nn.SyncBatchNorm normalises as one, as its own forward chooses it; None where
    that is this process alone."""
    if type(bn) is not nn.SyncBatchNorm or not (bn.training and dist.is_available() and dist.is_initialized()):
        return None
    return bn.process_group or dist.group.WORLD


def takes_batch_stats(bn: Any) -> bool:
    """Whether a norm, as its modes are now, normalises with the batch's statistics."""
    return not is_frozen_norm(bn) and (bn.training or bn.running_mean is None)


def hook_reason(name: str, module: nn.Module) -> str | None:
    """Whether somebody watches or changes what goes through `module`."""
    for attribute in _HOOKS:
        if getattr(module, attribute, None):
            return f"{name} has a {attribute.strip('_').replace('_', ' ').removesuffix('s')}"
    return f"{name}.forward is replaced" if "forward" in vars(module) else None


def global_hook_reason() -> str | None:
    if any(getattr(nn_module, attribute, None) for attribute in _GLOBAL_HOOKS):
        return "a global module hook is registered"
    return None


def conv_reason(name: str, conv: Any) -> str | None:
    """Why the fused path cannot stand in for this convolution module."""
    if type(conv) is not nn.Conv2d:
        return f"{name} is a {type(conv).__name__}"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"{name} has padding_mode={conv.padding_mode!r}, padding={conv.padding!r}"
    return hook_reason(name, conv)


def norm_reason(name: str, bn: Any) -> str | None:
    """Why the fused path cannot stand in for this norm module."""
    if type(bn) not in (*BATCH_NORMS, nn.Identity) and not is_frozen_norm(bn):
        return f"{name} is a {type(bn).__name__}"
    return hook_reason(name, bn)


def relu_reason(name: str, act: Any) -> str | None:
    if type(act) is not nn.ReLU:
        return f"{name} is a {type(act).__name__}"
    return hook_reason(name, act)


def pool_reason(name: str, pool: Any) -> str | None:
    """Why the fused stem cannot stand in for this max pool."""
    if type(pool) is not nn.MaxPool2d:
        return f"{name} is a {type(pool).__name__}"
    sizes: tuple[Any, ...] = (pool.kernel_size, pool.stride, pool.padding)
    if not all(isinstance(size, int) for size in sizes) or sizes[0] > 11:
        return f"{name} has kernel, stride, padding {sizes}, served are squares up to 11"
    if pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        return f"{name} has dilation, ceil_mode or return_indices"
    return hook_reason(name, pool)


def convbn_of(conv: nn.Conv2d, bn: Any) -> ConvBN:
    """The unit of a convolution and its norm."""
    where: dict[str, Any] = {
        "weight": conv.weight,
        "bias": conv.bias,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }
    if isinstance(bn, nn.Identity):
        return ConvBN(**where, has_norm=False, training=False)
    frozen = is_frozen_norm(bn)
    rests = not frozen and bn.training and not bn.track_running_stats  # its buffers serve only in eval mode
    return ConvBN(
        **where,
        gamma=bn.weight,
        beta=bn.bias,
        running_mean=None if rests else bn.running_mean,
        running_var=None if rests else bn.running_var,
        num_batches_tracked=None if frozen else bn.num_batches_tracked,
        training=not frozen and bn.training,
        momentum=None if frozen else bn.momentum,
        eps=bn.eps,
        group=group_of(bn),
    )


class NotScripted:
    """Mixin of modules whose forward TorchScript cannot compile."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script does not take a {type(self).__name__}: use torch.jit.trace, torch.export or "
            "torch.compile, or script the unfused model"
        )


def traced_as_leaf(module: nn.Module, *args: Any) -> Any:
    """The call of `module` on torch.fx proxies as one node, as for a leaf module."""
    tracer: Any = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
