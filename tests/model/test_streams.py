"""Models of other streams than two experts: one expert for all, three, or no actions; registers; numbers of OpenWAM."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

import wam_models.model
from wam_kernels import Geometry, compile_plan, dense_mask
from wam_kernels.masks import RULE_PROGRAMS
from wam_kernels.masks.context import with_context
from wam_models import RolloutConfig, RolloutEngine, WorldActionModel, golden_config
from wam_models.bridge import bridge_video
from wam_models.config import ModelConfig, Stream, wan_5b_config, wan_5b_small_action_config
from wam_models.objectives import OBJECTIVES, frames_before_chunks, geometry_for, sample_for, told_frames
from wam_models.train.samples import StepConfig
from wam_models.train.step import training_step
from wam_models.weights.layouts import LAYOUTS

from .cases import error

SMALL = replace(golden_config(), text_dim=8, freq_dim=16)
PARALLEL = replace(SMALL, topology="parallel_stream", action_hidden=64, action_ffn=128)
VIDEO_ONLY = replace(SMALL, topology="video_only")
UNDERSTANDING = Stream(name="understanding", width=24, ffn=32, features=10)
REGISTERS = Stream(name="registers", width=64, ffn=128, tokens=3, expert="video")
TRI_TOWER = replace(SMALL, context=(UNDERSTANDING,))
CONTEXT = replace(SMALL, context=(UNDERSTANDING, REGISTERS))
STATES = replace(SMALL, state_dim=5)
STATE_TOKENS = replace(STATES, state_tokens=True)
BRIDGED = replace(SMALL, bridge_dim=64, mode_token=True)
MODELS = {
    "parallel_stream": PARALLEL,
    "video_only": VIDEO_ONLY,
    "tri_tower": TRI_TOWER,
    "context": CONTEXT,
    "states": STATES,
    "state tokens": STATE_TOKENS,
    "state tokens beside context": replace(PARALLEL, context=(REGISTERS,), state_dim=5, state_tokens=True),
    "bridged": BRIDGED,
}
BEYOND = ("topology", "context", "state_dim", "state_tokens", "mode_token", "bridge_dim")  # what two experts do without
B, C, GRID, TOKENS = 2, 48, (2, 4), 2


def made(config: ModelConfig, dtype=torch.float64) -> WorldActionModel:
    """Random weights, heads and biases included."""
    torch.manual_seed(0)
    model = WorldActionModel(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj_out" in name or "proprio" in name or "bias" in name or "scale_shift_table" in name:
                p.normal_(std=0.3)
    return model


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(config: ModelConfig) -> dict[str, torch.Tensor]:
    return {stream.name: randn(B, 4, stream.features, seed=3) for stream in config.context if stream.features}


def context_tokens(config: ModelConfig) -> int:
    return sum(stream.tokens or 4 for stream in config.context)


# ---- one packed forward and the rollout, for every list of streams ----


@pytest.mark.parametrize(
    "program,cache", [("video_then_action", "persistent"), ("joint", "persistent"), ("joint", "recomputed")]
)
@pytest.mark.parametrize("name", MODELS)
def test_streaming_equals_one_packed_forward(name, program, cache):
    config, size, window, chunks = MODELS[name], 2, 8, 3
    model = made(config).requires_grad_(False)
    engine = RolloutEngine(model, RolloutConfig(program=program, chunk_size=size, window=window, steps=1, cache=cache))
    first, text = randn(B, C, 1, *GRID), randn(B, 3, 8, seed=1)
    frames = 1 + size * chunks
    states = randn(B, frames, config.state_dim, seed=4) if config.state_dim else None
    bridge = randn(B, 6, config.bridge_dim, seed=6) if config.bridge_dim else None
    modes = torch.zeros(B, dtype=torch.int64) if config.mode_token else None
    began = None if states is None else states[:, :1]
    episode = engine.start(first, text, context=features(config), state=began, bridge=bridge)
    noisy, clean = {"video": [first]}, {"video": [first]}
    if config.has_actions:
        noisy["action"], clean["action"] = [randn(B, 1, 2, 7, seed=5)], [randn(B, 1, 2, 7, seed=5)]
    for i in range(chunks):
        noise = {"video": randn(B, C, size, *GRID, seed=10 + i)}
        if config.has_actions:
            noise["action"] = randn(B, size, 2, 7, seed=20 + i)
        candidate = episode.propose(**{f"{stream}_noise": t for stream, t in noise.items()})
        if states is None:
            episode.accept(candidate)
        else:
            reached = states[:, 1 + i * size : 1 + (i + 1) * size]
            episode.observe(candidate.video, candidate.action, state=reached)
        for stream, t in noise.items():
            noisy[stream].append(t)
            clean[stream].append(getattr(candidate, stream))
    sample = sample_for(
        program, OBJECTIVES["joint"], frames=frames, video_tokens=TOKENS,
        action_tokens=2 * config.has_actions, chunk_size=size, window=window, context=context_tokens(config),
        state_tokens=config.state_tokens,
    )  # fmt: skip
    plan = compile_plan(sample)
    dim = {"video": 2, "action": 1}
    noisy, clean = ({stream: torch.cat(t, dim[stream]) for stream, t in of.items()} for of in (noisy, clean))
    level = torch.full((B, frames), 1000.0, dtype=torch.float64)
    actions = (noisy["action"], clean["action"], level) if config.has_actions else (None, None, None)
    told = None if states is None else states[:, told_frames(frames, size, config.state_tokens)]
    video_flow, action_flow = model(
        noisy["video"],
        clean["video"],
        *actions[:2],
        level,
        actions[2],
        text,
        plan,
        context=features(config),
        state=told,
        modes=modes,
        bridge=bridge,
    )
    moved = noisy["video"][:, :, 1:] - video_flow[:, :, 1:]
    torch.testing.assert_close(moved, clean["video"][:, :, 1:], rtol=1e-10, atol=1e-10)
    if config.has_actions:
        moved = noisy["action"][:, 1:] - action_flow[:, 1:]
        torch.testing.assert_close(moved, clean["action"][:, 1:], rtol=1e-10, atol=1e-10)
    else:
        assert action_flow is None and candidate.action is None


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_reaches_every_weight(name):
    config = MODELS[name]
    model, generator = made(config, torch.float32), torch.Generator().manual_seed(0)
    batch = {"video": randn(B, C, 5, *GRID), "text": randn(B, 3, 8, seed=1), **features(config)}
    if config.has_actions:
        batch["action"] = randn(B, 5, 2, 7, seed=2)
    if config.state_dim:
        batch["state"] = randn(B, 5, config.state_dim, seed=4)
    if config.bridge_dim:
        batch["bridge"] = randn(B, 6, config.bridge_dim, seed=6)
    batch = {k: v.float() for k, v in batch.items()}
    loss, metrics = training_step(model, batch, generator, StepConfig(mixture={"joint": 1}))
    loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # of a stream that has no flow, the last block computes keys and values alone; softmax ignores a key's bias
    last = f"packed_block_stack.packed_blocks.{config.layers - 1}.understanding_block"
    assert {n for n in idle if not n.startswith(last) and not n.endswith("to_k.bias")} == set()
    assert metrics["action_loss"].isfinite() == config.has_actions


@pytest.mark.parametrize("name", MODELS)
def test_a_config_survives_json(name):
    config = MODELS[name]
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert set(SMALL.to_dict()) == set(config.to_dict()) - set(BEYOND)


@pytest.mark.parametrize(
    "config,parameters", [(wan_5b_config, 2_563_098_644), (wan_5b_small_action_config, 503_254_484)]
)
def test_the_action_experts_of_openwam_s_recipes_have_their_sizes(config, parameters):
    with torch.device("meta"):
        model = WorldActionModel(replace(config(), action_dim=20, state_dim=8))
    of_actions = (p for n, p in model.named_parameters() if n.startswith("action_expert.") or ".action_block." in n)
    assert sum(p.numel() for p in of_actions) == parameters


def test_a_bridge_takes_the_video_after_a_block_at_a_noise_level():
    """They are the tokens of the packed forward's video; the actions depend on them, the video does not."""
    model, text = made(BRIDGED).requires_grad_(False), randn(B, 3, 8, seed=1)
    modes = torch.zeros(B, dtype=torch.int64)
    video, action, level = randn(B, C, 3, *GRID), randn(B, 3, 2, 7, seed=2), torch.full((B, 3), 700.0).double()
    features, kept = [model.video_features(video, level, text, layer=i, modes=modes) for i in (0, 1)], []
    hook = model.packed_block_stack.packed_blocks[0].register_forward_hook(lambda m, i, out: kept.append(out[0].x))
    apart = Geometry(  # one chunk, the video of which attends to no action
        program="video_noisy_to_action", video_frames=3, video_tokens=TOKENS, action_frames=3, action_tokens=2,
        chunk_size=3, window=2,
    )  # fmt: skip

    def run(bridge):
        return model(video, video, action, action, level, level, text, compile_plan(apart), modes=modes, bridge=bridge)

    flows = [run(f) for f in features]
    hook.remove()
    torch.testing.assert_close(kept[0][:, : 3 * TOKENS], features[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(flows[0][0], flows[1][0]) and error(flows[0][1], flows[1][1]) > 1e-4


def test_the_keys_of_a_bridge_are_computed_once_and_can_be_replaced():
    model = made(BRIDGED).requires_grad_(False)
    first, text, bridges = randn(B, C, 1, *GRID), randn(B, 3, 8, seed=1), [randn(B, 6, 64, seed=i) for i in (6, 7)]
    engine = RolloutEngine(model, RolloutConfig(program="joint", chunk_size=2, steps=3))
    episode, calls = engine.start(first, text, bridge=bridges[0]), []
    hook = model.action_expert.bridge_proj.register_forward_hook(lambda *a: calls.append(1))
    noise = {"video_noise": randn(B, C, 2, *GRID, seed=8), "action_noise": randn(B, 2, 2, 7, seed=9)}
    with_first = episode.propose(**noise)
    assert not calls
    episode.set_bridge(bridges[1])
    with_second = episode.propose(**noise)
    assert len(calls) == 2  # one for each rollout
    hook.remove()
    again = engine.start(first, text, bridge=bridges[1]).propose(**noise)
    assert torch.equal(with_second.action, again.action) and not torch.equal(with_first.action, again.action)


@pytest.mark.parametrize(
    "sigma,program,history,cache",
    [
        (1.0, "joint", "full", "recomputed"),
        (0.5, "video_then_action", "video_only", "persistent"),
        (0.5, "video_then_action", "video_queries_video_only", "recomputed"),
    ],
)
def test_a_bridge_of_the_model_s_own_equals_a_packed_forward(sigma, program, history, cache):
    """Of each chunk: one packed forward up to it, whose bridge is of its frame before and its own denoised video."""
    size, window, chunks = 2, 8, 3
    model = made(replace(SMALL, bridge_dim=64, bridge_layer=0, bridge_sigma=sigma)).requires_grad_(False)
    config = RolloutConfig(program=program, chunk_size=size, window=window, steps=1, cache=cache, history=history)
    first, text = randn(B, C, 1, *GRID), randn(B, 3, 8, seed=1)
    episode = RolloutEngine(model, config).start(first, text)
    noisy, clean = {"video": first, "action": randn(B, 1, 2, 7)}, {"video": first, "action": randn(B, 1, 2, 7)}
    for i in range(chunks):
        noise = {"video": randn(B, C, size, *GRID, seed=10 + i), "action": randn(B, size, 2, 7, seed=20 + i)}
        candidate = episode.propose(**{f"{stream}_noise": t for stream, t in noise.items()})
        last = clean["video"][:, :, -1:]
        for stream, dim in (("video", 2), ("action", 1)):
            noisy[stream] = torch.cat([noisy[stream], noise[stream]], dim)
            clean[stream] = torch.cat([clean[stream], getattr(candidate, stream)], dim)
        frames = clean["video"].shape[2]
        geometry = geometry_for(
            program, OBJECTIVES["joint"], frames=frames, video_tokens=TOKENS, action_tokens=2, chunk_size=size,
            window=window, history=history,
        )  # fmt: skip
        level = torch.full((B, frames), 1000.0, dtype=torch.float64)
        bridge = bridge_video(model.config, torch.cat([last, candidate.video], 2), torch.cat([last, noise["video"]], 2))
        flows = model(
            noisy["video"], clean["video"], noisy["action"], clean["action"], level, level, text,
            compile_plan(geometry), bridge=bridge,
        )  # fmt: skip
        for stream, flow, dim in (("video", flows[0], 2), ("action", flows[1], 1)):
            found, start = getattr(candidate, stream), frames - size
            moved = (noisy[stream] - flow).narrow(dim, start, size)
            torch.testing.assert_close(moved, found, rtol=1e-10, atol=1e-10)
        episode.accept(candidate)


def test_a_bridge_tells_no_video_its_future():
    """Through actions that it attends to: then earlier chunks carry no loss of video, and late bridges are refused."""
    model = made(replace(SMALL, bridge_dim=64, bridge_layer=0), torch.float32)
    batch = {"video": randn(B, C, 7, *GRID), "action": randn(B, 7, 2, 7, seed=2), "text": randn(B, 3, 8, seed=1)}
    batch = {k: v.float() for k, v in batch.items()}

    def learned(**settings):
        """Frames whose video, and whose actions, carry a loss."""
        flows, config = [], StepConfig(mixture={"joint": 1}, chunk_sizes=(2, 2), **settings)
        hook = model.register_forward_hook(lambda module, args, out: flows.extend(out))
        loss, _ = training_step(model, batch, torch.Generator().manual_seed(0), config)
        hook.remove()
        video, action = torch.autograd.grad(loss, flows)
        counts = video.transpose(1, 2).flatten(2).any(2)[0], action.flatten(2).any(2)[0]
        return [frames.nonzero().flatten().tolist() for frames in counts]

    assert learned(program="joint", history="video_only") == [[5, 6], [5, 6]]
    assert learned(program="decoupled_same_step", history="full") == [[5, 6], [5, 6]]
    assert learned(program="decoupled_same_step", history="video_only") == [[1, 2, 3, 4, 5, 6], [5, 6]]
    late = made(replace(SMALL, bridge_dim=64, bridge_layer=0, bridge_sigma=0.5), torch.float32)
    with pytest.raises(ValueError, match="must not let the video attend to actions .* got program 'joint'"):
        training_step(late, batch, torch.Generator(), StepConfig(program="joint", mixture={"joint": 1}))
    late = late.double().requires_grad_(False)
    engine = RolloutEngine(late, RolloutConfig(program="video_then_action", chunk_size=2, steps=1))
    with pytest.raises(ValueError, match="history must be video_only or .* for bridge_sigma=0.5"):
        engine.start(randn(B, C, 1, *GRID), randn(B, 3, 8))


def test_the_mode_token_says_which_objective_a_rollout_has():
    model = made(replace(SMALL, mode_token=True)).requires_grad_(False)
    engine = RolloutEngine(model, RolloutConfig(chunk_size=1, steps=1))
    given, seen = {"clean_video": randn(B, C, 1, *GRID, seed=8), "action_noise": randn(B, 1, 2, 7, seed=9)}, []
    encoder = model.core.generalist_mode_context_encoder
    hook = encoder.register_forward_hook(lambda module, args, out: seen.append(args[0].tolist()))
    episode = engine.start(randn(B, C, 1, *GRID), randn(B, 3, 8), objective="inverse_dynamics")
    before = episode.propose(**given).action
    assert seen == [[2], [2]]
    hook.remove()
    encoder.embedding.weight[2] += 1
    after = engine.start(randn(B, C, 1, *GRID), randn(B, 3, 8), objective="inverse_dynamics").propose(**given).action
    assert not torch.equal(before, after)


def test_the_frame_before_a_chunk_by_hand():
    assert frames_before_chunks(8, 3) == [0, 0, 0, 0, 3, 3, 3, 6]


def test_queries_read_out_are_aligned_to_what_they_will_know():
    """Learned queries attend to given features; actions attend to them; a cosine draws them towards embeddings."""
    queries = Stream(name="queries", width=24, ffn=32, tokens=3, expert="understanding", aligned=6)
    config = replace(SMALL, context=(UNDERSTANDING, queries))
    model = made(config, torch.float32)
    batch = {"video": randn(B, C, 5, *GRID), "action": randn(B, 5, 2, 7, seed=2), "text": randn(B, 3, 8, seed=1)}
    batch |= {"understanding": randn(B, 4, 10, seed=3), "queries_target": randn(B, 3, 6, seed=4)}
    batch = {k: v.float() for k, v in batch.items()}

    def stepped(weight, given=batch):
        settings = StepConfig(mixture={"joint": 1}, alignment_weight=weight)
        return training_step(model, given, torch.Generator().manual_seed(0), settings)

    found = []
    side = model.side("queries")
    hook = side.readout.register_forward_hook(lambda module, args, out: found.append(out))
    plain, _ = stepped(0.0)
    loss, metrics = stepped(2.0)
    hook.remove()
    cosine = torch.nn.functional.cosine_similarity(found[-1], batch["queries_target"], dim=-1).mean()
    torch.testing.assert_close(loss, plain + 2 * (1 - cosine))
    torch.testing.assert_close(metrics["alignment_loss"], 1 - cosine.detach())
    loss.backward()
    assert (
        side.readout.weight.grad.any()
        and side.tokens.grad.any()
        and model.side("understanding").embedder.weight.grad.any()
    )
    other, _ = stepped(2.0, batch | {"understanding": batch["understanding"].flip(1) + 1})
    assert other != loss
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss, metrics = stepped(1.0)
        loss.backward()
        optimizer.step()
    assert metrics["alignment_loss"] < 0.1 < 1 - cosine
    with pytest.raises(ValueError, match=r"batch lacks .'queries_target'."):
        stepped(1.0, {k: v for k, v in batch.items() if k != "queries_target"})
    with pytest.raises(ValueError, match=r"queries_target must be .2, 3, 6., got .2, 3, 5."):
        stepped(1.0, batch | {"queries_target": batch["queries_target"][..., :5]})


def test_features_can_be_replaced_while_an_episode_goes_on():
    model, size = made(CONTEXT).requires_grad_(False), 2
    engine = RolloutEngine(model, RolloutConfig(program="joint", chunk_size=size, steps=1, cache="recomputed"))
    first, text, noise = randn(B, C, 1, *GRID), randn(B, 3, 8, seed=1), []
    for i in range(2):
        noise.append(
            {"video_noise": randn(B, C, size, *GRID, seed=8 + i), "action_noise": randn(B, size, 2, 7, seed=i)}
        )
    episodes = [engine.start(first, text, context={"understanding": randn(B, 4, 10, seed=s)}) for s in (3, 4)]
    taken = episodes[1].propose(**noise[0])
    for episode in episodes:
        episode.observe(taken.video, taken.action)
    before = episodes[0].propose(**noise[1])
    episodes[0].set_context({"understanding": randn(B, 4, 10, seed=4)})
    after, whole = (episode.propose(**noise[1]) for episode in episodes)
    torch.testing.assert_close(after.action, whole.action, rtol=1e-10, atol=1e-10)
    assert error(before.action, whole.action) > 1e-4


def test_context_in_a_plan_is_the_mask_by_hand():
    geometry = Geometry(
        program="joint", video_frames=5, video_tokens=3, action_frames=5, action_tokens=2, chunk_size=2, window=4
    )
    mask = with_context(geometry, 4).dense_mask()
    n = geometry.length
    assert (mask[:n, :n] == dense_mask(geometry)).all() and mask[:, n:].all() and not mask[n:, :n].any()


def test_a_tri_tower_under_the_mask_of_motus():
    """One copy of each stream, all to all: equal to the three experts with a dense attention, and no token is idle."""
    model = made(TRI_TOWER)
    plan = compile_plan(RULE_PROGRAMS["tri_tower"](video=3 * TOKENS, actions=3 * 2, understanding=4))
    video, action = randn(B, C, 3, *GRID), randn(B, 3, 2, 7, seed=2)
    given = features(TRI_TOWER)["understanding"].requires_grad_()
    level = torch.full((B, 3), 500.0, dtype=torch.float64)
    inputs = video, None, action, None, level, level, randn(B, 3, 8, seed=1)
    flows = model(*inputs, plan, context={"understanding": given})
    lengths = []

    def densely(layer, q, k, v):
        lengths.append(q.shape[1])
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2)

    dense = model(*inputs, attend=densely, context={"understanding": given})
    for a, b in zip(flows, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert set(lengths) == {3 * TOKENS + 3 * 2 + 4}
    flows[1].square().sum().backward()
    assert given.grad.abs().sum(-1).all()


def test_the_model_fits_in_one_reading():
    folder = Path(wam_models.model.__file__).parent
    assert sum(len(path.read_text().splitlines()) for path in folder.glob("*.py")) < 1200


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match="expert of stream a must be its own or one of .*'video', 'action'.* 'none'"):
        replace(SMALL, context=(Stream(name="a", width=4, ffn=4, tokens=1, expert="none"),))
    with pytest.raises(ValueError, match="stream registers must have the width and ffn of the expert video, .64, 128."):
        replace(SMALL, context=(replace(REGISTERS, width=32),))
    with pytest.raises(ValueError, match="'understanding' twice"):
        replace(SMALL, context=(UNDERSTANDING, UNDERSTANDING))
    with pytest.raises(ValueError, match="action must have the width and ffn of the expert video"):
        replace(SMALL, topology="parallel_stream")
    with pytest.raises(ValueError, match="either features or tokens"):
        Stream(name="a", width=4, ffn=4)
    engine = RolloutEngine(made(CONTEXT).requires_grad_(False), RolloutConfig(chunk_size=2, steps=1))
    first, text = randn(B, C, 1, *GRID), randn(B, 3, 8)
    with pytest.raises(ValueError, match=r"context\['understanding'\] must be a tensor, got None"):
        engine.start(first, text)
    with pytest.raises(ValueError, match="context must hold streams of .* got .'other'."):
        engine.start(first, text, context={"other": first})
    for config, state, message in (
        (STATES, None, r"state must be \[B, frames, 5\], got None"),
        (STATES, randn(B, 1, 4), r"state must have shape \[2, 1, 5\]"),
        (SMALL, randn(B, 1, 5), "state must be None for a model without state_dim"),
    ):
        engine = RolloutEngine(made(config).requires_grad_(False), RolloutConfig(chunk_size=2, steps=1))
        with pytest.raises(ValueError, match=message):
            engine.start(first, text, state=state)
    engine = RolloutEngine(made(VIDEO_ONLY).requires_grad_(False), RolloutConfig(chunk_size=2, steps=1))
    with pytest.raises(ValueError, match="objective"):
        engine.start(first, text, objective="inverse_dynamics")
    with pytest.raises(ValueError, match="actions of a model that has none"):
        engine.start(first, text).propose(want="action", generator=torch.Generator())


# ---- against OpenWAM: one expert for all, and states in both topologies ----


def openwam_pair(topology: str, program: str, states: bool):
    """A pipeline with weights whose attention and heads matter, our model with the same; theirs by our names."""
    openwam_models = pytest.importorskip("bench.workloads.openwam_models", reason="openwam is in requirements/test.txt")
    policy = {"sequence_contract": openwam_models.PREFIX} if states else None
    pipeline = openwam_models.build(topology, program, policy=policy)
    parallel, generator = topology == "parallel_stream", torch.Generator().manual_seed(3)
    ours = WorldActionModel(
        ModelConfig(
            hidden=32, heads=4, head_dim=8, layers=2, ffn=64, action_hidden=32 if parallel else 16,
            action_ffn=64 if parallel else 32, action_dim=openwam_models.ACTION_DIM, actions_per_frame=2,
            topology=topology, state_dim=openwam_models.STATE_DIM * states,
        )
    )  # fmt: skip
    layout, own = LAYOUTS["openwam_parallel" if parallel else "openwam"], ours.state_dict()
    theirs = {layout.ours(name): p for name, p in pipeline.named_parameters() if layout.ours(name) in own}
    with torch.no_grad():
        for p in theirs.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    ours.load_state_dict(dict(theirs))
    return openwam_models, pipeline, ours, theirs


def without_prefix_actions(geometry: Geometry):
    """Attention of a packed sequence in which our model has actions of the external frame too: left out of it."""
    frames, prefix, mask = geometry.video_frames, geometry.prefix_frames, torch.as_tensor(dense_mask(geometry))

    def attend(layer, q, k, v):
        places = torch.arange(q.shape[1])
        for segment in (0, 1):
            begin = 2 * frames * 4 + segment * (frames - prefix) * 2
            places = torch.cat([places[:begin], places[begin + 2 * prefix :]])
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t[:, places].transpose(1, 2) for t in (q, k, v)), attn_mask=mask
        )
        return torch.zeros_like(q).index_copy(1, places, out.transpose(1, 2))

    return attend


