// Backward of block attention for sm_90a: dq, then dk and dv. No atomics on results, so the same bits every time.
//
// Both kernels are built like the forward, in stages of 64 tokens. dq has 64 queries a warpgroup and streams k and v;
// its last product stays in flight under the next step's scores. dkdv has 64 keys a warpgroup, whose k and v lie in
// shared memory, and streams q and dout with lse and delta of their tokens; its scores are transposed (keys by
// queries), so that probabilities and their gradients are first operands in registers. 7 products for 5 of a fused
// kernel, but no sums through memory and no locks.
#pragma once

#include <cfloat>
#include <cmath>

#include "pipeline.cuh"

namespace wam {

#ifdef WAM_DEVICE_CODE

namespace block_attention_detail {

constexpr int kTokens = 64;  // of a stage

struct BackwardArguments {
  StreamMaps x, y;  // k and v for dq; q and dout for dkdv
  Heads q, k, v, out, dout, dq, dk, dv;
  const float *lse, *dlse;
  float* delta;
  BoxSide side;
  int32_t* counter;
  int64_t rows;
  int32_t work, heads, group, repeat, head_dim;  // heads: of queries
  float scale;
  float to_base2;  // never 0
  float hidden;    // a score that to_base2 makes -inf
};

// The products of scores' kind: 64 rows by the 64 tokens of a stage.
template <class T, int D>
struct StageProducts {
  static constexpr int kUnits = kTokens * D * 2 / 16;  // of a stage: descriptors count 16 bytes
  static constexpr int kColumns = kTokens * 128 / 16;  // from 64 channels to the next 64

  static __device__ __forceinline__ int column(int kk) { return kk / 4 * kColumns + kk % 4 * 2; }

  // to = a b^T over the channels; a in registers
  static __device__ __forceinline__ void rows(float (&to)[kTokens / 2], const uint32_t (&a)[D / 16][4], uint64_t matrix,
                                              uint32_t first) {
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      Wgmma<T, kTokens>::template registers<false>(to, a[kk], moved(matrix, first, column(kk)), kk != 0);
    }
    wgmma_commit();
  }

  // the same with a in shared memory
  static __device__ __forceinline__ void rows(float (&to)[kTokens / 2], uint64_t a, uint64_t matrix, uint32_t first) {
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      Wgmma<T, kTokens>::shared(to, moved(a, static_cast<uint32_t>(a), column(kk)), moved(matrix, first, column(kk)),
                                kk != 0);
    }
    wgmma_commit();
  }

  // to += a b over the tokens
  static __device__ __forceinline__ void sums(float (&to)[D / 2], const uint32_t (&a)[kTokens / 16][4], uint64_t matrix,
                                              uint32_t first) {
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kTokens / 16; ++kk) {
      Wgmma<T, D>::template registers<true>(to, a[kk], moved(matrix, first, kk * 128), true);
    }
    wgmma_commit();
  }
};

template <class T>
__device__ __forceinline__ void pack_all(uint32_t (&to)[kTokens / 16][4], const float (&from)[kTokens / 2]) {
#pragma unroll
  for (int kk = 0; kk < kTokens / 16; ++kk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[kk][i] = pack(from[8 * kk + 2 * i], from[8 * kk + 2 * i + 1], T{});
  }
}

// ---- dq

template <int D>
struct DqShared {
  static constexpr int kStages = D == 128 ? 6 : 10;
  Stages<D, kTokens, kStages> k, v;
  Queue queue;
};

template <class T, int D>
struct DqConsumer {
  using Products = StageProducts<T, D>;
  static constexpr int kStages = DqShared<D>::kStages;
  const BackwardArguments& p;
  DqShared<D>& s;
  int thread, half, lane;
  uint64_t k_rows, v_rows, k_columns;
  Ring<kStages> now{}, before{};
  bool some = false;  // the product of the step before is in flight
  uint32_t q[D / 16][4], dout[D / 16][4], packed[kTokens / 16][4];
  float scores[kTokens / 2], grads[kTokens / 2], dq[D / 2], lse[2], delta[2];

