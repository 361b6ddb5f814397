// adaLN forward: the modulated LayerNorm in front of every attention and feed-forward of a DiT block.
//
//     y[r, c] = (x[r, c] - mean_r) * rstd_r * (1 + scale[f, c]) + shift[f, c],   f = frame_of_row[r]
//     mean_r = sum_c x[r, c] / D,   rstd_r = 1 / sqrt(sum_c (x[r, c] - mean_r)^2 / D + eps)
//
// One block owns one row and one thread owns kChannels neighbouring channels of it, so the row stays in registers:
// x is read once and the variance is taken around the mean, which E[x^2] - mean^2 would lose to cancellation.
// All arithmetic is float32; the only rounding to the dtype of x is at the store.
#pragma once

#include "cuda_or_host.h"

namespace wam {

struct AdaLayerNormParams {
  const void* x;                // [rows, channels], contiguous
  const float* scale;           // [frames, channels], contiguous
  const float* shift;           // [frames, channels], contiguous
  const int32_t* frame_of_row;  // [rows], each in [0, frames)
  void* y;                      // [rows, channels], contiguous, dtype of x
  int64_t rows;
  int64_t frames;
  int32_t channels;
  float eps;
};

// Checks and launches. Throws std::invalid_argument (ValueError) for a shape or pointer the kernel does not take and
// std::runtime_error (RuntimeError) for a launch that CUDA refuses. The caller has made the device of x current.
void ada_layer_norm(const AdaLayerNormParams& params, DType dtype, void* stream);

#ifdef WAM_DEVICE_CODE

namespace ada_layer_norm_detail {

constexpr int kChannels = 8;  // of one thread: 16 bytes of bf16 or fp16, twice 16 of float32
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxChannels = kChannels * kMaxThreads;

// The alignment is what makes the compiler move these in 16-byte accesses.
template <class T>
struct alignas(16) Pack {
  T at[kChannels];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

__device__ inline float warp_sum(float v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Every warp adds up all partial sums itself, which saves the second barrier. Two calls need two `partial` arrays:
// with one, a fast warp could overwrite it while a slow warp still reads.
__device__ inline float block_sum(float v, float* partial) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  v = warp_sum(v);
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) kernel(const __grid_constant__ AdaLayerNormParams p) {
  __shared__ float partial[2][kMaxThreads / kWarp];

  // int64 before the first multiply: rows * channels passes 2^31 on long videos
  const int64_t row = blockIdx.x;
  const int64_t frame = p.frame_of_row[row];
  const int channel = static_cast<int>(threadIdx.x) * kChannels;
  // The block is a whole number of warps; the threads past the last channel only take part in the shuffles. An index
  // outside the tables (the same branch for the whole block) is answered by a row of NaN, not by a stray read.
  const bool in_row = channel < p.channels;
  const bool in_table = frame >= 0 && frame < p.frames;

  Pack<T> x = {};
  Pack<float> scale = {}, shift = {};
  if (in_row) {
    x = *reinterpret_cast<const Pack<T>*>(static_cast<const T*>(p.x) + row * p.channels + channel);
    if (in_table) {  // asked for before the reductions, so that these loads hide behind them
      scale = *reinterpret_cast<const Pack<float>*>(p.scale + frame * p.channels + channel);
      shift = *reinterpret_cast<const Pack<float>*>(p.shift + frame * p.channels + channel);
    }
  }

  float v[kChannels], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sum += v[i] = to_float(x.at[i]);
  const float mean = block_sum(sum, partial[0]) / p.channels;

  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    v[i] = in_row ? v[i] - mean : 0.0f;  // a thread past the row would add mean^2 to the variance
    squares += v[i] * v[i];
  }
  float rstd = rsqrtf(block_sum(squares, partial[1]) / p.channels + p.eps);
  if (!in_table) rstd = NAN;

  if (!in_row) return;
  Pack<T> y;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) y.at[i] = from_float<T>(v[i] * rstd * (1.0f + scale.at[i]) + shift.at[i]);
  *reinterpret_cast<Pack<T>*>(static_cast<T*>(p.y) + row * p.channels + channel) = y;
}

}  // namespace ada_layer_norm_detail

#endif  // WAM_DEVICE_CODE

}  // namespace wam
