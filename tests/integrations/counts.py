"""What one step of a stand-in does, unpatched and patched: operators, bytes, peak of live tensors, Python calls.

Nothing is timed.

    python -m tests.integrations.counts

appends the rows to ``bench/results/integrations.jsonl`` and writes the table of the integrations' README from them.

A training step is forward and backward, with attention through a plan as at released sizes; a denoising step runs as it
is under ``no_grad``, where calls of these sizes are dense. In both, norms are the fused ops, as on a GPU. Each
is counted from the second on: what is found once for each mask or table (plans, rope tables) is found. A
``TorchDispatchMode`` gets every operator, one that this library has registered as one. What passes inside of an
operator, attention's scores above all, or is found by it, as the index of rows, is in no row.

- operators: those that launch a kernel on a GPU; views and bookkeeping do not count.
- bytes: elements of their tensor arguments and results, an expanded element once. A lookup counts its whole table.
- Python calls: functions entered, those of a kernel's backend, which on a GPU is a launch, and of this file excepted.
- peak: storages that were born in the step and are still referenced (weak references), at the most after an operator.
"""

from __future__ import annotations

import gc
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.harness.recording import record
from bench.report.rows import select
from bench.rows import RESULTS, Row, read
from tests.integrations import test_lingbot_va as lingbot
from tests.integrations.test_compile import DENOISING, TRAINING, Call, gradients
from wam_kernels import integrations
from wam_kernels.adaln import op as adaln
from wam_kernels.integrations import _kernels, patch
from wam_kernels.ops import OPS

README = Path(integrations.__file__).parent / "README.md"
NAME = "integrations"
KERNEL = re.compile(r"wam_kernels/\w+/cpu\.py$")
# views and bookkeeping: nothing is launched for them
FREE = {
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "split", "unsqueeze",
    "squeeze", "chunk", "detach", "alias", "as_strided", "unbind", "split_with_sizes", "view_as_real",
    "view_as_complex", "empty", "new_empty", "empty_like", "lift_fresh", "diagonal", "_reshape_alias", "unfold",
}  # fmt: skip


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(t: Tensor) -> StorageWeakRef:
    return StorageWeakRef(t.untyped_storage())


class Launches(TorchDispatchMode):
    """Operators by name, and the bytes of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.of[name] += 1
            for t in tensors((args, kwargs, out)):
                self.bytes += t.element_size() * prod(
                    n for n, stride in zip(t.shape, t.stride(), strict=True) if stride
                )
        return out


class Peak(TorchDispatchMode):
    """Bytes of the storages that were born under it and are referenced, at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage(t) for t in tensors((args, kwargs))}
        for t in tensors(out):
            if (ref := storage(t)) not in given:
                self.live[ref] = t.untyped_storage().nbytes()
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self.live.values()))
        return out


def launches(call: Callable[[], object]) -> Counter[str]:
    with Launches() as mode:
        call()
    return mode.of


@contextmanager
def no_collection() -> Iterator[None]:
    """What a collection of garbage ends or calls is not the step's."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def python_calls(call: Callable[[], object]) -> int:
    """Python functions that ``call`` enters, without those of a registered op's kernel and of this file."""
    count = inside = 0

    def look(frame, event: str, arg: object) -> None:
        nonlocal count, inside
        if event in ("call", "return"):
            file = frame.f_code.co_filename
            is_kernel = KERNEL.search(file) is not None
            count += event == "call" and not inside and not is_kernel and file != __file__
            inside += is_kernel * (1 if event == "call" else -1)

    with no_collection():
        sys.setprofile(look)
        try:
            call()
        finally:
            sys.setprofile(None)
    return count


def peak_bytes(call: Callable[[], object]) -> int:
    """Of ``call``; cycles of references stay until its end, so when they are collected does not matter."""
    with no_collection(), Peak() as mode:
        call()
    return mode.bytes


def lingbot_denoise() -> Call:
    """A denoising step over a pool with one chunk in it; its own slots are taken out again."""
    wan, g = lingbot.model("torch"), torch.Generator().manual_seed(4)
    wan.create_empty_cache("pos", 5 * (lingbot.VIDEO + lingbot.ACTION) // 2)
    shape = 1, 4, 2, 4, 6
    d = {"position": 0, "timestep": 0.0, "text_emb": torch.randn(1, 7, 6, generator=g)}
    with torch.no_grad():
        wan(d | {"noisy_latents": torch.randn(shape, generator=g)}, update_cache=2)
    d |= {"position": 50, "timestep": 0.5, "noisy_latents": torch.randn(shape, generator=g)}
    return Call(wan, lambda m, d: m(d), (d,))


STEPS = {"training": TRAINING, "denoising": {**DENOISING, "LingBot-VA": lingbot_denoise}}


def counted(run: Callable[[], object]) -> Row:
    run()
    with Launches() as mode:
        run()
    counts = {"operators": mode.of.total(), "bytes": mode.bytes, "peak_bytes": peak_bytes(run)}
    return {"counted": True, **counts, "python_calls": python_calls(run)}


def rows(step: str, system: str) -> list[Row]:
    """Of the original and of the patched model."""
    call = STEPS[step][system]()

    @torch.set_grad_enabled(step == "training")
    def run() -> None:
        if step == "training":
            gradients(call, call.step)
        else:
            call.step(call.model, *call.inputs)

    found = []
    with fused_norms(), mock.patch.object(_kernels, "DENSE_PAIRS", 0 if step == "training" else 2**18):
        for provider in ("original", "wam"):
            if provider == "wam":
                patch(call.model)
            found.append({"case": system, "what": step, "provider": provider, **counted(run)})
    return found


@contextmanager
def fused_norms() -> Iterator[None]:
    """As on a GPU: no norm takes PyTorch's own ops, as small ones and those of one row do on a CPU."""
    every = replace(OPS["ada_layer_norm"], small=0)
    with mock.patch.object(adaln, "_ROW", every), mock.patch.object(adaln, "_is_plain", lambda *args: False):
        yield


def recorded(step: str, system: str) -> list[Row]:
    """The newest rows of the original and of the patched model."""
    shown = select(read(RESULTS / f"{NAME}.jsonl"), what=step, case=system)
    return [select(shown, provider=provider)[-1] for provider in ("original", "wam")]


HEAD = [
    "| system | step | operators | kB moved | peak, kB | Python calls |",
    "| --- | --- | --: | --: | --: | --: |",
]


def table() -> str:
    """The README's, of the newest rows."""
    lines = list(HEAD)
    for step, systems in STEPS.items():
        for system in systems:
            before, after = recorded(step, system)
            kb = [f"{before[key] / 1e3:,.0f} to {after[key] / 1e3:,.0f}" for key in ("bytes", "peak_bytes")]
            operators = f"{before['operators']} to {after['operators']}"
            calls = f"{before['python_calls']:,} to {after['python_calls']:,}"
            lines.append(f"| {' | '.join((system, step, operators, *kb, calls))} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Page:
    """The README around its table."""

    before: str
    table: str
    after: str

    @classmethod
    def read(cls) -> Page:
        before, rest = README.read_text().split(HEAD[0], 1)
        body, after = rest.split("\n\n", 1)
        return cls(before, f"{HEAD[0]}{body}\n", f"\n{after}")


def main() -> None:
    torch.set_num_threads(1)
    found = [row for step, systems in STEPS.items() for system in systems for row in rows(step, system)]
    record(NAME, found, "cpu", RESULTS)
    page = Page.read()
    README.write_text(page.before + table() + page.after)
    print(table())


if __name__ == "__main__":
    main()
