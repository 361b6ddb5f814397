// What every kernel header includes: the CUDA language, from nvcc or from the host emulation, and the launch.
//
// nvcc                        real CUDA
// g++ -DWAM_HOST_EMULATION    host_emulation.h, so that the same kernel source runs on a CPU
// g++ alone                   declarations only (launch.cpp, module.cpp): no CUDA header is needed
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(WAM_HOST_EMULATION)
#include "host_emulation.h"
#elif defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#if defined(WAM_HOST_EMULATION) || defined(__CUDACC__)
#define WAM_DEVICE_CODE 1
#endif

namespace wam {

enum class DType { kBFloat16, kFloat16, kFloat32 };

#ifdef WAM_DEVICE_CODE

// Launches `kernel` on `stream` (a cudaStream_t as void*; null is the default stream) and does not wait for it.
// Throws std::runtime_error, a RuntimeError in Python, when the launch itself is refused.
template <class Params>
void launch(const char* op, void (*kernel)(Params), dim3 grid, dim3 block, void* stream, const Params& params) {
#ifdef WAM_HOST_EMULATION
  (void)op, (void)stream;
  host_emulation::launch(kernel, grid, block, params);
#else
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t status = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments,
                                              /*sharedMem=*/0, static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": the CUDA kernel could not be launched: " + cudaGetErrorName(status) +
                             " (" + cudaGetErrorString(status) +
                             "); it needs an NVIDIA GPU and its driver, see `wam doctor`");
  }
#endif
}

#endif  // WAM_DEVICE_CODE

}  // namespace wam
