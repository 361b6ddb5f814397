"""The flags of every command, and the module that each command loads once it is chosen."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..runtime.limits import LARGEST_INT64

SIMULATOR = "metaworld/pick-place-v3, libero/libero_object/3, gymnasium/ID, or MODULE:FACTORY, see docs/closed_loop.md"


class UserError(Exception):
    """What the user can mend. The message names the flag or field, what was expected, what came, and the way out."""


class CommandParser(argparse.ArgumentParser):
    commands: Mapping[str, argparse.ArgumentParser]  # of ``wam`` alone: the parsers of its commands by name

    def error(self, message: str) -> NoReturn:
        # argparse's own prints the whole usage first, and the one line that matters last
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def at_least(low: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        if value > LARGEST_INT64:
            raise argparse.ArgumentTypeError(f"must be at most {LARGEST_INT64}, got {value}")
        return value

    return whole_number


def positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}") from None
    if not (0 < value and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


class _Estimate(argparse.Action):
    """``--estimate``: sets the flag, and what a run must be given need not be given any more."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, waives: Sequence[Any], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, help=help)
        self.waives = waives  # flags, or a group of them

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, True)
        for flag in self.waives:
            flag.required = False


def _estimate(parser: argparse.ArgumentParser, *waives: Any) -> None:
    """The flags of an estimate; ``waives`` are those that only a run needs."""
    line = "print parameters, FLOPs, bytes, memory and roofline, estimated from sizes alone; nothing is loaded or run"
    parser.add_argument("--estimate", action=_Estimate, waives=waives, help=line)
    parser.add_argument("--preset", metavar="NAME", help="of --estimate: sizes by name, as libero or robotwin")
    parser.add_argument(
        "--device-model", metavar="NAME", help="of --estimate: h100, h200, ...; default: this machine's GPU, or h100"
    )
    parser.add_argument("--video-tokens", type=at_least(1), metavar="N", help="of --estimate: in a frame")
    parser.add_argument("--text-tokens", type=at_least(1), metavar="N", help="of --estimate: of an instruction")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of what it writes; default: runs/demo, or runs/demo_pictures")
    parser.add_argument("--data", type=Path, metavar="DIR", help="train on it and predict it, in place of acting")
    parser.add_argument("--pictures", action="store_true", help="act from a camera's pictures, which are rendered")
    parser.add_argument("--camera", metavar="FEATURE", help="of --data; needed only where it has several")
    parser.add_argument("--seconds", type=positive_seconds, default=180.0, help="time to train for")
    parser.add_argument("--seed", type=at_least(0), default=0)


def _recipe(parser: argparse.ArgumentParser, out: str = "folder of checkpoints and log; default: CONFIG's") -> None:
    """The config of a training, and the flags that are put in place of what it has."""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="TOML or JSON, such as one of recipes/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="as model.layers=4, in CONFIG's place"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="data set in LeRobot layout; default: CONFIG's")
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: CONFIG's, or cpu")


def _validate(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)


def _encode(parser: argparse.ArgumentParser) -> None:
    _recipe(parser, "folder of what it writes")
    parser.add_argument("--camera", metavar="FEATURE", help="of --data; needed only where it has several")
    parser.add_argument("--vae", type=Path, metavar="DIR", help="Wan's VAE in diffusers' layout: encodes pictures")
    parser.add_argument("--text", type=Path, metavar="DIR", help="UMT5 with its tokenizer: encodes instructions")
    parser.add_argument("--text-tokens", type=at_least(1), default=512, metavar="N", help="default: %(default)s")


