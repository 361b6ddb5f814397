// Arguments of the block_attention kernels, and their launch.
#pragma once

#include "common/tensors.h"

namespace wam {

// One side of a plan as boxes (wam_kernels/plan/boxes.py); index tensors of int32, contiguous.
struct BoxSide {
  const int32_t* tiles;   // [tiles, 8]
  const int32_t* rows;    // [tiles, 128]: token of each row, -1 for none
  const int32_t* full;    // [full steps]: first token
  const int32_t* boxes;   // [masked steps, 2]: first token | gap << 26
  const uint32_t* words;  // [masked steps, 2, 128]: what each thread of a half masks
  int64_t n_tiles;
};

struct BlockAttentionParams {
  Heads q, k, v;          // [batch, rows, heads, head_dim]; [batch, tokens, key_heads, head_dim]
  BoxSide queries, keys;  // keys: of the backward alone
  bool shared;            // the plan's one batch element serves all of the batch
  int64_t batch, rows, tokens;
  int32_t heads, key_heads, head_dim;
  float scale;
  int32_t* counters;  // two work counters, 0 at the launch
  Heads out;          // [batch, rows, heads, head_dim], contiguous; read by the backward
  float* lse;         // [batch, heads, rows]; likewise
  // the backward alone
  Heads dout;         // as out, free strides
  const float* dlse;  // as lse
  float* delta;       // as lse: scratch
  Heads dq, dk, dv;   // contiguous
};

// Check and launch; bf16 and fp16, head_dim a multiple of 8 up to 128. Tensors that TMA cannot take are refused by
// name.
void block_attention_forward(const BlockAttentionParams& params, DType dtype, void* stream);
// dq, then dk and dv: two launches.
void block_attention_backward(const BlockAttentionParams& params, DType dtype, void* stream);

// The kernels alone: kernels_sm90a.cu.
void block_attention_forward_kernel(const BlockAttentionParams& params, DType dtype, void* stream);
void block_attention_backward_kernels(const BlockAttentionParams& params, DType dtype, void* stream);

}  // namespace wam
