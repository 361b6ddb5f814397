// The part kernel for sm_90a: keys and values of a part come once, by TMA, for up to 192 rows of any groups.
//
// A tile is three strips of 64 rows, each of one group and one warpgroup: 128 video and 16 action rows are one tile. A
// fourth warpgroup copies. First one warp turns the ranges of the tile's groups, which only the device knows, into a
// plan: the slots in order, cut wherever a group begins or ends to attend, so that a strip attends to all of a step's
// slots or to none. It leaves out the latter, so what a group does not attend to changes none of its results. What
// fills no step of 64 comes as boxes of at most 32 slots behind a gap of zeros, as in block_attention: two boxes of the
// same strips a step.
//
// A consumer holds 160 registers: sums of 64 rows, scores of one step, and the last step's probabilities, whose product
// is under way during the softmax. So q stays in shared memory.
#include <cfloat>
#include <climits>
#include <cmath>

#include "block_attention/pipeline.cuh"
#include "common/vectors.cuh"
#include "params.h"
#include "ranges.cuh"

namespace wam {

#ifdef WAM_DEVICE_CODE

namespace cached_attention_detail::streamed {

using namespace wam::sm90;
using block_attention_detail::kBoxTokens;
using block_attention_detail::kTokenBits;
using block_attention_detail::kWarpgroupThreads;
using block_attention_detail::release;
using block_attention_detail::Ring;
using block_attention_detail::stream_maps;
using block_attention_detail::StreamMaps;
using block_attention_detail::sum_of_quad;

constexpr int kStrips = 3, kStepSlots = 64;
constexpr int kThreads = (1 + kStrips) * kWarpgroupThreads;
constexpr int kReaderWarps = kStrips * kWarpgroupThreads / 32;
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
// Ranges cut the slots into less than twice as many pieces; a piece is whole steps and boxes.
constexpr int kRanges = kStrips * kMaxStreamedRanges, kMaxStretches = 4 * kRanges;
constexpr uint32_t kWhole = 0xffffffffu, kNoBox = static_cast<uint32_t>(kBoxTokens) << kTokenBits;

struct Arguments {
  CachedAttentionParams call;
  StreamMaps k, v;
  int32_t tiles, group;
  uint32_t flip;  // sign bits of two numbers of q
};

// `steps` times 64 slots from `first` on where `second` is kWhole; else one step of two boxes, slot | gap << 26.
struct Stretch {
  uint32_t first, second;
  int32_t steps;
  uint32_t strips;  // bit w: strip w attends to all of its slots; the others to none
};

struct Plan {
  int32_t begin[kRanges], end[kRanges];  // of each strip's group, cut off at the cache's ends
  Stretch stretches[kMaxStretches];
  int32_t first, steps;  // of this part
};

template <int D>
constexpr int kStagesOf = D == 128 ? 5 : 10;

template <int D>
struct Stages : block_attention_detail::Stages<D, kStepSlots, kStagesOf<D>> {
  __device__ __forceinline__ void init() {
    for (int i = 0; i < this->kStages; ++i) {
      barrier_init(&this->full[i], 1);
      barrier_init(&this->free[i], kReaderWarps);
    }
  }
};

template <int D>
struct Shared {
  Stages<D> k, v;
  alignas(1024) unsigned char q[kStrips][kTileRows * D * 2];
  Plan plan;
};

// What a block does. Tiles of one head come one after the other, and batch elements: they may share a cache.
struct Work {
  int tile, batch, part, head;

  __device__ __forceinline__ Work(int index, const Arguments& p) {
    const int batches = static_cast<int>(p.call.batch);
    tile = index % p.tiles;
    batch = index / p.tiles % batches;
    part = index / p.tiles / batches % p.call.parts;
    head = index / p.tiles / batches / p.call.parts;
  }
};

// ---- the plan, by one warp

class Planner {
 public:
  __device__ __forceinline__ Planner(Plan& plan, int lane) : plan_(plan), lane_(lane) {}

