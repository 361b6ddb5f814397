"""The CUDA kernels of adaln, through their launchers, against the formulas written out, in float64."""

import itertools

import pytest
import torch

from tests.adaln.checks import written_out
from tests.budget import assert_within_budget
from wam_kernels.adaln import config, kernel_cuda
from wam_kernels.frame_index import FrameIndex

EPS = 1e-6
DTYPES = ("bfloat16", "float16", "float32")
NAMES = ("x", "y", "gate", "shift", "scale", "gate_table", "shift_table", "scale_table", "weight", "bias")
UPDATES = {
    "x": (),
    "x+y": ("y",),
    "x+gate*y": ("y", "gate"),
    "x+(gate+table)*y": ("y", "gate", "gate_table"),
}
NORMS = {
    "none": (),
    "adaptive": ("shift", "scale"),
    "adaptive+tables": ("shift", "scale", "shift_table", "scale_table"),
    "affine": ("weight", "bias"),
}
VARIANTS = [pair for pair in itertools.product(UPDATES, NORMS) if pair != ("x", "none")]
EVERYTHING = UPDATES["x+(gate+table)*y"] + NORMS["adaptive+tables"]
AFFINE = UPDATES["x+gate*y"] + NORMS["affine"]
UNEVEN = FrameIndex.from_runs([1, 0, 4, 2, 1], rows=[0, 1, 2, 0, 3], frames=5)  # rows 1 and 4 have no tokens
WIDTHS = [
    pytest.param(8, id="one-thread"),
    pytest.param(256, id="exactly-one-warp"),
    pytest.param(264, id="second-warp-has-one-busy-lane"),
    pytest.param(576, id="narrow-action-expert"),
    pytest.param(2048, id="fullest-block-of-one-vector-a-thread"),
    pytest.param(2056, id="two-vectors-a-thread-with-an-odd-one-out"),
    pytest.param(3072, id="video-expert"),
    pytest.param(4104, id="four-vectors-a-thread-some-idle"),
    pytest.param(8192, id="widest"),
]


def make_inputs(index, B, D, dtype, present, device):
    """The tensors of ``present`` by name, and dr, dh. Rows far from zero: E[r^2] - mean^2 would lose its digits."""
    g = torch.Generator().manual_seed(0)
    S, F, dtype = index.length, index.frames, getattr(torch, dtype)
    x = (torch.randn(B, S, D, generator=g) + 3 * torch.randn(B, S, 1, generator=g)).to(dtype)
    y, dr, dh = (torch.randn(B, S, D, generator=g).to(dtype) for _ in range(3))
    gate, shift, scale = (torch.randn(B, F, D, generator=g) for _ in range(3))
    tables = torch.randn(3, D, generator=g)
    weight, bias = torch.randn(2, D, generator=g).to(dtype)
    values = dict(zip(NAMES, (x, y, gate, shift, scale, *tables, weight, bias), strict=True))
    t = {name: values[name].to(device) if name in ("x", *present) else None for name in NAMES}
    return t, dr.to(device), dh.to(device)


def expected(t, dr, dh, index, dtype):
    """r, h and the gradients by the names of NAMES, computed in ``dtype`` or, if that is None, in the inputs' own."""
    leaves = {n: v if v is None else (v.detach() if dtype is None else v.detach().to(dtype)) for n, v in t.items()}
    leaves = {n: None if v is None else v.requires_grad_() for n, v in leaves.items()}
    r, h = written_out(*leaves.values(), index.row_of_token, EPS)
    flows = [(out, g.to(out.dtype)) for out, g in ((r, dr), (h, dh)) if out is not None and g is not None]
    wanted = [n for n, v in leaves.items() if v is not None]
    grads = [None] * len(wanted)
    if flows:
        outputs, given = zip(*flows, strict=True)
        grads = torch.autograd.grad(outputs, [leaves[n] for n in wanted], given, allow_unused=True)
    return r.detach(), None if h is None else h.detach(), dict(zip(wanted, grads, strict=True))


