"""What a planted bug is run on: the smallest case first, in several orders of threads, copies and products.

What no pair holds is NaN, and so is everything around tensors and outputs.
"""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import machinery, util
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.block_attention.checks import NAMES, make_inputs, run
from tests.cached_attention import checks as cached_checks
from tests.csrc.conftest import poisoned_allocations
from tests.geometries import libero, small
from wam_kernels import Plan, Ranges, TileShape, compile_plan
from wam_kernels.block_attention import kernel_cuda
from wam_kernels.cached_attention import config as cached_config
from wam_kernels.cached_attention import kernel_cuda as cached_cuda
from wam_kernels.plan import boxes, side_rows
from wam_kernels.plan.compile import forget_plans
from wam_kernels.runtime import cuda

TOLERANCE = 0.02  # of the largest number
BF16 = torch.bfloat16

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of a kernel, ``orders`` times."""

    name: str
    orders: int
    run: Callable[[], Outputs]
    truth: Callable[[], Outputs]
    head_dim: int  # of the kernel that it is for: 64 or 128


# ---- block attention


@dataclass(frozen=True)
class Block:
    """Block attention over a plan. Inputs are slices of wider tensors, with NaN behind their channels."""

    name: str
    plan: Plan
    H: int
    kv_heads: int
    D: int
    orders: int
    batch: int = 1
    scale: float = 0.125

    @cached_property
    def inputs(self) -> Outputs:
        q, k, v, dout, dlse = make_inputs(self.plan, self.batch, self.H, self.D, BF16, kv_heads=self.kv_heads)
        double = [t.double() for t in (q, k, v, dout, dlse)]
        truth = dict(zip(NAMES, run(self.plan, double, "reference", self.scale), strict=True))
        mask = self.plan.mask()[:, 0].expand(self.batch, -1, -1)
        unattended, fully_masked = ~mask.any(1), ~mask.any(2)
        dlse[fully_masked[:, None].expand_as(dlse)] = 0.0
        delta = ((truth["out"] * dout).sum(-1).transpose(1, 2) - dlse).contiguous()
        inputs = dict(q=q, k=k, v=v, dout=dout)
        for name, t in inputs.items():
            wide = torch.full((*t.shape[:-1], self.D + 8), torch.nan, dtype=BF16)
            wide[..., : self.D] = t
            wide[fully_masked if name in ("q", "dout") else unattended] = torch.nan
            inputs[name] = wide[..., : self.D]
        return inputs | truth | dict(dlse=dlse, delta=delta)

    def case(self, kernel: str) -> Case:
        outputs = {"forward": ("out", "lse"), "dq": ("dq", "delta"), "dkdv": ("dk", "dv")}[kernel]
        run = self.forward if kernel == "forward" else lambda: self.backward(outputs)
        truth = lambda: {name: self.inputs[name] for name in outputs}  # noqa: E731
        return Case(self.name, self.orders, run, truth, 64 if self.D <= 64 else 128)

    def forward(self) -> Outputs:
        q, k, v = (self.inputs[name] for name in "qkv")
        out, lse = kernel_cuda.forward(q, k, v, self.plan.boxes.queries.tensors(), self.plan.batch == 1, self.scale)
        return dict(out=out, lse=lse)

    def backward(self, outputs: tuple[str, ...]) -> Outputs:
        """One of the two kernels alone: what the other one and the forward would have written is the truth, rounded."""
        x = {name: t.float() if name in ("lse", "delta") else t for name, t in self.inputs.items()}
        x |= {"out": x["out"].to(BF16)}
        x |= {name: x[name[1:]].new_empty(x[name[1:]].shape) for name in ("dq", "dk", "dv")}
        if "delta" in outputs:
            x["delta"] = x["lse"].new_empty(x["lse"].shape)
        counters = torch.zeros(2, dtype=torch.int32)
        heads = {n: (x[n].data_ptr(), *x[n].stride()[:3]) for n in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
        sides = {
            name: (*(t.data_ptr() for t in side.tensors()), len(side.tiles))
            for name, side in (("queries", self.plan.boxes.queries), ("keys", self.plan.boxes.keys))
        }
        shape = (self.batch, self.plan.length, self.plan.key_length, self.H, self.kv_heads, self.D)
        cuda.launch(
            "block_attention_backward", x["q"], shape=shape, shared=self.plan.batch == 1, scale=self.scale,
            counters=counters.data_ptr(), lse=x["lse"].data_ptr(),
            dlse=x["dlse"].data_ptr(), delta=x["delta"].data_ptr(), **heads, **sides,
        )  # fmt: skip
        return {name: x[name] for name in outputs}


def _blocks() -> list[Block]:
    holes = Ranges([(0, 90), (0, 40), (90, 200), (77, 155)], [(3, 207), (300, 321), (31, 409), (411, 455)], 220, 470)
    return [
        Block("one tile", compile_plan(small()), 1, 1, 64, 2),
        Block("128 channels", compile_plan(libero(4, 64, 9)), 1, 1, 128, 2),
        Block("two batch elements", compile_plan([small(), small(window=2)]), 4, 2, 64, 2, batch=2, scale=-0.2),
        Block("holes", compile_plan([[small("decoupled_same_step"), holes]]), 1, 1, 40, 4),
        Block("4 frames a chunk", compile_plan(libero(4, 64, 9)), 2, 1, 64, 4),
        Block("1 frame a chunk", compile_plan(libero(1, 4, 12)), 2, 2, 64, 4),
    ]


# ---- cached attention


def _cached_case(
    name: str,
    case: cached_checks.Case,
    streamed: bool = False,
    parts: int | None = None,
    orders: int = 2,
    shared: bool = False,
) -> Case:
    """``streamed``: of the kernel by TMA. ``shared``: one head of one sample's cache serves all."""
    case = replace(case, dtype=BF16)
    q, k, v = inputs = case.inputs()
    if shared:
        inputs = [q, *(t[:1, :, :1].expand(len(q), -1, 1, -1) for t in (k, v))]
    out, lse = cached_checks.run(case, [q.double(), *(t.expand_as(k).double() for t in inputs[1:])], "reference")

    def forward() -> Outputs:
        if parts is not None:
            cached_config.splits = cached_config.streamed_splits = lambda blocks, slots: parts
        scale = case.D**-0.5 if case.scale is None else case.scale
        got = cached_cuda.forward(*inputs, case.ranges(), case.rows, scale, streamed)
        return dict(zip(("out", "lse"), got, strict=True))

    return Case(name, orders, forward, lambda: dict(out=out, lse=lse), 64)


