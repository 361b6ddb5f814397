"""OpenWAM as it comes against OpenWAM with ``wam_kernels.integrations.openwam.install()``: the real package, on a CPU.

    python -m bench.bench_openwam

Needs ``openwam``, as in requirements-test.txt. Three things are timed, both ways in one run, with the same weights and
draws:

- training step: forward, loss and backward of ``forward_train_from_latents`` on one packed sample;
- rollout chunk: one ``VariantRolloutRunner.infer_step`` over a history that fills the sequence, after the chunk before;
- episode: every chunk of a rollout from one observed frame.

Sizes: 4 layers, 256 (action expert 128) wide, 2 heads of 128, 32 video tokens and 4 actions a frame, chunks of 4
frames, window 64, 5 steps, 512 text tokens. Before a speed is printed, losses, gradients, actions and latents are
compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from bench import harness

RTOL = 1e-4
FRAME = {"height": 8, "width": 16}  # latent pixels; 32 tokens after 2 x 2 patches
SIZES = {
    "hidden": 256, "action_hidden": 128, "ffn": 1024, "heads": 2, "layers": 4, "per_frame": 4, "chunk": 4, "window": 64,
    "steps": 5,
}  # fmt: skip
FRAMES = {2_304: 32, 4_896: 68}  # by packed tokens: 2 copies of frames of 36 tokens
TEXT_TOKENS = 512
PROGRAM = "joint"


def _openwam():
    """The package's models for tests; imported late, so that this module lists without openwam."""
    from tests.integrations import openwam_cases

    return openwam_cases


@contextmanager
def arm(name: str):
    """``"openwam"`` as it comes, or ``"wam"``."""
    from wam_kernels.integrations import openwam

    if name == "wam":
        openwam.install()
    try:
        yield
    finally:
        openwam.uninstall()


def model(architecture: str, program: str, frames: int = 8):
    return _openwam().build(architecture, program, frames=frames, **FRAME, **SIZES)


# ---- the three workloads ----


def train_step(pipeline, frames: int, which: str) -> dict[str, Tensor]:
    """Loss and gradients of one step at a fixed chunk size and window."""
    metadata = {
        "sampled_chunk_size": SIZES["chunk"], "sampled_window_size": SIZES["window"], "history_frames": 1,
    }  # fmt: skip
    with arm(which):
        return _openwam().train_step(
            pipeline, frames=frames, per_frame=SIZES["per_frame"], text=TEXT_TOKENS, metadata=(metadata,), **FRAME
        )


class Chunk:
    """One chunk of a rollout behind ``history`` frames, as a running robot meets it: right after the chunk before."""

    def __init__(self, pipeline, history: int) -> None:
        cases = _openwam()
        generator = torch.Generator().manual_seed(0)
        self.runner = cases.VariantRolloutRunner(pipeline.eval())
        self.request = cases.PolicyInferContext(state=torch.zeros(1, 1, cases.STATE_DIM))
        self.frame = torch.randn(1, cases.CHANNELS, 1, FRAME["height"], FRAME["width"], generator=generator)
        text = torch.randn(1, TEXT_TOKENS, cases.TEXT_DIM, generator=generator)
        started = self._step(self.runner.reset(text_context=text))[0]
        # a session of that length: random latents and actions stand for what was seen and done
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

    def _step(self, session) -> tuple[object, dict[str, Tensor]]:
        torch.manual_seed(0)
        with torch.no_grad():
            output = self.runner.infer_step(session=session, context=self.request, video_latents=self.frame)
        latents = output.session.policy_state.variant_state.past_clean_latents
        return output.session, {"actions": output.infer_output.decoder_output.action_pred, "latents": latents}

    def run(self, which: str) -> tuple[float, dict[str, Tensor]]:
        """Milliseconds and results of the chunk."""
        with arm(which):
            session, _ = self._step(self.before)
            begin = time.perf_counter()
            results = self._step(session)[1]
            return (time.perf_counter() - begin) * 1e3, results


def episode(pipeline, chunks: int, which: str) -> tuple[list[float], dict[str, Tensor]]:
    """Seconds of every chunk of a rollout from one observed frame, and what was generated."""
    marks: list[float] = []

    def begin(i: int) -> dict:
        marks.append(time.perf_counter())
        return {}

    def end(i: int, session):
        marks.append(time.perf_counter())
        return session

    with arm(which):
        results = _openwam().rollout(pipeline, chunks, text=TEXT_TOKENS, context=begin, after=end, **FRAME)
    seconds = [b - a for a, b in zip(marks[::2], marks[1::2], strict=True)]
    return seconds, {str(i): value for i, value in enumerate(results)}


