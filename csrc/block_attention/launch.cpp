// Checks of block_attention: what would otherwise crash, or what TMA cannot take.
#include "params.h"

namespace wam {
namespace {

constexpr const char* kOp = "block_attention";
constexpr int kMaxHeadDim = 128;
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

void require_side(const std::string& name, const BoxSide& side, int64_t heads, int64_t batch) {
  require_present(kOp, name + "'s tiles", side.tiles, 4);
  require_present(kOp, name + "'s rows", side.rows, 4);
  require(kOp, side.n_tiles * heads * batch <= kMaxInt,
          name + " must have at most 2147483647 tiles of all heads and batch elements, got " +
              std::to_string(side.n_tiles * heads * batch) + "; split the call");
}

void require_common(const BlockAttentionParams& p, DType dtype) {
  require(kOp, dtype != DType::kFloat32,
          "q must be bfloat16 or float16 for impl='cuda', got float32; use impl='triton'");
  require(kOp, p.head_dim >= kChannels && p.head_dim <= kMaxHeadDim && p.head_dim % kChannels == 0,
          "D must be a multiple of 8 from 8 to 128, got " + std::to_string(p.head_dim) + "; use impl='triton'");
  require(kOp, p.key_heads >= 1 && p.heads % p.key_heads == 0,
          "k must have a number of heads that divides H=" + std::to_string(p.heads) + ", got " +
              std::to_string(p.key_heads));
  require_heads(kOp, "q", p.q, p.batch, p.rows, p.heads, dtype);
  require_heads(kOp, "k", p.k, p.batch, p.tokens, p.key_heads, dtype);
  require_heads(kOp, "v", p.v, p.batch, p.tokens, p.key_heads, dtype);
  require_heads(kOp, "out", p.out, p.batch, p.rows, p.heads, dtype);
  require_present(kOp, "lse", p.lse, 4);
  require_present(kOp, "counters", p.counters, 4);
  require_side("plan's query side", p.queries, p.heads, p.batch);
}

}  // namespace

void block_attention_forward(const BlockAttentionParams& p, DType dtype, void* stream) {
  if (p.batch * p.heads == 0) return;  // an empty tensor has no address to check
  require_common(p, dtype);
  block_attention_forward_kernel(p, dtype, stream);
}

void block_attention_backward(const BlockAttentionParams& p, DType dtype, void* stream) {
  if (p.batch * p.heads == 0) return;
  require_common(p, dtype);
  require_side("plan's key side", p.keys, p.key_heads, p.batch);
  require(kOp, p.batch * p.heads * p.rows <= kMaxInt,
          "q must have at most 2147483647 rows of all heads and batch elements, got " +
              std::to_string(p.batch * p.heads * p.rows) + "; split the call");
  require_heads(kOp, "dout", p.dout, p.batch, p.rows, p.heads, dtype);
  require_present(kOp, "dlse", p.dlse, 4);
  require_present(kOp, "delta", p.delta, 4);
  require_heads(kOp, "dq", p.dq, p.batch, p.rows, p.heads, dtype);
  require_heads(kOp, "dk", p.dk, p.batch, p.tokens, p.key_heads, dtype);
  require_heads(kOp, "dv", p.dv, p.batch, p.tokens, p.key_heads, dtype);
  block_attention_backward_kernels(p, dtype, stream);
}

}  // namespace wam
