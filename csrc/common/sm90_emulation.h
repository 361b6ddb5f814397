// TMA, mbarriers, wgmma and setmaxnreg of sm_90a on a CPU: the other half of sm90.cuh, for kernels of one block an SM.
//
// The threads of a block are fibers that run in random order. What the hardware does on its own (TMA, cp.async, wgmma)
// is queued when it is issued and done at a random later moment, at the latest when nothing else can go on; until then
// its destination holds NaN. So a wait that is missing, too early or on the wrong phase shows as NaN, as other bits in
// another order, or as one of the errors below. Every operand is read when the product runs, not when it is issued.
//
// Reported: deadlocks (who waits in what), more arrivals than a barrier counts, more bytes than it expects, bytes or
// copies outstanding at the end, a wgmma without wgmma.fence or with different operands across its threads, shared
// memory written by cp.async that wgmma reads without fence.proxy.async, registers that nobody has given back.
//
// Not here: the driver's view of a tensor map, timing, what ptxas moves, scopes of fences, clusters.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace wam {

// A view of global memory that TMA copies boxes of; strides in bytes, 2-byte elements, 128-byte swizzle.
struct TensorMap {
  const unsigned char* base;
  int64_t size[5], stride[5];
  int32_t box[5];
};

}  // namespace wam

