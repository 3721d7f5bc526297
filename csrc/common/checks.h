// Checks of an op's arguments, all made before anything is allocated, and the allocation of its
// results. Every message names the op, the argument, what came and what was expected.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
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

// Pixels along a dimension that a strided 1x1 convolution reads.
inline int64_t strided(int64_t size, int64_t stride) { return (size + stride - 1) / stride; }

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

  // Another activation with the dtype and device of the first, of any shape or of that given.
  void other(const char* name, const Tensor& t) const {
    dtype(name, t, main_->scalar_type());
    require(t.dim() == 4 && t.size(1) >= 1, name, " has shape ", to_string(sizes_of(t)),
            ", expected 4 dimensions [N, C, H, W] with at least one channel");
    layout(name, t);
    device(name, t);
  }
  void activation(const char* name, const Tensor& t, const Sizes& expected) const {
    dtype(name, t, main_->scalar_type());
    shape(name, t, expected);
    layout(name, t);
    device(name, t);
  }
  void activation(const char* name, const OptionalTensor& t, const Sizes& expected) const {
    if (t) activation(name, *t, expected);
  }
  void same(const char* name, const Tensor& t) const { activation(name, t, sizes_of(*main_)); }
  void same(const char* name, const OptionalTensor& t) const {
    if (t) same(name, *t);
  }

  // A contiguous vector in the accumulator's dtype, [C] or [size].
  void per_channel(const char* name, const Tensor& t) const { per_channel(name, t, channels(*main_)); }
  void per_channel(const char* name, const Tensor& t, int64_t size) const {
    dtype(name, t, acc_type(*main_));
    shape(name, t, {size});
    contiguous(name, t);
    device(name, t);
  }
  void per_channel(const char* name, const OptionalTensor& t) const {
    if (t) per_channel(name, *t);
  }

  // A vector [size] for the matrix kernels, which read it 16 bytes at a time.
  void vector(const char* name, const Tensor& t, int64_t size) const {
    per_channel(name, t, size);
    aligned(name, t);
  }
  void vector(const char* name, const OptionalTensor& t, int64_t size) const {
    if (t) vector(name, *t, size);
  }

  // Scale and shift [size], or neither.
  void affine(const char* scale_name, const OptionalTensor& scale, const char* shift_name,
              const OptionalTensor& shift, int64_t size) const {
    both_or_none(scale_name, scale, shift_name, shift);
    vector(scale_name, scale, size);
    vector(shift_name, shift, size);
  }

  void stride(int64_t stride) const { require(stride >= 1, "stride is ", stride, ", expected at least 1"); }

  // Weights [K, C, 1, 1] of a 1x1 convolution whose memory is [K][C]; K or C may be anything.
  void weight(const char* name, const Tensor& t, std::optional<int64_t> k, std::optional<int64_t> c) const {
    dtype(name, t, main_->scalar_type());
    const auto expected = [](std::optional<int64_t> size, const char* letter) {
      return size ? std::to_string(*size) : letter;
    };
    require(t.dim() == 4 && t.size(0) == k.value_or(t.size(0)) && t.size(1) == c.value_or(t.size(1)) &&
                t.size(0) > 0 && t.size(1) > 0 && t.size(2) == 1 && t.size(3) == 1,
            name, " has shape ", to_string(sizes_of(t)), ", expected [", expected(k, "K"), ", ",
            expected(c, "C"), ", 1, 1] (", main_name_, " is ", to_string(sizes_of(*main_)), ")");
    require((t.size(0) == 1 || t.stride(0) == t.size(1)) && (t.size(1) == 1 || t.stride(1) == 1), name,
            " has strides ", to_string(Sizes(t.strides().begin(), t.strides().end())), " for shape ",
            to_string(sizes_of(t)), ", expected a dense tensor");
    device(name, t);
  }

  // Arguments that come all together or not at all.
  struct Named {
    const char* name;
    const OptionalTensor& tensor;
  };
  void together(std::initializer_list<Named> all) const {
    for (const Named& a : all) {
      for (const Named& b : all) needs(a.name, a.tensor, b.name, b.tensor);
    }
  }
  // a comes only with b, or never with b.
  void needs(const char* a_name, const OptionalTensor& a, const char* b_name, const OptionalTensor& b) const {
    require(!a || b, a_name, " is given without ", b_name);
  }
  void excludes(const char* a_name, const OptionalTensor& a, const char* b_name,
                const OptionalTensor& b) const {
    require(!a || !b, a_name, " is given with ", b_name);
  }
  // Two arguments that come together or not at all.
  void both_or_none(const char* a_name, const OptionalTensor& a, const char* b_name,
                    const OptionalTensor& b) const {
    require(a.has_value() == b.has_value(), a.has_value() ? a_name : b_name, " is given without ",
            a.has_value() ? b_name : a_name);
  }

  // Bit panels, int32 [ceil(C/32), M].
  void mask(const char* name, const OptionalTensor& t) const { mask(name, t, sizes_of(*main_)); }
  // Those of an activation [N, C, H, W] of another shape.
  void mask(const char* name, const OptionalTensor& t, const Sizes& of) const {
    if (!t) return;
    dtype(name, *t, ScalarType::Int);
    shape(name, *t, {(of[1] + 31) / 32, of[0] * of[2] * of[3]});
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

  void aligned(const char* name, const Tensor& t) const {
    require(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
            " does not start at a multiple of 16 bytes, as the kernels need it (", name, ".clone())");
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
