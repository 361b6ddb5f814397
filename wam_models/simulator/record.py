"""Data sets from the scripted experts of simulators: what ``wam record`` does.

Demonstrations start a few random actions away from the initial state, and many are interrupted by random actions. Only
the expert's own actions are recorded: an interruption ends an episode of the data set, and another begins after it. So
recovery is demonstrated, and no label is random.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.writer import Recorded, write_lerobot
from ..runtime.checks import check_field, number, whole, whole_range
from ..runtime.files import new_file
from ..runtime.json_fields import read_json
from .named import file_name
from .process import TIMEOUT, Description, SimulatorFailure, SimulatorProcess, first_answer

SETTINGS = Path("meta/wam_record.json")  # of a data set: what it was recorded with
MOST_ATTEMPTS = 4  # for each demonstration that is asked for; an expert that fails more often is none
MOST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What is recorded of each simulator.

    Args:
        episodes: Successful demonstrations for the split ``train``.
        held_out: Further ones, for the split ``held_out``.
        seed: Of initial states and random actions.
        start: Fewest and most random actions before a demonstration; one action, repeated.
        interrupted: Probability that a demonstration is interrupted.
        interrupt_after: Fewest and most recorded actions before that.
        interruption: Fewest and most random actions then; one action, repeated.
        tail: Actions that are recorded after success.
        picture_every: Actions from one picture of a camera to the next; those between are recorded with the last one,
            as a camera that is slower than the actions leaves it. A training frame must be a multiple of it long.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    episodes: int = 50
    held_out: int = 0
    seed: int = 0
    start: tuple[int, int] = (0, 14)
    interrupted: float = 0.6
    interrupt_after: tuple[int, int] = (5, 49)
    interruption: tuple[int, int] = (3, 11)
    tail: int = 9
    picture_every: int = 1

    def __post_init__(self) -> None:
        check_field(self, "episodes", whole, 1, MOST)
        for name in ("held_out", "seed", "tail"):
            check_field(self, name, whole, 0, MOST)
        for name in ("start", "interrupt_after", "interruption"):
            check_field(self, name, whole_range, 0, MOST)
        check_field(self, "picture_every", whole, 1, MOST)
        check_field(self, "interrupted", number, 0, 1)


def record(
    out: Path,
    names: Sequence[str],
    config: RecordConfig,
    *,
    cameras: dict[str, tuple[int, int]] | None = None,
    jobs: int | None = None,
    timeout: float = TIMEOUT,
    overwrite: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, tuple[int, int]]:
    """Record a LeRobot v3 data set; what an interrupted call has done, the next one with the same arguments keeps.

    Args:
        out: Folder of the data set. Attempts are kept in ``OUT.attempts`` until it is complete.
        names: Simulators, as :func:`~.named.load` takes them; one robot, so of the same actions and states.
        config: How many demonstrations of each, and how they are disturbed.
        cameras: Camera to (height, width), each a feature of the data set. A simulator of ``module:factory`` decides
            itself what it renders, which must be these; without ``cameras`` everything that it renders is recorded.
        jobs: Processes; default: the machine's cores.
        timeout: Seconds that a demonstration may take.
        overwrite: Whether what ``out`` and ``OUT.attempts`` hold may be lost.
        progress: Called with an iterable over all successful demonstrations and returning it, such as tqdm.

    Returns:
        Of each simulator, the attempts that succeeded and all of them.

    Raises:
        ValueError: simulators that differ in actions, states or rate, that have no expert or not these cameras, or
            whose expert fails too often; a folder that holds something else.
        SimulatorFailure: a simulator that cannot be made.
        OSError: no room.
    """
    attempts = out.with_name(out.name + ".attempts")
    settings = settings_of(names, config, cameras)
    _open_attempts(out, attempts, settings, overwrite)
    count = jobs or os.cpu_count() or 1
    processes = [SimulatorProcess(cameras, timeout=timeout) for _ in range(count)]
    try:
        described = _described(names, processes[0])
        _check_cameras(names, cameras or {}, processes[0])
        wanted = config.episodes + config.held_out
        todo = iter(progress(range(wanted * len(names))))
        chosen = {name: _attempts(name, wanted, config, attempts, processes, todo) for name in names}
        list(todo)  # a bar that stands at 100 %
    finally:
        for process in processes:
            process.close()
    episodes, splits, first = [], {}, 0
    for split, numbers in (("train", slice(config.episodes)), ("held_out", slice(config.episodes, None))):
        for name in names:
            for attempt in chosen[name][0][numbers]:
                episodes += _episodes(attempts, name, attempt, described[name].instruction, cameras)
        splits[split] = first, len(episodes)
        first = len(episodes)
    one = described[names[0]]
    shutil.rmtree(out, ignore_errors=True)
    write_lerobot(
        out, episodes, fps=one.control_freq, splits={k: v for k, v in splits.items() if v[1] > v[0]},
        state_names=one.state_names, action_names=one.action_names, robot=names[0].partition("/")[0],
        picture_every=config.picture_every, texts={SETTINGS: json.dumps(settings, indent=1) + "\n"},
    )  # fmt: skip
    shutil.rmtree(attempts)
    return {name: (wanted, tried) for name, (_, tried) in chosen.items()}


def settings_of(
    names: Sequence[str], config: RecordConfig, cameras: Mapping[str, tuple[int, int]] | None
) -> dict[str, Any]:
    """What a data set is recorded with, as ``SETTINGS`` holds it."""
    settings = {"simulators": list(names), "config": asdict(config), "cameras": dict(cameras or {})}
    return json.loads(json.dumps(settings))


def _open_attempts(out: Path, attempts: Path, settings: dict, overwrite: bool) -> None:
    """The folder of attempts, with those of an earlier call if it had the same settings."""
    held = attempts / "settings.json"
    if overwrite:
        shutil.rmtree(attempts, ignore_errors=True)
    elif out.exists():
        raise ValueError(f"--out: {out} exists; name another folder, or replace it with --overwrite")
    elif held.exists() and read_json(held) != settings:
        raise ValueError(
            f"--out: {attempts} holds attempts of other settings; name another folder, or lose them with --overwrite"
        )
    attempts.mkdir(parents=True, exist_ok=True)
    with new_file(held) as part:
        part.write_text(json.dumps(settings) + "\n")


def _described(names: Sequence[str], process: SimulatorProcess) -> dict[str, Description]:
    described = {name: process.describe(name) for name in names}
    first = described[names[0]]
    for name, other in described.items():
        if not other.has_expert:
            raise ValueError(f"--simulator {name} has no expert to record; give it a method expert()")
        for field in ("action_names", "state_names", "control_freq"):
            if getattr(other, field) != getattr(first, field):
                raise ValueError(
                    f"--simulator {name}: {field} must be that of {names[0]}, {getattr(first, field)}, to be in one "
                    f"data set, got {getattr(other, field)}"
                )
    return described


def _check_cameras(names: Sequence[str], cameras: dict[str, tuple[int, int]], process: SimulatorProcess) -> None:
    """Before anything is recorded; a suite renders what it is asked for, or refuses to be made."""
    for name in names if cameras else ():
        if ":" not in name:
            continue
        process.send("begin", name, 0)
        found = {c: picture.shape[:2] for c, picture in process.receive().observation.pictures.items()}
        for camera, size in cameras.items():
            if found.get(camera) != size:
                sizes = ", ".join(f"{c} ({h} x {w})" for c, (h, w) in found.items()) or "none"
                raise ValueError(
                    f"--simulator {name}: its pictures are {sizes}, but --camera asks for {camera} ({size[0]} x "
                    f"{size[1]}); a simulator of MODULE:FACTORY decides itself what it renders"
                )


def _attempts(
    name: str, wanted: int, config: RecordConfig, folder: Path, processes: list[SimulatorProcess], todo: Iterable
) -> tuple[list[int], int]:
    """The numbers of the first ``wanted`` attempts that succeed, and how many were needed for that.

    Attempts run in any order, but which are chosen depends on their numbers alone.
    """
    done: dict[int, bool] = {}
    reasons: list[str] = []
    idle, limit = list(processes), MOST_ATTEMPTS * wanted + len(processes)
    busy: dict[SimulatorProcess, int] = {}
    step, following = iter(todo), 0

    def enough() -> int | None:
        """One past the attempt that completes what is wanted, if all before it are done."""
        found = 0
        for attempt in range(len(done) + len(busy)):
            if attempt not in done:
                return None
            found += done[attempt]
            if found == wanted:
                return attempt + 1
        return None

    while (end := enough()) is None:
        if following >= limit and not busy:
            few = f"{sum(done.values())} of {len(done)} attempts"
            raise ValueError(
                f"--simulator {name}: its expert succeeded in {few}, too few; "
                + (reasons[-1] if reasons else "its horizon ended them")
            )
        while idle and following < limit and sum(done.values()) + len(busy) < wanted:
            attempt, following = following, following + 1
            path = _path(folder, name, attempt)
            if path.exists():
                done[attempt] = _succeeded(path)
                if done[attempt]:
                    next(step, None)
                continue
            process = idle.pop()
            process.send("demonstrate", name, name, attempt, asdict(config))
            busy[process] = attempt
        if not busy:
            continue
        process = first_answer(list(busy))
        attempt = busy.pop(process)
        idle.append(process)
        try:
            success, initial_state, pieces = process.receive()
        except SimulatorFailure as failure:
            success, initial_state, pieces = False, {}, []
            reasons.append(str(failure))
        store_attempt(_path(folder, name, attempt), success, initial_state, pieces if success else [])
        done[attempt] = success
        if success:
            next(step, None)
    return [attempt for attempt in range(end) if done[attempt]], end


def _path(folder: Path, name: str, attempt: int) -> Path:
    return folder / file_name(name) / f"{attempt:05d}.npz"


def store_attempt(path: Path, success: bool, initial_state: dict, pieces: list[dict]) -> None:
    arrays = {f"{i}/{key}": value for i, piece in enumerate(pieces) for key, value in piece.items()}
    with new_file(path) as part:
        np.savez(part, success=success, initial_state=json.dumps(initial_state), **arrays)


def _succeeded(path: Path) -> bool:
    with np.load(path) as held:
        return bool(held["success"])


def _episodes(
    folder: Path, name: str, attempt: int, instruction: str, cameras: dict[str, tuple[int, int]] | None
) -> list[Recorded]:
    with np.load(_path(folder, name, attempt)) as held:
        count = sum(key.endswith("/action") for key in held.files)
        origin = {"simulator": name, "attempt": attempt, "initial_state": json.loads(str(held["initial_state"]))}
        found = []
        for i in range(count):
            mine = {key.partition("/")[2]: held[key] for key in held.files if key.startswith(f"{i}/")}
            state, action = mine.pop("state"), mine.pop("action")
            pictures = {key.removeprefix("pictures/"): value for key, value in mine.items()}
            pictures = {camera: pictures[camera] for camera in cameras or pictures}
            found.append(Recorded(instruction, state, action, pictures, origin | {"piece": i}))
    return found
