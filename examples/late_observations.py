"""A streaming rollout whose observations come late: the policy goes on from its own prediction until they do.

    python examples/late_observations.py

The robot executes chunk 0 while chunk 1 is imagined on top of what chunk 0 should lead to. Then the camera's frames of
chunk 0 arrive; they replace the prediction, and the next chunk starts from the truth.
"""

import torch

from wam_models import RolloutConfig, RolloutEngine, WorldActionModel, demo_config

torch.manual_seed(0)
model = WorldActionModel(demo_config()).eval()  # not trained; one that is: Policy.load("runs/demo/checkpoint")[0].model
world = torch.randn(1, 48, 9, 4, 8)  # what the camera will show: latents [B, C, frames, y, x]
text = torch.randn(1, 6, 64)  # embedded instruction

# lookahead: chunks that may be accepted beyond the last observation and still be replaced
engine = RolloutEngine(model, RolloutConfig(program="joint", chunk_size=2, window=8, steps=2, lookahead=2))
episode = engine.start(world[:, :, :1], text)
noise = torch.Generator().manual_seed(0)
waiting = []  # (first frame, actions) of chunks that the robot executes and nobody has looked at yet

for turn in range(4):
    first = episode.next_frame[0]
    candidate = episode.propose(generator=noise)  # leaves no trace
    episode.accept(candidate)  # imagine on, while the robot executes candidate.action
    waiting.append((first, candidate.action))
    print(f"turn {turn}: acting on frames {first} and {first + 1}, observed up to frame {episode.observed[0] - 1}")
    if turn % 2:  # the camera is one turn late: now the frames of the chunk before are here
        first, executed = waiting.pop(0)
        episode.observe(world[:, :, first : first + 2], executed, first_frame=first)
        waiting.clear()  # what was imagined after them is dropped: it was imagined from a wrong past
        print(f"        frames {first} and {first + 1} arrived; the next chunk begins at {episode.next_frame[0]}")

assert episode.observed == [5] and episode.next_frame == [5]
try:
    episode.observe(world[:, :, 1:3], executed, first_frame=1)  # the same frames again
except ValueError as error:
    print(f"refused: {error}")
