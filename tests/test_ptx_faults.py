"""Kernels that are wrong on purpose: the emulator must catch each, and must not complain about the right version."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx import compilers

SOURCE = r"""
#include <cstdint>

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Each thread reads what a thread of another warp wrote. kBarrier: with the barrier in between.
template <bool kBarrier>
__device__ void reverse(const float* x, float* y) {
  __shared__ float tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
extern "C" __global__ void reverse_right(const float* x, float* y) { reverse<true>(x, y); }
extern "C" __global__ void reverse_without_barrier(const float* x, float* y) { reverse<false>(x, y); }

// The tile is filled again in a loop: it must not be overwritten before all have read it.
template <bool kBarrier>
__device__ void refill(const float* x, float* y) {
  __shared__ float tile[128];
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    tile[threadIdx.x] = x[i * 128 + threadIdx.x];
    __syncthreads();
    sum += tile[threadIdx.x ^ 64];
    if (kBarrier) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
extern "C" __global__ void refill_right(const float* x, float* y) { refill<true>(x, y); }
extern "C" __global__ void refill_too_early(const float* x, float* y) { refill<false>(x, y); }

extern "C" __global__ void two_writers(const float* x, float* y) {
  __shared__ float one;
  if (threadIdx.x % 32 == 0) one = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = one;
}

// A pipeline of cp.async over four tiles, two in flight.
template <int kPending, bool kWait>
__device__ void pipeline(const float* x, float* y) {
  __shared__ __align__(16) float tiles[4][512];
  const int t = threadIdx.x * 4;
  auto load = [&](int i) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&tiles[i][t])), "l"(x + i * 512 + t));
    asm volatile("cp.async.commit_group;");
  };
  load(0);
  load(1);
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    if (i + 2 < 4) load(i + 2); else asm volatile("cp.async.commit_group;");
    if (kWait) asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
    __syncthreads();
    sum += tiles[i][511 - t];
  }
  y[threadIdx.x] = sum;
}
extern "C" __global__ void pipeline_right(const float* x, float* y) { pipeline<2, true>(x, y); }
extern "C" __global__ void pipeline_off_by_one(const float* x, float* y) { pipeline<3, true>(x, y); }
extern "C" __global__ void pipeline_without_wait(const float* x, float* y) { pipeline<0, false>(x, y); }

extern "C" __global__ void bounds(const float* x, float* y, int n, int shift) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i + shift];
}
extern "C" __global__ void shared_bounds(const float* x, float* y) {
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = dynamic[threadIdx.x + 1];
}
extern "C" __global__ void alignment(const char* x, float4* y, int offset) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + 16 * threadIdx.x + offset);
}
extern "C" __global__ void shared_alignment(const float* x, float* y, int offset) {
  extern __shared__ __align__(16) float dynamic[];
  for (int i = threadIdx.x; i < 256; i += 32) dynamic[i] = x[i];
  __syncwarp();
  const float2 v = reinterpret_cast<float2*>(dynamic + offset)[threadIdx.x];
  y[threadIdx.x] = v.x + v.y;
}

extern "C" __global__ void uninitialised(const float* x, float* y, int written) {
  __shared__ float tile[128];
  if (threadIdx.x < written) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
}

extern "C" __global__ void part_of_the_output(float* y, int n) {
  if (threadIdx.x < n) y[threadIdx.x] = 1;
}

extern "C" __global__ void barrier_in_a_branch(float* y, int n) {
  if (threadIdx.x % 32 < n) {
    asm volatile("bar.sync 0;");
    y[threadIdx.x] = 1;
  } else {
    asm volatile("bar.sync 0;");
    y[threadIdx.x] = 2;
  }
}
extern "C" __global__ void barrier_after_return(float* y, int n) {  // allowed: who has exited counts as arrived
  y[threadIdx.x] = 1;
  if (threadIdx.x >= n) return;
  __syncthreads();
  y[threadIdx.x] = 2;
}
extern "C" __global__ void barrier_never_met(float* y) {
  asm volatile("bar.sync 1, 128;");
  y[threadIdx.x] = 1;
}
extern "C" __global__ void shuffle_in_a_branch(float* y, int n) {
  float v = threadIdx.x;
  if (threadIdx.x < n) v = __shfl_xor_sync(~0u, v, 1);
  y[threadIdx.x] = v;
}

