"""What nvcc makes of CUDA C++: parameters, calls, divergence, warp and block functions, atomics, fragments."""

from __future__ import annotations

import math
import struct

import ptx
import pytest
import torch
from ptx import compilers


def signed(x: int) -> int:
    """The low 32 bits as a signed number."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


CUDA = r"""
#include <cstdint>
#include <cuda_fp16.h>

struct Params { const float* x; float* y; int n; short scale; double offset; };
extern "C" __global__ void by_value(const Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.y[i] = p.x[i] * p.scale + static_cast<float>(p.offset);
}

__device__ __noinline__ float polynomial(float x, int degree) {
  float sum = 0;
  for (int i = 0; i <= degree; ++i) sum = sum * x + (i + 1);
  if (sum < 0) return -sum;
  return sum;
}
extern "C" __global__ void calls(const float* x, float* y) {
  const int i = threadIdx.x;
  y[i] = i % 3 ? polynomial(x[i], i % 5) : polynomial(x[i] + 1, 2) + polynomial(x[i], 1);
}

__constant__ int table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ int counter;
extern "C" __global__ void variables(int* y) {
  y[threadIdx.x] = table[threadIdx.x % 8];
  if (threadIdx.x == 0) counter += 1, y[threadIdx.x] = counter;
}

extern "C" __global__ void local_memory(const int* x, int* y) {
  int a[16];
  for (int i = 0; i < 16; ++i) a[i] = i * x[0];
  for (int i = 0; i < 16; ++i) a[x[i]] += a[i];
  y[threadIdx.x] = a[threadIdx.x % 16];
}

extern "C" __global__ void loops(int* y) {  // every lane its own number of rounds, with a continue and a break
  int n = threadIdx.x, steps = 0;
  for (int i = 0; i < 1000; ++i) {
    if (n == 1) break;
    ++steps;
    if (n & 1) { n = 3 * n + 1; continue; }
    n /= 2;
    if (n == 0) break;
  }
  y[threadIdx.x] = steps;
}

extern "C" __global__ void switches(const int* x, int* y) {
  int v = x[threadIdx.x], r;
  switch (v) {
    case 0: r = 17; break;
    case 1: r = v * v + 3; break;
    case 2: r = 99 - v;
    case 3: r = v * 5; break;
    case 4: r = -1; break;
    case 5: r = threadIdx.x; break;
    default: r = 1000 + v;
  }
  y[threadIdx.x] = r;
}

extern "C" __global__ void warp_functions(const int* x, int* y) {
  const int lane = threadIdx.x, v = x[lane];
  int* out = y + lane * 12;
  out[0] = __shfl_up_sync(~0u, v, 3);
  out[1] = __shfl_down_sync(~0u, v, 5, 16);
  out[2] = __shfl_xor_sync(~0u, v, 9);
  out[3] = __shfl_sync(~0u, v, lane * 7, 8);
  out[4] = __ballot_sync(~0u, v > 0);
  out[5] = __any_sync(~0u, v == 3) + 2 * __all_sync(~0u, v < 100);
  out[6] = __match_any_sync(~0u, v % 4);
  out[7] = __reduce_add_sync(~0u, v);
  out[8] = __reduce_min_sync(~0u, v);
  int pred;
  out[9] = __match_all_sync(~0u, v, &pred) + pred;
  out[10] = __popc(__activemask());
  out[11] = lane < 20 ? __shfl_xor_sync(0xfffff, v, 1) : 0;
}

extern "C" __global__ void block_votes(const int* x, int* y) {
  const int v = x[threadIdx.x];
  y[threadIdx.x * 3] = __syncthreads_count(v > 0);
  y[threadIdx.x * 3 + 1] = __syncthreads_and(v > -100);
  y[threadIdx.x * 3 + 2] = __syncthreads_or(v > 100);
}

