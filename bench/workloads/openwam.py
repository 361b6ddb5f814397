"""The OpenWAM package in small: its training step, a chunk of its rollout, an episode; unmodified or patched.

Needs ``openwam``, as in requirements/test.txt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import harness
from wam_models import RolloutConfig, RolloutEngine, WorldActionModel, load_weights
from wam_models.config import ModelConfig

RTOL = 1e-4
FRAME = {"height": 8, "width": 16}  # latent pixels; 32 tokens after 2 x 2 patches
SIZES = {
    "hidden": 256, "action_hidden": 128, "ffn": 1024, "heads": 2, "layers": 4, "per_frame": 4, "chunk": 4, "window": 64,
    "steps": 5,
}  # fmt: skip
FRAMES = {2_304: 32, 4_896: 68}  # by packed tokens: 2 copies of frames of 36 tokens
TEXT_TOKENS = 512


def openwam_package():
    """The package's models for tests; imported late, so that this module lists without openwam."""
    from bench.workloads import openwam_models

    return openwam_models


@contextmanager
def running_as(provider: str) -> Iterator[None]:
    """``"openwam"``, unmodified, or ``"wam"``, with ``install()``."""
    from wam_kernels.integrations import openwam

    if provider == "wam":
        openwam.install()
    try:
        yield
    finally:
        openwam.uninstall()


def make_pipeline(architecture: str, program: str, frames: int = 8):
    return openwam_package().build(architecture, program, frames=frames, **FRAME, **SIZES)


def train_step(pipeline, frames: int, provider: str) -> dict[str, Tensor]:
    """Loss and gradients of one step at a fixed chunk size and window."""
    metadata = {
        "sampled_chunk_size": SIZES["chunk"], "sampled_window_size": SIZES["window"], "history_frames": 1,
    }  # fmt: skip
    with running_as(provider):
        return openwam_package().train_step(
            pipeline, frames=frames, per_frame=SIZES["per_frame"], text=TEXT_TOKENS, metadata=(metadata,), **FRAME
        )


class Chunk:
    """One chunk of a rollout behind ``history`` frames, as in a running robot: right after the chunk before."""

    def __init__(self, pipeline, history: int) -> None:
        cases = openwam_package()
        generator = torch.Generator().manual_seed(0)
        self.runner = cases.VariantRolloutRunner(pipeline.eval())
        self.request = cases.PolicyInferContext(state=torch.zeros(1, 1, cases.STATE_DIM))
        self.frame = torch.randn(1, cases.CHANNELS, 1, FRAME["height"], FRAME["width"], generator=generator)
        text = torch.randn(1, TEXT_TOKENS, cases.TEXT_DIM, generator=generator)
        started = self._step(self.runner.reset(text_context=text))[0]
        # a session of that length: random latents and actions stand for what was observed and done
        frames = history - SIZES["chunk"]
        latents = torch.randn(1, cases.CHANNELS, frames, FRAME["height"], FRAME["width"], generator=generator)
        actions = torch.randn(1, frames * SIZES["per_frame"], cases.ACTION_DIM, generator=generator)
        state = started.policy_state
        past = replace(
            state.variant_state, past_clean_latents=latents, past_clean_actions=actions,
            past_clean_action_mask=torch.ones(1, actions.shape[1], 1),
        )  # fmt: skip
        cursor = replace(state.cursor, current_start_frame=frames)
        self.before = replace(started, policy_state=replace(state, variant_state=past, cursor=cursor))

    def _step(self, session) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        with torch.no_grad():
            output = self.runner.infer_step(session=session, context=self.request, video_latents=self.frame)
        latents = output.session.policy_state.variant_state.past_clean_latents
        return output.session, {"actions": output.infer_output.decoder_output.action_pred, "latents": latents}

    def run(self, provider: str) -> tuple[float, dict[str, Tensor]]:
        """Milliseconds and results of the chunk."""
        with running_as(provider):
            session, _ = self._step(self.before)
            begin = time.perf_counter()
            results = self._step(session)[1]
            return (time.perf_counter() - begin) * 1e3, results