def _train(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--camera", metavar="FEATURE", help="of --data; needed only where it has several")
    _estimate(parser)
    parser.add_argument("--gpus", type=at_least(1), metavar="N", help="of --estimate: that train together; default: 1")
    limit = "training ends at whichever of --steps and --seconds comes first"
    parser.add_argument("--steps", type=at_least(1), metavar="N", help=limit)
    parser.add_argument("--seconds", type=positive_seconds, metavar="S", help=limit)
    parser.add_argument("--resume", type=Path, metavar="CKPT", help="checkpoint to go on from")
    parser.add_argument("--init", type=Path, metavar="PATH", help="weights to start from: see docs/weights.md")
    parser.add_argument("--init-layout", metavar="NAME", help="of --init: diffusers, openwam, ...; default: ours")
    parser.add_argument("--init-without", action="append", default=[], metavar="PART", help="of --init; repeatable")
    parser.add_argument(
        "--init-action", choices=("copy", "interpolate"), help="of --init: make the action expert from the video's"
    )
    parser.add_argument("--overwrite", action="store_true", help="lose the run that --out holds")
    parser.add_argument("--tensorboard", action="store_true", default=None, help="write the log for TensorBoard too")
    parser.add_argument(
        "--eval-every", type=at_least(1), metavar="N", help="evaluate after every N steps; a resume keeps it"
    )
    parser.add_argument("--simulator", metavar="NAME", action="append", help=f"then also act in it: {SIMULATOR}")
    parser.add_argument("--eval-episodes", type=at_least(1), metavar="K", help="of each simulator; default: 10")
    parser.add_argument("--eval-chunk", type=at_least(1), metavar="N", help="frames of a chunk; default: the largest")
    parser.add_argument("--seed", type=at_least(0), help="default: CONFIG's, or 0")


def _rollout(parser: argparse.ArgumentParser) -> None:
    checkpoint = parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    world = parser.add_mutually_exclusive_group(required=True)
    world.add_argument("--data", type=Path, metavar="DIR", help="recorded episodes: a data set in LeRobot layout")
    world.add_argument("--simulator", metavar="NAME", help=f"act in one: {SIMULATOR}")
    _estimate(parser, checkpoint, world)
    parser.add_argument("--camera", metavar="FEATURE", help="of --data; default: its only one, or the checkpoint's")
    parser.add_argument("--episode", type=at_least(0), metavar="N", help="of --data; default: the first held-out one")
    parser.add_argument(
        "--chunks", type=at_least(1), metavar="N", help="at most so many; default: all, or 40 in a simulator"
    )
    parser.add_argument("--robot", metavar="NAME", help="of several that it was trained on; default: the first")
    parser.add_argument("--program", metavar="P", help="interaction program; default: the checkpoint's")
    parser.add_argument("--objective", metavar="O", help="what is denoised given what; default: joint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of what it writes; default: in the checkpoint")
    parser.add_argument("--steps", type=at_least(1), metavar="N", help="denoising steps; default: the checkpoint's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="of the rollout, as video.steps=2, action.solver=unipc or reuse_flow=0.98; repeat it",
    )  # fmt: skip
    _eight_bit(parser)
    parser.add_argument("--open-loop", action="store_true", help="continue from predictions, not from recorded frames")
    parser.add_argument(
        "--realtime", action="store_true", help="of a simulator: it does not wait, and plans are made while it acts"
    )
    parser.add_argument(
        "--control", action="append", default=[], metavar="NAME=VALUE",
        help="of --realtime, as rate=10, late=drop or rate_limit=0.5; repeat it",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0)


def _eight_bit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eight-bit", type=Path, metavar="DIR", help="8-bit weights, calibrated on this data set")
    parser.add_argument(
        "--eight-bit-keep", action="append", metavar="NAME", help="linear maps that keep their weights; repeatable"
    )
    error = "of a decision on its held-out episodes, above which 8 bits are refused; default: 0.05"
    parser.add_argument("--eight-bit-error", type=float, metavar="X", help=error)


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--robots", type=at_least(1), default=1, metavar="N", help="at a time; default: %(default)s")
    parser.add_argument("--robot", metavar="NAME", help="of several that it was trained on; default: the first")
    where = "address to listen on; whoever reaches it can use the policy; default: %(default)s, this machine alone"
    parser.add_argument("--host", default="127.0.0.1", help=where)
    parser.add_argument("--port", type=at_least(0), default=8000, help="0: a free one; default: %(default)s")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="of the rollout, as video.steps=2; repeat it"
    )
    _eight_bit(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise where a robot gives no seed")


def _distill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the teacher")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set in LeRobot layout")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the student's checkpoint, a new folder")
    parser.add_argument("--camera", metavar="FEATURE", help="of --data; default: its only one, or the checkpoint's")
    parser.add_argument("--teacher-steps", type=at_least(1), metavar="N", help="of each stream; default: 5")
    parser.add_argument("--steps", type=at_least(1), metavar="N", help="of the training; default: 200")
    parser.add_argument("--batch", type=at_least(1), metavar="N", help="clips of a step; default: 8")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="default: 0.0002")
    recorded = "share of the recorded clip in the targets, else the teacher's steps; default: 0.1"
    parser.add_argument("--recorded", type=float, metavar="X", help=recorded)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0)


