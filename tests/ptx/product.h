// Matrix products as tensor cores do them, on tiles of plain numbers.
#pragma once

#include <cstdint>
#include <vector>

#include "parse.h"

namespace ptx {

// Elements of a tile as the multiplier sees them: doubles hold every input type exactly.
double tensor_element(Type type, uint64_t bits);

// c[rows][n] += a[rows][k] * b[k][n]. Products are exact; each sum of 16 bytes' worth of them and the
// accumulator is truncated to single precision, as the hardware does it (f16 accumulators round once more, to
// nearest).
void float_product(Type input, Type output, int rows, int n, int k, const float* a, const float* b, float* c);
void double_product(int rows, int n, int k, const double* a, const double* b, double* c);
void integer_product(int rows, int n, int k, bool saturate, const int32_t* a, const int32_t* b, int32_t* c);

}  // namespace ptx
