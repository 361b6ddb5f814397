// The functions of adaln in wam_kernels._C.
#pragma once

#include "common/bindings.h"

#include "params.h"

namespace wam::adaln_bindings {

using namespace wam::bindings;

// shape is (B, S, F, D). A norm with weight is affine.
inline AdalnParams params_of(const Shape<4>& shape, const Row3& gate, const Row3& scale, Address gate_table,
                             Address scale_table, Address weight, bool has_norm, float eps) {
  AdalnParams p{};
  p.batch = shape[0];
  p.tokens = shape[1];
  p.rows = shape[2];
  p.channels = static_cast<std::int32_t>(shape[3]);
  p.gate = rows(gate);
  p.scale = rows(scale);
  p.gate_table = pointer<const float>(gate_table);
  p.scale_table = pointer<const float>(scale_table);
  p.weight = pointer<const float>(weight);
  p.eps = eps;
  p.norm = !has_norm ? Norm::kNone : weight != 0 ? Norm::kAffine : Norm::kAdaptive;
  return p;
}

inline void forward(const Shape<4>& shape, const Row3& x, const Row3& y, const Row3& gate, const Row3& shift,
                    const Row3& scale, Address gate_table, Address shift_table, Address scale_table, Address weight,
                    Address bias, Address row_of_token, const Row3& r, const Row3& h, bool has_norm,
                    std::int32_t tokens_per_block, float eps, const std::string& dtype, Address stream) {
  auto p = params_of(shape, gate, scale, gate_table, scale_table, weight, has_norm, eps);
  p.x = rows(x);
  p.y = rows(y);
  p.shift = rows(shift);
  p.shift_table = pointer<const float>(shift_table);
  p.bias = pointer<const float>(bias);
  p.row_of_token = pointer<const std::int32_t>(row_of_token);
  p.r = rows(r);
  p.h = rows(h);
  p.tokens_per_block = tokens_per_block;
  adaln_forward(p, dtype_from("adaln_forward", dtype), pointer(stream));
}

inline void backward(const Shape<4>& shape, const Row3& dr, const Row3& dh, const Row3& r, const Row3& y,
                     const Row3& gate, const Row3& scale, Address gate_table, Address scale_table, Address weight,
                     Address segments, std::int64_t segment_count, Address row_begin, Address row_segments,
                     const Row3& dx, const Row3& dy, Address dgate, Address dshift, Address dscale, Address dweight,
                     Address dbias, Address partials, bool has_norm, float eps, const std::string& dtype,
                     Address stream) {
  auto p = params_of(shape, gate, scale, gate_table, scale_table, weight, has_norm, eps);
  p.dr = rows(dr);
  p.dh = rows(dh);
  p.r = rows(r);
  p.y = rows(y);
  p.segments = pointer<const std::int32_t>(segments);
  p.segment_count = segment_count;
  p.row_begin = pointer<const std::int32_t>(row_begin);
  p.row_segments = pointer<const std::int32_t>(row_segments);
  p.dx = rows(dx);
  p.dy = rows(dy);
  p.dgate = pointer<float>(dgate);
  p.dshift = pointer<float>(dshift);
  p.dscale = pointer<float>(dscale);
  p.dweight = pointer<float>(dweight);
  p.dbias = pointer<float>(dbias);
  p.partials = pointer<float>(partials);
  adaln_backward(p, dtype_from("adaln_backward", dtype), pointer(stream));
}

inline void register_functions(py::module_& m) {
  m.def("adaln_forward", &forward, "r and h of a gated residual and LayerNorm; see csrc/adaln/kernels.cu.",
        py::kw_only(), py::arg("shape"), py::arg("x"), py::arg("y"), py::arg("gate"), py::arg("shift"),
        py::arg("scale"), py::arg("gate_table"), py::arg("shift_table"), py::arg("scale_table"), py::arg("weight"),
        py::arg("bias"), py::arg("row_of_token"), py::arg("r"), py::arg("h"), py::arg("has_norm"),
        py::arg("tokens_per_block"), py::arg("eps"), py::arg("dtype"), py::arg("stream"));
  m.def("adaln_backward", &backward, "The gradients of adaln_forward, in two launches; see csrc/adaln/kernels.cu.",
        py::kw_only(), py::arg("shape"), py::arg("dr"), py::arg("dh"), py::arg("r"), py::arg("y"), py::arg("gate"),
        py::arg("scale"), py::arg("gate_table"), py::arg("scale_table"), py::arg("weight"), py::arg("segments"),
        py::arg("segment_count"), py::arg("row_begin"), py::arg("row_segments"), py::arg("dx"), py::arg("dy"),
        py::arg("dgate"), py::arg("dshift"), py::arg("dscale"), py::arg("dweight"), py::arg("dbias"),
        py::arg("partials"), py::arg("has_norm"), py::arg("eps"), py::arg("dtype"), py::arg("stream"));
}

}  // namespace wam::adaln_bindings
