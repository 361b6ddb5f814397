// The second pass of every reduction over tokens: adds partial sums in a fixed order, so that results are the same from
// run to run without atomics.
//
//     out[slot][b, f, c] = sum_i partials[b, n_i, first_slot + slot, c],   n_i the partials of row f
//
// A block owns some channels of one row of one slot. It has blockDim.y groups; group g adds every blockDim.y-th partial
// from the g-th on, then the groups' sums are added in order. All float32. A row without partials is written as 0.
#pragma once

#include "cuda_or_host.h"

namespace wam {

constexpr int kMaxSlots = 3;

struct SumPartialsParams {
  const float* partials;        // [batch, count, slots, channels], contiguous; channels a multiple of 8
  const int32_t* row_begin;     // [rows + 1] into row_partials; null: one row, which has all
  const int32_t* row_partials;  // [count]
  float* out[kMaxSlots];        // [batch, rows, channels] each; the first null ends the list
  int64_t batch;
  int64_t rows;
  int64_t count;
  int32_t slots;
  int32_t first_slot;
  int32_t channels;
};

// Launches on `stream`; `op` is named in errors.
void sum_partials(const char* op, const SumPartialsParams& params, void* stream);

}  // namespace wam
