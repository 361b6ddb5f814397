// Arguments of the qk_norm_rope kernels, and their launches.
#pragma once

#include "common/tensors.h"

namespace wam {

struct QkNormRopeSide {
  Heads x;              // q or k
  Heads y;              // forward: the output; backward: its gradient
  Heads dx;             // backward
  const float* weight;  // [heads * head_dim], or [head_dim] with per_head
  float* dweight;       // as weight; backward
};

struct QkNormRopeParams {
  QkNormRopeSide q, k;
  Heads v, v_out;              // forward; no data: there is no v
  const float* table;          // [batch, tokens, head_dim / 2, 2]: cos and sin; contiguous but for the batch
  int64_t table_stride_batch;  // in elements; 0: the batch shares one table
  float* partials;             // [blocks, 2, width of weight]: q, then k; backward
  int64_t batch, tokens, tokens_per_block, blocks;
  int32_t heads, head_dim;
  float eps;
  bool per_head, interleaved;
};

// Check and launch, the backward with its second pass; errors as those of adaln.
void qk_norm_rope_forward(const QkNormRopeParams& params, DType dtype, void* stream);
void qk_norm_rope_backward(const QkNormRopeParams& params, DType dtype, void* stream);

// The kernels alone: kernels.cu.
void qk_norm_rope_forward_kernels(const QkNormRopeParams& params, DType dtype, void* stream);
void qk_norm_rope_backward_kernels(const QkNormRopeParams& params, DType dtype, void* stream);

}  // namespace wam
