"""Where an integer belongs: NumPy's are taken, floats, bools and strings are refused by name, never cut off."""

import numpy as np
import pytest
import torch

from tests.geometries import small
from wam_kernels import (
    RULE_PROGRAMS,
    FrameIndex,
    Geometry,
    Ranges,
    StreamingCache,
    TileShape,
    compile_plan,
    plan_from_mask_mod,
    rope_table,
)
from wam_kernels.masks.visibility import CLEAN, VIDEO

GEOMETRY = vars(small(prefix_frames=1))
CACHE = {"layers": 1, "batch": 1, "heads": 2, "head_dim": 8, "video_tokens": 3, "action_tokens": 2, "chunk_size": 2}
CACHE |= {"frames": 4, "dtype": torch.float32, "device": "cpu"}
ONE_ROW = Ranges([(0, 1)], [(0, 1)], 1)


def causal(b, h, q, k):
    return q >= k


def geometry(name: str):
    return lambda n: getattr(Geometry(**GEOMETRY | {name: n}), name)


# (function and argument, what it makes of the integer 2)
PLACES = [
    *(
        (f"Geometry: {name}", geometry(name))
        for name in GEOMETRY
        if name not in ("program", "history", "conditional_history")
    ),
    ("compile_plan: length", lambda n: compile_plan(ONE_ROW, length=n).length),
    ("compile_plan: key_length", lambda n: compile_plan(ONE_ROW, key_length=n).key_length),
    ("compile_plan: length", lambda n: compile_plan(ONE_ROW, length=n).queries.rows.max() + 1),
    ("TileShape: rows", lambda n: TileShape(n, 8).rows),
    ("TileShape: step", lambda n: TileShape(8, n).step),
    ("TileShape: key_rows", lambda n: TileShape(8, 8, n).key_rows),
    ("Ranges: length", lambda n: Ranges([(0, 1)], [(0, 1)], n, 9).length),
    ("Ranges: key_length", lambda n: Ranges([(0, 1)], [(0, 1)], 9, n).key_length),
    ("Ranges: q_ranges", lambda n: Ranges([(0, n)], [(0, 1)], 9).q_ranges[0, 1]),
    ("Ranges: k_ranges", lambda n: Ranges([(0, 1)], [(0, n)], 9).k_ranges[0, 1]),
    (r"FrameIndex.from_runs: lengths\[0\]", lambda n: FrameIndex.from_runs([n]).length),
    (r"FrameIndex.from_runs: rows\[1\]", lambda n: FrameIndex.from_runs([1, 1], [0, n]).frames - 1),
    ("FrameIndex.from_runs: frames", lambda n: FrameIndex.from_runs([1], frames=n).frames),
    (r"FrameIndex.from_tensor: index\[1\]", lambda n: FrameIndex.from_tensor([0, n]).frames - 1),
    ("FrameIndex.from_tensor: frames", lambda n: FrameIndex.from_tensor(torch.tensor([0]), n).frames),
    (r"FrameIndex.from_runs: lengths\[0\]", lambda n: FrameIndex.per_sample(n).length),
    ("FrameIndex.per_token: length", lambda n: FrameIndex.per_token(n).length),
    ("tri_tower: video", lambda n: RULE_PROGRAMS["tri_tower"](video=n, actions=1, understanding=1).length - 2),
    (
        "prefix_suffix: padding",
        lambda n: RULE_PROGRAMS["prefix_suffix"](prefix=4, actions=0, padding=[(n, 4)]).length - 2,
    ),
    ("plan_from_mask_mod: geometry", lambda n: plan_from_mask_mod(causal, (4, n)).key_length),
    ("plan_from_mask_mod: batch", lambda n: plan_from_mask_mod(lambda b, h, q, k: b <= q, 3, batch=n).batch),
    ("plan_from_mask_mod: heads", lambda n: plan_from_mask_mod(causal, 2, heads=n).length),
    ("plan_from_mask_mod: max_length", lambda n: plan_from_mask_mod(causal, 2, max_length=n).length),
    ("rope_table: head_dim", lambda n: rope_table(torch.zeros(1, 3), n).shape[-1]),
    (r"rope_table: split\[0\]", lambda n: rope_table(torch.zeros(1, 3), 6, split=(n, 2, 2)).shape[1] - 1),
    *(
        (f"StreamingCache: {name}", lambda n, name=name: StreamingCache(**CACHE | {name: n}).buffer.shape.count(1) * 2)
        for name in ("layers", "batch")
    ),
    ("StreamingCache: frames", lambda n: StreamingCache(**CACHE | {"frames": n}).frames),
    ("StreamingCache: chunk_size", lambda n: StreamingCache(**CACHE | {"chunk_size": n}).chunk_size),
    (
        r"StreamingCache.ranges: counts\[0\]",
        lambda n: StreamingCache(**CACHE).ranges([small(video_frames=3)], [0], [1], [n], (VIDEO,), CLEAN).shape[-1],
    ),
]
WRONG = [2.0, 2.7, True, "2", None, np.float64(2), np.bool_(True), torch.tensor(2.0)]


