// CUDA on a CPU, enough to run a kernel's own source in a unit test: g++ -x c++ -DWAM_HOST_EMULATION kernel.cu
//
// A block runs at a time. Each of its threads is a fiber (ucontext) that runs until it waits at a barrier. Warps run
// one after the other, each as far as it gets before the next block barrier, and so do the lanes of a warp before the
// next warp barrier. So:
//
//   - a barrier that not every thread reaches, or a shuffle in a warp that has lost a lane, is reported, not hung;
//   - a kernel whose answer depends on the order of warps or lanes is missing a barrier. `launch_order` turns that
//     order round: run both and compare the bits. That finds many races, not all.
//
// Not here: inline PTX, wgmma, TMA, clusters, dynamic shared memory, atomics across blocks that wait on each other,
// partial masks. Shared variables keep the last block's values instead of starting undefined.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time, so one copy serves

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned size() const { return x * y * z; }
};

inline dim3 gridDim, blockDim, blockIdx;

namespace host_emulation {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr std::size_t kStackBytes = 128 * 1024;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kExited };
enum class Order { kUpwards, kDownwards };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  State state = State::kExited;
};

struct Block {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  int running = 0;
  std::function<void()> body;
  std::string error;                    // set by a fiber; thrown by the scheduler, off the fiber's stack
  std::uint64_t exchange[kMaxThreads];  // what each thread offers to a shuffle
};

inline Block block;
inline Order launch_order = Order::kUpwards;

inline Thread& running() { return block.threads[block.running]; }

inline void wait(State state) {
  running().state = state;
  swapcontext(&running().context, &block.scheduler);
}

[[noreturn]] inline void fail(const std::string& message) {
  block.error = message;
  wait(State::kExited);
  __builtin_unreachable();
}

inline void fiber_main() {
  block.body();
  wait(State::kExited);
}

inline void start(Thread& thread, dim3 index) {
  // `new char[]` rather than a vector: untouched stack pages then cost nothing
  if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
  thread.index = index;
  thread.state = State::kReady;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, fiber_main, 0);
}

inline int count(int begin, int end, State state) {
  int n = 0;
  for (int i = begin; i < end; ++i) n += block.threads[i].state == state;
  return n;
}

// Opens a barrier of threads [begin, end) if `expected` of them wait there; returns whether it did.
inline bool release(int begin, int end, State barrier, int expected) {
  if (expected == 0 || count(begin, end, barrier) != expected) return false;
  for (int i = begin; i < end; ++i) {
    if (block.threads[i].state == barrier) block.threads[i].state = State::kReady;
  }
  return true;
}

inline int in_order(int i, int n) { return launch_order == Order::kUpwards ? i : n - 1 - i; }

inline void run_warp(int begin) {
  do {
    for (int lane = 0; lane < kWarp; ++lane) {
      block.running = begin + in_order(lane, kWarp);
      if (running().state == State::kReady) swapcontext(&block.scheduler, &running().context);
      if (!block.error.empty()) throw std::runtime_error("host emulation: " + std::exchange(block.error, ""));
    }
    // a warp barrier and a shuffle name all 32 lanes, so all 32 must be there
  } while (release(begin, begin + kWarp, State::kAtWarpBarrier, kWarp));
}

inline void run_block(int threads) {
  const int warps = threads / kWarp;
  int exited;
  do {
    for (int warp = 0; warp < warps; ++warp) run_warp(in_order(warp, warps) * kWarp);
    exited = count(0, threads, State::kExited);
    // as on the GPU, __syncthreads waits for the threads that are still there
  } while (release(0, threads, State::kAtBlockBarrier, threads - exited));

  if (exited != threads) {
    throw std::runtime_error(
        "host emulation: block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
        std::to_string(blockIdx.z) + ") cannot go on: " + std::to_string(count(0, threads, State::kAtBlockBarrier)) +
        " threads wait in __syncthreads, " + std::to_string(count(0, threads, State::kAtWarpBarrier)) +
        " in a warp barrier or shuffle, " + std::to_string(exited) + " have exited");
  }
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 threads, const Params& params) {
  const int n = static_cast<int>(threads.size());
  if (n % kWarp != 0 || n == 0 || n > kMaxThreads) {
    throw std::runtime_error("host emulation: a block must have 32, 64, ... 1024 threads, got " + std::to_string(n));
  }
  gridDim = grid;
  blockDim = threads;
  block.body = [&] { kernel(params); };
  if (static_cast<int>(block.threads.size()) < n) block.threads.resize(n);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        for (int i = 0; i < n; ++i) {
          start(block.threads[i], dim3(i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)));
        }
        run_block(n);
      }
    }
  }
}

// The value that lane `source` of the same warp offers.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "a shuffle moves at most 8 bytes");
  if (mask != 0xffffffffu) fail("a shuffle must name all 32 lanes, got a partial mask");
  const int warp_begin = block.running / kWarp * kWarp;
  std::memcpy(&block.exchange[block.running], &value, sizeof(T));
  wait(State::kAtWarpBarrier);
  T result;
  std::memcpy(&result, &block.exchange[warp_begin + source], sizeof(T));
  wait(State::kAtWarpBarrier);  // nobody offers the next value before all have read this one
  return result;
}

}  // namespace host_emulation

#define threadIdx (host_emulation::running().index)

inline void __syncthreads() { host_emulation::wait(host_emulation::State::kAtBlockBarrier); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) host_emulation::fail("__syncwarp must name all 32 lanes, got a partial mask");
  host_emulation::wait(host_emulation::State::kAtWarpBarrier);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return host_emulation::shuffle(mask, value, lane % host_emulation::kWarp);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return host_emulation::shuffle(mask, value, (host_emulation::block.running % host_emulation::kWarp) ^ lane_mask);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = host_emulation::block.running % host_emulation::kWarp;
  const int source = lane + static_cast<int>(delta);
  return host_emulation::shuffle(mask, value, source < host_emulation::kWarp ? source : lane);
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

// ---- 16-bit floats: storage and the two conversions; arithmetic goes through float, as in the kernels.

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (std::isnan(v)) return {0x7fff};
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits += 0x7fff + (bits >> 16 & 1);  // round half to even; a carry runs into the exponent, as it should
  return {static_cast<std::uint16_t>(bits >> 16)};
}

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float f = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
            : exponent == 31 ? (mantissa ? NAN : INFINITY)
                             : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return std::copysign(f, v.bits & 0x8000 ? -1.0f : 1.0f);
}

inline __half __float2half_rn(float v) {
  if (std::isnan(v)) return {0x7fff};
  const std::uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};  // half an ulp past the largest
  // Consecutive codes are consecutive multiples of 2^(exponent - 10), so counting those gives the code, subnormals
  // (exponent -14) and the carry into the next exponent included.
  int exponent;
  std::frexp(magnitude, &exponent);
  exponent = exponent - 1 < -14 || magnitude == 0.0f ? -14 : exponent - 1;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<std::uint16_t>(sign | (((exponent + 14) << 10) + steps))};
}