extern "C" __global__ void atomics(const int* x, int* g, float* f, unsigned long long* l) {
  __shared__ int s[4];
  if (threadIdx.x < 4) s[threadIdx.x] = 0;
  __syncthreads();
  const int v = x[threadIdx.x];
  atomicAdd(&s[v & 3], 1);
  atomicMax(g, v), atomicMin(g + 1, v), atomicXor(g + 2, v), atomicOr(g + 3, v), atomicAnd(g + 4, v);
  atomicInc(reinterpret_cast<unsigned*>(g + 5), 9);
  atomicAdd(f, v), atomicAdd(l, static_cast<unsigned long long>(v));
  int old = g[6], seen;  // a maximum by compare and swap
  do seen = old, old = atomicCAS(g + 6, seen, max(seen, v)); while (old != seen);
  __syncthreads();
  if (threadIdx.x < 4) g[8 + threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void double_product(const double* a, const double* b, double* c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  double d0 = 0, d1 = 0;
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d0), "+d"(d1) : "d"(a[g * 4 + t]), "d"(b[g * 4 + t]));
  c[g * 8 + 2 * t] = d0, c[g * 8 + 2 * t + 1] = d1;
}

extern "C" __global__ void half_product(const uint32_t* a, const uint32_t* b, uint32_t* c) {  // f16 accumulators
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t d0 = 0, d1 = 0;
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3}, {%4}, {%0, %1};"
               : "+r"(d0), "+r"(d1) : "r"(a[g * 4 + t]), "r"(a[(g + 8) * 4 + t]), "r"(b[g * 4 + t]));
  c[g * 4 + t] = d0, c[(g + 8) * 4 + t] = d1;
}

