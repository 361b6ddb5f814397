// A C door to the emulated kernel, for ctypes. Compiled by test_host_emulation.py with -DWAM_HOST_EMULATION.
#include "ada_layer_norm.cu"

extern "C" {

// Returns null, or what went wrong (valid until the next call).
const char* ada_layer_norm(const void* x, const float* scale, const float* shift, const int32_t* frame_of_row, void* y,
                           int64_t rows, int64_t frames, int32_t channels, float eps, int dtype, int downwards) {
  static std::string error;
  host_emulation::launch_order = downwards ? host_emulation::Order::kDownwards : host_emulation::Order::kUpwards;
  try {
    wam::ada_layer_norm({x, scale, shift, frame_of_row, y, rows, frames, channels, eps},
                        static_cast<wam::DType>(dtype), nullptr);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

// The emulation's own 16-bit conversions, for all 65536 codes and for any float32.
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
