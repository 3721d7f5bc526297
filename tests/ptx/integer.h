// What integer instructions compute of one lane's operands, as function objects.
#pragma once

#include <algorithm>
#include <type_traits>

#include "values.h"

namespace ptx {

template <class T>
struct WiderOf;
template <>
struct WiderOf<uint8_t> {
  using type = uint16_t;
};
template <>
struct WiderOf<int8_t> {
  using type = int16_t;
};
template <>
struct WiderOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct WiderOf<int16_t> {
  using type = int32_t;
};
template <>
struct WiderOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct WiderOf<int32_t> {
  using type = int64_t;
};
template <>
struct WiderOf<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct WiderOf<int64_t> {
  using type = __int128;
};
template <class T>
using Wider = typename WiderOf<T>::type;
template <class T>
constexpr int kBits = sizeof(T) * 8;

template <class T>
T high(T a, T b) {
  return static_cast<T>((static_cast<Wider<T>>(a) * b) >> kBits<T>);
}

struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(uint64_t(a) * uint64_t(b));
  }
};
struct MulHi {
  template <class T>
  T operator()(T a, T b) const {
    return high(a, b);
  }
};
struct MulWide {
  template <class T>
  Wider<T> operator()(T a, T b) const {
    return static_cast<Wider<T>>(a) * b;
  }
};
struct Mad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Mul()(a, b) + c;
  }
};
struct MadHi {
  template <class T>
  T operator()(T a, T b, T c) const {
    return high(a, b) + c;
  }
};
struct MadWide {
  template <class T>
  Wider<T> operator()(T a, T b, Wider<T> c) const {
    return static_cast<Wider<T>>(a) * b + c;
  }
};
struct Sad {
  template <class T>
  T operator()(T a, T b, T c) const {
    return c + (a < b ? b - a : a - b);
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {  // a GPU does not trap
    return !b                                       ? static_cast<T>(-1)
           : std::is_signed<T>::value && b == T(-1) ? static_cast<T>(-a)
                                                    : static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  T operator()(T a, T b) const {
    return !b ? a : std::is_signed<T>::value && b == T(-1) ? T(0) : static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Shl {
  template <class T>
  T operator()(T a, uint32_t n) const {
    return n < kBits<T> ? static_cast<T>(a << n) : T(0);
  }
};
struct Shr {
  template <class T>
  T operator()(T a, uint32_t n) const {
    return n < kBits<T> ? static_cast<T>(a >> n) : std::is_signed<T>::value && a < 0 ? T(-1) : T(0);
  }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(-a);
  }
};
struct Abs {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? static_cast<T>(-a) : a;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  T operator()(T a) const {
    return a == 0;
  }
};
struct Popc {
  template <class T>
  uint32_t operator()(T a) const {
    return __builtin_popcountll(a);
  }
};
struct Clz {
  template <class T>
  uint32_t operator()(T a) const {
    return a ? __builtin_clzll(a) - (64 - kBits<T>) : kBits<T>;
  }
};
struct Brev {
  template <class T>
  T operator()(T a) const {
    T r = 0;
    for (int i = 0; i < kBits<T>; ++i) r = static_cast<T>(r << 1) | ((a >> i) & 1);
    return r;
  }
};
template <bool kShiftAmount>
struct Bfind {
  template <class T>
  uint32_t operator()(T a) const {
    using U = std::make_unsigned_t<T>;
    U u = std::is_signed<T>::value && a < 0 ? static_cast<U>(~a) : static_cast<U>(a);
    if (!u) return ~0u;
    uint32_t position = 63 - __builtin_clzll(u);
    return kShiftAmount ? kBits<T> - 1 - position : position;
  }
};
struct Bfe {
  template <class T>
  T operator()(T a, uint32_t position, uint32_t length) const {
    position &= 255, length &= 255;
    using U = std::make_unsigned_t<T>;
    const uint32_t top = std::min<uint32_t>(position + length - 1, kBits<T> - 1);
    const bool sign = std::is_signed<T>::value && length && (static_cast<U>(a) >> top & 1);
    U field = position < kBits<T> ? static_cast<U>(a) >> position : 0;
    const uint32_t valid = position < kBits<T> ? std::min<uint32_t>(length, kBits<T> - position) : 0;
    const U mask = valid >= kBits<T> ? ~U(0) : (U(1) << valid) - 1;
    return static_cast<T>(sign ? (field & mask) | ~mask : field & mask);
  }
};
struct Prmt {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    const uint64_t bytes = (uint64_t(b) << 32) | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t select = c >> (4 * i) & 15;
      uint32_t byte = bytes >> (8 * (select & 7)) & 255;
      if (select & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << (8 * i);
    }
    return r;
  }
};
template <bool kLeft, bool kWrap>
struct Funnel {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    const uint32_t n = kWrap ? c & 31 : std::min(c, 32u);
    const uint64_t both = (uint64_t(b) << 32) | a;
    return static_cast<uint32_t>(kLeft ? both << n >> 32 : both >> n);
  }
};
struct Bmsk {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    return a > 31 || !b ? 0 : (b > 31 ? ~0u : (1u << b) - 1) << a;
  }
};
struct Dp4a {
  template <class A, class B, class C>
  static C dot(A a, B b, C c) {
    for (int i = 0; i < 4; ++i) {
      int32_t x = std::is_signed<A>::value ? int8_t(a >> (8 * i)) : uint8_t(a >> (8 * i));
      int32_t y = std::is_signed<B>::value ? int8_t(b >> (8 * i)) : uint8_t(b >> (8 * i));
      c += x * y;
    }
    return c;
  }
  template <class A, class B, class C>
  C operator()(A a, B b, C c) const {
    return dot(a, b, c);
  }
};

}  // namespace ptx