  __device__ __forceinline__ DqConsumer(const BackwardArguments& p, DqShared<D>& s)
      : p(p), s(s), thread(thread_index() % kWarpgroupThreads), half(thread_index() / kWarpgroupThreads - 1) {
    lane = thread % 32;
    k_rows = descriptor(s.k.data, 16, 1024);
    v_rows = descriptor(s.v.data, 16, 1024);
    k_columns = descriptor(s.k.data, kTokens * 128, 1024);
  }

  __device__ __forceinline__ uint32_t first(uint64_t matrix) {
    return from_lane_0(static_cast<uint32_t>(matrix) + now.at * Products::kUnits);
  }

  // q, dout and what follows from a row's out and lse. A row that attends to nothing has lse -inf: whatever it holds,
  // its operands are zeros, and so its gradient.
  __device__ __forceinline__ void load(const int (&row)[2], int batch, int head) {
    bool there[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at = (static_cast<int64_t>(batch) * p.heads + head) * p.rows + (row[r] < 0 ? 0 : row[r]);
      lse[r] = p.lse[at];
      there[r] = row[r] >= 0 && lse[r] != -INFINITY;
      lse[r] = there[r] ? lse[r] * kLog2e : 0.0f;
      delta[r] = there[r] && lane % 4 == 0 ? -p.dlse[at] : 0.0f;
    }
    load_fragments<T, D>(q, p.q, batch, head, row, there, p.head_dim, lane);
    load_fragments<T, D>(dout, p.dout, batch, head, row, there, p.head_dim, lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const T* out = static_cast<const T*>(p.out.data) + batch * p.out.stride_batch + head * p.out.stride_head +
                     (there[r] ? row[r] : 0) * p.out.stride_token + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        if (there[r] && j * 8 < p.head_dim) {
          const uint32_t o = *reinterpret_cast<const uint32_t*>(out + j * 8), d = dout[j / 2][r + j % 2 * 2];
          delta[r] += low(o, T{}) * low(d, T{}) + high(o, T{}) * high(d, T{});
        }
      }
      delta[r] = sum_of_quad(delta[r]);
      if (row[r] >= 0 && lane % 4 == 0) {
        p.delta[(static_cast<int64_t>(batch) * p.heads + head) * p.rows + row[r]] = delta[r];
      }
    }
  }

  __device__ __forceinline__ void finish_last() {
    wgmma_wait<0>();
    if (some) release(&s.k.free[before.at], lane);
    some = false;
  }

  // `more`: another step follows, whose k is waited for before this step's products are: the branch keeps the compiler
  // from moving the exponentials behind that wait.
  __device__ __forceinline__ void step(bool masked, uint32_t word, bool more) {
    Products::rows(scores, q, k_rows, first(k_rows));
    barrier_wait(&s.v.full[now.at], now.phase);
    Products::rows(grads, dout, v_rows, first(v_rows));
    wgmma_wait<1>();  // the scores, and the last step's dq
    if (some) release(&s.k.free[before.at], lane);
    before = now;
    some = true;
    if (masked) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        if (!(word >> i & 1)) scores[i] = p.hidden;
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) scores[i] = exp2_approx(scores[i] * p.to_base2 - lse[i / 2 % 2]);
    Ring<kStages> next = now;
    next.next();
    if (more) barrier_wait(&s.k.full[next.at], next.phase);
    wgmma_wait<0>();
    release(&s.v.free[now.at], lane);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) grads[i] = scores[i] * (grads[i] - delta[i / 2 % 2]);
    pack_all<T>(packed, grads);
    Products::sums(dq, packed, k_columns, first(k_columns));
    now = next;
  }

  __device__ __forceinline__ void leave_out(int steps) {
    block_attention_detail::leave_out(s.k, s.v, now, steps, lane);
  }

  __device__ __forceinline__ void tile(const Work& work) {
    const Steps<kTokens> steps(work.tile, half);
    const int batch = work.tile[0] + work.batch;
    const int32_t* rows = p.side.rows + work.index * kTileRows + half * kHalfRows + thread / 32 * 16 + lane / 4;
    const int row[2] = {rows[0], rows[8]};
    load(row, batch, work.head);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dq[i] = 0.0f;
    const uint32_t* words = p.side.words + (static_cast<int64_t>(steps.masked) * 2 + half) * kWarpgroupThreads + thread;

    leave_out(steps.skip_before);
    const int full_end = steps.before + steps.full, n = full_end + steps.behind;
    if (n > 0) barrier_wait(&s.k.full[now.at], now.phase);
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const bool masked = i < steps.before || i >= full_end;
      uint32_t word = 0;
      if (masked) {
        word = *words;
        words += 2 * kWarpgroupThreads;
      }
      step(masked, word, i + 1 < n);
    }
    finish_last();
    leave_out(steps.skip_behind);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row[r] >= 0) store_row<T, D>(p.dq, batch, work.head, row[r], r, dq, p.scale, p.head_dim, lane);
    }
  }

  __device__ __forceinline__ void run() {
    consume(p, s.queue, p.heads, lane, [&](const Work& work) { tile(work); });
  }
};

