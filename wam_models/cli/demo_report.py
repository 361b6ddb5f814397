"""What ``wam demo`` says about its run: sentences, promises and the page ``report.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.clips import STRIDE
from ..evaluate import Evaluation, Row, table
from ..objectives import GJD
from ..rollout.config import CONDITIONAL_CHUNK
from ..train.log import loss_ends


def verdicts(evaluation: Evaluation) -> list[str]:
    """What the rows say, in words: each objective against each baseline, with the programs of ``joint`` together."""
    sentences = []
    for objective in dict.fromkeys(r.objective for r in evaluation.rows):
        rows = [r for r in evaluation.rows if r.objective == objective]
        name = objective.replace("_", " ")
        if rows[0].action_rmse is not None:
            for baseline, label in (
                ("mean_action_rmse", "the mean action"),
                ("repeat_action_rmse", f"repeating the last action for {rows[0].chunk_actions} steps"),
            ):
                sentences.append(_compared(name, rows, "action_rmse", baseline, label))
        if rows[0].psnr is not None:
            label = f"repeating the last frame for {rows[0].chunk_frames}"
            sentences.append(_compared(name, rows, "psnr", "repeat_frame_psnr", label))
    return sentences


def _compared(name: str, rows: list[Row], mine: str, baseline: str, label: str) -> str:
    """One sentence: the range of the rows' values, and which of them are better than the baseline."""
    higher_is_better = mine == "psnr"
    what, unit, digits = ("imagined frames", " dB", 2) if higher_is_better else ("action error", "", 3)
    values, bar = {r.program: getattr(r, mine) for r in rows}, getattr(rows[0], baseline)
    low, high = (f"{f(values.values()):.{digits}f}" for f in (min, max))
    spread = f"{low}{unit}" if len(rows) == 1 else f"{low} to {high}{unit}"
    better = [p for p, v in values.items() if (v > bar if higher_is_better else v < bar)]
    if len(better) == len(rows):
        verdict = "beats" if len(rows) == 1 else "every program beats"
    elif not better:
        verdict = "does NOT beat" if len(rows) == 1 else "NO program beats"
    else:
        verdict = f"{', '.join(better)} beat{'s' if len(better) == 1 else ''}, the others do NOT beat,"
    return f"{name}, {what} {spread}: {verdict} {label} ({bar:.{digits}f}{unit})."


def promises(evaluation: Evaluation) -> dict[str, bool]:
    """What the demo promises: every action prediction beats the mean action, inverse dynamics the last action too."""
    inverse = evaluation.row("inverse_dynamics", GJD)
    return {
        "every action prediction beats the mean action": all(
            _is_below(r.action_rmse, r.mean_action_rmse) for r in evaluation.rows if r.action_rmse is not None
        ),
        "inverse dynamics beats repeating the last action": _is_below(inverse.action_rmse, inverse.repeat_action_rmse),
    }


def _is_below(error: float | None, baseline: float | None) -> bool:
    return error is not None and baseline is not None and error < baseline


def loss_line(log: Sequence[Mapping[str, Any]]) -> str:
    """First and last losses of both streams, each a mean over up to 30 steps."""
    parts = []
    steps, losses = loss_ends(log)
    for stream, (first, last) in losses.items():
        if first is not None and last is not None:
            parts.append(f"{stream} {first:.3f} -> {last:.3f}")
    return f"loss (means of the first and the last {steps} steps): " + ", ".join(parts)


def how_to_read(evaluation: Evaluation, episodes: Sequence[int], chunk_size: int, samples: int) -> str:
    """What the table's episodes, errors and chunks are."""
    (first, end), steps = evaluation.frames, evaluation.steps
    return (
        f"Held-out episodes {', '.join(map(str, episodes))}, frames {first} to {end - 1} of each, real history before "
        f"every chunk, {steps} denoising step{'s' if steps > 1 else ''}, the mean of {samples} predictions. Action "
        "errors are root mean squares over the dimensions that vary, in units of their standard deviation in "
        f"training; a chunk has {STRIDE * chunk_size} actions ({chunk_size} frames), of a conditional objective "
        f"{STRIDE * CONDITIONAL_CHUNK} ({CONDITIONAL_CHUNK} frame). PSNR is against the recorded pictures; "
        '"repeat last" repeats the last latent frame before the chunk; seconds are the median for one episode.'
    )


def _raw(evaluation: Evaluation) -> str:
    raw = {r.chunk_frames: r.repeat_picture_psnr for r in evaluation.rows if r.repeat_picture_psnr is not None}
    return ", ".join(f"{v:.2f} dB over {k} frame{'s' if k > 1 else ''}" for k, v in sorted(raw.items()))


def page(data: Any, facts: str, reading: str, evaluation: Evaluation, checkpoint: Any) -> str:
    """``report.md``, beside the pictures that it shows.

    Args:
        data: The data set's folder.
        facts: How the model was trained.
        reading: How the table is to be read.
        evaluation: Its rows.
        checkpoint: The folder to roll out from.
    """
    sentences = "\n".join(f"- {sentence}" for sentence in verdicts(evaluation))
    kept = "\n".join(f"- {'Yes' if ok else 'NO'}: {what}." for what, ok in promises(evaluation).items())
    return f"""# Demo: a generalist joint-denoising world-action model on {data}

{facts}

![loss](loss.png)

## How well it predicts

{reading}

{table(evaluation)}

{sentences}

{kept}

Repeating the last frame as a picture, which never went through the latent transform, gives {_raw(evaluation)}.

## What it imagines

Open loop from one observed frame ([animation](imagined.gif)): no real frame is used after the first.

![imagined](imagined.png)

## Which token attends to which

![masks](masks.png)

Next: `wam rollout --checkpoint {checkpoint} --data {data}`
"""
