"""Cosmos Policy on a model of video alone: actions, the future and its value are latent frames, the best of N acts.

    python examples/cosmos_policy.py

A clip is four frames: what is observed, the actions, what they lead to, and what that is worth. To act, N chunks are
denoised from one history, and the one whose own value frame promises most is executed.
"""

from pathlib import Path

import torch

import wam_models as wam
from wam_models.data.latent_frames import ACTIONS, FUTURE, VALUE, from_frame, policy_frames
from wam_models.rollout import best

DATA = Path(__file__).resolve().parents[1] / "data/metaworld_demo"
STEPS, CANDIDATES, DISCOUNT = 30, 8, 0.9

torch.manual_seed(0)
data, draw = wam.ClipDataset(DATA), torch.Generator().manual_seed(0)
sizes = wam.ModelConfig(
    topology="video_only", full_attention=True, hidden=64, heads=4, head_dim=16, layers=2, ffn=256, latent_channels=17,
    text_dim=32, patch=(1, 1, 1), rope_theta=100.0, action_hidden=1, action_ffn=1, action_dim=1, actions_per_frame=1,
)  # fmt: skip
model = wam.WorldActionModel(sizes)
words = wam.WordEmbedding.from_instructions(data.tasks, 32)
optimizer = torch.optim.AdamW([*model.parameters(), *words.parameters()], lr=3e-3)
# one chunk of three frames behind the observed one
step = wam.StepConfig(program="joint", mixture={"joint": 1}, chunk_sizes=(3, 3), windows=(4, 4), noised_history=0.0)

for number in range(STEPS):
    clips = data.sample(32, 2, draw)
    left = torch.tensor([data.length(i) for i in clips["episode"].tolist()]) - clips["start"] - 2
    worth = DISCOUNT**left  # demonstrations end in success
    frames = policy_frames(clips["video"], clips["action"], worth)
    batch = {"video": frames, "text": words([data.tasks[i] for i in clips["task"].tolist()])}
    optimizer.zero_grad()
    loss, _ = wam.training_step(model, batch, draw, step)
    loss.backward()
    optimizer.step()
    print(f"step {number + 1}: loss {loss.item():.3f}")


def frame_of(candidate: wam.Candidate, place: int) -> torch.Tensor:
    assert candidate.video is not None
    return candidate.video[:, :, [place]]


def value(candidate: wam.Candidate) -> torch.Tensor:
    return from_frame(frame_of(candidate, VALUE), 1)[:, 0]


config = wam.RolloutConfig(program="joint", chunk_size=3, steps=5, cache="last_frame", candidates=CANDIDATES)
clip = data.episode(data.held_out[0])
with torch.no_grad():
    text = words([data.tasks[int(clip["task"][0])]])
episode = wam.RolloutEngine(model.eval(), config).start(clip["video"][:, :, :1], text)
for frame in (1, 2):
    chosen = best(episode.propose_many(generator=draw), value)
    actions = from_frame(frame_of(chosen, ACTIONS), clip["action"][0, 0].numel()).view_as(clip["action"][:, 0])
    shown = clip["video"][:, :, [frame]]  # by the camera, once they are executed
    error = (frame_of(chosen, FUTURE) - shown).square().mean().sqrt()
    print(f"value {value(chosen).item():.2f}, actions {list(actions.shape)}, error of the future {error:.2f}")
    episode.observe(shown, None)
