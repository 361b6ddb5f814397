// The functions of block_attention in wam_kernels._C.
#pragma once

#include "common/bindings.h"

#include "params.h"

namespace wam::block_attention_bindings {

using namespace wam::bindings;

// Tiles, rows, full, boxes and words, by address, and how many tiles.
using Side = std::array<std::int64_t, 6>;

inline BoxSide side_of(const Side& t) {
  return {pointer<const std::int32_t>(t[0]), pointer<const std::int32_t>(t[1]),  pointer<const std::int32_t>(t[2]),
          pointer<const std::int32_t>(t[3]), pointer<const std::uint32_t>(t[4]), t[5]};
}

// shape is (B, S, T, H, Hkv, D).
inline BlockAttentionParams params_of(const Shape<6>& shape, const Row4& q, const Row4& k, const Row4& v,
                                      const Side& queries, bool shared, float scale, Address counters, const Row4& out,
                                      Address lse) {
  BlockAttentionParams p{};
  p.batch = shape[0];
  p.rows = shape[1];
  p.tokens = shape[2];
  p.heads = static_cast<std::int32_t>(shape[3]);
  p.key_heads = static_cast<std::int32_t>(shape[4]);
  p.head_dim = static_cast<std::int32_t>(shape[5]);
  p.q = heads(q);
  p.k = heads(k);
  p.v = heads(v);
  p.queries = side_of(queries);
  p.shared = shared;
  p.scale = scale;
  p.counters = pointer<std::int32_t>(counters);
  p.out = heads(out);
  p.lse = pointer<float>(lse);
  return p;
}

inline void forward(const Shape<6>& shape, const Row4& q, const Row4& k, const Row4& v, const Side& queries,
                    bool shared, float scale, Address counters, const Row4& out, Address lse, const std::string& dtype,
                    Address stream) {
  const auto p = params_of(shape, q, k, v, queries, shared, scale, counters, out, lse);
  block_attention_forward(p, dtype_from("block_attention_forward", dtype), pointer(stream));
}

inline void backward(const Shape<6>& shape, const Row4& q, const Row4& k, const Row4& v, const Side& queries,
                     const Side& keys, bool shared, float scale, Address counters, const Row4& out, Address lse,
                     const Row4& dout, Address dlse, Address delta, const Row4& dq, const Row4& dk, const Row4& dv,
                     const std::string& dtype, Address stream) {
  auto p = params_of(shape, q, k, v, queries, shared, scale, counters, out, lse);
  p.keys = side_of(keys);
  p.dout = heads(dout);
  p.dlse = pointer<const float>(dlse);
  p.delta = pointer<float>(delta);
  p.dq = heads(dq);
  p.dk = heads(dk);
  p.dv = heads(dv);
  block_attention_backward(p, dtype_from("block_attention_backward", dtype), pointer(stream));
}

inline void register_functions(py::module_& m) {
  m.def("block_attention_forward", &forward, "Attention over a plan's boxes; see block_attention/README.md.",
        py::kw_only(), py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("queries"),
        py::arg("shared"), py::arg("scale"), py::arg("counters"), py::arg("out"), py::arg("lse"), py::arg("dtype"),
        py::arg("stream"));
  m.def("block_attention_backward", &backward, "Its gradients, in two launches.", py::kw_only(), py::arg("shape"),
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("queries"), py::arg("keys"), py::arg("shared"),
        py::arg("scale"), py::arg("counters"), py::arg("out"), py::arg("lse"), py::arg("dout"), py::arg("dlse"),
        py::arg("delta"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dtype"), py::arg("stream"));
}

}  // namespace wam::block_attention_bindings
