#include "sum_partials.h"

#include "row_blocks.cuh"

namespace wam {
namespace {

constexpr int kSumThreads = 256;
constexpr int kLines = 8;
constexpr int kSumChannels = 4;  // of one thread: 16 bytes

using Quad = Pack<float, kSumChannels>;

__device__ inline void add(Quad& total, const Quad& v) {
#pragma unroll
  for (int i = 0; i < kSumChannels; ++i) total.at[i] += v.at[i];
}

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ SumPartialsParams p) {
  __shared__ Quad of_line[kSumThreads];

  const unsigned rows = static_cast<unsigned>(p.rows);
  const int64_t b = blockIdx.x / rows, f = blockIdx.x % rows;
  const int64_t sum = blockIdx.z, line = threadIdx.y;
  const int channel = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kSumChannels;
  const int64_t begin = p.row_begin == nullptr ? 0 : p.row_begin[f];
  const int64_t end = p.row_begin == nullptr ? p.count : p.row_begin[f + 1];

  Quad total = {};
  if (channel < p.channels) {
#pragma unroll 4
    for (int64_t i = begin + line; i < end; i += blockDim.y) {
      const int64_t n = p.row_begin == nullptr ? i : p.row_partials[i];
      const int64_t at = ((b * p.count + n) * p.sums + p.first_sum + sum) * p.channels + channel;
      add(total, *reinterpret_cast<const Quad*>(p.partials + at));
    }
  }
  if (blockDim.y > 1) {
    of_line[line * blockDim.x + threadIdx.x] = total;
    __syncthreads();
    if (line > 0) return;
    for (unsigned y = 1; y < blockDim.y; ++y) add(total, of_line[y * blockDim.x + threadIdx.x]);
  }
  if (channel < p.channels) {
    // a run-time index into the parameters would copy them to local memory
    float* out = sum == 0 ? p.out[0] : sum == 1 ? p.out[1] : p.out[2];
    *reinterpret_cast<Quad*>(out + (b * p.rows + f) * p.channels + channel) = total;
  }
}

}  // namespace

void sum_partials(const char* op, const SumPartialsParams& params, void* stream) {
  int sums = 0;
  while (sums < kMaxSums && params.out[sums] != nullptr) ++sums;
  if (sums == 0 || params.batch * params.rows == 0) return;
  // lines only where rows have enough partials to share out; the choice depends on shapes alone, so bits repeat
  const unsigned lines = params.count >= kLines * params.rows ? kLines : 1;
  const int64_t quads = params.channels / kSumChannels;
  const unsigned most = kSumThreads / lines;
  const unsigned threads = quads < most ? threads_of_row(static_cast<int>(quads), 1) : most;
  const dim3 grid(static_cast<unsigned>(params.batch * params.rows), static_cast<unsigned>(ceil_div(quads, threads)),
                  static_cast<unsigned>(sums));
  launch(op, sum_kernel, grid, dim3(threads, lines), stream, params);
}

}  // namespace wam
