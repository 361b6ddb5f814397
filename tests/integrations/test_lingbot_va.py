"""LingBot-VA: flex training, slot-pool inference over an episode with predictions, observations and eviction."""

import pytest
import torch

from tests.integrations.checks import CLOSE, check_patch
from tests.integrations.stand_ins import lingbot_va
from tests.integrations.stand_ins.lingbot_va import WanTransformer3DModel
from wam_kernels.integrations import Unsupported, patch, unpatch
from wam_kernels.integrations.lingbot_va import SlotMirror, stretches

ATTENTION = {f"WanAttention.{name}" for name in ("forward", "update_cache", "restore_cache", "clear_pred_cache")}
INFERENCE = ATTENTION | {"WanTransformerBlock.forward"}
TRAINING = INFERENCE | {"FlexAttnFunc.forward", "WanTransformer3DModel.forward_train"}


def model(attn_mode: str, **sizes) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(attn_mode=attn_mode, **sizes)


def step(samples: int = 2, chunk_size: int = 2, window: int = 3) -> dict:
    """A training step: 3 latent frames of 2 x 3 patches, 3 action frames of 2 slots."""
    g = torch.Generator().manual_seed(3)
    latent, action = (samples, 4, 3, 4, 6), (samples, 5, 3, 2, 1)
    return {
        "latent_dict": {name: torch.randn(latent, generator=g) for name in ("noisy_latents", "latent")}
        | {"text_emb": torch.randn(samples, 512, 6, generator=g)},
        "action_dict": {name: torch.randn(action, generator=g) for name in ("noisy_latents", "latent")},
        "chunk_size": chunk_size,
        "window_size": window,
    }


