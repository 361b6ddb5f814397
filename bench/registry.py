"""The suites, one row each: ``wam bench``, its report, ``tools/gpu/gpu.sh`` and the tests follow from these rows.

A suite is a module of ``bench/suites``; its rows are kept in ``bench/results`` under the same name. To add one, write
the module and a row: ``tests/bench/test_registry.py`` names what is missing.

    python -m bench.registry    the parts that tools/gpu/gpu.sh runs: group, suite, seconds
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.report.figures import episode_figure, norms_figure, plan_figure, roofline_figure, speed_figure
from bench.report.section import Section
from bench.report.tables import attention_table, episode_table, options_table, plan_table


@dataclass(frozen=True)
class Suite:
    name: str
    report: Section
    # ``wam bench --suite GROUP`` runs the suites of a group; without one a suite runs by name alone
    group: str | None = None
    # the most that tools/gpu/gpu.sh gives it; None: no part of that script
    gpu_seconds: int | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    threads: int | None = None  # that it is measured with; None: as torch chooses
    ceilings: bool = True  # its rows stand beside the machine's copy and products


EPISODE = ("s_chunk_1", "s_chunk_5", "s_chunk_10", "s_chunk_20", "s_chunk_30", "s_chunk_40", "s_total")
NORMS = {"norms": norms_figure}

# In the order in which a GPU's minutes are best spent.
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "rollout",
            Section(
                "Rollout chunk",
                ("what", "program", "guidance", "steps", "provider", "ms", "ms_p95", "ms_step", "x_roofline", "peak_MB",
                 "ratio"),
            ),
            group="rollout",
            gpu_seconds=180,
        ),
        Suite(
            "block_attention",
            Section(
                "Attention",
                ("workload", "tokens", "density", "what", "provider", "ms"),
                table=attention_table,
                figures={"attention_speed": speed_figure, "attention_roofline": roofline_figure},
            ),
            group="attention",
            gpu_seconds=240,
        ),
        Suite(
            "adaln",
            Section(
                "adaLN ops",
                ("op", "tokens", "D", "tokens_a_frame", "what", "provider", "ms", "GB/s", "%_of_copy", "ratio"),
                figures=NORMS,
            ),
            group="norms",
            gpu_seconds=90,
        ),
        Suite(
            "qk_norm_rope",
            Section(
                "q/k norm and rope",
                ("what", "tokens", "heads", "D", "provider", "ms", "GB/s", "%_of_copy", "ratio"),
                figures=NORMS,
            ),
            group="norms",
            gpu_seconds=60,
        ),
        Suite(
            "norm_peers",
            Section(
                "Norms compared with other libraries",
                ("op", "what", "tokens", "D", "provider", "ms", "ms_min", "%_of_copy", "ratio"),
                figures=NORMS,
            ),
            group="norms",
            gpu_seconds=60,
        ),
        Suite(
            "block",
            Section(
                "A block",
                ("workload", "what", "tokens", "provider", "ms", "ms_min", "ratio", "peak_MB", "kernels", "MB",
                 "roofline_MB"),
            ),
            group="block",
            gpu_seconds=120,
        ),
        Suite(
            "train_step",
            Section(
                "Training step",
                ("what", "frames", "tokens", "provider", "ms", "tokens/s", "%_of_matmul", "peak_MB", "ratio", "regime"),
            ),
            group="train_step",
            gpu_seconds=180,
        ),
        Suite(
            "cached_attention",
            Section(
                "Attention over a cache",
                ("fill", "cached", "visible", "rows", "heads", "D", "provider", "ms", "ms_min", "x dense", "x concat"),
            ),
            group="streaming",
            gpu_seconds=60,
        ),
        Suite(
            "streaming",
            Section(
                "Latency over an episode",
                ("program", "chunk", "provider", "ms"),
                table=episode_table,
                figures={"episode": episode_figure},
            ),
            group="streaming",
            gpu_seconds=180,
        ),
        Suite(
            "rollout_options",
            Section(
                "Options of a rollout",
                ("what", "option", "provider", "forwards", "ms", "ratio", "GFLOP", "MB", "action_error", "video_error",
                 "held_MB", "gap", "cpu_ms"),
                table=options_table,
            ),
            group="rollout",
            gpu_seconds=120,
            threads=1,
        ),
        Suite(
            "plan",
            Section(
                "Plans",
                ("workload", "tokens", "provider", "cpu_ms_min", "ms_min", "plan_MB"),
                table=plan_table,
                figures={"plan": plan_figure},
            ),
            group="plan",
            gpu_seconds=90,
            threads=1,
        ),
        Suite(
            "short_calls",
            Section(
                "Short calls under a mask: a plan against the dense mask",
                ("program", "tokens", "density", "provider", "ms", "ms_min", "ratio_min"),
            ),
            group="attention",
            gpu_seconds=30,
            threads=1,
            ceilings=False,
        ),
        Suite(
            "packed",
            Section(
                "Packed training steps: the loader against packs in memory",
                ("workload", "tokens", "provider", "tokens/s", "tokens/CPU s", "ratio", "ratio_cpu"),
            ),
            devices=("cpu",),
            threads=1,
            ceilings=False,
        ),
        # These need openwam, which is no requirement; the last takes minutes of training.
        Suite(
            "openwam",
            Section(
                "The OpenWAM package, unmodified and with install()",
                ("what", "architecture", "program", "tokens", "provider", "ms", "ms_min", "ratio", *EPISODE),
            ),
            devices=("cpu",),
        ),
        Suite(
            "rollout_openwam",
            Section(
                "Seconds of a chunk, compared with unmodified OpenWAM",
                ("program", "provider", "chunks", *EPISODE, "ratio_last", "ratio_total"),
            ),
            devices=("cpu",),
        ),
        Suite(
            "training_openwam",
            Section(
                "A training step, compared with unmodified OpenWAM",
                ("program", "tokens", "provider", "ms", "ms_min", "peak_MB", "ratio", "ratio_min", "ratio_peak"),
            ),
            devices=("cpu",),
            threads=1,
        ),
        # predicted, on any machine
        Suite(
            "static",
            Section(
                "Counted from machine code, predicted for an H100",
                ("op", "what", "provider", "D", "rows", "step", "instructions", "tensor cores_clocks", "issue_clocks",
                 "MUFU_clocks", "shared memory_clocks", "L2_clocks", "chain_clocks", "memory_clocks", "limit",
                 "TFLOP/s", "%_of_copy", "published"),
            ),
            devices=("cpu",),
            ceilings=False,
        ),
        # counted, on any machine
        Suite(
            "stop_gradient",
            Section(
                "Stop-gradient: pairs of dk and dv, and of dq",
                ("workload", "history", "stopped", "provider", "visible_pairs", "skipped_pairs", "key_tiles",
                 "idle_tiles", "computed_pairs", "useful", "dq_tiles", "dq_idle_tiles", "dq_computed_pairs",
                 "dq_useful"),
            ),
            devices=("cpu",),
            ceilings=False,
        ),
        Suite(
            "demo",
            Section(
                "The demo",
                ("what", "objective", "program", "seed", "steps", "training_seconds", "action_rmse",
                 "repeat_action_rmse", "psnr", "repeat_frame_psnr"),
            ),
            ceilings=False,
        ),
    )
}  # fmt: skip

# Group -> names of its suites.
GROUPS: dict[str, list[str]] = {}
for _suite in SUITES.values():
    if _suite.group is not None:
        GROUPS.setdefault(_suite.group, []).append(_suite.name)


# rows of `wam bench --base REF --record`, which is no suite
COMPARE = Section("This tree against another commit", ("base", "case", "instruction_ratio", "time_ratio", "spread"))
# rows of `python -m tests.integrations.counts`: its models are the tests', so it is no suite either
INTEGRATIONS = Section(
    "Steps of patched models, counted on small ones", ("case", "what", "provider", "operators", "bytes", "peak_bytes")
)
OTHERS = {"compare": COMPARE, "integrations": INTEGRATIONS}


def sections() -> dict[str, Section]:
    return {name: suite.report for name, suite in SUITES.items()} | OTHERS


if __name__ == "__main__":
    for _suite in SUITES.values():
        if _suite.gpu_seconds is not None:
            print(_suite.group, _suite.name, _suite.gpu_seconds)