  __device__ __forceinline__ void write(const CachedAttentionParams& p, const Work& work) {
    read_ranges(p, work);
    // From one end of a range to the next: [begin, at) is what `strips` attend to.
    int begin = 0, at = -1;
    uint32_t strips = 0;
    for (;;) {
      int next = INT_MAX;
      uint32_t now = 0;
      for (int i = lane_; i < kRanges; i += 32) {
        const int first = plan_.begin[i], last = plan_.end[i];
        if (first <= at && at < last) now |= 1u << i / kMaxStreamedRanges;
        const int end = first > at ? first : last;
        if (first < last && end > at && end < next) next = end;
      }
      next = warp_min(next);
      now = warp_or(now);
      if (now != strips) {
        if (strips != 0) add_piece(begin, at, strips);
        begin = at;
        strips = now;
      }
      if (next == INT_MAX) break;
      at = next;
    }
    for (uint32_t of = 1; of < 1u << kStrips; ++of) {
      const uint32_t box = from_lane(waiting_, static_cast<int>(of));
      if (box != kNoBox) add({box, kNoBox, 1, of});
    }
    const int share = (steps_ + p.parts - 1) / p.parts, first = work.part * share;
    if (lane_ == 0) {
      plan_.first = first;
      plan_.steps = first >= steps_ ? 0 : first + share < steps_ ? share : steps_ - first;
    }
  }

 private:
  __device__ __forceinline__ void read_ranges(const CachedAttentionParams& p, const Work& work) {
#pragma unroll
    for (int w = 0; w < kStrips; ++w) {
      const TileRows rows(work.tile * kStrips + w, p);
      const int32_t* bounds =
          p.ranges + (static_cast<int64_t>(work.batch) * p.groups + rows.group) * p.ranges_of_group * 2;
      int begin = 0, end = 0;
      if (rows.begin < rows.end && lane_ < p.ranges_of_group) {
        const Range range(bounds, lane_, static_cast<int>(p.slots));
        begin = range.start;
        end = begin + range.length;
      }
      plan_.begin[w * kMaxStreamedRanges + lane_] = begin;
      plan_.end[w * kMaxStreamedRanges + lane_] = end;
    }
    sync_warp();
  }

  __device__ __forceinline__ void add(const Stretch& stretch) {
    if (lane_ == 0) plan_.stretches[stretches_] = stretch;
    ++stretches_;
    steps_ += stretch.steps;
  }

  static __device__ __forceinline__ uint32_t box(int slot, int slots) {
    return static_cast<uint32_t>(slot) | static_cast<uint32_t>(kBoxTokens - slots) << kTokenBits;
  }

  __device__ __forceinline__ void add_piece(int begin, int end, uint32_t strips) {
    const int whole = (end - begin) / kStepSlots, slot = begin + whole * kStepSlots, left = end - slot;
    if (whole > 0) add({static_cast<uint32_t>(begin), kWhole, whole, strips});
    if (left > kBoxTokens) {
      add({box(slot, kBoxTokens), box(slot + kBoxTokens, left - kBoxTokens), 1, strips});
    } else if (left > 0) {
      const uint32_t other = from_lane(waiting_, static_cast<int>(strips));
      if (other != kNoBox) add({other, box(slot, left), 1, strips});
      if (lane_ == static_cast<int>(strips)) waiting_ = other == kNoBox ? box(slot, left) : kNoBox;
    }
  }

  Plan& plan_;
  int lane_, stretches_ = 0, steps_ = 0;
  uint32_t waiting_ = kNoBox;  // in lane x: a box of the strips x that has no other one yet
};

// A place in the steps of a part, stretch after stretch.
struct Walk {
  const Stretch* now;
  int step, left;  // step of the stretch; steps of the part

  __device__ __forceinline__ explicit Walk(const Plan& plan) : now(plan.stretches), step(plan.first), left(plan.steps) {
    while (left > 0 && step >= now->steps) step -= now++->steps;
  }

  // Steps of this stretch that belong to the part.
  __device__ __forceinline__ int here() const { return now->steps - step < left ? now->steps - step : left; }

