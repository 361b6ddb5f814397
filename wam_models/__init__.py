"""A thin model package on top of wam_kernels: the dual-expert world-action model, its training and its rollout."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import load_checkpoint as load_checkpoint
    from .checkpoint import save_checkpoint as save_checkpoint
    from .config import ModelConfig as ModelConfig
    from .config import demo_config as demo_config
    from .config import golden_config as golden_config
    from .config import wan_5b_config as wan_5b_config
    from .config import wan_5b_small_action_config as wan_5b_small_action_config
    from .data import ClipDataset as ClipDataset
    from .data import LeRobotDataset as LeRobotDataset
    from .flow import TimestepDraw as TimestepDraw
    from .model.dual_expert import WorldActionModel as WorldActionModel
    from .objectives import GJD as GJD
    from .objectives import GJD_MIXTURE as GJD_MIXTURE
    from .objectives import MODEL_PROGRAMS as MODEL_PROGRAMS
    from .objectives import OBJECTIVES as OBJECTIVES
    from .rollout.candidates import Candidate as Candidate
    from .rollout.config import RolloutConfig as RolloutConfig
    from .rollout.engine import RolloutEngine as RolloutEngine
    from .rollout.episode import Episode as Episode
    from .rollout.policy import Policy as Policy
    from .rollout.schedule import Schedule as Schedule
    from .state_dicts import load_weights as load_weights
    from .text import WordEmbedding as WordEmbedding
    from .text import umt5_encoder as umt5_encoder
    from .train.samples import StepConfig as StepConfig
    from .train.step import training_step as training_step
    from .weight_files import read_weights as read_weights
    from .weights.convert import Converted as Converted
    from .weights.convert import from_diffusers as from_diffusers
    from .weights.convert import sizes_from as sizes_from
    from .weights.convert import weights_from as weights_from
    from .weights.convert import weights_to as weights_to

# Names load on first use, so that ``wam --help`` and the data tools do not pay for torch.
HOME_OF = {
    "Candidate": "rollout.candidates",
    "Checkpoint": "checkpoint",
    "ClipDataset": "data",
    "Converted": "weights.convert",
    "Episode": "rollout.episode",
    "GJD": "objectives",
    "GJD_MIXTURE": "objectives",
    "LeRobotDataset": "data",
    "MODEL_PROGRAMS": "objectives",
    "ModelConfig": "config",
    "OBJECTIVES": "objectives",
    "Policy": "rollout.policy",
    "RolloutConfig": "rollout.config",
    "Schedule": "rollout.schedule",
    "RolloutEngine": "rollout.engine",
    "TimestepDraw": "flow",
    "StepConfig": "train.samples",
    "WordEmbedding": "text",
    "WorldActionModel": "model.dual_expert",
    "demo_config": "config",
    "from_diffusers": "weights.convert",
    "golden_config": "config",
    "load_checkpoint": "checkpoint",
    "load_weights": "state_dicts",
    "read_weights": "weight_files",
    "save_checkpoint": "checkpoint",
    "sizes_from": "weights.convert",
    "training_step": "train.step",
    "umt5_encoder": "text",
    "wan_5b_config": "config",
    "wan_5b_small_action_config": "config",
    "weights_from": "weights.convert",
    "weights_to": "weights.convert",
}
__all__ = sorted(HOME_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("wam_kernels").__version__
    if name not in HOME_OF:
        raise AttributeError(f"module 'wam_models' has no attribute {name!r}")
    return getattr(import_module(f".{HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
