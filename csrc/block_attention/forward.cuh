// Forward of block attention for sm_90a: every step by TMA, two producer threads, two consumer warpgroups.
//
// A consumer keeps the products of two neighbouring steps in flight: the scores of this one beside the values of the
// last one, and takes the softmax of this one while the last one's values are still being multiplied. Full steps have
// 128 tokens and masked ones 64; the ways from one size to the next each have a body of their own, because products of
// two sizes on one array of scores would be serialised by the compiler. README.md has a picture.
#include <cfloat>
#include <cmath>

#include "pipeline.cuh"

namespace wam {

#ifdef WAM_DEVICE_CODE

namespace block_attention_detail {

struct ForwardArguments {
  StreamMaps k, v;
  Heads q, out;
  float* lse;
  BoxSide side;
  int32_t* counter;
  int64_t rows;
  int32_t work, heads, group, repeat, head_dim;
  float to_base2;  // what takes products to base 2: above 0, the scale's sign goes into q
  uint32_t flip;   // sign bits of two numbers of q
};

template <int D>
struct ForwardShared {
  static constexpr int kStages = D == 128 ? 3 : 5;
  Stages<D, kFullTokens, kStages> k, v;
  Queue queue;
};

template <class T, int D>
struct ForwardConsumer {
  static constexpr int kStages = ForwardShared<D>::kStages;
  static constexpr int kStageUnits = kFullTokens * D * 2 / 16;  // descriptors count 16 bytes
  const ForwardArguments& p;
  ForwardShared<D>& s;
  int thread, half, lane;
  uint64_t k_matrix, v_matrix;
  Ring<kStages> at_k{}, at_v{};
  uint32_t q[D / 16][4], probabilities[kFullTokens / 16][4];
  float out[D / 2], top[2], total[2];
  const uint32_t* words;
  uint32_t word;
  int left;

  __device__ __forceinline__ ForwardConsumer(const ForwardArguments& p, ForwardShared<D>& s)
      : p(p), s(s), thread(thread_index() % kWarpgroupThreads), half(thread_index() / kWarpgroupThreads - 1) {
    lane = thread % 32;
    k_matrix = descriptor(s.k.data, 16, 1024);
    v_matrix = descriptor(s.v.data, kFullTokens * 128, 1024);
  }

  template <int N>
  __device__ __forceinline__ void issue_scores(float (&scores)[N / 2]) {
    const uint32_t first = from_lane_0(static_cast<uint32_t>(k_matrix) + at_k.at * kStageUnits);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      const int by = kk / 4 * (kFullTokens * 128 / 16) + kk % 4 * 2;
      Wgmma<T, N>::template registers<false>(scores, q[kk], moved(k_matrix, first, by), kk != 0);
    }
    wgmma_commit();
  }

  template <int N>
  __device__ __forceinline__ void issue_values() {
    const uint32_t first = from_lane_0(static_cast<uint32_t>(v_matrix) + at_v.at * kStageUnits);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < N / 16; ++kk) {
      Wgmma<T, D>::template registers<true>(out, probabilities[kk], moved(v_matrix, first, kk * 128), true);
    }
    wgmma_commit();
  }

