// Tensors as the kernels take them, by address and strides, and what every launch checks of its arguments.
#pragma once

#include <limits>
#include <string>

#include "cuda_or_host.h"

namespace wam {

constexpr int kChannels = 8;  // of one vector: 16 bytes of bf16 or fp16, twice 16 of float32

// What CUDA allows of a grid in x, and in y and in z.
constexpr int64_t kMaxGridX = std::numeric_limits<int32_t>::max(), kMaxGridYZ = 65535;

// [batch, rows, channels]: free strides, in elements, but contiguous channels. Null data means that there is no tensor.
struct Rows {
  void* data;
  int64_t stride_batch;
  int64_t stride_row;
};

// [batch, tokens, heads, head_dim]: free strides, in elements, but contiguous channels.
struct Heads {
  void* data;
  int64_t stride_batch;
  int64_t stride_token;
  int64_t stride_head;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Kernels move 16 bytes at once, so every row of every head must begin at a multiple of 16.
inline void require_heads(const char* op, const std::string& name, const Heads& t, int64_t batch, int64_t tokens,
                          int64_t heads, DType dtype) {
  require_present(op, name, t.data, 16);
  require_stride(op, name + "'s batch stride", t.stride_batch, batch, dtype);
  require_stride(op, name + "'s token stride", t.stride_token, tokens, dtype);
  require_stride(op, name + "'s head stride", t.stride_head, heads, dtype);
}

}  // namespace wam
