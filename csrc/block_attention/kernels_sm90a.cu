// block_attention for Hopper: which kernels a call takes. forward.cuh and backward.cuh hold them, README.md a picture.
//
// out = softmax(scale q k^T) v over the pairs of a plan, and its gradients. Products in the inputs' dtype with float32
// sums; softmax in float32; probabilities and their gradients are rounded to the inputs' dtype before they multiply.
// Channels beyond head_dim are zeros that TMA fills in, so every head_dim up to 64 or 128 takes one of two kernels.
#include "backward.cuh"
#include "forward.cuh"

namespace wam {

#ifdef WAM_DEVICE_CODE

void block_attention_forward_kernel(const BlockAttentionParams& params, DType dtype, void* stream) {
  using namespace block_attention_detail;
  const bool half = dtype == DType::kFloat16, narrow = params.head_dim <= 64;
  auto* run = half ? (narrow ? launch_forward<__half, 64> : launch_forward<__half, 128>)
                   : (narrow ? launch_forward<__nv_bfloat16, 64> : launch_forward<__nv_bfloat16, 128>);
  run(params, dtype, stream);
}

void block_attention_backward_kernels(const BlockAttentionParams& params, DType dtype, void* stream) {
  using namespace block_attention_detail;
  const bool half = dtype == DType::kFloat16, narrow = params.head_dim <= 64;
  auto* run = half ? (narrow ? launch_backward<__half, 64> : launch_backward<__half, 128>)
                   : (narrow ? launch_backward<__nv_bfloat16, 64> : launch_backward<__nv_bfloat16, 128>);
  run(params, dtype, stream);
}

#endif  // WAM_DEVICE_CODE

}  // namespace wam
