// Copies of 16 bytes into shared memory behind the arithmetic: cp.async (sm_80 and later), or its plain version for the
// host emulation.
#pragma once

#include "cuda_or_host.h"

namespace wam {

#ifdef WAM_HOST_EMULATION

namespace copy_async_detail {

struct Copy {
  void* target;
  const void* source;
  bool exists;

  void run() const { exists ? std::memcpy(target, source, 16) : std::memset(target, 0, 16); }
};
inline std::vector<Copy> copies[host_emulation::kMaxThreads];  // under way, of each thread

}  // namespace copy_async_detail

// A copy may take place at once or as late as the wait. One order of threads does the one, the other order the other:
// a kernel that reads too early or overwrites what is still being read gives different bits.
inline void copy_async(void* target, const void* source, bool exists) {
  if (reinterpret_cast<std::uintptr_t>(target) % 16 || (exists && reinterpret_cast<std::uintptr_t>(source) % 16)) {
    host_emulation::fail("copy_async needs addresses that are multiples of 16");
  }
  const copy_async_detail::Copy copy{target, source, exists};
  if (host_emulation::launch_order == host_emulation::Order::kDownwards) {
    copy.run();
  } else {
    copy_async_detail::copies[host_emulation::block.running].push_back(copy);
  }
}

inline void copy_async_wait() {
  auto& copies = copy_async_detail::copies[host_emulation::block.running];
  for (const auto& copy : copies) copy.run();
  copies.clear();
}

#elif defined(__CUDACC__)

// Starts a copy of 16 bytes from global to shared memory, or of zeros unless it `exists`: `source` is then not read.
__device__ inline void copy_async(void* target, const void* source, bool exists) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
      "l"(source), "r"(exists ? 16 : 0)
      : "memory");
}

// Waits for this thread's copies: it reads them then, and the rest of the block after a barrier.
__device__ inline void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif

}  // namespace wam
