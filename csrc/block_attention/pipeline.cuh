// What the three kernels share: the ring of stages that TMA fills, the queue of work, and a tile's steps.
//
// A block is one warpgroup of producers, of which single threads work, and two warpgroups of consumers with 64 rows
// each, which take the same stages. A stage has two mbarriers: `full` counts the bytes of its copies, `free` one
// arrival of every consumer warp. A tile's steps come in the order of wam_kernels/plan/boxes.py: half 0 alone, full,
// both, half 1 alone; so a warpgroup leaves steps out only before and after its own.
#pragma once

#include "common/sm90.cuh"
#include "common/tensor_map.h"
#include "params.h"

#ifdef WAM_DEVICE_CODE

namespace wam::block_attention_detail {

using namespace wam::sm90;

constexpr int kTileRows = 128, kHalfRows = 64, kFullTokens = 128, kMaskedTokens = 64, kBoxTokens = 32;
constexpr int kBoxes = kMaskedTokens / kBoxTokens, kTokenBits = 26;
constexpr int kConsumerWarps = 8, kWarpgroupThreads = 128;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr float kLog2e = 1.4426950408889634f;

// A position in a ring of stages, with the parity of its turn.
template <int kStages>
struct Ring {
  int at = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++at == kStages) {
      at = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int n) {
    at += n;
    phase ^= at / kStages & 1;
    at %= kStages;
  }
};

// Stages of one streamed tensor: kTokens rows of kChannels 16-bit numbers, 64 channels after the other.
template <int kChannels, int kTokens, int kCount>
struct Stages {
  static constexpr int kStages = kCount, kBytes = kTokens * kChannels * 2;
  alignas(1024) unsigned char data[kCount][kBytes];
  alignas(8) uint64_t full[kCount], free[kCount];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kCount; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&free[i], kConsumerWarps);
    }
  }
};

// Work that one producer draws and everybody reads; two entries, so that a tile's end and the next one's begin overlap.
struct Queue {
  alignas(8) uint64_t full[2], free[2];
  int work[2];

  __device__ __forceinline__ void init(int readers) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&free[i], readers);
    }
  }
};

constexpr int kNoWork = -1;

// Draws the next piece of work: called by one thread.
__device__ __forceinline__ int draw_work(Queue& queue, Ring<2>& turn, int32_t* counter, int total) {
  barrier_wait(&queue.free[turn.at], turn.phase ^ 1);
  const int drawn = draw(counter), work = drawn < total ? drawn : kNoWork;
  queue.work[turn.at] = work;
  barrier_arrive(&queue.full[turn.at]);
  turn.next();
  return work;
}

// The piece of work that the drawing thread has drawn, for a single thread.
__device__ __forceinline__ int read_work(Queue& queue, Ring<2>& turn) {
  barrier_wait(&queue.full[turn.at], turn.phase);
  const int work = queue.work[turn.at];
  barrier_arrive(&queue.free[turn.at]);
  turn.next();
  return work;
}

// The same for a warp. The shuffle holds its lanes together: one that stays behind would miss a phase.
__device__ __forceinline__ int read_work_by_warp(Queue& queue, Ring<2>& turn, int lane) {
  barrier_wait(&queue.full[turn.at], turn.phase);
  const int work = from_lane_0(queue.work[turn.at]);
  if (lane == 0) barrier_arrive(&queue.free[turn.at]);
  turn.next();
  return work;
}

// Two maps of a tensor [batch, tokens, heads, channels]. `whole`: one stage's tokens, dimensions (channel, head, token,
// batch). `box`: (channel, head, j, token, batch) with the same stride for j < 32 and for the token, so entry (j,
// token) is token + j. A box of 32 from j = -gap on has gap rows outside, which are zeros, and then the 32 - gap tokens
// from `token` on: what no row attends to is never read.
struct StreamMaps {
  TensorMap whole, box;
};

// What of a piece of work, counted heaviest tile first and then by batch element and head.
struct Work {
  const int32_t* tile;
  int index, head, batch;

  __device__ __forceinline__ Work(int work, const int32_t* tiles, int heads, int repeat) {
    index = work / (heads * repeat);
    tile = tiles + index * 8;
    const int rest = work - index * heads * repeat;
    batch = rest / heads;  // to be added to the tile's
    head = rest - batch * heads;
  }
};