@pytest.mark.parametrize("place, make", PLACES, ids=[f"{place}-{i}" for i, (place, _) in enumerate(PLACES)])
def test_integers_of_numpy_are_integers_and_nothing_else_is(place, make):
    for two in (2, np.int64(2), np.uint8(2), torch.tensor(2)):
        assert make(two) == 2
    for wrong in WRONG:
        if wrong is None and place.endswith(("length", "key_rows", "singleton_frame", "frames")):
            continue  # the default
        with pytest.raises(ValueError, match=f"^{place} must be (an int|integers)"):
            make(wrong)
    assert make(2) == 2


@pytest.mark.parametrize("dtype", [torch.int32, None, "float32"])
def test_a_cache_holds_floats(dtype):
    with pytest.raises(ValueError, match="StreamingCache: dtype must be a torch.dtype of floats, got"):
        StreamingCache(**CACHE | {"dtype": dtype})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda n: Geometry(**GEOMETRY | {"video_frames": n}), "Geometry: video_frames must be at most 2147483647"),
        (lambda n: Geometry(**GEOMETRY | {"video_frames": 2**30}), "Geometry: a sample must have at most 2147483647"),
        (lambda n: Ranges([], [], n), "Ranges: length must be at most 2147483647"),
        (lambda n: Ranges([(0, n)], [(0, 1)], 4), r"Ranges: q_ranges\[0\] must be .* <= 4"),
        (lambda n: compile_plan(ONE_ROW, length=n), "compile_plan: length must be at most 2147483647"),
        (lambda n: FrameIndex.from_runs([n]), r"FrameIndex.from_runs: lengths\[0\] must be at most 2147483647"),
        (lambda n: FrameIndex.from_runs([2**30] * 2), "FrameIndex.from_runs: lengths must sum to at most 2147483647"),
        (lambda n: FrameIndex.from_tensor(torch.tensor([n])), r"FrameIndex.from_tensor: index\[0\] must be at most"),
        (lambda n: FrameIndex.per_token(n), "FrameIndex.per_token: length must be at most 2147483647"),
        (
            lambda n: RULE_PROGRAMS["tri_tower"](video=n, actions=1, understanding=1),
            "tri_tower: video must be at most",
        ),
        (
            lambda n: StreamingCache(**CACHE | {"frames": 2**30}),
            "StreamingCache: its slots .* must be at most 2147483647",
        ),
        (lambda n: plan_from_mask_mod(causal, n), "plan_from_mask_mod: geometry must be at most 2147483647"),
    ],
)
def test_more_tokens_than_int32_counts_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(2**31)


@pytest.mark.parametrize("make", [set, dict.fromkeys, bytes], ids=["set", "dict", "bytes"])
def test_a_sequence_of_integers_has_an_order(make):
    with pytest.raises(ValueError, match="from_runs: lengths must be a sequence of ints, got"):
        FrameIndex.from_runs(make([5, 6]))


def test_a_mask_is_not_lost():
    masked = np.ma.masked_array([[0, 4], [4, 6]], mask=[[0, 0], [1, 1]])
    with pytest.raises(ValueError, match="Ranges: k_ranges must not be a masked array"):
        Ranges([(0, 4), (4, 6)], masked, 6)
