"""``wam train``: reads the data, trains, says how it went."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import CONFIG, TRAINING
from ..data import ClipDataset, LeRobotDataset
from ..data.clips import TRAINED, Units, filled_up
from ..data.config import DataConfig
from ..data.encoded import EncodedLatents, encoder_of, holds_text, read_texts
from ..data.mix import ClipMix, pooled_units
from ..rollout.policy import Policy
from ..runtime.checks import check_device, choice, whole
from ..runtime.config_files import with_settings
from ..runtime.limits import LARGEST_INT64
from ..runtime.threads import pick_threads, restores_threads, set_threads
from ..text import FrozenText, WordEmbedding, words_of
from ..train.config import TrainConfig
from ..train.log import loss_ends
from ..train.ranks import joined_ranks
from ..train.recipe import Recipe
from ..train.run_folder import RunFolder
from ..train.trainer import train
from ..training_state import VALUES
from ..weights.start import initial_weights
from .estimate import check_estimate_flags, training_estimate
from .run_readme import run_files
from .train_evaluation import make_evaluation

MAY_CHANGE = ("steps", "save_every", "keep", "engine")  # of a config, where a run goes on
MOMENT = 0.2  # seconds within which signals are one: timeout(1) sends it to the process and to its group


@restores_threads
def run(args: argparse.Namespace) -> int:
    """``wam train``."""
    check_estimate_flags(args)
    recipe = with_flags(args)
    if args.estimate:
        print(training_estimate(args, recipe.train))
        return 0
    with joined_ranks(check_device(args.device)) as device, _quiet_but_first():
        return _train(args, recipe, device)


@contextmanager
def _quiet_but_first() -> Iterator[None]:
    """Of several processes one prints; each reports its own errors."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _train(args: argparse.Namespace, asked: Recipe, device: torch.device) -> int:
    policy, resume, seed, steps_done = None, None, args.seed, 0
    training: dict[str, Any] = {}
    if args.resume is not None:
        others = [setting for setting in args.set if not setting.startswith("engine.")]
        if args.config is None and others:
            raise ValueError(
                f"--set {others[0]} cannot be given with --resume: the checkpoint has its config, of which --set "
                "changes engine.* alone"
            )
        policy, resume = Policy.load(args.resume, every=True)
        if resume.training_state is None or not resume.metadata.get("training"):
            raise ValueError(f"--resume: {args.resume} has no training state; name a checkpoint that wam train wrote")
        training = resume.metadata["training"]
        where = f"{args.resume / CONFIG}: metadata.training"
        held = sorted(training) if isinstance(training, dict) else training
        if not isinstance(training, dict) or not {"config", "seed"} <= set(training):
            raise ValueError(f"{where} must hold config and seed, got {held!r}; resume from another checkpoint")
        stored = training["config"]
        changed = with_settings(stored, args.set) if args.set and args.config is None else stored
        config = TrainConfig.from_dict(changed, f"{where}.config")
        seed = whole(f"{where}.seed", training["seed"], 0, LARGEST_INT64)
        if args.config is not None:
            config = _resumed(config, asked.train, args.resume)
    else:
        config = asked.train
    if args.steps is not None:
        config = replace(config, steps=args.steps)
    if resume is not None:
        values = {} if resume.training_state is None else resume.training_state.values
        steps_done = whole(f"{args.resume / TRAINING / VALUES}: step", values.get("step"), 1)
        if steps_done >= config.steps:
            raise ValueError(f"--steps must be above {steps_done}, the steps done, got {config.steps}")
    # refuses before the data is read
    RunFolder(args.out, resume, overwrite=args.overwrite, tensorboard=args.tensorboard)
    init = _initial_weights(args, config)
    data = read_data(args.datasets, config, policy)
    text = read_text(args.datasets, data.tasks)
    short = sum(data.length(i) < config.frames for i in data.train)
    if short and not config.tokens:
        print(
            f"{short} of {len(data.train)} training episodes are shorter than a clip of {config.frames} frames: unused"
        )
    for split in unused_splits(config, data):
        print(f"{len(data.episodes_of(split))} episodes of split {split!r} unused: the config has no {split} samples")
    if policy is not None:
        for line in differences(policy, data):
            print(line)
    evaluation = make_evaluation(args, config, data, training.get("evaluation"))
    with _stop_asked() as stop:
        if device.type == "cpu":
            threads = training.get("threads")
            if threads is None and dist.is_initialized():
                threads = torch.get_num_threads()  # torchrun, or who called it, has shared out the cores
            elif threads is None:
                threads = pick_threads(
                    lambda: train(replace(config, steps=2), data, text=text, stop=stop, progress=False)
                )
            else:  # sums of float32 depend on their number, and a resumed run has the losses of an uninterrupted one
                threads = set_threads(whole(f"{where}.threads", threads, 1))
            print(f"threads: {threads}")
        recipe = _as_run(args, asked, config, seed)
        files = run_files(
            recipe, data, out=args.out, argv=args.argv, step=steps_done,
            processes=dist.get_world_size() if dist.is_initialized() else 1,
        )  # fmt: skip
        done = train(
            config, data, seed=seed, device=device, seconds=args.seconds, out=args.out, resume=resume, init=init,
            text=text, evaluation=evaluation, overwrite=args.overwrite, tensorboard=args.tensorboard, files=files,
            stop=stop,
        )  # fmt: skip
    steps, losses = loss_ends(done.log)
    spans = [f"steps {rows[0]['step']} to {rows[-1]['step']}" for rows in (done.log[:steps], done.log[-steps:])]
    for stream, means in losses.items():
        if None not in means:
            # of a single step there is one value
            means_of_spans = dict.fromkeys(f"{mean:.3f} ({span})" for mean, span in zip(means, spans, strict=True))
            print(f"{stream} loss {' -> '.join(means_of_spans)}")
    print(f"step {done.step} of {config.steps}; checkpoint: {args.out / 'checkpoint'}")
    return 0


