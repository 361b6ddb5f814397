"""What every backend must pass; called by the CPU suite, the interpreter suite and the GPU suite."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.block_attention.checks import poisoned_allocations
from tests.budget import assert_within_budget
from wam_kernels.adaln import ada_layer_norm, gate_residual_ada_layer_norm, reference
from wam_kernels.frame_index import FrameIndex


@dataclass(frozen=True)
class Variant:
    """One use of the op family: which tensors it is given."""

    residual: bool = True
    gate: bool = True
    norm: str = "adaptive"
    tables: bool = True


VARIANTS = {
    "norm": Variant(residual=False, gate=False),
    "norm-without-tables": Variant(residual=False, gate=False, tables=False),
    "gate-and-norm": Variant(),
    "gate-and-norm-without-tables": Variant(tables=False),
    "gate-and-affine-norm": Variant(norm="affine"),
    "gate-alone": Variant(norm="none"),
    "sum-and-norm": Variant(gate=False),
    "sum-and-affine-norm": Variant(gate=False, norm="affine"),
    "sum-alone": Variant(gate=False, norm="none"),
}
FULL = VARIANTS["gate-and-norm"]

UNEVEN = FrameIndex.from_runs([5, 0, 18, 1, 2])
# copies of three frames share their rows, in another order; the two runs of row 2 touch, and pass a segment's 16 tokens
SHARED = FrameIndex.from_runs([2, 3, 9, 9, 2, 3], rows=[0, 1, 2, 2, 0, 1], frames=5)

SHAPES = [  # index, B, D, dtype: each with its reason
    pytest.param(UNEVEN, 2, 64, torch.float32, id="uneven-frames"),
    pytest.param(UNEVEN, 2, 64, torch.bfloat16, id="bf16"),
    pytest.param(UNEVEN, 2, 64, torch.float16, id="fp16"),
    pytest.param(SHARED, 2, 72, torch.float32, id="shared-rows-and-rows-without-tokens"),
    pytest.param(FrameIndex.from_runs([32] * 2), 1, 576, torch.bfloat16, id="narrow-action-expert"),
    pytest.param(FrameIndex.from_runs([2, 2]), 1, 3072, torch.bfloat16, id="video-expert-D-no-power-of-two"),
    pytest.param(FrameIndex.from_runs([2, 2]), 1, 8192, torch.float32, id="largest-D"),
    pytest.param(UNEVEN, 2, 8, torch.float32, id="smallest-D"),
    pytest.param(FrameIndex.per_sample(20), 2, 64, torch.float32, id="per-sample"),
    pytest.param(FrameIndex.per_token(9), 2, 64, torch.float32, id="per-token"),
    pytest.param(FrameIndex.from_tensor(torch.tensor([2, 0, 1, 1, 0, 2, 2])), 2, 64, torch.float32, id="any-order"),
    pytest.param(FrameIndex.from_runs([1]), 1, 64, torch.float32, id="one-token"),
    pytest.param(FrameIndex.from_runs([0, 0]), 2, 64, torch.float32, id="no-tokens"),
    pytest.param(FrameIndex.from_runs([]), 1, 64, torch.float32, id="no-rows-either"),
    pytest.param(UNEVEN, 0, 64, torch.float32, id="no-batch"),
]


# rows of the modulation in another dtype than float32: index, dtype of tokens, of rows
ROW_DTYPES = [
    pytest.param(FrameIndex.per_token(5), torch.bfloat16, torch.bfloat16, id="per-token"),
    pytest.param(FrameIndex.per_token(3), torch.float32, torch.bfloat16, id="per-token-float32-tokens"),
    pytest.param(FrameIndex.per_token(3), torch.float16, torch.float32, id="per-token-float32-rows"),
    pytest.param(FrameIndex.from_runs([3, 3]), torch.bfloat16, torch.bfloat16, id="per-frame"),
]


def make_inputs(
    index: FrameIndex, B: int, D: int, dtype: torch.dtype, device: str = "cpu", rows: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Drawn on the CPU, so that devices get the same numbers. ``dr`` and ``dh`` are the incoming gradients.

    ``rows`` is the dtype of the modulation and its tables, float32 at least unless it is given.
    """
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    S, F = index.length, index.frames
    rows = rows or torch.promote_types(dtype, torch.float32)
    # tokens far from zero: a variance from E[x^2] - mean^2 would lose its digits here
    inputs = {"x": (draw(B, S, D) + 10 * draw(B, S, 1)).to(dtype)}
    inputs |= {name: draw(B, S, D).to(dtype) for name in ("y", "dr", "dh")}
    inputs |= {"t_proj": draw(B, F, 6, D).to(rows), "table": draw(6, D).to(rows)}
    inputs |= {"weight": draw(D).to(dtype), "bias": draw(D).to(dtype)}
    return {name: t.to(device) for name, t in inputs.items()}


