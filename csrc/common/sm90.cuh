// What the kernels of one block an SM take of sm_90a, each either PTX or its twin in sm90_emulation.h.
//
// Vocabulary: a *warpgroup* is 128 threads that multiply together (wgmma); *TMA* copies boxes of a tensor, described by
// a tensor map, into shared memory and counts the bytes at an *mbarrier*, whose phases threads wait for by parity.
#pragma once

#include "cuda_or_host.h"

#if defined(WAM_HOST_EMULATION)
#include "sm90_emulation.h"
#elif defined(__CUDACC__)
#include "wgmma.cuh"
#endif

// Bodies of kernels that need sm_90a stand between #ifdef WAM_SM90A and #endif: for other architectures they are empty,
// and the launch is refused by name.
#if defined(WAM_HOST_EMULATION) || \
    (defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)))
#define WAM_SM90A 1
#endif

#ifdef WAM_DEVICE_CODE

#if !defined(WAM_HOST_EMULATION)
namespace wam {
// What cuTensorMapEncodeTiled writes; opaque.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};
}  // namespace wam
#endif

namespace wam::sm90 {

constexpr int kBlockThreads = 384;  // of most kernels: one warpgroup that copies, two that compute

#if defined(WAM_HOST_EMULATION)

namespace emu = sm90_emulation;

inline int thread_index() { return emu::current; }
inline int block_index() { return static_cast<int>(blockIdx.x); }
inline unsigned char* shared_memory() { return emu::shared; }
inline uint32_t shared_address(const void* p) { return emu::address_of(p); }

inline void sync_block() { emu::gather(emu::block_meeting, emu::n_threads, "sync_block"); }
inline void sync_warp() { emu::gather(emu::warp_meeting[emu::current / emu::kWarp], emu::kWarp, "sync_warp"); }
inline void sync_named(int id, int threads) { emu::gather(emu::named_meeting[id], threads, "bar.sync"); }
inline float shuffle_xor(float v, int mask) { return emu::shuffle(v, (emu::current % emu::kWarp) ^ mask); }
template <class T>
T from_lane(T v, int lane) {
  return emu::shuffle(v, lane);
}
template <class T>
T from_lane_0(T v) {
  return emu::shuffle(v, 0);
}
inline int warp_min(int v) {
  return emu::reduce(v, [](int a, int b) { return std::min(a, b); });
}
inline uint32_t warp_or(uint32_t v) {
  return emu::reduce(v, [](uint32_t a, uint32_t b) { return a | b; });
}

inline void barrier_init(uint64_t* b, int count) { emu::barriers[b] = {count, count, 0, 0, {}}; }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* b) { emu::arrive(b, 0); }
inline void barrier_arrive_expect(uint64_t* b, int bytes) { emu::arrive(b, bytes); }
inline void barrier_wait(uint64_t* b, int parity) { emu::wait_for(b, parity); }

inline void tma_load(void* to, const TensorMap* map, uint64_t* full, int c0, int c1, int c2, int c3) {
  emu::tma_load(to, map, full, {c0, c1, c2, c3, 0});
}
inline void tma_load(void* to, const TensorMap* map, uint64_t* full, int c0, int c1, int c2, int c3, int c4) {
  emu::tma_load(to, map, full, {c0, c1, c2, c3, c4});
}
inline void copy_async16(void* to, const void* from, bool there) { emu::copy_async16(to, from, there); }
inline void copy_async_wait_all() { emu::copy_async_wait_all(); }
inline void fence_async_proxy() { emu::fence_async_proxy(); }