  __device__ __forceinline__ void next_stretch() {
    left -= here();
    step = 0;
    ++now;
  }
};

// ---- copies, one thread for the keys and one for the values

template <int D>
__device__ __forceinline__ void produce(const Plan& plan, Stages<D>& stages, const StreamMaps& maps, int head,
                                        int batch) {
  Ring<kStagesOf<D>> ring;
#pragma unroll 1
  for (Walk walk(plan); walk.left > 0; walk.next_stretch()) {
    const Stretch stretch = *walk.now;
    const int n = walk.here();
    int slot = static_cast<int>(stretch.first) + walk.step * kStepSlots;
#pragma unroll 1
    for (int i = 0; i < n; ++i, slot += kStepSlots) {
      unsigned char* to = stages.data[ring.at];
      uint64_t* full = &stages.full[ring.at];
      barrier_wait(&stages.free[ring.at], ring.phase ^ 1);
      barrier_arrive_expect(full, kStepSlots * D * 2);
      if (stretch.second == kWhole) {
#pragma unroll
        for (int c = 0; c < D; c += 64) tma_load(to + c * kStepSlots * 2, &maps.whole, full, c, head, slot, batch);
      } else {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const uint32_t box = x ? stretch.second : stretch.first;
          const int gap = static_cast<int>(box >> kTokenBits), from = static_cast<int>(box & ((1u << kTokenBits) - 1));
#pragma unroll
          for (int c = 0; c < D; c += 64) {
            tma_load(to + c * kStepSlots * 2 + x * kBoxTokens * 128, &maps.box, full, c, head, -gap, from, batch);
          }
        }
      }
      ring.next();
    }
  }
}

// ---- a strip

template <class T, int D>
struct Consumer {
  static constexpr int kStages = kStagesOf<D>;
  static constexpr int kStageUnits = kStepSlots * D * 2 / 16;  // descriptors count 16 bytes
  const Arguments& p;
  Shared<D>& s;
  int strip, thread, lane;
  uint64_t q_matrix, k_matrix, v_matrix;
  Ring<kStages> at_k{}, at_v{};
  uint32_t probabilities[kStepSlots / 16][4];
  float out[D / 2], top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

  __device__ __forceinline__ Consumer(const Arguments& p, Shared<D>& s)
      : p(p), s(s), strip(thread_index() / kWarpgroupThreads - 1), thread(thread_index() % kWarpgroupThreads) {
    strip = from_lane_0(strip);
    lane = thread % 32;
    q_matrix = descriptor(s.q[strip], 16, 1024);
    k_matrix = descriptor(s.k.data, 16, 1024);
    v_matrix = descriptor(s.v.data, kStepSlots * 128, 1024);
  }

  // 16 channels of q or of a stage: 64 rows of 128 bytes, then the next 64 channels.
  static __device__ __forceinline__ int columns(int kk) { return kk / 4 * (kStepSlots * 128 / 16) + kk % 4 * 2; }

  __device__ __forceinline__ void issue_scores(float (&scores)[kStepSlots / 2]) {
    const uint32_t first = from_lane_0(static_cast<uint32_t>(k_matrix) + at_k.at * kStageUnits);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      Wgmma<T, kStepSlots>::shared(scores, moved(q_matrix, static_cast<uint32_t>(q_matrix), columns(kk)),
                                   moved(k_matrix, first, columns(kk)), kk != 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_values() {
    const uint32_t first = from_lane_0(static_cast<uint32_t>(v_matrix) + at_v.at * kStageUnits);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kStepSlots / 16; ++kk) {
      Wgmma<T, D>::template registers<true>(out, probabilities[kk], moved(v_matrix, first, kk * 128), true);
    }
    wgmma_commit();
  }

  // Scores of the gaps of two boxes.
  __device__ __forceinline__ void mask(float (&scores)[kStepSlots / 2], const Stretch& boxes) {
    const int gap[2] = {static_cast<int>(boxes.first >> kTokenBits) - lane % 4 * 2,
                        static_cast<int>(boxes.second >> kTokenBits) - lane % 4 * 2};
#pragma unroll
    for (int i = 0; i < kStepSlots / 2; ++i) {
      const int j = i / 4, column = j % 4 * 8 + i % 2;
      if (column < gap[j / 4]) scores[i] = -INFINITY;
    }
  }

  // Scores become powers of 2; `shrink` is what earlier sums are multiplied by.
  __device__ __forceinline__ void softmax(float (&scores)[kStepSlots / 2], float (&shrink)[2]) {
    const float to_base2 = p.call.to_base2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = scores[2 * r];
#pragma unroll
      for (int j = 0; j < kStepSlots / 8; ++j) {
        most = fmaxf(most, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
      }
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(fmaxf(most, shuffle_xor(most, 2)), top[r]);
      const float base = most == -INFINITY ? 0.0f : most * to_base2;
      shrink[r] = exp2_approx(top[r] * to_base2 - base);
      top[r] = most;
      total[r] *= shrink[r];
#pragma unroll
      for (int j = 0; j < kStepSlots / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores[4 * j + 2 * r + c];
          x = exp2_approx(x * to_base2 - base);
          total[r] += x;
        }
      }
    }
  }

