// The step that adds up the partial sums of a `pixels` kernel.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int kSumSplitsBlock = 256 * 8;  // elements of a block, eight a thread

struct SumSplitsParams {
  const float* partial;   // [splits, n], then [splits, n2]
  void* out;              // [n]
  float* out2;            // [n2]: where gridDim.y is 2
  int64_t splits, n, n2;  // multiples of 8
};

}  // namespace resnet_fused
