// Tensor maps for TMA, and the launch of kernels with one block an SM. Host code, for nvcc and the host emulation.
//
// The encoder is a function of libcuda. It is found through the runtime's entry point at the first call, so nothing
// links libcuda and the module imports on a machine without a driver. Maps are cached: a training step has the same
// addresses again and again.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "sm90.cuh"
#include "tensors.h"

#if !defined(WAM_HOST_EMULATION) && defined(__CUDACC__)
#include <cuda.h>  // types and constants alone

#include <map>
#endif

namespace wam {

constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;

// What a map is made of. Dimensions from the innermost on; a box of box[i] entries of each is copied at once.
struct BoxOfTensor {
  const void* base;
  int rank;
  std::array<int64_t, 5> size, stride;  // stride in bytes; the innermost is 2
  std::array<int32_t, 5> box;
  bool half;  // float16, else bfloat16

  bool operator<(const BoxOfTensor& other) const { return key() < other.key(); }

 private:
  std::array<int64_t, 18> key() const {
    std::array<int64_t, 18> all{static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(base)), rank, half};
    for (int i = 0; i < 5; ++i) {
      all[3 + i] = size[i];
      all[8 + i] = stride[i];
      all[13 + i] = box[i];
    }
    return all;
  }
};

#ifdef WAM_DEVICE_CODE

// What the encoder refuses without saying why: checked here, so that a message can name it.
inline void require_map(const char* op, const std::string& name, const BoxOfTensor& t) {
  require_present(op, name, t.base, 16);
  for (int i = 0; i < t.rank; ++i) {
    require(op, t.size[i] >= 1 && t.size[i] <= (int64_t{1} << 32),
            name + " must have from 1 to 4294967296 entries in every dimension for TMA, got " +
                std::to_string(t.size[i]) + "; use impl='triton'");
    require(op, i == 0 || (t.stride[i] >= 0 && t.stride[i] < kMaxStrideBytes && t.stride[i] % 16 == 0),
            name + "'s strides must be multiples of 16 bytes below 2^40 for TMA, got " + std::to_string(t.stride[i]) +
                "; pass a contiguous copy or use impl='triton'");
  }
}

#if defined(WAM_HOST_EMULATION)

inline TensorMap tensor_map(const char* op, const std::string& name, const BoxOfTensor& t) {
  require_map(op, name, t);
  TensorMap map{static_cast<const unsigned char*>(t.base), {1, 1, 1, 1, 1}, {}, {1, 1, 1, 1, 1}};
  for (int i = 0; i < t.rank; ++i) {
    map.size[i] = t.size[i];
    map.stride[i] = t.stride[i];
    map.box[i] = t.box[i];
  }
  return map;
}

template <class Params>
void launch_blocks(const char* op, void (*kernel)(Params), int64_t blocks, int threads, std::size_t shared_bytes,
                   void* stream, const Params& params) {
  (void)op, (void)stream;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx = dim3(static_cast<unsigned>(i));
    sm90_emulation::launch([&] { kernel(params); }, threads, shared_bytes);
  }
}

template <class Params>
void launch_persistent(const char* op, void (*kernel)(Params), int64_t work, std::size_t shared_bytes, void* stream,
                       const Params& params) {
  (void)work;
  launch_blocks(op, kernel, 1, sm90::kBlockThreads, shared_bytes, stream, params);
}

#else

inline void require_cuda(const char* op, const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + "); it needs an NVIDIA GPU and its driver, see `wam doctor`");
}

using TensorMapEncoder = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                      const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                      CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline TensorMapEncoder tensor_map_encoder(const char* op) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  require_cuda(op, "the driver's cuTensorMapEncodeTiled could not be found", status);
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(std::string(op) +
                             ": the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12.0 or "
                             "newer, see `wam doctor`");
  }
  return reinterpret_cast<TensorMapEncoder>(function);
}

inline TensorMap encode(const char* op, const std::string& name, const BoxOfTensor& t) {
  static const TensorMapEncoder encoder = tensor_map_encoder(op);
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  TensorMap map{};
  cuuint64_t size[5], stride[4];
  cuuint32_t box[5], every[5];
  for (int i = 0; i < t.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(t.size[i]);
    box[i] = static_cast<cuuint32_t>(t.box[i]);
    every[i] = 1;
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(t.stride[i]);
  }
  const CUresult status = encoder(reinterpret_cast<CUtensorMap*>(&map),
                                  t.half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                  static_cast<cuuint32_t>(t.rank), const_cast<void*>(t.base), size, stride, box, every,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::string shape;
    for (int i = 0; i < t.rank; ++i) shape += " " + std::to_string(t.size[i]) + ":" + std::to_string(t.stride[i]);
    throw std::runtime_error(std::string(op) + ": the driver refuses a tensor map of " + name + " (CUresult " +
                             std::to_string(status) + "; entries:stride in bytes" + shape + "); use impl='triton'");
  }
  return map;
}

inline TensorMap tensor_map(const char* op, const std::string& name, const BoxOfTensor& t) {
  constexpr std::size_t kMost = 1024;  // of a thread; then it begins anew
  thread_local std::map<BoxOfTensor, TensorMap> cache;
  const auto found = cache.find(t);
  if (found != cache.end()) return found->second;
  require_map(op, name, t);
  if (cache.size() >= kMost) cache.clear();
  return cache.emplace(t, encode(op, name, t)).first->second;
}

// Blocks with more shared memory than a kernel gets without asking: one of them fits an SM.
template <class Params>
void launch_blocks(const char* op, void (*kernel)(Params), int64_t blocks, int threads, std::size_t shared_bytes,
                   void* stream, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  require_cuda(
      op, "the CUDA kernel could not be given its shared memory",
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  void* arguments[] = {const_cast<Params*>(&params)};
  require_cuda(op, "the CUDA kernel could not be launched",
               cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                                arguments, shared_bytes, static_cast<cudaStream_t>(stream)));
}

// One block an SM, at most one for every piece of `work`; the blocks draw their work themselves.
template <class Params>
void launch_persistent(const char* op, void (*kernel)(Params), int64_t work, std::size_t shared_bytes, void* stream,
                       const Params& params) {
  int device = 0, processors = 0;
  require_cuda(op, "there is no current device", cudaGetDevice(&device));
  require_cuda(op, "the device's number of SMs cannot be read",
               cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  launch_blocks(op, kernel, std::min<int64_t>(work, processors), sm90::kBlockThreads, shared_bytes, stream, params);
}

#endif

#endif  // WAM_DEVICE_CODE

}  // namespace wam