template <int D, bool kKeys>
__device__ __forceinline__ void produce_keys(const BackwardArguments& p, DqShared<D>& s) {
  produce<kKeys>(p, s.queue, p.heads, kKeys ? s.k : s.v, kKeys ? p.x : p.y,
                 [&](auto& producer, const Work& work) { producer.tile(work.tile, work.head / p.group, work.batch); });
}

template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, 1) dq_kernel(const __grid_constant__ BackwardArguments p) {
#ifdef WAM_SM90A
  auto& s = *reinterpret_cast<DqShared<D>*>(shared_memory());
  const int thread = thread_index();
  if (thread == 0) {
    s.k.init();
    s.v.init();
    s.queue.init(kConsumerWarps + 1);
    barrier_init_fence();
  }
  sync_block();
  if (thread < kWarpgroupThreads) {
    registers_give<kProducerRegisters>();
    if (thread == 0) produce_keys<D, true>(p, s);
    if (thread == 32) produce_keys<D, false>(p, s);
  } else {
    registers_take<kConsumerRegisters>();
    DqConsumer<T, D>(p, s).run();
  }
#endif
}

// ---- dk and dv: its loops over work and steps are written out, not those of pipeline.cuh. It is short of registers:
// with any of them it spills at D = 128.

template <int D>
struct DkdvShared {
  static constexpr int kStages = D == 128 ? 4 : 8;
  Stages<D, kTokens, kStages> q, dout;
  alignas(1024) unsigned char own[2][2][kHalfRows * D * 2];  // of each warpgroup: k and v of its keys
  float lse[kStages][kTokens], delta[kStages][kTokens];      // lse in base 2
  alignas(8) uint64_t rows_full[kStages];
  Queue queue;
};

template <class T, int D>
struct DkdvConsumer {
  using Products = StageProducts<T, D>;
  static constexpr int kStages = DkdvShared<D>::kStages;
  const BackwardArguments& p;
  DkdvShared<D>& s;
  int thread, half, lane;
  uint64_t q_rows, dout_rows, q_columns, dout_columns, k_matrix, v_matrix;
  Ring<kStages> now{};
  float scores[kTokens / 2], grads[kTokens / 2], dk[D / 2], dv[D / 2];

  __device__ __forceinline__ DkdvConsumer(const BackwardArguments& p, DkdvShared<D>& s)
      : p(p), s(s), thread(thread_index() % kWarpgroupThreads) {
    half = from_lane_0(thread_index() / kWarpgroupThreads - 1);
    lane = thread % 32;
    q_rows = descriptor(s.q.data, 16, 1024);
    dout_rows = descriptor(s.dout.data, 16, 1024);
    q_columns = descriptor(s.q.data, kTokens * 128, 1024);
    dout_columns = descriptor(s.dout.data, kTokens * 128, 1024);
    k_matrix = descriptor(s.own[half][0], 16, 1024);
    v_matrix = descriptor(s.own[half][1], 16, 1024);
  }

  __device__ __forceinline__ void release(uint64_t* free) {
    if (lane == 0) barrier_arrive(free);
  }

  __device__ __forceinline__ void sync_half() { sync_named(1 + half, kWarpgroupThreads); }

