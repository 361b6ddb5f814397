"""Runs an ablation: demonstrations once, then every arm and seed; what a folder holds already is not made again.

Folder of an ablation::

    protocol.json             what is run, written before anything is
    TRACK/data                the demonstrations
    TRACK/ARM/seed0/policy    a checkpoint, of the last step
    TRACK/ARM/seed0/train.json, log.jsonl, eval-chunk2-steps1.jsonl
    rows.jsonl, arms.jsonl    all episodes, all trainings, collected from there, and initial_states.jsonl

Each file appears whole or not at all, so a kill costs what was being made.
"""

from __future__ import annotations

import gzip
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import locked_folder
from ..data import ClipDataset, LeRobotDataset
from ..rollout import RolloutConfig, RolloutEngine
from ..rollout.policy import PICTURES, Policy
from ..runtime.files import new_file
from ..runtime.json_fields import read_json
from ..runtime.processes import end_with_parent
from ..runtime.threads import set_threads
from ..simulator.evaluate import Task, evaluate
from ..simulator.process import SimulatorFailure, SimulatorPool, SimulatorProcess
from ..simulator.record import RecordConfig, record
from ..train.log import loss_ends
from ..train.trainer import Trainer, train
from .protocol import BASELINE, Arm, Protocol, Track
from .ray_cluster import ray_calls
from .units import EXPERT, SANITY, SHUFFLED, UNTRAINED, Unit, evaluation_file, is_done, units

LATENCY_CHUNKS = 20


def _file(out: Path) -> Path:
    return out / "protocol.json"


def open_folder(out: Path, protocol: Protocol) -> None:
    """Write the protocol, or compare it with the one that is there.

    Raises:
        ValueError: the folder holds another ablation; the message names what differs.
    """
    file, given = _file(out), json.loads(json.dumps(protocol.to_dict()))
    if file.exists():
        held = json.loads(json.dumps(Protocol.from_json(file).to_dict()))  # with fields that it was written without
        if held != given:
            raise ValueError(
                f"--out: {out} holds an ablation of another protocol, which differs in "
                f"{', '.join(_differences(held, given))}; name another folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} holds something that is no ablation; name another folder")
    with new_file(file) as part:
        part.write_text(json.dumps(given, indent=1) + "\n")


