// Softmax attention over ranges of a key/value cache: partial results over parts of the keys, then their sum. The part
// kernel here is by mma.sync, for any GPU; that of streamed_sm90a.cu is for Hopper, and leaves the same to the second
// one.
//
//     part       s = scale * q k^T over its slots      out_p = softmax(s) v      lse_p = logsumexp(s)
//     combine    lse = logsumexp_p(lse_p)              out = sum_p exp(lse_p - lse) * out_p
//
// A group's ranges, one after the other, are a list of its visible slots. One block of the first kernel owns kTileRows
// rows of one group, one head and one part: part p of P takes the p-th share of that list, in steps of kSlots of which
// only the last may be shorter. The parts are balanced at every fill of the cache and the grid depends on shapes only.
// A step's slots may lie in several ranges: every thread walks the list with a cursor of its own. Slots outside the
// ranges are not read.
//
// A warp owns 16 rows and all of D. The next step is copied into the other pair of tiles while this one is computed.
// Softmax works in base 2; lse_p is in base 2. Scores and sums are float32; rounded to the dtype are p, before its
// product, and out, at the store. A part without slots stores lse_p = -inf and no out_p.
//
// A row's scores may all be -inf, by overflow: then its lse is -inf and its out 0, as of a fully masked row.
//
// One warp of the second kernel owns a row of a head and adds the parts in order. No atomics: the same bits every time.
#include <cfloat>
#include <cmath>

#include "common/tile_mma.cuh"
#include "params.h"
#include "ranges.cuh"

namespace wam {
namespace cached_attention_detail {

constexpr int kThreads = kTileRows / 16 * kWarp;
constexpr int kCombineRows = 4;
constexpr float kLog2e = 1.4426950408889634f;

// The slot at a place of the list of visible slots; places may only grow from call to call.
class Cursor {
 public:
  __device__ Cursor(const int32_t* bounds, int slots) : bounds_(bounds), slots_(slots), range_(bounds, 0, slots) {}

  __device__ int slot_at(int place) {
    while (place - before_ >= range_.length) {
      before_ += range_.length;
      range_ = Range(bounds_, ++i_, slots_);
    }
    return range_.start + place - before_;
  }

 private:
  const int32_t* bounds_;
  int slots_, i_ = 0, before_ = 0;  // visible slots in earlier ranges
  Range range_;
};

// The largest, or the sum, over the four lanes that hold a row of an accumulator.
__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Both operands of a step: 32 KB with the next step's at D = 64 and 128, so that three blocks or more live on an SM.
template <class T, int D>
struct Tiles {
  static constexpr int kSlots = D <= 64 ? 64 : 32;
  alignas(128) T k[kSlots * D], v[kSlots * D];
};

// Of the two rows that a lane holds parts of: the largest score in base 2, and the lane's own share of the sum.
// (the lowest number instead of -inf: with all scores -inf, -inf - -inf would be NaN)
struct SoftmaxState {
  float m[2] = {-FLT_MAX, -FLT_MAX}, total[2] = {};
};

// Leaves `columns` columns of a step's scores.
template <int N>
__device__ inline void mask_columns(Accumulator<N>& s, int lane, int columns) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column_of(lane, j, i) >= columns) s.at[j][i] = -INFINITY;
    }
  }
}

// Turns scores into powers, and scales what earlier steps added up to the new maximum.
template <int N, int D>
__device__ inline void online_softmax(Accumulator<N>& s, SoftmaxState& state, Accumulator<D>& out, float to_base2) {
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], s.at[j][i]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float before = state.m[r];
    state.m[r] = fmaxf(before, quad_max(largest[r]) * to_base2);
    const float shrink = exp2f(before - state.m[r]);
    state.total[r] *= shrink;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      out.at[j][2 * r] *= shrink;
      out.at[j][2 * r + 1] *= shrink;
    }
  }
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s.at[j][i] = exp2f(fmaf(s.at[j][i], to_base2, -state.m[i / 2]));
      state.total[i / 2] += s.at[j][i];
    }
  }
}

