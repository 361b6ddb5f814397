"""The OpenWAM integration against the real package (PyPI ``openwam``): same numbers with and without it."""

import copy
import json
import re
import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("open_wam", reason="openwam is in requirements/test.txt")

from open_wam.contracts.sample_metadata import ConditionalDynamicsSequenceLayout
from open_wam.models.common.denoising_cache import DenoisingCache, attention_dependency_closure
from open_wam.models.common.dynamics_contracts import DynamicsRolloutRequest
from open_wam.models.policy_variants import PolicyInferContext, PolicyInferenceOutputRequest

from bench.workloads import openwam_models as cases
from bench.workloads.openwam_models import (
    ARCHITECTURES,
    GJD,
    OBJECTIVES,
    PREFIX,
    PROGRAMS,
    build,
    rollout,
    train_step,
)  # fmt: skip
from wam_kernels import Geometry, block_attention, compile_plan, dense_mask
from wam_kernels.integrations import Unsupported, accelerate, openwam, patch, unpatch
from wam_kernels.integrations.openwam import visibility as visibility_module

TOLERANCE = 1e-4


@contextmanager
def installed(on_unsupported: str = "error", **options):
    done = openwam.install(on_unsupported, **options)
    try:
        yield done
    finally:
        openwam.uninstall()


