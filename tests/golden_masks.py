"""The visibility masks recorded from OpenWAM, as (Geometry, bool mask) pairs."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np

from wam_kernels.masks.visibility import Geometry

GOLDEN = Path(__file__).parent / "golden"


def _geometry(case: dict) -> Geometry:
    valid = case["valid_action"]
    startup = 0 if valid is None else int(np.argmax(valid))
    # the recordings only ever invalidate whole leading frames, which is all that Geometry can say
    assert valid is None or all(valid[startup:]) and not any(valid[:startup])
    assert startup % case["action_tokens_per_frame"] == 0
    return Geometry(
        program=case["program"],
        video_frames=case["num_video_frames"],
        video_tokens=case["video_tokens_per_frame"],
        action_frames=case["num_action_frames"],
        action_tokens=case["action_tokens_per_frame"],
        chunk_size=case["chunk_size_frames"],
        window=case["attention_window_size"],
        history=case["history_stream_visibility"],
        chunk_origin=case["chunk_origin_frame"],
        prefix_frames=case["prefix_condition_frames"],
        singleton_frame=case["singleton_chunk_frame"],
        conditional_history=case["conditional_history_policy"],
        startup_action_frames=startup // case["action_tokens_per_frame"],
    )


def load() -> list[tuple[str, Geometry, np.ndarray]]:
    """``(kind, geometry, mask [S, S])`` of all 180 recordings."""
    out = []
    for case in json.loads((GOLDEN / "visibility.json").read_text())["cases"]:
        n = case["tokens"]
        bits = np.frombuffer(zlib.decompress(base64.b64decode(case["mask"])), np.uint8)
        mask = np.unpackbits(bits, count=n * n).reshape(n, n).astype(bool)
        assert mask.sum() == case["visible_pairs"]
        out.append((case["kind"], _geometry(case), mask))
    return out
