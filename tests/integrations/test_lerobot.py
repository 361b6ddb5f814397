"""lerobot's Fast-WAM: training, prefill and cached steps, its policy. `make test-lerobot` has the real ones."""

import copy
from contextlib import nullcontext

import pytest
import torch

from tests.integrations import test_fast_wam as fast_wam
from tests.integrations.checks import CLOSE, check_patch, numbers
from tests.integrations.stand_ins.lerobot import Expert, FastWAMPolicy, MoT
from tests.integrations.test_fast_wam import ACTIONS, FRAMES, HEADS, TOKENS, VIDEO, D, mask
from wam_kernels.integrations import Unsupported, accelerate, lerobot, patch, unpatch

REPLACED = {
    "MoTLayer._mixed_attention", "MoTLayer._build_expert_attention_io", "MoTLayer._apply_expert_post_block",
}  # fmt: skip
GRID = (FRAMES, 1, TOKENS)


def model(**options) -> MoT:
    torch.manual_seed(0)
    checkpointed = options.pop("mot_checkpoint_mixed_attn", False)
    sizes = {"num_layers": 2, "head_dim": D, "num_heads": HEADS} | options
    return MoT({"video": Expert(24, 40, **sizes), "action": Expert(16, 20, **sizes)}, checkpointed).train()


def batch(program: str = "fast_wam_uncond") -> dict:
    """Fast-WAM's inputs; the rope of the video is the sizes of each sample's grid, and frequencies of one axis."""
    data = fast_wam.inputs(VIDEO)
    angle = torch.arange(16)[:, None] / 100 ** (torch.arange(D // 2) / D)
    grids = torch.tensor([GRID] * len(data["video"]["x"]))
    data["video"]["freqs"] = {"grid_sizes": grids, "freqs": torch.polar(torch.ones_like(angle), angle)}
    by = {field: {name: one[field] for name, one in data.items()} for field in data["video"]}
    return by | {"mask": mask(program)}


def train(mot: MoT, program: str = "fast_wam_uncond"):
    b = batch(program)
    return mot(b["x"], b["mask"], b["freqs"], b["context"], b["t_mod"])


def cached_actions(mot: MoT, program: str = "fast_wam_uncond"):
    one = batch(program)
    video, action = ([one[f][name] for f in ("x", "freqs", "t_mod", "context")] for name in ("video", "action"))
    m = one["mask"]
    return mot.forward_action_with_video_cache(*action, mot.prefill_video_cache(*video, m[:VIDEO, :VIDEO]), m, VIDEO)


@pytest.mark.parametrize("program", ["fast_wam_uncond", "fast_wam_joint"])
@pytest.mark.parametrize("call", [train, cached_actions])
def test_numbers(program, call):
    mot = model()
    check_patch(mot, lambda: call(mot, program), REPLACED)


def test_checkpointing():
    mot = model(mot_checkpoint_mixed_attn=True)
    for expert in mot.mixtures.values():
        expert.use_gradient_checkpointing = True
    check_patch(mot, lambda: train(mot), REPLACED)


@pytest.mark.parametrize("fp32_attention", [True, False])
def test_bfloat16(fp32_attention, monkeypatch):
    """Attention is in the dtype that the model says, and no further from float32 than the original."""
    mot = model(fp32_attention=fp32_attention)
    exact = numbers(train(mot))
    mot.bfloat16()
    b = batch()
    cast = {f: {n: t.bfloat16() for n, t in b[f].items()} for f in ("x", "t_mod")}
    context = {n: {"context": c["context"].bfloat16(), "mask": c["mask"]} for n, c in b["context"].items()}
    call = lambda: numbers(mot(cast["x"], b["mask"], b["freqs"], context, cast["t_mod"]))  # noqa: E731
    error = lambda out: sum(float((a - b).detach().square().mean()) for a, b in zip(out, exact, strict=True))  # noqa: E731
    before, dtypes, attend = error(call()), [], lerobot.attend_under_mask
    monkeypatch.setattr(lerobot, "attend_under_mask", lambda s, q, *a: dtypes.append(q.dtype) or attend(s, q, *a))
    patch(mot)
    out = call()
    assert set(dtypes) == {torch.float32 if fp32_attention else torch.bfloat16}
    assert error(out) < 1.1 * before and out[0].dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [[(3, 1, 5)] * 2, [(2, 3, 2), (1, 2, 4)]])
def test_the_table_of_a_grid(sizes):
    """By loops: a token's frame, row and column each turn their channels; tokens beyond the grid stay."""
    third, tokens = D // 2 // 3, 15
    freqs = torch.polar(torch.ones(16, D // 2), torch.rand(16, D // 2))
    table = torch.view_as_complex(lerobot.grid_table(torch.tensor(sizes), freqs, tokens))
    first = D // 2 - 2 * third
    for b, (frames, rows, columns) in enumerate(sizes):
        cells = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]
        for s, (f, r, c) in enumerate(cells):
            row = [freqs[f, :first], freqs[r, first : first + third], freqs[c, first + third :]]
            assert torch.equal(table[b, s], torch.cat(row))
        assert torch.equal(table[b, len(cells) :], torch.ones(tokens - len(cells), D // 2, dtype=table.dtype))


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_policy_that_its_scripts_hold(mode):
    policy = FastWAMPolicy(model())
    original = copy.deepcopy(policy)
    with mode():
        expected = [original.select_action(batch()) for _ in range(ACTIONS + 1)]
    loss = original.train()(batch())[0]
    done = accelerate(policy)
    with mode():
        got = [policy.select_action(batch()) for _ in range(ACTIONS + 1)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    torch.testing.assert_close(policy.train()(batch())[0], loss, **CLOSE)  # behind actions in any mode
    assert done.system == lerobot.SYSTEM and all(done.calls.values())
    assert "replaced model.mot.layers.*._mixed_attention, 2x" in done.explain()
    unpatch(policy)
    assert torch.equal(policy(batch())[0], loss)


def test_a_block_that_is_not_as_known_keeps_its_glue():
    mot = model()
    mot.layers[1].blocks["action"].norm2 = torch.nn.RMSNorm(16)
    expected, done = numbers(train(mot)), patch(mot)
    for a, b in zip(numbers(train(mot)), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert done.calls["MoTLayer._apply_expert_post_block"] == 2 and all(done.calls.values())
    assert "norms: its norm is RMSNorm((16,), eps=None, elementwise_affine=True), not a LayerNorm" in done.explain()


def test_a_table_is_made_once_for_a_step(monkeypatch):
    made, make = [], lerobot.grid_table
    monkeypatch.setattr(lerobot, "grid_table", lambda *args: made.append(1) or make(*args))
    mot = model()
    patch(mot)
    train(mot)
    assert len(made) == 1


def test_refusals():
    mot = model()
    mot.layers[1].blocks.pop("action")
    with pytest.raises(Unsupported, match="lerobot Fast-WAM's MoTLayer must have .* but has no action"):
        patch(mot)
    mot = model()
    block = mot.layers[1].blocks["video"]
    block.__class__ = type("Mine", (type(block),), {"project_self_attention": lambda self, x, freqs: x})
    with pytest.raises(Unsupported, match="FastWAMAttentionBlock must be as .* but Mine overrides project_self_att"):
        patch(mot)
    with pytest.raises(Unsupported, match="lerobot Fast-WAM has heads of 12 channels"):
        patch(model(head_dim=12))
