// Products of 16-bit tiles on tensor cores: all PTX is here.
//
// Four functions are PTX: pack, load_matrices, load_matrices_transposed, mma. Each has a second version for the host
// emulation that does what the PTX ISA says of the instruction, lane by lane, so that all that is built on them, their
// operands' layouts included, is tested without a GPU.
//
//   Operand<T, K>      the 16 x K left operand of a product, in registers of a warp
//   Accumulator<N>     the 16 x N float32 result, in registers of a warp
//   tile in shared     [rows][D] of T in 16-byte chunks, each at `chunk_at`
//
// For sm_80 and later: mma.sync.m16n8k16, ldmatrix. All 32 lanes of a warp call a product together.
#pragma once

#include <type_traits>

#include "copy_async.cuh"
#include "vectors.cuh"

namespace wam {

#ifdef WAM_DEVICE_CODE

// Where chunk `chunk` (8 numbers) of row `row` stands in a shared tile of D columns, counted in chunks. ldmatrix reads
// the same chunk of 8 neighbouring rows at once: the permutation puts them into 8 different groups of 4 banks.
template <int D>
__device__ constexpr int chunk_at(int row, int chunk) {
  static_assert(D % 32 == 0, "a row must be whole 64-byte halves of the banks");
  return row * (D / 8) + (chunk ^ (D % 64 == 0 ? row % 8 : row / 2 % 4));
}

template <int D>
__device__ constexpr bool free_of_bank_conflicts() {
  for (int first = 0; first < 16; first += 8) {
    for (int chunk = 0; chunk < D / 8; ++chunk) {
      int groups = 0;
      for (int row = first; row < first + 8; ++row) groups |= 1 << chunk_at<D>(row, chunk) % 8;
      if (groups != 0xff) return false;
    }
  }
  return true;
}
static_assert(free_of_bank_conflicts<32>() && free_of_bank_conflicts<64>() && free_of_bank_conflicts<96>() &&
              free_of_bank_conflicts<128>());

// Registers hold two neighbouring numbers each. Lane l holds, of row l / 4 + i % 2 * 8, the columns
// 16 j + i / 2 * 8 + l % 4 * 2 and the next, in at[j][i].
template <class T, int K>
struct Operand {
  static_assert(K % 16 == 0 && sizeof(T) == 2);
  uint32_t at[K / 16][4];
};

// Lane l holds row_of(l, i), column_of(l, j, i) in at[j][i].
template <int N>
struct Accumulator {
  static_assert(N % 16 == 0);
  float at[N / 8][4];
};

__device__ constexpr int row_of(int lane, int i) { return lane / 4 + i / 2 * 8; }
__device__ constexpr int column_of(int lane, int j, int i) { return j * 8 + lane % 4 * 2 + i % 2; }

#ifdef WAM_HOST_EMULATION

namespace tile_mma_detail {

template <class T>
inline float half_of(uint32_t packed, int half) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&packed) + half * sizeof(T), sizeof(T));
  return to_float(value);
}

// Calls read(of), where of(lane) is what that lane of the warp calls `mine`.
template <class V, class Read>
inline void read_all_lanes(const V& mine, Read read) {
  auto& block = host_emulation::block;
  const int begin = block.running / kWarp * kWarp;
  block.exchange[block.running] = reinterpret_cast<std::uint64_t>(&mine);
  __syncwarp();
  read([&](int lane) -> const V& { return *reinterpret_cast<const V*>(block.exchange[begin + lane]); });
  __syncwarp();  // nobody's registers change before all have read
}

inline void load_any(uint32_t (&m)[4], const void* row, bool transposed) {
  const int lane = threadIdx.x % kWarp;
  if (reinterpret_cast<std::uintptr_t>(row) % 16) host_emulation::fail("ldmatrix needs rows at multiples of 16 bytes");
  read_all_lanes(row, [&](auto row_of_lane) {
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int n = 0; n < 2; ++n) {
        const int r = transposed ? lane % 4 * 2 + n : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + n;
        std::memcpy(&pair[n], static_cast<const uint16_t*>(row_of_lane(8 * i + r)) + c, sizeof pair[n]);
      }
      std::memcpy(&m[i], pair, sizeof m[i]);
    }
  });
}

}  // namespace tile_mma_detail

template <class T>
inline uint32_t pack(float first, float second) {
  const T pair[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t packed;
  std::memcpy(&packed, pair, sizeof packed);
  return packed;
}

inline void load_matrices(uint32_t (&m)[4], const void* row) { tile_mma_detail::load_any(m, row, false); }
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) { tile_mma_detail::load_any(m, row, true); }

