"""The world-action model: a list of streams around one attention in every block.

The blocks are in ``blocks``; what makes tokens of a stream's data, and flows of tokens, is in ``streams``.
Letters of shapes: B samples, S tokens, F frames, n action tokens of a frame, A numbers of an action, C latent channels,
D width of an expert, T timesteps of a stream, H heads, h head width, L text tokens, N context tokens, E features of
one. Names of attributes are keys of the state dict, see ``state_dicts``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wam_kernels import FrameIndex, Plan, block_attention, rope_table
from wam_kernels.masks.visibility import ACTION, VIDEO
from wam_kernels.runtime.checks import integer

from ..config import STATE_STREAM, ModelConfig
from ..runtime.checks import memory
from .blocks import Attend, BridgeVideo, PackedBlock, PackedBlockStack, PerStream, StreamInputs, Text, Uncast, dtype_of
from .clips import ClipOrder, ClipText, clip_order
from .positions import action_positions, video_positions
from .streams import ActionSide, ContextSide, VideoSide


class WorldActionModel(nn.Module):
    """Predicts the flow of video latents and, where there are any, of actions, from one packed sequence.

    :meth:`forward` is the packed forward of training. A rollout uses the parts it is made of (:meth:`embed_text`,
    :meth:`embed`, :meth:`rope`, ``packed_block_stack``, :meth:`flows`) with an ``attend`` of its own.

    Raises:
        ValueError: a model that the device's memory cannot hold, before anything is allocated.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        device = torch.get_default_device()
        needed, available = config.matrices * torch.get_default_dtype().itemsize, memory(device)
        if needed > available:
            raise ValueError(
                f"WorldActionModel: config has {config.matrices:.3g} numbers in its matrices, which take {needed:.3g} "
                f"bytes, more than the {available:.3g} of {device}; make hidden, heads, ffn or layers smaller"
            )
        self.config = config
        self.core = VideoSide(config)
        self.packed_block_stack = PackedBlockStack(config)
        if config.has_actions:
            self.action_expert = ActionSide(config, config.streams[ACTION])
        if config.given:
            self.context = nn.ModuleDict({stream.name: ContextSide(config, stream) for stream in config.given})
        self._draw_linears()

    def reset_parameters(self) -> None:
        """Draw every parameter anew; what a model that was made on the meta device needs after ``to_empty``."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()
        self._draw_linears()

    def _draw_linears(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.config.adds_state:
            nn.init.zeros_(self.core.proprio_hidden_context_encoder.proj.weight)
        # A flow of zero is the best guess that knows nothing, and it leaves the first steps to the last layer.
        nn.init.zeros_(self.core.proj_out.weight)
        if self.config.has_actions:
            nn.init.zeros_(self.action_expert.action_proj_out.weight)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.core.patch_embedding_mlp, self.core.dtype)

    @property
    def device(self) -> torch.device:
        return self.core.scale_shift_table.device

    def checkpoint_activations(self, on: bool = True, *, selective: bool = False) -> None:
        """Recompute each block in the backward instead of keeping its activations.

        ``selective`` keeps the results of its matrix products and attentions, and computes all else again.
        """
        self.packed_block_stack.checkpoint_activations = on
        self.packed_block_stack.selective = selective

    def side(self, name: str) -> VideoSide | ActionSide | ContextSide:
        """What is outside the blocks of a stream."""
        if name == "video":
            return self.core
        return self.action_expert if name == "action" else cast(ContextSide, self.context[name])

    def embed_text(
        self,
        text_BLE: Tensor,
        keys_values: bool = False,
        *,
        modes: Tensor | None = None,
        bridge: Tensor | BridgeVideo | None = None,
    ) -> list[PerStream[Text]]:
        """The text of every block, of each stream, from raw embeddings ``[B, L, text_dim]``.

        With ``keys_values`` the cross-attention keys and values are computed here, once, for the many forwards of a
        rollout; without, each block computes its own, which keeps them out of a training step's memory. ``modes`` and
        ``bridge`` as in :meth:`forward`.
        """
        if text_BLE.ndim != 3 or text_BLE.shape[-1] != self.config.text_dim:
            raise ValueError(f"text must be [B, L, text_dim={self.config.text_dim}], got {list(text_BLE.shape)}")
        c, streams, batch = self.config, self.config.streams, text_BLE.shape[0]
        if isinstance(bridge, BridgeVideo):
            with torch.set_grad_enabled(bridge.trains and torch.is_grad_enabled()):
                bridge = self.video_features(bridge.video, bridge.timesteps.tensors[0], text_BLE, modes=modes)
        of_bridge = bridge is not None and bridge.ndim == 3 and (bridge.shape[0], bridge.shape[2])
        if (modes is None) == c.mode_token or (modes is not None and list(modes.shape) != [batch]):
            expected, got = f"int64 [{batch}]" if c.mode_token else None, None if modes is None else list(modes.shape)
            raise ValueError(f"modes must be {expected} for mode_token={c.mode_token}, got {got}")
        if (bridge is None) == bool(c.bridge_dim) or (bridge is not None and of_bridge != (batch, c.bridge_dim)):
            expected = f"[{batch}, N, {c.bridge_dim}]" if c.bridge_dim else "None"
            got = None if bridge is None else list(bridge.shape)
            raise ValueError(f"bridge must be {expected} for bridge_dim={c.bridge_dim}, got {got}")
        if modes is not None:
            mode = self.core.generalist_mode_context_encoder(modes)
            text_BLE = torch.cat([text_BLE, mode[:, None].to(text_BLE.dtype)], 1)
        of_expert = {s.name: self.side(s.name).text(text_BLE) for s in streams if s.owns_expert}
        if bridge is not None:
            features = self.action_expert.bridge_proj(bridge.to(dtype_of(self.action_expert.bridge_proj, self.dtype)))
            of_expert["action"] = torch.cat([of_expert["action"], features], 1)
        texts = tuple(of_expert[s.expert] for s in streams)
        blocks = cast(Iterable[PackedBlock], self.packed_block_stack.packed_blocks)
        if not keys_values:
            return [texts for _ in blocks]
        found: list[PerStream[Text]] = []
        for block in blocks:
            of_block = {
                s.name: block.expert(i).attn2.key_value(texts[i]) for i, s in enumerate(streams) if s.owns_expert
            }
            found.append(tuple(of_block[s.expert] for s in streams))
        return found

    def embed(
        self,
        video: tuple[Tensor, Tensor] | None,
        action: tuple[Tensor, Tensor] | None,
        context: PerStream[StreamInputs | None] | None = None,
        state: Tensor | None = None,
    ) -> PerStream[StreamInputs | None]:
        """What the streams bring to the blocks, each made of its data and timesteps; None leaves a stream out.

        Video latents are ``[B, C, F, y, x]``, actions ``[B, F, n, A]``. Timesteps run from 0 (clean) to 1000:
        ``[B, F]``, for actions also ``[B, F, n]``. ``context`` is from :meth:`embed_context`; default: left out.
        ``state`` ``[B, F, S]`` is what the action tokens of a frame are told, in a model with ``config.state_dim``.
        """
        denoised: list[StreamInputs | None] = [None if video is None else self.core.embed(*video)]
        if self.config.has_actions:
            hidden = None if state is None or action is None else self.core.proprio_hidden_context_encoder(state)
            embed = self.action_expert.embed
            denoised.append(None if action is None else embed(action[0], action[1].flatten(1), hidden))
        return *denoised, *((None,) * len(self.config.given) if context is None else context)

    def embed_context(self, context: Mapping[str, Tensor] | None, batch: int) -> PerStream[StreamInputs | None]:
        """The given streams: of features ``[B, N, E]`` by name; learned tokens need none.

        Raises:
            ValueError: features that are missing, of another shape or of no stream.
        """
        context = context or {}
        unknown = sorted(set(context) - {stream.name for stream in self.config.given})
        if unknown:
            raise ValueError(f"context must hold streams of the model's config.context, got {unknown}")
        sides = (cast(ContextSide, self.side(stream.name)) for stream in self.config.given)
        return tuple(side.embed(context.get(side.stream.name), batch) for side in sides)

    def rope(
        self,
        video_frames: Tensor | None,
        rows: int,
        columns: int,
        action_frames: Tensor | None,
        context: PerStream[StreamInputs | None] | None = None,
    ) -> PerStream[Tensor | None]:
        """Rope tables of the tokens of absolute frames ``[F]``, or ``[B, F]`` where samples differ; None: no stream."""

        def table(positions: Tensor) -> Tensor:
            c, dtype = self.config, torch.promote_types(self.dtype, torch.float32)
            return rope_table(positions, c.head_dim, theta=c.rope_theta, dtype=dtype)

        tables = [None if video_frames is None else table(video_positions(video_frames, rows, columns))]
        if self.config.has_actions:
            per_frame = self.config.actions_per_frame
            tables.append(None if action_frames is None else table(action_positions(action_frames, per_frame)))
        for stream in (None,) * len(self.config.given) if context is None else context:
            # not turned: at place 0
            nowhere = None if stream is None else torch.zeros(stream.x.shape[1], 3, device=self.device)
            tables.append(None if nowhere is None else table(nowhere.double()))
        return tuple(tables)

    def flows(
        self, streams: PerStream[StreamInputs | None], frames: int, rows: int, columns: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Flow of video ``[B, C, F, y, x]`` and of actions ``[B, F, n, A]``; None where the stream is absent."""
        video = streams[VIDEO]
        action = streams[ACTION] if self.config.has_actions else None
        return (
            None if video is None else self.core.flow(video, frames, rows, columns),
            None if action is None else self.action_expert.flow(action, frames, self.core.scale_shift_table),
        )

    def video_features(
        self, video: Tensor, timesteps: Tensor, text: Tensor, *, layer: int | None = None, modes: Tensor | None = None
    ) -> Tensor:
        """The video tokens after a block, ``[B, F * rows * columns, hidden]``, at any noise level: what a bridge takes.

        The video alone, one copy whose frames all attend to each other; later blocks do not run. For a frozen video
        expert call it under ``torch.no_grad``.

        Args:
            video: ``[B, C, F, y, x]`` latents, noised to ``timesteps``.
            timesteps: ``[B, F]``, from 0 (clean) to 1000 (noise).
            text: ``[B, L, text_dim]`` raw text embeddings.
            layer: Number of the block, from 0; default ``config.bridge_layer``.
            modes: As in :meth:`forward`.

        Raises:
            ValueError: a block that does not exist, or shapes that do not fit.
        """
        layer = self.config.bridge_layer if layer is None else layer
        layer = integer("video_features", "layer", layer, 0, self.config.layers - 1)
        rows, columns = self.token_grid(*video.shape[-2:])
        frames = torch.arange(video.shape[2], device=self.device)
        streams, rope = self.embed((video, timesteps), None), self.rope(frames, rows, columns, None)
        c = self.config
        unread = text.new_zeros(len(text), 1, c.bridge_dim) if c.bridge_dim else None
        texts = self.embed_text(text, modes=modes, bridge=unread)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        every = (True,) * len(streams)
        for i in range(layer + 1):
            block = self.packed_block_stack.packed_blocks[i]
            streams = block(streams, Uncast(*rope), texts[i], attend, None, every)
        return cast(StreamInputs, streams[VIDEO]).x

    def token_grid(self, latent_y: int, latent_x: int) -> tuple[int, int]:
        """Rows and columns of video tokens of a latent frame."""
        _, py, px = self.config.patch
        if latent_y < 1 or latent_x < 1 or latent_y % py or latent_x % px:
            raise ValueError(
                f"video must have positive rows and columns divisible by patch {(py, px)}, got {(latent_y, latent_x)}"
            )
        return latent_y // py, latent_x // px

    def forward(
        self,
        noisy_video: Tensor,
        clean_video: Tensor | None,
        noisy_action: Tensor | None,
        clean_action: Tensor | None,
        video_timesteps: Tensor | Uncast[Tensor],
        action_timesteps: Tensor | Uncast[Tensor] | None,
        text: Tensor,
        plan: Plan | None = None,
        *,
        clean_video_timesteps: Tensor | Uncast[Tensor] | None = None,
        context: Mapping[str, Tensor] | None = None,
        state: Tensor | None = None,
        modes: Tensor | None = None,
        bridge: Tensor | BridgeVideo | None = None,
        frame_start: int = 0,
        clips: Sequence[int] | None = None,
        attend: Attend | None = None,
        impl: str | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """One packed forward over ``[V_noisy | V_clean | A_noisy | A_clean | context]``.

        Args:
            noisy_video: ``[B, C, F, y, x]`` latents of the noisy copy; with ``config.full_attention`` the first frame
                is the observed one, at its own timestep.
            clean_video: As ``noisy_video``: the clean copy that later chunks attend to. None, and None for
                ``clean_action``, for plans over one copy of each stream.
            noisy_action: ``[B, F, n, A]``; the actions of frame f lead from frame f - 1 to frame f. None, as all else
                of actions, for a model that has none.
            clean_action: As ``noisy_action``.
            video_timesteps: ``[B, F]`` of the noisy copy, from 0 (clean) to 1000 (noise); not narrower than float32.
            action_timesteps: ``[B, F]``, or ``[B, F, n]`` where those of a frame differ.
            text: ``[B, L, text_dim]`` raw text embeddings.
            plan: From ``wam_kernels.compile_plan`` for the packed sequence, on the model's device.
            clean_video_timesteps: ``[B, F]`` where the clean copy is noised; default all 0.
            context: Features ``[B, N, E]`` of each stream of ``config.context`` that is made of features.
            state: ``[B, F, S]``, what the action tokens of a frame are told, noisy and clean: the state of the last
                frame before its chunk; with ``config.state_tokens`` ``[B, N, S]``, that of each of N chunks. For a
                model with ``config.state_dim``, and for no other.
            modes: int64 ``[B]`` for a model with ``config.mode_token``, of each sample its objective's place in
                ``OBJECTIVES``.
            bridge: ``[B, N, bridge_dim]`` features that the action tokens cross-attend to, such as those of
                :meth:`video_features`, for a model with ``config.bridge_dim``; or the video of which to compute them.
            frame_start: Absolute frame of the first frame: moves the rope positions, nothing else.
            clips: Frames of each of N clips that lie one after another along F in the one batch element: B is 1, F
                their sum, and ``plan`` of N samples, ``compile_plan([samples])``. Of ``text``, ``context``, ``modes``
                and ``bridge``, B is N. Clips do not attend to each other.
            attend: Instead of a plan: the attention, ``attend(layer, q, k, v)`` with ``[B, S, H, h]`` tensors.
            impl: Backend of ``block_attention``.

        Returns:
            The predicted flows of the noisy copies: ``[B, C, F, y, x]`` and ``[B, F, n, A]``, dtype of the model. Of a
            model with aligned streams also what their tokens are read out to, ``[B, N, aligned]`` by name.

        Raises:
            ValueError: shapes or dtypes that do not fit, or not exactly one of ``plan`` and ``attend``.
        """
        video = Copies(noisy_video, clean_video, plain_tensor(video_timesteps), plain_tensor(clean_video_timesteps))
        action = Copies(noisy_action, clean_action, plain_tensor(action_timesteps), None)
        frame_start = integer("WorldActionModel", "frame_start", frame_start)
        clips = None if clips is None else tuple(clips)
        frames = self._check(video, action, text, clips)
        rows, columns = self.token_grid(*noisy_video.shape[-2:])
        if (plan is None) == (attend is None):
            raise ValueError(
                "WorldActionModel: give either plan or attend, got " + ("neither" if plan is None else "both")
            )
        # noisy and clean copies share positions and states
        copies = 1 if clean_video is None else 2
        self._check_state(state, (noisy_video.shape[0], frames))
        if state is not None and self.config.state_tokens:
            context, state = {**(context or {}), STATE_STREAM: state}, None
        state = None if state is None else torch.cat([state] * copies, 1)
        given = self.embed_context(context, noisy_video.shape[0] if clips is None else len(clips))
        order = None
        if clips is not None:
            lengths = tuple(stream.x.shape[1] for stream in given if stream is not None)
            per_frame = (rows * columns, *([self.config.actions_per_frame] if self.config.has_actions else []))
            order = clip_order(clips, per_frame, copies, lengths)
            given = tuple(None if stream is None else _in_one_element(stream) for stream in given)
        if attend is None:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if order is not None:
                    return order.attend(q, k, v, cast(Plan, plan), impl)
                return block_attention(q, k, v, cast(Plan, plan), impl=impl)

        streams = self.embed(video.packed(2), action.packed(1) if self.config.has_actions else None, given, state)
        numbers = [torch.arange(frame_start, frame_start + n, device=self.device) for n in clips or (frames,)]
        positions = torch.cat(numbers).repeat(copies)
        rope = self.rope(positions, rows, columns, positions if self.config.has_actions else None, given)
        denoised = len(streams) - len(given)
        aligned = {s.name: i for i, s in enumerate(self.config.streams) if s.aligned}
        texts, wanted = self.embed_text(text, modes=modes, bridge=bridge), (*range(denoised), *aligned.values())
        if order is not None:
            texts = self._of_clips(texts, order, copies)
        after = self.packed_block_stack(streams, Uncast(*rope), texts, attend, None, wanted)
        noisy = tuple(noisy_tokens(stream, copies) for stream in after[:denoised])
        flows = cast(tuple[Tensor, Tensor | None], self.flows(noisy, frames, rows, columns))
        read_out = {
            n: cast(ContextSide, self.side(n)).read_out(cast(StreamInputs, after[i])) for n, i in aligned.items()
        }
        return (*flows, read_out) if aligned else flows

    def _of_clips(self, texts: list[PerStream[Text]], order: ClipOrder, copies: int) -> list[PerStream[Text]]:
        """The texts of clips ``[N, L, D]``, for tokens that lie in one batch element."""
        clips, firsts, found = len(cast(Tensor, texts[0][0])), 0, []
        for i, stream in enumerate(self.config.streams):
            count = clips * (copies if stream.name in ("video", "action") else 1)
            pieces = order.sizes[firsts : firsts + count]
            firsts += count
            found.append(ClipText.of(cast(Tensor, texts[0][i]), pieces, [j % clips for j in range(count)]))
        return [tuple(found) for _ in texts]

    def _check_state(self, state: Tensor | None, frames: tuple[int, ...]) -> None:
        if self.config.state_tokens and state is not None:
            return  # as context is checked
        expected = (*frames, self.config.state_dim) if self.config.state_dim else None
        if (None if state is None else tuple(state.shape)) != expected:
            what = "None for a model without state_dim" if expected is None else f"of shape {list(expected)}"
            raise ValueError(f"state must be {what}, got {None if state is None else list(state.shape)}")

    def _check(self, video: Copies, action: Copies, text: Tensor, clips: tuple[int, ...] | None = None) -> int:
        """Shapes and dtypes; returns the number of frames."""
        c, noisy = self.config, cast(Tensor, video.noisy)
        if noisy.ndim != 5 or noisy.shape[1] != c.latent_channels or not noisy.shape[2]:
            raise ValueError(f"noisy_video must be [B, {c.latent_channels}, F >= 1, y, x], got {list(noisy.shape)}")
        B, frames = noisy.shape[0], noisy.shape[2]
        if clips is not None and (B != 1 or sum(clips) != frames or min(clips, default=0) < 1):
            raise ValueError(f"clips must be frames that sum to the {frames} of one batch element, got {clips}, B={B}")
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "clean_video": (video.clean, tuple(noisy.shape)),
            "video_timesteps": (video.timesteps, (B, frames)),
            "clean_video_timesteps": (video.clean_timesteps, (B, frames)),
            "text": (text, (B if clips is None else len(clips), *text.shape[1:2], c.text_dim)),
        }
        per_slot = B, frames, c.actions_per_frame
        dims = 2 if action.timesteps is None else max(action.timesteps.ndim, 2)
        of_actions: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "noisy_action": (action.noisy, (*per_slot, c.action_dim)),
            "clean_action": (action.clean, (*per_slot, c.action_dim)),
            "action_timesteps": (action.timesteps, per_slot[:dims]),
        }
        if c.full_attention and video.clean is not None:
            raise ValueError(
                "clean_video must be None for a model with full_attention, whose observed frame is the first of "
                f"noisy_video, got {list(video.clean.shape)}"
            )
        optional = {"clean_video_timesteps"}
        if video.clean is None:
            optional |= {"clean_video", "clean_action"}
            forbidden = {"clean_action": action.clean, "clean_video_timesteps": video.clean_timesteps}
        else:
            forbidden = {}
        if not c.has_actions:
            forbidden |= {name: tensor for name, (tensor, _) in of_actions.items()}
        for name, given in forbidden.items():
            if given is not None:
                why = "clean_video" if c.has_actions else "the model's action stream"
                raise ValueError(f"{name} must be None without {why}, got {list(given.shape)}")
        for name, (tensor, shape) in (expected | (of_actions if c.has_actions else {})).items():
            if tensor is None and name in optional:
                continue
            if tensor is None or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {list(shape)}, got {None if tensor is None else list(tensor.shape)}"
                )
            if "timesteps" in name and tensor.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{name} must be float32 or float64, got {tensor.dtype}, which does not tell neighbours apart; "
                    "where FSDP casts them, use training_step, or MixedPrecisionPolicy(cast_forward_inputs=False) on "
                    "the model"
                )
        return frames


