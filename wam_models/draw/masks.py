"""A program's visibility as a picture, and what its plan costs.

A pixel block is one (query, key) pair: queries go down, keys go right, in packed order; of the interaction programs
that is ``[V_noisy | V_clean | A_noisy | A_clean]``. The colour tells which of the segments is attended to.
``python -m wam_models.draw.masks`` draws ``docs/masks.png`` and ``docs/programs.png``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from wam_kernels import PROGRAMS, RULE_PROGRAMS, Geometry, RuleGeometry, compile_plan, dense_mask, tokens
from wam_kernels.masks.visibility import SEGMENTS

from .style import FAINT, INK, PAPER, font, save_small

NAMES = ("V_noisy", "V_clean", "A_noisy", "A_clean")
MAX_TOKENS = 6000  # a picture draws every pair, and nobody can tell more apart

MASKED = (243, 243, 246)
# One hue for each segment that is attended to; darker by a noisy query, lighter by a clean one.
KEY_HUES = ((214, 93, 62), (43, 108, 176), (217, 158, 38), (47, 141, 98))
CLEAN_QUERY_TINT = 0.45
# Of the programs of other systems: one hue for each segment of keys, in order.
SEGMENT_HUES = (*KEY_HUES, (128, 90, 168), (90, 90, 100))

# Sizes at which a picture of another system's program can be read.
EXAMPLE_SIZES: dict[str, dict[str, Any]] = {
    "fast_wam_uncond": {"video_frames": 3, "video_tokens": 6, "actions": 6},
    "fast_wam_joint": {"video_frames": 3, "video_tokens": 6, "actions": 6},
    "fast_wam_idm": {"video_frames": 3, "video_tokens": 6, "actions": 6},
    "lingbot_va_train": {"samples": 2, "video_frames": 4, "video_tokens": 3, "action_frames": 4, "action_tokens": 2}
    | {"chunk_size": 1, "window": 4, "padding": 6},
    "lingbot_va_text": {"samples": 2, "video": 9, "actions": 4, "text_tokens": 12, "padding": 6},
    "dreamzero_train": {"video_frames": 7, "video_tokens": 3, "frames_per_block": 2, "action_tokens": 4}
    | {"state_tokens": 2, "window": 3},
    "dreamzero_cached": {"cached": 24, "video": 10, "actions": 5, "states": 1},
    "cosmos_policy": {"frames": 9, "tokens": 4},
    "prefix_suffix": {"prefix": 24, "states": 2, "actions": 10, "padding": ((18, 24),)},
    "tri_tower": {"video": 20, "actions": 8, "understanding": 8},
    "giga_world_policy": {"states": 2, "actions": 8, "reference": 8, "future": 18},
    "seer": {"steps": 3, "context": 6, "foresight": 4, "actions": 2},
    "dream_vla": {"steps": 2, "context": 6, "frames": 4, "depth": 3, "trajectories": 3, "actions": 2},
    "x_wam": {"main": 24, "depth": 12},
    "being_h": {"context": 10, "latents": 6, "actions": 6},
}


def mask_image(geometry: Geometry, pixels: int) -> Image.Image:
    """The bare mask, without labels: RGB, about ``pixels`` wide and high, lines between segments and chunks.

    Raises:
        ValueError: more than ``MAX_TOKENS`` tokens.
    """
    n = geometry.length
    if not 0 < n <= MAX_TOKENS:
        raise ValueError(f"mask picture: tokens must be from 1 to {MAX_TOKENS}, got {n}; take fewer frames or tokens")
    mask = dense_mask(geometry)
    segment = np.repeat(np.arange(4), geometry.segment_lengths)
    colours = np.array(KEY_HUES, dtype=np.float64)
    tinted = colours + (255 - colours) * CLEAN_QUERY_TINT
    clean_query = np.array([noise for _, noise in SEGMENTS])[segment]
    picture = np.where(clean_query[:, None, None] == 1, tinted[segment][None], colours[segment][None])
    picture = np.where(mask[:, :, None], picture, np.array(MASKED, dtype=np.float64)).astype(np.uint8)
    if n * 2 <= pixels:  # whole pixels for each pair
        scale = pixels // n
        image = Image.fromarray(picture).resize((n * scale, n * scale), Image.Resampling.NEAREST)
    else:  # BOX averages pairs, so that thin runs fade instead of vanishing
        image = Image.fromarray(picture).resize((pixels, pixels), Image.Resampling.BOX)
    _lines(image, geometry)
    return image


def _lines(image: Image.Image, geometry: Geometry) -> None:
    draw = ImageDraw.Draw(image, "RGBA")
    size, n = image.width, geometry.length
    chunk = tokens(geometry).chunk
    edges = np.flatnonzero(chunk[1:] != chunk[:-1]) + 1
    segments = np.cumsum(geometry.segment_lengths)[:-1]
    for edge in edges:
        at = round(edge * size / n)
        draw.line([(at, 0), (at, size)], fill=(*INK, 26))
        draw.line([(0, at), (size, at)], fill=(*INK, 26))
    for edge in segments:
        at = round(edge * size / n)
        draw.line([(at, 0), (at, size)], fill=(*INK, 150))
        draw.line([(0, at), (size, at)], fill=(*INK, 150))
    draw.rectangle([0, 0, size - 1, size - 1], outline=(*INK, 150))


def draw_mask(geometry: Geometry, pixels: int = 860) -> Image.Image:
    """The mask with its segments labelled and a title that gives program, chunk, window, history and density."""
    mask = mask_image(geometry, pixels)
    plan = compile_plan(geometry)
    left, top, margin = 92, 100, 16
    image = Image.new("RGB", (left + mask.width + margin, top + mask.height + 46), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((left, 12), geometry.program, font=font(24), fill=INK)
    draw.text((left, 44), _subtitle(geometry, plan.density), font=font(14), fill=FAINT)
    image.paste(mask, (left, top))
    _labels(draw, geometry, mask.width, left, top)
    _legend(draw, left, top + mask.height + 14)
    return image


def _subtitle(geometry: Geometry, density: float) -> str:
    history = geometry.conditional_history or geometry.history
    extras = [f"prefix {geometry.prefix_frames}"] if geometry.prefix_frames else []
    if geometry.singleton_frame is not None:
        extras.append(f"singleton {geometry.singleton_frame}")
    parts = [f"chunk {geometry.chunk_size}", f"window {geometry.window}", f"history {history}", *extras]
    return ",  ".join([*parts, f"density {density:.3f}"])


def _labels(draw: ImageDraw.ImageDraw, geometry: Geometry, size: int, left: int, top: int) -> None:
    """Segment names above (keys) and beside (queries); two rows above, because action segments are narrow."""
    edges = np.concatenate([[0], np.cumsum(geometry.segment_lengths)]) * size / geometry.length
    face, name_width = font(14), 64
    crowded = min(np.diff(edges)) < name_width
    for i, (name, lo, hi) in enumerate(zip(NAMES, edges[:-1], edges[1:], strict=True)):
        middle = (lo + hi) / 2
        draw.text(
            (left + middle, top - (24 if crowded and i == 3 else 8)), name, font=face, fill=KEY_HUES[i], anchor="ms"
        )
        draw.text((left - 10, top + middle), name, font=face, fill=INK, anchor="rm")
    draw.text((10, top - 8), "query / key", font=font(12), fill=FAINT, anchor="ls")


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for name, hue in zip(NAMES, KEY_HUES, strict=True):
        tint = tuple(round(c + (255 - c) * CLEAN_QUERY_TINT) for c in hue)
        both = name.endswith("clean")  # no clean token attends to a noisy one
        draw.rectangle([x, y, x + 11, y + 11], fill=hue)
        if both:
            draw.rectangle([x + 12, y, x + 23, y + 11], fill=tint)
        draw.text((x + (30 if both else 18), y + 6), f"to {name}", font=font(13), fill=INK, anchor="lm")
        x += 148 if both else 136
    draw.text((x, y + 6), "dark: noisy query, light: clean query", font=font(13), fill=FAINT, anchor="lm")


def small_geometry(program: str) -> Geometry:
    """A geometry whose picture can be read: few tokens, a start-up frame, a window that cuts the oldest chunk off."""
    return Geometry(
        program=program,
        video_frames=9,
        video_tokens=4,
        action_frames=9,
        action_tokens=2,
        chunk_size=2,
        window=4,
        chunk_origin=1,
        startup_action_frames=1,
    )


def draw_programs(pixels: int = 324, geometry: Geometry | None = None) -> Image.Image:
    """All interaction programs, three in a row.

    Args:
        pixels: Of one mask.
        geometry: What they have in common; its program is ignored. Default: :func:`small_geometry`.
    """
    common = geometry or small_geometry("joint")
    masks = [mask_image(replace(common, program=p), pixels) for p in PROGRAMS]
    cell, gap, head, top = masks[0].width, 22, 78, 40
    left = 78
    rows = -(-len(PROGRAMS) // 3)
    image = Image.new("RGB", (left + 3 * cell + 2 * gap + 16, top + rows * (head + cell) + 44), PAPER)
    draw = ImageDraw.Draw(image)
    title = (
        f"Which token attends to which: {common.video_frames} frames, chunk {common.chunk_size}, window {common.window}"
    )
    draw.text((left, 14), title, font=font(20), fill=INK)
    note = "queries go down, keys go right"
    draw.text((image.width - 16, 26), note, font=font(14), fill=FAINT, anchor="rm")
    edges = np.concatenate([[0], np.cumsum(common.segment_lengths)]) * cell / common.length
    for i, (program, mask) in enumerate(zip(PROGRAMS, masks, strict=True)):
        geometry = replace(common, program=program)
        x, y = left + i % 3 * (cell + gap), top + i // 3 * (head + cell) + head
        density = compile_plan(geometry).density
        draw.text((x, y - 38), program, font=font(16), fill=INK, anchor="ls")
        draw.text((x + cell, y - 38), f"density {density:.3f}", font=font(13), fill=FAINT, anchor="rs")
        image.paste(mask, (x, y))
        for name, hue, lo, hi in zip(NAMES, KEY_HUES, edges[:-1], edges[1:], strict=True):
            draw.text((x + (lo + hi) / 2, y - 8), name, font=font(12), fill=hue, anchor="ms")
            if i % 3 == 0:
                draw.text((x - 8, y + (lo + hi) / 2), name, font=font(13), fill=INK, anchor="rm")
    _legend(draw, left, image.height - 28)
    return image


def program_image(program: RuleGeometry, pixels: int) -> Image.Image:
    """The bare mask of another system's program, a colour for each segment of keys: RGB, ``pixels`` wide.

    Raises:
        ValueError: more than ``MAX_TOKENS`` tokens.
    """
    most = max(program.length, program.key_length)
    if not 0 < most <= MAX_TOKENS:
        raise ValueError(
            f"mask picture: tokens must be from 1 to {MAX_TOKENS}, got {most}; take fewer frames or tokens"
        )
    segment = np.repeat(program.keys.segment, program.keys.count)
    first = segment.min()  # a rectangular program may number its keys behind its queries
    colours = np.array(SEGMENT_HUES, np.uint8)[(segment - first) % len(SEGMENT_HUES)]
    picture = np.where(program.dense_mask()[:, :, None], colours[None], np.array(MASKED, np.uint8))
    scale = pixels / program.key_length
    size = (pixels, max(1, round(program.length * scale)))
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BOX
    image = Image.fromarray(picture.astype(np.uint8)).resize(size, resample)
    draw = ImageDraw.Draw(image, "RGBA")
    for runs, horizontal in ((program.keys, False), (program.queries, True)):
        ends = runs.count.cumsum()[:-1]
        for end, new_segment in zip(ends, np.diff(runs.segment) != 0, strict=True):
            at, ink = round(end * scale), (*INK, 150 if new_segment else 26)
            draw.line([(0, at), (size[0], at)] if horizontal else [(at, 0), (at, size[1])], fill=ink)
    draw.rectangle([0, 0, size[0] - 1, size[1] - 1], outline=(*INK, 150))
    return image


def draw_systems(pixels: int = 250) -> Image.Image:
    """The programs of other systems, three in a row, at :data:`EXAMPLE_SIZES`."""
    programs = [RULE_PROGRAMS[name](**sizes) for name, sizes in EXAMPLE_SIZES.items() if name != "lingbot_va_text"]
    gap, head, legend = 26, 34, 40
    masks = [program_image(p, pixels) for p in programs]
    rows = [masks[i : i + 3] for i in range(0, len(masks), 3)]
    heights = [max(m.height for m in row) + head + legend for row in rows]
    image = Image.new("RGB", (3 * pixels + 4 * gap, 44 + sum(heights) + 8), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((gap, 14), "Who attends to whom in other systems", font=font(20), fill=INK)
    note = "queries go down, keys go right; colour: the segment of the key"
    draw.text((image.width - gap, 26), note, font=font(13), fill=FAINT, anchor="rm")
    for i, (program, mask) in enumerate(zip(programs, masks, strict=True)):
        x, y = gap + i % 3 * (pixels + gap), 44 + sum(heights[: i // 3])
        draw.text((x, y + head - 8), program.name, font=font(15), fill=INK, anchor="ls")
        density = compile_plan(program).density
        draw.text((x + pixels, y + head - 8), f"density {density:.2f}", font=font(12), fill=FAINT, anchor="rs")
        image.paste(mask, (x, y + head))
        _segment_legend(draw, program, x, y + head + mask.height + 6)
    return image


def _segment_legend(draw: ImageDraw.ImageDraw, program: RuleGeometry, left: int, y: int) -> None:
    first, x = program.keys.segment.min(), float(left)
    for number in np.unique(program.keys.segment):
        name, hue = program.segments[number], SEGMENT_HUES[(number - first) % len(SEGMENT_HUES)]
        width = 16 + draw.textlength(name, font=font(12)) + 8
        if x > left and x + width > left + 258:
            x, y = float(left), y + 16
        draw.rectangle([x, y, x + 10, y + 10], fill=hue)
        draw.text((x + 14, y + 5), name, font=font(12), fill=INK, anchor="lm")
        x += width


def describe(geometry: Geometry | RuleGeometry) -> str:
    """Density, visible pairs, and the plan's tiles and efficiency, as aligned text."""
    plan = compile_plan(geometry)
    if isinstance(geometry, RuleGeometry):
        keys = geometry.keys
        counts = [(n, int(keys.count[keys.segment == i].sum())) for i, n in enumerate(geometry.segments)]
        named = [(name, count) for name, count in counts if count]
    else:
        named = list(zip(NAMES, geometry.segment_lengths, strict=True))
    size = f"{plan.length}" if plan.length == plan.key_length else f"{plan.length} queries, {plan.key_length} keys"
    lines = [
        ("tokens", f"{size}  ({', '.join(f'{name} {count}' for name, count in named)})"),
        ("density", f"{plan.density:.4f}"),
        ("visible pairs", f"{plan.visible_pairs} of {plan.length * plan.key_length}"),
    ]
    for name, side in (("query side", plan.queries), ("key side", plan.keys)):
        steps = f"{side.full.shape[0]} full and {side.part.shape[0]} partial steps"
        useful = plan.visible_pairs / max(1, side.computed_pairs)
        lines.append((name, f"{side.tiles.shape[0]} tiles of {side.shape.rows} rows, {steps}, efficiency {useful:.3f}"))
    return "\n".join(f"{name:<15}{value}" for name, value in lines)


if __name__ == "__main__":
    docs = Path(__file__).parents[2] / "docs"
    save_small(draw_programs(), docs / "masks.png")
    save_small(draw_systems(), docs / "programs.png")
