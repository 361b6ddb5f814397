// Gated residual and LayerNorm of a DiT block, forward and backward: one kernel family for every variant.
//
//     forward    r = x + gate * y      n = (r - mean_r) * rstd_r      h = n * factor + shift
//     backward   g = dh * factor       t = dr + rstd_r * (g - mean(g) - n * mean(g * n))       dx = t     dy = gate * t
//                dgate = sum t * y     dshift = sum dh                dscale = sum dh * n
//
//     kAdaptive  factor = 1 + scale, and gate, shift, scale are row f = row_of_token[token] plus a table, if any
//     kAffine    factor = weight, shift = bias, one for all tokens: dweight = sum dh * n, dbias = sum dh
//     kNone      no norm: no h forwards, t = dr backwards
//
// Without y, r is x; without gate, r = x + y (and dy = dx, which the caller knows).
//
// Forward: one block owns `tokens_per_block` neighbouring tokens of one batch element and walks them. It keeps the
// modulation in registers while the row f stays the same, so that reading it costs little beside x and y.
// Backward: one block owns one segment (tokens of one row f, at most 16) of one batch element, walks its tokens with
// their statistics recomputed from r, keeps the three sums in registers and stores them once, as partials. The sums
// over segments are a second launch (common/sum_partials.cu). No atomics: the same bits from run to run. The next
// token's rows are copied into shared memory meanwhile.
//
// A row is read once and stays in registers; the variance is taken around the mean, which E[r^2] - mean^2 would lose to
// cancellation. Arithmetic is float32. Rounding to the dtype of x happens at the stores of r, h, dx and dy only; the
// norm is of the rounded r. A row f outside the modulation gives NaN, not a stray read.
#include <type_traits>

#include "common/copy_async.cuh"
#include "common/row_blocks.cuh"
#include "params.h"

namespace wam {
namespace adaln_detail {

// Row f of the modulation plus its table; NaN where f is no row.
__device__ inline Pack<float> modulation(const Rows& rows, const float* table, int64_t b, int64_t f, int64_t count,
                                         int channel, int channels) {
  const bool exists = f >= 0 && f < count;
  Pack<float> v = load(exists ? row_of<const float>(rows, b, f) : nullptr, channel, channels);
  const Pack<float> of_table = load(table, channel, channels);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) v.at[i] = exists ? v.at[i] + of_table.at[i] : NAN;
  return v;
}

// What multiplies the normalised row.
__device__ inline Pack<float> factor_of(const AdalnParams& p, int64_t b, int64_t f, int channel) {
  if (p.norm == Norm::kAffine) return load(p.weight, channel, p.channels);
  Pack<float> v = modulation(p.scale, p.scale_table, b, f, p.rows, channel, p.channels);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) v.at[i] += 1.0f;
  return v;
}

template <class T, int VECTORS>
__global__ void __launch_bounds__(kRowThreads) forward_kernel(const __grid_constant__ AdalnParams p) {
  __shared__ float partial[2][1][kRowWarps];

  const int64_t b = blockIdx.y, begin = static_cast<int64_t>(blockIdx.x) * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < p.tokens ? begin + p.tokens_per_block : p.tokens;
  const bool has_y = p.y.data != nullptr, has_gate = p.gate.data != nullptr;
  const bool has_rows = has_gate || p.norm == Norm::kAdaptive;

  Pack<float> gate[VECTORS], shift[VECTORS], factor[VECTORS];
  int64_t f = 0;
  for (int64_t token = begin; token < end; ++token) {
    Pack<T> x[VECTORS], y[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      x[i] = load(row_of<const T>(p.x, b, token), channel_of(i), p.channels);
      y[i] = load(row_of<const T>(p.y, b, token), channel_of(i), p.channels);
    }
    // the same branch in the whole block
    const int64_t f_of_token = has_rows ? p.row_of_token[token] : 0;
    if (token == begin || f_of_token != f) {
      f = f_of_token;
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        const int channel = channel_of(i);
        if (has_gate) gate[i] = modulation(p.gate, p.gate_table, b, f, p.rows, channel, p.channels);
        if (p.norm == Norm::kAdaptive) {
          shift[i] = modulation(p.shift, p.shift_table, b, f, p.rows, channel, p.channels);
        } else {
          shift[i] = load(p.bias, channel, p.channels);
        }
        if (p.norm != Norm::kNone) factor[i] = factor_of(p, b, f, channel);
      }
    }

    float v[VECTORS][kChannels], sum[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      if (has_y) {
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          const float update = has_gate ? gate[i].at[j] * to_float(y[i].at[j]) : to_float(y[i].at[j]);
          x[i].at[j] = from_float<T>(to_float(x[i].at[j]) + update);
        }
        store(row_of<T>(p.r, b, token), channel_of(i), p.channels, x[i]);
      }
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        // a channel past the row is 0: it adds nothing here, even where the modulation is NaN
        v[i][j] = channel_of(i) < p.channels ? to_float(x[i].at[j]) : 0.0f;
        sum[0] += v[i][j];
      }
    }
    if (p.norm == Norm::kNone) continue;
    block_sum(sum, partial[0]);
    const float mean = sum[0] / p.channels;

    float squares[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        // without the condition a channel past the row would add mean^2
        v[i][j] = channel_of(i) < p.channels ? v[i][j] - mean : 0.0f;
        squares[0] += v[i][j] * v[i][j];
      }
    }
    block_sum(squares, partial[1]);
    const float rstd = rsqrtf(squares[0] / p.channels + p.eps);

