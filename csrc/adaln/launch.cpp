// Argument checks of the adaln kernels, and the order of launches.
#include <utility>

#include "common/row_blocks.cuh"
#include "common/sum_partials.h"
#include "params.h"

namespace wam {
namespace {

void check(const char* op, const AdalnParams& p, DType dtype) {
  require(op, p.channels % kChannels == 0 && p.channels >= kChannels && p.channels <= kMaxChannels,
          "D must be a multiple of " + std::to_string(kChannels) + " from " + std::to_string(kChannels) + " to " +
              std::to_string(kMaxChannels) + ", got " + std::to_string(p.channels) + "; use impl='reference'");
  require(op, p.tokens <= kMaxGridX, "S must be at most 2147483647, got " + std::to_string(p.tokens));
  require(op, p.batch <= kMaxGridYZ, "B must be at most 65535, got " + std::to_string(p.batch) + "; split the call");
  const struct {
    const char* name;
    const Rows& rows;
  } of_tokens[] = {{"x", p.x},   {"y", p.y},   {"r", p.r},   {"h", p.h},
                   {"dr", p.dr}, {"dh", p.dh}, {"dx", p.dx}, {"dy", p.dy}},
    of_rows[] = {{"gate", p.gate}, {"shift", p.shift}, {"scale", p.scale}};
  for (const auto& t : of_tokens) require_rows(op, t.name, t.rows, p.batch, p.tokens, dtype);
  for (const auto& t : of_rows) require_rows(op, t.name, t.rows, p.batch, p.rows, DType::kFloat32);
  const struct {
    const char* name;
    const float* address;
  } vectors[] = {{"gate_table", p.gate_table},
                 {"shift_table", p.shift_table},
                 {"scale_table", p.scale_table},
                 {"weight", p.weight},
                 {"bias", p.bias},
                 {"partials", p.partials}};
  for (const auto& v : vectors) require_aligned(op, v.name, v.address, 16);
  require(op, p.norm != Norm::kAffine || p.weight != nullptr, "weight must be a device address, got 0");
}

}  // namespace

void adaln_forward(const AdalnParams& p, DType dtype, void* stream) {
  const char* op = "adaln_forward";
  check(op, p, dtype);
  require(op, p.tokens_per_block >= 1,
          "tokens_per_block must be at least 1, got " + std::to_string(p.tokens_per_block));
  if (p.batch * p.tokens == 0) return;  // an empty tensor has no address to check
  require_present(op, "x", p.x.data, 16);
  if (p.y.data != nullptr) require_present(op, "r", p.r.data, 16);
  if (p.norm != Norm::kNone) require_present(op, "h", p.h.data, 16);
  if (p.gate.data != nullptr || p.norm == Norm::kAdaptive) {
    require_present(op, "row_of_token", p.row_of_token, alignof(int32_t));
  }
  adaln_forward_kernels(p, dtype, stream);
}

void adaln_backward(const AdalnParams& p, DType dtype, void* stream) {
  const char* op = "adaln_backward";
  check(op, p, dtype);
  require(op, p.batch * p.rows <= kMaxGridX,
          "B * F must be at most 2147483647, got " + std::to_string(p.batch * p.rows) + "; split the call");
  const bool has_norm = p.norm != Norm::kNone, has_gate = p.gate.data != nullptr;
  if (p.batch * p.tokens > 0) {
    if (has_norm) {
      for (const auto& [name, rows] : {std::pair{"dh", p.dh}, {"r", p.r}, {"dx", p.dx}}) {
        require_present(op, name, rows.data, 16);
      }
    }
    if (has_gate) {
      require_present(op, "y", p.y.data, 16);
      require_present(op, "dy", p.dy.data, 16);
    }
    require_present(op, "segments", p.segments, alignof(int32_t));
    require_present(op, "partials", p.partials, 16);
  }
  adaln_backward_kernels(p, dtype, stream);

  SumPartialsParams of_rows{};
  of_rows.partials = p.partials;
  of_rows.row_begin = p.row_begin;
  of_rows.row_partials = p.row_segments;
  of_rows.batch = p.batch;
  of_rows.rows = p.rows;
  of_rows.count = p.tokens == 0 ? 0 : p.segment_count;
  of_rows.sums = 2 * has_norm + has_gate;
  of_rows.channels = p.channels;
  if (p.norm == Norm::kAffine) {
    SumPartialsParams of_all = of_rows;  // weight and bias: one row, with the segments of all batch elements
    of_all.row_begin = of_all.row_partials = nullptr;
    of_all.batch = of_all.rows = 1;
    of_all.count = p.batch * of_rows.count;
    of_all.out[0] = p.dbias;
    of_all.out[1] = p.dweight;
    sum_partials(op, of_all, stream);
    of_rows.first_sum = 2;
    of_rows.out[0] = p.dgate;
  } else if (has_norm) {
    of_rows.out[0] = p.dshift;
    of_rows.out[1] = p.dscale;
    of_rows.out[2] = p.dgate;
  } else {
    of_rows.out[0] = p.dgate;
  }
  sum_partials(op, of_rows, stream);
}

}  // namespace wam
