"""The norm ops beside libraries with a plain norm kernel: Liger, quack, PyTorch.   python -m bench.bench_norm_peers

Nobody else has gate + residual + LayerNorm + modulation with one row a frame, so the comparison is where the
functions coincide: with one row for all tokens ``ada_layer_norm`` is an affine LayerNorm with weight 1 + scale and
bias shift, and a q/k norm with rope is a peer's RMSNorm of q and of k followed by PyTorch's rotation. Same inputs,
fresh outputs; every arm is compared with PyTorch in float64 first. GB/s count compulsory traffic: x and the norm once
each way.

The arms of ``bench_adaln`` and ``bench_qk_norm_rope`` (eager, torch.compile) are not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.bench_qk_norm_rope import rotate
from bench.peers import NORMS, Unavailable
from wam_kernels import FrameIndex, ada_layer_norm, qk_norm_rope, rope_table

EPS, HEADS = 1e-6, 24


def layer_norm_arms(S: int, D: int, device: str) -> tuple[dict[str, harness.Function], dict[str, str]]:
    """Functions of x, scale, shift (``[1, S, D]``, ``[D]``, ``[D]``), and why others are missing."""
    index = FrameIndex.per_sample(S, device=device)

    def wam(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return (ada_layer_norm(x, shift[None, None], scale[None, None], index, eps=EPS),)

    def torch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return (F.layer_norm(x, (D,), (1 + scale).to(x.dtype), shift.to(x.dtype), EPS),)

    arms, missing = {"torch": torch_norm, "wam": wam}, {}
    for peer in (p for p in NORMS if p.what == "layer_norm"):
        try:
            norm = peer.load(device)
        except Unavailable as reason:
            missing[peer.name] = f"not run here: {reason}"
        else:
            arms[peer.name] = lambda x, scale, shift, norm=norm: (
                norm(x, (1 + scale).to(x.dtype), shift.to(x.dtype), EPS),
            )
    return arms, missing


def qk_arms(S: int, D: int, device: str) -> tuple[dict[str, harness.Function], dict[str, str]]:
    """Functions of q, k (``[1, S, D]``) and their weights ``[D]``."""
    table = rope_table(60 * torch.rand(S, 3, dtype=torch.float64), D // HEADS).to(device)

    def wam(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(q, k, weight_q, weight_k, table, head_dim=D // HEADS, eps=EPS)

    def of(norm: Callable) -> harness.Function:
        def rotated(x: Tensor, weight: Tensor) -> Tensor:
            return rotate(norm(x, weight, EPS).unflatten(-1, (HEADS, -1)), table)

        return lambda q, k, weight_q, weight_k: (rotated(q, weight_q), rotated(k, weight_k))

    arms, missing = {"torch": of(lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)), "wam": wam}, {}
    for peer in (p for p in NORMS if p.what == "rms_norm"):
        try:
            arms[peer.name] = of(peer.load(device))
        except Unavailable as reason:
            missing[peer.name] = f"not run here: {reason}"
    return arms, missing


def bench(op: str, S: int, D: int, options: harness.Options, repeats: int) -> Iterable[dict]:
    device = options.device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(options.seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    if op == "layer_norm":
        arms, missing = layer_norm_arms(S, D, device)
        leaves = [randn(1, S, D), randn(D, dtype=torch.float32), randn(D, dtype=torch.float32)]
    else:
        arms, missing = qk_arms(S, D, device)
        leaves = [randn(1, S, D), randn(1, S, D), randn(D), randn(D)]
    tensors = 1 if op == "layer_norm" else 2
    incoming = [randn(*t.shape).detach() for t in arms["torch"](*leaves)]
    arms, wrong = harness.right_arms(arms, leaves, incoming, 1e-4 if dtype == torch.float32 else 2e-2)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, arm in arms.items():
        calls["forward", name] = torch.no_grad()(lambda arm=arm: arm(*leaves))
        calls["forward+backward", name] = lambda arm=arm: torch.autograd.grad(arm(*leaves), leaves, incoming)
    times = harness.measure(calls, device, repeats)
    for (what, name), t in times.items():
        # forward: in and out; backward: incoming gradient and input in, gradient out
        moved = tensors * S * D * dtype.itemsize * (2 if what == "forward" else 5)
        yield {
            "op": op, "what": what, "arm": name, "tokens": S, "D": D, "dtype": str(dtype),
            **harness.bandwidth(t, moved, device),
            "ratio": round(times[what, "torch"]["ms"] / t["ms"], 2),
        }  # fmt: skip
    yield from ({"arm": name, "error": reason, "where": [op]} for name, reason in (missing | wrong).items())


def suite(options: harness.Options) -> Iterable[dict]:
    sizes = [(144, 3072)] if options.quick and options.device == "cpu" else [(144, 3072), (4896, 3072)]
    for op in tqdm(("layer_norm", "qk_norm_rope"), desc="norm_peers", unit="op"):
        for S, D in sizes:
            yield from bench(op, S, D, options, 5 if options.quick else 20)


def main(argv: list[str] | None = None) -> None:
    harness.main("norm_peers", __doc__, suite, argv)


if __name__ == "__main__":
    main()
