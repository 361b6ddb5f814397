// Argument checks of the cached_attention kernels.
#include "params.h"

namespace wam {
namespace {

constexpr int kMaxHeadDim = 128;

}  // namespace

void cached_attention_forward(const CachedAttentionParams& p, DType dtype, void* stream) {
  const char* op = "cached_attention";
  require(op, dtype != DType::kFloat32,
          "q must be bfloat16 or float16 for impl='cuda', got float32; use impl='triton'");
  require(op, p.head_dim >= kChannels && p.head_dim <= kMaxHeadDim && p.head_dim % kChannels == 0,
          "D must be a multiple of 8 from 8 to 128, got " + std::to_string(p.head_dim) + "; use impl='reference'");
  require(op, p.groups >= 1 && p.groups <= kMaxGroups,
          "ranges must have from 1 to 4 groups, got " + std::to_string(p.groups) + "; use impl='reference'");
  require(op, p.rows <= kMaxGridX && p.slots <= kMaxGridX,
          "q and k_cache must have at most 2147483647 tokens, got " + std::to_string(p.rows) + " and " +
              std::to_string(p.slots) + "; split the call");
  require(op, p.batch * p.heads <= kMaxGridYZ && p.parts >= 1 && p.parts <= kMaxGridYZ,
          "B * H and the number of splits must be at most 65535, got " + std::to_string(p.batch * p.heads) + " and " +
              std::to_string(p.parts) + "; split the call");
  if (p.batch * p.rows * p.heads == 0) return;  // an empty tensor has no address to check
  require_heads(op, "q", p.q, p.batch, p.rows, p.heads, dtype);
  if (p.slots > 0) {
    require_heads(op, "k_cache", p.k, p.batch, p.slots, p.heads, dtype);
    require_heads(op, "v_cache", p.v, p.batch, p.slots, p.heads, dtype);
  }
  require_present(op, "ranges", p.ranges, 4);
  require_present(op, "out", p.out, 16);
  require_present(op, "out_part", p.out_part, 16);
  require_present(op, "lse", p.lse, 4);
  require_present(op, "lse_part", p.lse_part, 4);
  cached_attention_forward_kernels(p, dtype, stream);
}

}  // namespace wam
