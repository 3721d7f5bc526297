"""cuDNN's own fusion of a unit, by its frontend's graphs: relu(scale*x + shift), convolution, statistics of the output.

The pattern is "scale, bias, ReLU, convolution, generate statistics" of
https://docs.nvidia.com/deeplearning/cudnn/latest/developer/graph-api.html; sums come out in place of mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import ConvShape
from benchmarks.variants import UnavailableError, installed


class ConvStats:
    """A variant of a unit's forward, built for its tensors first."""

    def prepare(self, x: Tensor, weight: Tensor, vectors: Any, conv: ConvShape) -> Callable[..., Any]:
        """(x, weight, vectors, conv) -> (out, sum, sum of squares). Raises UnavailableError."""
        if not x.is_cuda:
            raise UnavailableError("cuDNN's graphs run on a GPU only")
        cudnn = installed("cudnn", "nvidia-cudnn-frontend")
        handle = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph, ends = unit_graph(cudnn, x, weight, vectors, conv, handle)
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
        except cudnn.cudnnGraphNotSupportedError as error:
            raise UnavailableError(f"cuDNN has no kernel for this graph: {str(error).splitlines()[0]}") from None
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=x.device)
        n, k, size = len(x), conv.filters, conv.output.size
        out = torch.empty(n, k, size, size, dtype=x.dtype, device=x.device).to(memory_format=torch.channels_last)
        sums = [torch.empty(1, k, 1, 1, device=x.device) for _ in range(2)]

        given = dict(zip(ends, [x, *as_operands(x, vectors), weight, out, *sums], strict=True))

        def call(*_: Any):
            graph.execute(given, workspace, handle=handle)
            return out, *sums

        return call


def as_operands(x: Tensor, vectors: Any) -> list[Tensor]:
    """Scale and shift [1, C, 1, 1] in the operand's type, in which the fused prologue takes them."""
    return [] if vectors is None else [v.to(x.dtype).view(1, -1, 1, 1) for v in vectors[:2]]


def unit_graph(
    cudnn: Any, x: Tensor, weight: Tensor, vectors: Any, conv: ConvShape, handle: Any = None
) -> tuple[Any, list[Any]]:
    """The graph, not yet built, and its tensors: x (scale, shift) weight, out, sum, sum of squares."""
    types = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}
    single = cudnn.data_type.FLOAT
    io = types.get(x.dtype, single)
    graph = cudnn.pygraph(handle=handle, io_data_type=io, intermediate_data_type=single, compute_data_type=single)

    def tensor(t: Tensor) -> Any:
        return graph.tensor(dim=list(t.shape), stride=list(t.stride()), data_type=io)

    image, affine, filters = tensor(x), [tensor(t) for t in as_operands(x, vectors)], tensor(weight)
    operand = image
    if affine:
        operand = graph.relu(input=graph.bias(input=graph.scale(input=image, scale=affine[0]), bias=affine[1]))
    stride, padding = [conv.stride] * 2, [conv.padding] * 2
    out = graph.conv_fprop(image=operand, weight=filters, padding=padding, stride=stride, dilation=[1, 1])
    sums = graph.genstats(input=out)
    size, k = conv.output.size, conv.filters
    out.set_output(True).set_data_type(io).set_dim([len(x), k, size, size])
    out.set_stride([k * size * size, 1, k * size, k])
    for s in sums:
        s.set_output(True).set_data_type(single).set_dim([1, k, 1, 1]).set_stride([k, 1, k, k])
    return graph, [image, *affine, filters, out, *sums]