namespace sm90_emulation {

constexpr int kMaxThreads = 512, kWarp = 32, kMaxWarps = kMaxThreads / kWarp, kWarpgroup = 128;
constexpr int kSharedBytes = 232448;  // what a block of an H100 may have
constexpr int kRegisters = 65536, kStackBytes = 128 * 1024;

enum class Prefer { kAny, kProducts, kCopies };

// Which of the many legal executions the next launches show.
struct Order {
  unsigned seed = 1;
  double chance = 0.02;          // before every turn of a thread, to run one operation that is under way
  Prefer prefer = Prefer::kAny;  // kProducts: products at once and copies as late as can be; kCopies: the other way
  bool by_priority = false;      // some warps run far ahead of others, for a while, and so do their rows of a product
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool exited = false;
  const char* waits_in = "";
};

// Threads that wait until `expected` of them are there.
struct Meeting {
  int arrived = 0;
  std::vector<int> waiting;
};

struct MBarrier {
  int count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // expected and not yet there
  std::vector<int> waiting;
};

struct Copy {
  std::function<void()> run;
};
using CopyPointer = std::shared_ptr<Copy>;

// One wgmma instruction: 16 rows for each of the four warps.
struct Product {
  int columns;
  bool half, transposed, a_in_registers, accumulate;
  uint64_t a, b;               // descriptors
  int group, arrived[4] = {};  // threads of each warp that have issued it
  float* sums[kWarpgroup];
  const uint32_t* fragments[kWarpgroup];
};

// What a thread's accumulators hold in truth; in the thread itself they are NaN until a wait covers them.
struct Shadow {
  std::vector<float> sums;
  int last_group;
};

struct Warpgroup {
  std::deque<Product> products;
  std::size_t done[4] = {};  // of them, by each warp
  int issued[kWarpgroup] = {}, group[kWarpgroup] = {};
  bool fenced[kWarpgroup] = {};
  std::unordered_map<float*, Shadow> shadow[kWarpgroup];
  std::vector<int> waiting;
};

alignas(1024) inline unsigned char shared[kSharedBytes];

inline Order order;
inline int n_threads;  // of the block
inline Thread threads[kMaxThreads];
inline ucontext_t scheduler;
inline int current;
inline std::vector<int> ready;
inline std::string error;
inline std::mt19937 random;
inline std::function<void()> body;
inline Meeting block_meeting, warp_meeting[kMaxWarps], named_meeting[16];
inline uint64_t exchange[kMaxThreads];
inline std::map<uint64_t*, MBarrier> barriers;
inline std::vector<CopyPointer> copies, copies_of[kMaxThreads];
inline std::unordered_map<uint32_t, int> generic_writes;  // 16-byte chunk -> the thread that has not fenced it
inline Warpgroup warpgroups[kMaxThreads / kWarpgroup];
inline int free_registers;
inline std::vector<int> waiting_for_registers;

// ---- threads

inline void leave() { swapcontext(&threads[current].context, &scheduler); }

[[noreturn]] inline void fail(const std::string& message) {
  error = "thread " + std::to_string(current) + ": " + message;
  leave();
  __builtin_unreachable();
}

inline void wait_in(std::vector<int>& waiting, const char* what) {
  threads[current].waits_in = what;
  waiting.push_back(current);
  leave();
}

inline void wake(std::vector<int>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

inline void gather(Meeting& meeting, int expected, const char* what) {
  if (++meeting.arrived > expected) fail("more threads than expected at a barrier");
  if (meeting.arrived < expected) return wait_in(meeting.waiting, what);
  meeting.arrived = 0;
  wake(meeting.waiting);
}

template <class T>
T shuffle(T value, int source) {
  const int warp = current / kWarp;
  std::memcpy(&exchange[current], &value, sizeof value);
  gather(warp_meeting[warp], kWarp, "a shuffle");
  T result;
  std::memcpy(&result, &exchange[warp * kWarp + source], sizeof result);
  gather(warp_meeting[warp], kWarp, "a shuffle");  // nobody offers the next value before all have read this one
  return result;
}

// A value of all lanes of the warp, two at a time.
template <class T, class Of>
T reduce(T value, Of of) {
  const int warp = current / kWarp;
  std::memcpy(&exchange[current], &value, sizeof value);
  gather(warp_meeting[warp], kWarp, "a reduction");
  for (int lane = 0; lane < kWarp; ++lane) {
    T other;
    std::memcpy(&other, &exchange[warp * kWarp + lane], sizeof other);
    value = of(value, other);
  }
  gather(warp_meeting[warp], kWarp, "a reduction");
  return value;
}

// ---- mbarriers

inline MBarrier& barrier(uint64_t* address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("an mbarrier is not initialised");
  return found->second;
}

inline void complete(MBarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  wake(b.waiting);
}

inline void arrive(uint64_t* address, int bytes) {
  MBarrier& b = barrier(address);
  b.bytes += bytes;
  if (--b.pending < 0) fail("more arrivals at an mbarrier than it counts");
  complete(b);
}

inline void wait_for(uint64_t* address, int parity) {
  MBarrier& b = barrier(address);
  while ((b.phase & 1) == parity) wait_in(b.waiting, "an mbarrier");
}

// ---- copies

inline uint32_t address_of(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared);
}

inline uint32_t swizzled(uint32_t at) { return at ^ ((at >> 7 & 7) << 4); }

inline void run(const CopyPointer& copy) {
  copies.erase(std::find(copies.begin(), copies.end(), copy));
  copy->run();
}

// Boxes of 128 bytes by box[2] entries along the third dimension; all other dimensions of a box are 1.
inline void tma_load(void* to, const wam::TensorMap* map, uint64_t* full, const int (&first)[5]) {
  const uint32_t at = address_of(to);
  const int rows = map->box[2], bytes = map->box[0] * 2;
  if (at % 1024 != 0) fail("a swizzled box must begin at a multiple of 1024 bytes");
  if (at + static_cast<uint32_t>(rows * bytes) > kSharedBytes) fail("TMA writes outside of shared memory");
  std::memset(to, 0xff, static_cast<std::size_t>(rows * bytes));
  auto copy = std::make_shared<Copy>();
  // the map by value: here it lies on the stack of a thread, which may end before its copies do
  copy->run = [=, map = *map, first = std::vector<int>(first, first + 5)] {
    for (int row = 0; row < rows; ++row) {
      for (int x = 0; x < bytes; x += 16) {
        const int64_t index[5] = {first[0] + x / 2, first[1], first[2] + row, first[3], first[4]};
        bool inside = true;
        int64_t from = 0;
        for (int i = 0; i < 5; ++i) {
          inside = inside && index[i] >= 0 && index[i] < map.size[i];
          from += index[i] * map.stride[i];
        }
        unsigned char* chunk = shared + swizzled(at + static_cast<uint32_t>(row * 128 + x));
        inside ? std::memcpy(chunk, map.base + from, 16) : std::memset(chunk, 0, 16);
      }
    }
    MBarrier& b = barriers.at(full);
    b.bytes -= rows * bytes;
    if (b.bytes < 0) error = "TMA brings more bytes than its mbarrier expects";
    complete(b);
  };
  copies.push_back(copy);
}

inline void copy_async16(void* to, const void* from, bool there) {
  if (address_of(to) % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    fail("cp.async needs multiples of 16 bytes");
  }
  std::memset(to, 0xff, 16);
  generic_writes[address_of(to) / 16] = current;
  auto copy = std::make_shared<Copy>();
  copy->run = [=] { there ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); };
  copies.push_back(copy);
  copies_of[current].push_back(copy);
}