def _differences(held: Any, given: Any, where: str = "") -> Iterator[str]:
    if isinstance(held, dict) and isinstance(given, dict):
        for key in sorted(set(held) | set(given)):
            if held.get(key) != given.get(key):
                yield from _differences(held.get(key), given.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(held, list) and isinstance(given, list) and len(held) == len(given):
        for i, (a, b) in enumerate(zip(held, given, strict=True)):
            if a != b:
                yield from _differences(a, b, f"{where}[{i}]")
    else:
        yield where


def run_all(
    out: Path,
    protocol: Protocol,
    *,
    processes: int = 1,
    ray: str | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Make what is missing.

    Args:
        out: The folder.
        protocol: What is run.
        processes: Arms at a time, each in a process of its own; with 1, in this one.
        ray: Address of a Ray cluster, as :func:`ray_calls` takes it: as many arms at a time as it has CPUs, or GPUs,
            for, on machines that share the folder. A process that is lost there costs its arm alone.
        device: Where models are trained and act.
        say: Gets a line for each thing that is done.
        after: Called after each arm.

    Raises:
        ValueError: a folder of another protocol, or one in which another process runs; simulators that do not fit.
        SimulatorFailure: a simulator that cannot be made.
        ChildProcessError: a process with an arm was killed.
        ModuleNotFoundError: Ray is not installed.
    """
    out = out.resolve()  # other machines of a cluster know no working folder of this process
    open_folder(out, protocol)
    try:
        with locked_folder(out, wait=False), ExitStack() as stack:
            submit = None if ray is None else stack.enter_context(ray_calls(ray, device, out))
            for track in protocol.tracks:
                _record(out, track, say)
            todo = [unit for unit in units(protocol) if not is_done(out, unit)]
            say(f"{len(todo)} of {len(units(protocol))} arms and seeds are left")
            _run_units(out, todo, processes, submit, device, say, after)
    except BlockingIOError as error:
        raise ValueError(f"--out: another process runs the ablation of {out}; wait for its end") from error


def _run_units(
    out: Path,
    todo: list[Unit],
    processes: int,
    submit: Callable[..., Future[str]] | None,
    device: str,
    say: Callable[[str], None],
    after: Callable[[], None],
) -> None:
    def done(unit: Unit, line: str) -> None:
        say(f"{datetime.now(UTC):%H:%M:%S} {unit.track} {unit.arm} seed {unit.seed}: {line}")
        collect(out)
        after()

    if submit is not None:
        run_everywhere(todo, lambda unit: submit(run_unit, out, unit, None, device), len(todo), done)
        return
    if processes == 1:
        pools: dict[str, SimulatorPool] = {}
        with ExitStack() as stack:
            for unit in todo:
                if unit.track not in pools:
                    pools[unit.track] = stack.enter_context(pool_of(Protocol.from_json(_file(out)).track(unit.track)))
                done(unit, run_unit(out, unit, pools[unit.track], device))
        return
    # a new process for each unit: what one leaves behind does not reach the next
    spawn = get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, spawn, initializer=end_with_parent, max_tasks_per_child=1) as pool:
            run_everywhere(todo, lambda unit: pool.submit(run_unit, out, unit, None, device), processes, done)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"--processes {processes}: a process with an arm was killed, as the system does where memory runs out; the "
            "same command goes on, with what is done; give it fewer processes"
        ) from error


def run_everywhere(
    todo: Sequence[Unit],
    submit: Callable[[Unit], Future[str]],
    most: int,
    done: Callable[[Unit, str], None],
) -> None:
    """Keep ``most`` units running; those that need the policy of another wait for it.

    Raises:
        ChildProcessError: futures raised it, as a process was lost; after all others, with the units that are missing.
    """
    waiting, running, lost = list(todo), dict[Future[str], Unit](), list[tuple[Unit, str]]()
    while waiting or running:
        gone, ahead = {_key(unit) for unit, _ in lost}, {_key(unit) for unit in running.values()}
        for unit in [*waiting]:
            # a second unit of the same arm and seed evaluates what the first trained
            needed = _key(replace(unit, arm=BASELINE) if unit.arm == SHUFFLED else unit)
            if needed in gone:
                waiting.remove(unit)
                lost.append((unit, f"it needs what was lost of {needed[1]}"))
            elif len(running) < most and needed not in ahead:
                waiting.remove(unit)
                running[submit(unit)] = unit
            ahead.add(_key(unit))
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit = running.pop(future)
            try:
                line = future.result()
            except ChildProcessError as error:
                lost.append((unit, str(error)))
            else:
                done(unit, line)
    if lost:
        names = "; ".join(f"{unit.track} {unit.arm} seed {unit.seed}: {reason}" for unit, reason in lost)
        raise ChildProcessError(f"{len(lost)} arms are missing, which the same command makes: {names}")


def _key(unit: Unit) -> tuple[str, str, int]:
    return unit.track, unit.arm, unit.seed


def _record(out: Path, track: Track, say: Callable[[str], None]) -> None:
    root = out / track.name / "data"
    if root.exists():
        return
    began = time.perf_counter()
    cameras = {track.camera: (track.size, track.size)} if track.camera else None
    rates = record(root, track.simulators, RecordConfig(**track.record), cameras=cameras)
    counts = ", ".join(f"{name.rpartition('/')[2]} {wanted}/{tried}" for name, (wanted, tried) in rates.items())
    say(f"{track.name}: demonstrations of attempts: {counts}; {time.perf_counter() - began:.0f} s")


def read_track(out: Path, track: Track) -> ClipDataset:
    """The demonstrations of a track as clips."""
    config = track.train_config(Arm(name=BASELINE, program="joint"))
    camera = PICTURES + track.camera if track.camera else None
    return ClipDataset(
        LeRobotDataset(out / track.name / "data", camera),
        actions_per_frame=config.actions_per_frame,
        actions_per_token=config.actions_per_token,
        channels=config.model.latent_channels,
        cell=config.cell,
    )


def pool_of(track: Track) -> SimulatorPool:
    """Processes for the simulators of a track."""
    return SimulatorPool(track.batch, {track.camera: (track.size, track.size)} if track.camera else None)


def run_unit(out: Path, unit: Unit, pool: SimulatorPool | None = None, device: str = "cpu") -> str:
    """Make what is missing of a unit, in the simulators of a pool if given; returns a line about it."""
    if pool is None:
        with pool_of(Protocol.from_json(_file(out)).track(unit.track)) as pool:
            return run_unit(out, unit, pool, device)
    set_threads(1)
    protocol = Protocol.from_json(_file(out))
    track, folder = protocol.track(unit.track), unit.folder(out)
    if unit.arm == EXPERT:
        return _play_expert(track, unit, folder)
    arm = protocol.arm(BASELINE if unit.arm in SANITY else unit.arm)
    if not (folder / "train.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _train(out, track, arm, unit, folder, torch.device(device))
    trained = read_json(folder / "train.json")
    if trained["failure"] is not None:
        return trained["failure"]
    where = replace(unit, arm=BASELINE).folder(out) if unit.arm == SHUFFLED else folder
    policy, _ = Policy.load(where / "policy", device, training=False)
    lines = []
    for setting in unit.settings:
        if not evaluation_file(folder, setting).exists():
            rows = _evaluate(policy, track, arm, unit, setting, pool)
            _write_rows(evaluation_file(folder, setting), rows)
            lines.append(
                f"chunk {setting[0]}, {setting[1]} steps {sum(r['success'] for r in rows if 'success' in r)}/"
                f"{sum('success' in r for r in rows)}"
            )
    return f"trained {trained['seconds']:.0f} s; {'; '.join(lines)}"


def _train(out: Path, track: Track, arm: Arm, unit: Unit, folder: Path, device: torch.device) -> None:
    row: dict[str, Any] = {"track": unit.track, "arm": unit.arm, "seed": unit.seed, "failure": None, "steps": 0}
    config = track.train_config(arm)
    began, cpu = time.perf_counter(), time.process_time()
    if unit.arm == UNTRAINED:
        untrained = Trainer(config, read_track(out, track), seed=unit.seed, device=device)
        untrained.policy().save(folder / "policy")
    elif unit.arm != SHUFFLED:  # which has the weights of the baseline
        try:
            trained = train(config, read_track(out, track), seed=unit.seed, device=device, progress=False)
        except FloatingPointError as error:
            row["failure"] = str(error)
        else:
            _write_rows(folder / "log.jsonl", trained.log)
            trained.policy.save(folder / "policy")
            ends = {s: {"first": a, "last": b} for s, (a, b) in loss_ends(trained.log)[1].items()}
            row |= {"steps": trained.step, "losses": ends}
            row["parameters"] = sum(p.numel() for p in trained.policy.model.parameters())
    row |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu, **_machine()}
    row["device"] = str(device)
    with new_file(folder / "train.json") as part:
        part.write_text(json.dumps(row) + "\n")


def _evaluate(
    policy: Policy, track: Track, arm: Arm, unit: Unit, setting: tuple[int, int], pool: SimulatorPool
) -> list[dict[str, Any]]:
    """A row for each episode, and a last one of the whole."""
    config, began = track.rollout(arm, setting), time.perf_counter()
    instructions = None
    if unit.arm == SHUFFLED:
        instructions = _others(track, pool)
    head = {"track": unit.track, "arm": unit.arm, "seed": unit.seed, "chunk": setting[0], "steps": setting[1]}
    results = evaluate(
        policy, config, tasks_of(track), batch=track.batch, horizon=track.horizon, want=arm.want,
        instructions=instructions, pool=pool,
    )  # fmt: skip
    order = {name: i for i, name in enumerate(track.simulators)}
    # "seed" is that of the training
    rows = [{**result.row(), "episode_seed": result.seed, **head} for result in results]
    rows.sort(key=lambda row: (order[row["simulator"]], row["episode"]))
    instruction = pool.describe(track.simulators[0]).instruction
    timing = {"chunk_cpu_seconds": chunk_cpu_seconds(policy, config, arm.want, instruction)}
    return [*rows, head | {"evaluation_seconds": time.perf_counter() - began} | timing]


def tasks_of(track: Track) -> list[Task]:
    """The episodes, the same for every arm."""
    return [Task(name, i, track.first_seed + i) for name in track.simulators for i in range(track.episodes)]


def _others(track: Track, pool: SimulatorPool) -> dict[str, str]:
    """Each simulator with the instruction of the next one."""
    own = [pool.describe(name).instruction for name in track.simulators]
    return dict(zip(track.simulators, own[1:] + own[:1], strict=True))


@torch.no_grad()
def chunk_cpu_seconds(policy: Policy, config: RolloutConfig, want: str, instruction: str) -> float:
    """Median CPU seconds, of one thread, of a chunk of one episode: prediction and the pass over what was observed.

    On a GPU, seconds by the clock.
    """
    on_gpu = policy.model.device.type == "cuda"

    def now() -> float:
        if not on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    generator, camera = torch.Generator().manual_seed(0), policy.camera
    if policy.frames_are_states or camera is None:
        frame = np.zeros((1, policy.codec.channels), np.float32)
    else:
        frame = np.zeros((1, camera.height, camera.width, 3), np.uint8)
    first = policy.codec.encode(frame)[None]
    episode = RolloutEngine(policy.model, config).start(first, policy.text([instruction]))
    observed, seconds = first.repeat(1, 1, episode.chunk_size, 1, 1), []
    for _ in range(LATENCY_CHUNKS):
        began = now()
        candidate = episode.propose(want=want, generator=generator)
        assert candidate.action is not None
        episode.observe(observed, candidate.action)
        seconds.append(now() - began)
    return float(np.median(seconds))


def _play_expert(track: Track, unit: Unit, folder: Path) -> str:
    """The expert in the initial states of the evaluation, and its actions once more: simulators do the same again."""
    head = {"track": unit.track, "arm": unit.arm, "seed": unit.seed, "chunk": 0, "steps": 0}
    rows, began = [], time.perf_counter()
    with SimulatorProcess() as process:
        for task in tasks_of(track):
            row = head | {"simulator": task.simulator, "episode": task.episode, "broken": False}
            try:
                process.send("expert", task.simulator, task.seed, track.horizon)
                begun, actions, found = process.receive()
                process.send("begin", task.simulator, begun.initial_state)
                process.receive()
                process.send("run", task.simulator, actions, 1)
                again = process.receive().outcome.success
                row |= {"success": again, "expert": found, "actions": len(actions), "failure": None}
                row |= {"initial_state": begun.initial_state}
            except SimulatorFailure as failure:
                row |= {"success": False, "failure": str(failure), "broken": True}
            rows.append(row)
    _write_rows(evaluation_file(folder, track.settings[0]), rows)
    row = {"track": unit.track, "arm": unit.arm, "seed": unit.seed, "failure": None, "steps": 0}
    with new_file(folder / "train.json") as part:
        part.write_text(json.dumps(row | {"seconds": time.perf_counter() - began, **_machine()}) + "\n")
    return f"replay {sum(bool(r['success']) for r in rows)}/{len(rows)}"


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with new_file(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, or of the same with ``.gz`` behind its name."""
    packed = path.with_name(path.name + ".gz")
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def collect(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write ``rows.jsonl``, ``arms.jsonl`` and ``initial_states.jsonl`` anew from what is there; return the first two.

    A row of ``arms.jsonl`` is a training, with what is of a whole evaluation under ``evaluations``. A folder that has
    these files alone, without what they were collected from, is read.
    """
    protocol = Protocol.from_json(_file(out))
    if not any((out / track.name).exists() for track in protocol.tracks):
        return read_rows(out / "rows.jsonl"), read_rows(out / "arms.jsonl")
    episodes, trainings, whole = [], [], dict[Path, tuple[tuple[int, int], ...]]()
    for unit in units(protocol):
        whole[unit.folder(out)] = whole.get(unit.folder(out), ()) + unit.settings
    states: dict[tuple, dict[str, Any]] = {}
    for folder, settings in whole.items():
        if not (folder / "train.json").exists():
            continue
        evaluations = []
        for setting in settings:
            file = evaluation_file(folder, setting)
            rows = read_rows(file) if file.exists() else []
            for row in rows[: sum("success" in row for row in rows)]:
                key = {name: row[name] for name in ("track", "simulator", "episode")}
                states[tuple(key.values())] = key | {"initial_state": row.get("initial_state")}
                episodes.append(_short(row))
            evaluations += [row for row in rows if "success" not in row]
        keep = ("chunk", "steps", "evaluation_seconds", "chunk_cpu_seconds")
        trained = read_json(folder / "train.json")
        trainings.append(trained | {"evaluations": [{key: row[key] for key in keep} for row in evaluations]})
    for name, rows in (("rows", episodes), ("arms", trainings), ("initial_states", list(states.values()))):
        _write_rows(out / f"{name}.jsonl", rows)
    return episodes, trainings


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an episode without its initial state, which is the same for all arms; errors to four digits."""
    rounded = {
        key: [None if value is None else float(f"{value:.4g}") for value in row[key]]
        for key in ("imagined_mse", "still_mse")
        if key in row
    }
    return {key: value for key, value in row.items() if key != "initial_state"} | rounded


def _machine() -> dict[str, Any]:
    folder = Path(__file__).parent
    try:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        commit = asked.stdout.strip() or None
    except OSError:
        commit = None
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.processor()
    date = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
    return {"date": date, "commit": commit, "cpu": cpu, "torch": torch.__version__}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