def openwam_rollout_seconds(program: str, chunks: int, weights: str | Path | None = None) -> list[float]:
    """Seconds of every chunk of the unpatched package's own rollout (dual expert, sizes as above, no guidance).

    Args:
        program: One of the six programs.
        chunks: How many.
        weights: Where to save the model's weights as safetensors with the keys of ``tests/golden``, so that
            ``wam_models.load_weights`` puts them into a model of the same sizes (:func:`wam_config`).
    """
    pipeline = model("dual_expert", program)
    if weights is not None:
        save_file(golden_names(pipeline), weights)
    return episode(pipeline, chunks, "openwam")[0]


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


def wam_config():
    """The ``wam_models`` config of the same sizes."""
    from wam_models.config import ModelConfig

    return ModelConfig(
        hidden=SIZES["hidden"], heads=SIZES["heads"], head_dim=SIZES["hidden"] // SIZES["heads"],
        layers=SIZES["layers"], ffn=SIZES["ffn"], action_hidden=SIZES["action_hidden"],
        action_ffn=2 * SIZES["action_hidden"],
        action_dim=_openwam().ACTION_DIM, actions_per_frame=SIZES["per_frame"],
    )  # fmt: skip


# ---- rows ----


def require_same(what: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if ours.keys() != theirs.keys():
        raise RuntimeError(
            f"bench: {what} gives {sorted(ours.keys() ^ theirs.keys())} in one arm only; no speed for it"
        )
    for name, expected in theirs.items():
        if expected.any():
            harness.require_equal(f"{what}: {name}", ours[name], expected, RTOL)


def compare(run: Callable[[str], tuple[float, dict[str, Tensor]]], what: str, repeats: int) -> dict[str, dict]:
    """Times of both arms, which take turns; every round is compared. The first round is not timed."""
    times: dict[str, list[float]] = {"openwam": [], "wam": []}
    for turn in range(repeats + 1):
        results = {}
        for name, values in times.items():
            ms, results[name] = run(name)
            if turn:
                values.append(ms)
        require_same(what, results["wam"], results["openwam"])
    return {name: harness.percentiles(values) for name, values in times.items()}


def rows_of(what: str, architecture: str, tokens: int, times: dict[str, dict]) -> list[dict]:
    return [
        {
            "what": what, "architecture": architecture, "program": PROGRAM, "tokens": tokens, "dtype": "float32",
            "arm": name,
            **{key: round(value, 1) for key, value in t.items()},
            "ratio": round(times["openwam"]["ms"] / t["ms"], 2),
            "ratio_min": round(times["openwam"]["ms_min"] / t["ms_min"], 2),
        }
        for name, t in times.items()
    ]  # fmt: skip


def suite(options: harness.Options) -> Iterable[dict]:
    if options.device != "cpu":
        raise SystemExit("bench_openwam: timed on a CPU only; use --device cpu")
    sizes = {576: 8} if options.quick else FRAMES
    repeats = 1 if options.quick else 2
    for architecture in tqdm(_openwam().ARCHITECTURES, desc="openwam", unit="architecture"):
        for tokens, frames in sizes.items():
            pipeline = model(architecture, PROGRAM, frames)

            def step(which: str, pipeline=pipeline, frames=frames) -> tuple[float, dict[str, Tensor]]:
                begin = time.perf_counter()
                results = train_step(pipeline, frames, which)
                return (time.perf_counter() - begin) * 1e3, results

            yield from rows_of("training step", architecture, tokens, compare(step, "training step", repeats))
        for tokens, frames in sizes.items() if not options.quick else [(1_152, 16)]:
            chunk = Chunk(model(architecture, PROGRAM), frames - SIZES["chunk"])
            yield from rows_of("rollout chunk", architecture, tokens, compare(chunk.run, "rollout chunk", repeats))
    chunks = 3 if options.quick else 20
    pipeline = model("dual_expert", PROGRAM)
    runs = {name: episode(pipeline, chunks, name) for name in ("openwam", "wam")}
    require_same("episode", runs["wam"][1], runs["openwam"][1])
    for name, (seconds, _) in runs.items():
        marks = {f"s_chunk_{i}": round(seconds[i - 1], 3) for i in (1, 2, 5, 10, 20, 40) if i <= chunks}
        yield {
            "what": "episode", "architecture": "dual_expert", "program": PROGRAM, "dtype": "float32", "arm": name,
            "chunks": chunks, **marks, "s_total": round(sum(seconds), 2),
        }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    harness.main("openwam", __doc__, suite, argv)


if __name__ == "__main__":
    main()
