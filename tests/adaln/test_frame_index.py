"""FrameIndex: its tensors against a plain loop, its cache, its refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wam_kernels.frame_index import SEGMENT, FrameIndex


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), max_size=12), st.integers(0, 3))
def test_segments_cover_the_tokens_in_order(runs, spare):
    lengths, rows = [n for n, _ in runs], [r for _, r in runs]
    index = FrameIndex.from_runs(lengths, rows, max(rows, default=-1) + 1 + spare)
    row_of_token = [r for n, r in runs for _ in range(n)]
    assert index.row_of_token.tolist() == row_of_token and index.length == len(row_of_token)
    token, segments = 0, index.segments.tolist()
    for first, end, row in segments:
        assert first == token and 0 < end - first <= SEGMENT
        assert row_of_token[first:end] == [row] * (end - first)
        # a segment ends where it is full or its row does
        assert end - first == SEGMENT or end == len(row_of_token) or row_of_token[end] != row
        token = end
    assert token == len(row_of_token)
    begin = index.row_begin.tolist()
    assert len(begin) == index.frames + 1 and begin[0] == 0 and begin[-1] == len(segments)
    for f in range(index.frames):
        assert index.row_segments[begin[f] : begin[f + 1]].tolist() == [i for i, s in enumerate(segments) if s[2] == f]
    for t in index.tensors():
        assert t.dtype == torch.int32 and t.is_contiguous() and t.data_ptr() % 16 == 0


def test_constructors_agree():
    by_value = FrameIndex.from_tensor(torch.tensor([0, 0, 2, 1], dtype=torch.int64))
    by_runs = FrameIndex.from_runs([2, 1, 1], [0, 2, 1])
    assert all(torch.equal(a, b) for a, b in zip(by_value.tensors(), by_runs.tensors(), strict=True))
    assert FrameIndex.per_sample(3).row_of_token.tolist() == [0, 0, 0] and FrameIndex.per_sample(3).frames == 1
    assert FrameIndex.per_token(3).row_of_token.tolist() == [0, 1, 2] and FrameIndex.per_token(3).frames == 3
    assert FrameIndex.per_sample(0).frames == 1 and FrameIndex.per_token(0).frames == 0


@pytest.mark.parametrize(
    "index, run",
    [
        (FrameIndex.from_runs([4, 4, 4]), 4),
        (FrameIndex.from_runs([2, 2, 4], [0, 0, 1]), 4),
        (FrameIndex.per_token(3), 1),
        (FrameIndex.from_runs([4, 5]), 0),
        (FrameIndex.from_runs([4, 4], [1, 0]), 0),
        (FrameIndex.from_runs([4, 4], frames=4), 0),
        (FrameIndex.from_runs([4, 4, 4], [0, 1, 0]), 0),
        (FrameIndex.from_runs([0, 0]), 0),
        (FrameIndex.from_runs([]), 0),
    ],
)
def test_run_is_of_rows_in_order_and_of_one_length(index, run):
    assert index.run.tolist() == [run]


def test_built_once_and_moved_in_one_buffer():
    index = FrameIndex.from_runs([4, 5])
    assert FrameIndex.from_runs([4, 5]) is index and index.to("cpu") is index
    moved = index.to("meta")
    assert moved.device.type == "meta" and [t.shape for t in moved.tensors()] == [t.shape for t in index.tensors()]
    assert len({t.untyped_storage().data_ptr() for t in index.tensors()}) == 1
    assert repr(index) == "FrameIndex(length=9, frames=2, segments=2, device=cpu)"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FrameIndex.from_runs([3, -1]), r"from_runs: lengths\[1\] must be at least 0, got -1"),
        (lambda: FrameIndex.from_runs([3], [-2]), r"from_runs: rows\[0\] must be at least 0, got -2"),
        (lambda: FrameIndex.from_runs([3, 4], [0]), "rows must have one entry for each of 2 lengths, got 1"),
        (lambda: FrameIndex.from_runs([3, 4], frames=1), r"frames must be at least 2 \(the highest row \+ 1\), got 1"),
        (lambda: FrameIndex.from_tensor(torch.zeros(3)), "index must be integers, got torch.float32"),
        (lambda: FrameIndex.from_tensor(torch.zeros(3, 1).int()), r"index must have shape \[n\], got \[3, 1\]"),
        (lambda: FrameIndex.from_tensor(torch.tensor([0, -1])), r"from_tensor: index\[1\] must be at least 0, got -1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