def _as_run(args: argparse.Namespace, asked: Recipe, config: TrainConfig, seed: int) -> Recipe:
    """The recipe of this very run, flags and what a checkpoint had included."""
    return replace(
        asked, train=config, data=args.datasets, out=str(args.out), seed=seed, device=args.device,
        init=asked.init if args.init is None else str(args.init), init_layout=args.init_layout,
        init_without=tuple(args.init_without), init_action=args.init_action, tensorboard=args.tensorboard,
        eval_every=args.eval_every, simulator=tuple(args.simulator or ()), eval_episodes=args.eval_episodes,
        eval_chunk=args.eval_chunk,
    )  # fmt: skip


def _resumed(saved: TrainConfig, asked: TrainConfig, checkpoint: Path) -> TrainConfig:
    """The config of a run that goes on: the checkpoint's, for as many steps as CONFIG has.

    Raises:
        ValueError: CONFIG trains something else.
    """
    ours, theirs = asked.to_dict(), saved.to_dict()
    other = [name for name in ours if ours[name] != theirs[name] and name not in MAY_CHANGE]
    if other:
        raise ValueError(
            f"CONFIG must be that of the run to resume, {checkpoint}, but for {', '.join(MAY_CHANGE)}; it has "
            f"another {', '.join(other)}"
        )
    return asked


def with_flags(args: argparse.Namespace) -> Recipe:
    """The recipe of CONFIG and --set; what it has and no flag says is put into ``args``.

    Raises:
        ValueError: a recipe that is refused, or neither it nor a flag names the data and the run's folder.
    """
    recipe = Recipe.read(args.config, args.set)
    args.datasets = recipe.data
    if args.data is not None:
        args.datasets = (DataConfig(path=str(args.data), camera=args.camera),)
    elif args.camera is not None:
        raise ValueError("--camera must be left out without --data: CONFIG says the cameras of its data")
    elif recipe.data:
        args.data, args.camera = recipe.data[0].path, recipe.data[0].camera
    defaults = {"out": None, "seed": 0, "device": "cpu", "tensorboard": False, "eval_every": None}
    defaults |= {"simulator": None, "eval_episodes": None, "eval_chunk": None}
    if args.resume is None:  # whose weights are those of the checkpoint
        defaults["init"] = None
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name) or default)
    if recipe.init is not None and args.init == recipe.init:
        args.init_layout = args.init_layout or recipe.init_layout
        args.init_without = args.init_without or list(recipe.init_without)
        args.init_action = args.init_action or recipe.init_action
    for name in ("data", "out", "init"):
        value = getattr(args, name)
        if value is None and name != "init" and not args.estimate:
            raise ValueError(f"--{name} must be given, or {name} in CONFIG")
        setattr(args, name, None if value is None else Path(value))
    return recipe