// Steps of a tile as one half takes them, in stages of kTokens.
template <int kTokens>
struct Steps {
  int masked;                // first masked step of this half
  int before, full, behind;  // masked steps before and after the full ones
  int skip_before, skip_behind;

  __device__ __forceinline__ Steps(const int32_t* tile, int half) {
    const int n0 = tile[3], n_both = tile[5], n1 = tile[6];
    before = from_lane_0(half ? 0 : n0);
    full = from_lane_0(tile[4] * (kFullTokens / kTokens));
    behind = from_lane_0(n_both + (half ? n1 : 0));
    skip_before = from_lane_0(half ? n0 : 0);
    skip_behind = from_lane_0(half ? 0 : n1);
    masked = tile[2] + skip_before;
  }
};

// The copies of one streamed tensor for one tile and head: all by the same thread.
template <int kChannels, int kTokens, int kCount>
struct Producer {
  using S = Stages<kChannels, kTokens, kCount>;
  S& stages;
  const StreamMaps& maps;
  const BoxSide& side;
  Ring<kCount> ring{};

  template <class Copies>
  __device__ __forceinline__ void fill(int bytes, Copies copies) {
    barrier_wait(&stages.free[ring.at], ring.phase ^ 1);
    barrier_arrive_expect(&stages.full[ring.at], bytes);
    copies(stages.data[ring.at], &stages.full[ring.at]);
    ring.next();
  }

  __device__ __forceinline__ void masked_steps(int step, int n, int head, int batch) {
#pragma unroll 1
    for (; n > 0; --n, ++step) {
      int box[kBoxes];  // read before the wait for a stage
#pragma unroll
      for (int x = 0; x < kBoxes; ++x) box[x] = side.boxes[step * kBoxes + x];
      fill(kMaskedTokens * kChannels * 2, [&](unsigned char* to, uint64_t* full) {
#pragma unroll
        for (int x = 0; x < kBoxes; ++x) {
#pragma unroll
          for (int c = 0; c < kChannels; c += 64) {
            tma_load(to + c * kTokens * 2 + x * kBoxTokens * 128, &maps.box, full, c, head, -(box[x] >> kTokenBits),
                     box[x] & ((1 << kTokenBits) - 1), batch);
          }
        }
      });
    }
  }

  __device__ __forceinline__ void full_steps(int step, int n, int head, int batch) {
#pragma unroll 1
    for (; n > 0; --n, ++step) {
      int token = side.full[step];
#pragma unroll 1
      for (int i = 0; i < kFullTokens / kTokens; ++i, token += kTokens) {
        fill(kTokens * kChannels * 2, [&](unsigned char* to, uint64_t* full) {
#pragma unroll
          for (int c = 0; c < kChannels; c += 64) {
            tma_load(to + c * kTokens * 2, &maps.whole, full, c, head, token, batch);
          }
        });
      }
    }
  }

  __device__ __forceinline__ void tile(const int32_t* tile, int head, int batch) {
    const int n0 = tile[3];
    batch += tile[7];
    masked_steps(tile[2], n0, head, batch);
    full_steps(tile[1], tile[4], head, batch);
    masked_steps(tile[2] + n0, tile[5] + tile[6], head, batch);
  }
};

// One of the two producer threads of a kernel: the first one (kFirst) also draws the work. `copies` gives the producer
// a piece of work.
template <bool kFirst, int kChannels, int kTokens, int kCount, class Arguments, class Copies>
__device__ __forceinline__ void produce(const Arguments& p, Queue& queue, int heads,
                                        Stages<kChannels, kTokens, kCount>& stages, const StreamMaps& maps,
                                        Copies copies) {
  Producer<kChannels, kTokens, kCount> producer{stages, maps, p.side};
  Ring<2> turn;
  for (;;) {
    const int drawn = kFirst ? draw_work(queue, turn, p.counter, p.work) : read_work(queue, turn);
    if (drawn == kNoWork) return;
    copies(producer, Work(drawn, p.side.tiles, heads, p.repeat));
  }
}