template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using tile_mma_detail::half_of;
  struct Registers {
    uint32_t a[4], b[2];
  };
  const int lane = threadIdx.x % kWarp;
  tile_mma_detail::read_all_lanes(Registers{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto of) {
    for (int i = 0; i < 4; ++i) {
      const int row = row_of(lane, i), column = column_of(lane, 0, i);
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = of(row % 8 * 4 + k % 8 / 2).a[k / 8 * 2 + row / 8];
        const uint32_t right = of(column * 4 + k % 8 / 2).b[k / 8];
        c[i] += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
      }
    }
  });
}

#else

namespace tile_mma_detail {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace tile_mma_detail

// Two numbers as T, rounded to nearest even, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  }
  return packed;
}

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8. It gets, of row l / 4 of each matrix,
// the columns l % 4 * 2 and the next.
__device__ inline void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(tile_mma_detail::shared_address(row))
               : "memory");
}

// The same with each matrix transposed: of column l / 4 the rows l % 4 * 2 and the next.
__device__ inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(tile_mma_detail::shared_address(row))
               : "memory");
}

// c [16][8] += a [16][16] b [16][8]. Lane l holds b's rows l % 4 * 2 and the next of column l / 4 in b0, those 8
// further down in b1.
template <class T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define WAM_MMA(TYPE)                                                   \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE            \
      ".f32 "                                                           \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __half>) {
    WAM_MMA("f16");
  } else {
    WAM_MMA("bf16");
  }
#undef WAM_MMA
}

#endif  // WAM_HOST_EMULATION

// The first `columns` (a multiple of 8) of 16 rows in global memory; zeros past them and from row `rows` on.
template <class T, int K>
__device__ inline Operand<T, K> load_operand(const T* data, int64_t stride_row, int rows, int columns) {
  const int lane = threadIdx.x % kWarp;
  Operand<T, K> a;
#pragma unroll
  for (int j = 0; j < K / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8, column = 16 * j + i / 2 * 8 + lane % 4 * 2;
      const bool exists = row < rows && column < columns;
      a.at[j][i] = exists ? *reinterpret_cast<const uint32_t*>(data + row * stride_row + column) : 0;
    }
  }
  return a;
}

template <class T, int K>
__device__ inline void change_sign(Operand<T, K>& a) {
#pragma unroll
  for (int j = 0; j < K / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.at[j][i] ^= 0x80008000u;
  }
}

// An accumulator rounded to T. Lanes hold the same places of both, so nothing moves between them.
template <class T, int N>
__device__ inline Operand<T, N> to_operand(const Accumulator<N>& c) {
  Operand<T, N> a;
#pragma unroll
  for (int j = 0; j < N / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &c.at[2 * j + i / 2][i % 2 * 2];
      a.at[j][i] = pack<T>(pair[0], pair[1]);
    }
  }
  return a;
}

namespace tile_mma_detail {

// c += a b. load(m, k, n) gives, as `mma` wants them, b's rows k to k + 7 and k + 8 to k + 15 with the columns n to
// n + 7, then the same rows of the next 8 columns.
template <class T, int N, int K, class Load>
__device__ inline void multiply_loaded(Accumulator<N>& c, const Operand<T, K>& a, Load load) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t m[4];
      load(m, k, n);
      mma<T>(c.at[n / 8], a.at[k / 16], m[0], m[1]);
      mma<T>(c.at[n / 8 + 1], a.at[k / 16], m[2], m[3]);
    }
  }
}

}  // namespace tile_mma_detail

// c += a b^T; b [N][K] in shared memory.
template <class T, int N, int K>
__device__ inline void multiply_transposed(Accumulator<N>& c, const Operand<T, K>& a, const T* b) {
  const int lane = threadIdx.x % kWarp;
  tile_mma_detail::multiply_loaded(c, a, [=](uint32_t (&m)[4], int k, int n) {
    const int row = n + lane / 16 * 8 + lane % 8, chunk = k / 8 + lane / 8 % 2;
    load_matrices(m, b + chunk_at<K>(row, chunk) * 8);
  });
}

// c += a b; b [K][N] in shared memory.
template <class T, int N, int K>
__device__ inline void multiply(Accumulator<N>& c, const Operand<T, K>& a, const T* b) {
  const int lane = threadIdx.x % kWarp;
  tile_mma_detail::multiply_loaded(c, a, [=](uint32_t (&m)[4], int k, int n) {
    const int row = k + lane / 8 % 2 * 8 + lane % 8, chunk = n / 8 + lane / 16;
    load_matrices_transposed(m, b + chunk_at<N>(row, chunk) * 8);
  });
}

#endif  // WAM_DEVICE_CODE

}  // namespace wam