  __device__ __forceinline__ void keep(const float (&scores)[kStepSlots / 2]) {
#pragma unroll
    for (int kk = 0; kk < kStepSlots / 16; ++kk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) probabilities[kk][i] = pack(scores[8 * kk + 2 * i], scores[8 * kk + 2 * i + 1], T{});
    }
  }

  // A step, with the values of the step before (kSecond) under its softmax: of none at a strip's beginning and where it
  // has left steps out. If `more` steps follow in the part, the
  // next keys are waited for before the values are: the branch keeps ptxas from moving the exponentials behind them.
  template <bool kSecond>
  __device__ __forceinline__ void step(const Stretch& stretch, bool more) {
    float scores[kStepSlots / 2], shrink[2];
    if constexpr (!kSecond) barrier_wait(&s.k.full[at_k.at], at_k.phase);
    issue_scores(scores);
    if constexpr (kSecond) {
      barrier_wait(&s.v.full[at_v.at], at_v.phase);
      issue_values();
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    release(&s.k.free[at_k.at], lane);
    at_k.next();
    if (stretch.second != kWhole) mask(scores, stretch);
    softmax(scores, shrink);
    if (more) barrier_wait(&s.k.full[at_k.at], at_k.phase);
    if constexpr (kSecond) {
      wgmma_wait<0>();
      release(&s.v.free[at_v.at], lane);
      at_v.next();
    }
    keep(scores);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= shrink[i / 2 % 2];
  }

  __device__ __forceinline__ void last_values() {
    barrier_wait(&s.v.full[at_v.at], at_v.phase);
    issue_values();
    wgmma_wait<0>();
    release(&s.v.free[at_v.at], lane);
    at_v.next();
  }

  __device__ __forceinline__ void run(const Work& work) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    bool some = false;  // values of a step are not yet added
#pragma unroll 1
    for (Walk walk(s.plan); walk.left > 0; walk.next_stretch()) {
      const Stretch stretch = *walk.now;
      const int n = from_lane_0(walk.here()), left = from_lane_0(walk.left);
      if (from_lane_0(stretch.strips) >> strip & 1) {
        int i = 0;
        if (!some) step<false>(stretch, ++i < left);
        some = true;
#pragma unroll 1
        while (i < n) step<true>(stretch, ++i < left);
      } else {
        // what it still needs is released first: the copies could not pass it
        if (some) last_values();
        some = false;
        block_attention_detail::leave_out(s.k, s.v, at_k, n, lane);
        at_v = at_k;
      }
    }
    if (some) last_values();
    store(work);
  }

  // The rows' sums: lse_p in base 2, and out_p.
  __device__ __forceinline__ void store(const Work& work) {
    const TileRows rows(work.tile * kStrips + strip, p.call);
    const int64_t part = static_cast<int64_t>(work.part) * p.call.batch + work.batch;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_of_quad(total[r]);
      // scores past 2^31, where rounding the largest alone is more than exp2 can take
      if (sum == 0.0f && top[r] != -INFINITY) sum = NAN;
      const int row = rows.begin + thread / 32 * 16 + lane / 4 + 8 * r;
      if (row >= rows.end) continue;
      const int64_t at = (part * p.call.heads + work.head) * p.call.rows + row;
      if (lane % 4 == 0) p.call.lse_part[at] = top[r] * p.call.to_base2 + log2f(sum);
      float* to = p.call.out_part + at * p.call.head_dim + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        if (j * 8 >= p.call.head_dim) break;
        const Pack<float, 2> pair = {out[4 * j + 2 * r] / sum, out[4 * j + 2 * r + 1] / sum};
        *reinterpret_cast<Pack<float, 2>*>(to + j * 8) = pair;
      }
    }
  }
};