def check(machine, t, dr, dh, index):
    """Forward, and backward with what flows in, within the budget of plain PyTorch."""
    index = index.to(machine.device)
    r, h = machine.run(kernel_cuda.forward, *t.values(), index.row_of_token, EPS)
    assert (r is None) == (t["y"] is None)
    assert (h is None) == (t["scale"] is None and t["weight"] is None)
    dh = None if h is None else dh
    own_r, own_h, own = expected(t, dr, dh, index, None)
    true_r, true_h, true = expected(t, dr, dh, index, torch.float64)
    if r is not None:
        assert_within_budget("r", r, own_r, true_r)
    if h is not None:
        assert_within_budget("h", h, own_h, true_h)
    if dh is None and (dr is None or t["gate"] is None):
        return  # nothing for a kernel to do
    y = None if t["gate"] is None else t["y"]
    names = ("gate", "scale", "gate_table", "scale_table", "weight")
    row = None if dh is None else t["x"] if r is None else r
    grads = machine.run(
        kernel_cuda.backward, dr, dh, row, y, *(t[n] for n in names),
        index.segments, index.row_begin, index.row_segments, EPS,
    )  # fmt: skip
    for name, grad in zip(("x", "y", "gate", "shift", "scale", "weight", "bias"), grads, strict=True):
        present = t[name] is not None and true[name] is not None
        implied = (name == "x" and dh is None) or (name == "y" and t["gate"] is None)  # equals dr, equals dx
        assert (grad is not None) == (present and not implied), name
        if grad is not None:
            assert_within_budget(f"d{name}", grad, own[name], true[name])


