// Argument checks of the qk_norm_rope kernels, and the order of launches.
#include <utility>

#include "common/row_blocks.cuh"
#include "common/sum_partials.h"
#include "params.h"

namespace wam {
namespace {

bool is_empty(const QkNormRopeParams& p) { return p.batch * p.tokens == 0; }

void check(const char* op, const QkNormRopeParams& p, DType dtype, bool backward) {
  require(op, p.head_dim >= kChannels && p.head_dim % kChannels == 0,
          "head_dim must be a multiple of 8, got " + std::to_string(p.head_dim) + "; use impl='reference'");
  const int64_t inner = static_cast<int64_t>(p.heads) * p.head_dim;
  require(op, p.heads >= 1 && inner <= kMaxChannels,
          "q must have from 1 head to " + std::to_string(kMaxChannels) + " channels, got " + std::to_string(p.heads) +
              " heads of " + std::to_string(p.head_dim) + "; use impl='reference'");
  require(op, p.batch <= kMaxGridYZ, "B must be at most 65535, got " + std::to_string(p.batch) + "; split the call");
  require(op, p.batch * p.tokens <= kMaxGridX,
          "B * S must be at most 2147483647, got " + std::to_string(p.batch * p.tokens) + "; split the call");
  if (is_empty(p)) return;  // an empty tensor has no address to check
  require_present(op, "table", p.table, 16);
  for (const auto& [name, side] : {std::pair<std::string, const QkNormRopeSide&>{"q", p.q}, {"k", p.k}}) {
    require_heads(op, name, side.x, p.batch, p.tokens, p.heads, dtype);
    require_heads(op, (backward ? "d" : "") + name + "_out", side.y, p.batch, p.tokens, p.heads, dtype);
    if (backward) require_heads(op, "d" + name, side.dx, p.batch, p.tokens, p.heads, dtype);
    require_present(op, "weight_" + name, side.weight, 16);
  }
  require_stride(op, "table's batch stride", p.table_stride_batch, p.batch, DType::kFloat32);
  if (p.v.data == nullptr) return;
  require_heads(op, "v", p.v, p.batch, p.tokens, p.heads, dtype);
  require_heads(op, "v_out", p.v_out, p.batch, p.tokens, p.heads, dtype);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeParams& p, DType dtype, void* stream) {
  check("qk_norm_rope_forward", p, dtype, /*backward=*/false);
  if (!is_empty(p)) qk_norm_rope_forward_kernels(p, dtype, stream);
}

void qk_norm_rope_backward(const QkNormRopeParams& p, DType dtype, void* stream) {
  const char* op = "qk_norm_rope_backward";
  check(op, p, dtype, /*backward=*/true);
  require(op, p.blocks * p.tokens_per_block >= p.batch * p.tokens,
          "blocks * tokens_per_block must cover " + std::to_string(p.batch * p.tokens) + " tokens, got " +
              std::to_string(p.blocks) + " * " + std::to_string(p.tokens_per_block));
  if (p.blocks > 0) qk_norm_rope_backward_kernels(p, dtype, stream);

  SumPartialsParams weights{};
  weights.partials = p.partials;
  weights.out[0] = p.q.dweight;
  weights.out[1] = p.k.dweight;
  weights.batch = weights.rows = 1;
  weights.count = p.blocks;
  weights.sums = 2;
  weights.channels = p.per_head ? p.head_dim : p.heads * p.head_dim;
  sum_partials(op, weights, stream);
}

}  // namespace wam