inline void copy_async_wait_all() {
  for (const CopyPointer& copy : copies_of[current]) {
    if (std::find(copies.begin(), copies.end(), copy) != copies.end()) run(copy);
  }
  copies_of[current].clear();
}

inline void fence_async_proxy() {
  for (auto it = generic_writes.begin(); it != generic_writes.end();) {
    it = it->second == current ? generic_writes.erase(it) : std::next(it);
  }
}

// ---- products

inline float number(uint16_t bits, bool half) { return half ? __half2float({bits}) : __bfloat162float({bits}); }

// Where element (row, k) of an operand lies, by its descriptor: 2-byte elements, 128-byte swizzle. K-major: 64 elements
// of k in a row of 128 bytes, 8 rows in 1024, `stride` from 8 rows to the next 8. MN-major (transposed): 64 rows in a
// line of 128 bytes, 8 k in 1024, `stride` to the next 8 k, `leading` to the next 64 rows.
inline uint32_t place_of(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  return swizzled(transposed ? start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                             : start + row / 8 * stride + row % 8 * 128 + k * 2);
}

inline void read_operand(uint64_t descriptor, bool transposed, bool half, int rows, float (*to)[16]) {
  if (descriptor >> 62 != 1) error = "a descriptor is not of a 128-byte swizzle";
  if ((descriptor >> 49 & 7) != 0) error = "a descriptor's base offset is not emulated";
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t at = place_of(descriptor, transposed, row, k);
      if (at + 2 > kSharedBytes) {
        error = "wgmma reads outside of shared memory";
        return;
      }
      if (!generic_writes.empty() && generic_writes.count(at / 16)) {
        error = "wgmma reads what the generic proxy wrote, without fence.proxy.async";
      }
      uint16_t bits;
      std::memcpy(&bits, shared + at, 2);
      to[row][k] = number(bits, half);
    }
  }
}

