"""What a stop-gradient saves of dk and dv: pairs and tiles of plans with one, counted; nothing is timed.

    python -m bench.suites stop_gradient

LIBERO geometry, ``joint``. "action to video" is knowledge insulation: keys and values of video get no gradient from
actions, which attend to them. "frozen video": from no query at all. Of every form with tiles (``provider``): those of
the key side, the idle ones among them (without a step: only zeros are written), the pairs that their steps compute, and
how many of these are needed. Before anything is counted, the plan's pairs are compared with the predicate.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bench.harness import Options
from bench.rows import Row
from bench.workloads.attention import LIBERO
from wam_kernels import Geometry, Plan, compile_plan, dense_mask, tokens
from wam_kernels.masks.programs import STREAMS

FRAMES = 68
SIZES = ((4, 64), (1, 8))  # chunk size, window
HISTORIES = ("video_only", "full")
STOPPED = {
    "nothing": (),
    "action to video": (("action", "video"),),
    "frozen video": (("video", "video"), ("action", "video")),
}


def rows(options: Options) -> Iterable[Row]:
    for history in HISTORIES:
        for chunk, window in SIZES:
            geometry = Geometry(
                program="joint", video_frames=FRAMES, video_tokens=LIBERO[0], action_frames=FRAMES,
                action_tokens=LIBERO[1], chunk_size=chunk, window=window, history=history,
            )  # fmt: skip
            for name, pairs in STOPPED.items():
                plan = compile_plan(geometry, stop_gradient=pairs)
                _require_pairs(geometry, plan, pairs)
                for provider, keys in (("triton", plan.keys), ("cuda", plan.boxes.keys)):
                    yield {
                        "counted": True,
                        "workload": f"libero c{chunk} w{window}",
                        "history": history,
                        "tokens": plan.length,
                        "stopped": name,
                        "provider": provider,
                        "visible_pairs": plan.visible_pairs,
                        "skipped_pairs": plan.visible_pairs - plan.gradient_pairs,
                        "key_tiles": len(keys.tiles),
                        "idle_tiles": keys.idle_tiles,
                        "computed_pairs": keys.computed_pairs,
                        "useful": round(plan.gradient_pairs / max(1, keys.computed_pairs), 3),
                    }


def _require_pairs(geometry: Geometry, plan: Plan, pairs: tuple[tuple[str, str], ...]) -> None:
    stream, needed = np.array(STREAMS)[tokens(geometry).stream], dense_mask(geometry)
    for query, key in pairs:
        needed[np.ix_(stream == query, stream == key)] = False
    if plan.gradient_pairs != needed.sum():
        raise RuntimeError(f"bench: the plan is wrong: {plan.gradient_pairs} pairs with a gradient, not {needed.sum()}")
