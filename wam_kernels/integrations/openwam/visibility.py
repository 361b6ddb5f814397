"""Which token attends to which in one of OpenWAM's prepared attention profiles, as a table over runs of tokens.

A profile comes with its rule (``self_attention_visibility``) and with integer attributes of every token
(``token_layout``), which are all that the rule reads. Tokens in a row with the same attributes are a *run*: a chunk, or
a frame, of one segment. So the rule is asked once for every pair of runs, and everything else is read off that small
table: the plan of a training step, the slots that a denoising step attends to, and what depends on what. Nothing of
size S x S is built, and no rule is written down a second time that could disagree with the package's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ... import Geometry, block_attention, cached_attention, compile_plan
from ...masks.ranges import Ranges
from ...masks.visibility import ACTION, NOISY, VIDEO, tokens
from ...masks.visibility import visible as table
from ...runtime.host import host_side
from .._patching import NotOurs

Slices = tuple[tuple[int, int], ...]

_ATTRIBUTES = ("seq_id", "stream_id", "noise_id", "chunk_id", "block_id", "valid_as_query", "valid_as_kv")


def read_profile(profile) -> Visibility:
    """The visibility of a ``PreparedAttentionProfile``; its masks are not read.

    Raises:
        NotOurs: the profile is not of the chunked video-action family.
    """
    name, family, metadata = profile.spec.name, profile.spec.family, profile.metadata
    layout, rule = profile.token_layout, profile.self_attention_visibility
    if family != "chunked_exact" or layout is None or rule is None:
        raise NotOurs(f"attention profile {name!r} of family {family!r}")
    names: tuple[str, ...] = _ATTRIBUTES
    if metadata.get("singleton_chunk_frame") is not None or metadata.get("conditional_history_policy") != "none":
        names = (*names, "frame_id")  # the two rules that look at single frames
    attributes = torch.stack([getattr(layout, name).long() for name in names])
    new = torch.ones(layout.token_count, dtype=torch.bool, device=layout.device)
    new[1:] = (attributes[:, 1:] != attributes[:, :-1]).any(0)
    first = new.nonzero()[:, 0]
    attends = rule(first[:, None], first[None, :])
    run = np.cumsum(new.cpu().numpy()) - 1
    visible = Visibility(run, run, attends.cpu().numpy(), layout.seq_id[first].cpu().numpy())
    if proprio := int(metadata.get("proprio_context_token_count", 0)):
        base = int(metadata["base_text_token_count"])
        visible.proprio = Proprio(layout.chunk_id[first].cpu().numpy(), base, base + proprio)
    visible.geometry = _geometry(profile, visible, first.cpu().numpy(), "frame_id" in names)
    return visible


def _geometry(profile, visible: Visibility, first: np.ndarray, by_frame: bool) -> Geometry | None:
    """The geometry with the same visibility, for one sample; its plan has slightly better tiles than that of ranges.

    It is only believed where its predicate gives the table that was read off the profile.
    """
    layout, known = profile.token_layout, profile.metadata
    if known["batch_size"] != 1:
        return None
    stream, noise, is_key = (t.cpu().numpy() for t in (layout.stream_id, layout.noise_id, layout.valid_as_kv))
    video_frames = known["latent_shape"][2]
    action_frames = 0 if known["action_shape"] is None else known["action_shape"][2]
    video_tokens = ((stream == VIDEO) & (noise == NOISY)).sum() // max(1, video_frames)
    action_keys = is_key[(stream == ACTION) & (noise == NOISY)]
    action_tokens = max(1, action_keys.size // max(1, action_frames))
    conditional = known["conditional_history_policy"]
    try:
        geometry = Geometry(
            program=known["current_block_coupling"],
            history=str(known["history_stream_visibility"].value),
            video_frames=video_frames,
            video_tokens=int(video_tokens),
            action_frames=action_frames,
            action_tokens=action_tokens,
            chunk_size=known["chunk_size"],
            window=known["window_size"],
            chunk_origin=known["chunk_origin_frame"],
            prefix_frames=known["prefix_condition_frames"],
            singleton_frame=known["singleton_chunk_frame"],
            conditional_history=None if conditional == "none" else conditional,
            startup_action_frames=int(np.argmax(np.append(action_keys, True))) // action_tokens,
        )
    except ValueError:
        return None  # ranges have no such limits
    length = int((stream >= 0).sum())
    if geometry.length != length:
        return None
    own, first, run = tokens(geometry), first[first < length], visible.query_run[:length]
    names = ["stream", "noise", "chunk", "block", "is_key"] + ["frame"] * by_frame
    same = all(np.array_equal(a, a[first][run]) for a in (getattr(own, name) for name in names))
    attends = visible.attends[: first.size, : first.size]
    if not same or not np.array_equal(table(geometry, own[first[:, None]], own[first[None, :]]), attends):
        return None
    return geometry


class Proprio(NamedTuple):
    """Proprioception as tokens of the text context, each of which the queries of its own chunk attend to.

    Of a sample's text, tokens ``[0, begin)`` are words, ``[begin, end)`` the states of chunks 0, 1 and so on, the rest
    is padding.
    """

    chunk_of_run: np.ndarray  # int64 [runs]
    begin: int
    end: int


def of_samples(sample_of_token: np.ndarray) -> Visibility:
    """Independent sequences, one after another: a token attends to those of its own sample, int64 ``[S]``."""
    samples = np.arange(sample_of_token.max() + 1)
    return Visibility(sample_of_token, sample_of_token, np.eye(samples.size, dtype=bool), samples)


class Visibility:
    """Query tokens, key tokens, and which runs of them attend to which. Immutable.

    Stands where the package keeps a FlexAttention block mask and goes the way of one through its code.

    Args:
        query_run: int64 ``[S]``, run of every query token.
        key_run: int64 ``[T]``, run of every key token.
        attends: bool ``[runs, runs]``, of queries to keys.
        sample_of_run: int64 ``[runs]``; below 0: padding.
    """

    def __init__(
        self, query_run: np.ndarray, key_run: np.ndarray, attends: np.ndarray, sample_of_run: np.ndarray
    ) -> None:
        self.query_run, self.key_run = query_run, key_run
        self.attends, self.sample_of_run = attends, sample_of_run
        self.geometry: Geometry | None = None
        self.proprio: Proprio | None = None
        self._text_masks: dict[tuple[int, torch.device], Tensor] = {}

    def select(self, queries: Tensor, keys: Tensor | None) -> Visibility:
        """The same rule between some of the queries and some of the keys, None for all, given by index."""
        q_run = self.query_run[queries.cpu().numpy()]
        k_run = self.key_run if keys is None else self.key_run[keys.cpu().numpy()]
        part = Visibility(q_run, k_run, self.attends, self.sample_of_run)
        part.proprio = self.proprio
        return part

    def rule(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The rule on token indices, as the package asks for it: a look-up in the table."""
        arrays = (self.attends, self.query_run, self.key_run)
        attends, q_run, k_run = (torch.from_numpy(a).to(queries.device) for a in arrays)
        return attends[q_run[queries], k_run[keys]]

    def mask(self, device: torch.device) -> Tensor:
        """Dense bool ``[S, T]``, for what is left to the original code."""
        return torch.from_numpy(self.attends[self.query_run][:, self.key_run]).to(device)

    @host_side
    def text_mask(self, text_tokens: int, device: torch.device) -> Tensor:
        """Dense bool ``[S, text_tokens]``: the texts of the samples, one after another in equal shares."""
        key = text_tokens, device
        if key not in self._text_masks:
            samples = self.sample_of_run.max() + 1
            of_text = np.repeat(np.arange(samples), text_tokens // samples)
            attends = self.sample_of_run[self.query_run][:, None] == of_text
            if self.proprio is not None:
                at = np.tile(np.arange(text_tokens // samples), samples)
                own = at - self.proprio.begin == self.proprio.chunk_of_run[self.query_run][:, None]
                attends &= (at < self.proprio.begin) | own & (at >= self.proprio.begin) & (at < self.proprio.end)
            self._text_masks[key] = torch.from_numpy(attends).to(device)
        return self._text_masks[key]

    def closure(self, tokens: Tensor) -> Tensor:
        """These tokens (bool ``[S]``) and all that they attend to, directly or through others."""
        required = tokens.cpu().numpy()
        runs = np.zeros(len(self.attends), bool)
        runs[self.query_run[required]] = True
        # of a run that is only asked for, not attended to, the other tokens stay out
        reached = np.zeros_like(runs)
        while True:
            grown = reached | self.attends[runs].any(0)
            if (grown == reached).all():
                return torch.from_numpy(required | reached[self.key_run]).to(tokens.device)
            reached, runs = grown, runs | grown

    @cached_property
    def _stretches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges of the stretches of queries and of keys that belong to one run, and which of them attend to which."""
        q_first, k_first = (np.flatnonzero(np.diff(run, prepend=-1)) for run in (self.query_run, self.key_run))
        attends = self.attends[self.query_run[q_first]][:, self.key_run[k_first]]
        return np.append(q_first, self.query_run.size), np.append(k_first, self.key_run.size), attends

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """``(q_ranges, k_ranges)``, int64 ``[R, 2]`` each, in order of the queries."""
        q_edges, k_edges, attends = self._stretches
        change = np.diff(np.pad(attends.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        (row, begin), (_, end) = np.nonzero(change == 1), np.nonzero(change == -1)
        return np.stack([q_edges[row], q_edges[row + 1]], 1), np.stack([k_edges[begin], k_edges[end]], 1)

    @cached_property
    def ranges(self) -> Ranges:
        return Ranges(*self._pairs, self.query_run.size, self.key_run.size)

    @cached_property
    def slots(self) -> tuple[Tensor, tuple[int, ...]]:
        """What ``cached_attention`` takes: key ranges int32 ``[1, G, R, 2]``, and how many queries each group has."""
        (q_ranges, k_ranges), (q_edges, _, _) = self._pairs, self._stretches
        groups: list[tuple[int, list]] = []
        for begin, end in zip(q_edges[:-1], q_edges[1:], strict=True):
            keys = k_ranges[q_ranges[:, 0] == begin].tolist()
            if groups and groups[-1][1] == keys:
                groups[-1] = groups[-1][0] + int(end - begin), keys
            else:
                groups.append((int(end - begin), keys))
        most = max([1, *(len(keys) for _, keys in groups)])
        padded = [keys + [[0, 0]] * (most - len(keys)) for _, keys in groups]
        return torch.tensor([padded], dtype=torch.int32), tuple(count for count, _ in groups)

    @cached_property
    def batch(self) -> Batch:
        """The samples of a profile that packs several, each with the places of its tokens."""
        sample, key_sample = self.sample_of_run[self.query_run], self.sample_of_run[self.key_run]
        samples = np.unique(sample[sample >= 0])
        if samples.size == 1:
            return Batch([(self.geometry or self.ranges, ((0, sample.size),))], sample.size)
        parts = []
        for number in samples:
            queries, keys = np.flatnonzero(sample == number), np.flatnonzero(key_sample == number)
            own = Visibility(self.query_run[queries], self.key_run[keys], self.attends, self.sample_of_run)
            parts.append((own.ranges, stretches(queries)))
        return Batch(parts, sample.size)

    def text(self, text_tokens: int) -> TextBatch | None:
        """Which tokens attend to which text, of texts in equal shares; None for one sample, which attends to all."""
        parts = self.batch.parts
        if len(parts) == 1:
            return None
        return TextBatch([s for _, s in parts], [text_tokens // len(parts)] * len(parts), self.query_run.size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention ``[B, S, H, D]`` among the tokens, differentiable."""
        return self.batch.attend(q, k, v)

    def attend_cache(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Attention of the queries ``[B, S, H, D]`` over a cache ``[B, T, H, D]`` of all keys; inference only."""
        ranges, group_rows = self.slots
        ranges = ranges.expand(q.shape[0], -1, -1, -1).contiguous().to(q.device)
        return cached_attention(q, k_cache, v_cache, ranges, group_rows=group_rows)


class Batch:
    """Samples that share one sequence: which token attends to which, and the slices where its tokens lie. The rest is
    padding."""

    def __init__(self, parts: Sequence[tuple[Geometry | Ranges, Slices]], length: int) -> None:
        self.parts, self.length = tuple(parts), length

    def mask(self, device: torch.device) -> Tensor:
        """Dense bool ``[S, S]``, for what is left to the original code; padding attends to itself, as there."""
        mask = np.eye(self.length, dtype=bool)
        for sample, slices in self.parts:
            places = np.concatenate([np.arange(begin, end) for begin, end in slices])
            mask[np.ix_(places, places)] = compile_plan(sample).mask()[0, 0].numpy()
        return torch.from_numpy(mask).to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention ``[B, S, H, D]`` inside each sample, differentiable; padding rows are 0."""
        samples = tuple(sample for sample, _ in self.parts)
        if len(self.parts) == 1 and self.parts[0][1] == ((0, self.length),):
            return block_attention(q, k, v, compile_plan([samples], length=self.length, device=q.device))
        plan = compile_plan([samples], device=q.device)
        order = [piece for _, slices in self.parts for piece in slices]
        q, k, v = (torch.cat([t[:, begin:end] for begin, end in order], 1) for t in (q, k, v))
        return scatter(block_attention(q, k, v, plan), order, self.length)


class TextBatch:
    """Cross-attention of samples that share one sequence to their own texts, which lie one after another.

    Args:
        slices: Of every sample: where its tokens are.
        text_lengths: Of every sample.
        length: S, of the sequence.
        masks: Of every sample: bool, which of its tokens attends to which of its text's; None: all to all.
    """

    def __init__(
        self,
        slices: Sequence[Slices],
        text_lengths: Sequence[int],
        length: int,
        masks: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.slices, self.text_lengths, self.length = tuple(slices), tuple(text_lengths), length
        self.masks = [
            None if mask is None else mask.reshape(-1, texts).bool()
            for mask, texts in zip(masks or [None] * len(self.slices), self.text_lengths, strict=True)
        ]

    def mask(self, device: torch.device) -> Tensor:
        """Dense bool ``[S, T]``, for what is left to the original code."""
        mask = torch.zeros(self.length, sum(self.text_lengths), dtype=torch.bool, device=device)
        at = 0
        for slices, count, own in zip(self.slices, self.text_lengths, self.masks, strict=True):
            row = 0
            for begin, end in slices:
                texts = True if own is None else own[row : row + end - begin].to(device)
                mask[begin:end, at : at + count] = texts
                row += end - begin
            at += count
        return mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q ``[1, S, H, D]``; k, v ``[1, T, H, D]``; padding rows are 0."""
        keys, values = (t.split(self.text_lengths, 1) for t in (k, v))
        outputs = [
            attend_all(torch.cat([q[:, begin:end] for begin, end in slices], 1), key, value, mask)
            for slices, key, value, mask in zip(self.slices, keys, values, self.masks, strict=True)
        ]
        return scatter(torch.cat(outputs, 1), [piece for slices in self.slices for piece in slices], self.length)


def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention for ``[B, S, H, D]``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def stretches(tokens: np.ndarray) -> Slices:
    """Sorted token indices as slices."""
    first = np.flatnonzero(np.diff(tokens, prepend=-2) != 1)
    last = np.append(first[1:], tokens.size) - 1
    return tuple((int(tokens[a]), int(tokens[b]) + 1) for a, b in zip(first, last, strict=True))


def scatter(rows: Tensor, order: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Put rows that lie in ``order`` back to their places in ``[B, length, ...]``; zeros between them."""
    pieces = rows.split([end - begin for begin, end in order], 1)
    out, at = [], 0
    for (begin, end), piece in sorted(zip(order, pieces, strict=True), key=lambda item: item[0]):
        if at < begin:
            out.append(rows.new_zeros((rows.shape[0], begin - at, *rows.shape[2:])))
        out.append(piece)
        at = end
    if at < length:
        out.append(rows.new_zeros((rows.shape[0], length - at, *rows.shape[2:])))
    return torch.cat(out, 1)
