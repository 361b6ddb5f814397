// What both part kernels read of a call: a group's ranges of slots, and its rows in tiles of 64.
#pragma once

#include "params.h"

namespace wam {

#ifdef WAM_DEVICE_CODE

namespace cached_attention_detail {

constexpr int kTileRows = 64;

struct Range {
  int start, length;

  // Cut off at the cache's ends.
  __device__ Range(const int32_t* bounds, int i, int slots) {
    const int begin = bounds[2 * i], end = bounds[2 * i + 1];
    start = begin < 0 ? 0 : begin;
    length = (end < slots ? end : slots) - start;
    if (length < 0) length = 0;
  }
};

// The rows of a tile: of one group, [begin, end).
struct TileRows {
  int group, begin, end;

  __device__ TileRows(int tile, const CachedAttentionParams& p) {
    group = begin = end = 0;
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g) {
      if (g >= p.groups) break;
      const int tiles = (p.group_rows[g] + kTileRows - 1) / kTileRows;
      end = begin + p.group_rows[g];
      if (tile < tiles) {
        group = g;
        begin += tile * kTileRows;
        break;
      }
      tile -= tiles;
      begin = end;
    }
    if (end > begin + kTileRows) end = begin + kTileRows;
  }
};

}  // namespace cached_attention_detail

#endif  // WAM_DEVICE_CODE

}  // namespace wam
