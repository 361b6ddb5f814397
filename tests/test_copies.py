"""What a plan is made of, copied and pickled: equal, independent, no larger than it must be, and plain in any mode."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.geometries import small
from wam_kernels import RULE_PROGRAMS, FrameIndex, Plan, Ranges, RuleGeometry, StreamingCache, TileShape, compile_plan
from wam_kernels.masks.rules import Runs
from wam_kernels.plan import Side

BIG = small(video_frames=40, action_frames=40, video_tokens=20)


def everything(q: Runs, k: Runs) -> np.ndarray:
    return q.segment >= k.segment


def own_program() -> RuleGeometry:
    runs = Runs(*np.arange(10).reshape(5, 2))
    return RuleGeometry("own", ("a", "b"), runs, runs, everything)


def cache() -> StreamingCache:
    sizes = {"layers": 2, "batch": 1, "heads": 2, "head_dim": 8, "video_tokens": 3, "action_tokens": 2}
    made = StreamingCache(**sizes, chunk_size=1, frames=2, dtype=torch.float32, device="cpu")
    made.buffer.copy_(torch.arange(float(made.buffer.numel())).view(made.buffer.shape))
    return made


OBJECTS = {
    "Plan": lambda: compile_plan([[small(), Ranges([(0, 4)], [(1, 3)], 4)], [small(window=2)]]),
    "Plan-rectangular": lambda: compile_plan(Ranges([(0, 4)], [(0, 5)], 4, 9), tile=TileShape(8, 8, 16)),
    "Plan-of-a-program": lambda: compile_plan(RULE_PROGRAMS["tri_tower"](video=3, actions=2, understanding=1)),
    "Plan-on-meta": lambda: compile_plan(small(), device="meta"),
    "Side": lambda: compile_plan(small()).queries,
    "FrameIndex": lambda: FrameIndex.from_runs([2, 0, 3], [0, 1, 1]),
    "Geometry": small,
    "Ranges": lambda: Ranges([(0, 4), (1, 3)], [(0, 5), (2, 9)], 4, 9),
    "RuleGeometry": lambda: RULE_PROGRAMS["prefix_suffix"](prefix=5, actions=2, padding=((1, 2),)),
    "RuleGeometry-own": own_program,
    "TileShape": lambda: TileShape(8, 16),
    "StreamingCache": cache,
    "RULE_PROGRAMS": lambda: RULE_PROGRAMS["fast_wam_joint"],
    "dict-of-programs": lambda: RULE_PROGRAMS,
}
WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "worker": lambda made: pickle.loads(ForkingPickler.dumps(made)),  # what a DataLoader's workers send and receive
}


def parts(made) -> list:
    """What two equal objects have in common; tensors last."""
    if isinstance(made, Plan):
        sides = [side.shape for side in (made.queries, made.keys)]
        tensors = dict.fromkeys(made.tensors())  # each once: without frozen queries dq has the forward's tiles
        return [made.geometries, made.length, made.key_length, made.visible_pairs, *sides, *tensors]
    if isinstance(made, Side):
        return [made.shape, *made.tensors()]
    if isinstance(made, FrameIndex):
        return [made.length, made.frames, *made.tensors()]
    if isinstance(made, RuleGeometry):
        return [made.name, made.segments, made.length, made.key_length, made.sizes, made.ranges]
    if isinstance(made, StreamingCache):
        return [*(value for name, value in vars(made).items() if name != "buffer"), made.buffer]
    return [made]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_copies_are_equal_and_independent(make, way):
    made = make()
    again = way(made)
    assert type(again) is type(made)
    for a, b in zip(parts(made), parts(again), strict=True):
        if not isinstance(a, Tensor):
            assert a == b
        elif a.device.type == "meta":
            assert b.device.type == "meta" and a.shape == b.shape
        else:
            assert torch.equal(a, b)
            if way in (copy.deepcopy, WAYS["pickle"]):  # a worker's tensors stay in shared memory
                b.add_(1)
                assert not a.numel() or not torch.equal(a, b)
    if isinstance(again, Ranges):
        with pytest.raises(ValueError, match="read-only"):
            again.q_ranges[0, 0] = 1


@pytest.mark.parametrize("make", [lambda: compile_plan([BIG] * 8, impl="triton"), lambda: FrameIndex.per_token(5000)])
def test_a_pickle_is_about_as_large_as_the_buffer(make):
    made = make()
    assert len(pickle.dumps(made)) < sum(t.nbytes for t in made.tensors()) + 4096


def test_a_side_is_pickled_without_the_rest_of_the_plan():
    side = compile_plan([BIG] * 8).keys
    assert len(pickle.dumps(side)) < sum(t.nbytes for t in side.tensors()) + 16384


@pytest.mark.parametrize("name", ["Plan", "FrameIndex", "Side", "StreamingCache"])
def test_copies_made_in_inference_mode_are_plain(name):
    made = OBJECTS[name]()
    with torch.inference_mode():
        copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    assert not any(isinstance(t, Tensor) and t.is_inference() for again in copies for t in parts(again))
