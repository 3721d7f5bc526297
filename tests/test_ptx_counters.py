"""The counters of the emulator against kernels that can be counted by hand."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx import compilers

SOURCE = r"""
#include <cstdint>
template <class T>
__device__ void copy(const T* x, T* y, int n, int stride) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i * stride];
}
extern "C" __global__ void copy_floats(const float* x, float* y, int n, int stride) { copy(x, y, n, stride); }
extern "C" __global__ void copy_vectors(const float4* x, float4* y, int n, int stride) { copy(x, y, n, stride); }
extern "C" __global__ void broadcast(const float* x, float* y) { y[threadIdx.x] = x[0]; }
extern "C" __global__ void read_twice(const volatile float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x];
}

extern "C" __global__ void banks(float* y, int stride) {
  extern __shared__ float tile[];
  for (int i = threadIdx.x; i < 32 * 33; i += 32) tile[i] = i;
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x * stride];
}
extern "C" __global__ void vector_banks(float4* y) {
  __shared__ float4 tile[32];
  tile[threadIdx.x] = make_float4(1, 2, 3, 4);
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x];
}
// A row of `pitch` bytes a lane; swizzle: the chunk of 16 bytes is XORed with the row.
extern "C" __global__ void matrices(uint32_t* y, int pitch, int swizzle) {
  extern __shared__ __align__(128) uint32_t rows[];
  for (int i = threadIdx.x; i < 32 * 36; i += 32) rows[i] = i;
  __syncwarp();
  const int row = threadIdx.x % 8, chunk = threadIdx.x / 8;
  const uint32_t at = __cvta_generic_to_shared(rows) + row * pitch + (swizzle ? chunk ^ row : chunk) * 16;
  uint32_t a, b, c, d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(at));
  y[threadIdx.x] = a + b + c + d;
}
extern "C" __global__ void async_copy(const float* x, float* y) {
  __shared__ float4 tile[32];
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(tile + threadIdx.x));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(at), "l"(x + 4 * threadIdx.x), "r"(threadIdx.x < 16 ? 16 : 0));
  asm volatile("cp.async.wait_all;");
  __syncwarp();
  reinterpret_cast<float4*>(y)[threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void products(float* y) {
  float d[4] = {};
  for (int i = 0; i < 5; ++i)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(0x3c003c00));
  y[threadIdx.x] = d[0];
}
"""


@pytest.fixture(scope="module")
def module():
    return ptx.Module(compilers.nvcc(SOURCE))


def aligned(n: int, offset: int = 0) -> torch.Tensor:
    """n floats that start `offset` floats past a sector."""
    raw = torch.zeros(n + 16)
    start = -raw.data_ptr() // 4 % 8 + offset
    return raw[start : start + n]


@pytest.mark.parametrize(
    ("stride", "offset", "per_request", "unique"),
    [(1, 0, 4, 128), (1, 1, 5, 129), (2, 0, 8, 256), (8, 0, 32, 1024), (9, 0, 32, 1024)],
)
def test_sectors(module, stride, offset, per_request, unique):
    n = 1024
    x, y = aligned(n * stride, offset), aligned(n)
    stats = module.launch("copy_floats", 8, 128, [x, y, n, stride], outputs=[y])
    assert stats.global_load_requests == stats.global_store_requests == n // 32
    assert stats.sectors_per_load == per_request
    assert stats.sectors_per_store == 4
    assert stats.sectors_read == unique
    assert stats.sectors_written == n * 4 // 32
    assert stats.buffers == {"arg0": (unique, 0), "arg1": (0, n * 4 // 32)}


def test_sectors_of_vectors_and_partial_warps(module):
    x, y = aligned(400), aligned(400)
    stats = module.launch("copy_vectors", 1, 128, [x, y, 100, 1])  # 100 vectors of 16 bytes: 3 warps and 4 lanes
    assert stats.global_load_requests == 4
    assert stats.global_load_sectors == 50 == stats.sectors_read
    assert stats.global_store_sectors == 50 == stats.sectors_written


def test_sectors_are_counted_once(module):
    x, y = aligned(128), aligned(128)
    stats = module.launch("broadcast", 1, 128, [x, y])
    assert stats.global_load_requests == 4
    assert stats.global_load_sectors == 4
    assert stats.sectors_read == 1
    stats = module.launch("read_twice", 1, 128, [x, y])
    assert stats.global_load_requests == 8
    assert stats.global_load_sectors == 32
    assert stats.sectors_read == 16


@pytest.mark.parametrize(("stride", "wavefronts"), [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts(module, stride, wavefronts):
    stats = module.launch("banks", 1, 32, [torch.empty(32), stride], smem=4 * 32 * 33)
    assert stats.shared_requests == 33 + 1
    assert stats.shared_wavefronts == 33 + wavefronts
    assert stats.shared_conflicts == wavefronts - 1


def test_wide_accesses_take_four_wavefronts_without_conflict(module):
    stats = module.launch("vector_banks", 1, 32, [torch.empty(32, 4)])
    assert (stats.shared_requests, stats.shared_wavefronts, stats.shared_conflicts) == (2, 8, 0)


@pytest.mark.parametrize(
    ("pitch", "swizzle", "conflicts"), [(128, 0, 4 * 7), (128, 1, 0), (144, 0, 0), (64, 0, 4 * 3), (16, 0, 0)]
)
def test_ldmatrix_conflicts(module, pitch, swizzle, conflicts):
    stats = module.launch("matrices", 1, 32, [torch.empty(32, dtype=torch.int32), pitch, swizzle], smem=32 * 36 * 4)
    assert stats.shared_requests == 36 + 1
    assert stats.shared_conflicts == conflicts
    assert stats.instructions["ldmatrix"] == 1


def test_async_copies_read_only_what_they_copy(module):
    x, y = torch.randn(128), torch.empty(128)
    stats = module.launch("async_copy", 1, 32, [x, y], outputs=[y])
    assert stats.buffers["arg0"] == (8, 0)
    assert stats.global_load_sectors == 8
    assert torch.equal(y, torch.cat([x[:64], torch.zeros(64)]))


def test_tensor_flops(module):
    y = torch.empty(64)
    stats = module.launch("products", 3, 64, [y], race_check=False)
    assert stats.flops == 3 * 2 * 5 * (2 * 16 * 8 * 16)
    assert stats.instructions["mma"] == 3 * 2 * 5
    assert torch.equal(y, torch.full((64,), 80.0))


def test_instructions_by_category_and_line():
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 out) {
.reg .b32 %r<4>; .reg .b64 %d<2>; .reg .pred %p; .reg .f32 %f<2>;
ld.param.u64 %d1, [out];
mov.u32 %r1, 0;
mov.f32 %f1, 0f00000000;
loop:
add.s32 %r1, %r1, 1;
fma.rn.f32 %f1, %f1, %f1, 0f3F800000;
setp.lt.s32 %p, %r1, 10;
@%p bra loop;
@!%p st.global.f32 [%d1], %f1;
ret;
}
"""
    out = torch.empty(1)
    stats = ptx.Module(text).launch("k", 1, 1, [out])
    assert stats.instructions == {
        "load_param": 1,
        "move": 2,
        "integer": 10,
        "floating": 10,
        "predicate": 10,
        "branch": 11,
        "store_global": 1,
    }
    assert stats.lines == {6: 1, 7: 1, 8: 1, 10: 10, 11: 10, 12: 10, 13: 10, 14: 1, 15: 1}
