"""Success rates of arms from the rows of episodes: pooled, of each seed, and paired with the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..simulator.evaluate import wilson
from .protocol import BASELINE

Row = Mapping[str, Any]
RESAMPLES = 4000


@dataclass(frozen=True)
class Difference:
    """Success of an arm minus that of the baseline, in the same initial states with the same seeds of training."""

    seeds: tuple[int, ...]  # that both have
    value: float
    low: float | None  # of a 95 % interval; None of a single seed, which says nothing about another
    high: float | None


@dataclass(frozen=True)
class Rates:
    """Successes of an arm."""

    successes: int
    episodes: int
    low: float  # Wilson's interval of the pooled episodes
    high: float
    seeds: Mapping[int, tuple[int, int]]  # seed -> successes, episodes


def rates(rows: Sequence[Row]) -> Rates:
    """Of rows of one arm under one setting."""
    successes = sum(row["success"] for row in rows)
    seeds = {
        seed: (sum(row["success"] for row in rows if row["seed"] == seed), sum(row["seed"] == seed for row in rows))
        for seed in sorted({row["seed"] for row in rows})
    }
    return Rates(successes, len(rows), *wilson(successes, len(rows)), seeds)


def table_of(rows: Sequence[Row]) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """arm -> seed -> simulator -> success of its episodes, float64, in the order of their numbers."""
    found: dict[str, dict[int, dict[str, list]]] = {}
    for row in sorted(rows, key=lambda r: r["episode"]):
        simulators = found.setdefault(row["arm"], {}).setdefault(row["seed"], {})
        simulators.setdefault(row["simulator"], []).append(float(row["success"]))
    return {a: {s: {n: np.array(v) for n, v in t.items()} for s, t in by.items()} for a, by in found.items()}


def difference(rows: Sequence[Row], arm: str, *, baseline: str = BASELINE, seed: int = 0) -> Difference | None:
    """Paired difference of an arm to the baseline, with a bootstrap interval that is clustered by training seed.

    Seeds of training are drawn with replacement, then initial states within each simulator of each drawn seed. With S
    seeds the first draw understates their variance by (S - 1) / S: the interval of three seeds is rather too narrow.

    Args:
        rows: Of all arms under one setting.
        arm: The arm.
        baseline: The arm that it is compared with.
        seed: Of the bootstrap.

    Returns:
        None where they have no seed in common.
    """
    table = table_of(rows)
    own, other = table.get(arm, {}), table.get(baseline, {})
    seeds = tuple(sorted(set(own) & set(other)))
    if not seeds:
        return None
    pairs = [[own[s][name] - other[s][name] for name in own[s]] for s in seeds]
    value = float(np.mean([np.concatenate(simulators).mean() for simulators in pairs]))
    if len(seeds) == 1:
        return Difference(seeds, value, None, None)
    rng = np.random.default_rng(seed)
    # a mean of each seed for each resample: initial states within simulators
    means = np.stack([_resampled_means(simulators, rng) for simulators in pairs])
    chosen = rng.integers(len(seeds), size=(len(seeds), RESAMPLES))
    drawn = means[chosen, np.arange(RESAMPLES)].mean(0)
    # the same seed drawn twice has the same resampled states: between seeds is where the uncertainty is
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Difference(seeds, value, float(low), float(high))


def _resampled_means(simulators: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Mean over simulators' episodes, drawn with replacement within each: ``[RESAMPLES]``."""
    total = np.zeros(RESAMPLES)
    for differences in simulators:
        drawn = rng.integers(len(differences), size=(RESAMPLES, len(differences)))
        total += differences[drawn].sum(1)
    return total / sum(map(len, simulators))


def permuted_differences(rows: Sequence[Row], arms: Sequence[str], *, times: int = 1000, seed: int = 0) -> np.ndarray:
    """Largest absolute difference to the baseline among arms whose labels were permuted in each (seed, simulator,
    episode), where all of them are: ``[times]``. What is not larger than these is no difference."""
    blocks: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["arm"] in arms:
            blocks.setdefault((row["seed"], row["simulator"], row["episode"]), {})[row["arm"]] = float(row["success"])
    whole = np.array([[block[arm] for arm in arms] for block in blocks.values() if len(block) == len(arms)])
    if not len(whole):
        return np.empty(0)
    rng, at = np.random.default_rng(seed), list(arms).index(BASELINE)
    found = np.empty(times)
    for i in range(times):
        means = rng.permuted(whole, axis=1).mean(0)
        found[i] = np.abs(means - means[at]).max()
    return found


def relative_video_error(rows: Sequence[Row]) -> float | None:
    """Mean square error of what was imagined over that of the last observed frame repeated, both summed over the frames
    of a chunk and averaged over episodes; None where nothing was imagined."""
    pairs = [(row["imagined_mse"], row["still_mse"]) for row in rows if row.get("imagined_mse")]
    if not pairs:
        return None
    own, still = (float(np.mean([np.mean(pair[i]) for pair in pairs])) for i in (0, 1))
    return own / still if still else None
