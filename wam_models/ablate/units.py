"""What an ablation is made of: a unit is an arm, or a sanity arm, with one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.json_fields import read_json
from .protocol import Protocol

# sanity arms: what is played with the first seed under the first setting, beside the arms
EXPERT, UNTRAINED, SHUFFLED, AGAIN = "sanity_expert", "sanity_untrained", "sanity_shuffled_language", "sanity_again"
SANITY = (EXPERT, UNTRAINED, SHUFFLED, AGAIN)


@dataclass(frozen=True)
class Unit:
    """What one process makes: an arm, or a sanity arm, with one seed."""

    track: str
    arm: str
    seed: int
    settings: tuple[tuple[int, int], ...]  # that it is evaluated under

    def folder(self, out: Path) -> Path:
        return out / self.track / self.arm / f"seed{self.seed}"


def units(protocol: Protocol) -> list[Unit]:
    """In the order in which they are made: all arms of a seed before the next, so that a part of them is balanced; the
    settings after ``track.early`` once every seed is trained."""
    found = []
    for track in protocol.tracks:
        first, early, late = track.seeds[0], track.settings[: track.early], track.settings[track.early :]
        found += [Unit(track.name, name, first, track.settings[:1]) for name in (EXPERT, UNTRAINED)]
        for seed in track.seeds:
            found += [Unit(track.name, arm.name, seed, early) for arm in protocol.arms]
            if seed == first:
                found += [Unit(track.name, name, first, track.settings[:1]) for name in (SHUFFLED, AGAIN)]
        found += [Unit(track.name, arm.name, seed, late) for seed in track.seeds for arm in protocol.arms if late]
    return found


def evaluation_file(folder: Path, setting: Sequence[int]) -> Path:
    """Where the episodes of a setting are."""
    return folder / f"eval-chunk{setting[0]}-steps{setting[1]}.jsonl"


def is_done(out: Path, unit: Unit) -> bool:
    """Whether everything of a unit is there."""
    folder = unit.folder(out)
    held = folder / "train.json"
    if not held.exists():
        return False
    failed = read_json(held).get("failure") is not None
    return failed or all(evaluation_file(folder, setting).exists() for setting in unit.settings)
