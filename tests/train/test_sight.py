"""What a run shows: rows by stream and objective with their speed, TensorBoard, pictures, a page about itself."""

import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.train.conftest import TINY
from wam_kernels.roofline import DEVICE_MODELS
from wam_models import cli
from wam_models.train import TrainConfig, trainer
from wam_models.train.log import MEASURED, Meter
from wam_models.train.trainer import Trainer, train

CPU = torch.device("cpu")
EVALUATED = ["--eval-every", "2", "--eval-chunk", "1"]


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A run of two steps by the command line, evaluated once."""
    folder = tmp_path_factory.mktemp("sight")
    (folder / "config.json").write_text(json.dumps(TINY | {"steps": 2, "mixture": {"joint": 1.0}}))
    out = folder / "run"
    flags = [str(folder / "config.json"), "--data", str(root), "--out", str(out)]
    assert cli.main(["train", *flags, *EVALUATED]) == 0
    return out


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tokens", [0, 300])
def test_flops_are_those_of_the_forward(tokens, config, data):
    """Counted by PyTorch on the very forward of a step; three times as many are a step's."""
    run = Trainer(replace(config, tokens=tokens, text_dropout=0.0), data, seed=0, device=CPU)
    step = next(run.steps())
    (part,) = step if tokens else run.parts
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused one is not counted
        _, metrics = run.forward(step, part)
    clips, frames = trainer.extent_of(part, config.frames)
    assert run.meter.flops(clips, frames, metrics["visible_pairs"]) == 3 * counter.get_total_flops()


def test_rows_have_losses_of_streams_and_objectives(data):
    config = TrainConfig.from_dict(TINY | {"batch": 6, "steps": 12})
    log = train(config, data, seed=1, progress=False).log
    drawn = set()
    for row in log:
        of_objectives = {k: v for k, v in row.items() if "/" in k}
        drawn |= set(of_objectives)
        for stream in ("video", "action"):
            means = [v for k, v in of_objectives.items() if k.startswith(stream)]
            assert not means or min(means) - 1e-6 <= row[f"{stream}_loss"] <= max(means) + 1e-6
        assert row["tokens"] == 6 * 2 * 5 * (2 + 4) and row["tokens_per_second"] > 0 and row["peak_memory"] > 2**20
        assert row["mfu"] is None  # nobody has written down the peak of a CPU
    assert drawn == {
        "video_loss/joint", "action_loss/joint", "video_loss/forward_dynamics", "action_loss/inverse_dynamics"
    }  # fmt: skip


def test_mfu_is_the_part_of_the_peak_of_all_processes(config, data, monkeypatch):
    run = Trainer(config, data, seed=0, device=CPU)
    h100 = DEVICE_MODELS["h100"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: h100.reported)
    monkeypatch.setattr("wam_models.train.log.peak_memory", lambda device: 7)
    for bf16, peak in ((True, h100.tensor_flops), (False, h100.float32_flops)):
        meter = Meter(run.meter.sizes, 4, torch.device("cuda"), bf16=bf16)
        row = meter.row(2, 10, 1000, 0.5)
        assert row["mfu"] == pytest.approx(meter.flops(2, 10, 1000) / 0.5 / (4 * peak)) and row["peak_memory"] == 7
        assert row["tokens_per_second"] == 2 * row["tokens"]
        assert meter.row(2, 10, 1000, 0.0)["mfu"] is None  # a clock that stood still


def test_an_evaluation_leaves_imagined_frames_beside_real_ones(run):
    found = rows(run)[1]["evaluation"]
    assert found["recorded"]["action_rmse"] > 0
    picture = Image.open(run / found["picture"])
    assert picture.size[0] > picture.size[1] / 3 and len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_the_page_of_a_run_has_commands_that_run(run, tmp_path, monkeypatch, capsys):
    page = (run / "README.md").read_text()
    assert f"--out {run}" in page and "--eval-every 2" in page and "| seed | 0 |" in page
    resume, rollout, _, export, board = re.findall(r"```sh\n(.*?)```", page, re.S)[1].splitlines()
    assert board == f"tensorboard --logdir {run / 'tensorboard'}"
    monkeypatch.chdir(tmp_path)
    for command in (f"{resume} --steps 3", f"{rollout} --chunks 1 --out {tmp_path}", export):
        program, *args = shlex.split(command)
        assert program == "wam" and cli.main(args) == 0, capsys.readouterr().err
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    assert "Resumed after step 2," in (run / "README.md").read_text()
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["steps"] == 3 and recipe["eval_every"] == 2 and recipe["eval_chunk"] == 1


def test_tensorboard_has_the_rows(config, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from wam_models.rollout.policy import Policy

    def events():
        found = EventAccumulator(str(tmp_path / "tensorboard"))
        found.Reload()
        return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    short = replace(config, steps=2)
    train(short, data, out=tmp_path, tensorboard=True, progress=False)
    train(short, data, out=tmp_path, tensorboard=True, overwrite=True, progress=False)  # nothing of the first is left
    _, found = Policy.load(tmp_path / "checkpoint")
    log = train(replace(config, steps=3), data, out=tmp_path, tensorboard=True, resume=found, progress=False).log
    written = events()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written["loss"] == [(row["step"], pytest.approx(row["loss"])) for row in logged] and log == logged[2:]
    assert {name for row in logged for name, value in row.items() if value is not None} == {"step", *written}
    assert set(MEASURED) - {"mfu"} <= set(written)


def test_without_tensorboard_its_package_is_named(config, data, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert cli.main(["train", "--data", str(root), "--out", str(tmp_path / "run"), "--tensorboard"]) == 2
    assert "'tensorboard' is not installed" in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wam-kernels\[tensorboard\]'"):
        train(config, data, out=tmp_path / "run", tensorboard=True)
