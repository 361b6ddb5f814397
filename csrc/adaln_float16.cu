#include "adaln.cuh"

template void wam::adaln_detail::launch_rows<wam::DType::kFloat16>(Pass, const AdalnParams&, void*);
