// A kernel of sm90.cuh that is right for kNone and has one fault otherwise; test_sm90_emulation.py checks what the
// emulation says. One warpgroup computes s = a b^T and o = bf16(s) b of 64 x 64 matrices: a comes by TMA, b by
// cp.async, swizzled here by its own formula.
#include "common/tensor_map.h"

enum Fault {
  kNone,
  kNoWaitForTheCopy,
  kNoWaitForTheProduct,
  kNoProxyFence,
  kNoProductFence,
  kNotInitialised,
  kTooManyArrivals,
  kTooManyBytes,
  kTooFewBytes,
  kNobodyWaits,
  kUnaligned,
  kDifferentProducts,
  kTooManyRegisters,
  kMissingThread,
  kWrongPhase,
};

using namespace wam;
using namespace wam::sm90;

struct Params {
  TensorMap a;
  const __nv_bfloat16* b;
  float *s, *o;  // [64, 64]
  int fault;
};

struct Shared {
  alignas(1024) unsigned char a[8192 + 16];
  alignas(1024) unsigned char b[8192];
  alignas(8) uint64_t full;
};

__device__ void copy_a(const Params& p, Shared& shared) {
  const int bytes = p.fault == kTooManyBytes ? 16384 : p.fault == kTooFewBytes ? 4096 : 8192;
  barrier_arrive_expect(&shared.full, bytes);
  tma_load(shared.a + (p.fault == kUnaligned ? 16 : 0), &p.a, &shared.full, 0, 0, 0, 0);
  if (p.fault == kTooManyArrivals) barrier_arrive(&shared.full), barrier_arrive(&shared.full);
}

__device__ void store(float* to, const float (&sums)[32], int thread) {
  for (int i = 0; i < 32; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    to[row * 64 + column] = sums[i];
  }
}

__device__ void multiply(const Params& p, Shared& shared, int thread) {
  for (int i = thread; i < 512; i += 128) {
    const int row = i / 8, chunk = i % 8;
    copy_async16(shared.b + row * 128 + (chunk ^ row % 8) * 16, p.b + row * 64 + chunk * 8, true);
  }
  copy_async_wait_all();
  if (p.fault != kNoProxyFence) fence_async_proxy();
  if (p.fault != kMissingThread || thread != 5) sync_named(1, 128);
  if (p.fault == kNobodyWaits) return;
  if (p.fault != kNoWaitForTheCopy) barrier_wait(&shared.full, p.fault == kWrongPhase ? 1 : 0);

  float s[32], o[32] = {};
  uint32_t rounded[4][4];
  const uint64_t a = descriptor(shared.a, 16, 1024), b = descriptor(shared.b, 16, 1024);
  if (p.fault != kNoProductFence) wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const int by = p.fault == kDifferentProducts && thread == 7 ? 0 : k * 2;
    Wgmma<__nv_bfloat16, 64>::shared(s, moved(a, static_cast<uint32_t>(a), by), b + k * 2, k != 0);
  }
  wgmma_commit();
  if (p.fault != kNoWaitForTheProduct) wgmma_wait<0>();
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) rounded[k][i] = pack(s[8 * k + 2 * i], s[8 * k + 2 * i + 1], __nv_bfloat16{});
  }
  wgmma_fence();
  for (int k = 0; k < 4; ++k) Wgmma<__nv_bfloat16, 64>::registers<true>(o, rounded[k], b + k * 128, true);
  wgmma_commit();
  wgmma_wait<0>();
  store(p.s, s, thread);
  store(p.o, o, thread);
}

__global__ void products(const __grid_constant__ Params p) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int thread = thread_index();
  if (thread == 0 && p.fault != kNotInitialised) barrier_init(&shared.full, 1);
  sync_block();
  if (thread < 128) {
    registers_give<24>();
    if (thread == 0) copy_a(p, shared);
  } else if (thread < 256) {
    if (p.fault == kTooManyRegisters) {
      registers_take<504>();
    } else {
      registers_take<240>();
    }
    multiply(p, shared, thread - 128);
  }
}

extern "C" const char* run(const void* a, const void* b, float* s, float* o, int rows, int fault, int seed) {
  static std::string error;
  sm90_emulation::order = {static_cast<unsigned>(seed), 0.02, static_cast<sm90_emulation::Prefer>(seed % 3),
                           seed % 2 == 1};
  try {
    Params p{};
    p.a = tensor_map("products", "a", {a, 4, {64, 1, rows, 1, 1}, {2, 128, 128, 128, 0}, {64, 1, 64, 1, 1}, false});
    p.b = static_cast<const __nv_bfloat16*>(b);
    p.s = s;
    p.o = o;
    p.fault = fault;
    launch_persistent("products", products, 1, sizeof(Shared), nullptr, p);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
