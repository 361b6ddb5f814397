"""Programs that are not the library's own, each of them one row."""

from collections.abc import Iterator
from contextlib import contextmanager

from wam_kernels import Attends, InteractionProgram, register_program, unregister_program

# joint, and noisy actions also attend to their chunk's clean video
JOINT_THEN_ACTION = InteractionProgram(
    "joint_then_action",
    first="video",
    noisy_to_noisy=Attends.ALL,
    noisy_to_clean=Attends.ACTION_TO_VIDEO,
    clean_to_clean=Attends.OWN | Attends.ACTION_TO_VIDEO,
)
# it trains, but on its own answer
RECALL = InteractionProgram("recall", "video", Attends.OWN, Attends.ACTION_TO_ACTION, Attends.OWN)
# joint, and clean tokens of a chunk attend to each other both ways
JOINT_BOTH_WAYS = InteractionProgram("joint_both_ways", "action", Attends.ALL, Attends.NONE, Attends.ALL)
# action_then_video, and clean video does not attend to its chunk's clean action
HANDED_OVER = InteractionProgram("handed_over", "action", Attends.OWN, Attends.VIDEO_TO_ACTION, Attends.OWN)
NEW = (JOINT_THEN_ACTION, RECALL, JOINT_BOTH_WAYS, HANDED_OVER)


@contextmanager
def registered(*programs) -> Iterator[None]:
    """Known by their names inside the block."""
    names = [register_program(program).name for program in programs]
    try:
        yield
    finally:
        for name in names:
            unregister_program(name)
