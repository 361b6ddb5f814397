// Arguments of the cached_attention kernels, and their launch.
#pragma once

#include "common/tensors.h"

namespace wam {

constexpr int kMaxGroups = 4;
constexpr int kMaxStreamedRanges = 32;  // of a group, for the kernel of streamed_sm90a.cu: one a lane

struct CachedAttentionParams {
  // [batch, rows, heads, head_dim]; [batch / queries_of_row, slots, key_heads, head_dim]
  Heads q, k, v;
  const int32_t* ranges;  // [batch, groups, ranges_of_group, 2]: start and end of slots; contiguous
  float* out_part;        // [parts, batch, heads, rows, head_dim]
  float* lse_part;        // [parts, batch, heads, rows]
  void* out;              // [batch, rows, heads, head_dim], contiguous
  float* lse;             // [batch, heads, rows]
  int64_t batch, rows, slots;
  int32_t heads, key_heads, head_dim, groups, ranges_of_group, parts;
  int32_t queries_of_row;          // batch elements of q, one after the other, that share one of the cache
  int32_t group_rows[kMaxGroups];  // they sum to rows
  float scale;
  bool streamed;  // the part kernel of streamed_sm90a.cu, which alone takes key_heads; else that of
                  // kernels.cu
  // What takes products to base 2, above 0; the launch sets it. An argument: as a constant it costs no register.
  float to_base2;
};

// Checks and launches both kernels; errors as those of adaln. bf16 and fp16 only.
void cached_attention_forward(const CachedAttentionParams& params, DType dtype, void* stream);

// The kernels alone: kernels.cu, and of them the part kernel of streamed_sm90a.cu.
void cached_attention_forward_kernels(const CachedAttentionParams& params, DType dtype, void* stream);
void cached_attention_streamed_part(const CachedAttentionParams& params, DType dtype, void* stream);

}  // namespace wam
