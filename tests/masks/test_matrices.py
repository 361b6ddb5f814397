"""Every program against its mask, written out by hand: the predicate derives from the row, so it cannot tell."""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.plan.test_plan import mask_of_side
from tests.programs import JOINT_THEN_ACTION, registered
from wam_kernels import Geometry, compile_plan, dense_mask
from wam_kernels.masks.programs import TABLE

ROOT = Path(__file__).parents[2]

# Two frames, chunks of one frame, one token of either stream a frame, full history:
# V_noisy | V_clean | A_noisy | A_clean, row = query, column = key.
MASKS = {
    "video_then_action": """
    10 00 00 00
    01 10 00 10
    00 10 00 00
    00 11 00 10
    00 10 10 00
    00 11 01 10
    00 10 00 10
    00 11 00 11
""",
    "action_then_video": """
    10 00 00 10
    01 10 00 11
    00 10 00 10
    00 11 00 11
    00 00 10 00
    00 10 01 10
    00 00 00 10
    00 10 00 11
""",
    "joint": """
    10 00 10 00
    01 10 01 10
    00 10 00 00
    00 11 00 10
    10 00 10 00
    01 10 01 10
    00 10 00 10
    00 11 00 11
""",
    "decoupled_same_step": """
    10 00 00 00
    01 10 00 10
    00 10 00 00
    00 11 00 10
    00 00 10 00
    00 10 01 10
    00 00 00 10
    00 10 00 11
""",
    "video_noisy_to_action": """
    10 00 00 00
    01 10 00 10
    00 10 00 00
    00 11 00 10
    10 00 10 00
    01 10 01 10
    00 10 00 10
    00 11 00 11
""",
    "action_noisy_to_video": """
    10 00 10 00
    01 10 01 10
    00 10 00 10
    00 11 00 11
    00 00 10 00
    00 10 01 10
    00 00 00 10
    00 10 00 11
""",
    "joint_then_action": """
    10 00 10 00
    01 10 01 10
    00 10 00 00
    00 11 00 10
    10 10 10 00
    01 11 01 10
    00 10 00 10
    00 11 00 11
""",
}


def test_every_row_of_the_table_is_written_out():
    assert set(MASKS) == {row.name for row in TABLE} | {JOINT_THEN_ACTION.name}


@pytest.mark.parametrize("name", MASKS)
def test_masks_written_out(name):
    expected = np.array([[c == "1" for c in line if c != " "] for line in MASKS[name].strip("\n").split("\n")[:8]])
    with registered(JOINT_THEN_ACTION) if name == JOINT_THEN_ACTION.name else nullcontext():
        geometry = Geometry(
            program=name, history="full", video_frames=2, video_tokens=1, action_frames=2, action_tokens=1,
            chunk_size=1, window=9,
        )  # fmt: skip
        np.testing.assert_array_equal(dense_mask(geometry), expected)
        plan = compile_plan(geometry)
        np.testing.assert_array_equal(mask_of_side(plan.queries, 1, 8)[0], expected)
        np.testing.assert_array_equal(mask_of_side(plan.keys, 1, 8)[0], expected.T)


WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md", "wam_kernels/block_attention/README.md"])
def test_pages_count_the_programs_of_the_table(page):
    text = (ROOT / page).read_text()
    counts = re.findall(rf"\b({'|'.join(WORDS)}|\d+) (?:interaction |OpenWAM )?programs\b", text, re.IGNORECASE)
    assert {count.lower() for count in counts} <= {WORDS[len(TABLE)]}
    assert page != "README.md" or counts
