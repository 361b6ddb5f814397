"""torch.compile of a patched model: one graph wherever the original is one, and the same numbers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.integrations import test_cosmos_policy as cosmos
from tests.integrations import test_dreamzero as dreamzero
from tests.integrations import test_fast_wam as fast_wam
from tests.integrations import test_lerobot as lerobot
from tests.integrations import test_lingbot_va as lingbot
from tests.integrations import test_openpi as openpi
from tests.integrations.checks import CLOSE, numbers
from wam_kernels import integrations
from wam_kernels.integrations import patch


@dataclass
class Call:
    """A model and what is compiled of it; its inputs are made outside of the graph, as a program's are."""

    model: nn.Module
    step: Callable
    inputs: tuple


def fast_wam_train(program: str) -> Call:
    data = fast_wam.inputs(fast_wam.VIDEO * (2 if program == "fast_wam_idm" else 1))
    fields = [{name: one[field] for name, one in data.items()} for field in ("x", "freqs", "context", "t_mod")]
    x, freqs, context, t_mod = fields
    return Call(fast_wam.model(), lambda m, *a: m(*a), (x, fast_wam.mask(program), freqs, context, t_mod))


def fast_wam_denoise() -> Call:
    mot, (video, action) = fast_wam.model(), fast_wam.inputs(fast_wam.VIDEO).values()
    mask = fast_wam.mask("fast_wam_joint")
    own = mask[: fast_wam.VIDEO, : fast_wam.VIDEO]
    cache = mot.prefill_video_cache(video["x"], video["freqs"], video["t_mod"], video["context"], own)
    cache = [{name: t.detach() for name, t in layer.items()} for layer in cache]
    inputs = action["x"], action["freqs"], action["t_mod"], action["context"], cache, mask, fast_wam.VIDEO
    return Call(mot, lambda m, *a: m.forward_action_with_video_cache(*a), inputs)


def lerobot_train() -> Call:
    b = lerobot.batch()
    return Call(lerobot.model(), lambda m, *a: m(*a), tuple(b[f] for f in ("x", "mask", "freqs", "context", "t_mod")))


def lerobot_denoise() -> Call:
    mot, b, n = lerobot.model(), lerobot.batch(), lerobot.VIDEO
    video, action = ([b[f][name] for f in ("x", "freqs", "t_mod", "context")] for name in ("video", "action"))
    cache = [
        {name: t.detach() for name, t in layer.items()} for layer in mot.prefill_video_cache(*video, b["mask"][:n, :n])
    ]
    return Call(mot, lambda m, *a: m.forward_action_with_video_cache(*a), (*action, cache, b["mask"], n))


def dreamzero_train() -> Call:
    frame, block, registers = dreamzero.FRAME, dreamzero.BLOCK, dreamzero.REGISTERS
    x = torch.randn(2, 2 * (frame + 2 * block) + 2 * registers, 32, generator=torch.Generator().manual_seed(1))
    step = lambda m, x: m(x, 0, frame + 2 * block, action_register_length=2 * registers)[0]  # noqa: E731
    return Call(dreamzero.model(), step, (x,))


def dreamzero_denoise() -> Call:
    wan, g = dreamzero.model(), torch.Generator().manual_seed(2)
    heads = wan.blocks[0].self_attn.num_heads, wan.blocks[0].self_attn.head_dim
    caches = [torch.randn(2, 2, dreamzero.FRAME, *heads, generator=g) for _ in wan.blocks]
    x = torch.randn(2, dreamzero.BLOCK + dreamzero.REGISTERS, 32, generator=g)
    place = {"first_position": dreamzero.FRAME, "video": dreamzero.BLOCK, "current_start_frame": 1}
    step = lambda m, x, caches: m(x, caches=caches, action_register_length=dreamzero.REGISTERS, **place)  # noqa: E731
    return Call(wan, step, (x, caches))


def cosmos_call() -> Call:
    return Call(cosmos.model(), lambda m, *a: m(*a), tuple(cosmos.inputs()))


def openpi_train() -> Call:
    return Call(openpi.model(), lambda m, *a: m(*a)[1], (openpi.tokens(1), openpi.bias(openpi.visible(1))))


