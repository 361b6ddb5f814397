"""Who attends to whom in each preset, written out by hand, and where the system's own rule has the same tokens.

Three frames, of which the first is observed: in two chunks of one frame, or one chunk of two. A token stands for all
of its frame. ``V0`` is the observed frame; ``v1`` and ``a1`` are noisy video and actions of frame 1, ``V1`` and ``A1``
their clean copies; ``S1`` is the state of the chunk that begins with frame 1, ``C`` a token of context, as a register.
Lines are queries, columns keys, in the same order.
Tokens without a part in what a chunk is made of are left out: the noisy copy of the observed frame, actions of it, and
the clean copy of the last chunk where nobody attends to it.
"""

from typing import Any, NamedTuple

import numpy as np


class Mask(NamedTuple):
    chunk: int  # frames of one
    rows: str  # the tokens in the first line, then a line for each
    system: str | None = None  # name of its rule among RULE_PROGRAMS
    sizes: dict[str, Any] = {}
    tokens: str = ""  # names of the rule's tokens; several may be one of ours, ``-`` is none of ours
    full: bool = False  # one copy of each stream, all of which attend to all: ``V0`` is a frame of the noisy copy

    @property
    def names(self) -> list[str]:
        return self.rows.split("\n")[1].split()

    def places(self, names: list[str]) -> list[int]:
        return [self.names.index(name) for name in names]

    @property
    def matrix(self) -> np.ndarray:
        lines = [line.split() for line in self.rows.strip("\n").split("\n")[1:]]
        assert [line[0] for line in lines] == self.names
        return np.array([[c == "1" for c in line[1:]] for line in lines])