def _cached(streamed: bool) -> list[Case]:
    C, wrapped = cached_checks.Case, cached_checks.WRAPPED
    # a video ring of 180 slots and an action ring of 60, both wrapped round, and the own slots of both
    rings = [(100, 180), (0, 63), (211, 240), (180, 195), (240, 277)]
    action = [(20, 40), (100, 163), (240, 270)]
    cases = [
        _cached_case("wrap-around", C([[wrapped, []]], (19, 2), 80, H=1), streamed),
        _cached_case("cut off at the cache", C([[[(-4, 5), (70, 99)], [(90, 95), (0, 5)]]], (6, 2), 80), streamed),
        _cached_case("negative scale", C([[wrapped]], (20,), 80, H=1, scale=-0.7), streamed),
        _cached_case("two tiles, 40 channels", C([[[(1, 90), (92, 150)]]], (70,), 150, H=2, D=40), streamed),
        _cached_case("9 parts", C([[[(0, 130), (140, 199)], [(3, 9)]], [[(0, 1)], []]], (20, 3), 200), streamed, 9),
    ]
    if streamed:
        return [
            *cases,
            _cached_case("shared cache", C([[[(3, 50)]], [[(9, 40)]]], (7,), 64, H=2), True, shared=True),
            _cached_case("video and action rows", C([[rings, action]], (128, 16), 280, H=1, D=64), True, 2, orders=4),
            _cached_case("long ranges", C([[[(5, 1900)], [(9, 640)]]], (64, 16), 1900, H=1, D=64), True, 2, orders=6),
        ]
    ranges = [(3 * i, 3 * i + 2) for i in range(60)]
    return [*cases, _cached_case("many ranges", C([[ranges[::-1], ranges[:7]]], (16, 16), 190, H=1, D=64), False, 1)]


# ---- runs


def load(library: Path) -> ctypes.CDLL:
    """Make ``library`` the extension of this process."""
    name = f"of_process_{os.getpid()}._C"  # pybind11 gives the first module of a name, also for a second library
    loader = machinery.ExtensionFileLoader(name, str(library))
    module = util.module_from_spec(util.spec_from_loader(name, loader))
    loader.exec_module(module)
    cuda.extension = lambda: module
    torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
    return ctypes.CDLL(str(library))