#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      Pack<T> h;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        h.at[j] = from_float<T>(v[i][j] * rstd * factor[i].at[j] + shift[i].at[j]);
      }
      store(row_of<T>(p.h, b, token), channel_of(i), p.channels, h);
    }
  }
}

// What the backward needs of a token with a norm: g, and the statistics of r and g.
template <int VECTORS>
struct NormStatistics {
  float g[VECTORS][kChannels], mean = 0.0f, rstd = 0.0f, mean_g = 0.0f, mean_gn = 0.0f;
};

// Fills `of` and adds the token's dh to dshift.
template <class T, int VECTORS>
__device__ inline void norm_statistics(NormStatistics<VECTORS>& of, float (&dshift)[VECTORS][kChannels],
                                       const Pack<T> (&r)[VECTORS], const Pack<T> (&dh)[VECTORS], const AdalnParams& p,
                                       int64_t b, int64_t f, float (&partial_1)[2][kRowWarps],
                                       float (&partial_2)[2][kRowWarps]) {
  float sums[2] = {};  // of r and g
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    // read again for every token: it comes from L1, and keeping it would cost registers that the sums need
    const Pack<float> factor = factor_of(p, b, f, channel_of(i));
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float dh_j = to_float(dh[i].at[j]);
      of.g[i][j] = channel_of(i) < p.channels ? dh_j * factor.at[j] : 0.0f;
      dshift[i][j] += dh_j;
      sums[0] += to_float(r[i].at[j]);
      sums[1] += of.g[i][j];
    }
  }
  block_sum(sums, partial_1);
  of.mean = sums[0] / p.channels;
  of.mean_g = sums[1] / p.channels;

  float products[2] = {};  // of r - mean with itself and with g
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const float centred = channel_of(i) < p.channels ? to_float(r[i].at[j]) - of.mean : 0.0f;
      products[0] += centred * centred;
      products[1] += centred * of.g[i][j];
    }
  }
  block_sum(products, partial_2);
  of.rstd = rsqrtf(products[0] / p.channels + p.eps);
  of.mean_gn = products[1] / p.channels * of.rstd;
}

template <int VECTORS>
__device__ inline void store_sums(float* to, const float (&sums)[VECTORS][kChannels], int channels) {
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    Pack<float> v;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) v.at[j] = sums[i][j];
    store(to, channel_of(i), channels, v);
  }
}

// Where the rows of the next token arrive while a token is computed. A thread copies and reads its own channels alone,
// so there is no barrier, and it may copy again as soon as it has read.
template <class T, int VECTORS>
struct NextToken {
  Pack<T> r[VECTORS][kRowThreads], dh[VECTORS][kRowThreads], dr[VECTORS][kRowThreads], y[VECTORS][kRowThreads];

  __device__ void copy(const AdalnParams& p, int64_t b, int64_t token) {
    copy(r, row_of<const T>(p.r, b, token), p.channels);
    copy(dh, row_of<const T>(p.dh, b, token), p.channels);
    copy(dr, row_of<const T>(p.dr, b, token), p.channels);
    copy(y, row_of<const T>(p.y, b, token), p.channels);
  }

 private:
  __device__ static void copy(Pack<T> (&to)[VECTORS][kRowThreads], const T* row, int channels) {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const bool exists = row != nullptr && channel_of(i) < channels;
      const T* from = exists ? row + channel_of(i) : nullptr;
      constexpr int kNumbers = 16 / sizeof(T);  // of a copy
#pragma unroll
      for (int j = 0; j < kChannels; j += kNumbers) {
        copy_async(&to[i][threadIdx.x].at[j], exists ? from + j : from, exists);
      }
    }
  }
};

// Two blocks of 192 threads (D = 3072) share an SM if a thread has at most 168 registers, which a bound of 384 threads
// makes sure of; left alone, ptxas takes 166 to 182.
template <int VECTORS>
constexpr int kBackwardThreads = VECTORS == 2 ? 384 : kRowThreads;