// Stores lse_p and out_p of the first `rows` of a warp's rows; the first of them is row `first` of both.
template <int D>
__device__ inline void store_part(const SoftmaxState& state, const Accumulator<D>& out, const CachedAttentionParams& p,
                                  int64_t first, int rows, int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = quad_sum(state.total[r]);
    // scores past 2^31, where rounding m alone is more than exp2f can take
    if (total == 0.0f && state.m[r] != -FLT_MAX) total = NAN;
    const int row = row_of(lane, 2 * r);
    if (row >= rows) continue;
    if (lane % 4 == 0) p.lse_part[first + row] = state.m[r] + log2f(total);
    float* to = p.out_part + (first + row) * p.head_dim;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const int channel = column_of(lane, j, 0);
      if (channel >= p.head_dim) break;
      const Pack<float, 2> pair = {out.at[j][2 * r] / total, out.at[j][2 * r + 1] / total};
      *reinterpret_cast<Pack<float, 2>*>(to + channel) = pair;
    }
  }
}

// Left alone (0), ptxas aims at 168 registers a thread, three blocks on an SM; on these two it would spill for that.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1000)
constexpr int kBlocksOfSm = 2;
#else
constexpr int kBlocksOfSm = 0;
#endif

template <class T, int D>
__global__ void __launch_bounds__(kThreads, kBlocksOfSm) part_kernel(const __grid_constant__ CachedAttentionParams p) {
  constexpr int kSlots = Tiles<T, D>::kSlots, kChunks = D / 8;
  __shared__ Tiles<T, D> tiles[2];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const TileRows tile(blockIdx.x, p);
  const int64_t b = blockIdx.y / p.heads, h = blockIdx.y % p.heads;
  const int slots = static_cast<int>(p.slots);

  const int32_t* bounds = p.ranges + (b * p.groups + tile.group) * p.ranges_of_group * 2;
  int visible = 0;
  for (int i = 0; i < p.ranges_of_group; ++i) visible += Range(bounds, i, slots).length;
  const int steps = (visible + kSlots - 1) / kSlots, share = (steps + p.parts - 1) / p.parts;
  const int first = blockIdx.z * share, last = first + share < steps ? first + share : steps;

  // rows of this warp, and where its results go
  const int row = tile.begin + warp * 16, rows = tile.end - row;
  const int64_t row_of_part = ((blockIdx.z * p.batch + b) * p.heads + h) * p.rows + row;
  if (first >= last) {
    if (lane < 16 && lane < rows) p.lse_part[row_of_part + lane] = -INFINITY;
    return;
  }

  const int64_t cache_row = b / p.queries_of_row;
  const T *k = head_of<const T>(p.k, cache_row, 0, h), *v = head_of<const T>(p.v, cache_row, 0, h);
  Cursor cursor(bounds, slots);
  auto fetch = [&](int step, Tiles<T, D>& to) {
#pragma unroll
    for (int n = 0; n < kSlots * kChunks / kThreads; ++n) {
      const int i = threadIdx.x + n * kThreads, at = i / kChunks, chunk = i % kChunks, place = step * kSlots + at;
      const bool exists = place < visible && chunk * 8 < p.head_dim;
      const int64_t slot = exists ? cursor.slot_at(place) : 0;
      const int channel = exists ? chunk * 8 : 0, target = chunk_at<D>(at, chunk) * 8;
      copy_async(to.k + target, k + slot * p.k.stride_token + channel, exists);
      copy_async(to.v + target, v + slot * p.v.stride_token + channel, exists);
    }
  };

  fetch(first, tiles[0]);
  const T* q = head_of<const T>(p.q, b, row, h);
  auto q_rows = load_operand<T, D>(q, p.q.stride_token, rows, p.head_dim);
  if (p.scale < 0.0f) change_sign(q_rows);
  SoftmaxState state;
  Accumulator<D> out = {};

  for (int step = first; step < last; ++step) {
    Tiles<T, D>& now = tiles[(step - first) % 2];
    copy_async_wait();
    // all copies of this step have landed, and no warp reads the other tiles any more
    __syncthreads();
    if (step + 1 < last) fetch(step + 1, tiles[(step + 1 - first) % 2]);
    if (rows <= 0) continue;

    Accumulator<kSlots> s = {};
    multiply_transposed(s, q_rows, now.k);
    const int columns = visible - step * kSlots;
    if (columns < kSlots) mask_columns(s, lane, columns);  // in the last step alone
    online_softmax(s, state, out, p.to_base2);
    multiply(out, to_operand<T>(s), now.v);
  }
  store_part(state, out, p, row_of_part, rows, lane);
}

