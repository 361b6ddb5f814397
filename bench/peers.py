"""Attention of other libraries, each as an arm that gets the same q, k, v ``[1, S, H, D]`` as ``block_attention``.

A peer says why it cannot serve here (:class:`Unavailable`: not installed, another device, a visibility that it cannot
express). What it raises beyond that is recorded as its error. No peer is dropped in silence.

Run so far, on a CPU: ``sdpa_dense_mask``, ``sdpa_flash``, ``flex``. Not run yet, written from the sources named at
each: ``sdpa_cudnn``, ``flex_openwam``, ``flash_attn_2``, ``flash_attn_3``, ``flash_attn_4``, ``xformers``,
``flashinfer``, ``cudnn_block_mask``, and the norms of Liger and quack at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.workloads import Workload
from wam_kernels import Plan, tokens, visible
from wam_kernels.visibility import Tokens

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """Why a peer cannot run on this machine or for this workload."""


@dataclass(frozen=True)
class Arm:
    """A peer, ready to run one workload."""

    attend: Attend
    computed_pairs: int  # (query, key) pairs whose scores it computes, masked ones included
    build: Callable[[], object] | None = None  # what has to be made anew for another geometry
    no_backward: str | None = None  # why it has none


@dataclass(frozen=True)
class Peer:
    name: str
    make: Callable[[Workload, Plan, torch.dtype], Arm]
    module: str = "torch"
    package: str = "torch"
    devices: tuple[str, ...] = ("cuda",)

    def arm(self, work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
        """
        Raises:
            Unavailable: it cannot run here, or not this workload.
        """
        if plan.device.type not in self.devices:
            raise Unavailable(f"runs on {' and '.join(self.devices)} only")
        if not _installed(self.module):
            raise Unavailable(f"{self.package} is not installed")
        return self.make(work, plan, dtype)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


# ---- what a mask is made of ----


def bounds(plan: Plan) -> Tensor:
    """The ranges of keys that every token of the first batch element sees: int32 ``[S, ranges, 2]``."""
    runs = plan.runs.cpu()
    out = torch.zeros(plan.length, (runs.shape[1] - 3) // 2, 2, dtype=torch.int32)
    for run in runs[runs[:, 0] == 0]:
        out[run[1] : run[2]] = run[3:].view(-1, 2)
    return out.to(plan.device)


def dense_mask(plan: Plan) -> Tensor:
    """The mask of the first batch element, bool ``[1, 1, S, S]``, made on the plan's device: fast enough to be fair."""
    keys = torch.arange(plan.length, dtype=torch.int32, device=plan.device)
    mask = torch.zeros(plan.length, plan.length, dtype=torch.bool, device=plan.device)
    for range_of_rows in bounds(plan).unbind(1):
        lo, hi = range_of_rows[:, :, None].unbind(1)
        mask |= (lo <= keys) & (keys < hi)
    return mask[None, None]