JOINT = """
    V0 v1 V1 v2 a1 A1 a2
 V0  1  .  .  .  .  .  .
 v1  1  1  .  .  1  .  .
 V1  1  .  1  .  .  .  .
 v2  1  .  1  1  .  .  1
 a1  1  1  .  .  1  .  .
 A1  1  .  1  .  .  1  .
 a2  1  .  1  1  .  .  1
"""
# the video attends to earlier video and actions, then actions to its clean copy too
VIDEO_FIRST = """
    V0 v1 V1 v2 V2 a1 A1 a2
 V0  1  .  .  .  .  .  .  .
 v1  1  1  .  .  .  .  .  .
 V1  1  .  1  .  .  .  .  .
 v2  1  .  1  1  .  .  1  .
 V2  1  .  1  .  1  .  1  .
 a1  1  .  1  .  .  1  .  .
 A1  1  .  1  .  .  .  1  .
 a2  1  .  1  .  1  .  1  1
"""
MASKS = {
    "openwam": Mask(1, JOINT),
    "openwam_parallel": Mask(1, JOINT),
    "fast_wam_uncond": Mask(
        2,
        """
    V0 v1 v2 a1 a2
 V0  1  .  .  .  .
 v1  1  1  1  .  .
 v2  1  1  1  .  .
 a1  1  .  .  1  1
 a2  1  .  .  1  1
""",
        "fast_wam_uncond", {"video_frames": 3, "video_tokens": 1, "actions": 2}, "V0 v1 v2 a1 a2",
    ),
    "fast_wam_joint": Mask(
        2,
        """
    V0 v1 v2 a1 a2
 V0  1  .  .  .  .
 v1  1  1  1  .  .
 v2  1  1  1  .  .
 a1  1  1  1  1  1
 a2  1  1  1  1  1
""",
        "fast_wam_joint", {"video_frames": 3, "video_tokens": 1, "actions": 2}, "V0 v1 v2 a1 a2",
    ),
    "fast_wam_idm": Mask(
        2,
        """
    V0 v1 v2 V1 V2 a1 a2
 V0  1  .  .  .  .  .  .
 v1  1  1  1  .  .  .  .
 v2  1  1  1  .  .  .  .
 V1  1  .  .  1  1  .  .
 V2  1  .  .  1  1  .  .
 a1  1  .  .  1  1  1  1
 a2  1  .  .  1  1  1  1
""",
        "fast_wam_idm", {"video_frames": 3, "video_tokens": 1, "actions": 2}, "V0 v1 v2 V0 V1 V2 a1 a2",
    ),
    "lingbot_va": Mask(
        1, VIDEO_FIRST,
        "lingbot_va_train",
        {"samples": 1, "video_frames": 3, "video_tokens": 1, "action_frames": 3, "action_tokens": 1}
        | {"chunk_size": 1, "window": 64},
        "- v1 v2 V0 V1 V2 - a1 a2 - A1 -",
    ),
    "dreamzero": Mask(
        1, """
    V0 v1 V1 v2 a1 a2 S1 S2
 V0  1  .  .  .  .  .  .  .
 v1  1  1  .  .  1  .  1  .
 V1  1  .  1  .  .  .  .  .
 v2  1  .  1  1  .  1  .  1
 a1  1  1  .  .  1  .  1  .
 a2  1  .  1  1  .  1  .  1
 S1  .  .  .  .  .  .  1  .
 S2  .  .  .  .  .  .  .  1
""",
        "dreamzero_train",
        {"video_frames": 3, "video_tokens": 1, "frames_per_block": 1, "action_tokens": 1, "state_tokens": 1}
        | {"window": 9},
        "V0 V1 - - v1 v2 a1 a2 S1 S2",
    ),
}  # fmt: skip
MASKS["openwam_gjd"] = MASKS["openwam"]
WITH_CONTEXT = """
    V0 v1 v2 a1 a2  C
 V0  1  1  1  1  1  1
 v1  1  1  1  1  1  1
 v2  1  1  1  1  1  1
 a1  1  1  1  1  1  1
 a2  1  1  1  1  1  1
  C  1  1  1  1  1  1
"""
WITH_STATE = """
    V0 v1 v2 a1 a2  C S1
 V0  1  1  1  1  1  1  1
 v1  1  1  1  1  1  1  1
 v2  1  1  1  1  1  1  1
 a1  1  1  1  1  1  1  1
 a2  1  1  1  1  1  1  1
  C  1  1  1  1  1  1  1
 S1  1  1  1  1  1  1  1
"""
ONE_CHUNK = """
    V0 v1 v2 a1 a2
 V0  1  1  1  1  1
 v1  1  1  1  1  1
 v2  1  1  1  1  1
 a1  1  1  1  1  1
 a2  1  1  1  1  1
"""
THREE = {"video": 3, "actions": 2, "understanding": 1}
MASKS |= {
    "motus": Mask(2, WITH_STATE, "tri_tower", THREE | {"actions": 3}, "V0 v1 v2 S1 a1 a2 C", full=True),
    "uwm": Mask(2, WITH_CONTEXT, "tri_tower", THREE, "V0 v1 v2 a1 a2 C", full=True),
    "pad": Mask(2, ONE_CHUNK, "tri_tower", THREE | {"understanding": 0}, "V0 v1 v2 a1 a2", full=True),
    "x_wam": Mask(2, ONE_CHUNK, "tri_tower", THREE | {"understanding": 0}, "V0 v1 v2 a1 a2", full=True),
    # self-attention beside the bridge, and a cascade: as two programs of Fast-WAM
    "vpp": Mask(2, MASKS["fast_wam_uncond"].rows),
    "dit4dit": Mask(2, MASKS["fast_wam_uncond"].rows),
    "unipi": Mask(2, MASKS["fast_wam_idm"].rows),
    "giga_world_policy": Mask(
        2,
        """
    V0 v1 v2 a1 a2
 V0  1  .  .  .  .
 v1  1  1  1  1  1
 v2  1  1  1  1  1
 a1  1  .  .  1  1
 a2  1  .  .  1  1
""",
        "giga_world_policy", {"states": 0, "actions": 2, "reference": 1, "future": 2}, "a1 a2 V0 v1 v2",
    ),
}  # fmt: skip