class Copies(NamedTuple):
    """A denoised stream as the packed forward is given it."""

    noisy: Tensor | None
    clean: Tensor | None
    timesteps: Tensor | None
    clean_timesteps: Tensor | None  # default all 0

    def packed(self, frame_dim: int) -> tuple[Tensor, Tensor]:
        """Data and timesteps of ``[noisy | clean]``, or of the noisy copy where it is alone."""
        noisy, timesteps = cast(Tensor, self.noisy), cast(Tensor, self.timesteps)
        if self.clean is None:
            return noisy, timesteps
        clean = torch.zeros_like(timesteps) if self.clean_timesteps is None else self.clean_timesteps
        return torch.cat([noisy, self.clean], frame_dim), torch.cat([timesteps, clean], 1)


def plain_tensor(t: Tensor | Uncast[Tensor] | None) -> Tensor | None:
    return t.tensors[0] if isinstance(t, Uncast) else t


def _in_one_element(stream: StreamInputs) -> StreamInputs:
    """Tokens ``[N, n, D]`` of N clips, without timesteps, as ``[1, N n, D]``."""
    x = stream.x.flatten(0, 1)[None]
    modulation, head = (Uncast(*(t[:1] for t in held.tensors)) for held in (stream.modulation, stream.head))
    return StreamInputs(x, modulation, head, FrameIndex.per_sample(x.shape[1], device=x.device))


def noisy_tokens(stream: StreamInputs, copies: int) -> StreamInputs:
    """The first of ``copies`` parts of a packed stream, as far as a head needs it."""
    return of_timesteps(stream, 0, stream.head.tensors[0].shape[1] // copies)


def of_timesteps(stream: StreamInputs, first: int, end: int) -> StreamInputs:
    """The tokens of the timesteps from ``first`` to ``end``, as far as a head needs them."""
    shift, scale = (t[:, first:end] for t in stream.head.tensors)
    per = stream.x.shape[1] // max(stream.head.tensors[0].shape[1], 1)
    index = FrameIndex.from_runs([per] * (end - first), device=stream.x.device)
    return StreamInputs(stream.x[:, first * per : end * per], Uncast(), Uncast(shift, scale), index)