def blocks(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """The mask cut where some row's range begins or ends: sizes of row and of column blocks, and who sees whom.

    Inside a block all is visible or nothing, so a kernel for variable blocks masks nothing. CPU tensors: int32
    ``[rows]``, int32 ``[columns]``, bool ``[rows, columns]``.
    """
    limits = bounds(plan).cpu().long()
    columns = torch.unique(torch.cat([torch.tensor([0, plan.length]), limits.flatten()]))
    changes = 1 + (limits[1:] != limits[:-1]).flatten(1).any(1).nonzero().flatten()
    rows = torch.cat([torch.tensor([0]), changes, torch.tensor([plan.length])])
    lo, hi = limits[rows[:-1]].unbind(-1)  # [rows, ranges]
    begin = columns[:-1]
    seen = ((lo[:, :, None] <= begin) & (begin < hi[:, :, None])).any(1)
    return rows.diff().int(), columns.diff().int(), seen


def documents(work: Workload, what: str) -> int:
    if work.document is None:
        raise Unavailable(f"{what} cannot express this visibility")
    return work.document


def _dense_pairs(work: Workload) -> int:
    return work.tokens * (work.document or work.tokens)


def _split(t: Tensor, document: int) -> Tensor:
    """``[1, S, H, D]`` as a batch of documents."""
    return t.view(-1, document, *t.shape[2:])


# ---- PyTorch ----


def _sdpa_dense_mask(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
    limit = 2_500_000_000 if plan.device.type == "cuda" else 250_000_000
    if work.tokens**2 > limit:
        raise Unavailable(f"its mask has {work.tokens**2:,} entries, more than the {limit:,} that are tried here")
    mask = dense_mask(plan)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    return Arm(attend, work.tokens**2, build=lambda: dense_mask(plan))


def _sdpa_backend(backend: SDPBackend) -> Callable[[Workload, Plan, torch.dtype], Arm]:
    def make(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
        document = documents(work, "SDPA without a mask")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = (_split(t, document).transpose(1, 2) for t in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(q.shape)

        return Arm(attend, _dense_pairs(work))

    return make


# A block mask is made by evaluating the mask on every pair.
FLEX_LIMIT = {"cpu": 30_000_000, "cuda": 2_500_000_000}


def _flex_arm(
    work: Workload, plan: Plan, mask_mod: Callable, block: int, dynamic: bool | None, options: dict | None
) -> Arm:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = plan.device.type
    if work.tokens**2 > FLEX_LIMIT[device]:
        raise Unavailable(f"making its block mask evaluates {work.tokens**2:,} pairs, more than {FLEX_LIMIT[device]:,}")

    def build():
        # compiled on a GPU, where the eager version would hold several S x S tensors
        return create_block_mask(
            mask_mod, 1, 1, work.tokens, work.tokens, device=device, BLOCK_SIZE=block, _compile=device == "cuda"
        )

    block_mask = build()
    compiled = torch.compile(flex_attention, dynamic=dynamic)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(*heads, block_mask=block_mask, kernel_options=options).transpose(1, 2)

    computed = int(block_mask.to_dense().sum()) * block**2
    return Arm(attend, computed, build, "FlexAttention has no backward on CPUs" if device == "cpu" else None)


def ranges_mask_mod(limits: Tensor) -> Callable:
    """FlexAttention's form of the mask: reads two numbers for each range of a row."""

    def mask_mod(b, h, q, kv):
        seen = (kv < 0) | (q < 0)
        for r in range(limits.shape[1]):
            seen = seen | ((limits[q, r, 0] <= kv) & (kv < limits[q, r, 1]))
        return seen

    return mask_mod


def _flex(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
    """FlexAttention at its best: a mask that reads two bounds a range, and the faster of two block sizes."""
    mask_mod = ranges_mask_mod(bounds(plan))
    if plan.device.type == "cpu":
        return _flex_arm(work, plan, mask_mod, 128, False, None)
    arms = [_flex_arm(work, plan, mask_mod, block, False, None) for block in (64, 128)]
    q = torch.randn(1, work.tokens, work.heads, work.head_dim, device="cuda", dtype=dtype)
    return min(arms, key=lambda arm: _milliseconds(lambda: arm.attend(q, q, q)))


def _milliseconds(call: Callable[[], object]) -> float:
    from bench.harness import measure

    return measure({"": call}, "cuda", 5)[""]["ms_min"]


# Block shapes that OpenWAM 0.2.0 passes (policy_variants/dual_expert/batch_execution.py), with blocks of 128 and
# dynamic=True (models/common/attention_backends.py); its mask evaluates the predicate on gathered token attributes.
# On a CPU OpenWAM takes SDPA with the dense mask.
OPENWAM_OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}


def openwam_mask_mod(work: Workload, device: torch.device) -> Callable:
    """
    Raises:
        Unavailable: samples of different rules.
    """
    rule = {(g.program, g.history, g.window, g.conditional_history, g.prefix_frames) for g in work.samples}
    if len(rule) > 1:
        raise Unavailable("OpenWAM's mask has one rule for all samples of a batch")
    geometry = work.samples[0]
    per_sample = [tokens(g) for g in work.samples]
    columns = {
        name: torch.from_numpy(np.concatenate([getattr(t, name) for t in per_sample])).to(device)
        for name in ("stream", "noise", "frame", "chunk", "block", "is_key")
    }
    sample = torch.repeat_interleave(torch.tensor([g.length for g in work.samples])).to(device)

    def mask_mod(b, h, q, kv):
        of_q, of_kv = (Tokens(**{name: column[i] for name, column in columns.items()}) for i in (q, kv))
        return visible(geometry, of_q, of_kv) & (sample[q] == sample[kv])

    return mask_mod


def _flex_openwam(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
    return _flex_arm(work, plan, openwam_mask_mod(work, plan.device), 128, True, OPENWAM_OPTIONS)


# ---- FlashAttention ----


def _flash_attn(function: Callable[[], Callable]) -> Callable[[Workload, Plan, torch.dtype], Arm]:
    """flash-attn 2 or 3: documents without a mask only. Source: flash_attn_interface.py of 2.8 and of hopper/."""

    def make(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
        document, call = documents(work, "flash-attn 2 and 3"), function()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = call(*(_split(t, document) for t in (q, k, v)))
            return (out[0] if isinstance(out, tuple) else out).reshape(q.shape)

        return Arm(attend, _dense_pairs(work))

    return make


def _flash_attn_2() -> Callable:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _flash_attn_3() -> Callable:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func


def _flash_attn_4(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
    """Block-sparse, with the mask of :func:`_flex` in CuTe. Source: flash_attn/cute/interface.py, tests/cute, Aug 2026.

    Its block mask comes from FlexAttention's ``create_block_mask``, one for all heads: 128 x 128, which suits its tiles
    at D = 64 and 128 on Hopper, forward and backward.
    """
    from flash_attn.cute import flash_attn_func

    if work.document is not None:
        return Arm(
            lambda *qkv: _first(flash_attn_func(*(_split(t, work.document) for t in qkv))).reshape(qkv[0].shape),
            _dense_pairs(work),
        )
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from torch.nn.attention.flex_attention import create_block_mask

    limits = bounds(plan)
    ranges, mask_mod = limits.shape[1], ranges_mask_mod(limits)

    @cute.jit
    def cute_mask(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
        limit = aux_tensors[0]
        seen = n_idx < utils.scalar_to_ssa(0, cutlass.Int32)
        for r in cutlass.range_constexpr(ranges):
            lo = utils.scalar_to_ssa(limit[m_idx[0], r, 0], cutlass.Int32)
            hi = utils.scalar_to_ssa(limit[m_idx[0], r, 1], cutlass.Int32)
            seen = seen | ((lo <= n_idx) & (n_idx < hi))
        return seen

    def build():
        return create_block_mask(
            mask_mod, 1, 1, work.tokens, work.tokens, device="cuda", BLOCK_SIZE=(128, 128), _compile=True
        )

    block_mask = build()
    _, _, kv_count, kv_index, full_kv_count, full_kv_index, q_count, q_index, full_q_count, full_q_index, *_ = (
        block_mask.as_tuple()
    )
    forward = BlockSparseTensorsTorch(kv_count, kv_index, full_kv_count, full_kv_index, block_size=(128, 128))
    backward = BlockSparseTensorsTorch(q_count, q_index, full_q_count, full_q_index, block_size=(128, 128))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _first(
            flash_attn_func(
                q, k, v, mask_mod=cute_mask, aux_tensors=[limits], block_sparse_tensors=forward,
                block_sparse_tensors_bwd=backward,
            )
        )  # fmt: skip

    blocks = int((kv_count[0, 0] + full_kv_count[0, 0]).sum())
    return Arm(attend, blocks * 128**2, build)


def _first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


# ---- the others ----


def _xformers(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
    """``memory_efficient_attention``, with a dense bias where there is a mask. Source: docs of xformers.ops.fmha."""
    from xformers.ops import memory_efficient_attention

    if work.document is not None:
        return Arm(
            lambda *qkv: memory_efficient_attention(*(_split(t, work.document) for t in qkv)).reshape(qkv[0].shape),
            _dense_pairs(work),
        )
    if work.tokens % 8:
        raise Unavailable("its bias needs a multiple of 8 tokens")
    if work.tokens**2 * work.heads * dtype.itemsize > 16e9:
        raise Unavailable("its bias, expanded over the heads, is larger than 16 GB")

    def build() -> Tensor:
        bias = torch.zeros(1, 1, work.tokens, work.tokens, device=plan.device, dtype=dtype)
        return bias.masked_fill_(~dense_mask(plan), float("-inf")).expand(-1, work.heads, -1, -1)

    bias = build()
    return Arm(lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias), work.tokens**2, build)


def _flashinfer(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
    """Variable block-sparse wrapper: blocks end where a range of some token does, so nothing is masked.

    Source: flashinfer/sparse.py, Aug 2026. Forward only.
    """
    import flashinfer

    def build():
        row_size, column_size, seen = blocks(plan)
        wrapper = flashinfer.VariableBlockSparseAttentionWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), backend="auto"
        )
        of_heads = (t[None].expand(work.heads, *t.shape).contiguous().cuda() for t in (seen, row_size, column_size))
        wrapper.plan(*of_heads, work.heads, work.heads, work.head_dim, q_data_type=dtype)
        return wrapper

    wrapper = build()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = wrapper.run(*(t[0].transpose(0, 1).contiguous() for t in (q, k, v)))
        return out.transpose(0, 1)[None]

    return Arm(attend, plan.visible_pairs, build, "FlashInfer is for inference")


def _cudnn_block_mask(work: Workload, plan: Plan, dtype: torch.dtype) -> Arm:
    """One bit for each 128 x 128 tile. Source: cudnn-frontend python/pygraph/sdpa.cpp and test/python/sdpa/fp16.py.

    The mask knows whole tiles only, and the C++ sample asks for a Blackwell GPU. Forward only.
    """
    import cudnn

    if work.tokens % 128:
        raise Unavailable("its block mask needs a multiple of 128 tokens")
    tiles = dense_mask(plan)[0, 0].view(work.tokens // 128, 128, work.tokens // 128, 128)
    some, whole = tiles.any(3).any(1), tiles.all(3).all(1)
    if not torch.equal(some, whole):
        raise Unavailable("its block mask cannot express a tile of which a part is visible")
    n = some.shape[1]
    weights = 1 << torch.arange(8, device=some.device)
    padded = F.pad(some, (0, -n % 8)).view(n, -1, 8)
    bits = (padded * weights).sum(-1).to(torch.uint8)[None, None].expand(1, work.heads, -1, -1).contiguous()
    out = torch.empty(1, work.tokens, work.heads, work.head_dim, device="cuda", dtype=dtype)
    kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[dtype]
    graph = cudnn.pygraph(
        io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT
    )
    like = out.transpose(1, 2)  # cuDNN names dims [B, H, S, D]; strides say how they lie
    sides = [graph.tensor(name=x, dim=like.shape, stride=like.stride(), data_type=kind) for x in "qkv"]
    block_mask = graph.tensor(name="m", dim=bits.shape, stride=bits.stride(), data_type=cudnn.data_type.UINT8)
    o, _ = graph.sdpa(
        q=sides[0], k=sides[1], v=sides[2], generate_stats=False, attn_scale=work.head_dim**-0.5, block_mask=block_mask
    )
    o.set_output(True).set_dim(like.shape).set_stride(like.stride())
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device="cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = dict(zip(sides, (t.transpose(1, 2) for t in (q, k, v)), strict=True))
        graph.execute({**given, block_mask: bits, o: like}, workspace)
        return out

    return Arm(attend, int(some.sum()) * 128**2, None, "the block mask is for inference")


BOTH = ("cpu", "cuda")
ATTENTION = (
    Peer("sdpa_dense_mask", _sdpa_dense_mask, devices=BOTH),
    Peer("sdpa_flash", _sdpa_backend(SDPBackend.FLASH_ATTENTION), devices=BOTH),
    Peer("sdpa_cudnn", _sdpa_backend(SDPBackend.CUDNN_ATTENTION)),
    Peer("flex", _flex, devices=BOTH),
    Peer("flex_openwam", _flex_openwam),
    Peer("flash_attn_2", _flash_attn(_flash_attn_2), "flash_attn.flash_attn_interface", "flash-attn"),
    Peer("flash_attn_3", _flash_attn(_flash_attn_3), "flash_attn_interface", "flash-attn-3"),
    Peer("flash_attn_4", _flash_attn_4, "flash_attn.cute", "flash-attn-4"),
    Peer("xformers", _xformers, "xformers", "xformers"),
    Peer("flashinfer", _flashinfer, "flashinfer", "flashinfer-python"),
    Peer("cudnn_block_mask", _cudnn_block_mask, "cudnn", "nvidia-cudnn-frontend"),
)


# ---- norms ----


@dataclass(frozen=True)
class NormPeer:
    """A library's LayerNorm as ``norm(x, weight, bias, eps)``, or its RMSNorm as ``norm(x, weight, eps)``; last dim."""

    name: str
    what: str
    package: str
    module: str
    make: Callable[[], Callable]

    def load(self, device: str) -> Callable:
        """
        Raises:
            Unavailable: another device, or not installed.
        """
        if device != "cuda":
            raise Unavailable("runs on cuda only")
        if not _installed(self.module):
            raise Unavailable(f"{self.package} is not installed")
        return self.make()


def _liger_layer_norm() -> Callable:
    """Source: liger_kernel/transformers/functional.py."""
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm


def _liger_rms_norm() -> Callable:
    from liger_kernel.transformers.functional import liger_rms_norm

    # in place it would overwrite the incoming gradient, which the next call needs
    return lambda x, weight, eps: liger_rms_norm(x, weight, eps, in_place=False)


def _quack_rms_norm() -> Callable:
    """Source: quack/rmsnorm.py. Its LayerNorm has no bias, so it cannot stand for a shift."""
    from quack import rmsnorm

    return lambda x, weight, eps: rmsnorm(x, weight, eps=eps)


NORMS = (
    NormPeer("liger", "layer_norm", "liger-kernel", "liger_kernel", _liger_layer_norm),
    NormPeer("liger", "rms_norm", "liger-kernel", "liger_kernel", _liger_rms_norm),
    NormPeer("quack", "rms_norm", "quack-kernels", "quack", _quack_rms_norm),
)