def episode(pipeline, chunks: int, provider: str) -> tuple[list[float], dict[str, Tensor]]:
    """Seconds of every chunk of a rollout from one observed frame, and what was generated."""
    marks: list[float] = []

    def begin(i: int) -> dict:
        marks.append(time.perf_counter())
        return {}

    def end(i: int, session):
        marks.append(time.perf_counter())
        return session

    with running_as(provider):
        results = openwam_package().rollout(pipeline, chunks, text=TEXT_TOKENS, context=begin, after=end, **FRAME)
    seconds = [b - a for a, b in zip(marks[::2], marks[1::2], strict=True)]
    return seconds, {str(i): value for i, value in enumerate(results)}


def golden_names(pipeline) -> dict[str, Tensor]:
    """A dual-expert model's weights under the names of ``tests/golden/dual_expert/state_dict.safetensors``."""
    prefixes = {
        "visual_tower.core.": "core.",
        "policy_variant.action_expert.": "action_expert.",
        "policy_variant.packed_block_stack.": "packed_block_stack.",
    }
    return {
        ours + name.removeprefix(theirs): value.detach().clone()
        for name, value in pipeline.state_dict().items()
        for theirs, ours in prefixes.items()
        if name.startswith(theirs)
    }


def wam_config() -> ModelConfig:
    """The ``wam_models`` config of the same sizes."""
    return ModelConfig(
        hidden=SIZES["hidden"], heads=SIZES["heads"], head_dim=SIZES["hidden"] // SIZES["heads"],
        layers=SIZES["layers"], ffn=SIZES["ffn"], action_hidden=SIZES["action_hidden"],
        action_ffn=2 * SIZES["action_hidden"],
        action_dim=openwam_package().ACTION_DIM, actions_per_frame=SIZES["per_frame"],
    )  # fmt: skip


@contextmanager
def recorded() -> Iterator[dict[str, list[Tensor]]]:
    """What the package draws: its text and frame with ``randn``, its noise with ``randn_like``."""
    drawn: dict[str, list[Tensor]] = {"randn": [], "randn_like": []}
    originals = {name: getattr(torch, name) for name in drawn}

    def recorder(name: str):
        def draw(*args, **kwargs):
            drawn[name].append(originals[name](*args, **kwargs))
            return drawn[name][-1].clone()

        return draw

    for name in drawn:
        setattr(torch, name, recorder(name))
    try:
        yield drawn
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def compared(program: str, chunks: int) -> dict[str, list[float]]:
    """Seconds of every chunk of both providers.

    Raises:
        RuntimeError: a chunk within the window that differs.
    """
    pipeline = make_pipeline("dual_expert", program)
    with recorded() as drawn:
        theirs, results = episode(pipeline, chunks, "openwam")
    model = WorldActionModel(wam_config())
    load_weights(model, golden_names(pipeline))
    config = RolloutConfig(
        program=program, chunk_size=SIZES["chunk"], window=SIZES["window"], steps=SIZES["steps"], history="video_only"
    )  # fmt: skip
    frame = results["1"][:, :, :1]
    (text,) = (t for t in drawn["randn"] if t.shape == (1, TEXT_TOKENS, model.config.text_dim))
    rollout = RolloutEngine(model.eval(), config).start(frame, text)
    ours = []
    for i in range(chunks):
        # one draw for each stream, in the order in which the program resolves them
        video, action = sorted(drawn["randn_like"][2 * i : 2 * i + 2], key=lambda t: -t.ndim)
        begin = time.perf_counter()
        candidate = rollout.propose(video_noise=video, action_noise=action.unflatten(1, (SIZES["chunk"], -1)))
        rollout.accept(candidate)
        ours.append(time.perf_counter() - begin)
        assert candidate.action is not None and candidate.video is not None  # both were asked for
        if (i + 1) * SIZES["chunk"] < SIZES["window"] // 2 * SIZES["chunk"]:
            harness.require_equal(
                f"{program}, chunk {i + 1}", candidate.action.flatten(1, 2), results[str(3 * i)], RTOL
            )
            latents = results[str(3 * i + 1)][:, :, -SIZES["chunk"] :]
            harness.require_equal(f"{program}, chunk {i + 1}", candidate.video, latents, RTOL)
    return {"openwam": theirs, "wam": ours}