// A strip's q as wgmma takes it: zeros for rows and channels that are not there, its sign changed where the scale is
// negative. By the threads of its warpgroup.
template <class T, int D>
__device__ __forceinline__ void load_q(const Arguments& p, Shared<D>& s, const Work& work) {
  constexpr int kChunks = D / 8, kEach = kTileRows * kChunks / kWarpgroupThreads;
  const int strip = thread_index() / kWarpgroupThreads - 1, thread = thread_index() % kWarpgroupThreads;
  const TileRows rows(work.tile * kStrips + strip, p.call);
  const T* q =
      static_cast<const T*>(p.call.q.data) + work.batch * p.call.q.stride_batch + work.head * p.call.q.stride_head;
  const auto place = [&](int i) {
    const int row = i / kChunks, chunk = i % kChunks;
    return s.q[strip] + chunk / 8 * (kTileRows * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
  };
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int i = thread + n * kWarpgroupThreads, row = rows.begin + i / kChunks, channel = i % kChunks * 8;
    const bool there = row < rows.end && channel < p.call.head_dim;
    copy_async16(place(i), there ? q + row * p.call.q.stride_token + channel : q, there);
  }
  copy_async_wait_all();
  if (p.flip != 0) {
    for (int n = 0; n < kEach; ++n) {
      auto* two = reinterpret_cast<uint32_t*>(place(thread + n * kWarpgroupThreads));
      for (int i = 0; i < 4; ++i) two[i] ^= p.flip;
    }
  }
  fence_async_proxy();
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) streamed_part_kernel(const __grid_constant__ Arguments p) {
#ifdef WAM_SM90A
  auto& s = *reinterpret_cast<Shared<D>*>(shared_memory());
  const int thread = thread_index();
  const Work work(block_index(), p);
  if (thread < 32) {
    Planner(s.plan, thread).write(p.call, work);
  } else if (thread == 32) {
    s.k.init();
    s.v.init();
    barrier_init_fence();
  } else if (thread >= kWarpgroupThreads) {
    load_q<T, D>(p, s, work);
  }
  sync_block();
  if (thread < kWarpgroupThreads) {
    registers_give<kProducerRegisters>();
    const int head = work.head / p.group, batch = work.batch / p.call.queries_of_row;
    if (thread == 0) produce<D>(s.plan, s.k, p.k, head, batch);
    if (thread == 32) produce<D>(s.plan, s.v, p.v, head, batch);
  } else {
    registers_take<kConsumerRegisters>();
    Consumer<T, D>(p, s).run(work);
  }
#endif
}

template <class T, int D>
void launch_part(const CachedAttentionParams& params, DType dtype, void* stream) {
  const char* op = "cached_attention";
  static_assert(sizeof(Shared<D>) <= 227 * 1024);
  Arguments p{};
  p.call = params;
  if (params.slots > 0) {
    const int64_t rows = params.batch / params.queries_of_row;
    p.k =
        stream_maps(op, "k_cache", params.k, rows, params.slots, params.key_heads, params.head_dim, kStepSlots, dtype);
    p.v =
        stream_maps(op, "v_cache", params.v, rows, params.slots, params.key_heads, params.head_dim, kStepSlots, dtype);
  }
  int64_t strips = 0;
  for (int g = 0; g < params.groups; ++g) strips += ceil_div(params.group_rows[g], kTileRows);
  p.tiles = static_cast<int32_t>(ceil_div(strips, kStrips));
  p.group = params.heads / params.key_heads;
  p.flip = params.scale < 0.0f ? 0x80008000u : 0u;
  launch_blocks(op, streamed_part_kernel<T, D>, p.tiles * params.batch * params.parts * params.heads, kThreads,
                sizeof(Shared<D>), stream, p);
}

}  // namespace cached_attention_detail::streamed

void cached_attention_streamed_part(const CachedAttentionParams& params, DType dtype, void* stream) {
  using namespace cached_attention_detail::streamed;
  const bool half = dtype == DType::kFloat16, narrow = params.head_dim <= 64;
  auto* run = half ? (narrow ? launch_part<__half, 64> : launch_part<__half, 128>)
                   : (narrow ? launch_part<__nv_bfloat16, 64> : launch_part<__nv_bfloat16, 128>);
  run(params, dtype, stream);
}

#endif  // WAM_DEVICE_CODE

}  // namespace wam
