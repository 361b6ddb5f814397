// One row by one block, for the kernels of the norms: how threads share a row, and sums over a block.
//
// A thread owns VECTORS vectors of kChannels neighbouring channels of a row. Neighbouring threads own neighbouring
// vectors, so a warp's accesses are coalesced; all indices are compile-time constants, so a row stays in registers.
#pragma once

#include "vectors.cuh"

namespace wam {

constexpr int kRowThreads = 256;  // at most, so that a thread may use 255 registers
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kMaxVectors = 4;
constexpr int kMaxChannels = kChannels * kRowThreads * kMaxVectors;

// The block of a row of `vectors` vectors, `vectors_of_thread` to a thread: whole warps.
inline unsigned threads_of_row(int vectors, int vectors_of_thread) {
  return static_cast<unsigned>(ceil_div(ceil_div(vectors, vectors_of_thread), kWarp) * kWarp);
}

#ifdef WAM_DEVICE_CODE

// The first channel of this thread's vector i.
__device__ inline int channel_of(int i) { return static_cast<int>(threadIdx.x + i * blockDim.x) * kChannels; }

__device__ inline float warp_sum(float v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Replaces each of N values by its sum over the block, the same bits in every thread. Every thread adds the warps' sums
// itself, which saves a second barrier. So a loop needs two `partial` arrays and takes them in turn: with one, a fast
// warp could overwrite it while a slow warp still reads.
template <int N>
__device__ inline void block_sum(float (&v)[N], float (&partial)[N][kRowWarps]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = warp_sum(v[n]);
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) partial[n][warp] = v[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    v[n] = partial[n][0];
    for (int w = 1; w < warps; ++w) v[n] += partial[n][w];
  }
}

#endif  // WAM_DEVICE_CODE

}  // namespace wam
