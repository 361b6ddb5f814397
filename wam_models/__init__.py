"""A thin model package on top of wam_kernels: the dual-expert world-action model, its training and its rollout."""

from importlib import import_module

# Names load on first use, so that ``wam --help`` and the data tools do not pay for torch.
_HOME = {
    "Candidate": "rollout.episode",
    "Checkpoint": "model.checkpoint",
    "ClipDataset": "data",
    "Episode": "rollout.episode",
    "GJD": "objectives",
    "GJD_MIXTURE": "objectives",
    "LeRobotDataset": "data",
    "MODEL_PROGRAMS": "objectives",
    "ModelConfig": "config",
    "OBJECTIVES": "objectives",
    "Policy": "rollout.policy",
    "RolloutConfig": "rollout.config",
    "RolloutEngine": "rollout.episode",
    "TimestepDraw": "flow",
    "TrainingConfig": "train.step",
    "WordEmbedding": "text",
    "WorldActionModel": "model.dual_expert",
    "demo_config": "config",
    "from_diffusers": "model.weights",
    "golden_config": "config",
    "load_checkpoint": "model.checkpoint",
    "load_weights": "model.weights",
    "read_weights": "model.weights",
    "save_checkpoint": "model.checkpoint",
    "training_step": "train.step",
    "umt5_encoder": "text",
    "wan_5b_config": "config",
    "wan_5b_small_action_config": "config",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name == "__version__":
        return import_module("wam_kernels").__version__
    if name not in _HOME:
        raise AttributeError(f"module 'wam_models' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
