"""Small OpenWAM models, training steps and rollouts: the real package, for tests and benchmarks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
import yaml
from open_wam.configs import load_experiment_config
from open_wam.models.policy_variants import PolicyInferContext, PolicyTrainBatch
from open_wam.pipelines import VariantPipeline, VariantRolloutRunner, build_variant_pipeline_from_config
from torch import Tensor

CONFIGS = files("open_wam.resources") / "configs"
TINY = "configs/examples/public_tiny_synthetic_contract.yaml"
ARCHITECTURES = ("dual_expert", "parallel_stream")
PROGRAMS = (
    "video_then_action",
    "action_then_video",
    "joint",
    "decoupled_same_step",
    "video_noisy_to_action",
    "action_noisy_to_video",
)
GJD = "generalist_joint_denoising"
OBJECTIVES = ("joint", "action_conditioned_video", "video_conditioned_action")
PREFIX = "legacy_prefix_single_frame_perchunk_proprio"
ACTION_DIM, STATE_DIM, CHANNELS, TEXT_DIM = 4, 3, 48, 4096


def build(
    architecture: str,
    program: str,
    *,
    hidden: int = 32,
    action_hidden: int = 16,
    heads: int = 4,
    layers: int = 2,
    ffn: int = 64,
    frames: int = 6,
    height: int = 4,
    width: int = 4,
    per_frame: int = 2,
    chunk: int = 2,
    window: int = 8,
    steps: int = 3,
    policy: dict | None = None,
    inference: dict | None = None,
    seed: int = 0,
) -> VariantPipeline:
    """A model from the package's public tiny config: latents ``[B, 48, frames, height, width]``, patches of 2 x 2."""
    c = copy.deepcopy(yaml.safe_load((CONFIGS / TINY.removeprefix("configs/")).read_text()))
    size = {"height": 16 * height, "width": 16 * width}
    c["data"] |= {"num_frames": frames, "canonical_height": size["height"], "canonical_width": size["width"]}
    c["data"]["view_layout"][0] |= size
    # parallel_stream counts the actions of a training sample, dual_expert those of a chunk
    horizon = per_frame * (frames if architecture == "parallel_stream" else chunk)
    c["data"]["action_schema"]["action_horizon"] = c["action_decoder"]["action_horizon"] = horizon
    c["action_decoder"] |= {"name": f"{architecture}_decoder", "hidden_size": hidden}
    sizes = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "attention_head_dim": hidden // heads}
    c["backbone"] |= sizes | {"ffn_dim": ffn}
    trained = ["visual_tower.runtime_backbone"]
    if architecture == "dual_expert":
        own = {"action_hidden_size": action_hidden, "action_ffn_dim": 2 * action_hidden, "num_action_layers": layers}
        c["policy_variant"] |= own
        trained.append("policy_variant.action_expert")
    else:
        order = ["video_noisy", "video_condition", "action_noisy", "action_condition"]
        c["policy_variant"] = {
            "name": "parallel_stream", "sequence_order": order, "frame_chunk_size": chunk,
            "action_per_frame": per_frame, "mask_mode": "lingbot_chunked", "cache_mode": "metadata_only",
            "video_action_condition_source": "noisy_action", "video_action_attention_scope": "block_local",
        }  # fmt: skip
    c["policy_variant"] |= {"program": program, "hidden_size": hidden} | (policy or {})
    c["training"] |= {
        "enabled_objectives": ["action", "latent"], "chunk_size": chunk, "window_size": window,
        "video_num_train_timesteps": 1000, "action_num_train_timesteps": 1000, "video_sigma_shift": 5.0,
        "trainable_components": trained,
    }  # fmt: skip
    c["inference"] |= {
        "video_num_inference_steps": steps, "action_num_inference_steps": steps, "use_cache": True,
        "frame_chunk_size": chunk, "attention_window_size": window,
    } | (inference or {})  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(c))
        config = load_experiment_config(path)
    torch.manual_seed(seed)
    return build_variant_pipeline_from_config(config)


def train_step(
    pipeline: VariantPipeline,
    *,
    frames: int = 6,
    height: int = 4,
    width: int = 4,
    per_frame: int = 2,
    batch: int = 1,
    text: int = 5,
    metadata: tuple[dict, ...] | None = None,
    action_mask: Tensor | None = None,
    extra: dict | None = None,
    seed: int = 0,
    mixed: bool = False,
) -> dict[str, Tensor]:
    """A forward (``mixed``: under bf16 autocast) and backward; the loss and all gradients, those of the inputs too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    video = normal(batch, CHANNELS, frames, height, width).requires_grad_()
    actions = normal(batch, frames * per_frame, ACTION_DIM).requires_grad_()
    context = normal(batch, text, TEXT_DIM)
    policy_batch = PolicyTrainBatch(
        actions=actions,
        action_mask=action_mask,
        state=normal(batch, 1, STATE_DIM),
        extra={"task_text": None, "metadata": metadata, **(extra or {})},
    )
    pipeline.zero_grad(set_to_none=True)
    torch.manual_seed(seed)  # the package draws timesteps and noise from the global generator
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        output = pipeline.forward_train_from_latents(video, policy_batch, text_context=context)
    loss = output.decoder_output.loss
    loss.backward()
    results = {"loss": loss.detach(), "video": video.grad, "actions": actions.grad}
    results |= {name: p.grad for name, p in pipeline.named_parameters()}
    return {name: value for name, value in results.items() if value is not None}


def rollout(
    pipeline: VariantPipeline,
    chunks: int,
    *,
    height: int = 4,
    width: int = 4,
    batch: int = 1,
    text: int = 5,
    negative_text: bool = False,
    context: Callable[[int], dict] | None = None,
    after: Callable[[int, object], object] | None = None,
    states: Tensor | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Roll out from one observed frame; every chunk's actions, and the clean video and actions that become history.

    ``context(i)`` gives more fields of the i-th PolicyInferContext; ``after(i, session)`` may change the session;
    ``states`` ``[batch, chunks, STATE_DIM]`` come with the requests in place of drawn ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    runner = VariantRolloutRunner(pipeline.eval())
    texts = {"text_context": normal(batch, text, TEXT_DIM)}
    if negative_text:
        texts["negative_text_context"] = normal(batch, text, TEXT_DIM)
    session = runner.reset(**texts)
    frame = normal(batch, CHANNELS, 1, height, width)
    torch.manual_seed(seed)
    results = []
    with torch.no_grad():
        for i in range(chunks):
            fields = {} if context is None else context(i)
            drawn = normal(batch, 1, STATE_DIM)
            request = PolicyInferContext(state=drawn if states is None else states[:, i : i + 1], **fields)
            output = runner.infer_step(session=session, context=request, video_latents=frame)
            session = output.session
            state = session.policy_state.variant_state
            results.append(output.infer_output.decoder_output.action_pred.clone())
            results += [state.past_clean_latents.clone(), state.past_clean_actions.clone()]
            if after is not None:
                session = after(i, session)
    return results