@pytest.mark.parametrize("program,states", [("video_then_action", False), ("joint", True)])
def test_forward_and_gradients_are_those_of_openwam(program, states, monkeypatch):
    """With states: behind an external frame, which has no actions; ours of it are attended to by nothing."""
    openwam_models, pipeline, ours, weights = openwam_pair("parallel_stream", program, states)
    core, steps, generator = pipeline.visual_tower.core, [], torch.Generator().manual_seed(1)
    execute = core.execute_runtime_step
    monkeypatch.setattr(core, "execute_runtime_step", lambda step: steps.append((step, execute(step))) or steps[-1][1])
    metadata, extra = ({"sampled_chunk_size": 2, "sampled_window_size": 4, "history_frames": 1},), {}
    if states:
        extra["condition_latents"] = torch.randn(1, 48, 6, 4, 4, generator=generator)
        extra["proprio_context_frames"] = torch.randn(1, 6, openwam_models.STATE_DIM, generator=generator)
    openwam_models.train_step(pipeline, metadata=metadata, extra=extra)
    payload, theirs = steps[0][0].payload, steps[0][1].projected_outputs
    video, action = payload["latent_dict"], payload["action_dict"]
    frames, prefix = video["noisy_latents"].shape[2], int(states)
    geometry = Geometry(
        program=program, video_frames=frames, video_tokens=4, action_frames=frames - prefix, action_tokens=2,
        chunk_size=payload["chunk_size"], window=payload["window_size"], prefix_frames=prefix,
        history=str(getattr(payload["history_stream_visibility"], "value", payload["history_stream_visibility"])),
        chunk_origin=payload.get("chunk_origin_frame") or 0,
    )  # fmt: skip
    attend = without_prefix_actions(geometry)
    by_frame = [action[name].detach().permute(0, 2, 3, 1, 4).flatten(3) for name in ("noisy_latents", "latent")]
    by_frame = [torch.nn.functional.pad(t, (0, 0, 0, 0, prefix, 0)) for t in by_frame]
    told = payload["per_chunk_proprio_state"][:, frames_before_chunks(frames, 2)] if states else None
    flows = ours(
        video["noisy_latents"].detach(), video["latent"].detach(), *by_frame, video["timesteps"].float(),
        torch.nn.functional.pad(action["timesteps"].float(), (prefix, 0)), video["text_emb"].detach(),
        attend=attend, clean_video_timesteps=video["cond_timesteps"].float(), state=told,
    )  # fmt: skip
    flows = flows[0], flows[1][:, prefix:]
    rows = theirs["video_prediction"].unflatten(1, (frames, 2, 2, 2, 2))  # of tokens, of the pixels of one
    their_video = rows.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    assert error(flows[0].detach(), their_video.detach()) < 1e-5
    assert error(flows[1].detach().flatten(1, 2), theirs["action_prediction"].detach()) < 1e-5
    pipeline.zero_grad()
    again = execute(replace(steps[0][0], payload=tree_map_only(torch.Tensor, torch.detach, payload))).projected_outputs
    (again["video_prediction"].square().mean() + again["action_prediction"].square().mean()).backward()
    (flows[0].square().mean() + flows[1].square().mean()).backward()
    largest = max(float(p.grad.abs().max()) for p in weights.values())
    for name, p in ours.named_parameters():
        wanted = weights[name].grad
        torch.testing.assert_close(p.grad, wanted, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("program", ["joint", "video_then_action"])
def test_gradients_of_two_experts_with_states_are_those_of_openwam(program, monkeypatch):
    """Behind an external frame, as in its LIBERO recipes: the state reaches the action expert by its own linear map."""
    openwam_models, pipeline, ours, weights = openwam_pair("dual_expert", program, True)
    packed_training = pytest.importorskip("open_wam.models.policy_variants.dual_expert.packed_training")
    variant, seen, named = pipeline.policy_variant, {}, list(weights.values())
    expert, denoise = variant.action_expert, "forward_dual_expert_packed_coupling_denoise"
    pre, post, run = expert.pre_dit, expert.post_dit, getattr(packed_training, denoise)
    tell = type(variant.conditioning).action_hidden_context_for_tokens

    def forward(**given):
        flow, hidden = run(**given)
        seen.update(given, video_flow=flow)
        return flow, hidden

    def finish(*given):
        flow = post(*given)
        noisy = flow.chunk(2, 1)[0]
        loss = seen["video_flow"].square().mean() + noisy.square().mean()
        seen.update(action_flow=noisy.detach(), gradients=torch.autograd.grad(loss, named, retain_graph=True))
        return flow

    def told(conditioning, tower, state, **given):
        seen["state"] = state
        return tell(conditioning, tower, state, **given)

    monkeypatch.setattr(packed_training, denoise, forward)
    monkeypatch.setattr(expert, "pre_dit", lambda **given: seen.update(actions=given) or pre(**given))
    monkeypatch.setattr(expert, "post_dit", finish)
    monkeypatch.setattr(type(variant.conditioning), "action_hidden_context_for_tokens", told)
    generator = torch.Generator().manual_seed(1)
    extra = {"condition_latents": torch.randn(1, 48, 6, 4, 4, generator=generator)}
    extra["proprio_context_frames"] = torch.randn(1, 6, openwam_models.STATE_DIM, generator=generator)
    metadata = ({"sampled_chunk_size": 2, "sampled_window_size": 4, "history_frames": 1},)
    openwam_models.train_step(pipeline, metadata=metadata, extra=extra)
    frames, pad = seen["noisy_video_latents"].shape[2], torch.nn.functional.pad
    geometry = Geometry(
        program=program, video_frames=frames, video_tokens=4, action_frames=frames - 1, action_tokens=2, chunk_size=2,
        window=4, prefix_frames=1, history=variant.config.history_stream_visibility, chunk_origin=0,
    )  # fmt: skip
    of_frames = [t.detach().unflatten(1, (-1, 2)) for t in seen["actions"]["action_tokens"].chunk(2, 1)]
    level = seen["actions"]["timestep"].chunk(2, 1)[0].unflatten(1, (-1, 2))[..., 0]
    # rope is relative: our frames begin at 0, the package's at -1
    flows = ours(
        seen["noisy_video_latents"].detach(), seen["clean_video_latents"].detach(),
        *(pad(t, (0, 0, 0, 0, 1, 0)) for t in of_frames), seen["noisy_video_timesteps"].float(),
        pad(level.float(), (1, 0)), seen["text_context"].detach(), attend=without_prefix_actions(geometry),
        clean_video_timesteps=seen["clean_video_timesteps"].float(), state=pad(seen["state"], (0, 0, 1, 0)),
    )  # fmt: skip
    flows = flows[0], flows[1][:, 1:]
    assert error(flows[0].detach(), seen["video_flow"].detach()) < 1e-5
    assert error(flows[1].detach().flatten(1, 2), seen["action_flow"]) < 1e-5
    (flows[0].square().mean() + flows[1].square().mean()).backward()
    wanted = dict(zip(weights, seen["gradients"], strict=True))
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")
    assert wanted["action_expert.hidden_context_proj.weight"].any()


@pytest.mark.parametrize(
    "topology,program,states",
    [
        ("parallel_stream", "action_then_video", False),
        ("parallel_stream", "joint", True),
        ("dual_expert", "joint", True),
        ("dual_expert", "decoupled_same_step", True),
    ],
)
def test_rollouts_are_those_of_openwam(topology, program, states):
    openwam_models, pipeline, ours, _ = openwam_pair(topology, program, states)
    generator = torch.Generator().manual_seed(7)
    noise = [
        (torch.randn(1, 48, 2, 4, 4, generator=generator), torch.randn(1, 2 * 2, 4, generator=generator))
        for _ in range(3)
    ]

    told = torch.randn(1, 3, openwam_models.STATE_DIM, generator=generator)

    def given(i):
        return {"initial_video_noise": noise[i][0], "initial_action_noise": noise[i][1]}

    theirs = openwam_models.rollout(pipeline, 3, context=given, states=told if states else None)
    generator = torch.Generator().manual_seed(0)  # as the rollout draws them
    text = torch.randn(1, 5, openwam_models.TEXT_DIM, generator=generator)
    frame = torch.randn(1, 48, 1, 4, 4, generator=generator)
    engine = RolloutEngine(
        ours.eval().requires_grad_(False),
        RolloutConfig(program=program, chunk_size=2, window=8, steps=3, cache="recomputed", history="video_only"),
    )
    episode = engine.start(frame, text, state=told[:, :1] if states else None)
    for i in range(3):
        candidate = episode.propose(video_noise=noise[i][0], action_noise=noise[i][1].unflatten(1, (2, 2)))
        assert error(candidate.action.flatten(1, 2), theirs[3 * i]) < 1e-5
        assert error(candidate.video, theirs[3 * i + 1][:, :, -2:]) < 1e-5
        if states and i < 2:
            # the package's parallel_stream keeps, as that of a chunk's frames, the state that the chunk was told
            reached = told[:, i : i + 1] if topology == "parallel_stream" else told[:, i + 1 : i + 2]
            episode.observe(candidate.video, candidate.action, state=reached.expand(1, 2, -1))
        elif not states:
            episode.accept(candidate)