// Row and column of a thread's element i of an accumulator.
inline int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
inline int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The rows of warps [begin, end) of a product.
inline void run(Warpgroup& w, Product& p, int begin, int end) {
  static float a[64][16], b[256][16];
  read_operand(p.b, p.transposed, p.half, p.columns, b);
  if (!p.a_in_registers) read_operand(p.a, false, p.half, 64, a);
  for (int t = begin * kWarp; p.a_in_registers && t < end * kWarp; ++t) {
    for (int i = 0; i < 8; ++i) {
      const uint32_t two = p.fragments[t][i / 2];
      const int row = row_of(t, i / 2 % 2 * 2), k = i / 4 * 8 + t % 4 * 2 + i % 2;
      a[row][k] = number(static_cast<uint16_t>(two >> 16 * (i % 2)), p.half);
    }
  }
  for (int t = begin * kWarp; t < end * kWarp; ++t) {
    std::vector<float>& sums = w.shadow[t].at(p.sums[t]).sums;
    for (int i = 0; i < p.columns / 2; ++i) {
      const float *x = a[row_of(t, i)], *y = b[column_of(t, i)];
      float sum = p.accumulate ? sums[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
      sums[i] = sum;
    }
  }
}

// Whether a warp's rows of its next product can be computed; of a whole warpgroup, warp 0 is asked.
inline bool can_advance(const Warpgroup& w, int warp) {
  if (w.done[warp] == w.products.size()) return false;
  const int (&arrived)[4] = w.products[w.done[warp]].arrived;
  if (order.by_priority) return arrived[warp] == kWarp;
  return warp == 0 && std::all_of(arrived, arrived + 4, [](int n) { return n == kWarp; });
}

inline void advance(Warpgroup& w, int warp) {
  const int end = order.by_priority ? warp + 1 : 4;
  run(w, w.products[w.done[warp]], warp, end);
  for (int i = warp; i < end; ++i) ++w.done[i];
  wake(w.waiting);
}

inline void issue(const Product& mine, float* sums, const uint32_t* fragments) {
  const int t = current % kWarpgroup;
  Warpgroup& w = warpgroups[current / kWarpgroup];
  if (!w.fenced[t]) fail("wgmma without wgmma.fence");
  const std::size_t at = static_cast<std::size_t>(w.issued[t]++);
  if (at == w.products.size()) {
    w.products.push_back(mine);
    w.products.back().group = w.group[t];
  }
  Product& p = w.products[at];
  if (p.columns != mine.columns || p.a != mine.a || p.b != mine.b || p.accumulate != mine.accumulate ||
      p.transposed != mine.transposed || p.half != mine.half || p.group != w.group[t]) {
    fail("threads of a warpgroup issue different products");
  }
  auto [found, fresh] = w.shadow[t].try_emplace(sums);
  if (fresh) {
    found->second.sums.assign(sums, sums + p.columns / 2);
    std::fill(sums, sums + p.columns / 2, NAN);
  }
  found->second.last_group = w.group[t];
  p.sums[t] = sums;
  p.fragments[t] = fragments;
  ++p.arrived[t / kWarp];
}

inline void wait_groups(int pending) {
  const int t = current % kWarpgroup;
  Warpgroup& w = warpgroups[current / kWarpgroup];
  const int covered = w.group[t] - 1 - pending;  // groups up to this one must be done
  const auto open = [&] {
    for (std::size_t i = w.done[t / kWarp]; i < w.products.size(); ++i) {
      if (w.products[i].group <= covered) return true;
    }
    return false;
  };
  while (open()) wait_in(w.waiting, "wgmma.wait_group");
  for (auto it = w.shadow[t].begin(); it != w.shadow[t].end();) {
    if (it->second.last_group > covered) {
      ++it;
      continue;
    }
    std::copy(it->second.sums.begin(), it->second.sums.end(), it->first);
    it = w.shadow[t].erase(it);
  }
  w.fenced[t] = false;
}

// ---- registers

// Of a thread, for a kernel of one block an SM: granted in units of 8.
inline int registers_at_launch() { return kRegisters / n_threads / 8 * 8; }

inline void give_registers(int left) {
  if (current % kWarp == 0) {
    free_registers += (registers_at_launch() - left) * kWarp;
    wake(waiting_for_registers);
  }
}

inline void take_registers(int wanted) {
  if (current % kWarp == 0) {
    const int more = (wanted - registers_at_launch()) * kWarp;
    while (free_registers < more) wait_in(waiting_for_registers, "setmaxnreg");
    free_registers -= more;
  }
  gather(warp_meeting[current / kWarp], kWarp, "setmaxnreg");
}

// ---- the scheduler

// Runs one operation that is under way; returns whether there was one.
inline bool run_one(bool of_products, bool of_copies) {
  std::vector<int> can;
  for (int i = 0; of_products && i < n_threads / kWarp; ++i) {
    if (can_advance(warpgroups[i / 4], i % 4)) can.push_back(i);
  }
  const std::size_t some = of_copies ? copies.size() : 0, all = some + can.size();
  if (all == 0) return false;
  const std::size_t pick = random() % all;
  if (pick < some) {
    run(CopyPointer(copies[pick]));
  } else {
    advance(warpgroups[can[pick - some] / 4], can[pick - some] % 4);
  }
  return true;
}

inline void run_some() {
  if (order.prefer == Prefer::kProducts) {
    while (run_one(true, false)) {}
  } else if (order.prefer == Prefer::kCopies) {
    while (run_one(false, true)) {}
  } else if (std::uniform_real_distribution<double>(0, 1)(random) < order.chance) {
    run_one(true, true);
  }
}

inline std::size_t next_thread(long turn) {
  static int priority[kMaxWarps];
  if (!order.by_priority) return random() % ready.size();
  if (turn % 4000 == 0) {
    for (int& x : priority) x = static_cast<int>(random() % 1000);
  }
  const auto rank = [](int t) { return priority[t / kWarp] * kWarp + kWarp - 1 - t % kWarp; };
  const auto best = std::max_element(ready.begin(), ready.end(), [&](int a, int b) { return rank(a) < rank(b); });
  return static_cast<std::size_t>(best - ready.begin());
}

inline void fiber_main() {
  body();
  threads[current].exited = true;
  leave();
}

inline void reset(int n) {
  n_threads = n;
  random.seed(order.seed);
  std::memset(shared, 0xff, sizeof shared);
  error.clear();
  ready.clear();
  barriers.clear();
  copies.clear();
  generic_writes.clear();
  waiting_for_registers.clear();
  free_registers = 0;
  for (auto& w : warpgroups) w = Warpgroup();
  for (auto& m : warp_meeting) m = Meeting();
  for (auto& m : named_meeting) m = Meeting();
  block_meeting = Meeting();
  for (int i = 0; i < n_threads; ++i) {
    Thread& t = threads[i];
    if (!t.stack) t.stack.reset(new char[kStackBytes]);
    t.exited = false;
    copies_of[i].clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber_main, 0);
    ready.push_back(i);
  }
}