extern "C" __global__ void matrices(const uint16_t* x, uint16_t* y, uint16_t* z) {  // transposes four 8x8 matrices
  __shared__ __align__(16) uint16_t tile[32 * 8], back[32 * 8];
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = x[i];
  __syncwarp();
  uint32_t r[4], m;
  const uint32_t from = __cvta_generic_to_shared(tile + threadIdx.x * 8);
  const uint32_t to = __cvta_generic_to_shared(back + threadIdx.x * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
  __syncwarp();
  for (int i = threadIdx.x; i < 256; i += 32) y[i] = back[i];
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(m) : "r"(r[0]));
  reinterpret_cast<uint32_t*>(z)[threadIdx.x] = m;
}
"""


@pytest.fixture(scope="module")
def module():
    return ptx.Module(compilers.nvcc(CUDA, "sm_90"))


def test_struct_by_value(module):
    x, y = torch.randn(200), torch.empty(200)
    params = struct.pack("<QQihxxd", x.data_ptr(), y.data_ptr(), 200, -3, 0.25)
    module.launch("by_value", 2, 128, [params], buffers=[x], outputs=[y])
    torch.testing.assert_close(y, x * -3 + 0.25)
    with pytest.raises(ptx.Fault, match="out-of-bounds"):
        module.launch("by_value", 2, 128, [params], buffers=[x])


def test_calls(module):
    x, y = torch.randn(96), torch.empty(96)
    module.launch("calls", 1, 96, [x, y], outputs=[y])

    def polynomial(v, degree):
        return abs(sum((i + 1) * v ** (degree - i) for i in range(degree + 1)))

    expected = [
        polynomial(v, i % 5) if i % 3 else polynomial(v + 1, 2) + polynomial(v, 1) for i, v in enumerate(x.tolist())
    ]
    torch.testing.assert_close(y, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_module_variables(module):
    y = torch.empty(32, dtype=torch.int32)
    for launches in (1, 2):
        module.launch("variables", 1, 32, [y], outputs=[y])
        assert y.tolist() == [launches, *([3, 1, 4, 1, 5, 9, 2, 6] * 4)[1:]]


def test_local_memory(module):
    x, y = torch.randperm(16).int(), torch.empty(32, dtype=torch.int32)
    a = [i * x[0].item() for i in range(16)]
    for i in range(16):
        a[x[i]] += a[i]
    module.launch("local_memory", 1, 32, [x, y], outputs=[y])
    assert y.tolist() == a * 2


def test_divergent_loops(module):
    y = torch.empty(128, dtype=torch.int32)
    module.launch("loops", 1, 128, [y], outputs=[y])

    def steps(n):
        count = 0
        while n > 1:
            n, count = (3 * n + 1 if n & 1 else n // 2), count + 1
        return count

    assert y.tolist() == [1, *map(steps, range(1, 128))]


def test_switch(module):
    x, y = torch.arange(32, dtype=torch.int32) % 8, torch.empty(32, dtype=torch.int32)
    module.launch("switches", 1, 32, [x, y], outputs=[y])
    assert y.tolist() == [{0: 17, 1: 4, 2: 10, 3: 15, 4: -1, 5: i}.get(i % 8, 1000 + i % 8) for i in range(32)]


def test_warp_functions(module):
    x, y = torch.randint(-50, 50, (32,), dtype=torch.int32), torch.empty(32, 12, dtype=torch.int32)
    module.launch("warp_functions", 1, 32, [x, y], outputs=[y])
    v, lanes = x.tolist(), range(32)

    def mask(chosen):
        return signed(sum(1 << i for i in lanes if chosen(i)))

    def remainder(a):
        return int(math.fmod(a, 4))

    assert y[:, 0].tolist() == [v[i - 3] if i >= 3 else v[i] for i in lanes]
    assert y[:, 1].tolist() == [v[i + 5] if i % 16 + 5 < 16 else v[i] for i in lanes]
    assert y[:, 2].tolist() == [v[i ^ 9] for i in lanes]
    assert y[:, 3].tolist() == [v[i // 8 * 8 + i * 7 % 8] for i in lanes]
    assert y[:, 4].tolist() == [mask(lambda i: v[i] > 0)] * 32
    assert y[:, 5].tolist() == [(3 in v) + 2] * 32
    assert y[:, 6].tolist() == [mask(lambda i, k=k: remainder(v[i]) == remainder(v[k])) for k in lanes]
    assert y[:, 7].tolist() == [sum(v)] * 32
    assert y[:, 8].tolist() == [min(v)] * 32
    assert y[:, 9].tolist() == [0] * 32
    assert y[:, 10].tolist() == [32] * 32
    assert y[:, 11].tolist() == [v[i ^ 1] if i < 20 else 0 for i in lanes]


def test_block_votes(module):
    x, y = torch.randint(-50, 50, (96,), dtype=torch.int32), torch.empty(96, 3, dtype=torch.int32)
    module.launch("block_votes", 1, 96, [x, y], outputs=[y])
    assert y.tolist() == [[int((x > 0).sum()), 1, 0]] * 96


def test_atomics(module):
    x = torch.randint(0, 1000, (128,), dtype=torch.int32)
    g, f, big = torch.zeros(12, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    g[1] = 5000
    g[4] = -1
    module.launch("atomics", 1, 128, [x, g, f, big])
    xor = both = 0
    every = -1
    for v in x.tolist():
        xor, both, every = xor ^ v, both | v, every & v
    counts = [int((x & 3 == i).sum()) for i in range(4)]
    assert g.tolist() == [x.max(), x.min(), xor, both, every, 128 % 10, x.max(), 0, *counts]
    assert f.item() == big.item() == x.sum()


def test_products_and_matrices(module):
    a, b, c = torch.randn(8, 4).double(), torch.randn(8, 4).double(), torch.empty(8, 8).double()
    module.launch("double_product", 1, 32, [a, b, c], outputs=[c])
    torch.testing.assert_close(c, a @ b.T)
    a, b, c = torch.randn(16, 8).half(), torch.randn(8, 8).half(), torch.empty(16, 8).half()
    module.launch("half_product", 1, 32, [a, b, c], outputs=[c])
    torch.testing.assert_close(c, a @ b.T, rtol=2e-3, atol=2e-3)
    x, y, z = (
        torch.arange(256, dtype=torch.int16),
        torch.empty(256, dtype=torch.int16),
        torch.empty(64, dtype=torch.int16),
    )
    module.launch("matrices", 1, 32, [x, y, z], outputs=[y, z])
    assert torch.equal(y.view(4, 8, 8), x.view(4, 8, 8).transpose(1, 2))
    assert torch.equal(z, x[:64])
