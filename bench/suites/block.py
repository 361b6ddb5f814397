"""One DiT block, both experts: plain PyTorch glue against the fused ops, on the same weights.

python -m bench.suites block

``plain`` is the block as it was before the ops: LayerNorm, modulation, gates, RMSNorm and rope in PyTorch; ``compile``
is torch.compile of it, at the small size on a CPU, where compiling takes minutes; ``wam`` is
``wam_models.model.blocks.PackedBlock``. All three call the same block_attention, so that what differs is the glue.
Outputs and gradients of every provider are compared with the plain block in float64 first.

``ratio`` is of ``ms_min``. Beside the times: ``peak_MB`` of a call; ``kernels``, operations that read or write memory
(no views, no allocations), where a registered op counts what it launches on a GPU, one forward and two backward;
``MB``, what these operations read and write, each its inputs and outputs once; ``roofline_MB``, the same of the
products, both attentions, GELU, norms and rope alone, which is what no fusion of glue can spare. Inside torch.compile's
kernels nothing is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.peers.plain import rotate
from bench.rows import Row
from wam_kernels import Geometry, Plan, block_attention, compile_plan, rope_table
from wam_kernels.masks.visibility import ACTION, VIDEO
from wam_models.config import ModelConfig
from wam_models.model.blocks import ExpertBlock, PackedBlock, Uncast, at_least_float32, stream_inputs
from wam_models.model.positions import action_positions, video_positions
from wam_models.train.config import small_model

# ---- the block without the ops ----


def rms_norm(x: Tensor, norm: nn.RMSNorm, config: ModelConfig) -> Tensor:
    normed = F.rms_norm(at_least_float32(x), norm.weight.shape, eps=config.eps) * at_least_float32(norm.weight)
    return normed.to(x.dtype).unflatten(-1, (-1, config.head_dim))


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(at_least_float32(x), x.shape[-1:], eps=eps).unflatten(1, (scale.shape[1], -1))
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2).to(x.dtype)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    update = update.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
    return (at_least_float32(x) + update.flatten(1, 2)).to(x.dtype)


def plain_cross_attention(expert: ExpertBlock, x: Tensor, text: Tensor, config: ModelConfig) -> Tensor:
    norm, a = expert.norm2, expert.attn2
    x = F.layer_norm(
        at_least_float32(x), norm.normalized_shape, at_least_float32(norm.weight), at_least_float32(norm.bias), norm.eps
    ).to(x.dtype)
    q, k = rms_norm(a.to_q(x), a.norm_q, config), rms_norm(a.to_k(text), a.norm_k, config)
    v = a.to_v(text).unflatten(-1, (-1, config.head_dim))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return a.output(out.transpose(1, 2))


def plain_block(
    block: PackedBlock, config: ModelConfig, xs: list[Tensor], t_projs: list[Tensor], texts: list[Tensor], rope, plan
) -> list[Tensor]:
    experts = block.expert(VIDEO), block.expert(ACTION)
    modulations = [(e.scale_shift_table + t).unbind(2) for e, t in zip(experts, t_projs, strict=True)]
    parts = []
    for expert, x, (shift, scale, *_) in zip(experts, xs, modulations, strict=True):
        h, a = ada_layer_norm(x, shift, scale, config.eps), expert.attn1
        q, k = rms_norm(a.to_q(h), a.norm_q, config), rms_norm(a.to_k(h), a.norm_k, config)
        parts.append((q, k, a.to_v(h).unflatten(-1, (-1, config.head_dim))))
    q, k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    table = torch.cat(rope)
    out = block_attention(rotate(q, table), rotate(k, table), v, plan).split([x.shape[1] for x in xs], 1)
    done = []
    for expert, x, part, text, m in zip(experts, xs, out, texts, modulations, strict=True):
        x = gated_residual(x, expert.attn1.output(part), m[2])
        x = x + plain_cross_attention(expert, x, text, config)
        done.append(gated_residual(x, expert.ffn(ada_layer_norm(x, m[3], m[4], config.eps)), m[5]))
    return done


def wam_block(block, config, xs, t_projs, texts, rope, plan) -> list[Tensor]:
    streams = tuple(stream_inputs(x, t, ()) for x, t in zip(xs, t_projs, strict=True))
    done = block(streams, Uncast(*rope), texts, lambda q, k, v: block_attention(q, k, v, plan), None, (True, True))
    return [stream.x for stream in done]


# ---- what a call launches and moves ----

NO_WORK = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")
# Products, attentions, GELU and the fused ops: each input read once, each output written once.
ESSENTIAL = ("mm", "addmm", "bmm", "baddbmm", "gelu", "gelu_backward")


class Count(TorchDispatchMode):
    """Operations that touch memory, and their bytes, below autograd; ``essential`` bytes are those of ``ESSENTIAL``."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = self.essential = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        if func.is_view or name in NO_WORK:
            return out
        moved = sum(_bytes(t) for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        ours = namespace == "wam"
        self.kernels += 2 if ours and name.endswith("backward") else 1
        self.bytes += moved
        if ours or name in ESSENTIAL or name.startswith("_scaled_dot_product"):
            self.essential += moved
        return out


def _bytes(t: Tensor) -> int:
    """Of memory, not of an expanded view."""
    numbers = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * t.element_size() if t.numel() else 0


def rms_bytes(config: ModelConfig, xs: list[Tensor], texts: list[Tensor], backward: bool) -> int:
    """Of the cross-attention's q and k norms in one pass: x in, y out; back again x and dy in, dx out."""
    tokens = sum(t.shape[0] * t.shape[1] for t in (*xs, *texts))
    return tokens * config.inner * xs[0].element_size() * (5 if backward else 2)


# ---- cases ----


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    samples: int
    frames: int
    text: int
    repeats: int
    video_tokens: int = 32

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            program="joint", history="video_only", video_frames=self.frames, video_tokens=self.video_tokens,
            action_frames=self.frames, action_tokens=self.config.actions_per_frame, chunk_size=4, window=64,
        )  # fmt: skip


