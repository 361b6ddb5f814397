"""What a stop-gradient saves of dk and dv, and a frozen stream of dq too: pairs and tiles of plans, counted, not timed.

    python -m bench.suites stop_gradient

LIBERO geometry, ``joint``. "action to video" is knowledge insulation: keys and values of video get no gradient from
actions, which attend to them. "frozen video": from no query at all, and neither do its queries. Of every form with
tiles (``provider``): those of the key side, the idle ones among them (without a step: only zeros are written), the
pairs that their steps compute, and how many of these are needed; then the same of the tiles for dq. Before anything is
counted, the plan's pairs are compared with the predicate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bench.harness import Options
from bench.rows import Row
from bench.workloads.attention import LIBERO
from wam_kernels import Geometry, Plan, compile_plan, dense_mask, tokens
from wam_kernels.masks.programs import STREAMS

FRAMES = 68
SIZES = ((4, 64), (1, 8))  # chunk size, window
HISTORIES = ("video_only", "full")
STOPPED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "action to video": {"stop_gradient": [("action", "video")]},
    "frozen video": {"frozen": ["video"]},
}


def rows(options: Options) -> Iterable[Row]:
    for history in HISTORIES:
        for chunk, window in SIZES:
            geometry = Geometry(
                program="joint", video_frames=FRAMES, video_tokens=LIBERO[0], action_frames=FRAMES,
                action_tokens=LIBERO[1], chunk_size=chunk, window=window, history=history,
            )  # fmt: skip
            for name, stops in STOPPED.items():
                plan = compile_plan(geometry, **stops)
                _require_pairs(geometry, plan, **stops)
                for provider, form in (("triton", plan), ("cuda", plan.boxes)):
                    keys, dq = form.keys, form.query_gradients
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
                        "dq_tiles": len(dq.tiles),
                        "dq_idle_tiles": dq.idle_tiles,
                        "dq_computed_pairs": dq.computed_pairs,
                        "dq_useful": round(plan.query_gradient_pairs / max(1, dq.computed_pairs), 3),
                    }


def _require_pairs(
    geometry: Geometry, plan: Plan, stop_gradient: Sequence[tuple[str, str]] = (), frozen: Sequence[str] = ()
) -> None:
    stream, visible = np.array(STREAMS)[tokens(geometry).stream], dense_mask(geometry)
    of_queries, of_keys = visible & ~np.isin(stream, frozen)[:, None], visible & ~np.isin(stream, frozen)
    for query, key in stop_gradient:
        of_keys[np.ix_(stream == query, stream == key)] = False
    found, needed = (plan.query_gradient_pairs, plan.gradient_pairs), (of_queries.sum(), of_keys.sum())
    if found != needed:
        raise RuntimeError(
            f"bench: the plan is wrong: {found} pairs with a gradient to queries and to keys, not {needed}"
        )