class Suite:
    """The cases of every kernel. Truths are computed once, before processes with bugs are forked off."""

    def __init__(self) -> None:
        blocks = _blocks()
        self.cases = {kernel: [block.case(kernel) for block in blocks] for kernel in ("forward", "dq", "dkdv")}
        self.cases |= {"cached": _cached(streamed=False), "streamed": _cached(streamed=True)}
        for case in (case for cases in self.cases.values() for case in cases):
            case.truth()

    def outcomes(self, kernel: str, head_dim: int, library: Path) -> Iterator[tuple[str, str]]:
        """Name of the case, and what was wrong or nothing, when it begins and after every order."""
        control = load(library)
        for case in (case for case in self.cases[kernel] if case.head_dim == head_dim):
            first: Outputs = {}
            yield case.name, ""
            for order in range(case.orders):
                _take(control, order)
                try:
                    with poisoned_allocations():
                        got = case.run()
                except (AssertionError, RuntimeError) as error:
                    yield case.name, str(error).splitlines()[0].removeprefix("sm90 emulation: ")
                    return
                first = first or got
                yield case.name, _wrong(got, case.truth()) or _other_bits(got, first)


def _take(control: ctypes.CDLL, order: int) -> None:
    """As ``Machine`` of ``tests/csrc`` takes its orders."""
    control.launch_downwards(order % 2)
    chance = (0.02, 0.5, 0.0005)[order // 3 % 3]
    control.sm90_order(order + 1, ctypes.c_double(chance), order % 3, order % 2)


def _wrong(got: Outputs, truth: Outputs) -> str:
    for name, t in truth.items():
        finite = torch.isfinite(t)
        if not torch.equal(torch.isfinite(got[name]), finite):
            return f"{name} is not finite where it should be"
        error = (got[name].double() - t)[finite].abs().max().item() if finite.any() else 0.0
        if not error <= TOLERANCE * max(1.0, t[finite].abs().max().item() if finite.any() else 0.0):
            return f"{name} is wrong by {error:.2g}"
    return ""


def _other_bits(got: Outputs, first: Outputs) -> str:
    for name, t in got.items():
        if not torch.equal(t.view(torch.uint8), first[name].view(torch.uint8)):
            return f"{name} has other bits in another order"
    return ""


def plan_outcomes(kernel: str, source: str) -> Iterator[tuple[str, str]]:
    """The same for the tests of boxes or of stop-gradient, with ``source`` in place of their module."""
    module = {"plan": boxes, "stop": side_rows}[kernel]
    exec(compile(source, module.__file__, "exec"), vars(module))
    forget_plans()
    for name, test in _plan_cases(kernel):
        yield name, ""
        try:
            test()
        except (AssertionError, ValueError, IndexError) as error:
            reported = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line or ""
            yield name, f"{type(error).__name__}: {reported.splitlines()[0]}"
            return


def _plan_cases(kernel: str) -> tuple[tuple[str, Callable[[], object]], ...]:
    from tests.plan import test_stop_gradient as stop

    if kernel == "stop":
        return (
            ("actions to video", lambda: stop.check([small()], [("action", "video")], [], TileShape(8, 8))),
            ("frozen video", lambda: stop.check([small()], [], ["video"], TileShape(8, 8))),
            ("runs and their keys", stop.test_runs_and_their_keys_with_gradients),
            ("ranges", lambda: [stop.check_ranges(seed) for seed in range(8)]),
        )
    from tests.plan import test_boxes as tests

    return (
        ("a plan of nothing", tests.test_a_plan_of_nothing_visits_nothing),
        ("a run without spare tokens", tests.test_a_run_without_spare_tokens),
        ("recorded masks", tests.test_boxes_match_recorded_masks),
        ("moved samples", tests.test_batches_are_moved_samples),
        ("every kind of step", lambda: tests.test_every_program_with_steps_of_every_kind("joint")),
        ("ranges with holes", lambda: [tests.check(tests.random_ranges(seed)) for seed in range(8)]),
        ("few steps", tests.test_the_steps_of_a_tile_are_few),
        ("frozen video", lambda: stop.check([small()], [], ["video"], TileShape(8, 8))),
        ("useful share", lambda: tests.test_the_useful_share_of_long_windows(34, 0.90, 0.89)),
    )
