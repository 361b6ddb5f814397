"""The CUDA kernels of qk_norm_rope, through their launchers, against the reference in float64."""

import itertools

import pytest
import torch

from tests.budget import assert_within_budget
from wam_kernels.qk_norm_rope import kernel_cuda, reference, rope_table

EPS = 1e-6
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = [  # heads, head_dim
    pytest.param(1, 8, id="one-thread-of-4-wide-halves"),
    pytest.param(3, 24, id="half-a-head-is-no-multiple-of-8"),
    pytest.param(1, 16, id="one-thread"),
    pytest.param(2, 96, id="units-of-a-head-no-power-of-two"),
    pytest.param(9, 64, id="second-warp-has-few-lanes"),
    pytest.param(24, 128, id="both-experts"),
    pytest.param(33, 128, id="two-units-a-thread-some-idle"),
    pytest.param(32, 256, id="widest"),
    pytest.param(34, 240, id="wide-and-not-a-power-of-two"),
    pytest.param(90, 88, id="wide-with-4-wide-halves"),
]


def make_inputs(
    B, S, heads, head_dim, dtype, per_head, device, weight_dtype=torch.float32, table_per_sample=False
):  # fmt: skip
    """dq_out, dk_out ``[B, S, H, D]``, q, k ``[B, S, inner]``, weights, table."""
    g = torch.Generator().manual_seed(0)
    inner, dtype = heads * head_dim, getattr(torch, dtype)
    dq_out, dk_out = (torch.randn(B, S, heads, head_dim, generator=g).to(dtype) for _ in range(2))
    q, k = (torch.randn(B, S, inner, generator=g).to(dtype) for _ in range(2))
    weights = (torch.randn(head_dim if per_head else inner, generator=g).to(weight_dtype) for _ in range(2))
    tokens = (B, S) if table_per_sample else (S,)
    table = rope_table(10 * torch.randn(*tokens, 3, generator=g), head_dim)
    return [t.to(device) for t in (dq_out, dk_out, q, k, *weights, table)]


def expected(dq_out, dk_out, q, k, weight_q, weight_k, table, *options, dtype):
    """q_out, k_out, dq, dk, dweight_q, dweight_k, computed in ``dtype`` or, if that is None, in the inputs' own."""
    leaves = [t.detach() if dtype is None else t.detach().to(dtype) for t in (q, k, weight_q, weight_k)]
    leaves = [t.requires_grad_() for t in leaves]
    outs = reference.qk_norm_rope(*leaves, table.to(dtype or table.dtype), *options, EPS)
    given = [g.to(out.dtype) for g, out in zip((dq_out, dk_out), outs, strict=True)]
    grads = torch.autograd.grad(outs, leaves, given)
    return [t.detach() for t in (*outs, *grads)]


def check(machine, inputs, *options):
    def forward():
        outs = [inputs[2].new_empty(tuple(g.shape)) for g in inputs[:2]]
        kernel_cuda.forward(*inputs[2:], *options, EPS, *outs)
        return outs

    actual = [*machine.run(forward), *machine.run(lambda: kernel_cuda.backward(*inputs, *options, EPS))]
    own, true = (expected(*inputs, *options, dtype=dtype) for dtype in (None, torch.float64))
    names = ("q_out", "k_out", "dq", "dk", "dweight_q", "dweight_k")
    for name, *values in zip(names, actual, own, true, strict=True):
        assert values[0].dtype == values[1].dtype, name
        assert_within_budget(name, *values)


@pytest.mark.parametrize("heads, head_dim", SHAPES)
@pytest.mark.parametrize("per_head, interleaved", list(itertools.product([False, True], repeat=2)))
def test_every_shape_and_variant(machine, heads, head_dim, per_head, interleaved):
    inputs = make_inputs(1, 3, heads, head_dim, "bfloat16", per_head, machine.device)
    check(machine, inputs, head_dim, per_head, interleaved)


