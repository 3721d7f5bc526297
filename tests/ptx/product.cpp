#include "product.h"

#include <algorithm>
#include <limits>

#include "values.h"

namespace ptx {
namespace {

float truncated(double x) {
  const uint64_t u = bits_as<uint64_t>(x);
  const bool ordinary =
      (u >> 52 & 0x7ff) - 897 < 1151 - 897 + 0u;  // within the normal range of single precision
  if (ordinary) return static_cast<float>(bits_as<double>(u & ~((uint64_t{1} << 29) - 1)));
  const float f = static_cast<float>(x);
  return std::isfinite(f) && std::fabs(static_cast<double>(f)) > std::fabs(x) ? std::nextafter(f, 0.f) : f;
}

}  // namespace

double tensor_element(Type type, uint64_t bits) {
  switch (type) {
    case Type::f16:
      return half_to_float(static_cast<uint16_t>(bits));
    case Type::bf16:
      return bfloat_to_float(static_cast<uint16_t>(bits));
    case Type::tf32:
      return bits_as<float>(static_cast<uint32_t>(bits) & 0xffffe000u);  // the low bits are not looked at
    case Type::f64:
      return bits_as<double>(bits);
    case Type::s8:
      return static_cast<int8_t>(bits);
    default:
      return static_cast<uint8_t>(bits);
  }
}

void float_product(Type input, Type output, int rows, int n, int k, const float* a, const float* b,
                   float* c) {
  const int block = 16 / bytes_of(input);
  std::vector<double> sums(n);
  for (int r = 0; r < rows; ++r) {
    float* row = c + r * n;
    for (int k0 = 0; k0 < k; k0 += block) {
      for (int j = 0; j < n; ++j) sums[j] = row[j];
      for (int kk = k0; kk < std::min(k, k0 + block); ++kk) {
        const double x = a[r * k + kk];
        const float* other = b + kk * n;
        for (int j = 0; j < n; ++j) sums[j] += x * other[j];
      }
      for (int j = 0; j < n; ++j) row[j] = truncated(sums[j]);
    }
    if (output == Type::f16)
      for (int j = 0; j < n; ++j) row[j] = half_to_float(static_cast<uint16_t>(HalfFormat::encode(row[j])));
  }
}

void double_product(int rows, int n, int k, const double* a, const double* b, double* c) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < n; ++j)
      for (int kk = 0; kk < k; ++kk) c[r * n + j] = std::fma(a[r * k + kk], b[kk * n + j], c[r * n + j]);
}

void integer_product(int rows, int n, int k, bool saturate, const int32_t* a, const int32_t* b, int32_t* c) {
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < n; ++j) {
      int64_t sum = c[r * n + j];
      for (int kk = 0; kk < k; ++kk) sum += int64_t{a[r * k + kk]} * b[kk * n + j];
      using Limits = std::numeric_limits<int32_t>;
      if (saturate) sum = std::clamp<int64_t>(sum, Limits::min(), Limits::max());
      c[r * n + j] = static_cast<int32_t>(sum);
    }
}

}  // namespace ptx