@pytest.mark.parametrize("flows", ["dr and dh", "dr", "dh"])
@pytest.mark.parametrize("update, norm", VARIANTS)
def test_every_variant(machine, update, norm, flows, monkeypatch):
    monkeypatch.setattr(config, "PROGRAMS", 2)  # a block walks several tokens, and their rows change
    t, dr, dh = make_inputs(UNEVEN, 2, 72, "bfloat16", UPDATES[update] + NORMS[norm], machine.device)
    check(machine, t, dr if "dr" in flows else None, dh if "dh" in flows else None, UNEVEN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_every_width(machine, D, dtype):
    index = FrameIndex.from_runs([1, 2])
    check(machine, *make_inputs(index, 1, D, dtype, EVERYTHING, machine.device), index)


@pytest.mark.parametrize("present", [EVERYTHING, AFFINE], ids=["adaptive", "affine"])
@pytest.mark.parametrize(
    "index",
    [
        pytest.param(UNEVEN, id="uneven-frames-that-come-back"),
        pytest.param(FrameIndex.per_token(5), id="per-token"),
        pytest.param(FrameIndex.per_sample(140), id="per-sample-and-enough-segments-for-lines"),
        pytest.param(FrameIndex.from_runs([0, 0], frames=3), id="no-tokens"),
    ],
)
@pytest.mark.parametrize("tokens_per_block", [1, 8])
def test_every_index(machine, index, present, tokens_per_block, monkeypatch):
    monkeypatch.setattr(config, "PROGRAMS", 1)
    monkeypatch.setattr(config, "TOKENS_OF_PROGRAM", tokens_per_block)
    check(machine, *make_inputs(index, 2, 24, "float32", present, machine.device), index)


@pytest.mark.parametrize("B", [0, 1])
def test_empty_batch_and_one(machine, B):
    check(machine, *make_inputs(UNEVEN, B, 64, "float32", AFFINE, machine.device), UNEVEN)


def test_free_strides(machine):
    D = 40
    t, dr, dh = make_inputs(UNEVEN, 2, D, "bfloat16", EVERYTHING, machine.device)
    t["x"] = torch.stack([t["x"], t["y"]], 2)[:, :, 0]  # a slice of a fused projection
    t["y"] = t["y"].transpose(0, 1).contiguous().transpose(0, 1)  # tokens first
    t["gate"], t["shift"], t["scale"] = torch.stack([t["gate"], t["shift"], t["scale"]], 2).unbind(2)
    dr = dr[:, :1].expand_as(dr)
    assert not any(u.is_contiguous() for u in (t["x"], t["y"], t["gate"], t["shift"], t["scale"], dr))
    check(machine, t, dr, dh, UNEVEN)


def test_nan_stays(machine):
    def results(t, dr, dh):
        index = UNEVEN.to(machine.device)
        r, h = machine.run(kernel_cuda.forward, *t.values(), index.row_of_token, EPS)
        names = ("gate", "scale", "gate_table", "scale_table", "weight")
        sums = index.segments, index.row_begin, index.row_segments, EPS
        grads = machine.run(kernel_cuda.backward, dr, dh, r, t["y"], *(t[n] for n in names), *sums)
        return dict(zip(("r", "h", "dx", "dy", "dgate", "dshift", "dscale"), (r, h, *grads), strict=False))

    t, dr, dh = make_inputs(UNEVEN, 2, 72, "float32", EVERYTHING, machine.device)
    expected = results(t, dr, dh)
    t["x"][0, 1, 3], t["y"][0, 1, 9], dr[0, 1, 4], t["gate"][0, 3, 2] = torch.nan, torch.inf, torch.nan, torch.nan
    token, frame = [1, *UNEVEN.row_of_token.eq(3).nonzero().flatten().tolist()], [3, int(UNEVEN.row_of_token[1])]
    for name, got in results(t, dr, dh).items():
        hit = frame if name in ("dgate", "dshift", "dscale") else token
        kept = [i for i in range(got.shape[1]) if i not in hit]
        assert torch.equal(got[0, kept], expected[name][0, kept]) and torch.equal(got[1], expected[name][1]), name
        assert name == "dshift" or not got[0].isfinite().all()


@pytest.mark.parametrize("row", [-1, 5, 2**31 - 1])
def test_a_row_outside_the_modulation_is_answered_with_nan(machine, row):
    t, _, _ = make_inputs(UNEVEN, 1, 64, "float32", EVERYTHING, machine.device)
    rows = UNEVEN.row_of_token.clone()
    rows[3] = row
    r, h = machine.run(kernel_cuda.forward, *t.values(), rows.to(machine.device), EPS)
    for out in (r[0], h[0]):
        assert out[3].isnan().all() and out[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_refusals_name_the_argument(machine):
    t, _, _ = make_inputs(UNEVEN, 2, 72, "bfloat16", EVERYTHING, machine.device)

    def refuses(message, index=UNEVEN, **change):
        with pytest.raises(ValueError, match=message):
            kernel_cuda.forward(*(t | change).values(), index.row_of_token.to(machine.device), EPS)

    B, S, D = t["x"].shape
    odd = torch.zeros(B * S * (D + 4) + 4, dtype=torch.bfloat16, device=machine.device)
    refuses(
        r"adaln_forward: x's row stride must be a multiple of 8 elements \(16 bytes\), got 76; pass a contiguous copy",
        x=odd[:-4].view(B, S, D + 4)[..., :D],
    )
    refuses(
        r"adaln_forward: y must be aligned to 16 bytes, got address \d+; pass a contiguous copy",
        y=odd[4:][: B * S * D].view(B, S, D),
    )
    refuses(r"x must have last-dim stride 1, got 2", x=t["x"].repeat_interleave(2, -1)[..., ::2])
    narrow, _, _ = make_inputs(UNEVEN, 2, 12, "float32", EVERYTHING, machine.device)
    refuses(r"adaln_forward: D must be a multiple of 8 from 8 to 8192, got 12; use impl='reference'", **narrow)
    wide, _, _ = make_inputs(UNEVEN, 1, 8200, "float32", (), machine.device)
    refuses(r"adaln_forward: D must be a multiple of 8 from 8 to 8192, got 8200; use impl='reference'", **wide)
    refuses(r"adaln_forward: dtype must be 'bfloat16', 'float16' or 'float32', got 'float64'", x=t["x"].double())
