// What the bindings of the ops share: tensors as tuples of integers, dtypes by name.
//
// The module does not link libtorch, so one build serves every torch version; tensors are taken apart in Python, where
// the shapes, dtypes and devices are checked. What is checked here is what would otherwise crash. Every function takes
// its arguments by name only: so many integers in a row are too easily swapped.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "tensors.h"

namespace wam::bindings {

namespace py = pybind11;

using Address = std::uintptr_t;             // 0: no tensor
using Row3 = std::array<std::int64_t, 3>;   // address, batch stride, row stride: Rows
using Row4 = std::array<std::int64_t, 4>;   // address, batch stride, token stride, head stride: Heads
using Table = std::array<std::int64_t, 2>;  // address, batch stride
template <std::size_t N>
using Shape = std::array<std::int64_t, N>;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Rows rows(const Row3& t) { return {pointer(static_cast<Address>(t[0])), t[1], t[2]}; }

inline Heads heads(const Row4& t) { return {pointer(static_cast<Address>(t[0])), t[1], t[2], t[3]}; }

inline DType dtype_from(const char* op, const std::string& name) {
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  if (name == "float32") return DType::kFloat32;
  throw py::value_error(std::string(op) + ": dtype must be 'bfloat16', 'float16' or 'float32', got '" + name + "'");
}

}  // namespace wam::bindings
