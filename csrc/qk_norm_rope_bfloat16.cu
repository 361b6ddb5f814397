#include "qk_norm_rope.cuh"

template void wam::qk_norm_rope_detail::launch_rows<wam::DType::kBFloat16>(Pass, const QkNormRopeParams&, void*);
