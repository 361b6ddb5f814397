// Products of 16-bit tiles on tensor cores, and copies into shared memory behind the arithmetic: what needs PTX.
//
// Each function has a second, plain version for the host emulation, with the same layout of registers and shared memory,
// so that all else of a kernel is tested without a GPU. All 32 lanes of a warp call a product together.
//
//   Operand<T, K>      the 16 x K left operand of a product, in registers of a warp
//   Accumulator<N>     the 16 x N float32 result, in registers of a warp: `row_of`, `column_of` say where
//   tile in shared     [rows][D] of T in 16-byte chunks, each at `chunk_at`
//
// For sm_80 and later: mma.sync.m16n8k16, ldmatrix, cp.async.
#pragma once

#include <type_traits>

#include "rows.cuh"

namespace wam {

#ifdef WAM_DEVICE_CODE

// Where chunk `chunk` (8 numbers) of row `row` stands in a shared tile of D columns, counted in chunks. ldmatrix reads the
// same chunk of 8 neighbouring rows at once: the permutation puts them into 8 different groups of 4 banks.
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

// Registers hold two neighbouring numbers each. Lane l holds, of row l / 4 + (i % 2) * 8, the columns
// 16 j + (i / 2) * 8 + l % 4 * 2 and the next, in at[j][i].
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

// Two numbers as T, rounded to nearest even, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t packed;
#ifdef WAM_HOST_EMULATION
  const T pair[2] = {from_float<T>(first), from_float<T>(second)};
  std::memcpy(&packed, pair, sizeof packed);
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  }
#endif
  return packed;
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
      a.at[j][i] = row < rows && column < columns
                       ? *reinterpret_cast<const uint32_t*>(data + row * stride_row + column) : 0;
    }
  }
  return a;
}

#ifdef WAM_HOST_EMULATION

// ---- The same without PTX. A lane reads its operand's two rows out of the registers of the four lanes that hold them.

namespace tile_mma_detail {

template <class T>
inline float half_of(uint32_t packed, int half) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&packed) + half * sizeof(T), sizeof(T));
  return to_float(value);
}

template <class T, int D>
inline float shared_at(const T* tile, int row, int column) {
  return to_float(tile[chunk_at<D>(row, column / 8) * 8 + column % 8]);
}

template <class T, int N, int K, class B>
void multiply(Accumulator<N>& c, const Operand<T, K>& a, B b) {
  const int lane = threadIdx.x % kWarp;
  const Operand<T, K>* quad[4];
  for (int t = 0; t < 4; ++t) quad[t] = __shfl_sync(0xffffffffu, &a, lane / 4 * 4 + t);
  for (int j = 0; j < N / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      for (int k = 0; k < K; ++k) {
        const uint32_t packed = quad[k % 8 / 2]->at[k / 16][k % 16 / 8 * 2 + i / 2];
        c.at[j][i] += half_of<T>(packed, k % 2) * b(k, column_of(lane, j, i));
      }
    }
  }
  __syncwarp();  // nobody's registers change before all have read them
}

struct Copy {
  void* target;
  const void* source;
  bool there;

  void run() const { there ? std::memcpy(target, source, 16) : std::memset(target, 0, 16); }
};
inline std::vector<Copy> copies[host_emulation::kMaxThreads];  // under way, of each thread

}  // namespace tile_mma_detail

// c += a b^T; b [N][K] in shared memory.
template <class T, int N, int K>
void multiply_transposed(Accumulator<N>& c, const Operand<T, K>& a, const T* b) {
  tile_mma_detail::multiply(c, a, [b](int k, int n) { return tile_mma_detail::shared_at<T, K>(b, n, k); });
}

// c += a b; b [K][N] in shared memory.
template <class T, int N, int K>
void multiply(Accumulator<N>& c, const Operand<T, K>& a, const T* b) {
  tile_mma_detail::multiply(c, a, [b](int k, int n) { return tile_mma_detail::shared_at<T, N>(b, k, n); });
}

// A copy may take place at once or as late as the wait. One order of threads does the one, the other order the other:
// a kernel that reads too early or overwrites what is still being read gives different bits.
inline void copy_async(void* target, const void* source, bool there) {
  if (reinterpret_cast<std::uintptr_t>(target) % 16 || (there && reinterpret_cast<std::uintptr_t>(source) % 16)) {
    host_emulation::fail("copy_async needs addresses that are multiples of 16");
  }
  const tile_mma_detail::Copy copy{target, source, there};
  if (host_emulation::launch_order == host_emulation::Order::kDownwards) {
    copy.run();
  } else {
    tile_mma_detail::copies[host_emulation::block.running].push_back(copy);
  }
}

inline void copy_async_wait() {
  auto& copies = tile_mma_detail::copies[host_emulation::block.running];
  for (const auto& copy : copies) copy.run();
  copies.clear();
}

#else

// ---- With PTX.

namespace tile_mma_detail {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices; lane l names row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

template <class T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace tile_mma_detail

// c += a b^T; b [N][K] in shared memory.
template <class T, int N, int K>
__device__ inline void multiply_transposed(Accumulator<N>& c, const Operand<T, K>& a, const T* b) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < K; k += 16) {
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t m[4];
      const int row = n + lane / 16 * 8 + lane % 8, chunk = k / 8 + lane / 8 % 2;
      tile_mma_detail::load_matrices(m, b + chunk_at<K>(row, chunk) * 8);
      tile_mma_detail::mma<T>(c.at[n / 8], a.at[k / 16], m[0], m[1]);
      tile_mma_detail::mma<T>(c.at[n / 8 + 1], a.at[k / 16], m[2], m[3]);
    }
  }
}

// c += a b; b [K][N] in shared memory.
template <class T, int N, int K>
__device__ inline void multiply(Accumulator<N>& c, const Operand<T, K>& a, const T* b) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < K; k += 16) {
#pragma unroll
    for (int n = 0; n < N; n += 16) {
      uint32_t m[4];
      const int row = k + lane / 8 % 2 * 8 + lane % 8, chunk = n / 8 + lane / 16;
      tile_mma_detail::load_matrices_transposed(m, b + chunk_at<N>(row, chunk) * 8);
      tile_mma_detail::mma<T>(c.at[n / 8], a.at[k / 16], m[0], m[1]);
      tile_mma_detail::mma<T>(c.at[n / 8 + 1], a.at[k / 16], m[2], m[3]);
    }
  }
}

// Starts a copy of 16 bytes from global to shared memory, or of zeros if not `there`: `source` is then not read.
__device__ inline void copy_async(void* target, const void* source, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(tile_mma_detail::shared_address(target)), "l"(source), "r"(there ? 16 : 0) : "memory");
}

// Waits for this thread's copies; the block sees them after a barrier.
__device__ inline void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif  // WAM_HOST_EMULATION

#endif  // WAM_DEVICE_CODE

}  // namespace wam
