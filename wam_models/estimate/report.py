"""An estimate as a page of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wam_kernels.masks.visibility import ACTION, VIDEO
from wam_kernels.roofline import Cost, DeviceModel

from ..costs import Sizes, parameters
from .forward import Part


def report(what: str, s: Sizes, parts: Sequence[Part], memory: Mapping[str, int], name: str, on: DeviceModel) -> str:
    """Parameters, tokens, memory, and a table of the parts with FLOPs, bytes, time and what binds it.

    Args:
        what: Whose estimate it is, one line.
        s: Sizes.
        parts: Of one chunk or one training step.
        memory: Bytes by name.
        name: Of the device model.
        on: The device model.
    """
    held = sum(memory.values())
    fits = "fits" if held <= on.memory else f"does not fit into the {on.memory / 1e9:.0f} GB of one {name}"
    lines = [
        f"{what}: all figures are estimated, nothing is measured",
        f"device model   {name}: {on}",
        f"parameters     {parameters(s.model):,}",
        f"tokens         {s.tokens(VIDEO)} video and {s.tokens(ACTION)} action in a frame, {s.text_tokens} of text",
        f"memory         {held / 1e9:.2f} GB, {fits}: "
        + ", ".join(f"{label} {size / 1e9:.2f}" for label, size in memory.items()),
        "",
        f"{'':44}{'times':>6}{'tokens':>8}{'TFLOP':>11}{'GB':>10}{'ms':>10}  bound by",
    ]
    for part in parts:
        lines.append(f"{part.name:44}{part.times:6}{part.tokens:8}{_row(part.cost * part.times, part.ms(on))}"
                     f"  {part.cost.bound(on)}")  # fmt: skip
    lines.append(f"{'all':58}{_row(total(parts), sum(part.ms(on) for part in parts))}  estimated roofline")
    return "\n".join(lines)


def total(parts: Sequence[Part]) -> Cost:
    return sum((part.cost * part.times for part in parts), Cost())


def _row(cost: Cost, ms: float) -> str:
    return f"{(cost.flops + cost.float32_flops) / 1e12:11.4f}{cost.bytes / 1e9:10.3f}{ms:10.3f}"
