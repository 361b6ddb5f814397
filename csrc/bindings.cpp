// The Python module wam_kernels._C: one function per op, taking device addresses and a stream as integers.
//
// It does not link libtorch, so one build serves every torch version; tensors are taken apart in Python, where the
// shapes, dtypes and devices are checked. What is checked here is what would otherwise crash.
#include <pybind11/pybind11.h>

#include "ada_layer_norm.cuh"

namespace py = pybind11;

namespace {

template <class T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

wam::DType dtype_from(const char* op, const std::string& name) {
  if (name == "bfloat16") return wam::DType::kBFloat16;
  if (name == "float16") return wam::DType::kFloat16;
  if (name == "float32") return wam::DType::kFloat32;
  throw py::value_error(std::string(op) + ": dtype must be 'bfloat16', 'float16' or 'float32', got '" + name + "'");
}

void ada_layer_norm(std::uintptr_t x, std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t frame_of_row,
                    std::uintptr_t y, std::int64_t rows, std::int64_t frames, std::int32_t channels, float eps,
                    const std::string& dtype, std::uintptr_t stream) {
  wam::AdaLayerNormParams params{};
  params.x = pointer(x);
  params.scale = pointer<const float>(scale);
  params.shift = pointer<const float>(shift);
  params.frame_of_row = pointer<const std::int32_t>(frame_of_row);
  params.y = pointer(y);
  params.rows = rows;
  params.frames = frames;
  params.channels = channels;
  params.eps = eps;
  wam::ada_layer_norm(params, dtype_from("ada_layer_norm", dtype), pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of wam_kernels, compiled for sm_90a. Importing it touches no driver; a call does.";
  m.def("ada_layer_norm", &ada_layer_norm,
        "y = LN(x) * (1 + scale[frame_of_row]) + shift[frame_of_row], on the current device; see ada_layer_norm.cuh.",
        // by name only: eleven integers in a row are too easily swapped
        py::kw_only(), py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("frame_of_row"), py::arg("y"),
        py::arg("rows"), py::arg("frames"), py::arg("channels"), py::arg("eps"), py::arg("dtype"), py::arg("stream"));
}
