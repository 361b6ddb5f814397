// RMSNorm and rotary position embedding of q and k, forward and backward.
//
//     forward    n = x * rstd      y = R(n * weight)       rstd = (mean(x^2) + eps)^-1/2
//     backward   u = R^T(dy)       g = u * weight          dx = rstd * (g - n * mean(g * n))      dweight = sum u * n
//
// R turns pairs of a head's channels by the angles of the token, cos and sin of which are in the table: (2i, 2i + 1) if
// interleaved, else (i, i + head_dim / 2). The mean is over the row, or with per_head over each head. The forward also
// copies v, where there is one: q, k and v of a chunk then reach their cache in one launch.
//
// A thread owns UNITS units: a unit is WIDTH neighbouring channels in the first half of a head and those at the same
// place in its second half, so that either kind of pair lies within a thread. WIDTH is 8 (16 bytes of bf16), or 4 where
// half a head is no multiple of 8.
// Forward: one block owns one token of q, of k or of v. Backward: one block owns `tokens_per_block` neighbouring
// tokens of q or of k (batch elements follow each other), walks them with rstd recomputed, keeps its sums for dweight
// in registers and stores them once, as partials, with per_head added over the heads. Their sum is a second launch
// (common/sum_partials.cu). No atomics: the same bits from run to run.
//
// Arithmetic is float32; the only rounding to the dtype of q is at the stores of y and dx.
#include "common/row_blocks.cuh"
#include "params.h"

namespace wam {
namespace qk_norm_rope_detail {

// Where a thread's unit is. The units past the last one exist, so that all lanes take part in sums, but hold zeros.
struct Unit {
  bool exists;
  int head, first, second;  // channels of the head at which the two halves of the unit begin

  __device__ Unit(int i, int width, const QkNormRopeParams& p) {
    const int units_of_head = p.head_dim / (2 * width), unit = threadIdx.x + i * blockDim.x;
    head = unit / units_of_head;
    exists = head < p.heads;
    first = unit % units_of_head * width;
    second = first + p.head_dim / 2;
  }
};

// The two halves of a unit, as floats.
template <int WIDTH>
struct Halves {
  float a[WIDTH], b[WIDTH];
};

template <int WIDTH, class T>
__device__ inline Halves<WIDTH> load_halves(const T* head, const Unit& unit) {
  Halves<WIDTH> v = {};
  if (unit.exists) {
    const auto a = *reinterpret_cast<const Pack<T, WIDTH>*>(head + unit.first);
    const auto b = *reinterpret_cast<const Pack<T, WIDTH>*>(head + unit.second);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      v.a[j] = to_float(a.at[j]);
      v.b[j] = to_float(b.at[j]);
    }
  }
  return v;
}

template <int WIDTH, class T>
__device__ inline void store_halves(T* head, const Unit& unit, const Halves<WIDTH>& v) {
  if (!unit.exists) return;
  Pack<T, WIDTH> a, b;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    a.at[j] = from_float<T>(v.a[j]);
    b.at[j] = from_float<T>(v.b[j]);
  }
  *reinterpret_cast<Pack<T, WIDTH>*>(head + unit.first) = a;
  *reinterpret_cast<Pack<T, WIDTH>*>(head + unit.second) = b;
}

template <int WIDTH, class T>
__device__ inline void copy_halves(const T* from, T* to, const Unit& unit) {
  if (!unit.exists) return;
  using Half = Pack<T, WIDTH>;
  *reinterpret_cast<Half*>(to + unit.first) = *reinterpret_cast<const Half*>(from + unit.first);
  *reinterpret_cast<Half*>(to + unit.second) = *reinterpret_cast<const Half*>(from + unit.second);
}

template <int WIDTH>
__device__ inline Halves<WIDTH> weight_of(const float* weight, const QkNormRopeParams& p, const Unit& unit) {
  return load_halves<WIDTH>(weight + (p.per_head ? 0 : unit.head * p.head_dim), unit);
}

__device__ inline void turn(float& x, float& y, float cos, float sin) {
  const float first = x * cos - y * sin, second = x * sin + y * cos;
  x = first;
  y = second;
}

