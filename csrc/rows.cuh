// What the row-wise kernels share: tensors by address and strides, 16-byte access, sums over a block, argument checks.
//
// A thread owns VECTORS vectors of kChannels neighbouring channels of a row. Neighbouring threads own neighbouring
// vectors, so a warp's accesses are coalesced; all indices are compile-time constants, so a row stays in registers.
#pragma once

#include "cuda_or_host.h"

#include <limits>

namespace wam {

constexpr int kChannels = 8;      // of one vector: 16 bytes of bf16 or fp16, twice 16 of float32
constexpr int kWarp = 32;
constexpr int kRowThreads = 256;  // at most, so that a thread may use 255 registers
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kMaxVectors = 4;
constexpr int kMaxChannels = kChannels * kRowThreads * kMaxVectors;

// [batch, rows, channels]: free strides, in elements, but contiguous channels. Null data means that there is no tensor.
struct Rows {
  void* data;
  int64_t stride_batch;
  int64_t stride_row;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The block of a row of `vectors` vectors, VECTORS to a thread: whole warps.
inline unsigned threads_of_row(int vectors, int vectors_of_thread) {
  return static_cast<unsigned>(ceil_div(ceil_div(vectors, vectors_of_thread), kWarp) * kWarp);
}

inline void require(const char* op, bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(std::string(op) + ": " + message);
}

inline void require_aligned(const char* op, const std::string& name, const void* address, std::uintptr_t bytes) {
  const auto value = reinterpret_cast<std::uintptr_t>(address);
  require(op, value % bytes == 0,
          name + " must be aligned to " + std::to_string(bytes) + " bytes, got address " + std::to_string(value) +
              "; pass a contiguous copy");
}

inline void require_present(const char* op, const std::string& name, const void* address, std::uintptr_t bytes) {
  require(op, address != nullptr, name + " must be a device address, got 0");
  require_aligned(op, name, address, bytes);
}

// A stride counts where there is a second index to reach with it.
inline void require_stride(const char* op, const std::string& name, int64_t stride, int64_t size, DType dtype) {
  const int step = dtype == DType::kFloat32 ? 4 : 8;
  require(op, size <= 1 || stride % step == 0,
          name + " must be a multiple of " + std::to_string(step) + " elements (16 bytes), got " +
              std::to_string(stride) + "; pass a contiguous copy");
}

inline void require_rows(const char* op, const std::string& name, const Rows& t, int64_t batch, int64_t rows,
                         DType dtype) {
  require_aligned(op, name, t.data, 16);
  if (t.data == nullptr) return;
  require_stride(op, name + "'s batch stride", t.stride_batch, batch, dtype);
  require_stride(op, name + "'s row stride", t.stride_row, rows, dtype);
}

#ifdef WAM_DEVICE_CODE

// The alignment is what makes the compiler move these in 16-byte accesses.
template <class T, int N = kChannels>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
};

template <DType>
struct OfDType;
template <>
struct OfDType<DType::kBFloat16> { using T = __nv_bfloat16; };
template <>
struct OfDType<DType::kFloat16> { using T = __half; };
template <>
struct OfDType<DType::kFloat32> { using T = float; };

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

// The first channel of this thread's vector i.
__device__ inline int channel_of(int i) {
  return static_cast<int>(threadIdx.x + i * blockDim.x) * kChannels;
}

// int64 before the first multiply: tokens * channels passes 2^31 on long videos.
template <class T>
__device__ inline T* row_of(const Rows& t, int64_t batch, int64_t row) {
  return t.data == nullptr ? nullptr : static_cast<T*>(t.data) + batch * t.stride_batch + row * t.stride_row;
}

// Zeros past the last channel, and where there is no row.
template <class T>
__device__ inline Pack<T> load(const T* row, int channel, int channels) {
  return row != nullptr && channel < channels ? *reinterpret_cast<const Pack<T>*>(row + channel) : Pack<T>{};
}

template <class T>
__device__ inline void store(T* row, int channel, int channels, const Pack<T>& value) {
  if (channel < channels) *reinterpret_cast<Pack<T>*>(row + channel) = value;
}

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
