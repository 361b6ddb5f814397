// Checks of cached_attention, and the choice of the dtype.
#include "cached_attention.cuh"

namespace wam {
namespace {

using namespace cached_attention_detail;

constexpr int kMaxHeadDim = 128;
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max(), kMaxGrid = 65535;  // of a grid in y and in z

// Copies move 16 bytes, so every row of every head must begin at a multiple of 16.
void require_heads(const char* op, const std::string& name, const Heads& t, int64_t tokens,
                   const CachedAttentionParams& p, DType dtype) {
  require_present(op, name, t.data, 16);
  require_stride(op, name + "'s batch stride", t.stride_batch, p.batch, dtype);
  require_stride(op, name + "'s token stride", t.stride_token, tokens, dtype);
  require_stride(op, name + "'s head stride", t.stride_head, p.heads, dtype);
}

}  // namespace

void cached_attention(const CachedAttentionParams& p, DType dtype, void* stream) {
  const char* op = "cached_attention";
  require(op, dtype != DType::kFloat32,
          "q must be bfloat16 or float16 for impl='cuda', got float32; use impl='triton'");
  require(op, p.head_dim >= kChannels && p.head_dim <= kMaxHeadDim && p.head_dim % kChannels == 0,
          "D must be a multiple of 8 from 8 to 128, got " + std::to_string(p.head_dim) + "; use impl='reference'");
  require(op, p.groups >= 1 && p.groups <= kMaxGroups,
          "ranges must have from 1 to 4 groups, got " + std::to_string(p.groups) + "; use impl='reference'");
  require(op, p.rows <= kMaxInt && p.slots <= kMaxInt,
          "q and k_cache must have at most 2147483647 tokens, got " + std::to_string(p.rows) + " and " +
              std::to_string(p.slots) + "; split the call");
  require(op, p.batch * p.heads <= kMaxGrid && p.parts >= 1 && p.parts <= kMaxGrid,
          "B * H and the number of splits must be at most 65535, got " + std::to_string(p.batch * p.heads) + " and " +
              std::to_string(p.parts) + "; split the call");
  if (p.batch * p.rows * p.heads == 0) return;  // an empty tensor has no address to check
  require_heads(op, "q", p.q, p.rows, p, dtype);
  if (p.slots > 0) {
    require_heads(op, "k_cache", p.k, p.slots, p, dtype);
    require_heads(op, "v_cache", p.v, p.slots, p, dtype);
  }
  require_present(op, "ranges", p.ranges, 4);
  require_present(op, "out", p.out, 16);
  require_present(op, "out_part", p.out_part, 16);
  require_present(op, "lse", p.lse, 4);
  require_present(op, "lse_part", p.lse_part, 4);
  if (dtype == DType::kBFloat16) {
    launch_kernels<DType::kBFloat16>(p, stream);
  } else {
    launch_kernels<DType::kFloat16>(p, stream);
  }
}

}  // namespace wam
