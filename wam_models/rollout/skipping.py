"""Forwards of a denoising loop that are left out, because what they would give is close to what is known.

Two rules, each with a threshold of ``RolloutConfig`` and off without one:

- ``reuse_flow``: the flows of two successive forwards agree, so the next one is left out and the last flow used again
  (DreamZero, arXiv 2602.15922). The forward after that runs.
- ``reuse_chunk``: what the blocks add in the first forward of a stage, which always runs, is close to what they added
  there in the last chunk that became history; so in each later forward whose tokens are close to those of then, what
  the blocks added then is added again (C3ache, arXiv 2606.08962).

Each rollout of a batch decides for itself, by its own numbers alone: in a batch and on its own it gets the same ones.
The blocks are left out where all rollouts do. The host has to know, so it waits for the device once a forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from .chunk_forward import ChunkForward
from .config import RolloutConfig
from .stages import Forward, Stage

_Of = dict[int, Tensor]  # of each stream


class Skipping:
    """The flows of a loop, run or reused.

    Args:
        forward: Of the chunk.
        config: The thresholds.

    Attributes:
        ran: int64 ``[B k]``, the forwards of the chunk that were run for each.
    """

    def __init__(self, forward: ChunkForward, config: RolloutConfig) -> None:
        self.forward, self.config = forward, config
        self._batch = forward.layout.batch * forward.candidates
        # of a forward of the last chunk in history: tokens that entered the blocks, NaN of a rollout that has none, and
        # what the blocks added
        self._known: dict[tuple[Stage, int], tuple[_Of, _Of]] = {}
        self._proposed: dict[tuple[Stage, int], tuple[_Of, _Of]] = {}
        self.begin()

    def _mask(self, value: bool) -> Tensor:
        return torch.full((self._batch,), value, device=self.forward.model.device)

    def begin(self) -> None:
        """Of a chunk: nothing of it is known yet."""
        self.ran = torch.zeros(self._batch, dtype=torch.int64, device=self.forward.model.device)
        self._flows: _Of = {}
        self._agree = self._alike = self._mask(False)

    def remember_chunk(self) -> None:
        """The chunk that was proposed last has become history, or what was observed in its place."""
        self._known |= self._proposed
        self._proposed = {}

    def state(self) -> tuple[dict, dict]:
        """What is known of the last chunk and of the one that was proposed, for :meth:`restore`."""
        return dict(self._known), dict(self._proposed)

    def restore(self, state: tuple[dict, dict]) -> None:
        """As it was; chunks since then are taken back."""
        self._known, self._proposed = dict(state[0]), dict(state[1])

    def forget(self, rollouts: Sequence[int]) -> None:
        """Another text, context or episode: what is known of these rollouts says nothing about it."""
        self._proposed = {}
        for entered, _ in self._known.values():
            for t in entered.values():
                for b in rollouts:
                    t[b :: self._batch] = float("nan")

    def flows(self, key: tuple[Stage, int], forward: Forward, sigma: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """As ``ChunkForward.flows``; ``key`` is the stage and the number of the forward in it."""
        streams, live, read_later = forward
        may_skip = streams == live and not read_later  # else the forward renews keys and values for later ones
        again = self._agree if may_skip and set(self._flows) == set(live) else self._mask(False)
        if bool(again.all()):
            found, self._agree = dict(self._flows), self._mask(False)
            return found
        if self.config.reuse_chunk is None:
            near, found = again, self.forward.flows(streams, sigma, live)
        else:
            near, found = self._by_residuals(key, streams, sigma, live, again, may_skip)
        self.ran += ~near
        if bool(again.any()):
            found = self._mixed(again, self._flows, found)
        self._agree = self._agreement(found) & ~near
        self._flows = {s: t.clone() for s, t in found.items()}
        return found

    def _by_residuals(
        self, key: tuple[Stage, int], streams: Sequence[int], sigma: Mapping[int, Tensor], live: Sequence[int],
        again: Tensor, may_skip: bool,
    ) -> tuple[Tensor, _Of]:  # fmt: skip
        """Which rollouts leave the forward out, those of ``again`` among them, and the flows of the others."""
        tokens = self.forward.embedded(streams, sigma)
        entered = {s: t.x for s, t in enumerate(tokens) if t is not None}
        old_entered, old_added = self._known.get(key, ({}, {}))
        near = again | self._alike & self._close(entered, old_entered) if may_skip and key[1] else again
        reused = near & ~again
        if bool(near.all()):
            added = old_added
        else:
            added = self.forward.added(streams, tokens, live)
            added = self._mixed(reused, old_added, added) if bool(reused.any()) else added
        if key[1] == 0:
            self._alike = self._close(entered, old_entered) & self._close(added, old_added)
        nothing = {s: torch.full_like(t, float("nan")) for s, t in entered.items()}
        kept = self._mixed(near, old_entered or nothing, entered), self._mixed(near, old_added or added, added)
        self._proposed[key] = kept
        return near, self.forward.flows_of(tokens, added)

    def _per_rollout(self, t: Tensor) -> Tensor:
        """``[B k, everything]``; the halves of guidance side by side."""
        return t.unflatten(0, (-1, self._batch)).movedim(1, 0).flatten(1).float()

    def _close(self, now: _Of, then: _Of) -> Tensor:
        """Whether all streams of a rollout are within ``reuse_chunk``, relatively; never where nothing is known."""
        if set(now) != set(then):
            return self._mask(False)
        close = self._mask(True)
        for s, t in now.items():
            new, old = self._per_rollout(t), self._per_rollout(then[s])
            close = close & ((new - old).norm(dim=1) <= cast(float, self.config.reuse_chunk) * old.norm(dim=1))
        return close

    def _agreement(self, flows: _Of) -> Tensor:
        if self.config.reuse_flow is None or set(flows) != set(self._flows):
            return self._mask(False)
        agree = self._mask(True)
        for s, flow in flows.items():
            now, then = self._per_rollout(flow), self._per_rollout(self._flows[s])
            agree = agree & (torch.cosine_similarity(now, then, dim=1) >= self.config.reuse_flow)
        return agree

    def _mixed(self, chosen: Tensor, then: _Of, now: _Of) -> _Of:
        """Of each stream, ``then`` for the chosen rollouts and ``now`` for the others."""
        found = {}
        for s, t in now.items():
            of_samples = chosen.repeat(t.shape[0] // self._batch)
            found[s] = torch.where(of_samples.view(-1, *[1] * (t.ndim - 1)), then[s].to(t.dtype), t)
        return found
