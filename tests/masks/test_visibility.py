"""The predicate against every mask recorded from OpenWAM."""

import sys

import numpy as np
import pytest

from tests.golden_masks import load
from wam_kernels import compile_plan
from wam_kernels.masks.visibility import PROGRAMS, Geometry, dense_mask

CASES = load()


def test_recordings_cover_every_program_and_option():
    geometries = [g for _, g, _ in CASES]
    # a program of our own has no recording
    recorded = {g.program for g in geometries}
    assert len(recorded) == 6 and recorded <= set(PROGRAMS)
    assert {kind for kind, _, _ in CASES} == {"plain", "startup", "prefix", "singleton", "conditional", "mixed"}
    assert len(CASES) == 180


@pytest.mark.parametrize("kind", ["plain", "startup", "prefix", "singleton", "conditional", "mixed"])
def test_matches_recorded_masks_bit_for_bit(kind):
    for case_kind, geometry, recorded in CASES:
        if case_kind == kind:
            np.testing.assert_array_equal(dense_mask(geometry), recorded, err_msg=str(geometry))


GOOD = dict(program="joint", video_frames=4, video_tokens=2, action_frames=4, action_tokens=2, chunk_size=2, window=4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"program": "jiont"}, r"program must be one of .*'jiont'"),
        ({"history": "none"}, r"history must be one of .*'none'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"window": 2.5}, "window must be an int, got 2.5"),
        ({"prefix_frames": 5}, "prefix_frames must be at most 4, got 5"),
        ({"startup_action_frames": 5}, "startup_action_frames must be at most 4, got 5"),
        ({"singleton_frame": "0"}, "singleton_frame must be an int, got '0'"),
        ({"conditional_history": "all"}, r"conditional_history must be one of"),
    ],
)
def test_refusals_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        Geometry(**(GOOD | change))


@pytest.mark.parametrize("size", [10**9, sys.maxsize, 2**63])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_window_or_chunk_without_a_limit(program, size):
    for change in ({}, {"chunk_origin": 1}, {"prefix_frames": 1}, {"singleton_frame": 2}):
        for names in (("window",), ("window", "chunk_size")):
            values = GOOD | {"program": program} | change
            unlimited, wide = (Geometry(**values | dict.fromkeys(names, n)) for n in (size, 1000))
            np.testing.assert_array_equal(dense_mask(unlimited), dense_mask(wide))
            np.testing.assert_array_equal(compile_plan(unlimited).mask()[0, 0].numpy(), dense_mask(wide))
            assert compile_plan(unlimited).visible_pairs == dense_mask(wide).sum()
