#include "qk_norm_rope.cuh"

template void wam::qk_norm_rope_detail::launch_rows<wam::DType::kFloat16>(Pass, const QkNormRopeParams&, void*);
