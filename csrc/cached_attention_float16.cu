#include "cached_attention.cuh"

template void wam::cached_attention_detail::launch_kernels<wam::DType::kFloat16>(const CachedAttentionParams&, void*);