// Turns the unit's pairs by the token's angles, or back by their negatives.
template <int WIDTH>
__device__ inline void rotate(Halves<WIDTH>& v, const QkNormRopeParams& p, int64_t batch, int64_t token,
                              const Unit& unit, bool back) {
  // the angles of `a` and of `b` if interleaved, else the first and the last half of those that pair a with b
  Unit angles = unit;
  if (!p.interleaved) {
    angles.first = 2 * unit.first;
    angles.second = angles.first + WIDTH;
  }
  Halves<WIDTH> t = load_halves<WIDTH>(p.table + batch * p.table_stride_batch + token * p.head_dim, angles);
#pragma unroll
  for (int j = 0; j < WIDTH; j += 2) {
    const float sin_a = back ? -t.a[j + 1] : t.a[j + 1], sin_b = back ? -t.b[j + 1] : t.b[j + 1];
    if (p.interleaved) {
      turn(v.a[j], v.a[j + 1], t.a[j], sin_a);
      turn(v.b[j], v.b[j + 1], t.b[j], sin_b);
    } else {
      turn(v.a[j / 2], v.b[j / 2], t.a[j], sin_a);
      turn(v.a[(WIDTH + j) / 2], v.b[(WIDTH + j) / 2], t.b[j], sin_b);
    }
  }
}

// N sums of every unit become N means over its row or head. `of_unit` and `partial` must be others in the next call.
template <int N, int UNITS>
__device__ inline void means_of_rows(float (&v)[UNITS][N], const QkNormRopeParams& p, int width,
                                     float (&of_unit)[N][UNITS * kRowThreads], float (&partial)[N][kRowWarps]) {
  if (p.per_head) {
    const int units_of_head = p.head_dim / (2 * width);
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) of_unit[n][threadIdx.x + i * blockDim.x] = v[i][n];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      const Unit unit(i, width, p);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float sum = 0.0f;
        if (unit.exists) {
          for (int u = 0; u < units_of_head; ++u) sum += of_unit[n][unit.head * units_of_head + u];
        }
        v[i][n] = sum / p.head_dim;
      }
    }
  } else {
    float sum[N] = {};
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += v[i][n];
    }
    block_sum(sum, partial);
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) v[i][n] = sum[n] / (p.heads * p.head_dim);
    }
  }
}

template <class T, int WIDTH, int UNITS>
__global__ void __launch_bounds__(kRowThreads) forward_kernel(const __grid_constant__ QkNormRopeParams p) {
  __shared__ float of_unit[1][UNITS * kRowThreads], partial[1][kRowWarps];
  const int64_t token = blockIdx.x, b = blockIdx.y;
  if (blockIdx.z == 2) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      const Unit unit(i, WIDTH, p);
      copy_halves<WIDTH>(head_of<const T>(p.v, b, token, unit.head), head_of<T>(p.v_out, b, token, unit.head), unit);
    }
    return;
  }
  const QkNormRopeSide& side = blockIdx.z == 0 ? p.q : p.k;

  Halves<WIDTH> x[UNITS];
  float square[UNITS][1];
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const Unit unit(i, WIDTH, p);
    x[i] = load_halves<WIDTH>(head_of<const T>(side.x, b, token, unit.head), unit);
    square[i][0] = 0.0f;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) square[i][0] += x[i].a[j] * x[i].a[j] + x[i].b[j] * x[i].b[j];
  }
  means_of_rows(square, p, WIDTH, of_unit, partial);

#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const Unit unit(i, WIDTH, p);
    const float rstd = rsqrtf(square[i][0] + p.eps);
    const Halves<WIDTH> weight = weight_of<WIDTH>(side.weight, p, unit);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      x[i].a[j] *= rstd * weight.a[j];
      x[i].b[j] *= rstd * weight.b[j];
    }
    rotate(x[i], p, b, token, unit, /*back=*/false);
    store_halves(head_of<T>(side.y, b, token, unit.head), unit, x[i]);
  }
}