inline void wgmma_fence() { emu::warpgroups[emu::current / emu::kWarpgroup].fenced[emu::current % 128] = true; }
inline void wgmma_commit() { ++emu::warpgroups[emu::current / emu::kWarpgroup].group[emu::current % 128]; }
template <int kPending>
void wgmma_wait() {
  emu::wait_groups(kPending);
}
template <class T, int N>
struct Wgmma {
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  template <bool kTransposed>
  static void registers(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emu::issue({N, kHalf, kTransposed, true, accumulate, 0, b, 0, {}, {}, {}}, sums, a);
  }
  static void shared(float (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    emu::issue({N, kHalf, false, false, accumulate, a, b, 0, {}, {}, {}}, sums, nullptr);
  }
};

template <int N>
void registers_take() {
  emu::take_registers(N);
}
template <int N>
void registers_give() {
  emu::give_registers(N);
}

inline int32_t draw(int32_t* counter) { return (*counter)++; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline uint32_t pack(float low, float high, __nv_bfloat16) {
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}
inline uint32_t pack(float low, float high, __half) {
  return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
}
inline float low(uint32_t two, __nv_bfloat16) { return __bfloat162float({static_cast<uint16_t>(two)}); }
inline float high(uint32_t two, __nv_bfloat16) { return __bfloat162float({static_cast<uint16_t>(two >> 16)}); }
inline float low(uint32_t two, __half) { return __half2float({static_cast<uint16_t>(two)}); }
inline float high(uint32_t two, __half) { return __half2float({static_cast<uint16_t>(two >> 16)}); }

#else

#define WAM_SM90 __device__ __forceinline__

WAM_SM90 int thread_index() { return static_cast<int>(threadIdx.x); }
WAM_SM90 int block_index() { return static_cast<int>(blockIdx.x); }
// Declared with its alignment: rounding the pointer up would cost the address space, and so generic loads.
WAM_SM90 unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}
WAM_SM90 uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

WAM_SM90 void sync_block() { __syncthreads(); }
WAM_SM90 void sync_warp() { __syncwarp(); }
WAM_SM90 void sync_named(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
WAM_SM90 float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
template <class T>
WAM_SM90 T from_lane(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
// The compiler then knows that all lanes have the same value, and keeps it in a uniform register.
template <class T>
WAM_SM90 T from_lane_0(T v) {
  return __shfl_sync(0xffffffffu, v, 0);
}

WAM_SM90 int warp_min(int v) { return __reduce_min_sync(0xffffffffu, v); }
WAM_SM90 uint32_t warp_or(uint32_t v) { return __reduce_or_sync(0xffffffffu, v); }

WAM_SM90 void barrier_init(uint64_t* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count));
}
WAM_SM90 void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
WAM_SM90 void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
WAM_SM90 void barrier_arrive_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity is complete.
WAM_SM90 void barrier_wait(uint64_t* b, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra.uni DONE_%=;\n"
      "bra.uni WAIT_%=;\n"
      "DONE_%=:\n"
      "}\n" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// Copies one box to `to`; its bytes count at `full`. Coordinates from the innermost dimension on.
WAM_SM90 void tma_load(void* to, const TensorMap* map, uint64_t* full, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(full)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
WAM_SM90 void tma_load(void* to, const TensorMap* map, uint64_t* full, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(full)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// 16 bytes, or zeros where there is nothing to copy.
WAM_SM90 void copy_async16(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
WAM_SM90 void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
WAM_SM90 void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

WAM_SM90 void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
WAM_SM90 void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending committed groups of products are under way.
template <int kPending>
WAM_SM90 void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int N>
WAM_SM90 void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
WAM_SM90 void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

WAM_SM90 int32_t draw(int32_t* counter) { return atomicAdd(counter, 1); }
WAM_SM90 float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers as the 16-bit halves of a register; the last argument only names the type.
WAM_SM90 uint32_t pack(float low, float high, __nv_bfloat16) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
WAM_SM90 uint32_t pack(float low, float high, __half) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
WAM_SM90 float low(uint32_t two, __nv_bfloat16) { return __uint_as_float(two << 16); }
WAM_SM90 float high(uint32_t two, __nv_bfloat16) { return __uint_as_float(two & 0xffff0000u); }
WAM_SM90 float low(uint32_t two, __half) { return __half2float(__ushort_as_half(static_cast<uint16_t>(two))); }
WAM_SM90 float high(uint32_t two, __half) { return __half2float(__ushort_as_half(static_cast<uint16_t>(two >> 16))); }

#undef WAM_SM90

#endif

// A matrix in shared memory as wgmma takes it: 128-byte swizzle; distances in bytes.
__device__ __forceinline__ uint64_t descriptor(const void* start, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((shared_address(start) & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}
// The same `by` 16-byte units further on. The address is in the low half and never carries into the other one.
__device__ __forceinline__ uint64_t moved(uint64_t matrix, uint32_t low_half, int by) {
  return matrix >> 32 << 32 | (low_half + static_cast<uint32_t>(by));
}

}  // namespace wam::sm90

#endif  // WAM_DEVICE_CODE