def _record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--simulator", metavar="NAME", action="append", required=True, help=f"{SIMULATOR}; repeatable")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument("--episodes", type=at_least(1), default=50, metavar="N", help="of each; default: %(default)s")
    parser.add_argument("--held-out", type=at_least(0), default=0, metavar="N", help="further ones, not to train on")
    parser.add_argument(
        "--camera", action="append", metavar="NAME", help="to render; without, states alone; repeatable"
    )
    parser.add_argument(
        "--size", type=at_least(8), default=64, metavar="PIXELS", help="of pictures; default: %(default)s"
    )
    every = "actions from one picture to the next; default: %(default)s"
    parser.add_argument("--picture-every", type=at_least(1), default=1, metavar="N", help=every)
    parser.add_argument(
        "--interrupted", type=float, default=0.6, metavar="P", help="share that is; default: %(default)s"
    )
    parser.add_argument("--jobs", type=at_least(1), metavar="N", help="processes; default: the machine's cores")
    parser.add_argument("--timeout", type=positive_seconds, default=120.0, metavar="S", help="of one demonstration")
    parser.add_argument("--overwrite", action="store_true", help="lose the data set that --out holds")
    parser.add_argument("--seed", type=at_least(0), default=0)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--simulator", metavar="NAME", action="append", default=[], help=f"{SIMULATOR}; repeatable")
    parser.add_argument("--data", type=Path, metavar="DIR", help="also errors on its held-out episodes, without acting")
    parser.add_argument("--episodes", type=at_least(1), default=20, metavar="N", help="of each; default: %(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of episode 0; episode i has SEED + i")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of what it writes; default: eval/ beside it")
    parser.add_argument("--overwrite", action="store_true", help="lose the evaluation that --out holds")
    parser.add_argument("--robot", metavar="NAME", help="of several that it was trained on; default: the first")
    parser.add_argument("--program", metavar="P", help="interaction program; default: the checkpoint's")
    parser.add_argument("--chunk", type=at_least(1), metavar="N", help="frames of a chunk; default: the checkpoint's")
    parser.add_argument("--steps", type=at_least(1), metavar="N", help="denoising steps; default: the checkpoint's")
    parser.add_argument("--window", type=at_least(2), metavar="N", help="in half chunks; default: the checkpoint's")
    _eight_bit(parser)
    parser.add_argument("--horizon", type=at_least(1), metavar="N", help="actions of an episode; default: its own")
    parser.add_argument("--batch", type=at_least(1), default=16, metavar="N", help="episodes at once; %(default)s")
    parser.add_argument("--timeout", type=positive_seconds, default=120.0, metavar="S", help="of a simulator's answer")
    parser.add_argument("--keep-frames", action="store_true", help="store what was observed and imagined")
    parser.add_argument("--films", type=Path, metavar="DIR", help="a film of each episode, beside what was imagined")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")


