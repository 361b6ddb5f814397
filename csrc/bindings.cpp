// The Python module wam_kernels._C: one function per launch, taking device addresses and a stream as integers.
//
// It does not link libtorch, so one build serves every torch version; tensors are taken apart in Python, where the
// shapes, dtypes and devices are checked. What is checked here is what would otherwise crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "adaln.cuh"
#include "cached_attention.cuh"
#include "qk_norm_rope.cuh"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;            // 0: no tensor
using Row3 = std::array<std::int64_t, 3>;  // address, batch stride, row stride: a wam::Rows
using Table = std::array<std::int64_t, 2>;  // address, batch stride
using Row4 = std::array<std::int64_t, 4>;  // address, batch stride, token stride, head stride: a wam::Heads

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

wam::Rows rows(const Row3& t) { return {pointer(static_cast<Address>(t[0])), t[1], t[2]}; }

wam::Heads heads(const Row4& t) { return {pointer(static_cast<Address>(t[0])), t[1], t[2], t[3]}; }

wam::DType dtype_from(const char* op, const std::string& name) {
  if (name == "bfloat16") return wam::DType::kBFloat16;
  if (name == "float16") return wam::DType::kFloat16;
  if (name == "float32") return wam::DType::kFloat32;
  throw py::value_error(std::string(op) + ": dtype must be 'bfloat16', 'float16' or 'float32', got '" + name + "'");
}

// shape is (B, S, F, D). A norm with weight is affine.
wam::AdalnParams adaln_params(const std::array<std::int64_t, 4>& shape, const Row3& gate, const Row3& scale,
                              Address gate_table, Address scale_table, Address weight, bool has_norm, float eps) {
  wam::AdalnParams p{};
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
  p.norm = !has_norm ? wam::Norm::kNone : weight != 0 ? wam::Norm::kAffine : wam::Norm::kAdaptive;
  return p;
}

void adaln_forward(const std::array<std::int64_t, 4>& shape, const Row3& x, const Row3& y, const Row3& gate,
                   const Row3& shift, const Row3& scale, Address gate_table, Address shift_table, Address scale_table,
                   Address weight, Address bias, Address row_of_token, const Row3& r, const Row3& h,
                   bool has_norm, std::int32_t tokens_per_block, float eps, const std::string& dtype, Address stream) {
  auto p = adaln_params(shape, gate, scale, gate_table, scale_table, weight, has_norm, eps);
  p.x = rows(x);
  p.y = rows(y);
  p.shift = rows(shift);
  p.shift_table = pointer<const float>(shift_table);
  p.bias = pointer<const float>(bias);
  p.row_of_token = pointer<const std::int32_t>(row_of_token);
  p.r = rows(r);
  p.h = rows(h);
  p.tokens_per_block = tokens_per_block;
  wam::adaln_forward(p, dtype_from("adaln_forward", dtype), pointer(stream));
}

void adaln_backward(const std::array<std::int64_t, 4>& shape, const Row3& dr, const Row3& dh, const Row3& r,
                    const Row3& y, const Row3& gate, const Row3& scale, Address gate_table, Address scale_table,
                    Address weight, Address segments, std::int64_t segment_count, Address row_begin,
                    Address row_segments, const Row3& dx, const Row3& dy, Address dgate, Address dshift, Address dscale,
                    Address dweight, Address dbias, Address partials, bool has_norm, float eps,
                    const std::string& dtype, Address stream) {
  auto p = adaln_params(shape, gate, scale, gate_table, scale_table, weight, has_norm, eps);
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
  wam::adaln_backward(p, dtype_from("adaln_backward", dtype), pointer(stream));
}