template <class T, int WIDTH, int UNITS>
__global__ void __launch_bounds__(kRowThreads) backward_kernel(const __grid_constant__ QkNormRopeParams p) {
  constexpr int kUnits = UNITS * kRowThreads;
  // in the loop: sums of units, two tokens in turn; after it: dweight of all channels
  __shared__ union {
    float of_unit[2][2][kUnits];
    alignas(16) float dweight[2 * WIDTH * kUnits];  // stored in packs of 16 bytes
  } shared;
  __shared__ float partial[2][2][kRowWarps];
  const QkNormRopeSide& side = blockIdx.z == 0 ? p.q : p.k;
  const int64_t total = p.batch * p.tokens, begin = blockIdx.x * p.tokens_per_block;
  const int64_t end = begin + p.tokens_per_block < total ? begin + p.tokens_per_block : total;

  Halves<WIDTH> dweight[UNITS] = {};
  for (int64_t at = begin; at < end; ++at) {
    // the launch has fewer than 2^31 tokens, and a 64-bit division is slow
    const int64_t b = static_cast<unsigned>(at) / static_cast<unsigned>(p.tokens), token = at - b * p.tokens;
    const int parity = static_cast<int>(at % 2);

    Halves<WIDTH> x[UNITS], u[UNITS];
    float mean[UNITS][2];  // of x * x and of g * x
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      const Unit unit(i, WIDTH, p);
      x[i] = load_halves<WIDTH>(head_of<const T>(side.x, b, token, unit.head), unit);
      u[i] = load_halves<WIDTH>(head_of<const T>(side.y, b, token, unit.head), unit);
    }
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      const Unit unit(i, WIDTH, p);
      const Halves<WIDTH> weight = weight_of<WIDTH>(side.weight, p, unit);
      rotate(u[i], p, b, token, unit, /*back=*/true);
      mean[i][0] = mean[i][1] = 0.0f;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        mean[i][0] += x[i].a[j] * x[i].a[j] + x[i].b[j] * x[i].b[j];
        mean[i][1] += u[i].a[j] * weight.a[j] * x[i].a[j] + u[i].b[j] * weight.b[j] * x[i].b[j];
      }
    }
    means_of_rows(mean, p, WIDTH, shared.of_unit[parity], partial[parity]);

#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      const Unit unit(i, WIDTH, p);
      const float rstd = rsqrtf(mean[i][0] + p.eps), mean_gn = mean[i][1] * rstd;
      const Halves<WIDTH> weight = weight_of<WIDTH>(side.weight, p, unit);
      Halves<WIDTH> dx;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const float n_a = x[i].a[j] * rstd, n_b = x[i].b[j] * rstd;
        dweight[i].a[j] += u[i].a[j] * n_a;
        dweight[i].b[j] += u[i].b[j] * n_b;
        dx.a[j] = rstd * (u[i].a[j] * weight.a[j] - n_a * mean_gn);
        dx.b[j] = rstd * (u[i].b[j] * weight.b[j] - n_b * mean_gn);
      }
      store_halves(head_of<T>(side.dx, b, token, unit.head), unit, dx);
    }
  }

  const int width = p.per_head ? p.head_dim : p.heads * p.head_dim;
  float* partials = p.partials + (static_cast<int64_t>(blockIdx.x) * 2 + blockIdx.z) * width;
  if (p.per_head) __syncthreads();  // the sums of units have been read
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const Unit unit(i, WIDTH, p);
    store_halves((p.per_head ? shared.dweight : partials) + unit.head * p.head_dim, unit, dweight[i]);
  }
  if (!p.per_head) return;
  __syncthreads();
  for (int c = threadIdx.x; c < p.head_dim; c += blockDim.x) {
    float sum = 0.0f;
    for (int head = 0; head < p.heads; ++head) sum += shared.dweight[head * p.head_dim + c];
    partials[c] = sum;
  }
}

// `kernels` has them by (WIDTH, UNITS): (4, 4), (8, 1) and (8, 2).
inline void launch_rows(const char* op, void (*const (&kernels)[3])(QkNormRopeParams), dim3 grid,
                        const QkNormRopeParams& p, void* stream) {
  const int channels = p.heads * p.head_dim;
  const int n = p.head_dim % 16 != 0 ? 0 : channels <= 16 * kRowThreads ? 1 : 2;
  const int width = n == 0 ? 4 : 8, units_of_thread = n == 0 ? 4 : n;
  launch(op, kernels[n], grid, dim3(threads_of_row(channels / (2 * width), units_of_thread)), stream, p);
}

template <class T>
void launch_forward(const QkNormRopeParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch), p.v.data == nullptr ? 2 : 3);
  launch_rows("qk_norm_rope_forward", {forward_kernel<T, 4, 4>, forward_kernel<T, 8, 1>, forward_kernel<T, 8, 2>}, grid,
              p, stream);
}

template <class T>
void launch_backward(const QkNormRopeParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.blocks), 1, 2);
  launch_rows("qk_norm_rope_backward", {backward_kernel<T, 4, 4>, backward_kernel<T, 8, 1>, backward_kernel<T, 8, 2>},
              grid, p, stream);
}

}  // namespace qk_norm_rope_detail

void qk_norm_rope_forward_kernels(const QkNormRopeParams& p, DType dtype, void* stream) {
  with_type(dtype, [&](auto zero) { qk_norm_rope_detail::launch_forward<decltype(zero)>(p, stream); });
}

void qk_norm_rope_backward_kernels(const QkNormRopeParams& p, DType dtype, void* stream) {
  with_type(dtype, [&](auto zero) { qk_norm_rope_detail::launch_backward<decltype(zero)>(p, stream); });
}

}  // namespace wam