// The warps that take work: every piece of it.
template <class Arguments, class Take>
__device__ __forceinline__ void consume(const Arguments& p, Queue& queue, int heads, int lane, Take take) {
  Ring<2> turn;
  for (;;) {
    const int drawn = read_work_by_warp(queue, turn, lane);
    if (drawn == kNoWork) return;
    take(Work(drawn, p.side.tiles, heads, p.repeat));
  }
}

// A consumer warp has read a stage.
__device__ __forceinline__ void release(uint64_t* free, int lane) {
  if (lane == 0) barrier_arrive(free);
}

// Steps of the other half alone: waited for, so that no barrier gets two phases ahead, and released. No product holds
// the lanes of a warp together here, so one lane does it: a lane that stays behind would miss a phase.
template <class X, class Y>
__device__ __forceinline__ void leave_out(X& x, Y& y, Ring<X::kStages>& now, int steps, int lane) {
  if (lane == 0) {
    Ring<X::kStages> at = now;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      barrier_wait(&x.full[at.at], at.phase);
      barrier_arrive(&x.free[at.at]);
      barrier_wait(&y.full[at.at], at.phase);
      barrier_arrive(&y.free[at.at]);
      at.next();
    }
  }
  sync_warp();
  now.skip(steps);
}

// Fragments of 64 rows as the first operand of a product: columns of 16, two rows a thread. Channels beyond head_dim
// and rows that are not there are zeros.
template <class T, int kChannels>
__device__ __forceinline__ void load_fragments(uint32_t (&to)[kChannels / 16][4], const Heads& t, int batch, int head,
                                               const int (&row)[2], const bool (&there)[2], int head_dim, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* from = static_cast<const T*>(t.data) + batch * t.stride_batch + head * t.stride_head +
                    (there[r] ? row[r] : 0) * t.stride_token + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      to[j / 2][r + j % 2 * 2] = there[r] && j * 8 < head_dim ? *reinterpret_cast<const uint32_t*>(from + j * 8) : 0u;
    }
  }
}

// A row of sums, times `factor`, into a tensor; two threads' worth of one row at a time.
template <class T, int kChannels>
__device__ __forceinline__ void store_row(const Heads& t, int batch, int head, int row, int r,
                                          const float (&sums)[kChannels / 2], float factor, int head_dim, int lane) {
  T* to = static_cast<T*>(t.data) + batch * t.stride_batch + head * t.stride_head + row * t.stride_token + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kChannels / 8; ++j) {
    if (j * 8 < head_dim) {
      *reinterpret_cast<uint32_t*>(to + j * 8) =
          pack(sums[4 * j + 2 * r] * factor, sums[4 * j + 2 * r + 1] * factor, T{});
    }
  }
}

// The sum over the four threads of a row.
__device__ __forceinline__ float sum_of_quad(float v) {
  v += shuffle_xor(v, 1);
  return v + shuffle_xor(v, 2);
}

// ---- host

inline StreamMaps stream_maps(const char* op, const std::string& name, const Heads& t, int64_t batch, int64_t tokens,
                              int64_t heads, int head_dim, int stage_tokens, DType dtype) {
  // a stride that nothing is reached with may be anything
  const auto bytes = [](int64_t stride, int64_t size) { return size > 1 ? 2 * stride : int64_t{16}; };
  const int64_t of_token = bytes(t.stride_token, tokens), of_head = bytes(t.stride_head, heads);
  const int64_t of_batch = bytes(t.stride_batch, batch);
  const bool half = dtype == DType::kFloat16;
  StreamMaps maps;
  maps.whole = tensor_map(op, name,
                          {t.data,
                           4,
                           {head_dim, heads, tokens, batch, 1},
                           {2, of_head, of_token, of_batch, 0},
                           {64, 1, stage_tokens, 1, 1},
                           half});
  maps.box = tensor_map(op, name,
                        {t.data,
                         5,
                         {head_dim, heads, kBoxTokens, tokens, batch},
                         {2, of_head, of_token, of_token, of_batch},
                         {64, 1, kBoxTokens, 1, 1},
                         half});
  return maps;
}

}  // namespace wam::block_attention_detail

#endif  // WAM_DEVICE_CODE
