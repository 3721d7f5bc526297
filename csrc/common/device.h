// Where *_op.cpp chooses between the CPU implementation and the kernels, and starts the latter.
#pragma once

#include <type_traits>

#include "common/checks.h"
#include "common/launch.h"

namespace resnet_fused {

inline bool use_kernels(const Tensor& t) {
  return t.is_cuda() || (launcher_replaced() && t.scalar_type() != ScalarType::Double);
}

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline const float* floats(const OptionalTensor& t) { return t ? floats(*t) : nullptr; }
inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

template <class Problem, class = void>
struct HasWorkspace : std::false_type {};
template <class Problem>
struct HasWorkspace<Problem, std::void_t<decltype(Problem::workspace)>> : std::true_type {};

template <class Problem, class = void>
struct HasTile : std::false_type {};
template <class Problem>
struct HasTile<Problem, std::void_t<decltype(Problem::tile)>> : std::true_type {};

// Plans the problem and runs it on the device of `like`, from whose allocator the workspace comes.
template <class Problem>
void launch(Plan (*plan)(const Problem&, int), Problem problem, const Tensor& like) {
  const int device = like.is_cuda() ? like.get_device_index() : kHost;
  const int arch = device_arch(device);
  if constexpr (HasTile<Problem>::value) {
    if (problem.tile == 0) problem.tile = wanted_tile();
  }
  Plan planned = plan(problem, arch);
  std::optional<Tensor>
      workspace;  // lives until the kernels are on the stream, which is all the allocator asks
  if constexpr (HasWorkspace<Problem>::value) {
    if (planned.reason[0] == '\0') {
      workspace = empty_vector(like, planned.workspace, ScalarType::Float);
      problem.workspace = mutable_floats(*workspace);
      planned = plan(problem, arch);
    }
  }
  run(planned, device);
}

}  // namespace resnet_fused