def _ablate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("run", "report"), default="run", help="default: %(default)s")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="of report: what to report")
    parser.add_argument("--suite", choices=("metaworld",), default="metaworld", help="default: %(default)s")
    parser.add_argument("--protocol", type=Path, metavar="FILE.json", help="another one, as --out's protocol.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder; the same call goes on with what it holds")
    parser.add_argument("--track", choices=("state", "pixels", "both"), default="state", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="minutes: two programs, two tasks, few steps")
    parser.add_argument("--full", action="store_true", help="also three seeds of pixels, and five denoising steps")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--processes", type=at_least(1), default=1, metavar="N", help="trainings at once; %(default)s")
    where.add_argument("--ray", metavar="ADDRESS", help="on the machines of a Ray cluster, HOST:PORT of its head")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--layout", required=True, metavar="NAME", help="diffusers, openwam, ...: see docs/weights.md")
    parser.add_argument("--without", action="append", default=[], metavar="PART", help="to leave out; repeatable")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what it writes, new or empty")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="ours, or weights in the package's keys")
    parser.add_argument(
        "--against",
        choices=("openwam", "openwam_parallel", "diffusers"),
        required=True,
        help="the package to compare with",
    )
    parser.add_argument("--without", action="append", default=[], metavar="PART", help="of the weights; repeatable")
    parser.add_argument("--head-dim", type=at_least(2), metavar="N", help="of weights that do not tell; default: 128")
    parser.add_argument("--actions-per-frame", type=at_least(1), metavar="N", help="of the inputs; default: 1")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="of a layer's size; %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the inputs")


def _mask(parser: argparse.ArgumentParser) -> None:
    # names and ranges are checked by wam_kernels.masks.visibility.Geometry, their one home; its errors list the choices
    parser.add_argument("--program", default="joint", help="interaction program; default: %(default)s")
    parser.add_argument(
        "--history", default="video_only", help="earlier clean tokens that are attended to; default: %(default)s"
    )
    sizes = {"chunk-size": 4, "window": 64, "frames": 16, "video-tokens": 32, "action-tokens": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=at_least(1), default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--chunk-origin", type=int, default=0, metavar="F", help="first frame of chunk 0")
    parser.add_argument("--prefix-frames", type=at_least(0), default=0, metavar="N", help="external clean video prefix")
    parser.add_argument("--singleton-frame", type=at_least(0), metavar="F", help="frame that starts with no history")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="write a picture as well")


# name -> (module with run(args), its flags, one line of help); without flags of ours, all that follows is args.rest
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None] | None, str]] = {
    "demo": (
        "wam_models.cli.demo",
        _demo,
        "train a small model, act with it in simulated tasks and compare what it imagines",
    ),
    "train": ("wam_models.cli.train", _train, "train a model"),
    "encode": ("wam_models.cli.encode", _encode, "write a data set's latents and embedded instructions to disk"),
    "validate": ("wam_models.cli.validate", _validate, "list all that is wrong with a config, before a training"),
    "rollout": ("wam_models.cli.rollout", _rollout, "denoise video and actions of one episode from a checkpoint"),
    "serve": ("wam_models.cli.serve", _serve, "answer robots over a socket, as openpi-client asks"),
    "distill": ("wam_models.cli.distill", _distill, "train a policy to take one denoising step in place of several"),
    "record": ("wam_models.cli.record", _record, "record demonstrations of a simulator's scripted expert"),
    "eval": ("wam_models.cli.eval", _eval, "measure how often a policy succeeds in simulators"),
    "ablate": ("wam_models.cli.ablate", _ablate, "compare the interaction programs in simulators, with intervals"),
    "export": ("wam_models.cli.export", _export, "write a checkpoint's weights in another system's keys"),
    "verify": ("wam_models.cli.verify", _verify, "compare weights layer by layer with the package they are from"),
    "mask": ("wam_models.cli.mask", _mask, "show which tokens attend to which"),
    "bench": ("wam_models.cli.bench", None, "measure this machine: kernels, peers, training step, rollout"),
    "doctor": ("wam_models.doctor", lambda parser: None, "show what this machine offers and which op runs where"),
}


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        from wam_kernels import __version__  # loads torch, so only when asked for

        print(f"wam-kernels {__version__}")
        parser.exit()


def make_parser() -> CommandParser:
    # no abbreviations: a script that says --s would change its meaning with the next flag
    parser = CommandParser(
        prog="wam", description="World-action models: train, roll out, look inside.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version of wam-kernels and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, add_flags, line) in COMMANDS.items():
        command = commands.add_parser(
            name, help=line, description=line.capitalize() + ".", allow_abbrev=False, add_help=add_flags is not None
        )
        if add_flags is not None:
            add_flags(command)
    parser.commands = commands.choices
    return parser
