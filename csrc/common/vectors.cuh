// Numbers of every dtype as float, and access to tensors in 16 bytes.
#pragma once

#include "tensors.h"

namespace wam {

constexpr int kWarp = 32;

#ifdef WAM_DEVICE_CODE

// The alignment is what makes the compiler move these in 16-byte accesses.
template <class T, int N = kChannels>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
};

// Calls run(zero) with a zero of the C++ type of `dtype`.
template <class Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
    case DType::kFloat16:
      return run(__half{});
    case DType::kFloat32:
      return run(float{});
  }
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// int64 before the first multiply: tokens * channels passes 2^31 on long videos.
template <class T>
__device__ inline T* row_of(const Rows& t, int64_t batch, int64_t row) {
  return t.data == nullptr ? nullptr : static_cast<T*>(t.data) + batch * t.stride_batch + row * t.stride_row;
}

template <class T>
__device__ inline T* head_of(const Heads& t, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.stride_batch + token * t.stride_token + head * t.stride_head;
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

#endif  // WAM_DEVICE_CODE

}  // namespace wam
