"""The packed forward against the recorded reference: flows, loss and input gradients of all six programs."""

import pytest
import torch

from wam_kernels import compile_plan
from wam_models.model import dual_expert

from .cases import BOUND, META, error, golden_model, packed_geometry, packed_inputs


def packed_errors(program: str, plan=None, frame_start: int | None = None) -> dict[str, float]:
    inputs, want = packed_inputs(program)
    plan = compile_plan(packed_geometry(program)) if plan is None else plan
    frame_start = META["cases"][program]["frame_start"] if frame_start is None else frame_start
    for name in ("noisy_video", "noisy_action", "clean_action"):
        inputs[name] = inputs[name].clone().requires_grad_()
    video, action = golden_model()(**inputs, plan=plan, frame_start=frame_start)
    loss = video.square().mean() + action.square().mean()
    loss.backward()
    grad_action = torch.cat([inputs["noisy_action"].grad, inputs["clean_action"].grad], 1)
    return {
        "video_flow": error(video.detach(), want["video_flow"]),
        "action_flow": error(action.detach().flatten(1, 2), want["action_flow"]),
        "loss": error(loss.detach()[None], want["loss"]),
        "grad_noisy_video": error(inputs["noisy_video"].grad, want["grad_noisy_video"]),
        "grad_packed_action": error(grad_action.flatten(1, 2), want["grad_packed_action"]),
    }


@pytest.mark.parametrize("program", META["cases"])
def test_packed_forward_and_gradients_match_the_reference(program):
    errors = packed_errors(program)
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("program", META["cases"])
def test_a_wrong_visibility_fails_the_packed_goldens(program):
    right = packed_geometry(program)
    other = "full" if right.history != "full" else "video_only"
    for change in ({"window": 1}, {"history": other}, {"chunk_size": 1}, {"chunk_origin": 1}):
        errors = packed_errors(program, compile_plan(packed_geometry(program, **change)))
        assert max(errors.values()) > 20 * BOUND, (change, errors)


def test_a_wrong_rope_position_fails_the_packed_goldens(monkeypatch):
    right = dual_expert.action_positions
    for wrong in (
        lambda frames, slots: right(frames - 1, slots),
        lambda frames, slots: right(frames, slots).clamp(min=0),  # row and column 0
        lambda frames, slots: right(frames, slots + 1)[: len(frames) * slots],
    ):
        monkeypatch.setattr(dual_expert, "action_positions", wrong)
        assert max(packed_errors("joint").values()) > 20 * BOUND
    monkeypatch.setattr(dual_expert, "action_positions", right)
    right_video = dual_expert.video_positions
    monkeypatch.setattr(dual_expert, "video_positions", lambda *a: right_video(*a)[:, [0, 2, 1]])
    assert max(packed_errors("joint").values()) > 20 * BOUND


def test_frame_start_changes_nothing_but_rounding():
    # rope is relative: only a chunk that is placed differently from its history would show
    errors = packed_errors("action_then_video", frame_start=0)
    assert max(errors.values()) <= 2 * BOUND, errors


def test_per_frame_and_per_slot_action_timesteps_agree():
    inputs, _ = packed_inputs("joint")
    plan, model = compile_plan(packed_geometry("joint")), golden_model()
    per_slot = model(**inputs, plan=plan)
    per_frame = model(**inputs | {"action_timesteps": inputs["action_timesteps"][:, :, 0]}, plan=plan)
    assert all(error(a, b) < 1e-6 for a, b in zip(per_frame, per_slot, strict=True))


def test_checkpointed_activations_give_the_same_gradients():
    inputs, _ = packed_inputs("video_then_action")
    plan = compile_plan(packed_geometry("video_then_action"))
    grads = []
    for on in (False, True):
        model = golden_model().requires_grad_(True)
        model.checkpoint_activations(on)
        video, action = model(**inputs, plan=plan)
        (video.square().mean() + action.square().mean()).backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
    assert all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])


def test_two_geometries_in_one_batch():
    inputs, _ = packed_inputs("joint")
    model = golden_model()
    geometries = [packed_geometry("joint"), packed_geometry("joint", window=2, chunk_size=1)]
    together = model(**inputs, plan=compile_plan(geometries))
    for i, geometry in enumerate(geometries):
        alone = model(**{k: v[i : i + 1] for k, v in inputs.items()}, plan=compile_plan(geometry))
        assert all(error(a[i : i + 1], b) < 1e-6 for a, b in zip(together, alone, strict=True))


def test_blocks_compile_as_one_graph():
    inputs, _ = packed_inputs("joint")
    model, plan = golden_model(), compile_plan(packed_geometry("joint"))
    eager = model(**inputs, plan=plan)
    torch._dynamo.reset()
    model.packed_block_stack = torch.compile(model.packed_block_stack, fullgraph=True, backend="aot_eager")
    compiled = model(**inputs, plan=plan)
    assert all(error(a, b) < 1e-6 for a, b in zip(compiled, eager, strict=True))


def test_bfloat16_stays_close_to_float32():
    inputs, want = packed_inputs("joint")
    video, action = golden_model(torch.bfloat16)(**inputs, plan=compile_plan(packed_geometry("joint")))
    assert video.dtype == action.dtype == torch.bfloat16
    assert error(video, want["video_flow"]) < 0.03
    assert error(action.flatten(1, 2), want["action_flow"]) < 0.03


def test_refusals_name_the_argument():
    inputs, _ = packed_inputs("joint")
    model, plan = golden_model(), compile_plan(packed_geometry("joint"))
    for change, message in (
        ({"noisy_video": inputs["noisy_video"][:, :7]}, "noisy_video"),
        ({"clean_action": inputs["clean_action"][:, :2]}, "clean_action"),
        ({"video_timesteps": inputs["video_timesteps"][:, :2]}, "video_timesteps"),
        ({"text": inputs["text"][..., :3]}, "text"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs | change, plan=plan)
    with pytest.raises(ValueError, match="plan or attend"):
        model(**inputs)