extern "C" __global__ void blocks_collide(float* y) { y[threadIdx.x] = blockIdx.x; }
extern "C" __global__ void blocks_read_each_other(float* y) {
  y[blockIdx.x] = 1;
  y[blockIdx.x + 8] = y[(blockIdx.x + 1) % 8];
}
extern "C" __global__ void blocks_add(float* y) { atomicAdd(y + threadIdx.x, 1.f); }

extern "C" __global__ void write_constant(float* y) { asm volatile("trap;"); y[0] = 1; }
extern "C" __global__ void forever(volatile float* y) { while (y[0] == 0); }
"""


@pytest.fixture(scope="module")
def module():
    return ptx.Module(compilers.nvcc(SOURCE))


def caught(module, kernel, *args, grid=1, block=128, kind, **options):
    """Launches with several seeds; every one of them must be caught, with its place."""
    for seed in ptx.seeds(3):
        with pytest.raises(ptx.Fault) as info:
            module.launch(kernel, grid, block, args, seed=seed, **options)
        fault = info.value
        assert fault.kind in (kind if isinstance(kind, tuple) else (kind,)), fault
        assert fault.kernel == kernel
    return fault


@pytest.fixture
def x():
    return torch.randn(2048)


@pytest.fixture
def y():
    return ptx.poison_(torch.empty(128))


def test_missing_barrier(module, x, y):
    module.launch("reverse_right", 1, 128, [x, y], outputs=[y])
    assert torch.equal(y, x[:128].flip(0))
    fault = caught(module, "reverse_without_barrier", x, y, kind=("race", "uninitialized"))  # as the order has it
    assert fault.text.startswith(("ld.shared", "st.shared"))
    assert fault.line > 0
    assert fault.address >= 1024
    assert 0 <= fault.thread[0] < 128
    assert fault.cta == (0, 0, 0)
    assert "thread" in str(fault)
    assert fault.text in str(fault)


def test_missing_barrier_gives_wrong_results_even_unchecked(module, x, y):
    wrong = 0
    for seed in ptx.seeds(8):
        module.launch("reverse_without_barrier", 1, 128, [x, y], seed=seed, race_check=False, check_uninitialized=False)
        wrong += not torch.equal(y, x[:128].flip(0))
    assert wrong


def test_overwritten_before_all_have_read(module, x, y):
    module.launch("refill_right", 1, 128, [x, y], outputs=[y])
    torch.testing.assert_close(y, x[:384].view(3, 2, 64).flip(1).reshape(3, 128).sum(0))
    caught(module, "refill_too_early", x, y, kind="race")


def test_two_warps_write_the_same_byte(module, x, y):
    caught(module, "two_writers", x, y, kind="race")
    caught(module, "two_writers", x, y, kind="race", allow_same_values=True)
    same = torch.ones_like(x)
    caught(module, "two_writers", same, y, kind="race")
    module.launch("two_writers", 1, 128, [same, y], outputs=[y], allow_same_values=True)
    assert (y == 1).all()


def test_cp_async_waits(module, x, y):
    for seed in ptx.seeds(4):
        module.launch("pipeline_right", 1, 128, [x, y], seed=seed, outputs=[y])
        torch.testing.assert_close(y, x.view(4, 512)[:, 511 - 4 * torch.arange(128)].sum(0))
    caught(module, "pipeline_off_by_one", x, y, kind="pending")
    caught(module, "pipeline_without_wait", x, y, kind="pending")


def test_global_bounds(module, x):
    out = torch.empty(100)
    short = x[:100].clone()
    module.launch("bounds", 1, 128, [short, out, 100, 0], outputs=[out])
    fault = caught(module, "bounds", short, out, 100, 1, kind="out-of-bounds")
    assert fault.thread == (99, 0, 0)
    assert fault.address == short.data_ptr() + 400
    assert "0 bytes past the end of buffer 'arg0' of 400 bytes" in fault.what
    caught(module, "bounds", short, out, 100, -1, kind="out-of-bounds")
    caught(module, "bounds", short, out, 101, 0, kind="out-of-bounds")
    caught(module, "bounds", None, out, 100, 0, kind="out-of-bounds")


def test_bounds_name_the_block(module, x):
    out = torch.empty(600)
    fault = caught(module, "bounds", x, out, 700, 0, grid=3, block=256, kind="out-of-bounds", threads=1)
    assert fault.cta == (2, 0, 0)
    assert 88 <= fault.thread[0] < 188


def test_shared_bounds(module, x, y):
    module.launch("shared_bounds", 1, 128, [x, y], smem=516, outputs=[y])
    caught(module, "shared_bounds", x, y, smem=512, kind="out-of-bounds")


def test_alignment(module, x):
    out = torch.empty(32, 4)
    module.launch("alignment", 1, 32, [x, out, 16], outputs=[out])
    assert torch.equal(out.flatten(), x[4:132])
    caught(module, "alignment", x, out, 8, block=32, kind="misaligned")


def test_shared_alignment(module, x, y):
    module.launch("shared_alignment", 1, 32, [x, y, 2], smem=1024)
    assert torch.equal(y[:32], x[2:66:2] + x[3:66:2])
    caught(module, "shared_alignment", x, y, 1, block=32, smem=1024, kind="misaligned")


def test_uninitialised_shared_memory(module, x, y):
    module.launch("uninitialised", 1, 128, [x, y, 128], outputs=[y])
    caught(module, "uninitialised", x, y, 127, kind="uninitialized")
    module.launch("uninitialised", 1, 128, [x, y, 127], check_uninitialized=False)
    assert y[0].isnan()
    assert torch.equal(y[1:], x[:127].flip(0))


def test_output_never_written(module, y):
    module.launch("part_of_the_output", 1, 128, [y, 128], outputs=[y])
    fault = caught(module, "part_of_the_output", y, 127, outputs=[y], kind="unwritten")
    assert "byte 508 of output 'arg0'" in fault.what


def test_divergent_barrier(module, y):
    module.launch("barrier_in_a_branch", 1, 128, [y, 32], outputs=[y])
    caught(module, "barrier_in_a_branch", y, 20, kind="divergent-barrier")


def test_barrier_after_threads_have_exited(module, y):
    for n in (128, 96, 70, 32):
        module.launch("barrier_after_return", 1, 128, [y, n], outputs=[y])
        assert y.tolist() == [2] * n + [1] * (128 - n)


def test_barrier_that_is_never_met(module, y):
    module.launch("barrier_never_met", 1, 128, [y], outputs=[y])
    caught(module, "barrier_never_met", y, block=96, kind="deadlock")


def test_divergent_shuffle(module, y):
    module.launch("shuffle_in_a_branch", 1, 32, [y, 32])
    assert torch.equal(y[:32], torch.arange(32.0).view(16, 2).flip(1).flatten())
    caught(module, "shuffle_in_a_branch", y, 20, block=32, kind="divergent-warp")


def test_races_between_blocks(module, y):
    caught(module, "blocks_collide", y, grid=4, kind="race")
    caught(module, "blocks_read_each_other", y, grid=8, block=1, kind="race")
    module.launch("blocks_collide", 1, 128, [y], outputs=[y])
    total = torch.zeros(128)
    module.launch("blocks_add", 7, 128, [total])
    assert torch.equal(total, torch.full((128,), 7.0))


def test_trap_and_endless_loop(module, y):
    caught(module, "write_constant", y, block=1, kind="trap")
    caught(module, "forever", torch.zeros(1), block=1, kind="limit", max_instructions=100_000)


WGMMA = r"""
#include <cstdint>
// One m64n8k16 product of two tiles without swizzle; a missing wait, or shared memory overwritten before it.
template <bool kWait, bool kOverwrite, bool kFence = true>
__device__ void product(const uint16_t* a, const uint16_t* b, float* c) {
  __shared__ __align__(128) uint16_t ta[64 * 16], tb[8 * 16];
  for (int i = threadIdx.x; i < 64 * 16; i += 128)  // core matrices of 8x8, k major: [row / 8][k / 8][row % 8][k % 8]
    ta[(i / 16 / 8 * 2 + i % 16 / 8) * 64 + i / 16 % 8 * 8 + i % 8] = a[i];
  if (threadIdx.x < 128) tb[threadIdx.x % 16 / 8 * 64 + threadIdx.x / 16 * 8 + threadIdx.x % 8] = b[threadIdx.x];
  if (kFence) asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
  auto descriptor = [](const void* p) {
    uint64_t at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
    return (at >> 4) | (uint64_t{128 >> 4} << 16) | (uint64_t{256 >> 4} << 32);
  };
  float d[4] = {0, 0, 0, 0};
  asm volatile("wgmma.fence.sync.aligned;");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(descriptor(ta)), "l"(descriptor(tb)));
  asm volatile("wgmma.commit_group.sync.aligned;");
  if (kOverwrite) ta[threadIdx.x] = 0;
  if (kWait) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
