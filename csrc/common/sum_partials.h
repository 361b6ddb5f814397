// The second pass of every reduction over tokens: adds partial sums in a fixed order, so that results are the same from
// run to run without atomics.
//
//     out[s][b, f, c] = sum_i partials[b, n_i, first_sum + s, c],   n_i the partials of row f
//
// A block owns some channels of one row of one sum. It has blockDim.y lines of threads; line y adds every blockDim.y-th
// partial from the y-th on, then the lines' sums are added in order. All float32. A row without partials is written as
// 0.
#pragma once

#include "cuda_or_host.h"

namespace wam {

constexpr int kMaxSums = 3;

struct SumPartialsParams {
  const float* partials;        // [batch, count, sums, channels], contiguous; channels a multiple of 8
  const int32_t* row_begin;     // [rows + 1] into row_partials; null: one row, which has all
  const int32_t* row_partials;  // [count]
  float* out[kMaxSums];         // [batch, rows, channels] each; the first null ends the list
  int64_t batch;
  int64_t rows;
  int64_t count;
  int32_t sums;
  int32_t first_sum;
  int32_t channels;
};

// Launches on `stream`; `op` is named in errors.
void sum_partials(const char* op, const SumPartialsParams& params, void* stream);

}  // namespace wam
