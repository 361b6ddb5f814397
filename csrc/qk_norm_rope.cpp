// Checks of the qk_norm_rope kernels, and the order of launches.
#include "qk_norm_rope.cuh"

#include <utility>

#include "sum_partials.cuh"

namespace wam {
namespace {

using namespace qk_norm_rope_detail;

// What a grid has at most in x and in y.
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max(), kMaxBatch = 65535;

void require_heads(const char* op, const std::string& name, const Heads& t, const QkNormRopeParams& p, DType dtype) {
  require_present(op, name, t.data, 16);
  require_stride(op, name + "'s batch stride", t.stride_batch, p.batch, dtype);
  require_stride(op, name + "'s token stride", t.stride_token, p.tokens, dtype);
  require_stride(op, name + "'s head stride", t.stride_head, p.heads, dtype);
}

bool is_empty(const QkNormRopeParams& p) { return p.batch * p.tokens == 0; }

void check(const char* op, const QkNormRopeParams& p, DType dtype, bool backward) {
  require(op, p.head_dim >= kChannels && p.head_dim % kChannels == 0,
          "head_dim must be a multiple of 8, got " + std::to_string(p.head_dim) + "; use impl='reference'");
  const int64_t inner = static_cast<int64_t>(p.heads) * p.head_dim;
  require(op, p.heads >= 1 && inner <= kMaxChannels,
          "q must have from 1 head to " + std::to_string(kMaxChannels) + " channels, got " + std::to_string(p.heads) +
              " heads of " + std::to_string(p.head_dim) + "; use impl='reference'");
  require(op, p.batch <= kMaxBatch, "B must be at most 65535, got " + std::to_string(p.batch) + "; split the call");
  require(op, p.batch * p.tokens <= kMaxBlocks,
          "B * S must be at most 2147483647, got " + std::to_string(p.batch * p.tokens) + "; split the call");
  if (is_empty(p)) return;  // an empty tensor has no address to check
  require_present(op, "table", p.table, 16);
  for (const auto& [name, side] : {std::pair<std::string, const QkNormRopeSide&>{"q", p.q}, {"k", p.k}}) {
    require_heads(op, name, side.x, p, dtype);
    require_heads(op, (backward ? "d" : "") + name + "_out", side.y, p, dtype);
    if (backward) require_heads(op, "d" + name, side.dx, p, dtype);
    require_present(op, "weight_" + name, side.weight, 16);
  }
  require_stride(op, "table's batch stride", p.table_stride_batch, p.batch, DType::kFloat32);
  if (p.v.data == nullptr) return;
  require_heads(op, "v", p.v, p, dtype);
  require_heads(op, "v_out", p.v_out, p, dtype);
}

void launch_dtype(Pass pass, const QkNormRopeParams& p, DType dtype, void* stream) {
  switch (dtype) {
    case DType::kBFloat16: return launch_rows<DType::kBFloat16>(pass, p, stream);
    case DType::kFloat16: return launch_rows<DType::kFloat16>(pass, p, stream);
    case DType::kFloat32: return launch_rows<DType::kFloat32>(pass, p, stream);
  }
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeParams& p, DType dtype, void* stream) {
  check("qk_norm_rope_forward", p, dtype, /*backward=*/false);
  if (!is_empty(p)) launch_dtype(Pass::kForward, p, dtype, stream);
}

void qk_norm_rope_backward(const QkNormRopeParams& p, DType dtype, void* stream) {
  const char* op = "qk_norm_rope_backward";
  check(op, p, dtype, /*backward=*/true);
  require(op, p.programs * p.tokens_per_program >= p.batch * p.tokens,
          "programs * tokens_per_program must cover " + std::to_string(p.batch * p.tokens) + " tokens, got " +
              std::to_string(p.programs) + " * " + std::to_string(p.tokens_per_program));
  if (p.programs > 0) launch_dtype(Pass::kBackward, p, dtype, stream);

  SumPartialsParams sums{};
  sums.partials = p.partials;
  sums.out[0] = p.q.dweight;
  sums.out[1] = p.k.dweight;
  sums.batch = sums.rows = 1;
  sums.count = p.programs;
  sums.slots = 2;
  sums.channels = p.per_head ? p.head_dim : p.heads * p.head_dim;
  sum_partials(op, sums, stream);
}

}  // namespace wam
