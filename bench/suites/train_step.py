"""One training step of the GJD model: forward, forward + backward, and the whole step with AdamW.

python -m bench.suites train_step

CPU: the demo's model (``demo_config``) in float32 on two clips of 17 frames at LIBERO geometry. CUDA: the full
size (``wan_5b_config``, 7.4 billion parameters) with random bf16 weights on one clip of 68 frames, 4,896 packed tokens.
Float32 AdamW states of that size do not fit one H100 (89 GB with weights and gradients): the step timed there has
**bf16 weights, gradients and AdamW states and checkpointed activations**, about 60 GB; ``regime`` says so in every row.

Providers: ``wam`` as a user gets it; ``dense`` with the dense-mask reference in place of block_attention. Before a
speed is printed, loss and gradients of ``wam`` are compared with the dense float64 model; on CUDA at full width with 2
layers. FLOPs are those of the matrix products (PyTorch's counter) and of attention over visible pairs, without
recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from bench.workloads.models import make_model
from wam_kernels import compile_plan
from wam_models import WorldActionModel
from wam_models.config import ModelConfig, demo_config, wan_5b_config
from wam_models.objectives import OBJECTIVES, geometry_for
from wam_models.train.samples import StepConfig
from wam_models.train.step import training_step

ROWS, COLUMNS = 8, 16  # latent pixels of a LIBERO frame: 32 tokens after 2 x 2 patches
CHUNK, WINDOW = 4, 64
CONFIG = StepConfig(
    program="joint", history="video_only", chunk_sizes=(CHUNK, CHUNK), windows=(WINDOW, WINDOW), noised_history=0.0
)


def make_batch(config: ModelConfig, samples: int, frames: int, text: int, device: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "video": (samples, config.latent_channels, frames, ROWS, COLUMNS),
        "action": (samples, frames, config.actions_per_frame, config.action_dim),
        "text": (samples, text, config.text_dim),
    }
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


def loss_of(model: WorldActionModel, batch: dict[str, Tensor], seed: int, impl: str | None) -> Tensor:
    """The same noise and timesteps in every call: a draw of one seed."""
    return training_step(model, batch, torch.Generator().manual_seed(seed), CONFIG, impl=impl)[0]


def attention_flops(config: ModelConfig, samples: int, frames: int) -> int:
    """Of all layers' forwards over visible pairs, which the counter does not count inside the registered op."""
    geometry = geometry_for(
        CONFIG.program, OBJECTIVES["joint"], frames=frames, video_tokens=ROWS * COLUMNS // 4,
        action_tokens=config.actions_per_frame, chunk_size=CHUNK, window=WINDOW, history=CONFIG.history,
    )  # fmt: skip
    return 4 * config.inner * config.layers * samples * compile_plan(geometry).visible_pairs


def check(config: ModelConfig, batch: dict[str, Tensor], device: str, dtype: torch.dtype, seed: int) -> None:
    model = make_model(config, device, dtype, seed)
    double = WorldActionModel(config).to(device, torch.float64)
    double.load_state_dict(model.state_dict())
    got, expected = loss_of(model, batch, seed, None), loss_of(double, batch, seed, "reference")
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    harness.require_equal("loss of wam", got, expected, rtol)
    names = [name for name, p in model.named_parameters() if p.numel() > 1_000]
    pairs = (torch.autograd.grad(loss, [dict(m.named_parameters())[n] for n in names], allow_unused=True)
             for loss, m in ((got, model), (expected, double)))  # fmt: skip
    for name, a, b in zip(names, *pairs, strict=True):
        if b is not None and b.norm() > 0:
            # a gradient is a sum over layers and tokens of rounded terms
            harness.require_equal(f"gradient of {name}", a, b, 1e-4 if dtype == torch.float32 else 1e-1)


def bench(config: ModelConfig, samples: int, frames: int, text: int, repeats: int, options: Options) -> list[Row]:
    device = options.device
    full = device == "cuda"
    dtype = torch.bfloat16 if full else torch.float32
    batch = make_batch(config, samples, frames, text, device, options.seed)
    small = replace(config, layers=2) if full else config
    check(small, {k: v[:, :, :9] if k == "video" else v[:, :9] for k, v in batch.items()} if full else batch,
          device, dtype, options.seed)  # fmt: skip
    model = make_model(config, device, dtype, options.seed)
    model.checkpoint_activations(full)
    parameters = list(model.parameters())
    # foreach and plain AdamW keep temporaries of the size of the weights
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    turn = iter(range(1 << 30))  # another draw of noise in every call

    def forward(impl: str | None) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> Tensor:
            return loss_of(model, batch, next(turn), impl)

        return call

    def backward(impl: str | None) -> Callable[[], object]:
        def call() -> None:
            loss_of(model, batch, next(turn), impl).backward()
            optimizer.zero_grad()

        return call

    def step(impl: str | None) -> Callable[[], object]:
        def call() -> None:
            loss_of(model, batch, next(turn), impl).backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_of(model, batch, options.seed, None)
    tokens = samples * 2 * frames * (ROWS * COLUMNS // 4 + config.actions_per_frame)
    forward_flops = counter.get_total_flops() + attention_flops(config, samples, frames)
    regime = "bf16 weights, gradients and AdamW states, checkpointed" if full else "float32, activations kept"
    # the dense baseline holds a mask and scores of S x S: the size of the demo only
    impls = {"wam": None} if full else {"wam": None, "dense": "reference"}
    limits = harness.ceilings(device)
    found, kinds = [], {"forward": (forward, 1), "forward+backward": (backward, 3), "step": (step, 3)}
    calls = {(what, name): make(impl) for what, (make, _) in kinds.items() for name, impl in impls.items()}
    times = harness.measure(calls, device, repeats)
    for (what, name), t in times.items():
        gflops = kinds[what][1] * forward_flops / t["ms"] / 1e6
        found.append({
            "what": what, "provider": name, "parameters": sum(p.numel() for p in parameters), "tokens": tokens,
            "samples": samples, "frames": frames, "dtype": str(dtype), "regime": regime,
            **{key: round(value, 2) for key, value in t.items()},
            "tokens/s": round(1e3 * tokens / t["ms"]), "GFLOP/s_visible": round(gflops, 1),
            "%_of_matmul": round(100 * gflops / limits["bf16_GFLOP/s" if full else "float32_GFLOP/s"], 1),
            "peak_MB": round(harness.peak_megabytes(calls[what, name], device), 1),
            "ratio": round(times[what, "dense"]["ms"] / t["ms"], 2) if "dense" in impls else None,
        })  # fmt: skip
    return found


def rows(options: Options) -> Iterable[Row]:
    if options.device == "cuda":
        cases = [(wan_5b_config(), 1, 68, 64, 3 if options.quick else 10)]
    else:
        cases = [(demo_config(), 2, 5, 8, 2) if options.quick else (demo_config(), 2, 17, 8, 3)]
    for config, samples, frames, text, repeats in tqdm(cases, desc="train_step", unit="case"):
        yield from bench(config, samples, frames, text, repeats, options)
