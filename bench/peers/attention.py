"""Attention of other libraries, each as a provider that gets the same q, k, v ``[1, S, H, D]`` as ``block_attention``.

A peer says why it cannot serve here (:class:`Unavailable`: not installed, another device, a visibility that it cannot
express). What it raises beyond that is recorded as its error. No peer is dropped in silence.

Run so far, on a CPU: ``sdpa_dense_mask``, ``sdpa_flash``, ``flex``. Not run yet, written from the sources named at
each: ``sdpa_cudnn``, ``flex_openwam``, ``flex_flash``, ``flash_attn_2``, ``flash_attn_3``, ``flash_attn_4``,
``xformers``, ``flashinfer``, ``cudnn_block_mask``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import measure
from bench.workloads.attention import Workload
from wam_kernels import Plan

from .availability import Unavailable, installed
from .masks import blocks, bounds, dense_mask, openwam_mask_mod, ranges_mask_mod

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """A peer, ready to run one workload."""

    attend: Attend
    computed_pairs: int  # (query, key) pairs whose scores it computes, masked ones included
    build: Callable[[], object] | None = None  # what has to be made anew for another geometry
    no_backward: str | None = None  # why it has none
    same_bits: bool | None = None  # is its backward the same from run to run? None: not known


@dataclass(frozen=True)
class Peer:
    name: str
    make: Callable[[Workload, Plan, torch.dtype], Provider]
    module: str = "torch"
    package: str = "torch"
    devices: tuple[str, ...] = ("cuda",)

    def provider(self, work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
        """
        Raises:
            Unavailable: it cannot run here, or not this workload.
        """
        if plan.device.type not in self.devices:
            raise Unavailable(f"runs on {' and '.join(self.devices)} only")
        if not installed(self.module):
            raise Unavailable(f"{self.package} is not installed")
        return self.make(work, plan, dtype)


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


def _sdpa_dense_mask(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
    limit = 2_500_000_000 if plan.device.type == "cuda" else 250_000_000
    if work.tokens**2 > limit:
        raise Unavailable(f"its mask has {work.tokens**2:,} entries, more than the {limit:,} that are tried here")
    mask = dense_mask(plan)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return Provider(attend, work.tokens**2, build=lambda: dense_mask(plan))


def _sdpa_backend(backend: SDPBackend) -> Callable[[Workload, Plan, torch.dtype], Provider]:
    def make(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
        document = documents(work, "SDPA without a mask")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shape, (q, k, v) = q.shape, (_split(t, document).transpose(1, 2) for t in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape)

        return Provider(attend, _dense_pairs(work))

    return make


# A block mask is made by evaluating the mask on every pair.
FLEX_LIMIT = {"cpu": 30_000_000, "cuda": 2_500_000_000}


def _flex_provider(
    work: Workload, plan: Plan, mask_mod: Callable, block: int, dynamic: bool | None, options: dict | None
) -> Provider:
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
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=dynamic)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(*heads, block_mask=block_mask, kernel_options=options).transpose(1, 2)

    computed = int(block_mask.to_dense().sum()) * block**2
    return Provider(attend, computed, build, "FlexAttention has no backward on CPUs" if device == "cpu" else None)


def _flex(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
    """FlexAttention at its best: a mask that reads two bounds a range, and the faster of two block sizes."""
    mask_mod = ranges_mask_mod(bounds(plan))
    if plan.device.type == "cpu":
        return _flex_provider(work, plan, mask_mod, 128, False, None)
    candidates = [_flex_provider(work, plan, mask_mod, block, False, None) for block in (64, 128)]
    q = torch.randn(1, work.tokens, work.heads, work.head_dim, device="cuda", dtype=dtype)
    return min(candidates, key=lambda made: _milliseconds(lambda: made.attend(q, q, q)))


def _milliseconds(call: Callable[[], object]) -> float:
    return measure({"": call}, "cuda", 5)[""]["ms_min"]


# Block shapes that OpenWAM 0.2.0 passes (policy_variants/dual_expert/batch_execution.py), with blocks of 128 and
# dynamic=True (models/common/attention_backends.py); its mask evaluates the predicate on gathered token attributes.
# On a CPU OpenWAM takes SDPA with the dense mask.
OPENWAM_OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}


def _flex_openwam(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
    return _flex_provider(work, plan, openwam_mask_mod(work, plan.device), 128, True, OPENWAM_OPTIONS)


def _flex_flash(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
    """FlexAttention on the kernels of flash-attn 4, with the mask of :func:`_flex` and blocks of 128 x 128.

    It raises where those kernels cannot serve, so nothing else is timed under its name. With a block mask its backward
    adds to dq in any order on Hopper. Source: torch/_inductor/kernel/flex/flex_flash_attention.py of torch 2.13.
    """
    made = _flex_provider(work, plan, ranges_mask_mod(bounds(plan)), 128, False, {"BACKEND": "FLASH"})
    return replace(made, same_bits=False)


# ---- FlashAttention ----


def _flash_attn(function: Callable[[], Callable]) -> Callable[[Workload, Plan, torch.dtype], Provider]:
    """flash-attn 2 or 3: documents without a mask only. Source: flash_attn_interface.py of 2.8 and of hopper/."""

    def make(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
        document, call = documents(work, "flash-attn 2 and 3"), function()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = call(*(_split(t, document) for t in (q, k, v)))
            return (out[0] if isinstance(out, tuple) else out).reshape(q.shape)

        return Provider(attend, _dense_pairs(work))

    return make


def _flash_attn_2() -> Callable:
    from flash_attn import flash_attn_func

    return flash_attn_func


def _flash_attn_3() -> Callable:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func


def _flash_attn_4(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
    """Block-sparse, with the mask of :func:`_flex` in CuTe. Source: flash_attn/cute/interface.py, tests/cute, Aug 2026.

    Its block mask comes from FlexAttention's ``create_block_mask``, one for all heads: 128 x 128, which suits its tiles
    at D = 64 and 128 on Hopper, forward and backward.
    """
    from flash_attn.cute import flash_attn_func

    document = work.document
    if document is not None:
        return Provider(
            lambda *qkv: _first(flash_attn_func(*(_split(t, document) for t in qkv))).reshape(qkv[0].shape),
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
        attends = n_idx < utils.scalar_to_ssa(0, cutlass.Int32)
        for r in cutlass.range_constexpr(ranges):
            lo = utils.scalar_to_ssa(limit[m_idx[0], r, 0], cutlass.Int32)
            hi = utils.scalar_to_ssa(limit[m_idx[0], r, 1], cutlass.Int32)
            attends = attends | ((lo <= n_idx) & (n_idx < hi))
        return attends

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
    return Provider(attend, blocks * 128**2, build, same_bits=False)  # dq is added to in any order on Hopper


def _first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


# ---- the others ----


def _xformers(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
    """``memory_efficient_attention``, with a dense bias where there is a mask. Source: docs of xformers.ops.fmha."""
    from xformers.ops import memory_efficient_attention

    document = work.document
    if document is not None:
        return Provider(
            lambda *qkv: memory_efficient_attention(*(_split(t, document) for t in qkv)).reshape(qkv[0].shape),
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
    return Provider(lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias), work.tokens**2, build)


def _flashinfer(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
    """Variable block-sparse wrapper: blocks end where a range of some token does, so nothing is masked.

    Source: flashinfer/sparse.py, Aug 2026. Forward only.
    """
    import flashinfer

    def build():
        row_size, column_size, attended = blocks(plan)
        wrapper = flashinfer.VariableBlockSparseAttentionWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), backend="auto"
        )
        of_heads = (t[None].expand(work.heads, *t.shape).contiguous().cuda() for t in (attended, row_size, column_size))
        wrapper.plan(*of_heads, work.heads, work.heads, work.head_dim, q_data_type=dtype)
        return wrapper

    wrapper = build()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = wrapper.run(*(t[0].transpose(0, 1).contiguous() for t in (q, k, v)))
        return out.transpose(0, 1)[None]

    return Provider(attend, plan.visible_pairs, build, "FlashInfer is for inference")


def _cudnn_block_mask(work: Workload, plan: Plan, dtype: torch.dtype) -> Provider:
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

    return Provider(attend, int(some.sum()) * 128**2, None, "the block mask is for inference")


BOTH = ("cpu", "cuda")
ATTENTION = (
    Peer("sdpa_dense_mask", _sdpa_dense_mask, devices=BOTH),
    Peer("sdpa_flash", _sdpa_backend(SDPBackend.FLASH_ATTENTION), devices=BOTH),
    Peer("sdpa_cudnn", _sdpa_backend(SDPBackend.CUDNN_ATTENTION)),
    Peer("flex", _flex, devices=BOTH),
    Peer("flex_openwam", _flex_openwam),
    Peer("flex_flash", _flex_flash, "flash_attn.cute", "flash-attn-4"),
    Peer("flash_attn_2", _flash_attn(_flash_attn_2), "flash_attn.flash_attn_interface", "flash-attn"),
    Peer("flash_attn_3", _flash_attn(_flash_attn_3), "flash_attn_interface", "flash-attn-3"),
    Peer("flash_attn_4", _flash_attn_4, "flash_attn.cute", "flash-attn-4"),
    Peer("xformers", _xformers, "xformers", "xformers"),
    Peer("flashinfer", _flashinfer, "flashinfer", "flashinfer-python"),
    Peer("cudnn_block_mask", _cudnn_block_mask, "cudnn", "nvidia-cudnn-frontend"),
)