// shape is (B, S, H, head_dim).
wam::QkNormRopeParams qk_params(const std::array<std::int64_t, 4>& shape, const Row4& q, const Row4& k,
                                Address weight_q, Address weight_k, const Table& table, bool per_head, bool interleaved,
                                float eps) {
  wam::QkNormRopeParams p{};
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

void qk_norm_rope_forward(const std::array<std::int64_t, 4>& shape, const Row4& q, const Row4& k, const Row4& v,
                          Address weight_q, Address weight_k, const Table& table, const Row4& q_out, const Row4& k_out,
                          const Row4& v_out, bool per_head, bool interleaved, float eps, const std::string& dtype,
                          Address stream) {
  auto p = qk_params(shape, q, k, weight_q, weight_k, table, per_head, interleaved, eps);
  p.q.y = heads(q_out);
  p.k.y = heads(k_out);
  p.v = heads(v);
  p.v_out = heads(v_out);
  wam::qk_norm_rope_forward(p, dtype_from("qk_norm_rope_forward", dtype), pointer(stream));
}

void qk_norm_rope_backward(const std::array<std::int64_t, 4>& shape, const Row4& dq_out, const Row4& dk_out,
                           const Row4& q, const Row4& k, Address weight_q, Address weight_k, const Table& table,
                           const Row4& dq, const Row4& dk, Address dweight_q, Address dweight_k, Address partials,
                           std::int64_t programs, std::int64_t tokens_per_program, bool per_head, bool interleaved,
                           float eps, const std::string& dtype, Address stream) {
  auto p = qk_params(shape, q, k, weight_q, weight_k, table, per_head, interleaved, eps);
  p.q.y = heads(dq_out);
  p.k.y = heads(dk_out);
  p.q.dx = heads(dq);
  p.k.dx = heads(dk);
  p.q.dweight = pointer<float>(dweight_q);
  p.k.dweight = pointer<float>(dweight_k);
  p.partials = pointer<float>(partials);
  p.programs = programs;
  p.tokens_per_program = tokens_per_program;
  wam::qk_norm_rope_backward(p, dtype_from("qk_norm_rope_backward", dtype), pointer(stream));
}

// shape is (B, S, N, H, D).
void cached_attention(const std::array<std::int64_t, 5>& shape, const Row4& q, const Row4& k_cache, const Row4& v_cache,
                      Address ranges, std::int32_t ranges_of_group, const std::vector<std::int32_t>& group_rows,
                      Address out_part, Address lse_part, std::int32_t parts, Address out, Address lse, float scale,
                      const std::string& dtype, Address stream) {
  wam::CachedAttentionParams p{};
  p.batch = shape[0];
  p.rows = shape[1];
  p.slots = shape[2];
  p.heads = static_cast<std::int32_t>(shape[3]);
  p.head_dim = static_cast<std::int32_t>(shape[4]);
  p.q = heads(q);
  p.k = heads(k_cache);
  p.v = heads(v_cache);
  p.ranges = pointer<const std::int32_t>(ranges);
  p.ranges_of_group = ranges_of_group;
  p.groups = static_cast<std::int32_t>(group_rows.size());
  for (std::size_t g = 0; g < group_rows.size() && g < wam::kMaxGroups; ++g) p.group_rows[g] = group_rows[g];
  p.out_part = pointer<float>(out_part);
  p.lse_part = pointer<float>(lse_part);
  p.parts = parts;
  p.out = pointer(out);
  p.lse = pointer<float>(lse);
  p.scale = scale;
  wam::cached_attention(p, dtype_from("cached_attention", dtype), pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of wam_kernels, compiled for sm_90a. Importing it touches no driver; a call does.";
  // by name only: so many integers in a row are too easily swapped
  m.def("adaln_forward", &adaln_forward, "r and h of a gated residual and LayerNorm; see adaln.cuh.", py::kw_only(),
        py::arg("shape"), py::arg("x"), py::arg("y"), py::arg("gate"), py::arg("shift"), py::arg("scale"),
        py::arg("gate_table"), py::arg("shift_table"), py::arg("scale_table"), py::arg("weight"), py::arg("bias"),
        py::arg("row_of_token"), py::arg("r"), py::arg("h"), py::arg("has_norm"), py::arg("tokens_per_block"),
        py::arg("eps"), py::arg("dtype"), py::arg("stream"));
  m.def("adaln_backward", &adaln_backward, "The gradients of adaln_forward, in two launches; see adaln.cuh.",
        py::kw_only(), py::arg("shape"), py::arg("dr"), py::arg("dh"), py::arg("r"), py::arg("y"), py::arg("gate"),
        py::arg("scale"), py::arg("gate_table"), py::arg("scale_table"), py::arg("weight"), py::arg("segments"),
        py::arg("segment_count"), py::arg("row_begin"), py::arg("row_segments"), py::arg("dx"), py::arg("dy"),
        py::arg("dgate"), py::arg("dshift"), py::arg("dscale"), py::arg("dweight"), py::arg("dbias"),
        py::arg("partials"), py::arg("has_norm"), py::arg("eps"), py::arg("dtype"), py::arg("stream"));
  m.def("cached_attention", &cached_attention, "Attention over ranges of a key/value cache; see cached_attention.cuh.",
        py::kw_only(), py::arg("shape"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("ranges"),
        py::arg("ranges_of_group"), py::arg("group_rows"), py::arg("out_part"), py::arg("lse_part"), py::arg("parts"),
        py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("dtype"), py::arg("stream"));
  m.def("qk_norm_rope_forward", &qk_norm_rope_forward,
        "RMSNorm and rope of q and k, and a copy of v; see qk_norm_rope.cuh.", py::kw_only(), py::arg("shape"),
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("weight_q"), py::arg("weight_k"), py::arg("table"),
        py::arg("q_out"), py::arg("k_out"), py::arg("v_out"), py::arg("per_head"), py::arg("interleaved"),
        py::arg("eps"), py::arg("dtype"), py::arg("stream"));
  m.def("qk_norm_rope_backward", &qk_norm_rope_backward,
        "The gradients of qk_norm_rope_forward, in two launches; see qk_norm_rope.cuh.", py::kw_only(),
        py::arg("shape"), py::arg("dq_out"), py::arg("dk_out"), py::arg("q"), py::arg("k"), py::arg("weight_q"),
        py::arg("weight_k"), py::arg("table"), py::arg("dq"), py::arg("dk"), py::arg("dweight_q"),
        py::arg("dweight_k"), py::arg("partials"), py::arg("programs"), py::arg("tokens_per_program"),
        py::arg("per_head"), py::arg("interleaved"), py::arg("eps"), py::arg("dtype"), py::arg("stream"));
}