def run(variant: Variant, index: FrameIndex, inputs: dict[str, Tensor], impl: str | None) -> dict[str, Tensor]:
    """Outputs and the gradients of everything that the variant is given."""
    given = ["x", "t_proj"] if variant.gate or variant.norm == "adaptive" else ["x"]
    given += ["table"] if variant.tables and len(given) == 2 else []
    given += ["y"] if variant.residual else []
    given += ["weight", "bias"] if variant.norm == "affine" else []
    leaves = {name: inputs[name].detach().requires_grad_() for name in given}
    # slices of the timestep projection [B, F, 6, D]: strided, as the model has them
    rows = leaves["t_proj"].unbind(2) if "t_proj" in leaves else [None] * 6
    tables = leaves["table"].unbind(0) if "table" in leaves else [None] * 6
    shift, scale = (rows[0], rows[1]) if variant.norm == "adaptive" else (None, None)
    options = {"shift_table": tables[0], "scale_table": tables[1]} if variant.norm == "adaptive" else {}
    if variant.residual:
        options |= {"gate_table": tables[2]} if variant.gate else {}
        options |= {name: leaves[name] for name in ("weight", "bias") if name in leaves}
        gate = rows[2] if variant.gate else None
        r, h = gate_residual_ada_layer_norm(leaves["x"], leaves["y"], gate, shift, scale, index, impl=impl, **options)
        assert (h is None) == (variant.norm == "none")
    else:
        r, h = None, ada_layer_norm(leaves["x"], shift, scale, index, impl=impl, **options)
    outputs = {name: t for name, t in (("r", r), ("h", h)) if t is not None}
    incoming = [inputs[f"d{name}"] for name in outputs]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), incoming)
    return {n: t.detach() for n, t in outputs.items()} | {f"d {n}": g for n, g in zip(leaves, grads, strict=True)}


def written_out(
    x, y, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias, row_of_token, eps, tokens_a_row=0
):  # fmt: skip
    """``reference.gate_residual_norm`` formula by formula, a row for every token: none of PyTorch's own norms."""
    acc = torch.promote_types(x.dtype, torch.float32)

    def of_token(rows, table):
        rows = rows.to(acc)
        return (rows if table is None else rows + table.to(acc))[:, row_of_token.long()]

    r = x
    if y is not None:
        r = (x.to(acc) + (y.to(acc) if gate is None else of_token(gate, gate_table) * y.to(acc))).to(x.dtype)
    if scale is None and weight is None:
        return r, None
    centred = r.to(acc) - r.to(acc).mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        return r, (normed * weight.to(acc) + bias.to(acc)).to(x.dtype)
    return r, (normed * (1 + of_token(scale, scale_table)) + of_token(shift, shift_table)).to(x.dtype)


def check_against_reference(variant: Variant, index: FrameIndex, inputs: dict[str, Tensor], impl: str | None) -> None:
    with poisoned_allocations():
        actual = run(variant, index, inputs, impl)
    with mock.patch.object(reference, "gate_residual_norm", written_out):
        eager = run(variant, index, inputs, "reference")
        truth = run(variant, index, {name: t.double() for name, t in inputs.items()}, "reference")
    for name, t in actual.items():
        source = inputs[name.removeprefix("d ")] if name.startswith("d ") else inputs["x"]
        assert t.dtype == source.dtype and t.is_contiguous()
        # a sum of gradients that are rounded to the dtype of the rows, as autograd's own is
        slack = 3.0 if name == "d table" and source.itemsize < 4 else 2.0
        assert_within_budget(name, t, eager[name], truth[name], slack)


def check_row_dtypes(index: FrameIndex, dtype: torch.dtype, rows: torch.dtype, impl: str, device: str = "cpu") -> None:
    """Rows of their own dtype, with and without a norm; their gradients come in it."""
    index = index.to(device)
    for name in ("gate-and-norm", "gate-alone", "gate-and-affine-norm"):
        check_against_reference(VARIANTS[name], index, make_inputs(index, 2, 72, dtype, device, rows), impl)


LAYOUTS = {
    "tokens-sliced": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "sliced-from-wider": lambda t: torch.stack((t, t), 2)[:, :, 1],
    "tokens-first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "one-row-for-all": lambda t: t[:1, :1].expand_as(t),
}