def openpi_denoise() -> Call:
    gemmas, mask, (prefix, suffix) = openpi.model(), openpi.visible(1), openpi.tokens(1)
    n = openpi.PREFIX
    _, cache = gemmas((prefix, None), openpi.bias(mask[:, :n, :n]))
    cache = [tuple(t.detach() for t in layer) for layer in cache]
    step = lambda m, x, mask, cache: m((None, x), mask, past=cache)  # noqa: E731
    return Call(gemmas, step, (suffix, openpi.bias(mask[:, n:]), cache))


TRAINING = {
    "Fast-WAM uncond": lambda: fast_wam_train("fast_wam_uncond"),
    "Fast-WAM idm": lambda: fast_wam_train("fast_wam_idm"),
    "lerobot Fast-WAM": lerobot_train,
    "LingBot-VA": lambda: Call(lingbot.model("flex"), lambda m, d: m(d, train_mode=True), (lingbot.step(),)),
    "DreamZero": dreamzero_train,
    "Cosmos Policy": cosmos_call,
    "openpi": openpi_train,
}
DENOISING = {
    "Fast-WAM": fast_wam_denoise,
    "lerobot Fast-WAM": lerobot_denoise,
    "DreamZero": dreamzero_denoise,
    "Cosmos Policy": cosmos_call,
    "openpi": openpi_denoise,
}


def gradients(call: Call, step: Callable) -> list[Tensor]:
    """Outputs of ``step`` and the gradients of all parameters."""
    call.model.zero_grad()
    out = numbers(step(call.model, *call.inputs))
    sum(t.square().mean() for t in out).backward()
    return [t.detach().clone() for t in out] + [p.grad for p in call.model.parameters() if p.grad is not None]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


README = Path(integrations.__file__).parent / "README.md"


class Row(NamedTuple):
    """A system's step in the README's table, before and after: graphs, and operations in them."""

    graphs: tuple[int, int]
    operations: tuple[int, int]

    @classmethod
    def of(cls, name: str, step: str) -> Self:
        counts = r"(\d+) to (\d+) \| (\d+) to (\d+)"
        [found] = re.findall(rf"^\| {name} \| {step} \| {counts} \|$", README.read_text(), re.MULTILINE)
        a, b, c, d = map(int, found)
        return cls((a, b), (c, d))


def check_after(name: str, step: str, backend: CompileCounterWithBackend) -> None:
    """One graph of fewer operations than the original's, as many as the row says for its PyTorch."""
    row = Row.of(name, step)
    assert backend.frame_count == row.graphs[1] == 1
    if torch.__version__.startswith("2.13."):
        assert backend.op_count == row.operations[1] < row.operations[0]


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step_is_one_graph(name):
    call = TRAINING[name]()
    expected = gradients(call, call.step)
    # the registered ops go through AOTAutograd in the two that cost least
    aot = name in ("DreamZero", "openpi")
    done, backend = patch(call.model), CompileCounterWithBackend("aot_eager" if aot else "eager")
    close(gradients(call, torch.compile(call.step, backend=backend, fullgraph=True)), expected)
    assert sum(done.calls.values()) > 0
    check_after(name, "training", backend)


@pytest.mark.parametrize(
    "name, mode", [*((name, torch.no_grad) for name in DENOISING), ("Fast-WAM", torch.inference_mode)]
)
def test_a_denoising_step_is_one_graph(name, mode):
    call = DENOISING[name]()
    with mode():
        expected = [t.clone() for t in numbers(call.step(call.model, *call.inputs))]
        done, backend = patch(call.model), CompileCounterWithBackend("eager")
        compiled = torch.compile(call.step, backend=backend, fullgraph=True)
        close(numbers(compiled(call.model, *call.inputs)), expected)
        close(numbers(compiled(call.model, *call.inputs)), expected)
    assert sum(done.calls.values()) > 0
    check_after(name, "denoising", backend)


STEPS = {"training": TRAINING, "denoising": DENOISING}


@pytest.mark.slow
@pytest.mark.parametrize("step, name", [(step, name) for step, systems in STEPS.items() for name in systems])
def test_the_original_is_what_the_page_says(step, name):
    """The patched model is one graph wherever the original is, so what that is is counted, not believed."""
    call, backend = STEPS[step][name](), CompileCounterWithBackend("eager")
    with torch.set_grad_enabled(step == "training"):
        torch.compile(call.step, backend=backend)(call.model, *call.inputs)
    row = Row.of(name, step)
    assert (backend.frame_count, backend.op_count) == (row.graphs[0], row.operations[0])
