#include "adaln.cuh"

template void wam::adaln_detail::launch_rows<wam::DType::kFloat32>(Pass, const AdalnParams&, void*);
