// A kernel that is right for kNone and has one fault otherwise; test_host_emulation.py checks what the emulation says.
#include "common/cuda_or_host.h"

enum Fault { kNone, kExitsBeforeBlockBarrier, kLaneExitsBeforeShuffle, kPartialMask, kNoBarrier };

struct Params {
  float* values;  // [64], rotated by one in place
  int fault;
};

__global__ void rotate(const __grid_constant__ Params p) {
  __shared__ float shared[64];
  const int i = threadIdx.x;
  if (i < 64) shared[i] = p.values[i];
  if (p.fault == kExitsBeforeBlockBarrier && i >= 64) return;
  if (p.fault == kLaneExitsBeforeShuffle && i == 5) return;
  if (p.fault == kLaneExitsBeforeShuffle) __shfl_xor_sync(0xffffffffu, i, 1);
  if (p.fault == kPartialMask) __syncwarp(0x0000ffffu);
  if (p.fault != kNoBarrier) __syncthreads();
  if (i < 64) p.values[i] = shared[(i + 1) % 64];
}

extern "C" const char* run(float* values, int fault, int threads, int downwards) {
  static std::string error;
  host_emulation::launch_order = downwards ? host_emulation::Order::kDownwards : host_emulation::Order::kUpwards;
  try {
    wam::launch("rotate", rotate, dim3(1), dim3(threads), nullptr, Params{values, fault});
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