@pytest.mark.parametrize("weight_dtype", ["own", torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(machine, dtype, weight_dtype):
    weight_dtype = getattr(torch, dtype) if weight_dtype == "own" else weight_dtype
    inputs = make_inputs(2, 5, 3, 48, dtype, True, machine.device, weight_dtype)
    check(machine, inputs, 48, True, True)


@pytest.mark.parametrize("B, S", [(3, 4), (0, 4), (2, 0)])
def test_a_table_per_sample(machine, B, S):
    inputs = make_inputs(B, S, 2, 24, "float32", False, machine.device, table_per_sample=True)
    check(machine, inputs, 24, False, True)


@pytest.mark.parametrize("blocks", [1, 3, 198])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("B, S", [(2, 7), (1, 1), (0, 3), (2, 0)])
def test_blocks_share_out_the_tokens(machine, B, S, per_head, blocks, monkeypatch):
    monkeypatch.setattr(kernel_cuda, "BLOCKS", blocks)
    check(machine, make_inputs(B, S, 2, 32, "float32", per_head, machine.device), 32, per_head, True)


@pytest.mark.parametrize("per_head", [False, True])
def test_nan_stays(machine, per_head):
    def results(inputs):
        outs = [torch.empty_like(g) for g in inputs[:2]]
        kernel_cuda.forward(*inputs[2:], *options, *outs)
        return [*outs, *machine.run(lambda: kernel_cuda.backward(*inputs, *options))[:2]]

    options = 16, per_head, True, EPS
    inputs = make_inputs(2, 5, 3, 16, "float32", per_head, machine.device)
    expected = results(inputs)
    inputs[2][1, 2, 19], inputs[3][0, 4, 0], inputs[1][0, 4, 0] = torch.nan, torch.inf, torch.nan
    for got, want, (b, s, h) in zip(results(inputs), expected, [(1, 2, 1), (0, 4, 0)] * 2, strict=True):
        got, want = (t.unflatten(-1, (3, 16)) if t.ndim == 3 else t for t in (got, want))
        heads = slice(h, h + 1) if per_head else slice(None)
        assert not got[b, s, heads].isfinite().all()
        got[b, s, heads] = want[b, s, heads] = 0
        assert torch.equal(got, want)


def test_free_strides_and_a_cache_slot(machine):
    B, S, H, D = 2, 4, 3, 16
    inputs = make_inputs(B, S, H, D, "bfloat16", False, machine.device)
    dq_out, dk_out, q, k = inputs[:4]
    inputs[0] = dq_out.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)  # heads first
    inputs[1] = dk_out[:, :1].expand_as(dk_out)
    inputs[2], inputs[3] = torch.cat([q, k, q], -1).split(H * D, -1)[:2]  # slices of a fused projection
    assert not any(t.is_contiguous() for t in inputs[:4])
    options = D, False, True
    check(machine, inputs, *options)

    caches = torch.full((3, B, H, S + 5, D), torch.nan, dtype=q.dtype, device=machine.device)
    *slots, v_slot = [cache[:, :, 2 : 2 + S].transpose(1, 2) for cache in caches]
    v = torch.cat([q, k + q], -1).split(H * D, -1)[1]
    kernel_cuda.forward(*inputs[2:], *options, EPS, *slots, v, v_slot)
    own, true = (expected(*inputs, *options, dtype=dtype) for dtype in (None, torch.float64))
    for slot, *values in zip(slots, own[:2], true[:2], strict=True):
        assert_within_budget("slot", slot, *values)
    assert torch.equal(v_slot, v.unflatten(-1, (H, D)))
    assert caches[:, :, :, :2].isnan().all() and caches[:, :, :, 2 + S :].isnan().all(), "stored outside the slot"


@pytest.mark.parametrize("heads, head_dim", [(33, 128), (90, 88), (3, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_copied_by_every_kernel(machine, dtype, heads, head_dim):
    _, _, q, k, *rest = make_inputs(2, 2, heads, head_dim, dtype, True, machine.device)

    def forward():
        outs = [q.new_empty((2, 2, heads, head_dim)) for _ in range(3)]
        kernel_cuda.forward(q, k, *rest, head_dim, True, True, EPS, *outs[:2], k - q, outs[2])
        return outs

    assert torch.equal(machine.run(forward)[2], (k - q).unflatten(-1, (heads, head_dim)))


def test_refusals_name_the_argument(machine):
    inputs = make_inputs(2, 3, 2, 16, "bfloat16", False, machine.device)
    q, k, *rest = inputs[2:]
    outs = [torch.empty_like(t) for t in inputs[:2]]
    odd = torch.zeros(2 * 3 * 36 + 4, dtype=q.dtype, device=q.device)

    def refuses(message, head_dim=16, q=q, k=k, v=k, table=rest[-1]):
        with pytest.raises(ValueError, match=message):
            options = head_dim, False, True, EPS
            kernel_cuda.forward(q, k, *rest[:-1], table, *options, *outs, v, torch.empty_like(outs[0]))

    refuses(
        r"qk_norm_rope_forward: k's batch stride must be a multiple of 8 elements \(16 bytes\), got 108; pass",
        k=odd[:-4].view(2, 3, 36)[..., :32],
    )
    refuses(r"qk_norm_rope_forward: q must be aligned to 16 bytes, got address \d+; pass", q=odd[4:196].view(2, 3, 32))
    refuses(r"qk_norm_rope_forward: head_dim must be a multiple of 8, got 4; use impl='reference'", head_dim=4)
    refuses(r"qk_norm_rope_forward: v must be aligned to 16 bytes, got address \d+; pass", v=odd[4:196].view(2, 3, 32))
    refuses(
        r"table's batch stride must be a multiple of 4 elements \(16 bytes\), got 50; pass a contiguous copy",
        table=torch.zeros(2, 25, 2, device=q.device)[:, :24].view(2, 3, 8, 2),
    )
    refuses(r"q must have last-dim stride 1, got 2; pass a contiguous copy", q=q.repeat_interleave(2, -1)[..., ::2])