  // k and v of this warpgroup's keys, 16 bytes a thread at a time: their tokens need not be consecutive.
  __device__ __forceinline__ void load_own(const int32_t* rows, int batch, int head) {
    constexpr int kChunks = D / 8;
#pragma unroll 1
    for (int i = thread; i < kHalfRows * kChunks; i += kWarpgroupThreads) {
      const int row = i / kChunks, chunk = i % kChunks, token = rows[row];
      const bool there = token >= 0 && chunk * 8 < p.head_dim;
      const int place = chunk / 8 * (kHalfRows * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
      copy(s.own[half][0] + place, p.k, batch, head, there ? token : 0, there ? chunk * 8 : 0, there);
      copy(s.own[half][1] + place, p.v, batch, head, there ? token : 0, there ? chunk * 8 : 0, there);
    }
    copy_async_wait_all();
    fence_async_proxy();
    sync_half();
  }

  __device__ __forceinline__ void copy(unsigned char* to, const Heads& t, int batch, int head, int token, int channel,
                                       bool there) {
    const T* from = static_cast<const T*>(t.data) + batch * t.stride_batch + head * t.stride_head +
                    token * t.stride_token + channel;
    copy_async16(to, from, there);
  }

  // All products of a step are waited for at its end: with one in flight across steps the compiler runs out of
  // registers and serialises them.
  __device__ __forceinline__ void step(bool masked, uint32_t word) {
    const uint32_t stage = from_lane_0(static_cast<uint32_t>(now.at * Products::kUnits));
    const auto first = [&](uint64_t matrix) { return static_cast<uint32_t>(matrix) + stage; };
    barrier_wait(&s.q.full[now.at], now.phase);
    Products::rows(scores, k_matrix, q_rows, first(q_rows));
    barrier_wait(&s.dout.full[now.at], now.phase);
    Products::rows(grads, v_matrix, dout_rows, first(dout_rows));
    wgmma_wait<1>();
    if (masked) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        if (!(word >> i & 1)) scores[i] = p.hidden;
      }
    }
    barrier_wait(&s.rows_full[now.at], now.phase);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      scores[i] = exp2_approx(scores[i] * p.to_base2 - s.lse[now.at][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    }
    uint32_t probabilities[kTokens / 16][4];
    pack_all<T>(probabilities, scores);
    Products::sums(dv, probabilities, dout_columns, first(dout_columns));
    wgmma_wait<1>();
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      grads[i] = scores[i] * (grads[i] - s.delta[now.at][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    }
    uint32_t packed[kTokens / 16][4];  // registers of their own: those of the probabilities are still being read
    pack_all<T>(packed, grads);
    Products::sums(dk, packed, q_columns, first(q_columns));
    wgmma_wait<0>();
    release(&s.q.free[now.at]);
    release(&s.dout.free[now.at]);
    now.next();
  }

  // As leave_out of pipeline.cuh, with the rows of the queries.
  __device__ __forceinline__ void leave_out(int steps) {
    if (lane == 0) {
      Ring<kStages> at = now;
#pragma unroll 1
      for (int i = 0; i < steps; ++i) {
        barrier_wait(&s.q.full[at.at], at.phase);
        barrier_wait(&s.rows_full[at.at], at.phase);
        barrier_arrive(&s.q.free[at.at]);
        barrier_wait(&s.dout.full[at.at], at.phase);
        barrier_arrive(&s.dout.free[at.at]);
        at.next();
      }
    }
    sync_warp();
    now.skip(steps);
  }

  // The word of this thread in a masked step of this half.
  __device__ __forceinline__ uint32_t word_of(int masked_step) {
    return p.side.words[(static_cast<int64_t>(masked_step) * 2 + half) * kWarpgroupThreads + thread];
  }

  __device__ __forceinline__ void queries_of_head(const Steps<kTokens>& steps) {
    leave_out(steps.skip_before);
    const int full_end = steps.before + steps.full, n = full_end + steps.behind;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const bool masked = i < steps.before || i >= full_end;
      step(masked, masked ? word_of(steps.masked + (i < steps.before ? i : i - steps.full)) : 0u);
    }
    leave_out(steps.skip_behind);
  }

