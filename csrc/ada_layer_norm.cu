// adaLN forward: the checks, the launch shape and the three instantiations of the kernel in ada_layer_norm.cuh.
#include "ada_layer_norm.cuh"

#include <limits>

namespace wam {
namespace {

using namespace ada_layer_norm_detail;

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument("ada_layer_norm: " + message);
}

void require_address(const char* name, const void* address, std::uintptr_t alignment) {
  require(address != nullptr, std::string(name) + " must be a device address, got 0");
  require(reinterpret_cast<std::uintptr_t>(address) % alignment == 0,
          std::string(name) + " must be aligned to " + std::to_string(alignment) + " bytes, got address " +
              std::to_string(reinterpret_cast<std::uintptr_t>(address)) + "; pass a contiguous copy");
}

void check(const AdaLayerNormParams& p) {
  require(p.channels % kChannels == 0 && p.channels >= kChannels && p.channels <= kMaxChannels,
          "channels must be a multiple of " + std::to_string(kChannels) + " from " + std::to_string(kChannels) +
              " to " + std::to_string(kMaxChannels) + ", got " + std::to_string(p.channels) +
              "; normalise other widths in PyTorch");
  // one block per row, and a grid has at most 2^31 - 1 blocks in x
  require(p.rows >= 0 && p.rows <= std::numeric_limits<int32_t>::max(),
          "rows must be from 0 to 2147483647, got " + std::to_string(p.rows) + "; split the call");
  if (p.rows == 0) return;  // an empty tensor has no address to check
  require(p.frames >= 1, "frames must be at least 1, got " + std::to_string(p.frames));
  require_address("x", p.x, 16);
  require_address("scale", p.scale, 16);
  require_address("shift", p.shift, 16);
  require_address("frame_of_row", p.frame_of_row, alignof(int32_t));
  require_address("y", p.y, 16);
}

}  // namespace

void ada_layer_norm(const AdaLayerNormParams& params, DType dtype, void* stream) {
  check(params);
  if (params.rows == 0) return;

  const unsigned busy = params.channels / kChannels;
  const dim3 block((busy + kWarp - 1) / kWarp * kWarp);
  const dim3 grid(static_cast<unsigned>(params.rows));
  switch (dtype) {
    case DType::kBFloat16: return launch("ada_layer_norm", kernel<__nv_bfloat16>, grid, block, stream, params);
    case DType::kFloat16: return launch("ada_layer_norm", kernel<__half>, grid, block, stream, params);
    case DType::kFloat32: return launch("ada_layer_norm", kernel<float>, grid, block, stream, params);
  }
}

}  // namespace wam
