// Element types of activations and their conversions, as plain integer and float arithmetic: every
// compiler vectorises it for whatever instruction set the surrounding function is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define RF_INLINE inline __attribute__((always_inline))
#define RF_LAMBDA __attribute__((always_inline))  // the same for a lambda, after its parameters

namespace resnet_fused {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Statistics, scales and sums are float64 for float64 activations and float32 for all others.
template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The unsigned integer as wide as an accumulator.
template <class Acc>
using BitsOf = std::conditional_t<sizeof(Acc) == 8, uint64_t, uint32_t>;

template <class To, class From>
RF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

RF_INLINE float load(float v) { return v; }
RF_INLINE double load(double v) { return v; }
RF_INLINE float load(BFloat16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }

RF_INLINE float load(Float16 v) {
  const uint32_t magnitude = uint32_t(v.bits & 0x7fff) << 13;  // exponent and fraction at float32's place
  const uint32_t normal = magnitude + (112u << 23);            // exponent bias 15 -> 127
  const float subnormal = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t special = magnitude | 0x7f800000u;
  uint32_t bits = magnitude < (1u << 23) ? bit_cast<uint32_t>(subnormal) : normal;
  bits = magnitude >= (31u << 23) ? special : bits;
  return bit_cast<float>(bits | uint32_t(v.bits & 0x8000) << 16);
}

// store<T>: rounded to nearest, ties to even; a NaN stays a NaN.
template <class T>
RF_INLINE T store(AccOf<T> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = bit_cast<uint32_t>(v);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return BFloat16{uint16_t(v != v ? 0x7fc0u : rounded)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    const uint32_t bits = bit_cast<uint32_t>(v);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    const uint32_t normal = (rounded - (112u << 23)) >> 13;
    // Below 2^-14 the spacing is 2^-24, which is float32's spacing at 0.5: let the addition round.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = rounded >= (143u << 23) ? 0x7c00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return Float16{uint16_t(half | (bits >> 31 << 15))};
  } else {
    return v;
  }
}

// Calls f with a null pointer of the element type that a DType names.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
  }
}

}  // namespace resnet_fused