def middle_config() -> ModelConfig:
    """8 heads of 64, as in the attention benchmark; feed-forward widths in the proportions of the full size."""
    return ModelConfig(
        hidden=512, heads=8, head_dim=64, layers=1, ffn=2048, action_hidden=256, action_ffn=1024, action_dim=7,
        actions_per_frame=4, text_dim=512,
    )  # fmt: skip


def make(case: Case, device: str, seed: int) -> tuple[PackedBlock, tuple, list[Tensor], list[Tensor], Plan]:
    """Block, (xs, t_projs, texts, rope), what a gradient is taken of, incoming gradients, plan."""
    torch.manual_seed(seed)
    c, B, T = case.config, case.samples, 2 * case.frames
    block = PackedBlock(c).to(device)
    widths, tokens = (c.hidden, c.action_hidden), (case.video_tokens, c.actions_per_frame)
    xs = [torch.randn(B, T * n, D, device=device, requires_grad=True) for n, D in zip(tokens, widths, strict=True)]
    t_projs = [0.3 * torch.randn(B, T, 6, D, device=device) for D in widths]
    texts = [torch.randn(B, case.text, D, device=device) for D in widths]
    for t in (*t_projs, *texts):
        t.requires_grad_()
    frames = torch.arange(case.frames, device=device).repeat(2)
    places = video_positions(frames, 4, case.video_tokens // 4), action_positions(frames, c.actions_per_frame)
    rope = tuple(rope_table(p, c.head_dim) for p in places)
    plan = compile_plan([[case.geometry]] * B, device=device)
    incoming = [torch.randn_like(x) for x in xs]
    return block, (xs, t_projs, texts, rope), [*xs, *t_projs, *texts, *block.parameters()], incoming, plan


def rows_of(case: Case, device: str, compiles: bool, seed: int) -> Iterable[Row]:
    block, inputs, leaves, incoming, plan = make(case, device, seed)
    functions = {"plain": plain_block, "wam": wam_block}

    def train(fn: Callable) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            outs = fn(block, case.config, *inputs, plan)
            return [*outs, *torch.autograd.grad(outs, leaves, incoming)]

        return call

    def forward(fn: Callable) -> Callable[[], list[Tensor]]:
        return torch.no_grad()(lambda: fn(block, case.config, *inputs, plan))

    if compiles:
        try:
            compiled = torch.compile(plain_block, dynamic=False)
            train(compiled)()
            functions["compile"] = compiled
        except (RuntimeError, ImportError) as error:  # a peer is optional: it needs a C++ compiler, for one
            yield {"provider": "compile", "where": [case.name], "error": harness.first_line(error)}

    truth = truth_of(case, block, inputs, incoming, plan)
    for name, fn in functions.items():
        for i, (a, b) in enumerate(zip(train(fn)(), truth, strict=True)):
            harness.require_equal(f"{case.name}: output or gradient {i} of {name}", a, b, 1e-4)
    del truth
    for what, wrap in (("forward", forward), ("forward+backward", train)):
        calls = {name: wrap(fn) for name, fn in functions.items()}
        counts: dict[str, Count] = {}
        for name in ("plain", "wam"):
            with Count() as counts[name]:
                calls[name]()
        roofline = counts["wam"].essential + rms_bytes(case.config, inputs[0], inputs[2], what != "forward")
        times = harness.measure(calls, device, case.repeats)
        for name, t in times.items():
            count = counts.get(name)
            yield {
                "workload": case.name, "what": what, "provider": name, "tokens": case.samples * plan.length,
                "dtype": "torch.float32", **{key: round(value, 3) for key, value in t.items()},
                "ratio": round(times["plain"]["ms_min"] / t["ms_min"], 2),
                "peak_MB": round(harness.peak_megabytes(calls[name], device), 1),
                "kernels": count and count.kernels, "MB": count and round(count.bytes / 1e6, 1),
                "roofline_MB": round(roofline / 1e6, 1),
            }  # fmt: skip


def truth_of(case: Case, block: PackedBlock, inputs: tuple, incoming: list[Tensor], plan: Plan) -> list[Tensor]:
    """Outputs and gradients of the plain block in float64."""
    block = copy.deepcopy(block).double()
    xs, t_projs, texts, rope = ([t.detach().double() for t in group] for group in inputs)
    for t in (*xs, *t_projs, *texts):
        t.requires_grad_()
    outs = plain_block(block, case.config, xs, t_projs, texts, rope, plan)
    leaves = [*xs, *t_projs, *texts] + list(block.parameters())
    return [*outs, *torch.autograd.grad(outs, leaves, [t.double() for t in incoming])]


def rows(options: Options) -> Iterable[Row]:
    cases = [Case("demo", small_model(), samples=2, frames=9, text=16, repeats=3 if options.quick else 30)]
    if not options.quick:
        cases.append(Case("hidden 512, LIBERO", middle_config(), samples=1, frames=68, text=16, repeats=8))
    for case in tqdm(cases, desc="block"):
        # on a CPU two minutes of compilation for each case
        compiles = options.device == "cuda" or (case.name == "demo" and not options.quick)
        yield from rows_of(case, options.device, compiles, options.seed)