inline void stop_if(bool wrong, const std::string& message) {
  if (wrong) throw std::runtime_error("sm90 emulation: " + message);
}

inline void check_end() {
  std::map<std::string, int> stuck;
  for (int i = 0; i < n_threads; ++i) {
    if (!threads[i].exited) ++stuck[threads[i].waits_in];
  }
  std::string who;
  for (const auto& [what, n] : stuck) who += " " + std::to_string(n) + " threads wait in " + what + ";";
  stop_if(!stuck.empty(), "deadlock:" + who);
  for (const auto& [address, b] : barriers) stop_if(b.bytes != 0, "bytes are still expected at the end");
}

// Runs one block to its end.
inline void launch(std::function<void()> kernel, int block_threads, std::size_t shared_bytes) {
  stop_if(block_threads % kWarpgroup != 0 || block_threads > kMaxThreads, "a block has 128, 256, 384 or 512 threads");
  stop_if(shared_bytes > kSharedBytes, "a block has at most 232448 bytes of shared memory");
  body = std::move(kernel);
  reset(block_threads);
  for (long turn = 0;; ++turn) {
    run_some();
    stop_if(!error.empty(), error);
    if (ready.empty()) {
      const bool over = std::all_of(threads, threads + n_threads, [](const Thread& t) { return t.exited; });
      stop_if(over && !copies.empty(), "copies are under way at the end");
      if (!run_one(true, true)) break;
      continue;
    }
    const std::size_t pick = next_thread(turn);
    current = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    swapcontext(&scheduler, &threads[current].context);
    stop_if(!error.empty(), error);
  }
  check_end();
}

}  // namespace sm90_emulation