template <class T, int VECTORS>
__global__ void __launch_bounds__(kBackwardThreads<VECTORS>) backward_kernel(const __grid_constant__ AdalnParams p) {
  // In the widest blocks dr and y do not fit in registers beside the rest, nor the next token in 48 KB of shared
  // memory: dr and y are read after the statistics there.
  constexpr bool kEarly = sizeof(T) * VECTORS <= 4;
  __shared__ std::conditional_t<kEarly, NextToken<T, VECTORS>, char> next;
  __shared__ float partial_1[2][kRowWarps], partial_2[2][kRowWarps];

  const int64_t b = blockIdx.y, n = blockIdx.x;
  const int64_t begin = p.segments[3 * n], end = p.segments[3 * n + 1], f = p.segments[3 * n + 2];
  const bool has_norm = p.norm != Norm::kNone, has_gate = p.gate.data != nullptr;

  float dshift[VECTORS][kChannels] = {}, dscale[VECTORS][kChannels] = {}, dgate[VECTORS][kChannels] = {};
  if constexpr (kEarly) {
    if (begin < end) next.copy(p, b, begin);
  }
  for (int64_t token = begin; token < end; ++token) {
    Pack<T> r[VECTORS], dh[VECTORS], dr[VECTORS], y[VECTORS];
    const auto load_residual = [&](int i) {
      dr[i] = load(row_of<const T>(p.dr, b, token), channel_of(i), p.channels);
      y[i] = load(row_of<const T>(p.y, b, token), channel_of(i), p.channels);
    };
    if constexpr (kEarly) {
      copy_async_wait();
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        r[i] = next.r[i][threadIdx.x];
        dh[i] = next.dh[i][threadIdx.x];
        dr[i] = next.dr[i][threadIdx.x];
        y[i] = next.y[i][threadIdx.x];
      }
      if (token + 1 < end) next.copy(p, b, token + 1);
    } else {
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        r[i] = load(row_of<const T>(p.r, b, token), channel_of(i), p.channels);
        dh[i] = load(row_of<const T>(p.dh, b, token), channel_of(i), p.channels);
      }
    }
    NormStatistics<VECTORS> norm;
    if (has_norm) norm_statistics(norm, dshift, r, dh, p, b, f, partial_1, partial_2);

#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      if (!kEarly) load_residual(i);
      float t[kChannels];
#pragma unroll
      for (int j = 0; j < kChannels; ++j) t[j] = to_float(dr[i].at[j]);
      if (has_norm) {
        Pack<T> dx;
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          const float normed = (to_float(r[i].at[j]) - norm.mean) * norm.rstd;
          dscale[i][j] += to_float(dh[i].at[j]) * normed;
          t[j] += norm.rstd * (norm.g[i][j] - norm.mean_g - normed * norm.mean_gn);
          dx.at[j] = from_float<T>(t[j]);
        }
        store(row_of<T>(p.dx, b, token), channel_of(i), p.channels, dx);
      }
      if (has_gate) {
        const Pack<float> gate = modulation(p.gate, p.gate_table, b, f, p.rows, channel_of(i), p.channels);
        Pack<T> dy;
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          dgate[i][j] += t[j] * to_float(y[i].at[j]);
          dy.at[j] = from_float<T>(t[j] * gate.at[j]);
        }
        store(row_of<T>(p.dy, b, token), channel_of(i), p.channels, dy);
      }
    }
  }

  float* partials = p.partials + (b * p.segment_count + n) * (2 * has_norm + has_gate) * p.channels;
  if (has_norm) {
    store_sums(partials, dshift, p.channels);
    store_sums(partials + p.channels, dscale, p.channels);
  }
  if (has_gate) store_sums(partials + 2 * has_norm * p.channels, dgate, p.channels);
}

// `kernels` has them by the vectors of a thread: 1, 2 and 4.
inline void launch_rows(const char* op, void (*const (&kernels)[3])(AdalnParams), int64_t blocks, const AdalnParams& p,
                        void* stream) {
  if (p.batch * p.tokens * blocks == 0) return;
  const int vectors = p.channels / kChannels;
  const int n = vectors <= kRowThreads ? 0 : vectors <= 2 * kRowThreads ? 1 : 2;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.batch));
  launch(op, kernels[n], grid, dim3(threads_of_row(vectors, 1 << n)), stream, p);
}

template <class T>
void launch_forward(const AdalnParams& p, void* stream) {
  launch_rows("adaln_forward", {forward_kernel<T, 1>, forward_kernel<T, 2>, forward_kernel<T, 4>},
              ceil_div(p.tokens, p.tokens_per_block), p, stream);
}

template <class T>
void launch_backward(const AdalnParams& p, void* stream) {
  launch_rows("adaln_backward", {backward_kernel<T, 1>, backward_kernel<T, 2>, backward_kernel<T, 4>}, p.segment_count,
              p, stream);
}

}  // namespace adaln_detail

void adaln_forward_kernels(const AdalnParams& p, DType dtype, void* stream) {
  with_type(dtype, [&](auto zero) { adaln_detail::launch_forward<decltype(zero)>(p, stream); });
}

void adaln_backward_kernels(const AdalnParams& p, DType dtype, void* stream) {
  with_type(dtype, [&](auto zero) { adaln_detail::launch_backward<decltype(zero)>(p, stream); });
}

}  // namespace wam
