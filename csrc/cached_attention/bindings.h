// The functions of cached_attention in wam_kernels._C.
#pragma once

#include "common/bindings.h"

#include "params.h"

namespace wam::cached_attention_bindings {

using namespace wam::bindings;

// shape is (B, S, N, H, heads of the cache, D).
inline void forward(const Shape<6>& shape, const Row4& q, const Row4& k_cache, const Row4& v_cache, Address ranges,
                    std::int32_t ranges_of_group, const std::vector<std::int32_t>& group_rows, Address out_part,
                    Address lse_part, std::int32_t parts, std::int32_t queries_of_row, bool streamed, Address out,
                    Address lse, float scale, const std::string& dtype, Address stream) {
  CachedAttentionParams p{};
  p.batch = shape[0];
  p.rows = shape[1];
  p.slots = shape[2];
  p.heads = static_cast<std::int32_t>(shape[3]);
  p.key_heads = static_cast<std::int32_t>(shape[4]);
  p.head_dim = static_cast<std::int32_t>(shape[5]);
  p.q = heads(q);
  p.k = heads(k_cache);
  p.v = heads(v_cache);
  p.ranges = pointer<const std::int32_t>(ranges);
  p.ranges_of_group = ranges_of_group;
  p.groups = static_cast<std::int32_t>(group_rows.size());
  for (std::size_t g = 0; g < group_rows.size() && g < kMaxGroups; ++g) p.group_rows[g] = group_rows[g];
  p.out_part = pointer<float>(out_part);
  p.lse_part = pointer<float>(lse_part);
  p.parts = parts;
  p.queries_of_row = queries_of_row;
  p.streamed = streamed;
  p.out = pointer(out);
  p.lse = pointer<float>(lse);
  p.scale = scale;
  cached_attention_forward(p, dtype_from("cached_attention", dtype), pointer(stream));
}

inline void register_functions(py::module_& m) {
  m.def("cached_attention_forward", &forward,
        "Attention over ranges of a key/value cache; see csrc/cached_attention/kernels.cu.", py::kw_only(),
        py::arg("shape"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("ranges"),
        py::arg("ranges_of_group"), py::arg("group_rows"), py::arg("out_part"), py::arg("lse_part"), py::arg("parts"),
        py::arg("queries_of_row"), py::arg("streamed"), py::arg("out"), py::arg("lse"), py::arg("scale"),
        py::arg("dtype"), py::arg("stream"));
}

}  // namespace wam::cached_attention_bindings