template <class T>
__global__ void __launch_bounds__(kCombineRows* kWarp) combine_kernel(const __grid_constant__ CachedAttentionParams p) {
  const int lane = threadIdx.x % kWarp, channel = lane * 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineRows + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int64_t row_of_part = blockIdx.y * p.rows + row, stride_part = p.batch * p.heads * p.rows;

  float m = -INFINITY;
  for (int part = 0; part < p.parts; ++part) m = fmaxf(m, p.lse_part[part * stride_part + row_of_part]);
  float total = 0.0f;
  Pack<float, 4> out = {};
  for (int part = 0; part < p.parts; ++part) {
    const int64_t at = part * stride_part + row_of_part;
    const float lse = p.lse_part[at];
    if (lse == -INFINITY) continue;  // this part has no slots, or no finite score: its out_p is no number
    const float weight = exp2f(lse - m);
    total += weight;
    if (channel < p.head_dim) {
      const auto value = *reinterpret_cast<const Pack<float, 4>*>(p.out_part + at * p.head_dim + channel);
#pragma unroll
      for (int i = 0; i < 4; ++i) out.at[i] += weight * value.at[i];
    }
  }

  const bool nothing = total == 0.0f;
  if (lane == 0) p.lse[row_of_part] = nothing ? -INFINITY : (m + log2f(total)) / kLog2e;
  if (channel >= p.head_dim) return;
  Pack<T, 4> rounded;
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded.at[i] = from_float<T>(nothing ? 0.0f : out.at[i] / total);
  const int64_t b = blockIdx.y / p.heads, h = blockIdx.y % p.heads;
  T* to = static_cast<T*>(p.out) + ((b * p.rows + row) * p.heads + h) * p.head_dim;
  *reinterpret_cast<Pack<T, 4>*>(to + channel) = rounded;
}

template <class T>
void launch_part(const CachedAttentionParams& p, void* stream) {
  int64_t tiles = 0;
  for (int g = 0; g < p.groups; ++g) tiles += ceil_div(p.group_rows[g], kTileRows);
  auto* kernel = p.head_dim <= 32   ? part_kernel<T, 32>
                 : p.head_dim <= 64 ? part_kernel<T, 64>
                 : p.head_dim <= 96 ? part_kernel<T, 96>
                                    : part_kernel<T, 128>;
  launch("cached_attention", kernel,
         dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.batch * p.heads), static_cast<unsigned>(p.parts)),
         dim3(kThreads), stream, p);
}

template <class T>
void launch_forward(const CachedAttentionParams& params, DType dtype, void* stream) {
  CachedAttentionParams p = params;
  // The sign of the scale goes into q: then the largest product is the largest score, and -inf, which marks what is
  // masked, stays -inf, also at scale 0, which becomes the smallest normal number.
  p.to_base2 = std::fmax(std::fabs(p.scale) * kLog2e, FLT_MIN);
  if (p.streamed) {
    cached_attention_streamed_part(p, dtype, stream);
  } else {
    launch_part<T>(p, stream);
  }
  const unsigned heads = static_cast<unsigned>(p.batch * p.heads);
  const char* op = "cached_attention";
  launch(op, combine_kernel<T>, dim3(static_cast<unsigned>(ceil_div(p.rows, kCombineRows)), heads),
         dim3(kCombineRows * kWarp), stream, p);
}

}  // namespace cached_attention_detail

void cached_attention_forward_kernels(const CachedAttentionParams& p, DType dtype, void* stream) {
  if (dtype == DType::kBFloat16) {
    cached_attention_detail::launch_forward<__nv_bfloat16>(p, dtype, stream);
  } else {
    cached_attention_detail::launch_forward<__half>(p, dtype, stream);
  }
}

}  // namespace wam