def _initial_weights(args: argparse.Namespace, config: TrainConfig) -> dict[str, Tensor] | None:
    if args.init is None:
        given = {"--init-layout": args.init_layout, "--init-action": args.init_action}
        given["--init-without"] = args.init_without or None
        for flag, value in given.items():
            if value is not None:
                raise ValueError(f"{flag} must be left out without --init")
        return None
    if args.resume is not None:
        raise ValueError("--init cannot be given with --resume: the checkpoint has its weights; leave one out")
    return initial_weights(
        args.init, config.model, layout=args.init_layout, without=args.init_without, action=args.init_action
    )


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C, SIGTERM (a scheduler's notice) or SIGHUP (a lost terminal) came; a second one acts as usual."""
    asked: list[float] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _) -> None:
        asked.append(time.monotonic())
        if len(asked) == 1:
            with suppress(OSError, RuntimeError):  # the terminal may be gone, or be written to right now
                print("\nstopping after this step; once more to stop at once", file=sys.stderr)
        elif asked[-1] - asked[0] > MOMENT:
            restore()
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():  # no other can have handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, or a shell that started this with &
                before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        restore()


def unused_splits(config: TrainConfig, data: ClipDataset) -> list[str]:
    """Splits with episodes to train on that the config draws nothing from."""
    drawn = {split for kind in config.draws() for split, share in kind.splits.items() if share}
    return [split for split in TRAINED if data.episodes_of(split) and split not in drawn]


def differences(policy: Policy, data: ClipDataset) -> Iterator[str]:
    """What is another in this data than in that which the policy was trained on, and what becomes of it."""
    if policy.robots:  # each in its own units, which are the checkpoint's
        return
    (mean, std, varying), (own_mean, own_std, own_varying) = policy.units, data.own_units
    if not (torch.allclose(mean, own_mean, rtol=1e-3, atol=1e-3) and torch.allclose(std, own_std, rtol=1e-3)):
        ratios = own_std / std
        yield (
            "units of the checkpoint are kept for actions: in these, the means of this data are up to "
            f"{((own_mean - mean) / std).abs().max():.3g} from 0, and its stds {ratios.min():.3g} to {ratios.max():.3g}"
        )
    still = (own_varying & ~varying).nonzero().flatten().tolist()
    if still:
        yield f"action dimensions {still} did not vary before: their unit stays 1, and errors leave them out"
    words = []
    if isinstance(policy.text, WordEmbedding):
        words = sorted({word for task in data.tasks for word in words_of(task)} - set(policy.text.vocabulary))
    if words:
        yield f"words that the checkpoint does not know share one vector: {', '.join(words)}"
    camera = policy.camera
    if camera is not None and tuple(data.picture_size) != (camera.height, camera.width):
        height, width = data.picture_size
        yield f"pictures are {height} x {width} from now on, those before were {camera.height} x {camera.width}"


def read_text(data: Sequence[DataConfig], tasks: Sequence[str]) -> FrozenText | None:
    """What ``wam encode --text`` has made of instructions, if the data sets say where it is; the empty one too.

    Raises:
        ValueError: some do and some do not, several encoders, or an instruction that is not there.
    """
    folders = {one.texts for one in data}
    if folders == {None}:
        return None
    named = [folder for folder in folders if folder is not None]
    encoders = {encoder_of(folder) for folder in named}
    if None in folders or len(encoders) > 1:
        raise ValueError(f"data: texts must be of one encoder for all data sets, got {sorted(map(str, folders))}")
    found, last = dict[str, Tensor](), len(named) - 1
    for i, folder in enumerate(named):
        for task in ("", *tasks):
            if task not in found and (i == last or holds_text(task, folder)):
                found |= read_texts([task], folder)
    return FrozenText.of(found, encoders.pop())


