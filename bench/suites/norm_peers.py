"""The norm ops compared with libraries with a plain norm kernel: Liger, quack, PyTorch.

    python -m bench.suites norm_peers

Nobody else has gate + residual + LayerNorm + modulation with one row a frame, so the comparison is where the functions
coincide: with one row for all tokens ``ada_layer_norm`` is an affine LayerNorm with weight 1 + scale and bias shift,
and a q/k norm with rope is a peer's RMSNorm of q and of k followed by PyTorch's rotation. Same inputs, fresh outputs;
every provider is compared with PyTorch in float64 first. GB/s count compulsory traffic: x and the norm once each way.

The other providers of the suites ``adaln`` and ``qk_norm_rope`` (eager, torch.compile) are not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.peers.availability import Unavailable
from bench.peers.norms import NORMS
from bench.peers.plain import rotate
from bench.rows import Row
from wam_kernels import FrameIndex, ada_layer_norm, qk_norm_rope, rope_table

EPS, HEADS = 1e-6, 24
SIZES = [(144, 3072), (4896, 3072)]  # tokens, channels
QUICK_SIZES = SIZES[:1]  # on a CPU


def layer_norm_providers(S: int, D: int, device: str) -> tuple[dict[str, harness.Function], dict[str, str]]:
    """Functions of x, scale, shift (``[1, S, D]``, ``[D]``, ``[D]``), and why others are missing."""
    index = FrameIndex.per_sample(S, device=device)

    def wam(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return (ada_layer_norm(x, shift.view(1, 1, D), scale.view(1, 1, D), index, eps=EPS),)

    def torch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return (F.layer_norm(x, (D,), (1 + scale).to(x.dtype), shift.to(x.dtype), EPS),)

    def of(norm: Callable) -> harness.Function:
        return lambda x, scale, shift: (norm(x, (1 + scale).to(x.dtype), shift.to(x.dtype), EPS),)

    providers: dict[str, harness.Function] = {"torch": torch_norm, "wam": wam}
    missing: dict[str, str] = {}
    for peer in (p for p in NORMS if p.what == "layer_norm"):
        try:
            providers[peer.name] = of(peer.load(device))
        except Unavailable as reason:
            missing[peer.name] = f"not run here: {reason}"
    return providers, missing


def qk_providers(S: int, D: int, device: str) -> tuple[dict[str, harness.Function], dict[str, str]]:
    """Functions of q, k (``[1, S, D]``) and their weights ``[D]``."""
    table = rope_table(60 * torch.rand(S, 3, dtype=torch.float64), D // HEADS).to(device)

    def wam(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(q, k, weight_q, weight_k, table, head_dim=D // HEADS, eps=EPS)

    def of(norm: Callable) -> harness.Function:
        def rotated(x: Tensor, weight: Tensor) -> Tensor:
            return rotate(norm(x, weight, EPS).unflatten(-1, (HEADS, -1)), table)

        return lambda q, k, weight_q, weight_k: (rotated(q, weight_q), rotated(k, weight_k))

    providers: dict[str, harness.Function] = {"torch": of(lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)), "wam": wam}
    missing: dict[str, str] = {}
    for peer in (p for p in NORMS if p.what == "rms_norm"):
        try:
            providers[peer.name] = of(peer.load(device))
        except Unavailable as reason:
            missing[peer.name] = f"not run here: {reason}"
    return providers, missing


def bench(op: str, S: int, D: int, options: Options, repeats: int) -> Iterable[Row]:
    device = options.device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(options.seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    if op == "layer_norm":
        providers, missing = layer_norm_providers(S, D, device)
        leaves = [randn(1, S, D), randn(D, dtype=torch.float32), randn(D, dtype=torch.float32)]
    else:
        providers, missing = qk_providers(S, D, device)
        leaves = [randn(1, S, D), randn(1, S, D), randn(D), randn(D)]
    tensors = 1 if op == "layer_norm" else 2
    incoming = [randn(*t.shape).detach() for t in providers["torch"](*leaves)]
    providers, wrong = harness.correct_providers(providers, leaves, incoming, 1e-4 if dtype == torch.float32 else 2e-2)

    def gradients(provider: harness.Function) -> tuple[Tensor, ...]:
        return torch.autograd.grad(provider(*leaves), leaves, incoming)

    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, provider in providers.items():
        calls["forward", name] = torch.no_grad()(partial(provider, *leaves))
        calls["forward+backward", name] = partial(gradients, provider)
    times = harness.measure(calls, device, repeats)
    for (what, name), t in times.items():
        # forward: in and out; backward: incoming gradient and input in, gradient out
        moved = tensors * S * D * dtype.itemsize * (2 if what == "forward" else 5)
        yield {
            "op": op, "what": what, "provider": name, "tokens": S, "D": D, "dtype": str(dtype),
            **harness.bandwidth(t, moved, device),
            "ratio": round(times[what, "torch"]["ms"] / t["ms"], 2),
        }  # fmt: skip
    yield from ({"provider": name, "error": reason, "where": [op]} for name, reason in (missing | wrong).items())


def rows(options: Options) -> Iterable[Row]:
    sizes = QUICK_SIZES if options.quick and options.device == "cpu" else SIZES
    for op in tqdm(("layer_norm", "qk_norm_rope"), desc="norm_peers", unit="op"):
        for S, D in sizes:
            yield from bench(op, S, D, options, 5 if options.quick else 20)
