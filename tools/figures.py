"""The figures of docs/concepts.md, drawn from the code: ``python -m tools.figures`` writes docs/figures/*.svg.

What a figure shows comes from the functions that the kernels and the rollout use, so it changes with them;
``tests/test_figures.py`` compares the stored files with what is drawn. The pictures of masks have a command of their
own, ``wam_models.draw.masks``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from wam_kernels import PROGRAMS, Geometry, TileShape, compile_plan, dense_mask
from wam_kernels.masks.visibility import ACTION, NOISY, SEGMENTS, VIDEO
from wam_kernels.streaming_cache import StreamingCache
from wam_models.draw.masks import KEY_HUES, NAMES
from wam_models.objectives import OBJECTIVES
from wam_models.rollout.config import RolloutConfig
from wam_models.rollout.layout import ChunkLayout

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/figures"
INK, FAINT, PALE = "#1e1e24", "#787882", "#ececf0"
HUES = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in KEY_HUES]  # of the four segments
FULL, LISTED, MASKED = "#2b6cb0", "#d9a441", "#f6e7c8"


class Drawing:
    """An SVG on white paper, so that it can be read on a dark page too."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'font-family="sans-serif" font-size="12"><title>{title}</title>'
            f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>'
        )
        self.items: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str, text: str = "", ink: str = "#fff") -> None:
        self.items.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}"/>')
        if text:
            self.text(x + w / 2, y + h / 2 + 4, text, ink, "middle")

    def boxes(self, corners: Iterable[tuple[float, float, float, float]], fill: str) -> None:
        """Many of one colour as one path: x, y, width, height of each."""
        path = "".join(f"M{x:g} {y:g}h{w:g}v{h:g}h{-w:g}z" for x, y, w, h in corners)
        self.items.append(f'<path d="{path}" fill="{fill}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, ink: str = INK) -> None:
        self.items.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{ink}" stroke-width="1"/>')

    def text(self, x: float, y: float, text: str, ink: str = INK, anchor: str = "start") -> None:
        self.items.append(f'<text x="{x:g}" y="{y:g}" fill="{ink}" text-anchor="{anchor}">{text}</text>')

    def __str__(self) -> str:
        return "\n".join([self.head, *self.items, "</svg>"]) + "\n"


def stretches(present: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], present.astype(int), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def common(program: str) -> Geometry:
    """Six frames in chunks of two, four video tokens and two action tokens a frame."""
    return Geometry(
        program=program, video_frames=6, video_tokens=4, action_frames=6, action_tokens=2, chunk_size=2, window=4
    )


def sample() -> Drawing:
    """The packed sequence: four segments, their frames and chunks."""
    geometry = common("joint")
    scale, left, top = 9.6, 14, 46
    d = Drawing(left * 2 + scale * geometry.length, 150, "One sample, packed as one sequence")
    d.text(left, 20, f"one sample: {geometry.length} tokens, {geometry.video_frames} frames in chunks of 2")
    at = 0
    for (stream, _), name, length, hue in zip(SEGMENTS, NAMES, geometry.segment_lengths, HUES, strict=True):
        per_frame = geometry.video_tokens if stream == VIDEO else geometry.action_tokens
        d.box(left + scale * at, top, scale * length - 1, 30, hue, name)
        for frame in range(geometry.video_frames):
            x = left + scale * (at + frame * per_frame)
            d.box(x, top + 34, scale * per_frame - 1, 18, PALE, str(frame), INK)
            if frame % geometry.chunk_size == 0:
                wide = scale * per_frame * geometry.chunk_size
                d.text(
                    x + wide / 2,
                    top + 70,
                    f"chunk {frame // 2}" if stream == VIDEO else f"{frame // 2}",
                    FAINT,
                    "middle",
                )
                d.line(x, top + 54, x, top + 74, FAINT)
        at += length
    d.text(left, top + 94, "Numbers are latent frames. A token of a clean segment never attends to a noisy one.", FAINT)
    return d


def attends() -> Drawing:
    """What the noisy tokens of the last chunk attend to, under each program."""
    scale, left, row = 8.4, 190, 38
    geometry = common("joint")
    d = Drawing(left + scale * geometry.length + 14, 64 + row * len(PROGRAMS), "What a chunk attends to")
    starts = np.cumsum([0, *geometry.segment_lengths])
    for name, a, b, hue in zip(NAMES, starts[:-1], starts[1:], HUES, strict=True):
        d.text(left + scale * (a + b) / 2, 34, name, hue, "middle")
    d.text(14, 18, f"Keys of the noisy queries of chunk 2 (window {geometry.window}, history {geometry.history})")
    for number, program in enumerate(PROGRAMS):
        mask, y = dense_mask(common(program)), 46 + number * row
        d.text(left - 52, y + 17, program, INK, "end")
        for line, stream in enumerate((VIDEO, ACTION)):
            query = starts[SEGMENTS.index((stream, NOISY)) + 1] - 1  # the last token of the segment
            d.text(left - 6, y + 10 + 14 * line, "video" if stream == VIDEO else "action", FAINT, "end")
            for segment, hue in enumerate(HUES):
                a, b = starts[segment], starts[segment + 1]
                d.box(left + scale * a, y + 14 * line, scale * (b - a) - 1, 11, PALE)
                part = stretches(np.asarray(mask[query, a:b]))
                d.boxes([(left + scale * (a + i), y + 14 * line, scale * (j - i) - 1, 11) for i, j in part], hue)
    return d


def tiles() -> Drawing:
    """The query side of a plan: what each tile computes, and which of it is visible."""
    geometry = Geometry(
        program="joint", video_frames=12, video_tokens=8, action_frames=12, action_tokens=2, chunk_size=4, window=6
    )
    plan = compile_plan(geometry, tile=TileShape(16, 16), impl="triton")
    mask, side, scale, left, top = dense_mask(geometry), plan.queries, 2.6, 14, 44
    full, part, rows = side.full.tolist(), side.part.numpy(), side.rows.numpy()
    count = side.tiles.shape[0]
    d = Drawing(left * 2 + scale * plan.length, top + count * 46 + 40, "Tiles and steps of a plan")
    heading = f"{plan.length} tokens of {geometry.program}: {count} tiles of {side.shape.rows} queries (down),"
    d.text(left, 18, f"{heading} all keys (right)")
    d.text(left, 34, f"efficiency {plan.efficiency:.2f}: visible pairs / computed pairs", FAINT)
    covered, listed, masked = [], [], []
    for number, (_, f0, f1, p0, p1) in enumerate(side.tiles.tolist()):
        y, h = top + number * 46, 42 / side.shape.rows
        d.box(left, y, scale * plan.length, 42, PALE)
        covered += [(left + scale * first, y, scale * side.shape.step, 42) for first in full[f0:f1]]
        tokens = np.zeros(plan.length, bool)
        tokens[part[p0:p1][part[p0:p1] >= 0]] = True
        masked += [(left + scale * a, y, scale * (b - a), 42) for a, b in stretches(tokens)]
        for row, token in enumerate(rows[number]):
            if token >= 0:
                here = stretches(mask[token] & tokens)
                listed += [(left + scale * a, y + row * h, scale * (b - a), h) for a, b in here]
    d.boxes(covered, FULL)
    d.boxes(masked, MASKED)
    d.boxes(listed, LISTED)
    y = top + count * 46 + 8
    for x, fill, text in (
        (0, FULL, "full step, no mask"),
        (150, LISTED, "partial step, visible"),
        (310, MASKED, "computed, masked"),
        (470, PALE, "never read"),
    ):
        d.box(left + x, y, 14, 14, fill)
        d.text(left + x + 20, y + 12, text, FAINT)
    return d


def cache() -> Drawing:
    """The slots of a rollout, chunk after chunk: which frame lies where, and which slots are attended to."""
    config = RolloutConfig(program="joint", chunk_size=2, window=4, steps=1)
    layout = ChunkLayout(config, OBJECTIVES["joint"], 1, (1, 1), 1)
    slots = StreamingCache(
        layers=1,
        batch=1,
        heads=1,
        head_dim=8,
        video_tokens=1,
        action_tokens=1,
        chunk_size=2,
        frames=layout.cached_frames,
        dtype=torch.float32,
        device="cpu",
    )
    size, left, top, row, frames = 21, 172, 58, 30, slots.frames
    firsts = range(1, 16, 2)
    d = Drawing(left + size * slots.length + 60, top + row * len(firsts) + 34, "The streaming cache")
    d.text(14, 18, "Slots of one layer; numbers are frames, coloured ones are attended to by the noisy video queries")
    places = (
        (0, frames, "video ring"),
        (frames, frames, "action ring"),
        (2 * frames, 4, "clean chunk"),
        (2 * frames + 4, 4, "noisy"),
    )
    gap = [14 * k for k in range(4)]
    for (first, count, name), shift in zip(places, gap, strict=True):
        d.text(left + size * (first + count / 2) + shift, 44, name, FAINT, "middle")
    for number, frame in enumerate(firsts):
        y, start = top + number * row, layout.first_visible(frame)
        table = slots.ranges(
            [layout.geometry(start, frame - start)], [start], [frame - start], [2], layout.streams, NOISY
        )
        attended = np.zeros(slots.length, bool)
        for lo, hi in table[0, 0].tolist():
            attended[lo:hi] = True
        holds = {f % frames + ring: f for f in range(max(0, frame - frames), frame) for ring in (0, frames)}
        own = {2 * frames + k: frame + k % 2 for k in range(8)}
        d.text(14, y + 16, f"chunk of frames {frame}, {frame + 1}")
        for (first, count, _), shift in zip(places, gap, strict=True):
            for slot in range(first, first + count):
                action = frames <= slot < 2 * frames or (slot >= 2 * frames and (slot - 2 * frames) % 4 >= 2)
                hue = HUES[(2 if action else 0) + (slot < 2 * frames + 4)]
                text = str({**holds, **own}.get(slot, ""))
                x = left + size * slot + shift
                d.box(x, y, size - 2, 22, hue if attended[slot] else PALE, text, "#fff" if attended[slot] else FAINT)
    d.text(
        14,
        top + row * len(firsts) + 18,
        "Nothing moves: frame f stays in place f mod the ring's length until another takes it.",
        FAINT,
    )
    return d


def pipeline() -> Drawing:
    """The Hopper forward at D = 128, to the scale of the clocks that were counted from its machine code."""
    lines = (ROOT / "bench/results/static.jsonl").read_text().splitlines()
    wanted = {"op": "block_attention", "what": "forward", "arm": "cuda", "D": 128, "step": "full"}
    row = [r for r in map(json.loads, lines) if wanted.items() <= r.items()][-1]
    product, softmax = row["tensor cores_clocks"] / 4, row["MUFU_clocks"] / 2  # two warpgroups, two products a step
    scale, left, top, height, steps = 0.062, 130, 44, 30, 4
    period = 4 * product
    d = Drawing(left + scale * (period * steps + 2 * product) + 20, top + 6 * height + 44, "The Hopper forward")
    tensor, special = row["tensor cores_clocks"], row["MUFU_clocks"]
    d.text(
        14, 20, f"Forward, D = 128, full steps of 128 keys: {tensor} clocks of the tensor cores a step, MUFU {special}"
    )
    for lane, name in enumerate(
        ("copies of K", "copies of V", "1: tensor cores", "1: softmax", "2: tensor cores", "2: softmax")
    ):
        d.text(left - 8, top + lane * height + 17, name, INK, "end")
        d.line(
            left,
            top + lane * height + 26,
            left + scale * (period * steps + 2 * product),
            top + lane * height + 26,
            PALE,
        )

    def put(lane: int, start: float, clocks: float, fill: str, text: str) -> None:
        d.box(left + scale * start, top + lane * height, scale * clocks - 1, 24, fill, text)

    for step in range(steps):
        for lane, letter in enumerate("KV"):
            put(lane, max(0, (step - 0.5) * period), product, FAINT, f"{letter}{step}" if scale * product > 18 else "")
        for group in range(2):
            start = step * period + (1.2 + group * 2) * product
            put(2 + 2 * group, start, product, HUES[1], f"Q K{step}")
            if step:
                put(2 + 2 * group, start + product, product, HUES[3], f"P V{step - 1}")
            put(3 + 2 * group, start + product, softmax, HUES[0], f"P{step}")
    y = top + 6 * height + 16
    d.text(
        14,
        y,
        "A warpgroup issues the scores of a step and the values of the last one together; its softmax runs under the",
        FAINT,
    )
    d.text(
        14,
        y + 16,
        "values, and under the products of the other warpgroup. Nothing of this was timed: csrc/block_attention.",
        FAINT,
    )
    return d


FIGURES = {"sample": sample, "attends": attends, "tiles": tiles, "cache": cache, "pipeline": pipeline}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(str(draw()))


if __name__ == "__main__":
    main()