using Halves = const uint16_t*;
extern "C" __global__ void right(Halves a, Halves b, float* c) { product<true, false>(a, b, c); }
extern "C" __global__ void without_wait(Halves a, Halves b, float* c) { product<false, false>(a, b, c); }
extern "C" __global__ void overwritten(Halves a, Halves b, float* c) { product<true, true>(a, b, c); }
extern "C" __global__ void without_fence(Halves a, Halves b, float* c) { product<true, false, false>(a, b, c); }
"""


def test_wgmma_results_before_the_wait():
    module = ptx.Module(compilers.nvcc(WGMMA, "sm_90a"))
    a, b, c = torch.randn(64, 16).half(), torch.randn(8, 16).half(), ptx.poison_(torch.empty(64, 8))
    for seed in ptx.seeds(3):
        module.launch("right", 1, 128, [a, b, c], seed=seed, outputs=[c])
        torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)
    caught(module, "without_wait", a, b, c, kind="pending")
    caught(module, "without_fence", a, b, c, kind="unfenced")
    caught(module, "overwritten", a, b, c, kind=("pending", "race"))


MBARRIER = r"""
#include <cstdint>
// A producer fills a tile with a bulk copy; all wait for the mbarrier. kWait: or forget to.
template <bool kWait, int kBytes>
__device__ void copy(const float* x, float* y) {
  __shared__ __align__(128) float tile[256];
  __shared__ __align__(8) uint64_t barrier;
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at));
  __syncthreads();
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(1024));
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "l"(x + 256 * round), "r"(kBytes), "r"(at) : "memory");
    }
    if (kWait)
      asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
                   ::"r"(at), "r"(round) : "memory");
    sum += tile[255 - threadIdx.x];
    __syncthreads();
  }
  y[threadIdx.x] = sum;
}
extern "C" __global__ void right(const float* x, float* y) { copy<true, 1024>(x, y); }
extern "C" __global__ void without_wait(const float* x, float* y) { copy<false, 1024>(x, y); }
extern "C" __global__ void too_few_bytes(const float* x, float* y) { copy<true, 512>(x, y); }
"""


def test_bulk_copy_and_mbarrier(x, y):
    module = ptx.Module(compilers.nvcc(MBARRIER, "sm_90a"))
    for seed in ptx.seeds(4):
        module.launch("right", 1, 128, [x, y], seed=seed, outputs=[y])
        torch.testing.assert_close(y, x[:512].view(2, 256).flip(1)[:, :128].sum(0))
    with pytest.raises(ptx.Fault) as info:
        module.launch("without_wait", 1, 128, [x, y])
    assert info.value.kind in ("pending", "uninitialized")  # before, or after the copy was issued
    caught(module, "too_few_bytes", x, y, kind="deadlock")


def test_unknown_instructions_are_errors():
    head = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() {\n.reg .b32 %r<3>;\n"
    for line in (
        "frobnicate.b32 %r1, %r2;",
        "add.s32.sideways %r1, %r2, 1;",
        "mov.u64 %r1, 5;",
        "mov.u32 %r1, %nosuch;",
    ):
        module = ptx.Module(f"{head}{line}\nret;\n}}\n")
        with pytest.raises(ptx.SyntaxError, match="PTX line 6.*" + line.split(" ")[0]):
            module.launch("k", 1, 32)
    with pytest.raises(ptx.SyntaxError, match="PTX line 7: expected ','"):
        ptx.Module(f"{head}add.s32 %r1, %r2\nret;\n}}\n")


def test_launch_arguments(module, y):
    with pytest.raises(TypeError, match="takes 2 parameters, got 3"):
        module.launch("reverse_right", 1, 128, [y, y, 1])
    with pytest.raises(TypeError, match="struct of 4 bytes for a parameter of 8 bytes"):
        module.launch("reverse_right", 1, 128, [b"1234"])
    with pytest.raises(ValueError, match="a block of 2048 threads"):
        module.launch("reverse_right", 1, 2048, [y, y])
    module.launch("shared_bounds", 1, 128, [y, y], smem=163 * 1024, check_uninitialized=False)
    with pytest.raises(ValueError, match="166913 bytes of shared memory, sm_80 has 166912"):
        module.launch("shared_bounds", 1, 128, [y, y], smem=163 * 1024 + 1)
    with pytest.raises(ptx.SyntaxError, match="no kernel named 'nothing'"):
        module.launch("nothing", 1, 32)
