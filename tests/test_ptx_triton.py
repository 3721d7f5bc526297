"""The emulator against a compiler that is known to be right on hardware: Triton's kernels must give torch's results."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx import compilers

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def cc(request):
    return request.param


def launch(kernel, grid, args, outputs, seed=0, **options):
    """Runs a compiled Triton kernel; the scratch pointers that it appends to the parameters stay null."""
    for output in outputs:
        ptx.poison_(output)
    return ptx.Module(kernel.asm["ptx"]).launch(
        kernel.metadata.name,
        grid,
        32 * kernel.metadata.num_warps,
        args,
        smem=kernel.metadata.shared,
        outputs=outputs,
        seed=seed,
        **options,
    )


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n) + tl.load(y + i, i < n), i < n)


TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TYPES |= {"fp64": torch.float64, "i64": torch.int64, "i8": torch.int8}


@pytest.mark.parametrize("n", [1, 31, 1024, 4099])
@pytest.mark.parametrize("name", TYPES)
def test_vector_add(cc, n, name):
    dtype = TYPES[name]
    if dtype.is_floating_point:
        x, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    else:
        x, y = torch.randint(-100, 100, (2, n)).to(dtype)
    out = torch.empty_like(x)
    kernel = compilers.triton(
        add_kernel, {"x": f"*{name}", "y": f"*{name}", "out": f"*{name}", "n": "i32"}, {"BLOCK": 512}, cc
    )
    launch(kernel, -(-n // 512), [x, y, out, n], [out])
    torch.testing.assert_close(out, x + y, rtol=0, atol=0)


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, i < n, -float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row * n + i, e / tl.sum(e, 0), i < n)


@pytest.mark.parametrize("n", [3, 100, 777])
def test_softmax(cc, n):
    x = torch.randn(5, n) * 4
    out = torch.empty_like(x)
    kernel = compilers.triton(softmax_kernel, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 1024}, cc)
    for seed in ptx.seeds(3):
        launch(kernel, 5, [x, out, n], [out], seed)
        torch.testing.assert_close(out, torch.softmax(x, 1), rtol=1e-5, atol=1e-7)


@triton.jit
def layer_norm_kernel(x, weight, bias, out, mean_out, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, i < n, 0.0).to(tl.float32)
    mean = tl.sum(v, 0) / n
    d = tl.where(i < n, v - mean, 0.0)
    r = tl.rsqrt(tl.sum(d * d, 0) / n + eps)
    y = d * r * tl.load(weight + i, i < n) + tl.load(bias + i, i < n)
    tl.store(out + row * n + i, y, i < n)
    tl.store(mean_out + row, mean)


@pytest.mark.parametrize("n", [17, 384])
def test_layer_norm(cc, n):
    x, weight, bias = torch.randn(6, n).half(), torch.randn(n), torch.randn(n)
    out, mean = torch.empty(6, n), torch.empty(6)
    signature = {
        "x": "*fp16",
        "weight": "*fp32",
        "bias": "*fp32",
        "out": "*fp32",
        "mean_out": "*fp32",
        "n": "i32",
        "eps": "fp32",
    }
    kernel = compilers.triton(layer_norm_kernel, signature, {"BLOCK": 512}, cc, num_warps=8)
    launch(kernel, 6, [x, weight, bias, out, mean, n, 1e-5], [out, mean])
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x.float(), (n,), weight, bias), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, x.float().mean(1), rtol=1e-5, atol=1e-6)


@triton.jit
def reductions_kernel(x, total, largest, where, scan, order, n, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    v = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(total + c, tl.sum(v, 0))
    tl.store(largest + r, tl.max(v, 1))
    tl.store(where + r, tl.argmax(v, 1))
    tl.store(scan + r[:, None] * C + c[None, :], tl.cumsum(v, 0))
    tl.store(order + r[:, None] * C + c[None, :], tl.sort(v))


@pytest.mark.parametrize("warps", [1, 4])
def test_reductions_scans_and_sort(cc, warps):
    rows, columns = 32, 16
    x = torch.randn(rows, columns)
    outs = [
        torch.empty(columns),
        torch.empty(rows),
        torch.empty(rows, dtype=torch.int32),
        torch.empty_like(x),
        torch.empty_like(x),
    ]
    names = ["total", "largest", "where", "scan", "order"]
    signature = {"x": "*fp32", "n": "i32", **dict.fromkeys(names, "*fp32"), "where": "*i32"}
    kernel = compilers.triton(reductions_kernel, signature, {"R": rows, "C": columns}, cc, num_warps=warps)
    launch(kernel, 1, [x, *outs, 0], outs)
    torch.testing.assert_close(outs[0], x.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(outs[1], x.amax(1))
    assert torch.equal(outs[2], x.argmax(1).int())
    torch.testing.assert_close(outs[3], x.cumsum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(outs[4], x.sort(1).values)


@triton.jit
def histogram_kernel(x, counts, sums, largest, halves, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, i < n, 0)
    tl.atomic_add(counts + v, 1, i < n)
    tl.atomic_add(sums + v, v.to(tl.float32), i < n)
    tl.atomic_max(largest + v * 0, v, i < n)
    tl.atomic_add(halves + v, 1.0, i < n)


def test_atomics(cc):
    n = 1000
    x = torch.randint(0, 10, (n,), dtype=torch.int32)
    counts, sums = torch.zeros(10, dtype=torch.int32), torch.zeros(10)
    largest, halves = torch.zeros(1, dtype=torch.int32), torch.zeros(10, dtype=torch.float16)
    signature = {"x": "*i32", "counts": "*i32", "sums": "*fp32", "largest": "*i32", "halves": "*fp16", "n": "i32"}
    kernel = compilers.triton(histogram_kernel, signature, {"BLOCK": 256}, cc)
    launch(kernel, -(-n // 256), [x, counts, sums, largest, halves, n], [])
    expected = torch.bincount(x, minlength=10)
    assert torch.equal(counts, expected.int())
    assert torch.equal(sums, (expected * torch.arange(10)).float())
    assert largest.item() == x.max()
    assert torch.equal(halves, expected.half())


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    pa = a + m[:, None] * K + k[None, :]
    pb = b + n[None, :] * K + k[:, None]
    acc = tl.zeros((BM, BN), TYPE)
    for i in tl.range(0, K, BK, num_stages=STAGES):
        x = tl.load(pa + i, (m[:, None] < M) & (k[None, :] + i < K), 0)
        y = tl.load(pb + i, (n[None, :] < N) & (k[:, None] + i < K), 0)
        acc = tl.dot(x, y, acc, out_dtype=TYPE)
    tl.store(c + m[:, None] * N + n[None, :], acc, (m[:, None] < M) & (n[None, :] < N))


MATMULS = [
    # type, block of m, n, k, stages, what a GPU of each kind must use
    ("fp16", 64, 64, 32, 2),
    ("fp16", 128, 64, 64, 3),
    ("fp16", 64, 128, 32, 4),
    ("bf16", 128, 128, 32, 3),
    ("bf16", 64, 32, 64, 4),
    ("fp32", 64, 64, 32, 2),
    ("fp32", 64, 64, 32, 4),
    ("int8", 64, 64, 64, 3),
]


@pytest.mark.parametrize(("name", "bm", "bn", "bk", "stages"), MATMULS)
@pytest.mark.parametrize(("m", "n", "k"), [(100, 77, 144), (65, 128, 80)])
def test_matmul(cc, name, bm, bn, bk, stages, m, n, k):
    if name == "int8":
        a, b = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randint(-128, 128, (n, k), dtype=torch.int8)
        c, kind, accumulator = torch.empty(m, n, dtype=torch.int32), "i", tl.int32
        expected = a.int() @ b.int().T
    else:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        c, kind, accumulator = torch.empty(m, n), "fp", tl.float32
        if name == "fp32":  # the tensor core does not look at the low 13 bits of a tf32 factor
            expected = (a.view(torch.int32) & -8192).view(torch.float32).double() @ (b.view(torch.int32) & -8192).view(
                torch.float32
            ).double().T
        else:
            expected = a.double() @ b.double().T
    pointer = {"int8": "*i8"}.get(name, f"*{name}")
    signature = {"a": pointer, "b": pointer, "c": f"*{kind}32", "M": "i32", "N": "i32", "K": "i32"}
    constants = {"TYPE": accumulator, "BM": bm, "BN": bn, "BK": bk, "STAGES": stages}
    kernel = compilers.triton(matmul_kernel, signature, constants, cc, divisible=("a", "b", "c", "K"))
    text = kernel.asm["ptx"]
    assert "cp.async.cg" in text
    assert "mma.sync" in text if cc == 80 else "wgmma.mma_async" in text
    stats = launch(kernel, (-(-m // bm), -(-n // bn)), [a, b, c, m, n, k], [c], seed=stages)
    if name == "int8":
        assert torch.equal(c, expected)
    else:
        assert (c.double() - expected).abs().max() < 2e-5 * k**0.5
    assert stats.flops == 2 * bm * bn * bk * -(-m // bm) * -(-n // bn) * -(-k // bk)


@triton.jit
def gated_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    tl.assume(K > 0)
    for i in tl.range(0, K, BK, num_stages=3):
        x = tl.load(a + m[:, None] * K + k[None, :] + i)
        x = tl.maximum(x.to(tl.float32) * 2 - 1, 0).to(x.dtype)  # a prologue: A goes to the tensor core from registers
        acc = tl.dot(x, tl.load(b + (k[:, None] + i) * BN + n[None, :]), acc)
    tl.store(c + m[:, None] * BN + n[None, :], acc.to(c.dtype.element_ty))


@pytest.mark.parametrize("warps", [4, 8])
def test_matmul_with_a_prologue(cc, warps):
    bm, bn, k = 128, 64, 192
    a, b, c = torch.randn(bm, k).bfloat16(), torch.randn(k, bn).bfloat16(), torch.empty(bm, bn, dtype=torch.bfloat16)
    signature = {"a": "*bf16", "b": "*bf16", "c": "*bf16", "K": "i32"}
    constants = {"BM": bm, "BN": bn, "BK": 64}
    kernel = compilers.triton(gated_kernel, signature, constants, cc, divisible=("a", "b", "c", "K"), num_warps=warps)
    expected = (a.float() * 2 - 1).relu().bfloat16().double() @ b.double()
    for seed in ptx.seeds(2):
        launch(kernel, 1, [a, b, c, k], [c], seed)
        assert (c.double() - expected).norm() < 3e-3 * expected.norm()


@triton.jit
def strided_matmul_kernel(a, b, c, K, A_M: tl.constexpr, A_K: tl.constexpr, B_K: tl.constexpr, B_N: tl.constexpr,
                          BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, K, BK, num_stages=3):
        x = tl.load(a + m[:, None] * A_M + (k[None, :] + i) * A_K)
        y = tl.load(b + (k[:, None] + i) * B_K + n[None, :] * B_N)
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * BN + n[None, :], acc)


@pytest.mark.parametrize("bk", [16, 32, 64])  # sm_90: swizzles of 32, 64 and 128 bytes
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_matmul_of_transposed_operands(cc, bk, a_transposed, b_transposed):
    bm, bn, k = 64, 32, 128
    a, b, c = torch.randn(bm, k).half(), torch.randn(k, bn).half(), torch.empty(bm, bn)
    expected = a.double() @ b.double()
    a = a.T.contiguous().T if a_transposed else a
    b = b.T.contiguous().T if b_transposed else b
    constants = {"BM": bm, "BN": bn, "BK": bk, "A_M": a.stride(0), "A_K": a.stride(1)}
    constants |= {"B_K": b.stride(0), "B_N": b.stride(1)}
    signature = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "K": "i32"}
    kernel = compilers.triton(strided_matmul_kernel, signature, constants, cc, divisible=("a", "b", "c", "K"))
    assert ("wgmma.mma_async" if cc == 90 else "mma.sync") in kernel.asm["ptx"]
    for seed in ptx.seeds(2):
        launch(kernel, 1, [a, b, c, k], [c], seed)
        assert (c.double() - expected).abs().max() < 1e-4