def read_data(
    data: Path | Sequence[DataConfig],
    config: TrainConfig,
    policy: Policy | None = None,
    *,
    camera: str | None = None,
    progress: bool = True,
) -> ClipDataset:
    """Data sets, or the one in a folder, as clips, with as many actions a frame and a token as the config has, in the
    latents and units of a policy if given; with a progress bar over the episodes.

    Of several data sets the codec is the first one's, and the units are those of all together.
    """
    configs = (DataConfig(path=str(data), camera=camera),) if isinstance(data, Path) else tuple(data)
    usual = None if policy is None or policy.camera is None else policy.camera.name
    datasets = [LeRobotDataset(c.path, c.camera, usual, state=c.state) for c in configs]
    robots = [one.robot for one in configs]
    if None in robots and set(robots) != {None}:
        raise ValueError(f"data: robot must be given of all data sets or of none, got {robots}")
    for robot in dict.fromkeys(robots):
        kinds = sorted({c.normalization for c in configs if c.robot == robot})
        if len(kinds) > 1:
            of = "all data sets" if robot is None else f"all data sets of robot {robot!r}"
            raise ValueError(f"data: normalization must be the same of {of}, got {kinds}")
    codec = None if policy is None else policy.codec
    widths = None
    if None not in robots and config.model.has_actions:
        widths = config.model.action_dim // config.actions_per_token, config.model.state_dim
    of_robots = {
        robot: _units_for(
            robot, policy, [d for d, r in zip(datasets, robots, strict=True) if r == robot], widths,
            states=bool(config.model.state_dim), normalization=configs[robots.index(robot)].normalization,
        )
        for robot in dict.fromkeys(robots)
    }  # fmt: skip
    parts: list[ClipDataset] = []
    for one, dataset in zip(configs, datasets, strict=True):
        units, states = of_robots[one.robot]
        part = ClipDataset(
            dataset,
            codec,
            progress=lambda e: tqdm(e, desc="read", unit="episode", disable=not progress, dynamic_ncols=True),
            units=units,
            states=states,
            actions_per_frame=config.actions_per_frame,
            actions_per_token=config.actions_per_token,
            channels=config.model.latent_channels,
            cell=config.cell,
            normalization=one.normalization,
            latents=None if one.latents is None else EncodedLatents(one.latents),
            widths=widths,
        )
        codec = part.codec
        parts.append(part)
    if len(parts) == 1 and widths is None:
        return parts[0]
    return ClipMix(parts, [one.weight for one in configs], None if widths is None else [str(r) for r in robots])


def _units_for(
    robot: str | None,
    policy: Policy | None,
    datasets: Sequence[LeRobotDataset],
    widths: tuple[int, int] | None,
    *,
    states: bool,
    normalization: str,
) -> tuple[Units | None, bool | tuple[Tensor, Tensor]]:
    """Units of the actions and of the states of a robot: a policy's, or of its data sets together; None for a data
    set's own."""
    if policy is not None and robot is None:
        return policy.units, policy.state_units or False
    if robot is None and len(datasets) == 1:
        return None, states
    if policy is not None and robot is not None:
        held = policy.robots[choice("data: robot", robot, policy.robots)]
        units, of_states = (held.action_mean, held.action_std, held.varying), held.state_units
    else:
        units, of_states = pooled_units(datasets, states, normalization)
    if widths is not None:
        units = filled_up(units[0], widths[0]), filled_up(units[1], widths[0], 1.0), filled_up(units[2], widths[0])
        if of_states is not None:
            of_states = filled_up(of_states[0], widths[1]), filled_up(of_states[1], widths[1], 1.0)
    return units, of_states or False