  // A key that nothing attends to gets zeros, whatever it and its sums hold.
  __device__ __forceinline__ void clear_unattended(const Steps<kTokens>& steps) {
    if (steps.full > 0) return;
    uint32_t any = 0;
#pragma unroll 1
    for (int i = 0; i < steps.before + steps.behind; ++i) any |= word_of(steps.masked + i);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool attended = sum_of_quad(any & (0x33333333u << 2 * r) ? 1.0f : 0.0f) != 0.0f;
#pragma unroll
      for (int i = 0; i < D / 4; ++i) {
        const int at = i / 2 * 4 + 2 * r + i % 2;
        dk[at] = attended ? dk[at] : 0.0f;
        dv[at] = attended ? dv[at] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void store(const int32_t* rows, int batch, int head) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = rows[thread / 32 * 16 + lane / 4 + 8 * r];
      if (token < 0) continue;
      store_row<T, D>(p.dk, batch, head, token, r, dk, p.scale, p.head_dim, lane);
      store_row<T, D>(p.dv, batch, head, token, r, dv, 1.0f, p.head_dim, lane);
    }
  }

  __device__ __forceinline__ void tile(const Work& work) {
    const Steps<kTokens> steps(work.tile, half);
    const int batch = work.tile[0] + work.batch;
    const int32_t* rows = p.side.rows + work.index * kTileRows + half * kHalfRows;
    load_own(rows, batch, work.head);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.0f;
#pragma unroll 1
    for (int turn = 0; turn < p.group; ++turn) queries_of_head(steps);
    clear_unattended(steps);
    store(rows, batch, work.head);
    sync_half();  // nobody's products read the keys any more when the next ones come
  }

  __device__ __forceinline__ void run() {
    Ring<2> turn;
    for (;;) {
      const int work = read_work_by_warp(s.queue, turn, lane);
      if (work == kNoWork) return;
      tile(Work(work, p.side.tiles, p.heads / p.group, p.repeat));
    }
  }
};

template <int D, bool kQueries>
__device__ __forceinline__ void produce_queries(const BackwardArguments& p, DkdvShared<D>& s) {
  Producer<D, kTokens, DkdvShared<D>::kStages> producer{kQueries ? s.q : s.dout, kQueries ? p.x : p.y, p.side};
  Ring<2> turn;
  for (;;) {
    const int drawn = kQueries ? draw_work(s.queue, turn, p.counter, p.work) : read_work(s.queue, turn);
    if (drawn == kNoWork) return;
    const Work work(drawn, p.side.tiles, p.heads / p.group, p.repeat);
#pragma unroll 1
    for (int i = 0; i < p.group; ++i) producer.tile(work.tile, work.head * p.group + i, work.batch);
  }
}

// lse and delta of the queries of every stage: two warps, each with the 32 tokens of one box, one a lane.
template <int D>
struct RowProducer {
  static constexpr int kStages = DkdvShared<D>::kStages;
  const BackwardArguments& p;
  DkdvShared<D>& s;
  int place, lane;
  Ring<kStages> now{};

  // `at`: of the token in lse and delta, -1 for none.
  __device__ __forceinline__ void stage(int at) {
    const float lse = at < 0 ? 0.0f : p.lse[at] * kLog2e, delta = at < 0 ? 0.0f : p.delta[at];
    barrier_wait(&s.dout.free[now.at], now.phase ^ 1);
    s.lse[now.at][place] = lse;
    s.delta[now.at][place] = delta;
    sync_warp();
    if (lane == 0) barrier_arrive(&s.rows_full[now.at]);
    now.next();
  }

  __device__ __forceinline__ void masked_steps(int head, int step, int n) {
#pragma unroll 1
    for (; n > 0; --n, ++step) {
      const int box = p.side.boxes[step * kBoxes + place / kBoxTokens], first = box & ((1 << kTokenBits) - 1);
      const int at = lane - (box >> kTokenBits);
      stage(at < 0 || first == (1 << kTokenBits) - 1 ? -1 : head + first + at);
    }
  }

  __device__ __forceinline__ void tile(const int32_t* tile, int head) {
    masked_steps(head, tile[2], tile[3]);
#pragma unroll 1
    for (int i = 0; i < tile[4] * 2; ++i) stage(head + p.side.full[tile[1] + i / 2] + i % 2 * kTokens + place);
    masked_steps(head, tile[2] + tile[3], tile[5] + tile[6]);
  }

