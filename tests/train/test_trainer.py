"""The training loop: configs that refuse nonsense, runs that resume exactly, draws that keep the mixture."""

import copy
import errno
import itertools
import json
import math
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.train.conftest import TINY
from wam_kernels import PROGRAMS
from wam_models import GJD, cli, load_checkpoint
from wam_models.cli import train as train_command
from wam_models.cli.train import differences
from wam_models.data import ClipDataset
from wam_models.model.dual_expert import WorldActionModel
from wam_models.rollout.policy import Policy
from wam_models.train import trainer
from wam_models.train.config import TrainConfig
from wam_models.train.initialise import initialise
from wam_models.train.log import loss_ends
from wam_models.train.optimizers import Muon
from wam_models.train.run_folder import RunFolder
from wam_models.train.trainer import train


def losses(log):
    return [(row["step"], row["loss"], row["video_loss"], row["action_loss"], row["gradient"]) for row in log]


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(config, data, root, tmp_path):
    whole = train(config, data, seed=3, progress=False)
    rows = []
    cut = train(config, data, seed=3, out=tmp_path, stop=lambda: rows.append(0) or len(rows) == 5, progress=False)
    assert cut.step == 5
    policy, found = Policy.load(tmp_path / "checkpoint")
    log = tmp_path / "log.jsonl"  # it ran on behind its last checkpoint, and was killed
    log.write_bytes(log.read_bytes() + b'{"step": 6, "loss": 1}\n\xff\n{"step": 7, "lo')
    # another process would read the data again, with the checkpoint's codec
    again = ClipDataset(root, policy.codec)
    rest = train(config, again, seed=99, out=tmp_path, resume=found, progress=False)
    assert losses(cut.log) + losses(rest.log) == losses(whole.log)
    for a, b in zip(whole.policy.model.parameters(), rest.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses(logged) == losses(whole.log)


def test_time_decides_once_where_the_rate_ends(config, data, root, tmp_path, monkeypatch):
    """With a clock of one second a step: a run of 20 seconds decides halfway to end at step 19, and resumes so."""
    config = replace(config, steps=1000, schedule="decay", warmup=0)

    def run(**options):
        ticks = itertools.count()
        monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
        return train(config, data, seed=3, progress=False, **options)

    whole = run(seconds=20)
    assert whole.step == 19
    rates = [row["rate"] for row in whole.log]
    assert rates[:10] == [config.learning_rate] * 10
    assert all(a > b for a, b in itertools.pairwise(rates[9:])) and rates[-1] < 0.2 * rates[0]
    rows = []
    cut = run(seconds=20, out=tmp_path, stop=lambda: rows.append(0) or len(rows) == 12)
    assert cut.step == 12
    policy, found = Policy.load(tmp_path / "checkpoint")
    again = ClipDataset(root, policy.codec)
    rest = train(config, again, out=tmp_path, resume=found, progress=False)
    assert losses(cut.log) + losses(rest.log) == losses(whole.log)
    for a, b in zip(whole.policy.model.parameters(), rest.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("schedule, half, end", [("constant", 1.0, 1.0), ("cosine", 0.5, 0.0), ("decay", 1.0, 0.0)])
def test_schedules(schedule, half, end):
    config = TrainConfig(schedule=schedule, steps=1000, warmup=4, learning_rate=2.0)
    assert [config.rate(step) for step in range(2)] == pytest.approx([0.4, 0.8], rel=1e-4)
    assert config.rate(500) == pytest.approx(2 * half) and config.rate(1000) == pytest.approx(2 * end)
    assert config.rate(50, end=100) == pytest.approx(2 * half)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_moves_along_the_orthogonal_factor(shape):
    torch.manual_seed(0)
    start, grads = torch.randn(2, *shape), torch.randn(2, *shape)
    matrices = [torch.nn.Parameter(m.clone()) for m in start]
    for p, g in zip(matrices, grads, strict=True):
        p.grad = g
    Muon(matrices, lr=0.1, weight_decay=0.5).step()
    for p, before, g in zip(matrices, start, grads, strict=True):
        moved = (before * (1 - 0.1 * 0.5) - p.detach()) / (0.1 * 0.2 * 40**0.5)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        sizes = (u.T @ moved @ vh.T).diagonal()
        assert 0.6 < sizes.min() and sizes.max() < 1.3
        assert (moved - u @ sizes.diag() @ vh).norm() < 1e-3 * moved.norm()


def test_seeds_and_threads_of_randomness(config, data):
    short = replace(config, steps=2)
    torch.manual_seed(1)
    a = train(short, data, seed=0, progress=False)
    torch.manual_seed(2)  # nothing is drawn from the global generator that the seed does not set
    with torch.inference_mode():  # which is left for the run
        b = train(short, data, seed=0, progress=False)
    c = train(short, data, seed=1, progress=False)
    assert losses(a.log) == losses(b.log) != losses(c.log)


def test_training_lowers_the_loss(config, data):
    log = train(replace(config, steps=60, learning_rate=5e-3), data, progress=False).log
    mean = [sum(row["loss"] for row in part) / len(part) for part in (log[:10], log[-10:])]
    assert mean[1] < 0.8 * mean[0]


@pytest.mark.parametrize("programs", [PROGRAMS, ("joint",), ("video_then_action", "decoupled_same_step")])
def test_steps_keep_the_mixture(programs):
    config = TrainConfig(programs=programs)
    share = dict.fromkeys([*programs, "forward_dynamics", "inverse_dynamics"], 0.0)
    total = 0.0
    for probability, kind, _ in config.draws():
        total += probability
        if kind.program == GJD:
            weight = sum(kind.mixture.values())
            for name, w in kind.mixture.items():
                share[name] = share.get(name, 0.0) + probability * w / weight
        else:
            share[kind.program] += probability
    assert total == pytest.approx(1)
    assert share["forward_dynamics"] == pytest.approx(0.2) and share["inverse_dynamics"] == pytest.approx(0.2)
    for program in programs:
        assert share[program] == pytest.approx(0.6 / len(programs))


def test_an_initialised_model_passes_noise_through(config):
    """Near noise, the flow of a fresh model is close to its input."""
    torch.manual_seed(0)
    big = replace(config.model, hidden=192, heads=4, layers=2)
    model = WorldActionModel(big)
    initialise(model)
    x = torch.randn(1, 48, 3, 2, 4)
    stream, _ = model.embed((x, torch.full((1, 3), 1000.0)), None)
    flow, _ = model.flows((stream, None), 3, 1, 2)
    assert (flow - x).norm() < 0.3 * x.norm()


def test_a_narrow_patch_keeps_its_size(config):
    """A state of 17 numbers, twice as far from the mean: LayerNorm alone would give the same flow."""
    torch.manual_seed(0)
    sizes = replace(config.model, hidden=96, heads=2, layers=1, latent_channels=17, patch=(1, 1, 1))
    model = WorldActionModel(sizes)
    initialise(model)
    x = torch.randn(1, 17, 1, 1, 1)
    norms = []
    for scale in (0.5, 1.0):
        stream, _ = model.embed((scale * x, torch.full((1, 1), 1000.0)), None)
        flow, _ = model.flows((stream, None), 1, 1, 1)
        norms.append(flow.norm().item())
    assert 1.4 < norms[1] / norms[0] < 2.0


def test_a_config_survives_json(config):
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_data_that_does_not_fit_is_refused(config, data):
    for change, message in (
        ({"frames": 7}, "frames must be at most 6"),
        ({"model": replace(config.model, action_dim=6)}, "model.action_dim must be 7"),
        ({"model": replace(config.model, latent_channels=16)}, "model.latent_channels must be 48"),
    ):
        with pytest.raises(ValueError, match=message):
            train(replace(config, **change), data, progress=False)


def test_the_command_trains_and_resumes(root, tmp_path, capsys):
    path, out = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(TINY | {"frames": 6}))
    base = ["train", "--data", str(root), "--out", str(out)]
    assert cli.main([*base, str(path), "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert (
        "step 2 of 2; checkpoint:" in printed
        and "2 of 3 training episodes are shorter than a clip of 6 frames" in printed
    )
    assert re.search(r"loss \S+ \(steps 1 to 1\) -> \S+ \(steps 2 to 2\)", printed)
    assert cli.main([*base, "--resume", str(out / "checkpoint"), "--steps", "4"]) == 0
    assert "(steps 3 to 3) -> " in (printed := capsys.readouterr().out) and "units" not in printed
    assert len((out / "log.jsonl").read_text().splitlines()) == 4
    assert load_checkpoint(out / "checkpoint").training_state.values["step"] == 4
    assert cli.main([*base, "--resume", str(out / "checkpoint"), "--steps", "4"]) == 2
    assert "--steps must be above 4, the steps done, got 4" in capsys.readouterr().err


@pytest.mark.parametrize("steps, compared", [(1, 1), (2, 1), (59, 29), (60, 30), (400, 30)])
def test_losses_are_compared_between_different_steps(steps, compared):
    log = [{"video_loss": float(i), "action_loss": None} for i in range(steps)]
    first, last = (compared - 1) / 2, steps - 1 - (compared - 1) / 2
    assert loss_ends(log) == (compared, {"video": (first, last), "action": (None, None)})


def test_a_resume_on_other_data_keeps_units_and_words(root, config, data, tmp_path, capsys):
    train(replace(config, steps=2), data, out=tmp_path / "run", progress=False)
    policy, found = Policy.load(tmp_path / "run/checkpoint")
    other = tmp_path / "other"
    shutil.copytree(root, other)
    for path in (other / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        actions = [[10 * number + 3 for number in row] for row in table["action"].to_pylist()]
        column = pa.array(actions, table["action"].type)
        pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), path)
    flags = ["train", "--data", str(other), "--resume", str(tmp_path / "run/checkpoint"), "--steps", "3", "--out"]
    assert cli.main([*flags, str(tmp_path / "more")]) == 0
    assert "units of the checkpoint are kept" in (printed := capsys.readouterr().out) and "its stds 1 to 10" in printed
    kept, _ = Policy.load(tmp_path / "more/checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(kept.units, policy.units, strict=True))
    new = ClipDataset(other, policy.codec, units=policy.units)
    shifted = (10 * data.episode(0)["action"] + (9 * data.action_mean + 3) / data.action_std)[0, 1:]
    torch.testing.assert_close(new.episode(0)["action"][0, 1:], shifted, rtol=1e-4, atol=1e-4)
    # from Python nothing is changed unseen either
    for wrong, name in ((ClipDataset(other, policy.codec), "action_mean"), (ClipDataset(other), "action_mean|codec")):
        with pytest.raises(
            ValueError, match=rf"train: ({name})\S* of data must be the checkpoint's; .*units=policy.units"
        ):
            train(config, wrong, resume=found, progress=False)
    with pytest.raises(ValueError, match="actions have 7 numbers, the units 6"):
        ClipDataset(other, policy.codec, units=tuple(u[:6] for u in policy.units))
    with pytest.raises(ValueError, match="config.model must be .* ffn 32, not 64"):
        train(replace(config, model=replace(config.model, ffn=64)), data, resume=found, progress=False)
    # instructions
    new.tasks = ["lift", "push", "lift it"]
    with pytest.raises(ValueError, match="at most 1 words, got 2 in 'lift it'"):
        train(config, new, resume=found, progress=False)
    assert "words that the checkpoint does not know share one vector: it" in list(differences(policy, new))


def test_files_of_different_steps_are_not_resumed(config, data, tmp_path):
    train(replace(config, steps=1), data, out=tmp_path, progress=False)
    found = load_checkpoint(tmp_path / "checkpoint")
    found.training_state.values["step"] = 7
    with pytest.raises(ValueError, match=r"checkpoint/training: it is of step 7, config.json of step 1"):
        train(config, data, resume=found, progress=False)


def test_what_diverges_is_named_with_what_helps(config, data, monkeypatch):
    real = trainer.training_step

    def spoil(change):
        def step(model, *args, **options):
            loss, metrics = real(model, *args, **options)
            return change(loss, model), metrics

        monkeypatch.setattr(trainer, "training_step", step)

    spoil(lambda loss, _: loss * math.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan; lower learning_rate, 0.0005 in this step"):
        train(config, data, progress=False)
    spoil(lambda loss, model: loss + (model.core.proj_out.bias.sum() * 0).abs().sqrt())
    with pytest.raises(FloatingPointError, match="the gradient of step 1 is nan; lower"):
        train(config, data, progress=False)
    spoil(lambda loss, _: loss)
    bad = copy.copy(data)
    bad._action = [a.copy() for a in data._action]
    bad._action[1][:] = math.inf
    bad.train = [1]
    with pytest.raises(FloatingPointError, match="episode 1 of the data has action that is not finite"):
        train(config, bad, progress=False)


def at_step(number, act, monkeypatch):
    """Calls ``act`` within that step of a run."""
    steps, real = itertools.count(1), trainer.training_step

    def step(*args, **options):
        if next(steps) == number:
            act()
        return real(*args, **options)

    monkeypatch.setattr(trainer, "training_step", step)


@pytest.fixture
def usual_signals():
    """Signals act as in a terminal, also where the suite runs in the background, whose shell has them ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def flags(root, tmp_path, usual_signals):
    """Of a run of a hundred steps."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY | {"steps": 100}))
    return ["train", "--data", str(root), "--out", str(tmp_path / "run"), str(path)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(number, flags, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(number)
    # timeout(1) sends it twice
    at_step(2, lambda: (signal.raise_signal(number), signal.raise_signal(number)), monkeypatch)
    assert cli.main(flags) == 0
    out, err = capsys.readouterr()
    assert "step 2 of 100; checkpoint:" in out and "stopping after this step" in err
    assert load_checkpoint(tmp_path / "run/checkpoint").training_state.values["step"] == 2
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 2
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "MOMENT", -1)
    at_step(2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)], monkeypatch)
    assert cli.main(flags) == 130
    # what was done is in the log
    assert [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").open()] == [1]
    assert not (tmp_path / "run/checkpoint").exists()


def test_ignored_signals_stay_ignored(flags, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        at_step(1, lambda: signal.raise_signal(signal.SIGHUP), monkeypatch)
        assert cli.main([*flags, "--steps", "2"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_disk_is_one_line(flags, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert cli.main([*flags, "--steps", "1"]) == 2
        *bars, line = capsys.readouterr().err.splitlines()
        assert line.startswith("wam train: error: save_checkpoint: cannot write training to ")
        assert "No space left on device" in line and not any("error" in bar for bar in bars)
    assert not list((tmp_path / "run/checkpoint").iterdir())
    folder = RunFolder(tmp_path / "rows")
    with folder.begin(0), open("/dev/full", "wb", buffering=0) as folder._file:
        with pytest.raises(OSError, match=r"cannot write .*rows/log\.jsonl: No space left on device"):
            folder.add({"step": 1})


def test_no_run_is_lost_unless_that_is_asked_for(config, data, tmp_path, capsys):
    short, out = replace(config, steps=2), tmp_path / "run"
    train(short, data, out=out, progress=False)
    (out / "checkpoint/film.gif").write_text("mine")
    found = load_checkpoint(out / "checkpoint")
    files = {path: path.read_bytes() for path in out.rglob("*.*")}
    for options in ({}, {"resume": replace(found, save_id="0" * 16)}):
        with pytest.raises(ValueError, match="holds (a|another) run; go on from .*checkpoint with --resume, lose it"):
            train(config, data, out=out, progress=False, **options)
    # before the data is looked for
    assert cli.main(["train", "--data", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "--overwrite" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert files == {path: path.read_bytes() for path in out.rglob("*.*")}
    # a run without a checkpoint yet, and one that begins from another's
    (tmp_path / "new").mkdir()
    (tmp_path / "new/log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds another run; lose it with --overwrite"):
        train(config, data, out=tmp_path / "new", resume=found, progress=False)
    train(replace(config, steps=3), data, out=tmp_path / "new", resume=found, overwrite=True, progress=False)
    assert [json.loads(line)["step"] for line in (tmp_path / "new/log.jsonl").open()] == [3]
    # the old checkpoint never stands beside the new log, whose rows come one by one
    seen = []

    def look():
        seen.append(((out / "checkpoint/config.json").exists(), len((out / "log.jsonl").read_text().splitlines())))

    train(short, data, out=out, overwrite=True, stop=look, progress=False)
    assert seen == [(False, 1)] and load_checkpoint(out / "checkpoint").training_state.values["step"] == 2
    assert (out / "checkpoint/film.gif").read_text() == "mine"


def test_one_process_trains_into_a_folder(config, data, tmp_path):
    out, refused = tmp_path / "run", []
    late = RunFolder(out)

    def other():
        """Another process, which would take the first one's files away."""
        with pytest.raises(ValueError, match="another process trains into .*run right now"):
            train(config, data, out=out, overwrite=True, progress=False)
        refused.append(True)
        return True

    train(config, data, out=out, stop=other, progress=False)
    assert refused and load_checkpoint(out / "checkpoint").training_state.values["step"] == 1
    # one that looked before the first had begun, and begins after its end
    with pytest.raises(ValueError, match="holds a run"), late.begin(0):
        pass
    assert load_checkpoint(out / "checkpoint").training_state.values["step"] == 1


@pytest.mark.parametrize("name", ["run", "run/checkpoint"])
def test_a_link_to_nothing_and_a_file_are_no_folders(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("away")
    with pytest.raises(ValueError, match=f"--out must be a folder, but {path} is a link to away, which is not there"):
        RunFolder(tmp_path / "run")
    path.unlink()
    path.touch()
    with pytest.raises(ValueError, match=f"--out must be a folder, but {path} is a file"):
        RunFolder(tmp_path / "run")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("{tmp}/none.json", "none.json: No such file or directory"),
        ("{tmp}/bad.json", "bad.json: not valid JSON"),
        ("{tmp}/field.json", "field.json: unknown fields ['stepz']"),
        ("--resume {tmp}/none", "cannot read"),
        ("--resume {tmp}/old", "old/config.json: No such file or directory; there is one in {tmp}/old/checkpoint"),
        ("--device toaster", "--device must be cpu, cuda or cuda:N, got 'toaster'"),
        ("--device cpu:1", "--device must be cpu, cuda or cuda:N, got 'cpu:1'"),
        ("--device cuda:99", "--device cuda:99: this machine has"),
    ],
)
def test_mistakes_are_one_line(flags, message, root, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "field.json").write_text('{"stepz": 1}')
    (tmp_path / "old/checkpoint").mkdir(parents=True)
    (tmp_path / "old/checkpoint/config.json").touch()
    flags, message = flags.format(tmp=tmp_path).split(), message.format(tmp=tmp_path)
    assert cli.main(["train", "--data", str(root), "--out", str(tmp_path / "run"), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("wam train: error: ")


def test_missing_data_is_one_line(tmp_path, capsys):
    for command, words in (("train", "meta/info.json"), ("demo", "there is no folder")):
        assert cli.main([command, "--out", str(tmp_path), "--data", str(tmp_path / "none")]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
