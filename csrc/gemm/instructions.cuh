// The instructions that the matrix kernels are made of, for sm_80 and newer: asynchronous copies, shared
// memory by address, ldmatrix, mma, and conversions of pairs of 16-bit elements.
#pragma once

#include "common/kernel.cuh"

namespace resnet_fused {

// Hides how a value came about, so that the compiler does not compute it again in a loop to spare a register.
__device__ inline void keep_in_register(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ inline void keep_in_register(int64_t& v) { asm volatile("" : "+l"(v)); }

__device__ inline uint32_t shared_address(const void* p) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  keep_in_register(at);
  return at;
}

// Copies 16 bytes into shared memory past L1; `bytes` 0 writes zeros and reads nothing.
__device__ inline void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// The same for one word, for bit masks, whose rows start at any word.
__device__ inline void copy_async_word(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline uint4 load_shared(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
__device__ inline void store_shared(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ inline float4 load_shared_floats(uint32_t at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
__device__ inline void store_shared(uint32_t at, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}
__device__ inline uint32_t load_shared_byte(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

// Four 8x8 matrices of 16-bit elements; lanes 8i .. 8i+7 give the rows of matrix i.
template <bool kTransposed>
__device__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }
}

// Selects bytes of {a, b}; a selector's bit 3 replicates that byte's sign instead.
__device__ inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// What differs between the 16-bit types.
template <typename T>
struct Half;

template <>
struct Half<__nv_bfloat16> {
  static constexpr uint32_t kOnes = 0x3f803f80u;  // {1, 1}
  __device__ static float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  __device__ static float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
  __device__ static uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  __device__ static uint32_t pack_relu(float low, float high) {  // relu(NaN) is NaN here too
    uint32_t r;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  __device__ static uint32_t add(uint32_t a, uint32_t b) {  // of pairs; each sum rounded once
    uint32_t r;                                             // sm_80 has no addition of bf16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(kOnes), "r"(b));
    return r;
  }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Half<__half> {
  static constexpr uint32_t kOnes = 0x3c003c00u;
  __device__ static float low(uint32_t pair) { return __half2float(__ushort_as_half(pair & 0xffffu)); }
  __device__ static float high(uint32_t pair) { return __half2float(__ushort_as_half(pair >> 16)); }
  __device__ static uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  __device__ static uint32_t pack_relu(float low, float high) {
    uint32_t r;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  __device__ static uint32_t add(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Eight consecutive channels of a pixel, in four pairs.
template <typename T>
__device__ void unpack(uint4 chunk, float (&v)[8]) {
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = Half<T>::low(pairs[i]);
    v[2 * i + 1] = Half<T>::high(pairs[i]);
  }
}
template <typename T>
__device__ uint4 pack(const float (&v)[8]) {
  return make_uint4(Half<T>::pack(v[0], v[1]), Half<T>::pack(v[2], v[3]), Half<T>::pack(v[4], v[5]),
                    Half<T>::pack(v[6], v[7]));
}
template <typename T>
__device__ uint4 pack_relu(const float (&v)[8]) {
  return make_uint4(Half<T>::pack_relu(v[0], v[1]), Half<T>::pack_relu(v[2], v[3]),
                    Half<T>::pack_relu(v[4], v[5]), Half<T>::pack_relu(v[6], v[7]));
}
// The channels whose bit is 0 become 0. Bits spread to the signs of bytes, four at a time, by one product.
__device__ inline uint4 keep_where(uint4 chunk, uint32_t bits) {
  const uint32_t low = (bits & 15u) * 0x10204080u, high = (bits >> 4 & 15u) * 0x10204080u;
  return make_uint4(chunk.x & permute(low, 0, 0x9988), chunk.y & permute(low, 0, 0xbbaa),
                    chunk.z & permute(high, 0, 0x9988), chunk.w & permute(high, 0, 0xbbaa));
}

// Eight coefficients [channel .. channel + 7]; `vector` and `channel` are aligned to 16 bytes.
__device__ inline void load_vector(const float* vector, int channel, float (&out)[8]) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(vector + channel));
  const float4 b = __ldg(reinterpret_cast<const float4*>(vector + channel) + 1);
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
  out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}

}  // namespace resnet_fused
