// Arguments of the adaln kernels, and their launches.
#pragma once

#include "common/tensors.h"

namespace wam {

enum class Norm : int32_t { kNone, kAdaptive, kAffine };

// Rows of tokens have the dtype of x; rows of modulation, tables, weights and sums are float32.
struct AdalnParams {
  Rows x, y;                // forward
  Rows r, h;                // forward: outputs; r only with y. Backward: r is an input (x where there is no y)
  Rows dr, dh, dx, dy;      // backward, with y; dr, dx and dy may be absent
  Rows gate, shift, scale;  // [batch, rows, channels]
  const float *gate_table, *shift_table, *scale_table;  // [channels] or null
  const float *weight, *bias;                           // [channels]
  const int32_t* row_of_token;                          // [tokens], forward
  const int32_t* segments;                              // [count, 3] = first token, end, row f; backward, as the next
  const int32_t *row_begin, *row_segments;              // [rows + 1], [count]: the segments of each row
  float* partials;  // [batch, segment_count, sums, channels]: dshift, dscale unless kNone, then dgate with a gate
  float *dgate, *dshift, *dscale;  // [batch, rows, channels], contiguous
  float *dweight, *dbias;          // [channels]
  int64_t batch, tokens, rows, segment_count;
  int32_t tokens_per_block;
  int32_t channels;
  float eps;
  Norm norm;
};

// Check and launch, the backward with its second pass. They throw std::invalid_argument (ValueError) for a shape,
// stride or address that the kernels do not take, std::runtime_error (RuntimeError) for a launch that CUDA refuses. The
// caller has made the device of x current and built the segments to fit the tokens.
void adaln_forward(const AdalnParams& params, DType dtype, void* stream);
void adaln_backward(const AdalnParams& params, DType dtype, void* stream);

// The kernels alone: kernels.cu.
void adaln_forward_kernels(const AdalnParams& params, DType dtype, void* stream);
void adaln_backward_kernels(const AdalnParams& params, DType dtype, void* stream);

}  // namespace wam