  // Scores become probabilities; `top` and `total` go on; returns in `shrink` what earlier sums are multiplied by.
  template <int N>
  __device__ __forceinline__ void softmax(float (&scores)[N / 2], float (&shrink)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = scores[2 * r];
#pragma unroll
      for (int j = 0; j < N / 8; ++j) most = fmaxf(most, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(fmaxf(most, shuffle_xor(most, 2)), top[r]);
      const float base = most == -INFINITY ? 0.0f : most * p.to_base2;
      shrink[r] = exp2_approx(top[r] * p.to_base2 - base);
      top[r] = most;
      total[r] *= shrink[r];
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores[4 * j + 2 * r + c];
          x = exp2_approx(x * p.to_base2 - base);
          total[r] += x;
        }
      }
    }
  }

  template <int N>
  __device__ __forceinline__ void keep(const float (&scores)[N / 2]) {
#pragma unroll
    for (int kk = 0; kk < N / 16; ++kk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) probabilities[kk][i] = pack(scores[8 * kk + 2 * i], scores[8 * kk + 2 * i + 1], T{});
    }
  }

  template <int N>
  __device__ __forceinline__ void mask(float (&scores)[N / 2]) {
    if constexpr (N == kMaskedTokens) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        if (!(word >> i & 1)) scores[i] = -INFINITY;
      }
    }
  }

  // A word is read before the scores are issued and tested after them.
  template <int N>
  __device__ __forceinline__ void read_word() {
    if constexpr (N == kMaskedTokens) {
      word = *words;
      words += 2 * kWarpgroupThreads;
    }
  }

  // The next keys are waited for here: the branches keep ptxas from moving the softmax behind the wait for the values.
  __device__ __forceinline__ void await_next_keys() {
    if (--left > 0) barrier_wait(&s.k.full[at_k.at], at_k.phase);
  }

  template <int N>
  __device__ __forceinline__ void first_step() {
    float scores[N / 2], shrink[2];
    read_word<N>();
    barrier_wait(&s.k.full[at_k.at], at_k.phase);
    issue_scores<N>(scores);
    wgmma_wait<0>();
    release(&s.k.free[at_k.at], lane);
    at_k.next();
    mask<N>(scores);
    softmax<N>(scores, shrink);
    await_next_keys();
    keep<N>(scores);
  }

  // The scores of N tokens beside the values of the kLast tokens of the step before.
  template <int kLast, int N>
  __device__ __forceinline__ void next_step() {
    float scores[N / 2], shrink[2];
    read_word<N>();
    issue_scores<N>(scores);
    barrier_wait(&s.v.full[at_v.at], at_v.phase);
    issue_values<kLast>();
    wgmma_wait<1>();
    release(&s.k.free[at_k.at], lane);
    at_k.next();
    mask<N>(scores);
    softmax<N>(scores, shrink);
    await_next_keys();
    wgmma_wait<0>();
    release(&s.v.free[at_v.at], lane);
    at_v.next();
    keep<N>(scores);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= shrink[i / 2 % 2];
  }

  // n steps of N tokens; `last` is how many the step before had, 0 for none.
  template <int N, int kOther>
  __device__ __forceinline__ void take(int n, int& last) {
    if (n == 0) return;
    if (last == 0) {
      first_step<N>();
    } else if (last == N) {
      next_step<N, N>();
    } else {
      next_step<kOther, N>();
    }
#pragma unroll 1
    for (int i = 1; i < n; ++i) next_step<N, N>();
    last = N;
  }

  template <int N>
  __device__ __forceinline__ void last_values() {
    issue_values<N>();
    wgmma_wait<0>();
  }

  __device__ __forceinline__ void leave_out(int steps) {
    block_attention_detail::leave_out(s.k, s.v, at_k, steps, lane);
    at_v = at_k;
  }

  __device__ __forceinline__ void load_q(const int (&row)[2], int batch, int head) {
    const bool there[2] = {row[0] >= 0, row[1] >= 0};
    load_fragments<T, D>(q, p.q, batch, head, row, there, p.head_dim, lane);
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[kk][i] ^= p.flip;
    }
  }

  __device__ __forceinline__ void store(const int (&row)[2], int batch, int head) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of_quad(total[r]);
      if (row[r] < 0) continue;
      const bool nothing = sum == 0.0f;
      store_row<T, D>(p.out, batch, head, row[r], r, out, nothing ? 0.0f : 1.0f / sum, p.head_dim, lane);
      if (lane % 4 == 0) {
        p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.rows + row[r]] =
            nothing ? -INFINITY : (top[r] * p.to_base2 + log2f(sum)) / kLog2e;
      }
    }
  }

  __device__ __forceinline__ void tile(const Work& work) {
    const Steps<kFullTokens> steps(work.tile, half);
    const int batch = work.tile[0] + work.batch;
    const int32_t* rows = p.side.rows + work.index * kTileRows + half * kHalfRows + thread / 32 * 16 + lane / 4;
    const int row[2] = {rows[0], rows[8]};
    load_q(row, batch, work.head);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    top[0] = top[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
    words = p.side.words + (static_cast<int64_t>(steps.masked) * 2 + half) * kWarpgroupThreads + thread;

    leave_out(steps.skip_before);
    left = steps.before + steps.full + steps.behind;
    int last = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {  // one copy of the masked bodies serves before and behind
      take<kMaskedTokens, kFullTokens>(pass ? steps.behind : steps.before, last);
      if (pass == 0) take<kFullTokens, kMaskedTokens>(steps.full, last);
    }
    if (last != 0) {
      barrier_wait(&s.v.full[at_v.at], at_v.phase);
      if (last == kFullTokens) {
        last_values<kFullTokens>();
      } else {
        last_values<kMaskedTokens>();
      }
      release(&s.v.free[at_v.at], lane);
      at_v.next();
    }
    leave_out(steps.skip_behind);
    store(row, batch, work.head);
  }

  __device__ __forceinline__ void run() {
    consume(p, s.queue, p.heads, lane, [&](const Work& work) { tile(work); });
  }
};

// One thread for the keys, which also draws the work, and one for the values, each with a ring of its own: neither
// waits for the other's stages, and 24 registers are enough.
template <int D, bool kKeys>
__device__ __forceinline__ void produce_keys(const ForwardArguments& p, ForwardShared<D>& s) {
  produce<kKeys>(p, s.queue, p.heads, kKeys ? s.k : s.v, kKeys ? p.k : p.v,
                 [&](auto& producer, const Work& work) { producer.tile(work.tile, work.head / p.group, work.batch); });
}

template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments p) {
#ifdef WAM_SM90A
  auto& s = *reinterpret_cast<ForwardShared<D>*>(shared_memory());
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
    ForwardConsumer<T, D>(p, s).run();
  }
#endif
}

template <class T, int D>
void launch_forward(const BlockAttentionParams& params, DType dtype, void* stream) {
  const char* op = "block_attention";
  ForwardArguments p{};
  p.k = stream_maps(op, "k", params.k, params.batch, params.tokens, params.key_heads, params.head_dim, kFullTokens,
                    dtype);
  p.v = stream_maps(op, "v", params.v, params.batch, params.tokens, params.key_heads, params.head_dim, kFullTokens,
                    dtype);
  p.q = params.q;
  p.out = params.out;
  p.lse = params.lse;
  p.side = params.queries;
  p.counter = params.counters;
  p.rows = params.rows;
  p.heads = params.heads;
  p.group = params.heads / params.key_heads;
  p.repeat = static_cast<int32_t>(params.shared ? params.batch : 1);
  p.head_dim = params.head_dim;
  p.work = static_cast<int32_t>(params.queries.n_tiles * params.heads * p.repeat);
  // with its sign in q the largest product is the largest score, and -inf, which marks what is masked, stays -inf; also
  // at scale 0, which becomes the smallest normal number
  p.to_base2 = std::fmax(std::fabs(params.scale) * kLog2e, FLT_MIN);
  p.flip = params.scale < 0.0f ? 0x80008000u : 0u;
  launch_persistent(op, forward_kernel<T, D>, p.work, sizeof(ForwardShared<D>), stream, p);
}

}  // namespace block_attention_detail

#endif  // WAM_DEVICE_CODE

}  // namespace wam
