// Error messages: check(), which throws one, and how shapes, strides, devices and types are printed in it.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>

#include "../params.h"

namespace convmixer_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error with the message, which is all that follows the condition, unless the condition holds.
template <class... Printed>
void check(bool condition, const Printed&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

template <class Value>
std::ostream& print_list(std::ostream& out, int64_t count, Value value) {
  out << '(';
  for (int64_t i = 0; i < count; i++) out << (i ? ", " : "") << value(i);
  return out << ')';
}

struct Listed {  // prints as (2, 3)
  const int64_t* values;
  size_t count;
};
inline std::ostream& operator<<(std::ostream& out, Listed list) {
  return print_list(out, list.count, [&](int64_t i) { return list.values[i]; });
}

struct ShapeOf {  // prints as (2, 3)
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, ShapeOf shape) {
  return print_list(out, shape.tensor.dim(), [&](int64_t d) { return shape.tensor.size(d); });
}

struct StridesOf {  // prints as (3, 1)
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, StridesOf strides) {
  return print_list(out, strides.tensor.dim(), [&](int64_t d) { return strides.tensor.stride(d); });
}

struct DeviceOf {  // prints as cuda:0
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, DeviceOf device) {
  switch (device.tensor.device().type()) {
    case torch::headeronly::DeviceType::CPU: return out << "cpu";
    case torch::headeronly::DeviceType::CUDA: return out << "cuda:" << device.tensor.get_device_index();
    case torch::headeronly::DeviceType::Meta: return out << "meta";
    default: return out << "another device";
  }
}

inline const char* name_of(DType type) {
  switch (type) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  __builtin_unreachable();
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another type";
  }
}

// Asks for the dtype only when it is printed. check() evaluates its arguments although it seldom prints them, and
// Tensor::scalar_type() compares torch's number of the dtype with one after the other.
struct DtypeOf {  // prints as float32
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, DtypeOf dtype) { return out << name_of(dtype.tensor.scalar_type()); }

}  // namespace convmixer_fast