def check_layout(layout, impl: str | None, device: str = "cpu") -> None:
    """Strides of batch and token, of inputs and incoming gradients, never change the answer."""
    index = FrameIndex.from_runs([3, 2], device=device)
    inputs = make_inputs(index, 2, 64, torch.float32, device)
    strided = inputs | {name: layout(inputs[name]) for name in ("x", "y", "dr", "dh")}
    dense = strided | {name: strided[name].contiguous() for name in ("x", "y", "dr", "dh")}
    for variant in (FULL, VARIANTS["norm"], VARIANTS["gate-alone"]):
        a, b = run(variant, index, strided, impl), run(variant, index, dense, impl)
        assert all(torch.equal(a[name], b[name]) for name in a)


def check_same_bits(index: FrameIndex, inputs: dict[str, Tensor], impl: str | None) -> None:
    for variant in (FULL, VARIANTS["sum-and-affine-norm"]):
        first, second = run(variant, index, inputs, impl), run(variant, index, inputs, impl)
        assert all(torch.equal(first[name], second[name]) for name in first)


def check_nan_stays(index: FrameIndex, impl: str | None, device: str = "cpu") -> None:
    """NaN and Inf in a token and in a frame's modulation reach that token, that frame and nothing else."""
    index, inputs = index.to(device), make_inputs(index, 2, 64, torch.float32, device)
    rows = index.row_of_token.long().cpu()
    token, frame = 1, int(rows[-1])
    assert rows[token] != frame, "the token is of another frame"
    bad = {name: t.clone() for name, t in inputs.items()}
    for name, value in (("x", torch.nan), ("y", torch.inf), ("dr", torch.nan), ("dh", -torch.inf)):
        bad[name][0, token, 3] = value
    bad["t_proj"][0, frame, :3, 5] = torch.nan
    for variant in (FULL, VARIANTS["norm"], VARIANTS["gate-alone"]):
        expected, actual = run(variant, index, inputs, impl), run(variant, index, bad, impl)
        kept = (torch.arange(index.length) != token) & (rows != frame)
        kept_frames = [f for f in range(index.frames) if f not in (frame, int(rows[token]))]
        for name in actual.keys() - {"d table"}:  # every token's
            at = kept_frames if name == "d t_proj" else kept
            assert torch.equal(actual[name][0, at], expected[name][0, at]), f"{name} of other tokens"
            assert torch.equal(actual[name][1], expected[name][1]), f"{name} of the other sample"
        last = "h" if "h" in actual else "r"
        assert actual[last][0, token].isnan().any() and not actual[last][0, rows == frame].isfinite().all()


def check_fused_equals_parts(index: FrameIndex, inputs: dict[str, Tensor], impl: str | None) -> None:
    """The norm is of the rounded r: the fused op gives the bits of its two halves, one after the other."""
    shift, scale, gate, *_ = inputs["t_proj"].unbind(2)
    r, h = gate_residual_ada_layer_norm(inputs["x"], inputs["y"], gate, shift, scale, index, impl=impl)
    r_alone, none = gate_residual_ada_layer_norm(inputs["x"], inputs["y"], gate, None, None, index, impl=impl)
    assert none is None and torch.equal(r, r_alone)
    assert torch.equal(h, ada_layer_norm(r, shift, scale, index, impl=impl))


def check_one_gradient(index: FrameIndex, inputs: dict[str, Tensor], impl: str | None) -> None:
    """Where only r, or only h, is used, the gradient is as if the other brought zeros."""
    shift, scale, gate, *_ = inputs["t_proj"].unbind(2)
    leaves = [t.detach().requires_grad_() for t in (inputs["x"], inputs["y"], gate, scale)]
    outputs = gate_residual_ada_layer_norm(*leaves[:3], shift, leaves[3], index, impl=impl)
    for i, name in enumerate(("dr", "dh")):
        got = torch.autograd.grad(outputs[i], leaves, inputs[name], retain_graph=True, allow_unused=True)
        zero = torch.zeros_like(inputs[name])
        both = [zero, inputs[name]] if i else [inputs[name], zero]
        expected = torch.autograd.grad(outputs, leaves, both, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def check_every_kernel(impl: str, device: str = "cuda") -> None:
    """Once or twice at small shapes: what ``tools.gpu.sanitize`` runs."""
    index = SHARED.to(device)
    inputs = make_inputs(index, 2, 72, torch.bfloat16, device)
    for variant in (FULL, VARIANTS["gate-and-affine-norm"]):
        check_against_reference(variant, index, inputs, impl)
