// Checks of an op's arguments, all made before anything is allocated, and the allocation of its
// results. Every message names the op, the argument, what came and what was expected.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline std::string to_string(const Sizes& sizes) {
  std::ostringstream out;
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "[" : ", ") << sizes[i];
  out << (sizes.empty() ? "[]" : "]");
  return out.str();
}

inline std::string to_string(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype number " + std::to_string(static_cast<int>(type));
  }
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another device:") + std::to_string(t.get_device_index());
}

inline Sizes sizes_of(const Tensor& t) { return Sizes(t.sizes().begin(), t.sizes().end()); }

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      return DType::kFloat32;
  }
}

inline ScalarType acc_type(const Tensor& activation) {
  return activation.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Pixels and channels of an NHWC activation: the matrix [M, C].
inline int64_t pixels(const Tensor& t) { return t.size(0) * t.size(2) * t.size(3); }
inline int64_t channels(const Tensor& t) { return t.size(1); }

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// Whether a tensor [N, C, H, W] lies dense in memory as [N, H, W, C]; strides of size-1 dimensions are free.
inline bool is_nhwc(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// The checks of one call. The first activation checked sets the device and, for vectors, the dtype.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (ok) return;
    std::ostringstream message;
    message << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  // A floating-point activation [N, C, H, W], dense NHWC; the call's other arguments are measured against it.
  void activation(const char* name, const Tensor& t) {
    const ScalarType type = t.scalar_type();
    require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                type == ScalarType::Double,
            name, " has dtype ", to_string(type), ", expected float32, bfloat16, float16 or float64");
    require(t.dim() == 4, name, " has shape ", to_string(sizes_of(t)),
            ", expected 4 dimensions [N, C, H, W]");
    require(t.size(1) >= 1, name, " has shape ", to_string(sizes_of(t)), ", expected at least one channel");
    layout(name, t);
    main_ = &t;
    main_name_ = name;
  }

  // Another activation with the shape, dtype and device of the first.
  void same(const char* name, const Tensor& t) const {
    dtype(name, t, main_->scalar_type());
    shape(name, t, sizes_of(*main_));
    layout(name, t);
    device(name, t);
  }
  void same(const char* name, const OptionalTensor& t) const {
    if (t) same(name, *t);
  }

  // A contiguous vector [C] in the accumulator's dtype.
  void per_channel(const char* name, const Tensor& t) const {
    dtype(name, t, acc_type(*main_));
    shape(name, t, {channels(*main_)});
    contiguous(name, t);
    device(name, t);
  }
  void per_channel(const char* name, const OptionalTensor& t) const {
    if (t) per_channel(name, *t);
  }

  // Two arguments that come together or not at all.
  void both_or_none(const char* a_name, const OptionalTensor& a, const char* b_name,
                    const OptionalTensor& b) const {
    require(a.has_value() == b.has_value(), a.has_value() ? a_name : b_name, " is given without ",
            a.has_value() ? b_name : a_name);
  }

  // Bit panels, int32 [ceil(C/32), M].
  void mask(const char* name, const OptionalTensor& t) const {
    if (!t) return;
    dtype(name, *t, ScalarType::Int);
    shape(name, *t, {(channels(*main_) + 31) / 32, pixels(*main_)});
    contiguous(name, *t);
    device(name, *t);
  }

  void dtype(const char* name, const Tensor& t, ScalarType expected) const {
    require(t.scalar_type() == expected, name, " has dtype ", to_string(t.scalar_type()), ", expected ",
            to_string(expected), " (", main_name_, " is ", to_string(main_->scalar_type()), ")");
  }

  void shape(const char* name, const Tensor& t, const Sizes& expected) const {
    require(sizes_of(t) == expected, name, " has shape ", to_string(sizes_of(t)), ", expected ",
            to_string(expected), " (", main_name_, " is ", to_string(sizes_of(*main_)), ")");
  }

  void layout(const char* name, const Tensor& t) const {
    require(is_nhwc(t), name, " has shape ", to_string(sizes_of(t)), " and strides ",
            to_string(Sizes(t.strides().begin(), t.strides().end())),
            ", expected a dense channels_last tensor (", name,
            ".contiguous(memory_format=torch.channels_last))");
  }

  void contiguous(const char* name, const Tensor& t) const {
    require(t.is_contiguous(), name, " has strides ",
            to_string(Sizes(t.strides().begin(), t.strides().end())), " for shape ", to_string(sizes_of(t)),
            ", expected a contiguous tensor");
  }

  void device(const char* name, const Tensor& t) const {
    require(t.device() == main_->device(), name, " is on ", device_name(t), ", expected ",
            device_name(*main_), " (that of ", main_name_, ")");
  }

 private:
  const char* op_;
  const Tensor* main_ = nullptr;
  const char* main_name_ = nullptr;
};

// Results, uninitialised and on the device of `like`.

inline Tensor empty_nhwc(const Tensor& like, const Sizes& nchw, ScalarType type) {
  return torch::stable::empty(nchw, type, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType type) {
  return torch::stable::new_empty(like, Sizes{size}, type);
}

inline Tensor empty_mask(const Tensor& like) {
  return torch::stable::new_empty(like, Sizes{(channels(like) + 31) / 32, pixels(like)}, ScalarType::Int);
}

inline uint32_t* mask_data(const Tensor& t) { return static_cast<uint32_t*>(t.mutable_data_ptr()); }
inline const uint32_t* mask_data(const OptionalTensor& t) { return static_cast<const uint32_t*>(data(t)); }

}  // namespace resnet_fused
