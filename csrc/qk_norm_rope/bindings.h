// The functions of qk_norm_rope in wam_kernels._C.
#pragma once

#include "common/bindings.h"

#include "params.h"

namespace wam::qk_norm_rope_bindings {

using namespace wam::bindings;

// shape is (B, S, H, head_dim).
inline QkNormRopeParams params_of(const Shape<4>& shape, const Row4& q, const Row4& k, Address weight_q,
                                  Address weight_k, const Table& table, bool per_head, bool interleaved, float eps) {
  QkNormRopeParams p{};
  p.batch = shape[0];
  p.tokens = shape[1];
  p.heads = static_cast<std::int32_t>(shape[2]);
  p.head_dim = static_cast<std::int32_t>(shape[3]);
  p.q.x = heads(q);
  p.k.x = heads(k);
  p.q.weight = pointer<const float>(weight_q);
  p.k.weight = pointer<const float>(weight_k);
  p.table = pointer<const float>(static_cast<Address>(table[0]));
  p.table_stride_batch = table[1];
  p.per_head = per_head;
  p.interleaved = interleaved;
  p.eps = eps;
  return p;
}

inline void forward(const Shape<4>& shape, const Row4& q, const Row4& k, const Row4& v, Address weight_q,
                    Address weight_k, const Table& table, const Row4& q_out, const Row4& k_out, const Row4& v_out,
                    bool per_head, bool interleaved, float eps, const std::string& dtype, Address stream) {
  auto p = params_of(shape, q, k, weight_q, weight_k, table, per_head, interleaved, eps);
  p.q.y = heads(q_out);
  p.k.y = heads(k_out);
  p.v = heads(v);
  p.v_out = heads(v_out);
  qk_norm_rope_forward(p, dtype_from("qk_norm_rope_forward", dtype), pointer(stream));
}

inline void backward(const Shape<4>& shape, const Row4& dq_out, const Row4& dk_out, const Row4& q, const Row4& k,
                     Address weight_q, Address weight_k, const Table& table, const Row4& dq, const Row4& dk,
                     Address dweight_q, Address dweight_k, Address partials, std::int64_t blocks,
                     std::int64_t tokens_per_block, bool per_head, bool interleaved, float eps,
                     const std::string& dtype, Address stream) {
  auto p = params_of(shape, q, k, weight_q, weight_k, table, per_head, interleaved, eps);
  p.q.y = heads(dq_out);
  p.k.y = heads(dk_out);
  p.q.dx = heads(dq);
  p.k.dx = heads(dk);
  p.q.dweight = pointer<float>(dweight_q);
  p.k.dweight = pointer<float>(dweight_k);
  p.partials = pointer<float>(partials);
  p.blocks = blocks;
  p.tokens_per_block = tokens_per_block;
  qk_norm_rope_backward(p, dtype_from("qk_norm_rope_backward", dtype), pointer(stream));
}

inline void register_functions(py::module_& m) {
  m.def("qk_norm_rope_forward", &forward,
        "RMSNorm and rope of q and k, and a copy of v; see csrc/qk_norm_rope/kernels.cu.", py::kw_only(),
        py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("weight_q"), py::arg("weight_k"),
        py::arg("table"), py::arg("q_out"), py::arg("k_out"), py::arg("v_out"), py::arg("per_head"),
        py::arg("interleaved"), py::arg("eps"), py::arg("dtype"), py::arg("stream"));
  m.def("qk_norm_rope_backward", &backward,
        "The gradients of qk_norm_rope_forward, in two launches; see csrc/qk_norm_rope/kernels.cu.", py::kw_only(),
        py::arg("shape"), py::arg("dq_out"), py::arg("dk_out"), py::arg("q"), py::arg("k"), py::arg("weight_q"),
        py::arg("weight_k"), py::arg("table"), py::arg("dq"), py::arg("dk"), py::arg("dweight_q"), py::arg("dweight_k"),
        py::arg("partials"), py::arg("blocks"), py::arg("tokens_per_block"), py::arg("per_head"),
        py::arg("interleaved"), py::arg("eps"), py::arg("dtype"), py::arg("stream"));
}

}  // namespace wam::qk_norm_rope_bindings
