"""What lies in the folder of a run beside its log: its config, and a page that says what was run and how to go on."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from wam_kernels import __version__

from ..costs import parameters
from ..data import ClipDataset
from ..train.recipe import Recipe

README, RECIPE = "README.md", "recipe.json"


def run_files(
    recipe: Recipe, data: ClipDataset, *, out: Path, argv: Sequence[str], processes: int, step: int
) -> dict[str, str]:
    """Name and text of each: ``recipe.json``, which ``wam train`` takes, and ``README.md``.

    Args:
        recipe: The run's, with what flags have put into it.
        data: What it trains on.
        out: Its folder.
        argv: Of the command line, after ``wam``.
        processes: That train together.
        step: Steps done before, by the run that this one goes on from.
    """
    page = _page(recipe, data, out, argv, processes, step)
    return {RECIPE: json.dumps(recipe.to_dict(), indent=1) + "\n", README: page}


def _page(recipe: Recipe, data: ClipDataset, out: Path, argv: Sequence[str], processes: int, step: int) -> str:
    config, wam = recipe.train, "wam"
    command = shlex.join(["wam", *argv])
    if processes > 1:
        wam = f"torchrun --nproc-per-node {processes} -m wam_models"
        command = shlex.join([*wam.split(), *argv])
    checkpoint, first = shlex.quote(str(out / "checkpoint")), shlex.quote(recipe.data[0].path)
    simulator = shlex.quote((*recipe.simulator, "NAME")[0])
    begun = "Begun" if not step else f"Resumed after step {step},"
    sets = ", ".join(f"`{one.path}`" for one in recipe.data)
    frames = sum(data.length(i) for i in data.train)
    at_once = f"{config.tokens} tokens, packed," if config.tokens else f"{config.batch} clips of {config.frames} frames"
    return f"""# A run of wam train

{begun} {datetime.now(UTC):%Y-%m-%d %H:%M} UTC in `{Path.cwd()}`:

```sh
{command}
```

| | |
| --- | --- |
| model | {parameters(config.model):,} parameters, {config.model.topology}; programs {", ".join(config.programs)} |
| data | {sets}: {len(data.train)} episodes of {frames} latent frames to train on, {len(data.held_out)} held out |
| steps | {config.steps} of {at_once}, {config.optimizer}, learning rate {config.learning_rate:g}, {config.schedule} |
| seed | {recipe.seed} |
| on | {processes} process{"es" * (processes > 1)}, {recipe.device} |
| with | wam-kernels {__version__}, torch {torch.__version__}, Python {sys.version.split()[0]} |

`{RECIPE}` is all of the config; `log.jsonl` has a row for each step; `checkpoint/` is the latest.

## Go on

```sh
{wam} train {shlex.quote(str(out / RECIPE))} --resume {checkpoint}
wam rollout --checkpoint {checkpoint} --data {first}
wam eval --checkpoint {checkpoint} --simulator {simulator}
wam export --checkpoint {checkpoint} --layout openwam --out {shlex.quote(str(out / "export"))}
tensorboard --logdir {shlex.quote(str(out / "tensorboard"))}
```

The first goes on to step {config.steps}, or with `--steps N` beyond it. The last needs a run with `--tensorboard`.
"""