@pytest.fixture
def attention_calls(monkeypatch):
    """How often the ops were called: an agreement of the original with itself proves nothing."""
    calls = {"block_attention": 0, "cached_attention": 0}

    def counted(name):
        original = getattr(visibility_module, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(visibility_module, name, call)

    for name in calls:
        counted(name)
    return calls


def assert_agree(ours, theirs, tolerance=TOLERANCE):
    if isinstance(ours, list):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def step_both(pipeline, **options):
    theirs = train_step(pipeline, **options)
    with installed():
        ours = train_step(pipeline, **options)
    assert_agree(ours, theirs)
    return ours


def roll_both(make, *args, **options):
    theirs = rollout(make(), *args, **options)
    with installed():
        ours = rollout(make(), *args, **options)
    assert_agree(ours, theirs)
    return ours


# ---- training ----


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_agrees_for_every_program(architecture, program, attention_calls):
    results = step_both(build(architecture, program))
    assert attention_calls["block_attention"] == 2  # once for each layer
    assert all(results[name].abs().max() > 0 for name in ("video", "actions"))


def objective_metadata(objective, frames):
    """What the package's dynamics-routing data set says about a sample."""
    metadata = {"generalist_training_mode_override": objective, "generalist_training_source": "real_demo"}
    if objective != "joint":
        metadata |= ConditionalDynamicsSequenceLayout().to_metadata(observed_num_frames=frames)
        metadata |= {"sampled_chunk_size": 2, "sampled_window_size": 8}
    return metadata


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_agrees_for_every_objective_of_gjd(architecture, objective):
    step_both(build(architecture, GJD), metadata=(objective_metadata(objective, 6),))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_agrees_with_a_prefix_and_proprioception(architecture):
    generator = torch.Generator().manual_seed(1)
    extra = {
        "condition_latents": torch.randn(1, cases.CHANNELS, 6, 4, 4, generator=generator),
        "proprio_context_frames": torch.randn(1, 6, cases.STATE_DIM, generator=generator),
    }
    for program in ("joint", "action_then_video"):
        step_both(build(architecture, program, policy={"sequence_contract": PREFIX}), extra=extra)


TEXT_PROPRIO = {"proprio_context_mode": "text_context_token"}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_agrees_with_proprioception_in_the_text(architecture, batch, attention_calls):
    """A token of the text for every chunk, which that chunk alone attends to."""
    states = torch.randn(batch, 3, cases.STATE_DIM, generator=torch.Generator().manual_seed(1))
    pipeline = build(architecture, "joint", policy=TEXT_PROPRIO)
    results = step_both(pipeline, batch=batch, extra={"proprio_context_state": states})
    assert attention_calls["block_attention"] == 2
    encoders = [value for name, value in results.items() if "proprio_context_encoder" in name]
    assert encoders and all(value.any() for value in encoders), "the states must be read"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_agrees_with_proprioception_in_the_text(architecture, attention_calls):
    roll_both(lambda: build(architecture, "joint", policy=TEXT_PROPRIO), 3)
    assert attention_calls["cached_attention"] > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_video_batches_agree(checkpointed, attention_calls):
    """Videos alone, of different lengths, one after another in one sequence."""
    pipeline = build("parallel_stream", "joint")
    generator = torch.Generator().manual_seed(6)
    latents, text = (
        torch.randn(s, generator=generator) for s in ((3, cases.CHANNELS, 5, 4, 4), (3, 6, cases.TEXT_DIM))
    )
    times = torch.linspace(100, 900, 15).view(3, 5)

    def run(lengths=(5, 2, 3)):
        pipeline.zero_grad(set_to_none=True)
        video = latents.clone().requires_grad_()
        flow = pipeline.visual_tower.predict_video_flow(
            noisy_latents=video, timesteps=times, text_context=text, sequence_lengths=lengths,
            use_activation_checkpointing=checkpointed,
        )  # fmt: skip
        flow.square().sum().backward()
        grads = {name: p.grad for name, p in pipeline.named_parameters() if p.grad is not None}
        return {"flow": flow.detach(), "video": video.grad} | grads

    theirs = run()
    with installed() as done:
        assert_agree(run(), theirs)
        with torch.inference_mode():
            alone = pipeline.visual_tower.predict_video_flow(
                noisy_latents=latents[:1], timesteps=times[:1], text_context=text[:1], sequence_lengths=(5,)
            )
    assert_agree([alone], [theirs["flow"][:1]])
    calls = 2 * (1 + checkpointed) + 2  # layers, those that run again in the backward, those of one sample alone
    assert done.policy.left == {} and attention_calls["block_attention"] == calls


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_agrees_with_actions_that_are_no_keys(architecture):
    startup, holes = torch.ones(1, 12, cases.ACTION_DIM), torch.ones(1, 12, cases.ACTION_DIM)
    startup[:, :2] = 0
    holes[:, 5] = holes[:, 9:11] = 0
    step_both(build(architecture, "joint"), action_mask=startup)
    policy = {"history_stream_visibility": "full"}
    step_both(build(architecture, "video_then_action", policy=policy), action_mask=holes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_agrees_for_a_batch(architecture):
    policy = {"history_stream_visibility": "video_queries_video_only"}
    step_both(build(architecture, "action_noisy_to_video", policy=policy), batch=2)


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_training_agrees_for_samples_of_different_lengths(mode, attention_calls):
    lengths = (6, 4, 5)
    actions = tuple(2 * n for n in lengths)
    extra = {
        "batching_mode": mode,
        "sequence_lengths": lengths,
        "tensor_lengths": {"video_latents": lengths, "actions": actions, "state": (1, 1, 1), "text_context": (5, 4, 5)},
    }
    metadata = [{"sampled_chunk_size": n, "sampled_window_size": 8, "history_frames": 2} for n in (1, 2, 3)]
    step_both(build("dual_expert", "joint"), batch=3, extra=extra, metadata=tuple(metadata))
    assert attention_calls["block_attention"] == 2  # all samples in one call


@pytest.mark.parametrize("heads", [4, 8])
def test_training_agrees_for_texts_with_proprioception_of_different_lengths(heads, attention_calls):
    """Each sample has a text mask of its own; heads of 6 channels are left to the package, under dense masks."""
    lengths = (6, 4)
    states = torch.randn(2, 3, cases.STATE_DIM, generator=torch.Generator().manual_seed(1))
    extra = {
        "batching_mode": "padded", "sequence_lengths": lengths, "proprio_context_state": states,
        "tensor_lengths": {
            "video_latents": lengths, "actions": (12, 8), "state": (1, 1), "text_context": (5, 4),
            "proprio_context_state": (3, 2),
        },
    }  # fmt: skip
    metadata = ({"sampled_chunk_size": 2, "sampled_window_size": 8, "history_frames": 2},) * 2
    pipeline = build("dual_expert", "joint", hidden=heads * 8 if heads == 4 else 48, heads=heads, policy=TEXT_PROPRIO)
    run = lambda p: train_step(p, batch=2, extra=extra, metadata=metadata)  # noqa: E731
    if heads == 8:
        assert_refused_or_original(pipeline, "8 heads of 6", run)
        return
    theirs = run(pipeline)
    with installed() as done:
        assert_agree(run(pipeline), theirs)
    assert attention_calls["block_attention"] == 2 and done.policy.left == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_errs_no_more_than_the_package(architecture):
    """Against float32: the gradients' errors, in the mean and the worst, are at most 1.5 times the package's own."""
    pipeline = build(architecture, "joint", hidden=64, action_hidden=32, heads=2, ffn=128)
    truth = train_step(pipeline)
    theirs = train_step(pipeline, mixed=True)
    with installed():
        ours = train_step(pipeline, mixed=True)

    def error(results):
        worse = {n: float((results[n].float() - truth[n]).norm() / truth[n].norm()) for n in truth if truth[n].any()}
        return np.mean(list(worse.values())), np.max(list(worse.values()))

    for got, own in zip(error(ours), error(theirs), strict=True):
        assert got <= 1.5 * own
    assert abs(float(ours["loss"] - truth["loss"])) <= 2 * abs(float(theirs["loss"] - truth["loss"])) + 1e-2


def test_checkpointed_activations_agree():
    pipeline = build("dual_expert", "joint", policy={"use_activation_checkpointing": True})
    step_both(pipeline)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sharded_training_agrees(architecture, process_group):
    """FSDP2 as the package applies it: to blocks, to their attentions, to the whole."""
    from open_wam.training.strategies import _apply_composable_fsdp_sharding
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    class Sharded:
        """FSDP hooks ``forward``, which goes the way that train_step calls directly."""

        def __init__(self):
            mesh = init_device_mesh("cpu", (1,))
            pipeline = build(architecture, "joint")
            self.pipeline = _apply_composable_fsdp_sharding(pipeline, mesh=mesh, mp_policy=MixedPrecisionPolicy())

        def __getattr__(self, name):
            return getattr(self.pipeline, name)

        def forward_train_from_latents(self, video, batch, text_context):
            return self.pipeline(batch=batch, video_latents=video, text_context=text_context)

    def run():
        return {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in train_step(Sharded()).items()}

    theirs = run()
    with installed():
        assert_agree(run(), theirs)


# ---- rollout ----


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_agrees_for_every_program(architecture, program, attention_calls):
    # window 4 is two chunks, so the history is cut from the third chunk on
    roll_both(lambda: build(architecture, program, window=4), 4)
    assert attention_calls["cached_attention"] > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_agrees_for_every_objective_of_gjd(architecture, objective):
    def context(i):
        generator = torch.Generator().manual_seed(i)
        given = {}
        if objective == "action_conditioned_video":
            given["clean_action"] = torch.randn(1, 2, cases.ACTION_DIM, generator=generator)
        if objective == "video_conditioned_action":
            given["clean_video"] = torch.randn(1, cases.CHANNELS, 1, 4, 4, generator=generator)
        return {"dynamics": DynamicsRolloutRequest(objective=objective, **given)}

    roll_both(lambda: build(architecture, GJD), 3, context=context)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_agrees_without_the_cache(architecture, attention_calls):
    roll_both(lambda: build(architecture, "joint", inference={"use_cache": False}), 2)
    assert attention_calls["cached_attention"] == 0 < attention_calls["block_attention"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_agrees_with_guidance(architecture):
    inference = {"guidance_scale": 3.0}
    roll_both(lambda: build(architecture, "video_then_action", inference=inference), 3, negative_text=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_agrees_with_proprioception(architecture):
    roll_both(lambda: build(architecture, "joint", policy={"sequence_contract": PREFIX}), 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollout_agrees_where_one_output_is_asked_for(architecture):
    for program, modality in (("video_then_action", "video"), ("decoupled_same_step", "action")):
        request = PolicyInferenceOutputRequest(frozenset({modality}))
        chunks = 2 if modality == "video" else 1  # actions alone are no history to go on from
        roll_both(lambda p=program: build(architecture, p), chunks, context=lambda i, r=request: {"output_request": r})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_of_requests_agrees(architecture):
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(2, cases.CHANNELS, 1, 4, 4, generator=generator)
    text = torch.randn(2, 5, cases.TEXT_DIM, generator=generator)
    pipeline = build(architecture, "video_then_action").eval()

    def infer():
        torch.manual_seed(0)
        request = PolicyInferContext(state=torch.zeros(2, 1, cases.STATE_DIM))
        with torch.no_grad():
            output = pipeline.forward_infer_step_from_latents(video, request, text_context=text)
        return [output.decoder_output.action_pred]

    theirs = infer()
    with installed():
        assert_agree(infer(), theirs)


@pytest.fixture
def reused_slots(monkeypatch):
    """How many tokens' keys and values each stage took over from the chunk before."""
    from wam_kernels.integrations.openwam import rollout as rollout_module

    counts, original = [], rollout_module.same_units

    def unchanged(old, new):
        slots = original(old, new)
        counts.append(slots[0].size)
        return slots

    monkeypatch.setattr(rollout_module, "same_units", unchanged)
    return counts


def replace_state(session, **changes):
    state = session.policy_state
    return replace(session, policy_state=replace(state, variant_state=replace(state.variant_state, **changes)))


def test_history_is_computed_once(reused_slots):
    """4 video tokens a frame, chunks of 2 frames: a chunk computes the clean frames of the last one, and only those."""
    roll_both(lambda: build("dual_expert", "joint", window=64), 5)
    assert reused_slots == [4, 12, 20, 28]
    reused_slots.clear()
    with installed(reuse_history=False):
        rollout(build("dual_expert", "joint", window=64), 3)
    assert reused_slots == []


def test_history_that_changed_is_computed_anew(reused_slots):
    def observe(i, session):
        """What was seen replaces the prediction of the last chunk (two frames)."""
        if i != 2:
            return session
        latents = session.policy_state.variant_state.past_clean_latents.clone()
        latents[:, :, -2:] = torch.randn(latents[:, :, -2:].shape, generator=torch.Generator().manual_seed(9))
        return replace_state(session, past_clean_latents=latents)

    roll_both(lambda: build("dual_expert", "joint", window=64), 5, after=observe)
    assert reused_slots == [4, 12, 20, 28]  # the last prediction is computed when it becomes history: nothing is lost

    def rewrite(i, session):
        """An old frame changes, so whatever saw it changes too."""
        if i != 2:
            return session
        latents = session.policy_state.variant_state.past_clean_latents.clone()
        latents[:, :, 1] += 1
        return replace_state(session, past_clean_latents=latents)

    reused_slots.clear()
    roll_both(lambda: build("dual_expert", "joint", window=64), 5, after=rewrite)
    assert reused_slots == [4, 12, 4, 28]  # frames 1 and 2 are one chunk and all later frames attend to them


@pytest.mark.parametrize("written", ["in place", "behind the version"])
def test_new_weights_invalidate_the_history(written, reused_slots):
    """An average of weights, say, is often written to parameter.data, which leaves the version alone."""

    def rolled():
        pipeline = build("dual_expert", "joint", window=64)

        def update(i, session):
            if i == 1:
                with torch.no_grad():
                    for parameter in pipeline.parameters():
                        (parameter if written == "in place" else parameter.data).mul_(0.9)
            return session

        return rollout(pipeline, 4, after=update)

    theirs = rolled()
    with installed():
        assert_agree(rolled(), theirs)
    assert reused_slots == [4, 20]  # nothing for the chunk behind the update


def test_history_that_leaves_the_window(reused_slots):
    """Two chunks of history: every frame that is left saw one that is gone, directly or through others."""
    roll_both(lambda: build("dual_expert", "joint", window=4), 5)
    assert reused_slots == [4, 0, 0, 0]


def test_a_text_written_over_in_place(reused_slots):
    """A server keeps one buffer for its texts: what is compared with the next one is what was there."""

    def rolled(pipeline):
        generator = torch.Generator().manual_seed(5)
        text, frame = torch.randn(1, 5, cases.TEXT_DIM, generator=generator), torch.zeros(1, cases.CHANNELS, 1, 4, 4)
        actions = []
        for _ in range(2):
            runner = cases.VariantRolloutRunner(pipeline.eval())
            session = runner.reset(text_context=text)
            torch.manual_seed(0)
            request = PolicyInferContext(state=torch.zeros(1, 1, cases.STATE_DIM))
            with torch.no_grad():
                output = runner.infer_step(session=session, context=request, video_latents=frame)
            actions.append(output.infer_output.decoder_output.action_pred.clone())
            text.normal_(generator=generator)
        return actions

    pipeline = build("dual_expert", "joint", window=64)
    theirs = rolled(pipeline)
    with installed():
        assert_agree(rolled(pipeline), theirs)
    assert not any(reused_slots)


def evaluate(pipeline, session, frame):
    """One more chunk from a copy of this state, always with the same noise."""
    session = copy.deepcopy(session)
    torch.manual_seed(3)
    with torch.no_grad():
        request = PolicyInferContext(state=torch.zeros(1, 1, cases.STATE_DIM))
        output = cases.VariantRolloutRunner(pipeline).infer_step(session=session, context=request, video_latents=frame)
    return output.session, [output.infer_output.decoder_output.action_pred.clone()]


@pytest.mark.parametrize("reuse_history", [True, False])
def test_retries_from_one_state_and_seed(reuse_history, reused_slots):
    """With reuse_history=False the same bits, as the package promises; else what ran before shows in the last ones."""
    pipeline = build("dual_expert", "joint", window=64).eval()
    generator = torch.Generator().manual_seed(5)
    text, frame = (torch.randn(size, generator=generator) for size in ((1, 5, cases.TEXT_DIM), (1, 48, 1, 4, 4)))
    session = cases.VariantRolloutRunner(pipeline).reset(text_context=text)
    with installed(reuse_history=reuse_history):
        for _ in range(2):
            session, _ = evaluate(pipeline, session, frame)
        first, again = (evaluate(pipeline, session, frame)[1] for _ in range(2))
    if reuse_history:
        assert len(set(reused_slots[-2:])) == 2, "both attempts reused as much, so they would be equal anyway"
        assert_agree(again, first, 5e-6)
    else:
        assert torch.equal(again[0], first[0])


def test_sharded_weights_that_change_in_place(process_group, monkeypatch, reused_slots):
    """FSDP2 gathers new weights into the memory of the old ones and leaves their versions alone."""
    from open_wam.models.common import unshard_runtime_parameters
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    # a caching allocator gives the same addresses again; here nothing is freed
    monkeypatch.setattr(_fsdp_param, "free_storage", lambda tensor: None)
    pipeline = build("dual_expert", "joint", window=64).eval()
    for module in (*pipeline.policy_variant.packed_block_stack.packed_blocks, pipeline):
        fully_shard(module)
    frame = torch.randn(1, cases.CHANNELS, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    session = cases.VariantRolloutRunner(pipeline).reset(text_context=torch.ones(1, 5, cases.TEXT_DIM))
    reuses = []

    def evaluated(session):
        with unshard_runtime_parameters(pipeline):
            return evaluate(pipeline, session, frame)

    def evaluate_train_evaluate(session):
        for _ in range(2):
            session, _ = evaluated(session)
        before = evaluated(session)[1]
        reuses.append(len(reused_slots))
        kept = [p.to_local().clone() for p in pipeline.parameters()]
        with torch.no_grad():
            for p in pipeline.parameters():
                p.to_local().mul_(1.1)
        after = evaluated(session)[1]
        with torch.no_grad():
            for p, old in zip(pipeline.parameters(), kept, strict=True):
                p.to_local().copy_(old)
        return before + after

    theirs = evaluate_train_evaluate(session)
    with installed():
        ours = evaluate_train_evaluate(session)
    assert float((theirs[1] - theirs[0]).abs().max()) > 1e-3
    assert_agree(ours, theirs, 1e-5)
    assert 0 < reuses[-1] == len(reused_slots), "reused before the weights changed, and not behind that"


def test_inference_mode_and_training_in_turn(reused_slots):
    """Validation in inference mode, with parameters that were born in it too, before a training step."""
    pipeline = build("dual_expert", "joint", window=64)
    theirs = rollout(pipeline, 3), train_step(pipeline)
    with installed():
        with torch.inference_mode():
            rolled = rollout(build("dual_expert", "joint", window=64), 3)
            assert_agree(rolled, theirs[0])
            assert_agree(rollout(pipeline, 3), theirs[0])
        assert any(reused_slots)
        assert_agree(train_step(pipeline), theirs[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bf16_rollout_errs_no_more_than_the_package(architecture):
    def rolled(dtype):
        sizes = {"hidden": 64, "action_hidden": 32, "heads": 2, "ffn": 128, "window": 64}
        return rollout(build(architecture, "joint", **sizes).to(dtype), 3)

    truth, theirs = rolled(torch.float32), rolled(torch.bfloat16)
    with installed():
        ours = rolled(torch.bfloat16)
    for got, own, true in zip(ours, theirs, truth, strict=True):
        assert (got.float() - true).norm() <= 1.5 * (own.float() - true).norm()


# ---- visibility ----


def profile_options(**changes):
    options = {
        "num_video_frames": 9, "video_tokens_per_frame": 3, "num_action_frames": 9, "action_tokens_per_frame": 2,
        "chunk_size_frames": 2, "attention_window_size": 5, "chunk_origin_frame": 1, "device": torch.device("cpu"),
    }  # fmt: skip
    return options | changes


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"history_stream_visibility": "full", "action_context_mask": torch.arange(18)[None] % 5 > 0},
        {"prefix_condition_frames": 2, "num_video_frames": 11},
        {"singleton_chunk_frame": 0, "conditional_history_policy": "previous_boundary_video_only"},
    ],
    ids=["plain", "holes", "prefix", "singleton"],
)
def test_what_is_read_off_a_profile_is_the_package_s_dense_mask(program, changes):
    from open_wam.models.policy_variants.dual_expert.attention_packed import (
        build_dual_expert_packed_coupling_attention_profile as build_profile,
    )

    profile = build_profile(**profile_options(current_block_coupling=program, build_dense_masks=True, **changes))
    mask = profile.self_attention_mask
    visible = visibility_module.read_profile(profile)
    assert (visible.geometry is None) == ("action_context_mask" in changes)  # holes are more than a geometry says
    if visible.geometry is not None:
        assert np.array_equal(dense_mask(visible.geometry), mask.numpy())
    assert torch.equal(visible.mask(torch.device("cpu")), mask)
    assert np.array_equal(visible.ranges.dense_mask(), mask.numpy())
    tokens = torch.arange(mask.shape[0])
    assert torch.equal(visible.rule(tokens[:, None], tokens[None, :]), mask)

    # some tokens ask: what they depend on, and the same rule among those
    roots = (profile.token_layout.noise_id == 0) & (profile.token_layout.frame_id >= 7)
    required = visible.closure(roots)
    assert torch.equal(required, attention_dependency_closure(profile, roots))
    q, k = roots.nonzero()[:, 0], required.nonzero()[:, 0]
    part = visible.select(q, k)
    assert torch.equal(part.mask(torch.device("cpu")), mask[q][:, k])
    ranges, group_rows = part.slots
    dense = [[any(lo <= j < hi for lo, hi in group) for j in range(k.numel())] for group in ranges[0].tolist()]
    assert torch.equal(torch.tensor(dense).repeat_interleave(torch.tensor(group_rows), 0), mask[q][:, k])


@pytest.mark.parametrize("samples", [1, 2])
def test_the_texts_of_a_profile_are_the_package_s_dense_mask(samples):
    from open_wam.models.common.chunked_attention import build_chunked_temporal_exact_attention_profile as build_profile

    profile = build_profile(
        latent_shape=(samples, 4, 6, 2, 2), action_shape=(samples, 3, 6, 2, 1), padded_length=7, chunk_size=2,
        window_size=4, patch_size=(1, 1, 1), text_token_count=9, base_text_token_count=5, proprio_context_token_count=3,
        device=torch.device("cpu"), build_dense_masks=True, build_flex_masks=False,
    )  # fmt: skip
    visible = visibility_module.read_profile(profile)
    mask = visible.text_mask(9 * samples, torch.device("cpu"))
    assert torch.equal(mask, profile.cross_attention_mask)
    assert 0 < mask[:, 5:8].sum() < mask[:, :3].sum() and not mask[:, 8].any(), "a state for a chunk, and no padding"
    some = torch.arange(0, mask.shape[0], 3)
    assert torch.equal(visible.select(some, None).text_mask(9 * samples, torch.device("cpu")), mask[some])


def test_a_profile_compiles_to_its_geometry():
    """Of a profile that a geometry describes, that geometry is what is compiled; ranges would cost some tiles."""
    from open_wam.models.policy_variants.dual_expert.attention_packed import (
        build_dual_expert_packed_coupling_attention_profile as build_profile,
    )

    sizes = profile_options(
        num_video_frames=68, video_tokens_per_frame=32, num_action_frames=68, action_tokens_per_frame=4,
        chunk_size_frames=4, attention_window_size=64, chunk_origin_frame=0, build_dense_masks=False,
    )  # fmt: skip
    visible = visibility_module.read_profile(build_profile(**sizes, current_block_coupling="joint"))
    plan = compile_plan(visible.ranges)
    geometry = Geometry(
        program="joint", history="video_only", video_frames=68, video_tokens=32, action_frames=68, action_tokens=4,
        chunk_size=4, window=64,
    )  # fmt: skip
    assert visible.geometry == geometry
    known = compile_plan(geometry)
    assert plan.visible_pairs == known.visible_pairs
    assert 0.95 * known.efficiency <= plan.efficiency <= known.efficiency
    q, k, v = torch.randn(3, 1, plan.length, 1, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block_attention(q, k, v, plan), block_attention(q, k, v, known), rtol=0, atol=1e-5)


# ---- public ways in that a pipeline of the package does not take ----


@pytest.mark.parametrize("mode", ["error", "original"])
def test_the_exact_inference_program(mode, monkeypatch):
    """It moves its profile to each block's device, which would build the package's own block masks instead of ours."""
    from open_wam.models.visual_tower import build_chunked_dual_stream_exact_inference_program

    pipeline = build("parallel_stream", "joint", frames=3, chunk=1)
    core, steps = pipeline.visual_tower.core, []
    execute = core.execute_runtime_step
    with monkeypatch.context() as m:
        m.setattr(core, "execute_runtime_step", lambda step: steps.append(step) or execute(step))
        train_step(pipeline, frames=3)
    steps.append(replace(steps[0], program=build_chunked_dual_stream_exact_inference_program()))

    @torch.no_grad()
    def run():
        return [t.clone() for step in steps for t in core.execute_runtime_step(step).projected_outputs.values()]

    theirs = run()
    with installed(mode), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_agree(run(), theirs, 1e-5)


def test_a_block_mask_that_the_package_does_not_read(monkeypatch):
    """On a CPU its blocks attend unmasked under a profile whose only mask is a FlexAttention one."""
    from open_wam.models.visual_tower import shared_transformer_support

    pipeline = build("parallel_stream", "joint")
    forward = shared_transformer_support.SharedTransformerBlock.forward

    def foreign(self, x, attention_profile=None, **options):
        profile = replace(attention_profile, self_attention_mask=None, self_attention_block_mask=object())
        return forward(self, x, attention_profile=profile, **options)

    with installed("original"):
        forward = shared_transformer_support.SharedTransformerBlock.forward
        monkeypatch.setattr(shared_transformer_support.SharedTransformerBlock, "forward", foreign)
        with pytest.raises(ValueError, match="must have a dense mask on cpu.*it would attend unmasked"):
            train_step(pipeline)
        monkeypatch.undo()


@pytest.mark.parametrize("padded", [True, False])
def test_a_batch_of_profiles_of_the_package_s_own(padded, monkeypatch):
    from open_wam.models.policy_variants.dual_expert import packed_training

    lengths, batches = (6, 4), []
    execute = packed_training.forward_dual_expert_sequence_batch
    extra = {
        "batching_mode": "padded" if padded else "packed",
        "sequence_lengths": lengths,
        "tensor_lengths": {"video_latents": lengths, "actions": (12, 8), "state": (1, 1), "text_context": (5, 4)},
    }
    metadata = ({"sampled_chunk_size": 2, "sampled_window_size": 8, "history_frames": 2},) * 2
    pipeline = build("dual_expert", "joint")

    def record(**batch):
        batches.append(batch)
        raise InterruptedError  # its graph stays whole

    with monkeypatch.context() as m, pytest.raises(InterruptedError):
        m.setattr(packed_training, "forward_dual_expert_sequence_batch", record)
        train_step(pipeline, batch=2, extra=extra, metadata=metadata)
    (batch,) = batches

    def run(requests):
        pipeline.zero_grad()
        outputs = [t for pair in execute(**batch | {"requests": requests}) for t in pair]
        sum((t * t).sum() for t in outputs).backward(retain_graph=True)
        grads = {n: p.grad for n, p in pipeline.named_parameters() if p.grad is not None}
        return outputs, grads

    first, second = (run([request]) for request in batch["requests"])
    for mode in ("error", "original"):
        with installed(mode):
            outputs, grads = run(batch["requests"])
        assert_agree(outputs, first[0] + second[0], 1e-5)
        assert_agree(grads, {name: first[1][name] + second[1][name] for name in grads})


def test_a_denoising_cache_of_the_caller_s(attention_calls):
    """The class is public, and an instance may be older than the installation."""
    pipeline = build("parallel_stream", "joint")
    generator = torch.Generator().manual_seed(4)
    clean, text = (torch.randn(s, generator=generator) for s in ((1, 48, 4, 4, 4), (1, 5, cases.TEXT_DIM)))

    @torch.no_grad()
    def run(cache):
        flows = []
        for step in range(3):
            noisy = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(step)) * (step + 1)
            flow = pipeline.visual_tower.predict_chunked_conditioned_video_flow(
                noisy_latents=noisy, condition_latents=clean, timesteps=torch.full((1, 4), 500.0 - step),
                condition_timesteps=torch.zeros(1, 4), text_context=text, chunk_size=2, window_size=8, frame_start=0,
                stage="infer", denoising_cache=cache,
            )  # fmt: skip
            flows.append(flow)
        return flows

    theirs, older = run(None), DenoisingCache()
    assert_agree(run(DenoisingCache()), theirs, 1e-5)
    for mode in ("error", "original"):
        with installed(mode):
            assert_agree(run(DenoisingCache()), theirs, 1e-5)
    with installed():
        assert_agree(run(older), theirs, 1e-5)
    assert attention_calls["cached_attention"] > 0


# ---- what is not supported ----


def test_install_and_uninstall():
    from open_wam.models.policy_variants.dual_expert import packed_block

    before = packed_block.DualExpertPackedBlock.forward, DenoisingCache.bind
    with installed():
        during = packed_block.DualExpertPackedBlock.forward, DenoisingCache.bind
        assert all(a is not b for a, b in zip(before, during, strict=True))
        with pytest.raises(RuntimeError, match="uninstall"):
            openwam.install()
    assert before == (packed_block.DualExpertPackedBlock.forward, DenoisingCache.bind)
    openwam.uninstall()  # again: nothing to do
    with pytest.raises(ValueError, match="on_unsupported"):
        openwam.install("maybe")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patch_and_unpatch(architecture):
    """The same as install and uninstall: the package's functions know no model."""
    from open_wam.models.visual_tower import shared_transformer_support

    forward = shared_transformer_support.SharedTransformerBlock.forward
    pipeline, other = build(architecture, "joint"), build(architecture, "joint", seed=1)
    theirs, theirs_of_other = train_step(pipeline), train_step(other)
    done = patch(pipeline)
    name = "DualExpertPackedBlock.forward" if architecture == "dual_expert" else "SharedTransformerBlock.forward"
    assert done.system == "OpenWAM" and f"replaced {name}, 1x, 0 calls so far" in done.explain()
    assert_agree(train_step(pipeline), theirs)
    assert done.calls[name] == 2 and f"replaced {name}, 1x, 2 calls so far" in done.explain()
    assert_agree(train_step(other), theirs_of_other)
    assert done.calls[name] == 4
    for again in (pipeline, other):
        with pytest.raises(ValueError, match="must not be patched already"):
            patch(again)
    with pytest.raises(RuntimeError, match="uninstall"):
        openwam.install()
    unpatch(copy.deepcopy(pipeline))
    assert shared_transformer_support.SharedTransformerBlock.forward is forward
    for name, value in train_step(pipeline).items():
        assert torch.equal(value, theirs[name]), name
    with pytest.raises(ValueError, match="was not"):
        unpatch(pipeline)


def test_accelerate_finds_a_pipeline():
    class Trainer:
        def __init__(self, pipeline):
            self.pipeline = pipeline

    done = accelerate(Trainer(build("dual_expert", "joint")))
    openwam.uninstall()
    assert done.system == "OpenWAM" and not done.replaced


def test_another_version_is_refused_or_left_alone(monkeypatch):
    monkeypatch.setattr(openwam, "version", lambda name: "0.3.1")
    with pytest.raises(Unsupported, match=r"openwam 0\.3\.1"):
        openwam.install()
    with pytest.warns(UserWarning, match=r"openwam 0\.3\.1"):
        assert openwam.install("original") is None
    openwam.uninstall()
    pipeline = build("dual_expert", "joint")
    with pytest.raises(Unsupported, match=r"OpenWAM must be in version 0\.2\.0, got openwam 0\.3\.1"):
        patch(pipeline)
    with pytest.warns(UserWarning, match=r"openwam 0\.3\.1; the original code of OpenWAM runs"):
        assert patch(pipeline, "original") is None


def assert_refused_or_original(pipeline, match, run):
    theirs = run(pipeline)
    with installed(), pytest.raises(Unsupported, match=match):
        run(pipeline)
    with pytest.raises(Unsupported, match=match):
        patch(pipeline)
    with installed("original"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = [run(pipeline), run(pipeline)]
    messages = [str(w.message) for w in caught if "original code of OpenWAM runs instead" in str(w.message)]
    assert len(messages) == 1 and match in messages[0]
    for results in ours:
        assert_agree(results, theirs, 1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_size_that_attention_does_not_take(architecture):
    pipeline = build(architecture, "joint", hidden=48, heads=4)
    match = "4 heads of 12"
    assert_refused_or_original(pipeline, match, train_step)
    assert_refused_or_original(pipeline, match, lambda p: rollout(p, 2))


def test_a_head_size_that_attention_does_not_take_in_a_batch():
    lengths = (6, 4)
    extra = {
        "batching_mode": "padded",
        "sequence_lengths": lengths,
        "tensor_lengths": {"video_latents": lengths, "actions": (12, 8), "state": (1, 1), "text_context": (5, 4)},
    }
    metadata = ({"sampled_chunk_size": 2, "sampled_window_size": 8, "history_frames": 2},) * 2
    pipeline = build("dual_expert", "joint", hidden=48, heads=4)
    run = lambda p: train_step(p, batch=2, extra=extra, metadata=metadata)  # noqa: E731
    assert_refused_or_original(pipeline, "4 heads of 12", run)


def assert_left_to_the_package(run, reason):
    """Without an error or a warning, and explain() says so."""
    theirs = run()
    for mode in ("error", "original"):
        with installed(mode) as done, warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_agree(run(), theirs, 1e-6)
            assert re.search(f"kept +{reason}.*, [0-9]+ calls ran the original", done.explain())


@pytest.mark.parametrize("what", ["packed video", "proprioception in the text"])
def test_a_head_size_that_attention_does_not_take_under_the_masks_of(what):
    pipeline = build("parallel_stream", "joint", hidden=48, heads=4, policy=TEXT_PROPRIO)
    states = torch.randn(1, 3, cases.STATE_DIM, generator=torch.Generator().manual_seed(1))
    latents, text = torch.ones(2, cases.CHANNELS, 3, 4, 4), torch.ones(2, 6, cases.TEXT_DIM)
    flow = {"noisy_latents": latents, "timesteps": torch.full((2, 3), 5.0), "text_context": text}

    def run(pipeline):
        if what == "packed video":
            return [pipeline.visual_tower.predict_video_flow(**flow, sequence_lengths=(3, 1))]
        return train_step(pipeline, extra={"proprio_context_state": states})

    assert_refused_or_original(pipeline, "4 heads of 12", run)


def test_video_under_a_dense_mask():
    """As with a causal prefix and a suffix: the caller's own mask, and no profile."""
    pipeline = build("parallel_stream", "joint")
    latents, text = torch.ones(1, cases.CHANNELS, 3, 4, 4), torch.ones(1, 6, cases.TEXT_DIM)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    flow = {
        "noisy_latents": latents,
        "timesteps": torch.full((1, 3), 5.0),
        "text_context": text,
        "attention_mask": mask,
    }
    run = lambda: [pipeline.visual_tower.predict_video_flow(**flow)]  # noqa: E731
    assert_left_to_the_package(run, "a block without an attention profile")


def test_an_unknown_profile(monkeypatch):
    from open_wam.models.common import chunked_attention

    original = chunked_attention._build_chunked_temporal_attention_profile

    def renamed(**options):
        profile = original(**options)
        return replace(profile, spec=replace(profile.spec, name="my_profile", family="mine"))

    monkeypatch.setattr(chunked_attention, "_build_chunked_temporal_attention_profile", renamed)
    pipeline = build("dual_expert", "joint")
    assert_left_to_the_package(lambda: train_step(pipeline), "attention profile 'my_profile' of family 'mine'")


# ---- the package's own commands ----


@pytest.fixture(scope="module")
def command_results(tmp_path_factory):
    """train, resume, evaluate, sanity on the public tiny config; once as it is and once with the extension."""
    return {name: run_commands(tmp_path_factory.mktemp(name), name) for name in ("original", "ours")}


def run_commands(folder, name):
    from open_wam import extensions
    from open_wam.cli import eval as evaluate
    from open_wam.cli import sanity, train

    extension = [] if name == "original" else ["--extension", "wam_kernels.integrations.openwam"]
    extensions._LOADED_EXTENSIONS.pop("wam_kernels.integrations.openwam:register_open_wam", None)
    first, second = folder / "first", folder / "second"
    evaluation = str(cases.CONFIGS / "evals/public_tiny_synthetic_contract.yaml")
    tiny = str(cases.CONFIGS / cases.TINY.removeprefix("configs/"))
    config = ["--cfg", tiny, *extension]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the package writes beside what it is told
        try:
            torch.manual_seed(0)
            train.main([*config, "--save-root", str(first), "--num-steps", "2"])
            resume = ["--resume-from", str(first / "checkpoints/checkpoint_step_2")]
            torch.manual_seed(0)
            train.main([*config, "--save-root", str(second), "--num-steps", "3", *resume])
            weights = second / "checkpoints/checkpoint_step_3/model_state.pt"
            checkpoint = ["--checkpoint", str(weights), "--output-json", str(folder / "eval.json")]
            evaluate.main(["--cfg", evaluation, *checkpoint, *extension])
            sanity.main([*config, "--rollout-steps", "2", "--output-json", str(folder / "sanity.json")])
        finally:
            openwam.uninstall()
    return {
        "weights": torch.load(weights, weights_only=True),
        "eval": json.loads((folder / "eval.json").read_text()),
        "sanity": json.loads((folder / "sanity.json").read_text()),
    }


def numbers(value, path=""):
    """Numbers of a result file by path, without times and hashes."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return {path: value} if isinstance(value, int | float) else {}
    skipped = ("elapsed", "_s", "hz", "per_second", "provenance", "mtime", "latency", "duration", "seconds")
    found = {}
    for key, item in pairs:
        if not any(word in str(key) for word in skipped):
            found |= numbers(item, f"{path}/{key}")
    return found


def test_training_and_resuming_by_command_agree(command_results):
    ours, theirs = (flatten(command_results[name]["weights"]) for name in ("ours", "original"))
    assert_agree(ours, theirs)


def flatten(state, path=""):
    if isinstance(state, torch.Tensor):
        return {path: state.float()}
    found = {}
    if isinstance(state, dict):
        for key, value in state.items():
            found |= flatten(value, f"{path}/{key}")
    return found


@pytest.mark.parametrize("command", ["eval", "sanity"])
def test_evaluation_and_sanity_by_command_agree(command_results, command):
    ours, theirs = (numbers(command_results[name][command]) for name in ("ours", "original"))
    assert ours.keys() == theirs.keys()
    assert any("loss" in name or "mse" in name for name in theirs)
    for name, expected in theirs.items():
        assert ours[name] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), name
