"""DreamZero: ``CausalWanModel`` of ``CausalWanSelfAttention``, teacher-forced training and cached inference.

Training. The original attends block by block: for every block of frames it concatenates the keys that the block attends
to and calls attention once, four times over. Here all of [clean video | noisy video | action | state] is one call under
the program ``dreamzero_train``.

Inference. Everything attends to the cache and itself, so the model's own dense attention stays. What goes are copies:
the keys of a chunk are normed, rotated and written behind a copy of the cache in one launch, and the updated cache is a
view of that buffer, where the original concatenates keys and values twice and stacks them.

In both, q/k norm and rope are one launch, and so is each norm of a block with its modulation, gate and residual. The
modulation ``[B, F, 6, D]`` has a row for a block, a frame or a token, in its own dtype; the original adds the block's
table and repeats it to the tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..masks.systems import dreamzero_train
from . import _glue
from ._kernels import Tables, attend_under_program, norm_rope, require_complex, require_kernel
from ._patching import Foreign, Patch, Unsupported, of_class, require_class, require_norms, require_parts

SYSTEM = "DreamZero"


_PARTS = (
    "q", "k", "v", "o", "attn", "norm_q", "norm_k", "num_heads", "head_dim", "qk_norm", "frame_seqlen",
    "local_attn_size", "max_attention_size", "num_frame_per_block", "num_action_per_block", "num_state_per_block",
)  # fmt: skip


def find(model: nn.Module) -> list[nn.Module]:
    """The self-attentions of a model."""
    return of_class(model, "CausalWanSelfAttention")


def apply(patch: Patch, attentions: list[Foreign]) -> None:
    tables = Tables()
    for attn in attentions:
        require_class(SYSTEM, attn, "CausalWanSelfAttention")
        require_parts(SYSTEM, attn, _PARTS)
        require_kernel(SYSTEM, attn.q.weight.new_empty(attn.head_dim))
        if getattr(attn, "_dreamzero_context_parallel_enabled", False):
            raise Unsupported(
                f"patch: {SYSTEM} as LoongForge has it must have context_parallel_size=1, where a rank has the "
                "whole sequence of tokens"
            )
        if not attn.qk_norm:
            raise Unsupported(f"patch: {SYSTEM}'s attention must have qk_norm=True, got {attn.qk_norm}")
        require_norms(SYSTEM, attn.norm_q, attn.norm_k, attn.num_heads * attn.head_dim)
        patch.method(attn, "forward", _forward, tables)
        patch.leave_alone(attn.attn, "in cached inference, attends to all of the cache: nothing to skip")
    for block in of_class(patch.model, "CausalWanAttentionBlock") if patch.model is not None else ():
        _glue.replace(patch, block, "forward", _block_forward, partial(_why_no_glue, block))


def _why_no_glue(block: Foreign) -> str | None:
    require_class(SYSTEM, block, "CausalWanAttentionBlock")
    table = getattr(block, "modulation", None)
    if not isinstance(table, Tensor) or table.ndim != 3 or tuple(table.shape[:2]) != (1, 6):
        return "its modulation is not [1, 6, D]"
    return _glue.why_not(table.shape[-1], (block.norm1, block.norm2), (block.norm3,))


def _block_forward(
    block: Foreign, x: Tensor, e: Tensor, freqs: Tensor, freqs_action: Tensor, freqs_state: Tensor,
    action_register_length: int | None, context: Tensor, kv_cache: Tensor | None = None,
    crossattn_cache: Tensor | None = None, current_start_frame: int = 0, is_tf: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """norm + modulation, gate + residual + norm, residual + norm + modulation, gate + residual."""
    rows = e[:, : x.shape[1]]  # a longer modulation is cut, a shorter one repeated
    shift, scale, gate, *mlp = _glue.split_rows(
        rows, block.modulation[0], torch.promote_types(e.dtype, block.modulation.dtype)
    )
    _glue.require_rows(SYSTEM, x, shift)
    c_shift, c_scale, c_gate = mlp
    h = _glue.modulated(block.norm1, x, shift, scale, _glue.promoted(x, shift))
    y, updated = block.self_attn(
        x=h, freqs=freqs, freqs_action=freqs_action, freqs_state=freqs_state,
        action_register_length=action_register_length, kv_cache=kv_cache, is_tf=is_tf,
        current_start_frame=current_start_frame,
    )  # fmt: skip
    x, h = _glue.added_and_normed(x, y, gate, block.norm3, _glue.promoted(x, y, gate))
    y = block.cross_attn(h, context)
    x, h = _glue.added_and_modulated(x, y, None, block.norm2, c_shift, c_scale, _glue.promoted(x, y, c_shift))
    y = block.ffn(h)
    return _glue.added(x, y, c_gate, _glue.promoted(x, y, c_gate)), updated


def _forward(
    tables: Tables, attn: Foreign, x: Tensor, freqs: Tensor, freqs_action: Tensor, freqs_state: Tensor,
    action_register_length: int | None, kv_cache: Tensor | None = None, current_start_frame: int = 0,
    is_tf: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    require_complex(SYSTEM, freqs)  # its TensorRT path has others
    registers = action_register_length or 0
    if kv_cache is None:
        if not is_tf or not registers:
            raise Unsupported(
                f"patch: {SYSTEM}'s training has a program for teacher forcing with actions (is_tf=True and "
                f"action_register_length), got is_tf={is_tf} and {action_register_length}"
            )
        return _train(attn, x, (freqs, freqs_action, freqs_state), registers, tables)
    block = (current_start_frame - 1) // attn.num_frame_per_block
    return _cached(attn, x, (freqs, freqs_action, freqs_state), registers, block, kv_cache, tables)


_Freqs = tuple[Tensor, Tensor, Tensor]  # video, action, state: complex [n, 1, D / 2]; the last two hold spare positions


def _sizes(attn: Foreign, tokens: int, registers: int) -> dict[str, int]:
    """Of ``dreamzero_train`` in this call.

    Raises:
        Unsupported: sizes that are no whole number of frames and blocks, or an unlimited window.
    """
    if attn.local_attn_size == -1:
        raise Unsupported(
            f"patch: {SYSTEM}'s max_chunk_size must be limited, got -1, where its clean frames are causal token by "
            "token instead of block by block"
        )
    video, rest = divmod(tokens - registers, 2 * attn.frame_seqlen)
    blocks = (video - 1) // attn.num_frame_per_block
    each = attn.num_action_per_block + attn.num_state_per_block
    if rest or video < 1 or (video - 1) % attn.num_frame_per_block or registers != blocks * each:
        raise Unsupported(
            f"patch: {SYSTEM}'s sequence must be two copies of 1 + a multiple of {attn.num_frame_per_block} frames of "
            f"{attn.frame_seqlen} tokens and {each} registers for each block, got {tokens} tokens and {registers} "
            "registers"
        )
    return {
        "video_frames": video,
        "video_tokens": attn.frame_seqlen,
        "frames_per_block": attn.num_frame_per_block,
        "action_tokens": attn.num_action_per_block,
        "state_tokens": attn.num_state_per_block,
        "window": attn.local_attn_size,
    }


def _train(attn: Foreign, x: Tensor, freqs: _Freqs, registers: int, tables: Tables) -> tuple[Tensor, None]:
    sizes = _sizes(attn, x.shape[1], registers)
    blocks = registers // (attn.num_action_per_block + attn.num_state_per_block)

    def make_table(video: Tensor) -> Tensor:
        # both copies of the video are at the same positions
        ends = blocks * attn.num_action_per_block, blocks * attn.num_state_per_block
        return _table(video, video, freqs[1][: ends[0]], freqs[2][: ends[1]])

    norms, table = (attn.norm_q, attn.norm_k), tables.of(freqs[0], make_table, ("train", blocks))
    q, k = norm_rope(SYSTEM, attn.q(x), attn.k(x), *norms, table, head_dim=attn.head_dim)
    v = attn.v(x).unflatten(2, (attn.num_heads, -1))
    out = attend_under_program(SYSTEM, q, k, v, dreamzero_train, sizes)
    return attn.o(out.flatten(2)), None


def _cached(
    attn: Foreign, x: Tensor, freqs: _Freqs, registers: int, block: int, kv_cache: Tensor, tables: Tables
) -> tuple[Tensor, Tensor]:
    B, S, _ = x.shape
    cached, video = kv_cache.shape[2], S - registers
    dropped = max(0, cached + video - attn.max_attention_size)  # the oldest make room
    if dropped > cached:
        raise Unsupported(f"patch: {SYSTEM}'s chunk of {video} tokens must fit its window of {attn.max_attention_size}")
    if torch.is_grad_enabled() and (x.requires_grad or attn.q.weight.requires_grad):
        raise Unsupported(f"patch: {SYSTEM}'s cached attention has no gradient; run it under torch.no_grad()")

    def make_table(video_freqs: Tensor) -> Tensor:
        own = [slice(block * n, (block + 1) * n) for n in (attn.num_action_per_block, attn.num_state_per_block)]
        return _table(video_freqs, *((freqs[1][own[0]], freqs[2][own[1]]) if registers else ()))

    start = cached - dropped
    heads = attn.num_heads, attn.head_dim
    q, k, v = attn.q(x), attn.k(x), attn.v(x)
    if kv_cache.dtype != v.dtype:
        raise Unsupported(f"patch: {SYSTEM}'s cache must be {v.dtype} like its values, got {kv_cache.dtype}")
    buffer = kv_cache.new_empty(2, B, start + S, *heads)
    buffer[:, :, :start] = kv_cache[:, :, dropped:]
    query = q.new_empty(B, S, *heads)
    table = tables.of(freqs[0], make_table, ("cached", block, registers))
    slots = query, buffer[0, :, start:], buffer[1, :, start:]
    norm_rope(SYSTEM, q, k, attn.norm_q, attn.norm_k, table, head_dim=attn.head_dim, v=v, out=slots)
    out = attn.attn(query, buffer[0], buffer[1])
    return attn.o(out.flatten(2)), buffer[:, :, : start + video]


def _table(*freqs: Tensor) -> Tensor:
    """Rope table ``[S, D / 2, 2]`` of frequencies ``[n, 1, D / 2]`` or ``[n, D / 2]``, end to end."""
    return torch.view_as_real(torch.cat([f.reshape(len(f), -1) for f in freqs]))
