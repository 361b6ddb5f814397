// Argument checks of the cached_attention kernels.
#include "params.h"

namespace wam {
namespace {

constexpr int kMaxHeadDim = 128;
constexpr int64_t kMaxStreamedSlots = int64_t{1} << 26;  // what a box can name

void require_streamed(const CachedAttentionParams& p) {
  const char* op = "cached_attention";
  require(op, p.ranges_of_group <= kMaxStreamedRanges,
          "ranges must have at most " + std::to_string(kMaxStreamedRanges) + " of a group for the kernel by TMA, got " +
              std::to_string(p.ranges_of_group) + "; pass streamed=False");
  require(op, p.slots < kMaxStreamedSlots,
          "k_cache must have fewer than 67108864 slots for the kernel by TMA, got " + std::to_string(p.slots) +
              "; pass streamed=False");
  int64_t strips = 0;
  for (int g = 0; g < p.groups; ++g) strips += ceil_div(p.group_rows[g], 64);
  require(op, ceil_div(strips, 3) * p.batch * p.heads * p.parts <= kMaxGridX,
          "B, S and H must make at most 2147483647 blocks, got " +
              std::to_string(ceil_div(strips, 3) * p.batch * p.heads * p.parts) + "; split the call");
}

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
  require(op, p.key_heads >= 1 && p.heads % p.key_heads == 0 && (p.streamed || p.key_heads == p.heads),
          "k_cache must have H=" + std::to_string(p.heads) + " heads, got " + std::to_string(p.key_heads));
  require(op, p.queries_of_row >= 1 && p.batch % p.queries_of_row == 0,
          "queries_of_row must divide B, got " + std::to_string(p.queries_of_row));
  if (p.streamed) require_streamed(p);
  require_heads(op, "q", p.q, p.batch, p.rows, p.heads, dtype);
  if (p.slots > 0) {
    require_heads(op, "k_cache", p.k, p.batch / p.queries_of_row, p.slots, p.key_heads, dtype);
    require_heads(op, "v_cache", p.v, p.batch / p.queries_of_row, p.slots, p.key_heads, dtype);
  }
  require_present(op, "ranges", p.ranges, 4);
  require_present(op, "out", p.out, 16);
  require_present(op, "out_part", p.out_part, 16);
  require_present(op, "lse", p.lse, 4);
  require_present(op, "lse_part", p.lse_part, 4);
  cached_attention_forward_kernels(p, dtype, stream);
}

}  // namespace wam
