#include "adaln.cuh"

template void wam::adaln_detail::launch_rows<wam::DType::kBFloat16>(Pass, const AdalnParams&, void*);
