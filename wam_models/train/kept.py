"""Saves of a run that stay beside the latest: the last few, and the best.

They are hard links to the files of ``checkpoint/``, which a later save replaces and never writes to, so they take no
room of their own until it does; copies where a file system has no links.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..checkpoint import CONFIG, EXTRA, MODEL, TRAINING

KEPT, BEST = "checkpoints", "best"


def keep_save(out: Path, step: int, *, last: int, best: bool) -> None:
    """Keep what ``out/checkpoint`` holds as ``checkpoints/step-<step>``, and drop those that are neither among the last
    nor the best.

    A save that stays is whole at any moment, also where this is stopped.

    Args:
        out: Folder of the run.
        step: Of the save.
        last: How many of the last saves stay.
        best: Whether ``out/best`` is to be this one.

    Raises:
        OSError: no room, or no right to write; the message names the folder.
    """
    if last or best:
        kept = out / KEPT / f"step-{step:08d}"
        try:
            _link(out / "checkpoint", kept)
            if best:
                _point(out / BEST, kept)
        except OSError as error:
            raise OSError(
                f"train: cannot keep {kept}: {error.strerror or error}; earlier saves are unchanged"
            ) from error
    _drop(out, last)


def remove_kept(out: Path) -> None:
    """Remove the best and the last saves of a run."""
    (out / BEST).unlink(missing_ok=True)
    _drop(out, 0)


def _link(checkpoint: Path, kept: Path) -> None:
    part = kept.with_name(f"{kept.name}.part")
    for old in (part, kept):
        _remove(old)
    part.mkdir(parents=True)
    for name in (MODEL, EXTRA, CONFIG, TRAINING):
        source, target = checkpoint / name, part / name
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link_file)
        elif source.exists():
            _link_file(str(source), str(target))
    part.rename(kept)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links; what else is wrong stops the copy too
        shutil.copy2(source, target)


def _point(best: Path, kept: Path) -> None:
    """One rename makes ``best`` a link to another save."""
    part = best.with_name(f"{best.name}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(kept.relative_to(best.parent))
    part.replace(best)


def _drop(out: Path, last: int) -> None:
    folders = sorted(path for path in (out / KEPT).glob("step-*") if path.is_dir())
    whole = [path for path in folders if (path / CONFIG).exists() and path.suffix != ".part"]
    stay = {*whole[len(whole) - min(last, len(whole)) :], (out / BEST).resolve()}
    for path in folders:
        if path not in stay and path.resolve() not in stay:
            _remove(path)


def _remove(path: Path) -> None:
    if path.exists():
        (path / CONFIG).unlink(missing_ok=True)  # without it, what is left of it is none
        shutil.rmtree(path)
