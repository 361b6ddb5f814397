"""Small untrained policies: what they do is nonsense, and the same every time."""

import torch

from wam_models import ModelConfig, Policy, RolloutConfig, WordEmbedding, WorldActionModel
from wam_models.data import PatchPCA, StateCodec
from wam_models.rollout.policy import Camera

SIZES = {"hidden": 32, "heads": 2, "head_dim": 16, "layers": 2, "ffn": 32, "action_hidden": 32, "action_ffn": 32}
SIZES |= {"text_dim": 8, "freq_dim": 16, "action_dim": 4, "actions_per_frame": 1}
CONFIG = RolloutConfig(program="joint", chunk_size=2, window=4, steps=2)
UNITS = torch.tensor([0.5, -0.5]), torch.tensor([2.0, 0.25]), torch.ones(2, dtype=torch.bool)


def made(codec, state_dim=0, camera=None, **sizes):
    """Two actions a frame in one token of four numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WorldActionModel(ModelConfig(**SIZES | sizes, latent_channels=codec.channels, state_dim=state_dim))
        for p in model.parameters():  # heads begin as zeros
            torch.nn.init.normal_(p, std=0.2)
        text = WordEmbedding.from_instructions(["lift", "push it"], SIZES["text_dim"])
    states = (torch.zeros(state_dim), torch.full((state_dim,), 0.5)) if state_dim else None
    return Policy(model.eval().requires_grad_(False), text, codec, *UNITS, CONFIG, camera, 2, states)


def of_states():
    """Frames are states of three numbers."""
    return made(StateCodec(torch.zeros(3), torch.ones(3)), patch=(1, 1, 1))


def of_pictures():
    """Pictures of one camera, and a state of three numbers."""
    pictures = torch.randint(0, 256, (40, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return made(
        PatchPCA.fit(pictures, channels=8, patch=4), 3, Camera(name="observation.images.top", height=16, width=16)
    )
