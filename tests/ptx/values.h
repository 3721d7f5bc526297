// Number formats: half and bfloat with their arithmetic, rounding to any small format, and flushing of
// subnormals.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

enum class Round : uint8_t { nearest_even, zero, down, up, nearest_away };

// A binary format with an implicit leading one, 1 + exponent + mantissa bits, at the bottom of a word.
template <int kExponent, int kMantissa>
struct Format {
  static constexpr int bias = (1 << (kExponent - 1)) - 1;
  static constexpr uint32_t sign = 1u << (kExponent + kMantissa);
  static constexpr uint32_t infinity = ((1u << kExponent) - 1) << kMantissa;
  static constexpr uint32_t nan = sign - 1;  // the canonical NaN of PTX

  // Rounds once. x may be the exact result of an operation, or a double that was itself rounded to 53 bits.
  static uint32_t encode(double x, Round round = Round::nearest_even) {
    if (std::isnan(x)) return nan;
    uint32_t s = std::signbit(x) ? sign : 0;
    double a = std::fabs(x);
    if (std::isinf(a)) return s | infinity;
    if (a == 0) return s;
    int exponent = std::max(std::ilogb(a), 1 - bias);  // subnormals share the smallest exponent
    double scaled = std::ldexp(a, kMantissa - exponent), whole = std::floor(scaled), rest = scaled - whole;
    bool up = false;
    switch (round) {
      case Round::nearest_even:
        up = rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2) == 1);
        break;
      case Round::nearest_away:
        up = rest >= 0.5;
        break;
      case Round::up:
        up = rest > 0 && !s;
        break;
      case Round::down:
        up = rest > 0 && s;
        break;
      case Round::zero:
        break;
    }
    uint64_t mantissa = static_cast<uint64_t>(whole) + up;  // a carry out of it moves into the exponent
    bool normal = mantissa >> kMantissa;
    uint64_t bits = normal ? mantissa + (static_cast<uint64_t>(exponent + bias - 1) << kMantissa) : mantissa;
    if (bits < infinity) return s | static_cast<uint32_t>(bits);
    bool toward_zero = round == Round::zero || (round == Round::up && s) || (round == Round::down && !s);
    return s | (infinity - toward_zero);
  }
};
using HalfFormat = Format<5, 10>;
using BFloatFormat = Format<8, 7>;

inline float half_to_float(uint16_t h) {
  uint32_t shifted = (h & 0x7fffu) << 13, exponent = shifted & 0x0f800000u;
  float magnitude = bits_as<float>(shifted) * 0x1p112f;  // moves the bias from 15 to 127, subnormals too
  if (exponent == 0x0f800000u) magnitude = bits_as<float>(shifted | 0x7f800000u);
  return bits_as<float>(bits_as<uint32_t>(magnitude) | (static_cast<uint32_t>(h & 0x8000u) << 16));
}
inline float bfloat_to_float(uint16_t b) { return bits_as<float>(static_cast<uint32_t>(b) << 16); }

inline uint16_t float_to_bfloat(float x) {  // nearest even, without the detour through double
  uint32_t u = bits_as<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

struct Half {
  uint16_t bits;
  static Half of(double x) { return {static_cast<uint16_t>(HalfFormat::encode(x))}; }
  double value() const { return half_to_float(bits); }
};
struct BFloat {
  uint16_t bits;
  static BFloat of(double x) { return {static_cast<uint16_t>(BFloatFormat::encode(x))}; }
  double value() const { return bfloat_to_float(bits); }
};
template <class H>
struct Pair {
  H lo, hi;
};

// value_of and round_to: every scalar float type through double, in which the sums and products of halves are
// exact.
inline double value_of(Half x) { return x.value(); }
inline double value_of(BFloat x) { return x.value(); }
inline double value_of(float x) { return x; }
inline double value_of(double x) { return x; }
template <class T>
inline T round_to(double x) {
  if constexpr (std::is_floating_point<T>::value)
    return static_cast<T>(x);
  else
    return T::of(x);
}

inline float flush(float x) {  // .ftz: a subnormal becomes a zero of its sign
  uint32_t u = bits_as<uint32_t>(x);
  return u & 0x7f800000u ? x : bits_as<float>(u & 0x80000000u);
}

// Directed rounding for single and double precision: the host's own rounding mode, for as long as this lives.
class RoundingMode {
 public:
  explicit RoundingMode(Round round) : saved_(std::fegetround()) {
    std::fesetround(round == Round::zero   ? FE_TOWARDZERO
                    : round == Round::down ? FE_DOWNWARD
                    : round == Round::up   ? FE_UPWARD
                                           : FE_TONEAREST);
  }
  ~RoundingMode() { std::fesetround(saved_); }
  RoundingMode(const RoundingMode&) = delete;
  RoundingMode& operator=(const RoundingMode&) = delete;

 private:
  int saved_;
};

// Of lanes, of any type.
struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};

}  // namespace ptx