def mask_in_loops(samples: int, chunk_size: int, window: int, padding: int) -> torch.Tensor:
    tokens = [
        (sample, frame // chunk_size * 2 + action, clean)
        for action in (0, 1)
        for clean in (0, 1)
        for sample in range(samples)
        for frame in range(3)
        for _ in range(2 if action else 6)
    ]
    mask = torch.zeros(len(tokens) + padding, len(tokens) + padding, dtype=torch.bool)
    for i, (q_sample, q, q_clean) in enumerate(tokens):
        for j, (k_sample, k, k_clean) in enumerate(tokens):
            rule = (k <= q if q_clean else k < q) if k_clean else (not q_clean and k == q)
            mask[i, j] = rule and q_sample == k_sample and abs(q - k) <= window
    return mask


@pytest.fixture(autouse=True)
def nothing_left_from_another_test():
    """Models that a test has patched and dropped may not be collected yet, and until then the class serves them."""
    shared = vars(lingbot_va.FlexAttnFunc)["init_mask"].__func__
    lingbot_va.FlexAttnFunc.init_mask = getattr(shared, "own", staticmethod(shared))
    lingbot_va.FlexAttnFunc.attention_mask = lingbot_va.FlexAttnFunc.cross_attention_mask = None


@pytest.mark.parametrize("chunk_size, window", [(1, 2), (2, 3), (4, 64)])
def test_training(chunk_size, window):
    wan = model("flex")
    check_patch(wan, lambda: wan(step(2, chunk_size, window), train_mode=True), TRAINING)
    # what the original attended under is the rule in words
    own = lingbot_va.FlexAttnFunc.attention_mask
    assert torch.equal(own, mask_in_loops(2, chunk_size, window, own.shape[0] - 4 * 2 * 12))


def test_training_builds_no_dense_mask_and_gives_the_class_back():
    wan = model("flex")
    builder = vars(lingbot_va.FlexAttnFunc)["init_mask"]
    twin = model("flex")
    for m in (wan, twin):
        patch(m)
    wan(step(), train_mode=True)
    assert lingbot_va.FlexAttnFunc.attention_mask is None
    broken = step()
    del broken["latent_dict"]["text_emb"]
    with pytest.raises(KeyError):
        wan(broken, train_mode=True)
    # outside of a patched model's training step the class has its own builder
    model("flex")(step(), train_mode=True)
    assert lingbot_va.FlexAttnFunc.attention_mask is not None
    unpatch(wan)
    assert vars(lingbot_va.FlexAttnFunc)["init_mask"] is not builder
    unpatch(twin)
    assert vars(lingbot_va.FlexAttnFunc)["init_mask"] is builder


def test_two_models_side_by_side():
    # masks live on the class in the original; a patched model must not read another's
    patched, original = model("flex"), model("flex")
    expected = [original(step(window=w), train_mode=True)[0] for w in (3, 64)]
    patch(patched)
    for window, other, want in ((3, 64, expected[0]), (64, 3, expected[1])):
        original(step(window=other), train_mode=True)
        torch.testing.assert_close(patched(step(window=window), train_mode=True)[0], want, **CLOSE)


VIDEO, ACTION = 2 * 6, 2 * 2  # tokens of a chunk of two frames


@torch.no_grad()
def episode(wan: WanTransformer3DModel, chunks: int, batch: int = 1, unpatch_at: int | None = None) -> list:
    """Denoise, keep predictions, drop them for observations; a pool of two and a half chunks, so slots are evicted."""
    g = torch.Generator().manual_seed(4)
    wan.create_empty_cache("pos", 5 * (VIDEO + ACTION) // 2, batch_size=batch)
    out = []
    for chunk in range(chunks):
        if chunk == unpatch_at:
            unpatch(wan)
        for action in (False, True):
            shape = (batch, 5, 2, 2, 1) if action else (batch, 4, 2, 4, 6)
            d = {"position": chunk * 50, "timestep": 0.5, "text_emb": torch.randn(batch, 7, 6, generator=g)}
            for keep in (0, 0, 1):  # two steps that are taken out again, then the prediction stays
                d["noisy_latents"] = torch.randn(shape, generator=g)
                out.append(wan(d, update_cache=keep, action_mode=action))
        if chunk % 2 == 0:  # executed: predictions go, what was observed comes
            wan.clear_pred_cache("pos")
            d = {"position": chunk * 50, "timestep": 0.0, "text_emb": torch.randn(batch, 7, 6, generator=g)}
            d["noisy_latents"] = torch.randn((batch, 4, 2, 4, 6), generator=g)
            out.append(wan(d, update_cache=2))
        out.append([wan.blocks[-1].attn1.attn_caches["pos"][name].clone() for name in ("id", "mask", "is_pred")])
    return out


@pytest.mark.parametrize("batch", [1, 2])
def test_slot_pool_inference(batch):
    wan = model("torch")
    expected = episode(wan, 6, batch)
    ids, mask, _ = expected[-1]
    assert ids[mask].min() > 0, "nothing was evicted, so the test would not tell how"
    done = patch(wan)
    assert {f"{type(owner).__name__}.{name}" for owner, name in done.replaced} == INFERENCE
    compare_episodes(episode(wan, 6, batch), expected)
    unpatch(wan)
    for a, b in zip(episode(wan, 6, batch), expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else all(map(torch.equal, a, b))


def compare_episodes(got: list, expected: list) -> None:
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, **CLOSE)
        else:
            (ids, mask, is_pred), (ids_b, mask_b, is_pred_b) = a, b
            assert torch.equal(mask, mask_b)
            assert torch.equal(ids[mask], ids_b[mask]) and torch.equal(is_pred[mask], is_pred_b[mask])


def test_unpatch_between_two_chunks():
    wan = model("torch")
    expected = episode(wan, 5)
    patch(wan)
    compare_episodes(episode(wan, 5, unpatch_at=3), expected)


def test_patch_between_two_chunks():
    # the mirror of the slots starts from a pool that is in use
    wan = model("torch")
    expected = episode(wan, 3)
    d = {"position": 7, "timestep": 0.5, "text_emb": torch.randn(1, 7, 6), "noisy_latents": torch.randn(1, 4, 2, 4, 6)}
    with torch.no_grad():
        want = wan(d)
        patch(wan)
        torch.testing.assert_close(wan(d), want, **CLOSE)
    assert len(expected) > 0


def test_stretches():
    torch_slots = torch.tensor([0, 1, 2, 5, 6, 9]).numpy()
    assert stretches(torch_slots) == ((0, 3), (5, 7), (9, 10))
    assert stretches(torch_slots[:0]) == ()


def test_a_chunk_larger_than_the_pool():
    cache = {"k": torch.zeros(1, 4, 1, 8), "v": torch.zeros(1, 4, 1, 8), "id": torch.full((4,), -1)}
    cache |= {name: torch.zeros(4, dtype=torch.bool) for name in ("mask", "is_pred")}
    with pytest.raises(ValueError, match="must have 5 slots for the chunk, got 4 in all"):
        SlotMirror(cache).write(cache, torch.zeros(1, 5, 1, 8), torch.zeros(1, 5, 1, 8), False)


def test_refusals():
    with pytest.raises(Unsupported, match="LingBot-VA has heads of 20 channels"):
        patch(model("torch", head_dim=20))
    wan = model("flex", patch_size=(2, 2, 2))
    patch(wan)
    with pytest.raises(Unsupported, match="patch_size must be 1 frame"):
        wan(step(), train_mode=True)
    unpatch(wan)
    expected = wan(step(), train_mode=True)[0]
    patch(wan, on_unsupported="original")
    with pytest.warns(UserWarning, match="original code of LingBot-VA runs"):
        torch.testing.assert_close(wan(step(), train_mode=True)[0], expected, **CLOSE)
    wan = model("torch")
    patch(wan)
    wan.create_empty_cache("pos", 100)
    d = {"position": 7, "timestep": 0.5, "text_emb": torch.randn(1, 7, 6), "noisy_latents": torch.randn(1, 4, 2, 4, 6)}
    with pytest.raises(Unsupported, match="cached attention has no gradient"):
        wan(d)


def test_a_diffusers_model_of_the_same_name_is_not_taken_for_it():
    class WanTransformer3DModel(torch.nn.Module):
        blocks = (torch.nn.Linear(2, 2),)

    with pytest.raises(Unsupported, match="got WanTransformer3DModel"):
        patch(WanTransformer3DModel())
