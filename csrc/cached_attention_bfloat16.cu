#include "cached_attention.cuh"

template void wam::cached_attention_detail::launch_kernels<wam::DType::kBFloat16>(const CachedAttentionParams&, void*);
