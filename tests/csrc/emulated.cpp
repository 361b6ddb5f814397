// Beside the kernels of the emulated module, C functions for ctypes: the order of threads and of what the hardware does
// on its own, and the 16-bit conversions.
#include "common/sm90.cuh"

extern "C" {

void launch_downwards(int downwards) {
  host_emulation::launch_order = downwards ? host_emulation::Order::kDownwards : host_emulation::Order::kUpwards;
}

// prefer: 0 any, 1 products at once, 2 copies at once; see sm90_emulation.h.
void sm90_order(unsigned seed, double chance, int prefer, int by_priority) {
  sm90_emulation::order = {seed, chance, static_cast<sm90_emulation::Prefer>(prefer), by_priority != 0};
}

// The emulation's own 16-bit conversions, for n codes and for any float32.
void decode(uint16_t first, int n, float* bf16, float* fp16) {
  for (int i = 0; i < n; ++i) {
    bf16[i] = __bfloat162float({static_cast<uint16_t>(first + i)});
    fp16[i] = __half2float({static_cast<uint16_t>(first + i)});
  }
}

void encode(const float* v, int n, uint16_t* bf16, uint16_t* fp16) {
  for (int i = 0; i < n; ++i) {
    bf16[i] = __float2bfloat16_rn(v[i]).bits;
    fp16[i] = __float2half_rn(v[i]).bits;
  }
}

}  // extern "C"