  __device__ __forceinline__ void run() {
    static_assert(kFullTokens == 2 * kTokens);
    Ring<2> turn;
    for (;;) {
      const int drawn = read_work_by_warp(s.queue, turn, lane);
      if (drawn == kNoWork) return;
      const Work work(drawn, p.side.tiles, p.heads / p.group, p.repeat);
      int head = ((work.tile[7] + work.batch) * p.heads + work.head * p.group) * static_cast<int>(p.rows);
#pragma unroll 1
      for (int i = 0; i < p.group; ++i, head += static_cast<int>(p.rows)) tile(work.tile, head);
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, 1) dkdv_kernel(const __grid_constant__ BackwardArguments p) {
#ifdef WAM_SM90A
  auto& s = *reinterpret_cast<DkdvShared<D>*>(shared_memory());
  const int thread = thread_index();
  if (thread == 0) {
    s.q.init();
    s.dout.init();
    for (int i = 0; i < DkdvShared<D>::kStages; ++i) barrier_init(&s.rows_full[i], kBoxes);
    s.queue.init(kConsumerWarps + 1 + kBoxes);
    barrier_init_fence();
  }
  sync_block();
  if (thread < kWarpgroupThreads) {
    registers_give<kProducerRegisters>();
    if (thread == 0) produce_queries<D, true>(p, s);
    if (thread == 32) produce_queries<D, false>(p, s);
    if (thread >= 64) RowProducer<D>{p, s, thread - 64, thread % 32}.run();
  } else {
    registers_take<kConsumerRegisters>();
    DkdvConsumer<T, D>(p, s).run();
  }
#endif
}

// ---- launches

inline BackwardArguments backward_arguments(const BlockAttentionParams& params) {
  BackwardArguments p{};
  p.q = params.q;
  p.k = params.k;
  p.v = params.v;
  p.out = params.out;
  p.dout = params.dout;
  p.dq = params.dq;
  p.dk = params.dk;
  p.dv = params.dv;
  p.lse = params.lse;
  p.dlse = params.dlse;
  p.delta = params.delta;
  p.rows = params.rows;
  p.heads = params.heads;
  p.group = params.heads / params.key_heads;
  p.repeat = static_cast<int32_t>(params.shared ? params.batch : 1);
  p.head_dim = params.head_dim;
  p.scale = params.scale;
  p.to_base2 = std::copysign(std::fmax(std::fabs(params.scale) * kLog2e, FLT_MIN), params.scale);
  p.hidden = std::copysign(INFINITY, -p.to_base2);
  return p;
}

inline StreamMaps backward_maps(const BlockAttentionParams& params, DType dtype, const char* name, const Heads& t,
                                int64_t tokens, int64_t heads) {
  return stream_maps("block_attention", name, t, params.batch, tokens, heads, params.head_dim, kTokens, dtype);
}

template <class T, int D>
void launch_dq(const BlockAttentionParams& params, DType dtype, void* stream) {
  BackwardArguments p = backward_arguments(params);
  p.x = backward_maps(params, dtype, "k", params.k, params.tokens, params.key_heads);
  p.y = backward_maps(params, dtype, "v", params.v, params.tokens, params.key_heads);
  p.side = params.queries;
  p.counter = params.counters;
  p.work = static_cast<int32_t>(params.queries.n_tiles * params.heads * p.repeat);
  launch_persistent("block_attention", dq_kernel<T, D>, p.work, sizeof(DqShared<D>), stream, p);
}

template <class T, int D>
void launch_dkdv(const BlockAttentionParams& params, DType dtype, void* stream) {
  BackwardArguments p = backward_arguments(params);
  p.x = backward_maps(params, dtype, "q", params.q, params.rows, params.heads);
  p.y = backward_maps(params, dtype, "dout", params.dout, params.rows, params.heads);
  p.side = params.keys;
  p.counter = params.counters + 1;
  p.work = static_cast<int32_t>(params.keys.n_tiles * params.key_heads * p.repeat);
  launch_persistent("block_attention", dkdv_kernel<T, D>, p.work, sizeof(DkdvShared<D>), stream, p);
}

// dkdv reads the delta that dq writes.
template <class T, int D>
void launch_backward(const BlockAttentionParams& params, DType dtype, void* stream) {
  launch_dq<T, D>(params, dtype, stream);
  launch_dkdv<T, D>(params, dtype, stream);
}

}  // namespace block_attention_detail

#endif  // WAM_DEVICE_CODE

}  // namespace wam
